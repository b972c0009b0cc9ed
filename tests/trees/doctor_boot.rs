use super::doctor::{fires, fires_of, fixed, silent, well};
use super::*;
use std::time::{Duration, SystemTime};

// doctor: the IOMMU and the boot loader, modprobe's files

/// The host boots by GRUB; `line` is what /etc/default/grub has, and `booted` what the kernel was booted with.
pub fn grub(line: &str, booted: &str) -> Host {
    well()
        .file("usr/sbin/update-grub", "#!/bin/sh\n")
        .file("etc/default/grub", &format!("GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"{line}\"\n"))
        .file("proc/cmdline", &format!("root=/dev/sda {booted}\n"))
}

const LOADER: &str = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

fn systemd_boot(line: &str, booted: &str) -> Host {
    well()
        .file(LOADER, "\x06\0\0\0s\0y\0s\0t\0e\0m\0d\0-\0b\0o\0o\0t\0")
        .file("etc/kernel/proxmox-boot-uuids", "1234\n")
        .file("etc/kernel/cmdline", &format!("root=ZFS=rpool {line}\n"))
        .file("proc/cmdline", &format!("root=ZFS=rpool {booted}\n"))
}

pub const GRUB: &str = "/etc/default/grub:2";

#[test]
fn an_iommu_that_is_off() {
    let off = || {
        let host = well().without("sys/kernel/iommu_groups");
        let host = host.without(&format!("{}/iommu_group", device("0000:01:00.0")));
        host.without(&format!("{}/iommu_group", device("0000:01:00.1")))
    };
    let finding = fires("iommu-off", &off(), "/sys/kernel/iommu_groups", &["error", "no device is in an IOMMU group"]);
    // As setup vfio has it, which is what to type.
    assert!(off().run("setup vfio").err.contains(finding["remedy"].as_str().unwrap()));
    silent("iommu-off", &well());
    // One card alone is in none.
    let one = well().without(&format!("{}/iommu_group", device("0000:01:00.0")));
    let place = "/sys/bus/pci/devices/0000:01:00.0/iommu_group";
    let finding = fires("iommu-off", &one, place, &["0000:01:00.0 is in no IOMMU group"]);
    assert!(one.run("plan 111").err.contains(finding["remedy"].as_str().unwrap()));
    // A host without a card wants none.
    silent("iommu-off", &Host::new().file("etc/pve/lxc/1.conf", ""));
}

#[test]
fn words_that_turn_the_iommu_off() {
    for word in ["intel_iommu=off", "amd_iommu=off", "iommu=off", "iommu=soft", "intel_iommu=sm_on,off"] {
        let host = grub(&format!("quiet {word}"), &format!("quiet {word}"));
        fires("iommu-word-off", &host, GRUB, &["error", word, "turns the IOMMU off"]);
        let bare = well().file("proc/cmdline", &format!("x {word}\n"));
        fires("iommu-word-off", &bare, "/proc/cmdline", &["leave it out of what the boot loader has"]);
    }
    for word in ["intel_iommu=on", "iommu=pt", "iommu=noforce", "my_iommu=off", "amd_iommu=fullflush"] {
        silent("iommu-word-off", &grub(word, word));
    }
    // It contradicts another, and the other stays when it is taken out.
    let host = grub("intel_iommu=on iommu=off", "intel_iommu=on iommu=off");
    fires("iommu-word-off", &host, GRUB, &["although there is intel_iommu=on as well"]);
    let both = grub("intel_iommu=on iommu=off", "");
    fires("iommu-word-off", &both, GRUB, &["from the next boot on"]);
    fixed("iommu-word-off", &both);
    let left = fs::read_to_string(both.path("etc/default/grub")).unwrap();
    assert!(left.contains("intel_iommu=on") && !left.contains("iommu=off"), "{left}");
}

#[test]
fn a_word_that_no_kernel_knows() {
    let host = grub("amd_iommu=on", "amd_iommu=on");
    fires("iommu-no-such-word", &host, GRUB, &["note", "amd_iommu=on is no option"]);
    // Not a part of another word.
    let both = grub("intel_iommu=on iommu=on quiet", "");
    fires("iommu-no-such-word", &both, GRUB, &["iommu=on is no option"]);
    fixed("iommu-no-such-word", &both);
    let left = fs::read_to_string(both.path("etc/default/grub")).unwrap();
    assert!(left.contains("\"intel_iommu=on  quiet\""), "{left}");
    silent("iommu-no-such-word", &grub("intel_iommu=on iommu=pt", "intel_iommu=on iommu=pt"));
}

#[test]
fn interrupts_that_are_not_remapped() {
    for word in ["intremap=off", "nointremap", "vfio_iommu_type1.allow_unsafe_interrupts=1"] {
        fires("interrupts-unsafe", &grub(word, word), GRUB, &["warning", word]);
    }
    let host = well().file("etc/modprobe.d/x.conf", "# a\noptions vfio_iommu_type1 allow_unsafe_interrupts=1\n");
    fires("interrupts-unsafe", &host, "/etc/modprobe.d/x.conf:2", &["has vfio do without interrupt remapping"]);
    fixed("interrupts-unsafe", &host);
    silent("interrupts-unsafe", &grub("intremap=nosid", "intremap=nosid"));
    silent(
        "interrupts-unsafe",
        &well().file("etc/modprobe.d/x.conf", "options vfio_iommu_type1 allow_unsafe_interrupts=0\n"),
    );
}

#[test]
fn groups_that_are_split() {
    let word = "pcie_acs_override=downstream,multifunction";
    let host = grub(word, word);
    fires("acs-override", &host, GRUB, &["warning", word]);
    silent("acs-override", &well());
}

#[test]
fn a_word_for_the_other_boot_loader() {
    let host = systemd_boot("quiet", "quiet")
        .file("etc/default/grub", "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet intel_iommu=on\"\n");
    let words = ["warning", "intel_iommu=on stands there, and this host boots by systemd-boot"];
    fires("other-boot-loader", &host, "/etc/default/grub:1", &words);
    mended_into(&host, "etc/kernel/cmdline", "root=ZFS=rpool quiet intel_iommu=on\n");
    let host = grub("quiet", "quiet").file("etc/kernel/cmdline", "root=x intel_iommu=on quiet\n");
    fires("other-boot-loader", &host, "/etc/kernel/cmdline:1", &["this host boots by GRUB"]);
    mended_into(&host, "etc/default/grub", "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"intel_iommu=on quiet\"\n");
    // It stands in both, or is about something else.
    silent(
        "other-boot-loader",
        &systemd_boot("intel_iommu=on", "intel_iommu=on")
            .file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"intel_iommu=on\"\n"),
    );
    silent(
        "other-boot-loader",
        &systemd_boot("quiet", "quiet").file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"splash console=x\"\n"),
    );
}

/// What is advised is typed, and the file is so afterwards.
#[track_caller]
fn mended_into(host: &Host, file: &str, text: &str) {
    let finding = fires_of("other-boot-loader", host, "doctor");
    let remedy = finding["remedy"].as_str().unwrap().split(" && ").next().unwrap();
    doctor::type_there(host, remedy);
    assert_eq!(fs::read_to_string(host.path(file)).unwrap(), text, "{remedy}");
}

#[test]
fn a_word_that_was_not_booted_with() {
    let host = grub("quiet intel_iommu=on", "quiet");
    fires("not-booted-with", &host, GRUB, &["note", "intel_iommu=on", "update-grub; then reboot the host"]);
    let host = systemd_boot("quiet iommu=pt", "quiet");
    fires("not-booted-with", &host, "/etc/kernel/cmdline:1", &["iommu=pt", "proxmox-boot-tool refresh"]);
    silent("not-booted-with", &grub("quiet intel_iommu=on", "quiet intel_iommu=on"));
    silent("not-booted-with", &grub("splash", "quiet"));
}

#[test]
fn a_kernel_without_vfio_pci() {
    let host = well().without("sys/bus/pci/drivers/vfio-pci");
    let finding = fires(
        "vfio-missing",
        &host,
        "/lib/modules/6.12.48-1-pve/modules.dep",
        &["error", "vfio-pci is neither loaded"],
    );
    assert!(host.run("plan 111").err.contains(finding["remedy"].as_str().unwrap()));
    silent(
        "vfio-missing",
        &host.file("lib/modules/6.12.48-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko: x\n"),
    );
}

#[test]
fn a_kernel_that_was_removed() {
    let host = well().file("lib/modules/6.14.0-1-pve/modules.dep", "");
    fires(
        "kernel-removed",
        &host,
        "/lib/modules/6.12.48-1-pve",
        &["error", "modules of 6.14.0-1-pve", "reboot the host"],
    );
    silent("kernel-removed", &host.file("lib/modules/6.12.48-1-pve/modules.dep", ""));
    silent("kernel-removed", &well());
}

#[test]
fn a_module_that_went_away() {
    let host = well().file("etc/modules", "# x\nvfio\nvfio_virqfd\n");
    fires("vfio-virqfd", &host, "/etc/modules:3", &["note", "kernel 6.12.48-1-pve has no such module"]);
    fixed("vfio-virqfd", &host);
    let host = well().file("etc/modules-load.d/vfio.conf", "vfio-virqfd\n");
    fires("vfio-virqfd", &host, "/etc/modules-load.d/vfio.conf:1", &[]);
    silent("vfio-virqfd", &host.file("proc/sys/kernel/osrelease", "6.1.0-1-pve\n"));
    silent("vfio-virqfd", &well().file("etc/modules", "vfio\nvfio_pci\n"));
}

fn age(host: &Host, path: &str, seconds: u64) {
    let file = fs::File::open(host.path(path)).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

#[test]
fn an_initramfs_that_is_older_than_its_copies() {
    let initrd = "boot/initrd.img-6.12.48-1-pve";
    let host = well().file(initrd, "").file("etc/modprobe.d/x.conf", "options a b=1\n");
    age(&host, initrd, 100);
    let words = ["warning", "older than /etc/modprobe.d/x.conf", "update-initramfs -u -k 6.12.48-1-pve"];
    fires("initramfs-old", &host, "/boot/initrd.img-6.12.48-1-pve", &words);
    age(&host, "etc/modprobe.d/x.conf", 200);
    // Something was taken out since; not just when it was made.
    fires("initramfs-old", &host, "/boot/initrd.img-6.12.48-1-pve", &["the last change in /etc/modprobe.d"]);
    age(&host, "etc/modprobe.d", 50);
    silent("initramfs-old", &host);
    let host = host.file("lib/modprobe.d/y.conf", "options a b=1\n");
    fires("initramfs-old", &host, "/boot/initrd.img-6.12.48-1-pve", &["/lib/modprobe.d/y.conf"]);
    age(&host, "lib/modprobe.d/y.conf", 200);
    silent("initramfs-old", &host);
    let host = host.file("etc/initramfs-tools/scripts/init-top/x", "");
    fires("initramfs-old", &host, "/boot/initrd.img-6.12.48-1-pve", &["/etc/initramfs-tools/scripts/init-top/x"]);
    let pending = well().file("var/lib/gpu-handoff/initramfs-pending", "");
    fires("initramfs-old", &pending, "/var/lib/gpu-handoff/initramfs-pending", &["gpu-handoff setup vfio"]);
}

// modprobe's files

#[test]
fn options_that_contradict_each_other() {
    let host = well()
        .file("etc/modprobe.d/a.conf", "options nvidia_drm modeset=0\n")
        .file("etc/modprobe.d/b.conf", "options nvidia-drm modeset=1 fbdev=1\n");
    let words = ["warning", "modeset=0 here and modeset=1 in /etc/modprobe.d/b.conf:1, which counts"];
    fires("options-contradict", &host, "/etc/modprobe.d/a.conf:1", &words);
    fixed("options-contradict", &host);
    let host = grub("nvidia-drm.modeset=1", "nvidia-drm.modeset=1")
        .file("etc/modprobe.d/a.conf", "options nvidia_drm modeset=0\n");
    fires("options-contradict", &host, "/etc/modprobe.d/a.conf:1", &["modeset=1 in /etc/default/grub:2, which counts"]);
    // The same in other words, and what nobody asked about.
    let host = well()
        .file("etc/modprobe.d/a.conf", "options nvidia_drm modeset=Y\noptions snd_hda_intel power_save=0\n")
        .file("etc/modprobe.d/b.conf", "options nvidia-drm modeset=1\noptions snd_hda_intel power_save=1\n");
    silent("options-contradict", &host);
}

#[test]
fn a_file_that_modprobe_does_not_read() {
    let host = well().file("etc/modprobe.d/blacklist-fb", "# x\nblacklist nouveau\nblacklist nvidiafb\n");
    fires(
        "modprobe-not-read",
        &host,
        "/etc/modprobe.d/blacklist-fb:2",
        &["warning", "blacklist nouveau is in a file that is not read"],
    );
    fixed("modprobe-not-read", &host);
    fires(
        "modprobe-not-read",
        &well().file("etc/modprobe.d/vfio.conf.bak", "options vfio-pci ids=1:2\n"),
        "/etc/modprobe.d/vfio.conf.bak:1",
        &[],
    );
    silent(
        "modprobe-not-read",
        &well()
            .file("etc/modprobe.d/README", "these files are read\n")
            .file("etc/modprobe.d/zfs.bak", "options zfs x=1\n"),
    );
}

#[test]
fn a_file_that_hides_a_packages() {
    let host = well()
        .file("usr/lib/modprobe.d/nvidia.conf", "blacklist nouveau\n")
        .file("etc/modprobe.d/nvidia.conf", "# empty\n");
    fires(
        "modprobe-hidden",
        &host,
        "/etc/modprobe.d/nvidia.conf",
        &["note", "it hides /usr/lib/modprobe.d/nvidia.conf"],
    );
    fixed("modprobe-hidden", &host);
    silent(
        "modprobe-hidden",
        &well().file("usr/lib/modprobe.d/a.conf", "blacklist pcspkr\n").file("etc/modprobe.d/a.conf", ""),
    );
}

#[test]
fn proxmoxs_own_file_under_another_name() {
    let host = well().file("etc/modprobe.d/pve-blacklist-old.conf", "blacklist nvidiafb\n");
    fires(
        "modprobe-renamed",
        &host,
        "/etc/modprobe.d/pve-blacklist-old.conf",
        &["warning", "which belongs to pve-manager"],
    );
    fixed("modprobe-renamed", &host);
    silent("modprobe-renamed", &well().file("etc/modprobe.d/pve-blacklist.conf", "blacklist nvidiafb\n"));
}
