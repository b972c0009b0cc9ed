use super::doctor::{fires, fixed, silent, well, well_but};
use super::setup_driver::{PENDING, executable};
use super::*;

// doctor: what is left over or owed of this program's own

#[test]
fn a_cluster_file_system_that_is_down() {
    let host = Host::new().file("usr/bin/pveversion", "");
    fires("pve-down", &host, "/etc/pve", &["error", "systemctl restart pve-cluster"]);
    silent("pve-down", &Host::new());
    silent("pve-down", &well().file("usr/bin/pveversion", ""));
}

#[test]
fn files_of_proxmoxs_that_do_not_let_themselves_be_used() {
    let host = well().file("etc/pve/local/x", "");
    silent("no-quorum", &host);
    fs::set_permissions(host.path("etc/pve/local"), std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
    fires("no-quorum", &host, "/etc/pve/local", &["warning", "pvecm status"]);
    // A folder where a file should be cannot be read, not even by root.
    let odd = well().file("etc/pve/qemu-server/113.conf/x", "");
    fires("guest-unreadable", &odd, "/etc/pve/qemu-server/113.conf", &["error", "Is a directory"]);
    silent("guest-unreadable", &well());
    let rules = "lib/udev/rules.d/60-gpu-handoff.rules";
    let host = well().file(&format!("usr/{rules}"), "");
    silent("rule-masked", &host);
    let masked = host.link("etc/udev/rules.d/60-gpu-handoff.rules", "dev/null");
    fires("rule-masked", &masked, "/etc/udev/rules.d/60-gpu-handoff.rules", &["error"]);
    fixed("rule-masked", &masked);
}

#[test]
fn mistakes_in_the_configuration() {
    let host = well().config(r#"{"policy":{"unt":"stop"}}"#);
    let finding = fires("config-mistake", &host, "/etc/gpu-handoff/config.json", &["error", "unt"]);
    assert!(host.run("config check").err.contains(finding["found"].as_str().unwrap()));
    // It is told once.
    silent("not-seen", &host);
    silent("config-mistake", &well().config(r#"{"policy":{"unit":"stop"}}"#));
    let slot = well().config(r#"{"gpus":{"0000:09:00":{"home":"nvidia"}}}"#);
    fires("config-slot", &slot, "/etc/gpu-handoff/config.json", &["warning", "names no NVIDIA GPU", "0000:01:00"]);
    silent("config-slot", &well().config(r#"{"gpus":{"0000:01:00":{"home":"nvidia"}}}"#));
}

#[test]
fn cards_that_are_stuck_or_left() {
    let host = well().wedged("0000:01:00", PID).alive(PID);
    fires("wedged", &host, "/run/gpu-handoff/wedged-0000:01:00", &["error", "0000:01:00 is wedged"]);
    silent("wedged", &well());
    let left = Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").file("etc/pve/lxc/101.conf", "");
    let left = left.record("vm-111", "0000:01:00", "away", "nvidia");
    fires("stranded", &left, "/sys/bus/pci/devices/0000:01:00.0", &["error", "gpu-handoff to-home 0000:01:00"]);
    // What a record names is ours still, and not left over.
    silent("new-id-left", &left);
    silent("stranded", &well());
    let owed = well().record("vm-111", "0000:01:00", "leaving", "nvidia");
    fires("owed", &owed, "/run/gpu-handoff", &["warning", "bring it home", "gpu-handoff reconcile"]);
    fixed("owed", &owed);
    silent("owed", &well());
    let broken = well().file("run/gpu-handoff/vm-111", "{");
    let file = broken.path("run/gpu-handoff/vm-111");
    fires("not-seen", &broken, file.to_str().unwrap(), &["warning", "EOF while parsing"]);
    silent("not-seen", &well());
}

#[test]
fn other_names_for_the_same_nodes() {
    let host = |before: &str| {
        well()
            .file("sys/module/nvidia_drm/refcnt", "0\n")
            .file("proc/driver/nvidia/version", "NVRM version: x Kernel Module  570.86.16  x\n")
            .file(&format!("{}/drm/card1/dev", device("0000:01:00.0")), "226:1\n")
            .file("run/gpu-handoff/dri", before)
    };
    let finding =
        fires("dri-names", &host(r#"{"0000:01:00.0":["card0"]}"#), "/dev/dri", &["warning", "card0", "card1"]);
    assert!(!finding["remedy"].as_str().unwrap().is_empty());
    silent("dri-names", &host(r#"{"0000:01:00.0":["card1"]}"#));
}

#[test]
fn a_set_up_that_is_not_done() {
    let host = well()
        .file(PENDING, r#"{"schema":1,"vfio":{"why":"update-initramfs failed","tries":2},"driver":null,"kernels":{}}"#);
    let words = ["error", "\"found\":\"update-initramfs failed\"", "gpu-handoff setup pending"];
    fires("setup-pending", &host, "/var/lib/gpu-handoff/setup.pending", &words);
    silent("setup-pending", &well());
    let reboot = well().file("run/reboot-required.pkgs", "linux\ngpu-handoff\n");
    fires("reboot-required", &reboot, "/run/reboot-required", &["note"]);
    silent("reboot-required", &well().file("run/reboot-required.pkgs", "linux\n"));
}

#[test]
fn units_of_ours() {
    let unit = "gpu-handoff-reconcile.service";
    let host = well().file(&format!("usr/lib/systemd/system/{unit}"), "");
    silent("unit-masked", &host);
    let masked = host.link(&format!("etc/systemd/system/{unit}"), "dev/null");
    fires(
        "unit-masked",
        &masked,
        &format!("/etc/systemd/system/{unit}"),
        &["error", "systemctl unmask gpu-handoff-reconcile.service"],
    );
    let systemctl = |says: &str| {
        let host = well().file(&format!("usr/lib/systemd/system/{unit}"), "");
        executable(host, "usr/bin/systemctl", &format!("#!/bin/sh\n[ \"$1\" = list-units ] && echo '{says}'\nexit 0\n"))
    };
    let failed = systemctl(&format!("{unit} loaded failed failed Bring GPUs home"));
    fires("unit-failed", &failed, unit, &["warning", "journalctl -b -u gpu-handoff-reconcile.service"]);
    silent("unit-failed", &systemctl(""));
}

#[test]
fn the_link_that_guests_name() {
    let link = "var/lib/vz/snippets/gpu-handoff";
    let place = "/var/lib/vz/snippets/gpu-handoff";
    let gone = well().without(link);
    fires("hook-link", &gone, place, &["error", "is not there, and it is the hookscript of 111", "\"fix\":true"]);
    fixed("hook-link", &gone);
    let dead = well().without("usr/sbin/gpu-handoff");
    fires("hook-link", &dead, place, &["which is not there", "\"fix\":false"]);
    let another = well().without(link).file(link, "#!/bin/sh\n");
    fires(
        "hook-link",
        &another,
        place,
        &["is no link to /usr/sbin/gpu-handoff", "mv /var/lib/vz/snippets/gpu-handoff /root/"],
    );
    silent("hook-link", &well());
    // Nobody names it.
    silent("hook-link", &Host::new().vm(111, "memory: 1"));
}

#[test]
fn hookscripts_on_other_storages() {
    let storage = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,snippets\n\nnfs: nas\n\texport /x\n\tserver y\n\tcontent images\n";
    let host = || {
        Host::new()
            .card("0000:01:00", "nvidia", "snd_hda_intel")
            .vm(111, "hookscript: nas:snippets/gpu-handoff\nhostpci0: 0000:01:00")
            .file("etc/pve/storage.cfg", storage)
    };
    let words = ["error", "/mnt/pve/nas/snippets/gpu-handoff is not there", "qm set 111 --delete hookscript"];
    fires("hook-file-missing", &host(), "/etc/pve/qemu-server/111.conf:2", &words);
    let there = host().file("mnt/pve/nas/snippets/gpu-handoff", "");
    silent("hook-file-missing", &there);
    fires(
        "storage-without-snippets",
        &there,
        "/etc/pve/storage.cfg:5",
        &["note", "pvesm set nas --content images,snippets"],
    );
    silent("storage-without-snippets", &well().file("etc/pve/storage.cfg", storage));
}

#[test]
fn nodes_that_are_missing() {
    let host = well().file("proc/driver/nvidia/params", "DeviceFileMode: 438\n");
    fires("nodes-missing", &host, "/dev/nvidiactl", &["warning", "195:255", "\"fix\":true", "gpu-handoff reconcile"]);
    silent("nodes-missing", &well());
    let mount = "arch: amd64\nunprivileged: 1\nlxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n";
    let uvm = well().file("etc/pve/lxc/101.conf", mount);
    fires("uvm-not-loaded", &uvm, "/sys/module/nvidia_uvm", &["warning", "gpu-handoff reconcile"]);
    silent("uvm-not-loaded", &uvm.driver("nvidia-uvm"));
    silent("uvm-not-loaded", &well());
}

#[test]
fn overrides_and_ids_that_are_left_over() {
    let attribute = format!("{}/driver_override", device("0000:01:00.0"));
    let place = "/sys/bus/pci/devices/0000:01:00.0/driver_override";
    for text in ["vfio-pci", "nvidia"] {
        let host = well().file(&attribute, &format!("{text}\n"));
        fires("override-left", &host, place, &["warning", text, "\"fix\":true"]);
        let run = host.run("doctor --fix");
        assert_eq!((run.code, run.out.as_str()), (Some(0), "clear     driver_override 0000:01:00.0\n"));
        silent("override-left", &host);
    }
    silent("override-left", &well());
    // By driverctl, by a rule, by a record of ours.
    silent("override-left", &well().file(&attribute, "nvidia\n").file("etc/driverctl.d/0000:01:00.0", "nvidia\n"));
    let rule = "SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", ATTR{driver_override}=\"vfio-pci\"\n";
    silent("override-left", &well().file(&attribute, "vfio-pci\n").file("etc/udev/rules.d/x.rules", rule));
    silent("override-left", &well().file(&attribute, "vfio-pci\n").record("vm-111", "0000:01:00", "leaving", "nvidia"));

    let taken = || Host::new().card("0000:01:00", "vfio-pci", "snd_hda_intel").file("etc/pve/lxc/101.conf", "");
    let place = "/sys/bus/pci/devices/0000:01:00.0/driver";
    fires("new-id-left", &taken(), place, &["note", "(10de 2684)", "\"fix\":true"]);
    let host = taken();
    assert_eq!(host.run("doctor --fix").out, "remove    the id 10de 2684 from vfio-pci\n");
    assert_eq!(fs::read_to_string(host.path("sys/bus/pci/drivers/vfio-pci/remove_id")).unwrap(), "10de 2684");
    silent("new-id-left", &well());
    // The administrator's own, an override, a VM that has it now, its home.
    let ids = || taken().file("etc/modprobe.d/x.conf", "options vfio-pci ids=10de:2684\n");
    silent("new-id-left", &ids());
    silent("new-id-left", &ids().config(r#"{"gpus":{"0000:01:00":{"home":"none"}}}"#));
    silent("new-id-left", &taken().file(&attribute, "vfio-pci\n"));
    silent("new-id-left", &taken().vm(112, "hostpci0: 0000:01:00").running(112, PID));
    silent("new-id-left", &taken().config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#));
    silent("new-id-left", &well_but("balloon: 0\n"));
}
