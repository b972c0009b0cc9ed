use super::attach::{BEFORE, CONFIG, RECORD, RULES, beside, config, container, lines, ready, uvm, with};
use super::*;
use nix::fcntl::{Flock, FlockArg};
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

// container attach and detach that leave the container as it is.

#[test]
fn which_card_is_not_clear() {
    let host = ready().function("0000:03:00.0", "010802", "144d:a80a", "nvme", 9);
    for (gpu, code, message) in [
        ("gpu", 2, "gpu is no slot; a slot is written like 0000:01:00"),
        ("09:00", 3, "there is no device in slot 0000:09:00; lspci -D shows what there is"),
        ("03:00", 3, "slot 0000:03:00 has no NVIDIA GPU; gpu-handoff --status shows those there are"),
    ] {
        refuses(&host, &format!("container attach 101 --gpu {gpu}"), code, message);
    }
    let none = "there is no NVIDIA GPU in this host; lspci -nn shows what there is";
    refuses(&container(Host::new(), BEFORE), "container attach 101", 3, none);
}

#[test]
fn a_card_that_is_away() {
    let away = |owner: &str| {
        let host = container(uvm(settled(), "511 nvidia-uvm"), BEFORE);
        if owner.is_empty() { host } else { host.record(owner, "0000:01:00", "away", "nvidia") }
    };
    let not_known = "container 101 was not touched: the numbers of 0000:01:00 are not known";
    let vm =
        format!("{not_known}: VM 111 has it; stop that first: qm shutdown 111, then: gpu-handoff container attach 101");
    refuses(&away("vm-111").running(111, PID), "container attach 101", 3, &vm);
    refuses(&away("").running(111, PID), "container attach 101", 3, &vm);
    let home = "bring it home first: gpu-handoff to-nvidia 0000:01:00, then: gpu-handoff container attach 101";
    refuses(&away("vm-111"), "container attach 101", 3, &format!("{not_known}: it was given to VM 111; {home}"));
    let by_hand = format!("{not_known}: it was given to vfio-pci by hand; {home}");
    refuses(&away("manual-0000:01:00"), "container attach 101", 3, &by_hand);
    let only = "containers can only use a GPU that NVIDIA's driver has";
    refuses(&away(""), "container attach 101", 3, &format!("{not_known}: it is at home on vfio-pci; {only}"));
    for (driver, why) in [
        ("nouveau", format!("nouveau has it; {only}")),
        (
            "",
            "no driver has it; load NVIDIA's first: modprobe nvidia, then: gpu-handoff container attach 101"
                .to_string(),
        ),
        ("nvidia", "the NVIDIA driver has it but does not list it in /proc/driver/nvidia/gpus; see dmesg".to_string()),
    ] {
        let host = container(Host::new().card("0000:01:00", driver, "snd_hda_intel"), BEFORE);
        refuses(&host, "container attach 101", 3, &format!("{not_known}: {why}"));
    }
    let stuck =
        "a handoff of it is under way, or stuck; see gpu-handoff --status, then: gpu-handoff container attach 101";
    let host =
        container(Host::new().card("0000:01:00", "", "snd_hda_intel"), BEFORE).wedged("0000:01:00", PID).alive(PID);
    refuses(&host, "container attach 101", 3, &format!("{not_known}: {stuck}"));
    // Detaching needs no card.
    let host = ready();
    host.run("container attach 101");
    let host = host.without("proc/driver");
    assert_eq!(host.run("container detach 101").code, Some(0));
    assert_eq!(config(&host), BEFORE);
}

#[test]
fn no_container_of_proxmox() {
    let host = ready().vm(111, "machine: q35\nhostpci0: 0000:01:00,pcie=1");
    let host = host.file("var/lib/lxc/103/config", "").file("etc/pve/nodes/pve2/lxc/104.conf", BEFORE);
    for (id, message) in [
        ("102", "there is no container 102: /etc/pve/lxc/102.conf does not exist; pct list shows the containers"),
        (
            "111",
            "111 is a VM, no container; a VM takes a GPU as a whole: qm set 111 --hostpci0 0000:01:00,pcie=1 --hookscript \
             local:snippets/gpu-handoff",
        ),
        (
            "103",
            "container 103 is LXC's own (/var/lib/lxc/103/config) and none of Proxmox's: its configuration is yours to \
             edit; pct list shows those of Proxmox",
        ),
        ("104", "guest 104 is on node pve2: its GPU is given to it there"),
    ] {
        for verb in ["attach", "detach"] {
            refuses(&host, &format!("container {verb} {id}"), 2, message);
        }
    }
    let down = "there is nothing in /etc/pve: Proxmox's cluster file system is down; systemctl start pve-cluster";
    refuses(&ready().without("etc/pve"), "container attach 101", 3, down);
}

#[test]
fn a_configuration_that_must_not_be_touched() {
    let template = "container 101 is a template, which never runs; attach its clones: pct clone 101 NEWID";
    let locked = "container 101 is locked (backup) and was not touched; wait until that task is over, or if there is \
                  none: pct unlock 101";
    let mounted = "container 101 is locked (mounted) and was not touched; pct unmount 101";
    for (line, message) in [("template: 1", template), ("lock: backup", locked), ("lock: mounted", mounted)] {
        refuses(&container(ready(), &with(&format!("{line}\n"))), "container attach 101", 3, message);
        // In a snapshot it means nothing.
        let host = container(ready(), &format!("{BEFORE}{line}\n"));
        assert_eq!(host.run("container attach 101").code, Some(0), "{line}");
        if line.starts_with("lock") {
            let host = container(host, &with(&format!("{line}\n{}", lines(RULES, "nvidia0"))));
            refuses(&host, "container detach 101", 3, message);
        }
    }
    let odd = container(ready(), &with("dev1: /etc/passwd\ndev2: gid=44\n"));
    let message = "container 101 was not touched: Proxmox cannot read its dev1 dev2 and starts it with none; fix that: pct \
                   set 101 --delete dev1,dev2";
    refuses(&odd, "container attach 101 --style dev", 3, message);
    assert_eq!(odd.run("container attach 101").code, Some(0));
    let many: String = (0..254).map(|number| format!("dev{number}: /dev/null\n")).collect();
    let message = "container 101 was not touched: there are not enough numbers between dev0 and dev255 left for its \
                   devices; delete some (pct set 101 --delete devN), or use --style mount";
    refuses(&container(ready(), &with(&many)), "container attach 101 --style dev", 3, message);
    let large = container(ready(), &format!("#{}\n{BEFORE}", "x".repeat(1024 * 1024 - BEFORE.len() - 100)));
    let message =
        "container 101 was not touched: /etc/pve/lxc/101.conf would grow beyond the 1 MiB that Proxmox allows";
    refuses(&large, "container attach 101", 3, message);
}

/// Proxmox's cluster file system shows so by a mode, while root may write by any.
#[test]
fn no_quorum() {
    let host = ready();
    let local = host.path("etc/pve/local");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o555)).unwrap();
    let message = "container 101 was not touched: /etc/pve is read-only, the cluster has no quorum; see: pvecm status";
    refuses(&host, "container attach 101", 3, message);
    fs::set_permissions(&local, fs::Permissions::from_mode(0o755)).unwrap();
    host.run("container attach 101");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o555)).unwrap();
    refuses(&host, "container detach 101", 3, message);
    fs::set_permissions(&local, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The kernel says no in the middle: the old file is whole, nothing is beside it, and nothing is on record.
#[test]
fn a_configuration_that_cannot_be_written() {
    let host = ready().file(&format!("{}/x", beside(CONFIG)), "");
    let run = host.run("container attach 101");
    assert_eq!(run.code, Some(3), "{}", run.err);
    let begin = "gpu-handoff: error: container 101 was not touched: /etc/pve/lxc/101.conf cannot be written: ";
    assert!(run.err.starts_with(begin) && run.err.lines().count() == 1, "{}", run.err);
    assert_eq!(config(&host), BEFORE);
    assert!(!host.path(RECORD).exists());
    // Nor is a configuration changed without being on record.
    let host = ready().file(&format!("{}/x", beside(RECORD)), "");
    let run = host.run("container attach 101");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(
        run.err.starts_with("gpu-handoff: error: container 101 was not touched: /var/lib/gpu-handoff"),
        "{}",
        run.err
    );
    assert_eq!(config(&host), BEFORE);
}

#[test]
fn a_record_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        (r#"{"schema":2}"#, "schema 2: written by a newer gpu-handoff; install that version again"),
        (
            r#"{"schema":1,"style":"dev","slots":[],"dri":false,"newline":false,"lines":[{"for":"x","line":"rootfs: x"}]}"#,
            r#"line: "rootfs: x" is not understood"#,
        ),
    ] {
        let host = ready().file(RECORD, text);
        let message = format!(
            "container 101 was not touched: the record of what was attached cannot be read: /{RECORD}: {problem}; if you \
             remove that file, its lines are yours to take out"
        );
        for verb in ["attach", "detach"] {
            refuses(&host, &format!("container {verb} 101"), 1, &message);
        }
    }
}

/// Proxmox holds its lock on the container: who comes in between waits, and in the end gives up.
#[test]
fn proxmox_is_at_work() {
    let host = ready().file("run/lock/lxc/pve-config-101.lock", "");
    let lock = || {
        let file = fs::File::open(host.path("run/lock/lxc/pve-config-101.lock")).unwrap();
        Flock::lock(file, FlockArg::LockExclusive).unwrap()
    };
    let held = lock();
    let begin = Instant::now();
    refuses_now(
        &host,
        "container attach 101",
        5,
        "container 101 was not touched: Proxmox is at work on it (it has held /run/lock/lxc/pve-config-101.lock for 10 s); \
         then try again: gpu-handoff container attach 101",
    );
    assert!(begin.elapsed() >= Duration::from_secs(10));
    assert_eq!(config(&host), BEFORE);
    // What Proxmox writes meanwhile is what is edited.
    let later = BEFORE.replace("infer", "later");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            fs::write(host.path(CONFIG), &later).unwrap();
            drop(held);
        });
        assert_eq!(host.run("container attach 101").code, Some(0));
    });
    assert_eq!(config(&host), with(&lines(RULES, "nvidia0")).replace("infer", "later"));
    host.run("container detach 101");
    // A task that began while we waited.
    let held = lock();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            fs::write(host.path(CONFIG), with("lock: snapshot\n")).unwrap();
            drop(held);
        });
        let run = host.run("container attach 101");
        assert_eq!(run.code, Some(3), "{}", run.err);
    });
    assert_eq!(config(&host), with("lock: snapshot\n"));
    assert!(!host.path(RECORD).exists());
}
