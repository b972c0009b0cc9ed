use super::doctor::{fires, fires_of, fixed, silent, well, well_but, with_log};
use super::doctor_boot::{GRUB, grub};
use super::*;

// doctor: what keeps the card from its driver, and the cards themselves

// What keeps the card from its driver

/// A card that vfio-pci has, and nobody knows why.
fn taken() -> Host {
    Host::new()
        .card("0000:01:00", "vfio-pci", "vfio-pci")
        .file(&format!("{}/driver_override", device("0000:01:00.0")), "vfio-pci\n")
        .file(&format!("{}/driver_override", device("0000:01:00.1")), "vfio-pci\n")
        .file("etc/pve/lxc/101.conf", "arch: amd64\n")
}

#[test]
fn blacklists_and_the_like() {
    let at = |text: &str| well().file("etc/modprobe.d/x.conf", text);
    let place = "/etc/modprobe.d/x.conf:1";
    fires("blacklist", &at("blacklist nvidia\n"), place, &["error", "keeps nvidia from being loaded"]);
    fixed("blacklist", &at("blacklist nvidia\n"));
    fires("blacklist", &at("blacklist nvidia_drm\n"), place, &["\"severity\":\"warning\""]);
    fires("blacklist", &at("blacklist nvidia_uvm\n"), place, &["\"severity\":\"error\""]);
    for word in ["modprobe.blacklist=nouveau,nvidiafb,nvidia", "module_blacklist=nvidia"] {
        fires("blacklist", &grub(word, word), GRUB, &["error", word]);
        fires("blacklist", &well().file("proc/cmdline", &format!("{word}\n")), "/proc/cmdline", &[]);
        fixed("blacklist", &grub(word, ""));
    }
    silent("blacklist", &at("blacklist nouveau\nblacklist nvidiafb\n"));
    fires("install", &at("install nvidia /bin/false\n"), place, &["error"]);
    fixed("install", &at("install nvidia /bin/false\n"));
    silent("install", &at("install nvidia /sbin/modprobe -i nvidia-current\n"));
    fires("alias", &at("alias nvidia off\n"), place, &["error"]);
    fixed("alias", &at("alias nvidia off\n"));
    silent("alias", &at("alias nouveau off\n"));
}

#[test]
fn what_gives_the_card_to_vfio_at_boot() {
    let ids = "options vfio-pci ids=10de:2684,10de:22ba\n";
    let host = taken().file("etc/modprobe.d/vfio.conf", &format!("{ids}softdep nvidia pre: vfio-pci\n"));
    fires(
        "static-ids",
        &host,
        "/etc/modprobe.d/vfio.conf:1",
        &["error", "gives 0000:01:00.0 0000:01:00.1 to vfio-pci"],
    );
    fires("softdep", &host, "/etc/modprobe.d/vfio.conf:2", &["warning"]);
    fires(
        "card-elsewhere",
        &host,
        "/sys/bus/pci/devices/0000:01:00.0/driver",
        &["put right what acts at boot: static-ids, softdep"],
    );
    fixed("static-ids", &host);
    let word = "vfio-pci.ids=10de:2684,8086:1572";
    fires("static-ids", &grub(word, word), GRUB, &[word]);
    fixed("static-ids", &grub(word, ""));
    silent("static-ids", &well().file("etc/modprobe.d/vfio.conf", "options vfio-pci ids=8086:1572\n"));
    silent("softdep", &well().file("etc/modprobe.d/vfio.conf", "softdep nvidia pre: vfio-pci\n"));
    let host = taken().file("etc/driverctl.d/0000:01:00.0", "vfio-pci\n");
    fires("driverctl", &host, "/etc/driverctl.d/0000:01:00.0:1", &["error"]);
    fixed("driverctl", &host);
    silent("driverctl", &taken().file("etc/driverctl.d/0000:03:00.0", "vfio-pci\n"));
    let bind = "#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n";
    let host = taken().file("etc/initramfs-tools/scripts/init-top/vfio.sh", bind);
    fires("bound-at-boot", &host, "/etc/initramfs-tools/scripts/init-top/vfio.sh:2", &["error", "in the initramfs"]);
    fixed("bound-at-boot", &host);
    silent("bound-at-boot", &taken().file("etc/initramfs-tools/scripts/init-top/x.sh", "#!/bin/sh\necho x\n"));
    let host = taken()
        .file("usr/local/bin/bind.sh", bind)
        .file("etc/modprobe.d/vfio.conf", "install vfio-pci /usr/local/bin/bind.sh\n");
    fires("bound-by-install", &host, "/etc/modprobe.d/vfio.conf:1", &["error"]);
    fixed("bound-by-install", &host);
    silent("bound-by-install", &taken().file("etc/modprobe.d/vfio.conf", "install vfio-pci /usr/local/bin/none.sh\n"));
}

#[test]
fn rules_of_udevs() {
    let bind = "SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", ATTR{driver_override}=\"vfio-pci\"\n";
    let host = taken().file("etc/udev/rules.d/10-vfio.rules", bind);
    fires("udev-rule", &host, "/etc/udev/rules.d/10-vfio.rules:1", &["error", "when it appears"]);
    fixed("udev-rule", &host);
    // A card that is removed is nowhere to be seen.
    let remove = "ACTION==\"add\", SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x03[0-9]*\", ATTR{remove}=\"1\"\n";
    let host = Host::new().file("usr/lib/udev/rules.d/50-x.rules", remove);
    fires("udev-rule", &host, "/usr/lib/udev/rules.d/50-x.rules:1", &["has the kernel forget an NVIDIA card"]);
    fixed("udev-rule", &host);
    silent("udev-rule", &taken().file("etc/udev/rules.d/10-vfio.rules", &bind.replace("01:00", "03:00")));
}

#[test]
fn a_card_that_is_elsewhere_for_no_reason() {
    let place = "/sys/bus/pci/devices/0000:01:00.0/driver";
    let words = ["warning", "nothing that acts at boot explains that", "reboot the host"];
    fires("card-elsewhere", &taken(), place, &words);
    // Whose VM it was.
    let ran = taken().vm(112, "hostpci0: 0000:01:00\n");
    fires("card-elsewhere", &ran, place, &["gpu-handoff enable 112"]);
    silent("card-elsewhere", &well());
    silent("card-elsewhere", &taken().config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#));
    let bare = Host::new().card("0000:01:00", "", "snd_hda_intel").driver("nvidia");
    fires(
        "card-elsewhere",
        &bare,
        place,
        &["0000:01:00 has no driver", "echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"],
    );
}

#[test]
fn another_driver_for_the_same_card() {
    let modules = "lib/modules/6.12.48-1-pve/modules.dep";
    let host = Host::new().card("0000:01:00", "nouveau", "snd_hda_intel").file(modules, "updates/nvidia.ko:\n");
    let words = ["error", "nouveau has 0000:01:00", "gpu-handoff setup vfio"];
    fires("rival-driver", &host, "/sys/module/nouveau", &words);
    // Without NVIDIA's driver it is at home there.
    silent("rival-driver", &Host::new().card("0000:01:00", "nouveau", "snd_hda_intel"));
    let loaded = well().driver("nova_core").file(modules, "updates/nvidia.ko:\n");
    fires("rival-driver", &loaded, "/sys/module/nova_core", &["warning", "nova_core is loaded"]);
    let race = well().file(modules, "updates/nvidia.ko:\nkernel/drivers/gpu/drm/nouveau/nouveau.ko.zst: x\n");
    fires(
        "rival-driver",
        &race,
        "/lib/modules/6.12.48-1-pve/modules.dep",
        &["warning", "nothing keeps it from taking the card"],
    );
    fixed("rival-driver", &race);
    for kept in
        ["blacklist nouveau\n", "install nouveau /bin/false\n", "alias nouveau off\n", "options nouveau modeset=0\n"]
    {
        let host =
            well().file(modules, "updates/nvidia.ko:\nkernel/nouveau.ko: x\n").file("etc/modprobe.d/x.conf", kept);
        silent("rival-driver", &host);
    }
    let word = "modprobe.blacklist=nouveau";
    silent("rival-driver", &grub(word, word).file(modules, "updates/nvidia.ko:\nkernel/nouveau.ko: x\n"));
}

// The cards

#[test]
fn a_stranger_in_the_group() {
    let host = || well().function("0000:02:00.0", "010802", "144d:a808", "nvme", 1);
    let place = "/sys/bus/pci/devices/0000:02:00.0/iommu_group";
    let finding = fires(
        "group-shared",
        &host(),
        place,
        &["error", "0000:02:00.0 is in the same IOMMU group (1) and nvme has it"],
    );
    assert!(!finding["remedy"].as_str().unwrap().contains("unbind"));
    assert!(host().run("plan 111").err.contains(finding["remedy"].as_str().unwrap()));
    // It is not told twice.
    silent("vm-would-not-start", &host());
    fires_of("vm-would-not-start", &host(), "doctor 111");
    silent("group-shared", &well().function("0000:02:00.0", "010802", "144d:a808", "nvme", 2));
    silent(
        "group-shared",
        &well_but("hostpci1: 0000:02:00\n").function("0000:02:00.0", "010802", "144d:a808", "nvme", 1),
    );
    // A second card of NVIDIA's is a stranger to the first.
    let two = well().function("0000:02:00.0", "030000", "10de:2684", "nvidia", 1);
    fires_of("group-shared", &two, "doctor");
}

#[test]
fn a_card_that_is_divided() {
    let host = well().file(&format!("{}/sriov_numvfs", device("0000:01:00.0")), "2\n");
    fires(
        "card-divided",
        &host,
        "/sys/bus/pci/devices/0000:01:00.0/sriov_numvfs",
        &["error", "2 SR-IOV virtual functions"],
    );
    silent("card-divided", &well().file(&format!("{}/sriov_numvfs", device("0000:01:00.0")), "0\n"));
}

#[test]
fn a_card_that_is_gone() {
    let host = well().answers("0000:01:00.0", &[0xff; 64]);
    fires("card-gone", &host, "/sys/bus/pci/devices/0000:01:00.0/config", &["error", "power the host off and on"]);
    silent("card-gone", &well().answers("0000:01:00.0", &[0xde, 0x10, 0x84, 0x26]));
}

#[test]
fn a_disk_behind_the_card() {
    let host = || well().function("0000:01:00.2", "0c0330", "10de:1ad8", "xhci_hcd", 1);
    let disk = format!("{}/usb3/3-1/host8/block/sdb/sdb1/x", device("0000:01:00.2"));
    let mounted = host().file(&disk, "").file("proc/mounts", "/dev/sdb1 /mnt/backup ext4 rw 0 0\n");
    let words = ["warning", "the disk sdb1 is on 0000:01:00.2 and is mounted at /mnt/backup", "umount /mnt/backup"];
    fires("behind-the-card", &mounted, "/sys/bus/pci/devices/0000:01:00.2/driver", &words);
    silent("behind-the-card", &host().file(&disk, ""));
}

#[test]
fn the_screen_of_the_firmware() {
    let bars = "0x00000000d0000000 0x00000000dfffffff 0x000000000014220c\n0x0 0x0 0x0\n";
    let on = |memory: &str| {
        well()
            .file(&format!("{}/resource", device("0000:01:00.0")), bars)
            .file("proc/iomem", &format!("00000000-00000fff : Reserved\n  {memory} : BOOTFB\n"))
    };
    let host = on("d0000000-d07fffff");
    fires("screen-on-card", &host, "/proc/iomem", &["\"severity\":\"note\"", "in the memory of 0000:01:00.0"]);
    fires(
        "screen-on-card",
        &host.file("proc/sys/kernel/osrelease", "5.15.0-1-pve\n"),
        "/proc/iomem",
        &["\"severity\":\"error\""],
    );
    silent("screen-on-card", &on("e0000000-e07fffff"));
    silent("screen-on-card", &on("00000000-00000000"));
}

#[test]
fn what_the_kernels_log_says() {
    const LOG: &str = "kernel log of this boot";
    let xid = |number: u32| format!("NVRM: Xid (PCI:0000:01:00): {number}, pid=1, x");
    let log = |lines: &str| with_log(well(), lines);
    fires("fallen-off", &log(&xid(79)), LOG, &["error", "power the host off and on"]);
    silent("fallen-off", &log(&xid(31)));
    let twice = format!("{}\n{}", xid(31), xid(31));
    fires("xid", &log(&twice), LOG, &["warning", "31, pid=1", "(2 such lines)"]);
    silent("xid", &log(&xid(79)));
    let reserve = "vfio-pci 0000:01:00.0: BAR 1: can't reserve [mem 0xd0000000-0xdfffffff 64bit pref]";
    fires("bar-taken", &log(reserve), LOG, &["error", "can't reserve"]);
    silent("bar-taken", &log(&reserve.replace("01:00", "03:00")));
    let room = "pci 0000:01:00.0: BAR 1 [mem size 0x400000000 64bit pref]: can't assign; no space";
    fires("bar-unassigned", &log(room), LOG, &["warning", "Above 4G Decoding"]);
    silent("bar-unassigned", &log(&room.replace("01:00", "03:00")));
    let cold = "vfio-pci 0000:01:00.0: Unable to change power state from D3cold to D0, device inaccessible";
    fires("d3cold", &log(cold), LOG, &["warning", "disable_idle_d3=1"]);
    silent("d3cold", &log(&cold.replace("01:00", "03:00")));
    let remapping = "vfio_iommu_type1_attach_group: No interrupt remapping support.  Use the module param x";
    fires("no-interrupt-remapping", &log(remapping), LOG, &["error"]);
    silent("no-interrupt-remapping", &log("AMD-Vi: Interrupt remapping enabled"));
    let open = "NVRM: installed in this system requires use of the NVIDIA open kernel modules.";
    fires("driver-refuses-card", &log(open), LOG, &["error", "with its open modules"]);
    silent("driver-refuses-card", &log("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05"));
    fires("module-rejected", &log("Loading of module nvidia is rejected: key was rejected"), LOG, &["error"]);
    silent("module-rejected", &log("nvidia: module license 'NVIDIA' taints kernel."));
    let firmware = "nvidia 0000:01:00.0: Direct firmware load for nvidia/580.95.05/gsp_ga10x.bin failed with error -2";
    fires("firmware-not-found", &log(firmware), LOG, &["error"]);
    silent("firmware-not-found", &log("nvidia: firmware version 580.95.05"));
    // Nobody asks where there is no card.
    silent("xid", &with_log(Host::new(), &xid(31)));
}
