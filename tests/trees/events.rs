use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

// Device events, and what containers' own phases make of a GPU that is away

const GPU_COMES: &str = "ACTION=bind SUBSYSTEM=pci DRIVER=nvidia PCI_CLASS=30000 PCI_ID=10DE:2684";

/// These programs note what they are asked for.
pub fn with_systemd(mut host: Host) -> Host {
    for name in ["systemctl", "systemd-run"] {
        let path = format!("usr/bin/{name}");
        let note = format!("#!/bin/sh\necho \"{name} $*\" >>${{0%/usr/bin/*}}/calls\n");
        host = host.file(&path, &note);
        fs::set_permissions(host.path(&path), fs::Permissions::from_mode(0o755)).unwrap();
    }
    host
}

fn calls(host: &Host) -> Vec<String> {
    fs::read_to_string(host.path("calls")).unwrap_or_default().lines().map(str::to_string).collect()
}

fn event(host: &Host, properties: &str) -> Run {
    let mut command = host.command("udev");
    command.envs(properties.split(' ').filter_map(|word| word.split_once('=')));
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn silence() -> Run {
    Run { code: Some(0), out: String::new(), err: String::new() }
}

#[test]
fn of_many_events_one_asks_for_a_look() {
    let host = with_systemd(host());
    assert_eq!(event(&host, GPU_COMES), silence());
    assert_eq!(event(&host, "ACTION=add SUBSYSTEM=module DEVPATH=/module/nvidia_uvm"), silence());
    let asked = calls(&host);
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert!(asked[0].starts_with("systemd-run --quiet --collect --no-block --unit=gpu-handoff-settle-"), "{asked:?}");
    assert!(asked[0].ends_with("gpu-handoff settle"), "{asked:?}");
    assert!(host.has_own_file("device-event"));
    assert_eq!(host.run("settle"), silence());
    assert!(!host.has_own_file("device-event"), "the next event asks again");
    assert_eq!(event(&host, GPU_COMES), silence());
    assert_eq!(calls(&host).iter().filter(|call| call.ends_with("settle")).count(), 2);
    // The package brings a unit for it.
    let host =
        host.file("usr/lib/systemd/system/gpu-handoff-settle@.service", "").without("run/gpu-handoff/device-event");
    assert_eq!(event(&host, GPU_COMES), silence());
    let asked = calls(&host).pop().unwrap();
    assert!(
        asked.starts_with("systemctl start --no-block -- gpu-handoff-settle@") && asked.ends_with(".service"),
        "{asked}"
    );
}

#[test]
fn an_event_that_cannot_ask_leaves_it_to_the_next() {
    let host = host();
    let message = "containers were not looked at after a device event: /usr/bin/systemd-run is not installed; type: \
                   gpu-handoff settle";
    assert_eq!(event(&host, GPU_COMES), refusal(1, message));
    assert!(!host.has_own_file("device-event"));
}

#[test]
fn events_of_no_interest() {
    let host = with_systemd(host());
    let before = host.snapshot();
    for other in ["A=b", "ACTION=unbind SUBSYSTEM=pci PCI_CLASS=30000 PCI_ID=10DE:2684", "ACTION=add SUBSYSTEM=block"] {
        assert_eq!(event(&host, other), silence(), "{other}");
    }
    assert_eq!(event(&host, &GPU_COMES.replace("DRIVER=nvidia", "DRIVER=vfio-pci")), silence());
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
}

/// nvidia-uvm has the number of /dev/tty; container 101 runs and has this for it.
fn with_container(inside: Option<&str>) -> Host {
    let host = with_systemd(host())
        .file("proc/devices", "Character devices:\n  5 nvidia-uvm\n\nBlock devices:\n")
        .file("etc/pve/lxc/101.conf", "lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional\n")
        .file("sys/fs/cgroup/lxc/101/cgroup.events", "populated 1\nfrozen 0\n")
        .file("sys/fs/cgroup/lxc/101/cgroup.freeze", "0\n")
        .file("sys/fs/cgroup/lxc/101/ns/init.scope/cgroup.procs", &format!("{}\n{PID}\n", PID + 1))
        .file("sys/fs/cgroup/lxc/101/ns/cgroup.procs", "")
        .file(&format!("proc/{}/status", PID + 1), &format!("Name:\ta\nNSpid:\t{}\t17\n", PID + 1))
        .file(&format!("proc/{PID}/status"), &format!("Name:\tinit\nNSpid:\t{PID}\t1\n"))
        .alive(PID);
    let dev = host.path(&format!("proc/{PID}/root/dev"));
    fs::create_dir_all(&dev).unwrap();
    fs::create_dir_all(host.path("dev")).unwrap();
    symlink("/dev/tty", host.path("dev/nvidia-uvm")).unwrap();
    if let Some(inside) = inside {
        symlink(inside, dev.join("nvidia-uvm")).unwrap();
    }
    host
}

#[test]
fn stale_nodes_are_told_of_once() {
    for (inside, what) in [
        (Some(NULL), "/dev/nvidia-uvm is 1:3 inside, 5:0 on the host"),
        (None, "/dev/nvidia-uvm is missing inside, 5:0 on the host"),
    ] {
        let host = with_container(inside);
        let line = format!("warning: container 101 has stale nodes: {what}; restart it: pct reboot 101");
        assert_eq!(host.run("settle"), success(&line));
        assert_eq!(host.run("settle"), silence());
        assert!(host.has_own_file("ct-101"));
        // Stopped and started, it is told of anew.
        assert_eq!(host.run("101 post-stop"), silence());
        assert!(!host.has_own_file("ct-101"));
        assert_eq!(host.run("settle"), success(&line));
    }
}

#[test]
fn nodes_that_are_as_on_the_host_are_not_told_of() {
    let host = with_container(Some("/dev/tty")).file("run/gpu-handoff/ct-101", "something that is over");
    assert_eq!(host.run("settle"), silence());
    assert!(!host.has_own_file("ct-101"));
    // What the driver does not have cannot be stale.
    let unloaded = with_container(Some(NULL)).file("proc/devices", "Character devices:\n");
    assert_eq!(unloaded.run("settle"), silence());
}

#[test]
fn a_container_that_lxc_still_prepares_is_not_judged() {
    let host = with_container(Some(NULL));
    symlink("/usr/bin/lxc-start", host.path(&format!("proc/{PID}/exe"))).unwrap();
    assert_eq!(host.run("settle"), silence());
}

#[test]
fn stale_nodes_and_the_policy_to_stop() {
    const STOP: &str = r#"{"policy":{"container":"stop"},"time":{"stop_s":0.1}}"#;
    let host = with_container(Some(NULL)).config(STOP);
    // Nothing here restarts a container.
    let message = "container 101 was to be restarted, for its nodes are stale: /dev/nvidia-uvm is 1:3 inside, 5:0 on \
                   the host; it did not stop; type: pct reboot 101";
    assert_eq!(host.run("settle"), Run { code: Some(0), ..refusal(0, message) });
    let asked = calls(&host);
    let restart = "systemd-run --quiet --collect --no-block --unit=gpu-handoff-restart-101 -- /usr/sbin/pct reboot 101 \
                   --timeout 1";
    assert!(asked.iter().any(|call| call == restart), "{asked:?}");
    let conf = "lock: backup\nlxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind\n";
    let locked = with_container(Some(NULL)).config(STOP).file("etc/pve/lxc/101.conf", conf);
    let line = "warning: container 101 has stale nodes: /dev/nvidia-uvm is 1:3 inside, 5:0 on the host; it is locked \
                (backup); restart it: pct reboot 101";
    assert_eq!(locked.run("settle"), success(line));
    assert_eq!(locked.run("settle"), silence());
    // Once the backup is over it is seen to.
    let unlocked = locked.file("etc/pve/lxc/101.conf", conf.strip_prefix("lock: backup\n").unwrap());
    assert_eq!(unlocked.run("settle"), Run { code: Some(0), ..refusal(0, message) });
}

#[test]
fn nothing_is_restarted_or_told_while_the_host_shuts_down() {
    let stopping = include_str!("programs/systemctl-stopping");
    let host = with_container(Some(NULL)).file("usr/bin/systemctl", stopping);
    assert_eq!(host.run("settle"), silence());
    assert!(!host.has_own_file("ct-101"));
}

/// Of container 101, whose GPU is with VM 111, which runs.
fn away(config: &str) -> Host {
    settled().record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID).file("etc/pve/lxc/101.conf", config)
}

#[test]
fn a_container_whose_gpu_a_vm_has() {
    const REFUSE: &str = r#"{"policy":{"ct_without_gpu":"refuse"}}"#;
    for config in [
        "dev0: /dev/nvidia0\n",
        "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n",
        "lxc.cgroup2.devices.allow: c 195:* rwm\n",
    ] {
        let line = "container 101 starts without 0000:01:00: VM 111 has it; to get it back: qm shutdown 111";
        assert_eq!(away(config).run("101 pre-start"), success(line), "{config}");
        let message = "container 101 was not started: VM 111 has 0000:01:00, and policy.ct_without_gpu is refuse in \
                       /etc/gpu-handoff/config.json; first: qm shutdown 111, then: pct start 101";
        refuses_now(&away(config).config(REFUSE), "101 pre-start", 3, message);
        ignores(&away(config).config(REFUSE), "101 post-stop");
    }
    for config in ["arch: amd64\n", "dev0: /dev/dri/renderD128\n", "[pve:pending]\ndev0: /dev/nvidia0\n"] {
        ignores(&away(config).config(REFUSE), "101 pre-start");
    }
}

#[test]
fn a_container_whose_gpu_is_on_its_way_home() {
    let host = settled()
        .record("vm-111", "0000:01:00", "returning", "nvidia")
        .file("etc/pve/lxc/101.conf", "dev0: /dev/nvidia0\n");
    let line = "container 101 starts without its GPU: 0000:01:00 is not home yet from VM 111, see gpu-handoff --status; \
                then: pct reboot 101";
    assert_eq!(host.run("101 pre-start"), success(line));
    let host = host.config(r#"{"policy":{"ct_without_gpu":"refuse"}}"#);
    let message = "container 101 was not started: 0000:01:00 is not home yet from VM 111, see gpu-handoff --status; then: \
                   pct start 101";
    refuses_now(&host, "101 pre-start", 3, message);
}

#[test]
fn a_container_whose_gpu_is_with_vfio_by_hand() {
    let host = settled()
        .record("manual-0000:01:00", "0000:01:00", "away", "nvidia")
        .file("etc/pve/lxc/101.conf", "dev0: /dev/nvidia0\n");
    let line = "container 101 starts without 0000:01:00: vfio-pci by hand has it; to get it back: gpu-handoff to-nvidia \
                0000:01:00";
    assert_eq!(host.run("101 pre-start"), success(line));
}

#[test]
fn a_container_that_has_the_other_gpu() {
    let information = "Model: \t\t Simulated\nDevice Minor: \t 1\n";
    let host = |config: &str| {
        away(config)
            .card("0000:02:00", "nvidia", "snd_hda_intel")
            .file("proc/driver/nvidia/gpus/0000:02:00.0/information", information)
    };
    ignores(&host("dev0: /dev/nvidia1\n"), "101 pre-start");
    ignores(&host("lxc.cgroup2.devices.allow: c 195:* rwm\n"), "101 pre-start");
    let line = "container 101 starts without 0000:01:00: VM 111 has it; to get it back: qm shutdown 111";
    assert_eq!(host("dev0: /dev/nvidia0\ndev1: /dev/nvidia1\n").run("101 pre-start"), success(line));
}

/// A VM's hook has the lock and may be waiting for this container.
#[test]
fn a_container_does_not_wait_while_its_gpu_leaves() {
    let host = Host::new()
        .card("0000:01:00", "nvidia", "snd_hda_intel")
        .file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Device Minor: \t 0\n")
        .record("vm-111", "0000:01:00", "leaving", "nvidia")
        .file("etc/pve/lxc/101.conf", "dev0: /dev/nvidia0\n")
        .flock("run/gpu-handoff/lock");
    let begin = std::time::Instant::now();
    let line = "container 101 starts without 0000:01:00: VM 111 has it; to get it back: qm shutdown 111";
    assert_eq!(host.run("101 pre-start"), success(line));
    ignores(&host, "101 post-stop");
    assert!(begin.elapsed().as_secs() < 2);
    // Killed: nobody has the lock, and the GPU is where it was.
    ignores(&host.file("proc/locks", ""), "101 pre-start");
}

#[test]
fn nvidia_uvm_is_loaded_for_containers_that_have_it() {
    let host = |line: &str| {
        Host::new()
            .card("0000:01:00", "nvidia", "snd_hda_intel")
            .file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Device Minor: \t 0\n")
            .file("etc/pve/lxc/101.conf", line)
    };
    let with = host("lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n");
    plans(&with, "reconcile --dry-run", &["a container has nvidia-uvm", "  load      nvidia_uvm"]);
    let warning = "warning: nvidia_uvm was not loaded, which containers need for CUDA: modprobe is not installed; load \
                   it: modprobe nvidia_uvm";
    assert_eq!(with.run("reconcile"), success(warning));
    ignores(&with, "reconcile --unfinished");
    ignores(&host("dev0: /dev/nvidia0\n"), "reconcile");
    let loaded = with.file("sys/module/nvidia_uvm/refcnt", "0\n");
    assert_eq!(loaded.run("reconcile"), silence());
}
