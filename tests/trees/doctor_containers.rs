use super::doctor::{fires, fires_of, fixed, silent, well};
use super::*;

// doctor: containers

const CT: &str = "/etc/pve/lxc/101.conf";
const MOUNT: &str = "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n";

/// The driver is loaded, and container 101 has these lines.
fn ct(lines: &str) -> Host {
    well()
        .file("proc/devices", "Character devices:\n195 nvidia\n511 nvidia-uvm\n\nBlock devices:\n")
        .file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Device Minor: \t 0\n")
        .file("etc/pve/lxc/101.conf", &format!("arch: amd64\n{lines}"))
}

const RULES: &str = "lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 511:* rwm\n";

#[test]
fn nodes_that_are_given_twice() {
    let host = ct(&format!("unprivileged: 1\n{MOUNT}dev0: /dev/nvidia0\n"));
    let words = ["error", "/dev/nvidia0 by dev0 and by lxc.mount.entry", "pct set 101 --delete dev0"];
    let finding = fires("ct-node-twice", &host, &format!("{CT}:3"), &words);
    assert_eq!(finding["guest"], 101);
    fixed("ct-node-twice", &host);
    silent("ct-node-twice", &ct(&format!("unprivileged: 1\n{MOUNT}dev0: /dev/nvidia1\n")));
}

#[test]
fn nodes_that_do_not_exist() {
    let host = ct("unprivileged: 1\ndev0: /dev/nvidia7\n");
    fires("ct-node-missing", &host, &format!("{CT}:3"), &["error", "dev0 is /dev/nvidia7, which does not exist"]);
    // Those that reconcile makes.
    let made = ct("unprivileged: 1\ndev0: /dev/nvidia-caps/nvidia-cap1\n")
        .file("proc/devices", "Character devices:\n195 nvidia\n236 nvidia-caps\n\nBlock devices:\n")
        .file("proc/driver/nvidia/params", "DeviceFileMode: 438\n")
        .file(
            "proc/driver/nvidia/capabilities/mig/config",
            "DeviceFileMinor: 1\nDeviceFileMode: 256\nDeviceFileModify: 1\n",
        );
    fires("ct-node-missing", &made, &format!("{CT}:3"), &["gpu-handoff reconcile"]);
    silent("ct-node-missing", &ct(&format!("{RULES}{MOUNT}")));
}

#[test]
fn rules_that_are_missing_or_of_another_time() {
    let stale = format!(
        "lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 509:* rwm\n{MOUNT}\
        lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n"
    );
    let host = ct(&stale);
    let finding = fires(
        "ct-rules",
        &host,
        &format!("{CT}:2"),
        &["error", "none for nvidia-uvm 511", "gpu-handoff container attach 101"],
    );
    // What is advised is accepted.
    let call = finding["remedy"].as_str().unwrap().strip_prefix("gpu-handoff ").unwrap().to_string();
    assert_eq!(host.run(&format!("{call} --dry-run")).code, Some(0));
    silent("ct-rules", &ct(&format!("{RULES}{MOUNT}")));
    // What is not about a GPU is not looked at.
    silent("ct-rules", &ct("mp0: /srv,mp=/srv\n"));
}

#[test]
fn nodes_that_go_with_a_card() {
    let all = format!(
        "{RULES}{MOUNT}lxc.mount.entry: /dev/nvidiactl dev/nvidiactl none bind\nlxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind\n"
    );
    let host = ct(&format!("{RULES}{MOUNT}"));
    let words = ["warning", "given /dev/nvidia0 without /dev/nvidiactl and /dev/nvidia-uvm"];
    let finding = fires("ct-nodes-incomplete", &host, &format!("{CT}:4"), &words);
    let call = finding["remedy"].as_str().unwrap().strip_prefix("gpu-handoff ").unwrap().to_string();
    assert_eq!(host.run(&format!("{call} --dry-run")).code, Some(0), "{call}");
    silent("ct-nodes-incomplete", &ct(&all));
    silent("ct-nodes-incomplete", &ct("lxc.mount.entry: /dev dev none bind\n"));
    silent("ct-nodes-incomplete", &ct("lxc.mount.entry: /dev/dri dev/dri none bind\n"));
    let one = ct(&all.replace("lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind\n", ""));
    fires("ct-nodes-incomplete", &one, &format!("{CT}:4"), &["without /dev/nvidia-uvm\""]);
}

#[test]
fn rules_of_the_old_kind() {
    let host = ct(&format!("{MOUNT}lxc.cgroup.devices.allow: c 195:* rwm\n"));
    let words = ["warning", "lxc.cgroup2.devices.allow: c 195:* rwm", "pct reboot 101"];
    fires("ct-cgroup-v1", &host, &format!("{CT}:3"), &words);
    silent("ct-cgroup-v1", &ct(&format!("{RULES}{MOUNT}")));
    silent("ct-cgroup-v1", &ct("lxc.cgroup.devices.allow: c 10:200 rwm\n"));
}

#[test]
fn lines_that_do_nothing() {
    let host = ct(&format!("{RULES}lxc.mount.entry: /dev/nvidia0 /dev/nvidia0 none bind\n{MOUNT}"));
    fires("ct-line-useless", &host, &format!("{CT}:4"), &["warning", "because its target is absolute"]);
    silent("ct-line-useless", &ct(&format!("{RULES}{MOUNT}")));
}

#[test]
fn lxcs_own_hook() {
    let host = ct("unprivileged: 1\nlxc.hook.mount: /usr/share/lxc/hooks/nvidia\n");
    fires("ct-lxc-hook", &host, &format!("{CT}:3"), &["error", "which this host lacks", "libnvidia-container-tools"]);
    silent("ct-lxc-hook", &host.file("usr/bin/nvidia-container-cli", ""));
}

#[test]
fn a_container_that_has_none() {
    let host = ct("");
    silent("ct-not-attached", &host);
    let finding = fires_of("ct-not-attached", &host, "doctor 101");
    let call = finding["remedy"].as_str().unwrap().strip_prefix("gpu-handoff ").unwrap().to_string();
    assert_eq!(host.run(&format!("{call} --dry-run")).code, Some(0), "{call}");
}

#[test]
fn nodes_for_drawing_that_are_nobodys() {
    let dri = "lxc.mount.entry: /dev/dri/renderD128 dev/dri/renderD128 none bind,optional,create=file\n";
    let host = ct(&format!("unprivileged: 1\n{dri}"));
    let words = ["warning", "by a mount", "pct set 101 --dev0 /dev/dri/renderD128,mode=0666"];
    fires("ct-dri-without-owner", &host, &format!("{CT}:3"), &words);
    silent("ct-dri-without-owner", &ct(&format!("{dri}lxc.cgroup2.devices.allow: c 226:* rwm\n")));
    silent("ct-dri-without-owner", &ct(&format!("unprivileged: 1\n{dri}lxc.idmap: g 44 44 1\n")));
}

/// A container that runs; this is what a look into it finds.
fn running(lines: &str, said: &str) -> Host {
    let cgroup = "sys/fs/cgroup/lxc/101";
    let host = ct(&format!("unprivileged: 1\n{MOUNT}{lines}"))
        .file("proc/driver/nvidia/version", "NVRM version: x Kernel Module  580.95.05  x\n")
        .file(&format!("{cgroup}/cgroup.events"), "populated 1\n")
        .file(&format!("{cgroup}/cgroup.procs"), &format!("{PID}\n"))
        .file(&format!("proc/{PID}/status"), &format!("Name:\tinit\nNSpid:\t{PID}\t1\n"))
        .link(&format!("proc/{PID}/exe"), "sbin/init")
        .file("inside-101", said);
    host.file("usr/sbin/pct", "#!/bin/sh\ncat \"${0%/usr/sbin/pct}/inside-$2\"\n")
}

const FITS: &str = "os=debian\nos_version=12\nlibcuda=580.95.05\nlibnvidia-ml=580.95.05\nsmi=yes\nnode=/dev/nvidia0\n";

#[test]
fn the_driver_inside() {
    let old = running("", &FITS.replace("580.95.05", "570.86.16"));
    let words = ["error", "the driver is 570.86.16, the host has 580.95.05"];
    fires("ct-driver", &old, CT, &words);
    silent("ct-driver", &running("", FITS));
    silent("ct-unreadable", &running("", FITS));
    let broken = running("", FITS).without("usr/sbin/pct");
    fires("ct-unreadable", &broken, CT, &["warning", "cannot be looked into"]);
}

#[test]
fn the_toolkit_inside() {
    let toolkit = |package: &str, nvcc: &str| format!("{FITS}package={package} 1 installed\n{nvcc}");
    let broken = running("", &toolkit("cuda-toolkit-12-8", ""));
    fires("ct-cuda", &broken, CT, &["warning", "nvcc does not work"]);
    let newer = running("", &toolkit("cuda-toolkit-13-3", "nvcc=13.3\n"))
        .file("proc/driver/nvidia/version", "x Module  570.86.16  x\n");
    fires("ct-cuda", &newer, CT, &["it needs driver"]);
    silent("ct-cuda", &running("", &toolkit("cuda-toolkit-12-8", "nvcc=12.8\n")));
    silent("ct-cuda", &running("", FITS));
}

#[test]
fn docker_inside() {
    fires("ct-docker", &running("", &format!("{FITS}docker=yes\n")), CT, &["error", "no-cgroups --in-place"]);
    silent("ct-docker", &running("", FITS));
}

#[test]
fn nodes_that_went_stale() {
    let uvm = "lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n";
    // In a tree a link stands for a node: the host's has the driver's number, the container's another.
    let inside = |node: &str| {
        let host = running(uvm, &format!("{FITS}node=/dev/nvidia-uvm\n"));
        let host = host.file("proc/devices", "Character devices:\n195 nvidia\n  5 nvidia-uvm\n\nBlock devices:\n");
        for (path, node) in [("dev/nvidia-uvm", "/dev/tty"), (&format!("proc/{PID}/root/dev/nvidia-uvm"), node)] {
            fs::create_dir_all(host.path(path).parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(node, host.path(path)).unwrap();
        }
        host
    };
    fires(
        "ct-nodes-stale",
        &inside(NULL),
        &format!("{CT}:4"),
        &["error", "/dev/nvidia-uvm is 1:3, on the host 5:0", "pct reboot 101"],
    );
    silent("ct-nodes-stale", &inside("/dev/tty"));
}
