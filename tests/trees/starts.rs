//! What is special about a start or an end: who watches over it, backups, reboots, the host's shutdown.

use super::*;
use std::time::{Duration, Instant};

const LOCK: &str = "var/lock/qemu-server/lock-111.conf";

/// One of the programs beside this file, where the program looks for it.
pub fn with_program(host: Host, path: &str, name: &str) -> Host {
    let program = format!("{}/tests/trees/programs/{name}", env!("CARGO_MANIFEST_DIR"));
    let path = host.path(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(program, path).unwrap();
    host.file("run/qemu-server/other", "")
}

fn with_systemd_run(host: Host) -> Host {
    with_program(host, "usr/bin/systemd-run", "systemd-run")
}

/// What systemd-run was asked for, once it has been; it is started beside the run.
fn asked(host: &Host) -> Option<String> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match fs::read_to_string(host.path("run/asked")) {
            Ok(text) => return Some(text),
            Err(_) if Instant::now() >= end => return None,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn watcher_of(text: &str) -> (String, String) {
    let unit = text.split_whitespace().find_map(|word| word.strip_prefix("--unit=")).unwrap();
    let (unit, pid) = unit.rsplit_once('-').unwrap();
    assert!(pid.parse::<u32>().is_ok(), "{text}");
    (unit.to_string(), text.split_once("/gpu-handoff ").unwrap().1.trim().to_string())
}

/// The card was with VM 111, which has ended; all of it is at home already, so that coming home can be seen in a tree.
fn ended() -> Host {
    host().record("vm-111", "0000:01:00", "away", "nvidia")
}

fn comes_home(host: &Host, call: &str) {
    let run = host.run(call);
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(told(&run).last().unwrap(), "0000:01:00 is home after N ms", "{call}");
    assert!(!host.has_own_file("vm-111"), "{call}");
}

fn stays(host: &Host, call: &str, why: &str) {
    let record = host.own_file("vm-111");
    assert_eq!(host.run(call), success(&format!("0000:01:00 stays on vfio-pci: {why}")), "{call}");
    assert_eq!(host.own_file("vm-111"), record, "{call}");
}

// Watchers

#[test]
fn a_start_by_proxmox_is_watched() {
    let host = with_systemd_run(settled().flock(LOCK));
    assert_eq!(host.run("111 pre-start"), ready());
    let text = asked(&host).unwrap();
    assert!(text.contains("--no-block") && text.contains("--collect"), "{text}");
    assert_eq!(watcher_of(&text), ("gpu-handoff-watch-111".to_string(), "watch 111".to_string()));
}

/// Nobody is to undo what somebody does by hand; and whoever takes no GPU needs no watcher.
#[test]
fn nobody_watches_what_proxmox_does_not_do() {
    for (host, call) in [
        (settled(), "111 pre-start"),
        (settled().flock("var/lock/qemu-server/lock-112.conf"), "111 pre-start"),
        (settled().vm(100, "cores: 2").flock("var/lock/qemu-server/lock-100.conf"), "100 pre-start"),
        (settled().flock(LOCK), "plan 111"),
        (settled().flock(LOCK), "to-vfio"),
    ] {
        let host = with_systemd_run(host);
        assert_eq!(host.run(call).code, Some(0), "{call}");
        std::thread::sleep(Duration::from_millis(100));
        assert!(!host.path("run/asked").exists(), "{call}");
    }
}

/// It has its card from before a reboot, and this start is over.
#[test]
fn a_refused_start_of_a_vm_that_has_its_card_is_watched() {
    let refused = || settled().flock(LOCK).vm(111, "hostpci0: 0000:09:00");
    let host = with_systemd_run(refused().record("vm-111", "0000:01:00", "away", "nvidia"));
    assert_eq!(host.run("111 pre-start").code, Some(3));
    assert_eq!(watcher_of(&asked(&host).unwrap()).1, "watch 111");
    let host = with_systemd_run(refused());
    assert_eq!(host.run("111 pre-start").code, Some(3));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!host.path("run/asked").exists());
}

/// The start goes on.
#[test]
fn a_start_that_nobody_can_watch() {
    let host = settled().flock(LOCK);
    let run = host.run("111 pre-start");
    let warning = "warning: nobody watches over VM 111: /usr/bin/systemd-run is not installed; if its start is given up: \
                   gpu-handoff reconcile";
    assert_eq!(told(&run), [warning, "0000:01:00 is already on vfio-pci: nothing to do"]);
    assert_eq!(run.code, Some(0));
}

#[test]
fn what_a_watcher_does_in_the_end() {
    for call in ["watch 111", "watch 112"] {
        only_looks(&host(), call);
        let other = ended().record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID + 1);
        only_looks(
            &other.running(111, PID).file("run/qemu-server/111.cleanup", "").file("run/qemu-server/112.cleanup", ""),
            call,
        );
    }
    comes_home(&ended(), "watch 111");
    // Another VM is none of its business.
    only_looks(&ended(), "watch 112");
}

/// Its own lock tells that it is there.
#[track_caller]
fn only_looks(host: &Host, call: &str) {
    let before = host.snapshot().without_lock();
    assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
}

/// As long as Proxmox has the lock, or a QEMU runs of which Proxmox says nothing; and a reboot is given time. It ends when
/// it is asked to.
#[test]
fn a_watcher_waits() {
    let unnoted = || ended().running(111, PID).file("run/qemu-server/112.cleanup", "");
    for (host, call) in [
        (ended().flock(LOCK), "watch 111"),
        (unnoted(), "watch 111"),
        (unnoted(), "watch 111 --stop"),
        (ended(), "watch 111 --reboot"),
        (ended().file("run/qemu-server/111.reboot", ""), "watch 111"),
    ] {
        let mut watcher = host.command(call).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        assert!(watcher.try_wait().unwrap().is_none(), "{call}");
        assert!(host.has_own_file("vm-111"), "{call}");
        let pid = nix::unistd::Pid::from_raw(watcher.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert_eq!(watcher.wait().unwrap().code(), Some(0), "{call}");
        assert!(host.has_own_file("vm-111"), "{call}");
    }
}

/// Who restarts qmeventd kills a post-stop that it runs.
#[test]
fn a_post_stop_that_may_be_killed_leaves_a_watcher_behind() {
    let in_cgroup = |name: &str| ended().flock(LOCK).file("proc/self/cgroup", &format!("0::/{name}\n"));
    for progress in ["away", "returning"] {
        let host = in_cgroup("system.slice/qmeventd.service").record("vm-111", "0000:01:00", progress, "nvidia");
        let host = with_systemd_run(host);
        assert_eq!(host.run("111 post-stop").code, Some(0));
        assert_eq!(watcher_of(&asked(&host).unwrap()).1, "watch 111 --stop", "{progress}");
    }
    for host in [in_cgroup("user.slice/user-0.slice/session-1.scope"), ended().flock(LOCK)] {
        let host = with_systemd_run(host);
        assert_eq!(host.run("111 post-stop").code, Some(0));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!host.path("run/asked").exists());
    }
}

// Reboots and the host's shutdown

#[test]
fn a_vm_that_reboots_keeps_its_card() {
    let rebooting = || ended().flock(LOCK).file("run/qemu-server/111.reboot", "");
    let host = with_systemd_run(rebooting());
    stays(&host, "111 post-stop", "VM 111 reboots");
    assert_eq!(watcher_of(&asked(&host).unwrap()).1, "watch 111 --reboot");
    // Without a watcher nobody would bring it home.
    comes_home(&rebooting(), "111 post-stop");
    // A file that somebody forgot: Proxmox is not at it.
    comes_home(&with_systemd_run(ended().file("run/qemu-server/111.reboot", "")), "111 post-stop");
    // Half-way is no place to stay.
    let half = with_systemd_run(rebooting().record("vm-111", "0000:01:00", "returning", "nvidia"));
    comes_home(&half, "111 post-stop");
}

#[test]
fn a_host_that_shuts_down_moves_nothing() {
    let systemctl = |host, name| with_program(host, "usr/bin/systemctl", name);
    stays(&systemctl(ended(), "systemctl-stopping"), "111 post-stop", "the host is shutting down");
    comes_home(&systemctl(ended(), "systemctl-running"), "111 post-stop");
    comes_home(&ended(), "111 post-stop");
    // A person knows what he does.
    comes_home(&systemctl(ended(), "systemctl-stopping"), "to-nvidia");
}

// Backups

fn backed_up(host: Host) -> Host {
    host.vm(111, "hostpci0: 0000:01:00,pcie=1\nlock: backup")
}

#[test]
fn a_backup_that_may_have_no_gpu() {
    let host = || backed_up(settled()).config(r#"{"policy":{"backup":"refuse"}}"#);
    let message = "0000:01:00 was not touched: VM 111 is only started for a backup, and policy.backup is refuse in \
                   /etc/gpu-handoff/config.json; so this backup fails; back VM 111 up while it runs, or set \
                   policy.backup to idle";
    refuses(&host(), "111 pre-start", 3, message);
    accepts(&host().vm(111, "hostpci0: 0000:01:00,pcie=1"), "no backup");
    accepts(&host().vm(111, "hostpci0: 0000:01:00,pcie=1\nlock: suspended"), "another lock");
    // It takes none.
    ignores(&host().vm(100, "lock: backup"), "100 pre-start");
}

#[test]
fn a_backup_that_may() {
    accepts(&backed_up(settled()), "by default");
    for policy in ["idle", "policy"] {
        accepts(&backed_up(settled()).config(&json!({"policy": {"backup": policy}}).to_string()), policy);
    }
}

#[test]
fn a_backup_of_a_vm_whose_card_is_in_use() {
    let run = backed_up(with_drm_node(host()).process(PID, "X", "/", &[NULL])).run("111 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
    let end = "; VM 111 was only to be started for a backup, which fails with this\n";
    assert!(run.err.contains("it is in use: PID") && run.err.ends_with(end), "{}", run.err);
}

// Device nodes

/// How far it gets in a tree, where no node can be made.
#[test]
fn missing_device_nodes() {
    let host = || host().file("proc/driver/nvidia/params", "ModifyDeviceFiles: 1\nDeviceFileMode: 438\n");
    plans(&host(), "reconcile --dry-run", &["missing device nodes", "  make      /dev/nvidiactl"]);
    let run = host().run("reconcile");
    let line = "error: /dev/nvidiactl is missing and was not made: not done under GPU_HANDOFF_ROOT";
    assert_eq!((run.code, told(&run)), (Some(1), vec![line.to_string()]));
    ignores(&host(), "reconcile --unfinished");
    let by_others = host().file("proc/driver/nvidia/params", "ModifyDeviceFiles: 0\n");
    ignores(&by_others, "reconcile");
}
