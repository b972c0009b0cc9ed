use super::doctor::{findings, type_there};
use super::*;

// doctor: what people reported, whole situations as they had them; doctor finds each, and what it says to type is accepted

/// The driver, loaded, and its nodes' numbers.
fn driver(host: Host) -> Host {
    let host = host
        .file(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n",
        )
        .file("proc/driver/nvidia/params", "ModifyDeviceFiles: 1\nDeviceFileMode: 438\n")
        .file("proc/devices", "Character devices:\n195 nvidia\n236 nvidia-caps\n511 nvidia-uvm\n\nBlock devices:\n")
        .file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Device Minor: \t 0\n");
    ["nvidia_uvm", "nvidia_modeset", "nvidia_drm"]
        .iter()
        .fold(host, |host, module| host.file(&format!("sys/module/{module}/holders/.x"), ""))
}

fn card() -> Host {
    driver(Host::new().card("0000:01:00", "nvidia", "snd_hda_intel"))
}

fn ct(id: u32, lines: &str) -> Host {
    card().file(&format!("etc/pve/lxc/{id}.conf"), &format!("arch: amd64\n{lines}"))
}

/// Found, with these words; what to type.
#[track_caller]
fn found(host: &Host, id: &str, words: &str) -> String {
    let all = findings(host, "doctor");
    let is_it = |finding: &&Value| finding["id"] == id && finding.to_string().contains(words);
    let finding = all.iter().find(is_it).unwrap_or_else(|| panic!("{id} {words}: {all:#?}"));
    finding["remedy"].as_str().unwrap().to_string()
}

#[track_caller]
fn accepted(host: &Host, call: &str) {
    let call = call.strip_prefix("gpu-handoff ").unwrap_or_else(|| panic!("{call}"));
    let run = host.run(&format!("{call} --dry-run"));
    assert_eq!(run.code, Some(0), "{call}: {run:?}");
}

#[test]
fn two_ways_of_giving_nodes() {
    let devs = "unprivileged: 1\ndev0: /dev/nvidia0,gid=44\ndev1: /dev/nvidiactl,gid=44\n\
                lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n";
    let host = ct(101, devs);
    type_there(&host, &found(&host, "ct-node-twice", "/dev/nvidia0 by dev0"));
    assert!(!findings(&host, "doctor").iter().any(|finding| finding["id"] == "ct-node-twice"));
}

#[test]
fn a_driver_that_is_kept_away_elsewhere() {
    let bare = || Host::new().card("0000:01:00", "", "snd_hda_intel");
    for word in ["modprobe.blacklist=nouveau,nvidiafb,nvidia", "module_blacklist=nvidia"] {
        found(&bare().file("proc/cmdline", &format!("quiet {word}\n")), "blacklist", word);
    }
    let files = "alias nvidia off\nalias nvidia_drm off\nblacklist nvidia_drm\nblacklist nvidia_uvm\nblacklist nvidia_modeset\n";
    let host = bare().file("etc/modprobe.d/blacklist-nvidia.conf", files);
    for (id, words) in [
        ("alias", "alias nvidia off"),
        ("blacklist", "blacklist nvidia_uvm"),
        ("blacklist", "blacklist nvidia_modeset"),
    ] {
        let remedy = found(&host, id, words);
        type_there(&host, remedy.split("; then").next().unwrap());
    }
    let remove = "ACTION==\"add\", SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x03[0-9]*\", ATTR{remove}=\"1\"\n";
    found(&Host::new().file("usr/lib/udev/rules.d/50-remove-nvidia.rules", remove), "udev-rule", "ln -s /dev/null");
}

#[test]
fn a_card_that_is_bound_at_boot() {
    let bound = || {
        let host = Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 0000:01:00\n");
        ["0000:01:00.0", "0000:01:00.1"]
            .iter()
            .fold(host, |host, address| host.file(&format!("{}/driver_override", device(address)), "vfio-pci\n"))
    };
    found(&bound().file("etc/driverctl.d/0000:01:00.0", "vfio-pci\n"), "driverctl", "0000:01:00.0");
    let rule = "SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", ATTR{driver_override}=\"vfio-pci\"\n";
    found(&bound().file("etc/udev/rules.d/10-vfio-bind.rules", rule), "udev-rule", "10-vfio-bind.rules:1");
    let script = "#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n";
    let host = bound().file("etc/initramfs-tools/scripts/init-top/vfio.sh", script);
    found(&host, "bound-at-boot", "init-top/vfio.sh:2");
    found(&host, "card-elsewhere", "0000:01:00 is on vfio-pci, and no handoff put it there");
}

#[test]
fn a_container_with_somebody_elses_rules() {
    let lines = "lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 509:* rwm\n\
        lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n\
        lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n";
    let host = ct(101, lines);
    accepted(&host, &found(&host, "ct-rules", "none for nvidia-uvm 511"));
    let old = ct(101, &lines.replace("cgroup2", "cgroup").replace("509", "511"));
    accepted(&old, &found(&old, "ct-rules", "none for nvidia 195"));
    found(&old, "ct-cgroup-v1", "write lxc.cgroup2.devices.allow: c 511:* rwm");
}

#[test]
fn a_stranger_in_the_group_is_not_to_be_unbound() {
    let vm = |host: Host| host.vm(111, "hostpci0: 0000:01:00\n");
    let disk = vm(card().function("0000:02:00.0", "010802", "144d:a808", "nvme", 1));
    let card = vm(card().function("0000:02:00.0", "030000", "10de:2684", "nvidia", 1));
    for (host, driver) in [(disk, "nvme"), (card, "nvidia")] {
        let remedy =
            found(&host, "group-shared", &format!("0000:02:00.0 is in the same IOMMU group (1) and {driver} has it"));
        assert!(!remedy.contains("unbind"), "{remedy}");
    }
}

#[test]
fn lines_and_ways_that_name_a_card_otherwise() {
    let host = card().vm(111, "hostpci0: 0000:01:00,pcie=1,newkey=1\nmachine: q35\n");
    type_there(&host, &found(&host, "vm-line-not-understood", "there is no option 'newkey'"));
    assert!(
        fs::read_to_string(host.path("etc/pve/qemu-server/111.conf"))
            .unwrap()
            .contains("hostpci0: 0000:01:00,pcie=1\n")
    );
    let args = card().vm(111, "args: -device vfio-pci,host=01:00.0,multifunction=on -device vfio-pci,host=01:00.1\n");
    found(&args, "vm-args", "qm set 111 --hostpci0 0000:01:00, and take it out of args");
    found(&args, "vm-no-hook", "gpu-handoff enable 111");
}

#[test]
fn nodes_of_capabilities_that_nobody_makes() {
    let cap = "DeviceFileMinor: 1\nDeviceFileMode: 256\nDeviceFileModify: 1\n";
    let host = ct(102, "unprivileged: 1\ndev0: /dev/nvidia-caps/nvidia-cap1,gid=44\n")
        .file("proc/driver/nvidia/capabilities/mig/config", cap);
    accepted(&host, &found(&host, "ct-node-missing", "/dev/nvidia-caps/nvidia-cap1"));
    found(&host, "nodes-missing", "/dev/nvidia-caps/nvidia-cap1 236:1");
}

#[test]
fn an_address_that_is_another_devices_now() {
    let host = driver(Host::new().card("0000:02:00", "nvidia", "snd_hda_intel"))
        .function("0000:01:00.0", "010802", "144d:a808", "nvme", 14)
        .vm(111, "hookscript: local:snippets/gpu-handoff\nhostpci0: 0000:01:00\n")
        .config(r#"{"gpus":{"0000:01:00":{"home":"nvidia"}}}"#);
    let remedy = found(&host, "vm-other-device", "which nvme has");
    type_there(&host, remedy.split_once(": ").unwrap().1.split("; ").next().unwrap());
    assert!(!findings(&host, "doctor").iter().any(|finding| finding["id"] == "vm-other-device"));
    found(&host, "config-slot", "name one of those of this host: 0000:02:00");
}

#[test]
fn who_is_kept_alive_by_somebody_else_is_not_to_be_killed() {
    let host = card()
        .vm(111, "hostpci0: 0000:01:00\n")
        .file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), NULL_NUMBER);
    let docker = host.process(PID, "ollama", "/system.slice/docker-0123456789ab.scope", &[NULL]);
    let remedy = found(&docker, "vm-would-not-start", "ollama");
    assert!(remedy.contains("docker stop") && !remedy.contains("kill "), "{remedy}");
}

#[test]
fn a_disk_on_the_cards_own_usb_controller() {
    let host = card()
        .function("0000:01:00.2", "0c0330", "10de:1ad8", "xhci_hcd", 1)
        .file(&format!("{}/usb3/3-1/3-1:1.0/host8/target8:0:0/8:0:0:0/block/sdb/sdb1/x", device("0000:01:00.2")), "")
        .file("proc/mounts", "/dev/sdb1 /mnt/backup ext4 rw 0 0\n")
        .vm(111, "hostpci0: 0000:01:00\n");
    assert_eq!(found(&host, "behind-the-card", "the disk sdb1"), "unmount it: umount /mnt/backup");
}
