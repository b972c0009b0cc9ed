use super::*;
use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

// Backups of VMs that are stopped: waiting, and vzdump's script

const VM: &str = "hookscript: local:snippets/gpu-handoff\nhostpci0: 0000:01:00,pcie=1\nlock: backup";
const FREED: &str = "manual-0000:01:00";
const SCRIPT: &str = r##"#!/bin/sh
# Another script for vzdump: notes how it was called, and fails when it is to.
root=$GPU_HANDOFF_ROOT
echo "$* $STOREID $VMTYPE" >>"$root/calls"
[ ! -e "$root/calls-back" ] || exec "$PROGRAM" vzdump "$@"
[ ! -e "$root/fails" ] || exit 7
"##;

/// VM 111 is stopped, and about to be backed up.
fn backed_up(host: Host) -> Host {
    host.vm(111, VM).flock("run/vzdump.lock")
}

fn busy(config: &str) -> Host {
    backed_up(with_drm_node(host()).process(PID, "X", "/", &[NULL])).config(config)
}

fn chained(host: Host) -> Host {
    host.file("srv/other", SCRIPT).config(r#"{"vzdump":{"script":"/srv/other"}}"#)
}

/// As vzdump calls it: nothing in the environment but its own.
fn phase(host: &Host, words: &str) -> Run {
    let mut command = host.command(&format!("vzdump {words}"));
    command.env("STOREID", "nas").env("VMTYPE", "qemu").env("PROGRAM", env!("CARGO_BIN_EXE_gpu-handoff"));
    let output = command.arg0("gpu-handoff").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

#[track_caller]
fn says(host: &Host, words: &str, lines: &[&str]) {
    let run = phase(host, words);
    assert_eq!((run.code, told(&run)), (Some(0), lines.iter().map(ToString::to_string).collect()), "{words}");
}

fn calls(host: &Host) -> Vec<String> {
    fs::read_to_string(host.path("calls")).unwrap_or_default().lines().map(String::from).collect()
}

// Waiting

#[test]
fn whoever_uses_it_is_waited_for_and_not_for_ever() {
    let host = busy(r#"{"policy":{"backup":"wait"},"time":{"backup_s":0.4}}"#);
    let begin = Instant::now();
    let run = host.run("111 pre-start");
    assert!(begin.elapsed() >= Duration::from_millis(400));
    assert_eq!(run.code, Some(3), "{}", run.err);
    let lines = told(&run);
    assert!(lines[0].starts_with("waits for up to 1 s: 0000:01:00 was not touched, it is in use: PID"), "{lines:?}");
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(run.err.ends_with("; VM 111 was only to be started for a backup, which fails with this\n"), "{}", run.err);
}

/// In a tree the way there then fails at the first change.
#[test]
fn who_is_done_meanwhile_keeps_nobody_from_it() {
    let host = busy(r#"{"policy":{"backup":"wait","unit":"stop","process":"kill"},"time":{"backup_s":60}}"#);
    let process = host.path(&format!("proc/{PID}"));
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        fs::remove_dir_all(process).unwrap();
    });
    let begin = Instant::now();
    let run = host.run("111 pre-start");
    ends.join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30));
    let lines = told(&run);
    assert!(lines[0].starts_with("waits for up to 60 s: "), "{lines:?}");
    assert!(lines.iter().any(|line| line == "0000:01:00 host -> VM 111"), "{lines:?}");
    assert_eq!(run.code, Some(1), "{}", run.err);
}

#[test]
fn who_need_not_wait() {
    let wait = r#"{"policy":{"backup":"wait"},"time":{"backup_s":60}}"#;
    let plain = VM.replace("lock: backup", "");
    let begin = Instant::now();
    for (host, call, code) in [
        (backed_up(settled()).config(wait), "111 pre-start", 0),
        // No backup, or only a question.
        (busy(wait).vm(111, &plain), "111 pre-start", 3),
        (busy(wait), "plan 111", 3),
        // No time brings what is wrong here.
        (backed_up(settled().wedged("0000:01:00", PID).alive(PID)).config(wait), "111 pre-start", 4),
        (busy("{}"), "111 pre-start", 3),
        (busy(r#"{"policy":{"backup":"refuse"}}"#), "111 pre-start", 3),
    ] {
        let run = host.run(call);
        assert_eq!(run.code, Some(code), "{call}: {}", run.err);
        assert!(!run.err.contains("waits for"), "{call}: {}", run.err);
    }
    assert!(begin.elapsed() < Duration::from_secs(50));
}

// The script

#[test]
fn a_job_from_its_begin_to_its_end() {
    let host = backed_up(settled()).vm(112, VM).vm(113, "cores: 2\nlock: backup");
    says(&host, "job-init", &[]);
    says(&host, "job-start", &[]);
    says(&host, "backup-start stop 111", &["0000:01:00 is already on vfio-pci: nothing to do"]);
    let record = host.own_file(FREED);
    assert_eq!((&record["progress"], &record["for_backup"]), (&json!("away"), &json!(true)));
    // Proxmox starts it, and stops it again.
    assert_eq!(host.run("111 pre-start").code, Some(0));
    let run = host.run("111 post-stop");
    assert_eq!(told(&run), ["0000:01:00 stays on vfio-pci until the backup job ends"]);
    assert!(!host.has_own_file("vm-111"));
    says(&host, "backup-end stop 111", &[]);
    says(&host, "log-end stop 111", &[]);
    // The next has nothing to do, and one without a GPU even less.
    for vmid in [112, 113] {
        says(&host, &format!("backup-start stop {vmid}"), &[]);
        says(&host, &format!("backup-abort stop {vmid}"), &[]);
        says(&host, &format!("log-end stop {vmid}"), &[]);
    }
    assert_eq!(host.own_file(FREED), record);
    // The keeper leaves it to the job.
    host.run("reconcile --owed");
    assert_eq!(host.own_file(FREED), record);
    says(&host, "job-end", &["0000:01:00 is at home on vfio-pci: nothing to do"]);
    assert!(!host.has_own_file(FREED));
    says(&host, "job-end", &[]);
}

#[test]
fn a_job_that_is_given_up() {
    let freed = || {
        let host = backed_up(settled());
        phase(&host, "backup-start stop 111");
        assert!(host.has_own_file(FREED));
        host
    };
    says(&freed(), "job-abort", &["0000:01:00 is at home on vfio-pci: nothing to do"]);
    // Killed: nothing comes any more, and its lock is free.
    for call in ["reconcile --owed", "reconcile"] {
        let host = freed().without("proc/locks");
        assert_eq!(host.run(call).code, Some(0), "{call}");
        assert!(!host.has_own_file(FREED), "{call}");
    }
    let host = freed().without("proc/locks");
    host.run("reconcile --unfinished");
    assert!(host.has_own_file(FREED), "no handoff was cut short");
    // A VM that has it by then keeps it, and after that it is the keeper's.
    let taken = freed().record("vm-112", "0000:01:00", "away", "vfio-pci").running(112, PID);
    let run = phase(&taken, "job-end");
    assert_eq!(run.code, Some(0));
    assert!(told(&run)[0].starts_with("warning: 0000:01:00 was not touched: VM 112 has it"), "{}", run.err);
    assert!(taken.has_own_file(FREED));
}

/// What somebody freed by hand stays so.
#[test]
fn what_is_not_the_job_s() {
    let by_hand = || backed_up(settled()).record(FREED, "0000:01:00", "away", "vfio-pci");
    let host = by_hand();
    for words in ["backup-start stop 111", "job-end", "job-abort"] {
        says(&host, words, &[]);
    }
    host.without("proc/locks").run("reconcile --owed");
    let host = by_hand().without("proc/locks");
    let before = host.own_file(FREED);
    host.run("reconcile --owed");
    assert_eq!(host.own_file(FREED), before);
    // And what a person takes over from the job is his.
    let host = backed_up(settled());
    phase(&host, "backup-start stop 111");
    assert_eq!(host.run("to-vfio").code, Some(0));
    says(&host, "job-end", &[]);
    assert_eq!(host.own_file(FREED).get("for_backup"), None);
}

#[test]
fn whose_card_is_not_freed() {
    let other = VM.replace("snippets/gpu-handoff", "snippets/other");
    let unlocked = VM.replace("lock: backup", "");
    for (host, words) in [
        (backed_up(settled()).running(111, PID), "backup-start snapshot 111"),
        (backed_up(settled()).running(111, PID), "backup-start stop 111"),
        (backed_up(settled()).vm(111, &other), "backup-start stop 111"),
        (backed_up(settled()).vm(111, &unlocked), "backup-start stop 111"),
        (backed_up(settled()).file("etc/pve/lxc/101.conf", "lock: backup\n"), "backup-start stop 101"),
        (backed_up(settled()), "pre-stop stop 111"),
        (backed_up(settled()), "backup-end stop 111"),
        (backed_up(settled()), "backup-start stop x"),
        (backed_up(settled()), "backup-start"),
        (backed_up(settled()), "a-later-phase --with more"),
    ] {
        let before = host.snapshot();
        says(&host, words, &[]);
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{words}");
    }
}

/// Its start says no, with all that there is to know; the script fails no backup.
#[test]
fn what_is_in_the_way_is_for_the_start_to_say() {
    for config in ["{}", r#"{"policy":{"backup":"refuse"}}"#] {
        let host = busy(config);
        let run = phase(&host, "backup-start stop 111");
        assert_eq!(run.code, Some(0), "{config}");
        assert!(told(&run)[0].starts_with("warning: 0000:01:00 was not touched"), "{config}: {}", run.err);
        assert!(!host.has_own_file(FREED), "{config}");
        assert_eq!(host.run("111 pre-start").code, Some(3), "{config}");
    }
    let run = phase(&busy(r#"{"policy":{"backup":"wait"},"time":{"backup_s":0.1}}"#), "backup-start stop 111");
    assert!(told(&run)[0].starts_with("waits for up to 1 s: "), "{}", run.err);
}

#[test]
fn another_script_is_called_with_the_same_words() {
    let host = chained(backed_up(settled()));
    let expected = [
        "job-init",
        "job-start",
        "backup-start stop 111",
        "pre-stop stop 111",
        "pre-restart stop 111",
        "post-restart stop 111",
        "backup-end stop 111",
        "log-end stop 111",
        "job-end",
        "job-abort",
    ];
    for words in expected {
        assert_eq!(phase(&host, words).code, Some(0), "{words}");
    }
    assert_eq!(calls(&host), expected.map(|words| format!("{words} nas qemu")));
    assert!(!host.has_own_file(FREED), "ours was done as well");
    // Its exit code is the one.
    let host = host.file("fails", "");
    assert_eq!(phase(&host, "job-start").code, Some(7));
    // One that calls this program again ends there.
    let host = host.file("calls-back", "").without("calls");
    assert_eq!(phase(&host, "backup-start stop 111").code, Some(0));
    assert_eq!(calls(&host), ["backup-start stop 111 nas qemu"]);
}

#[test]
fn another_script_that_is_not_there() {
    let host = chained(backed_up(settled())).without("srv/other");
    let message = "vzdump.script /srv/other was not run: No such file or directory (os error 2)";
    assert_eq!(phase(&host, "job-start"), refusal(1, message));
    assert_eq!(host.run("vzdump"), refusal(2, "vzdump needs a phase; see gpu-handoff --help"));
}
