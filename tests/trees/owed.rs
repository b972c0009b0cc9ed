//! What a run that gives up owes: it stands where the keeper finds it, and the keeper is asked to come.

use super::*;

/// A systemctl and a systemd-run that note what they are asked for.
pub fn with_systemd(host: Host) -> Host {
    let note = |name: &str| format!("#!/bin/sh\nroot=${{0%/usr/bin/*}}\necho \"{name} $*\" >>$root/calls\n");
    host.file("usr/bin/systemctl", &note("systemctl")).file("usr/bin/systemd-run", &note("systemd-run"))
}

pub fn calls(host: &Host) -> Vec<String> {
    let calls = fs::read_to_string(host.path("calls")).unwrap_or_default();
    calls.lines().map(str::to_string).collect()
}

const KEEPER: &str = "systemctl start --no-block -- gpu-handoff-keeper.timer";

fn away() -> Host {
    with_systemd(settled().record("vm-111", "0000:01:00", "away", "nvidia"))
}

#[test]
fn a_post_stop_that_does_not_get_its_turn() {
    for lock in ["run/gpu-handoff/lock", "run/gpu-handoff/lock-0000:01:00"] {
        let host = away().config(r#"{"time":{"lock_s":0.2}}"#).file(lock, "");
        let held = fs::File::open(host.path(lock)).unwrap();
        held.lock().unwrap();
        let run = host.run("111 post-stop");
        assert_eq!(run.code, Some(5), "{lock}: {}", run.err);
        assert!(
            run.err.ends_with("; gpu-handoff-keeper tries again by itself: bring it home\n"),
            "{lock}: {}",
            run.err
        );
        assert!(calls(&host).contains(&KEEPER.to_string()), "{lock}: {:?}", calls(&host));
        drop(held);
        // It comes, and does what a tree lets it do: nothing reacts there.
        let run = host.run("reconcile --owed");
        assert!(told(&run).iter().any(|line| line == "0000:01:00 VM 111 -> host"), "{lock}: {}", run.err);
    }
}

#[test]
fn a_vm_that_lets_go_too_late() {
    let host = away()
        .config(r#"{"time":{"handoff_s":1}}"#)
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
        .process(PID, "kvm", "/qemu.slice/111.scope", &[NULL]);
    let run = host.run("111 post-stop");
    assert_eq!(run.code, Some(4), "{}", run.err);
    assert!(run.err.contains("gpu-handoff-keeper tries again by itself: bring it home"), "{}", run.err);
    assert!(calls(&host).contains(&KEEPER.to_string()));
    // Whoever still waits for it is no news.
    let still = host.run("reconcile --owed");
    assert_eq!((still.code, still.err.as_str()), (Some(0), ""));
    let host = host.without(&format!("proc/{PID}"));
    let run = host.run("reconcile --owed");
    assert!(told(&run).iter().any(|line| line == "0000:01:00 VM 111 -> host"), "{}", run.err);
}

/// Where the units are not installed, systemd runs the keeper all the same.
#[test]
fn a_host_without_the_keepers_units() {
    let host = away().config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let host = host.without("usr/bin/systemctl").file("usr/bin/systemctl", "#!/bin/sh\nexit 5\n");
    let held = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    held.lock().unwrap();
    assert_eq!(host.run("111 post-stop").code, Some(5));
    let run = calls(&host).pop().unwrap_or_default();
    let begin =
        "systemd-run --on-active=10 --on-unit-inactive=10 --quiet --collect --no-block --unit=gpu-handoff-keeper ";
    assert!(run.starts_with(begin) && run.ends_with(" reconcile --owed"), "{run}");
}

/// Nobody was told that the VM has ended; but who has called a hook by hand knows, and so does a watcher.
#[test]
fn a_post_stop_that_was_never_fired() {
    let recorded = |by_hand: bool| {
        let host = away();
        let mut record = host.own_file("vm-111");
        record["by_hand"] = json!(by_hand);
        host.file("run/gpu-handoff/vm-111", &record.to_string())
    };
    for (what, host, comes) in [
        ("ended", recorded(false), true),
        ("runs", recorded(false).running(111, PID), false),
        ("is being started", recorded(false).flock("var/lock/qemu-server/lock-111.conf"), false),
        ("is devices", recorded(false).flock("run/gpu-handoff/lock-watch-111"), false),
        ("by hand", recorded(true), false),
    ] {
        let run = host.run("reconcile --owed");
        assert_eq!(run.err.contains("0000:01:00 VM 111 -> host"), comes, "{what}: {}", run.err);
        assert_eq!(host.own_file("vm-111")["progress"] == "away", !comes, "{what}");
    }
}

/// What fails is left alone for a while, and not for ever.
#[test]
fn what_fails_is_tried_less_often() {
    let host = with_systemd(settled().record("vm-111", "0000:01:00", "returning", "nvidia"));
    let tries = || host.own_file("retries")["vm-111"]["tries"].clone();
    assert_eq!(host.run("reconcile --owed").code, Some(1));
    assert_eq!(tries(), json!(1));
    let soon = host.run("reconcile --owed");
    assert_eq!((soon.code, soon.err.as_str()), (Some(0), ""));
    let mut retries = host.own_file("retries");
    let after = retries["vm-111"]["after"].as_u64().unwrap();
    retries["vm-111"]["after"] = json!(after - 11);
    fs::write(host.path("run/gpu-handoff/retries"), retries.to_string()).unwrap();
    assert_eq!(host.run("reconcile --owed").code, Some(1));
    assert_eq!(tries(), json!(2));
    // Whoever asks for it need not wait.
    assert_eq!(host.run("reconcile").code, Some(1));
}

#[test]
fn the_keeper_rests_when_nothing_is_left() {
    let stop = "systemctl stop --no-block -- gpu-handoff-keeper.timer".to_string();
    let idle = with_systemd(host());
    idle.run("reconcile --owed");
    assert_eq!(calls(&idle), std::slice::from_ref(&stop));
    for host in [away().running(111, PID), with_systemd(host()).wedged("0000:01:00", PID).alive(PID)] {
        host.run("reconcile --owed");
        assert!(!calls(&host).contains(&stop), "{:?}", calls(&host));
    }
}

/// What moves between files is at its new place first.
#[test]
fn what_is_to_be_started_is_not_lost_when_nothing_can_be_written() {
    let to_start = json!({"schema": 1, "entries": [{"what": {"container": 101}, "slots": ["0000:01:00"]}]});
    // The record cannot be written, as with a full /run.
    let full = host().file("run/gpu-handoff/to-start", &to_start.to_string()).file("run/gpu-handoff/.vm-111.new/x", "");
    assert_eq!(full.run("111 pre-start").code, Some(1));
    assert_eq!(full.own_file("to-start"), to_start);
    // Home, but what is to be started cannot be written down: the record keeps it.
    let host =
        Host::new().card("0000:01:00", "nvidia", "snd_hda_intel").record("vm-111", "0000:01:00", "away", "nvidia");
    let mut record = host.own_file("vm-111");
    record["stopped"] = json!([{"container": 101}]);
    let host = host.file("run/gpu-handoff/vm-111", &record.to_string()).file("run/gpu-handoff/.to-start.new/x", "");
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(run.err.contains("container 101 stays stopped for now"), "{}", run.err);
    assert_eq!(host.own_file("vm-111")["stopped"], json!([{"container": 101}]));
    let host = host.without("run/gpu-handoff/.to-start.new");
    assert_eq!(host.run("reconcile").code, Some(0));
    assert!(!host.has_own_file("vm-111"));
    assert_eq!(host.own_file("to-start")["entries"][0]["what"], json!({"container": 101}));
}

/// A container that does not start is not given up; one that is there no more is.
#[test]
fn what_does_not_start_is_kept() {
    let entry = |id: u32| json!({"what": {"container": id}, "slots": ["0000:01:00"]});
    let host = with_systemd(Host::new().card("0000:01:00", "nvidia", "snd_hda_intel"))
        .config(r#"{"time":{"stop_s":0.1}}"#)
        .file("usr/sbin/pct", "#!/bin/sh\necho no >&2\nexit 1\n")
        .file("etc/pve/lxc/101.conf", "arch: amd64\n")
        .file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": [entry(102), entry(101)]}).to_string());
    let run = host.run("resume");
    assert_eq!(run.code, Some(0));
    assert!(run.err.contains("container 102 was stopped for a handoff and does not run again (no)"), "{}", run.err);
    let entries = host.own_file("to-start")["entries"].clone();
    assert_eq!((entries.as_array().map(Vec::len), &entries[0]["what"]), (Some(1), &json!({"container": 101})));
    assert_eq!(entries[0]["tries"], json!(1));
    assert_eq!(status(&host)["gpus"][0]["owed"], json!([{"what": "start", "container": 101}]));
    // The keeper leaves it alone for a moment.
    host.run("reconcile --owed");
    assert!(!calls(&host).iter().any(|call| call.ends_with(" resume")), "{:?}", calls(&host));
}

fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

const RUNS: &str = "populated 1\nfrozen 0\n";

/// That it will use the GPU nobody sees before it has opened it.
#[test]
fn what_was_just_started_again_is_stopped_once_more() {
    let host = |since: u64| {
        let entry = json!({"what": {"container": 101}, "slots": ["0000:01:00"], "since": since});
        with_systemd(settled())
            .config(r#"{"time":{"stop_s":0.1}}"#)
            .file("sys/fs/cgroup/lxc/101/cgroup.events", RUNS)
            .file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": [entry]}).to_string())
    };
    let is_stop = |call: &String| call.contains("--unit=gpu-handoff-stop-101 ");
    let just_started = host(unix_now());
    let plan = just_started.run("plan 111");
    assert!(plan.out.contains("stop container 101\n"), "{}", plan.out);
    let run = just_started.run("111 pre-start");
    assert!(run.err.contains("container 101 does not stop"), "{}", run.err);
    assert!(calls(&just_started).iter().any(is_stop), "{:?}", calls(&just_started));
    // One that nobody has started yet was started by its administrator, and for what it does there is the policy.
    let not_yet = host(0);
    not_yet.run("111 pre-start");
    assert!(!calls(&not_yet).iter().any(is_stop), "{:?}", calls(&not_yet));
}

/// What has failed by then is; what somebody has stopped meanwhile is not.
#[test]
fn what_runs_again_is_owed_until_it_has_run_for_a_while() {
    let entry = |what: Value| json!({"what": what, "slots": ["0000:01:00"], "tries": 1, "since": unix_now() - 60});
    let unit = |name: &str| entry(json!({"unit": name}));
    let entries =
        [entry(json!({"container": 101})), entry(json!({"container": 102})), unit("a.service"), unit("b.service")];
    let state = "#!/bin/sh\ncase $* in *ActiveState*a.service) echo failed ;; *ActiveState*) echo inactive ;; esac\n";
    let host = with_systemd(settled())
        .file("usr/bin/systemctl", state)
        .file("sys/fs/cgroup/lxc/101/cgroup.events", RUNS)
        .file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": entries}).to_string());
    assert_eq!(status(&host)["gpus"][0]["owed"], json!([]));
    let run = host.run("resume");
    let failed = "a.service was stopped for a handoff, ran again, and has failed since; it is tried again";
    assert!(run.err.contains(failed), "{}", run.err);
    let left = host.own_file("to-start")["entries"].clone();
    assert_eq!((left.as_array().map(Vec::len), &left[0]["what"]), (Some(1), &json!({"unit": "a.service"})));
    assert_eq!(left[0]["since"], json!(null));
    assert!(left[0]["after"].as_u64() > Some(unix_now()), "{left}");
    assert_eq!(status(&host)["gpus"][0]["owed"], json!([{"what": "start", "unit": "a.service"}]));
}

/// It is being stopped still, by a unit that outlives the handoff which wanted that: it runs, and in a moment it does not.
#[test]
fn what_is_still_being_stopped_is_started_after_that() {
    let entry = json!({"what": {"container": 101}, "slots": ["0000:01:00"]});
    // Whoever asks for the third time is told that it is over.
    let state = "#!/bin/sh\nroot=${0%/usr/bin/*}\ncase $* in *gpu-handoff-stop-101.service) ;; *) exit ;; esac\n\
                 echo x >>$root/asked\n[ $(wc -l <$root/asked) -lt 3 ] && echo active && exit\n\
                 rm -f $root/sys/fs/cgroup/lxc/101/cgroup.events\necho inactive\n";
    let pct = "#!/bin/sh\nroot=${0%/usr/sbin/*}\necho \"pct $*\" >>$root/calls\n\
               echo 'populated 1' >$root/sys/fs/cgroup/lxc/101/cgroup.events\n";
    let host = with_systemd(settled())
        .file("usr/bin/systemctl", state)
        .file("usr/sbin/pct", pct)
        .file("etc/pve/lxc/101.conf", "arch: amd64\n")
        .file("sys/fs/cgroup/lxc/101/cgroup.events", RUNS)
        .file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": [entry]}).to_string());
    let run = host.run("resume");
    assert!(run.err.contains("container 101 runs again"), "{}", run.err);
    assert_eq!(calls(&host), ["pct start 101"]);
}

/// Whoever has a lock of one entry's slot keeps nobody else from being started.
#[test]
fn one_that_must_wait_does_not_keep_the_others() {
    let entry = |id: u32, slot: &str| json!({"what": {"container": id}, "slots": [slot]});
    let entries = [entry(101, "0000:01:00"), entry(102, "0000:02:00")];
    let host = Host::new()
        .config(r#"{"time":{"lock_s":0.2}}"#)
        .file("sys/fs/cgroup/lxc/102/cgroup.events", "populated 1\nfrozen 0\n")
        .file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": entries}).to_string())
        .file("run/gpu-handoff/lock-0000:01:00", "");
    let held = fs::File::open(host.path("run/gpu-handoff/lock-0000:01:00")).unwrap();
    held.lock().unwrap();
    assert_eq!(host.run("resume").code, Some(5));
    let left = host.own_file("to-start")["entries"].clone();
    assert_eq!(left, json!([entry(101, "0000:01:00")]));
}

#[test]
fn every_card_that_reconcile_cannot_bring_home_is_told() {
    let host = settled().card("0000:02:00", "vfio-pci", "vfio-pci");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia").record("vm-222", "0000:02:00", "away", "nvidia");
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(1));
    for slot in ["0000:01:00", "0000:02:00"] {
        let error = format!("gpu-handoff: error: {slot} is stranded: ");
        assert_eq!(run.err.lines().filter(|line| line.starts_with(&error)).count(), 1, "{slot}: {}", run.err);
    }
}

/// Frozen by a handoff that was killed: it goes on, whatever else is the matter with the card.
#[test]
fn whoever_is_frozen_goes_on_beside_a_call_that_hangs() {
    let host = settled()
        .record("vm-111", "0000:01:00", "leaving", "nvidia")
        .wedged("0000:01:00", PID)
        .alive(PID)
        .file("sys/fs/cgroup/lxc/103/cgroup.events", "populated 1\nfrozen 1\n")
        .file("sys/fs/cgroup/lxc/103/cgroup.freeze", "1\n");
    let mut record = host.own_file("vm-111");
    record["frozen"] = json!([103]);
    for call in ["reconcile --owed", "reconcile --unfinished", "reconcile", "111 post-stop"] {
        fs::write(host.path("run/gpu-handoff/vm-111"), record.to_string()).unwrap();
        fs::write(host.path("sys/fs/cgroup/lxc/103/cgroup.freeze"), "1\n").unwrap();
        assert_eq!(status(&host)["gpus"][0]["owed"][2], json!({"what": "thaw", "container": 103}), "{call}");
        host.run(call);
        assert_eq!(fs::read_to_string(host.path("sys/fs/cgroup/lxc/103/cgroup.freeze")).unwrap(), "0", "{call}");
        assert_eq!(host.own_file("vm-111").get("frozen"), None, "{call}");
    }
}

/// A module that modprobe is still at outlives the worker that called it.
#[test]
fn a_modprobe_whose_worker_was_killed() {
    let journal = json!({"schema": 1, "owner": "vm-112", "slots": ["0000:01:00"], "step": "load nvidia nvidia_uvm",
        "pid": PID + 7, "start": START});
    let modprobe = |arguments: &str| {
        settled()
            .config(r#"{"time":{"handoff_s":1}}"#)
            .file("run/gpu-handoff/journal-vm-112", &journal.to_string())
            .file(&format!("proc/{PID}/comm"), "modprobe\n")
            .file(&format!("proc/{PID}/cmdline"), arguments)
            .alive(PID)
    };
    let host = modprobe("/usr/sbin/modprobe\0-a\0--\0nvidia\0nvidia_uvm\0");
    assert_eq!(host.run("111 pre-start").code, Some(4));
    assert_eq!(host.own_file("wedged-0000:01:00")["pid"], json!(PID));
    let other = modprobe("/usr/sbin/modprobe\0-a\0--\0snd_hda_intel\0");
    assert_eq!(other.run("111 pre-start"), ready());
    assert!(!other.has_own_file("journal-vm-112"));
    let said = |call: serde_json::Value| {
        let mut journal = journal.clone();
        journal["call"] = call;
        modprobe("/usr/sbin/modprobe\0-a\0--\0nvidia\0nvidia_uvm\0")
            .file("run/gpu-handoff/journal-vm-112", &journal.to_string())
    };
    let host = said(json!({"load": ["nvidia", "nvidia_uvm"]}));
    assert_eq!(host.run("111 pre-start").code, Some(4));
    let wedge = host.own_file("wedged-0000:01:00");
    assert_eq!((&wedge["pid"], &wedge["call"]), (&json!(PID), &json!({"load": ["nvidia", "nvidia_uvm"]})));
    for other in [json!({"load": ["nvidia"]}), json!({"unbind": "nvidia"})] {
        assert_eq!(said(other).run("111 pre-start"), ready());
    }
}

/// The journal of a handoff that somebody is at is his, whatever else is brought home meanwhile.
#[test]
fn a_step_of_another_card_is_left_to_whoever_takes_it() {
    let journal = json!({"schema": 1, "owner": "vm-112", "slots": ["0000:02:00"], "step": "unbind from nvidia 0000:02:00.0",
        "pid": PID, "start": START});
    let host = settled()
        .config(r#"{"time":{"handoff_s":1}}"#)
        .card("0000:02:00", "vfio-pci", "vfio-pci")
        .file("run/gpu-handoff/journal-vm-112", &journal.to_string())
        .file("run/gpu-handoff/lock-0000:02:00", "")
        .alive(PID);
    let held = fs::File::open(host.path("run/gpu-handoff/lock-0000:02:00")).unwrap();
    held.lock().unwrap();
    assert_eq!(host.run("111 pre-start"), ready());
    assert_eq!(host.own_file("journal-vm-112"), journal);
    assert!(!host.has_own_file("wedged-0000:02:00"));
    // Killed, but its call goes on.
    drop(held);
    assert_eq!(host.run("111 pre-start"), ready());
    assert!(!host.has_own_file("journal-vm-112"));
    assert_eq!(host.own_file("wedged-0000:02:00")["pid"], json!(PID));
}

// How the program is called

/// Its caller may have SIGCHLD ignored, and then the kernel forgets how a program ended.
#[test]
fn a_caller_that_ignores_its_children() {
    let host = away().config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let held = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    held.lock().unwrap();
    let program = host.command("111 post-stop");
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(r#"trap '' CHLD; exec "$0" "$@""#).arg(program.get_program()).args(program.get_args());
    let output = shell.env_clear().env("GPU_HANDOFF_ROOT", host.path("")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("gpu-handoff-keeper tries again by itself"), "{said}");
}

#[test]
fn whatever_a_later_proxmox_says_more() {
    for call in ["111 pre-start now", "111 pre-start --node=pve -x", "111 pre-start 1 2 3"] {
        assert_eq!(settled().run(call), ready(), "{call}");
    }
    let message =
        "--dry-run goes with a verb that changes something, and plan VMID is that of a start; see gpu-handoff --help";
    refuses_now(&settled(), "111 pre-start --dry-run", 2, message);
}

/// A tree stands for a machine, or it is the machine; not both.
#[test]
fn a_tree_with_the_real_kernel_inside() {
    for (link, target) in [("proc", "/proc"), ("sys", "/sys"), ("sys/bus/pci", "/sys/bus")] {
        let host = settled().vm(111, "hostpci0: 01:00");
        let path = host.path(link);
        fs::remove_dir_all(&path).unwrap();
        std::os::unix::fs::symlink(target, &path).unwrap();
        for call in ["111 pre-start", "--status", "reconcile"] {
            let run = host.run(call);
            let begin = format!("gpu-handoff: error: GPU_HANDOFF_ROOT={}", host.path("").display());
            assert_eq!(run.code, Some(2), "{link}: {call}: {}", run.err);
            assert!(run.err.starts_with(begin.trim_end_matches('/')), "{link}: {call}: {}", run.err);
            assert!(run.err.contains("is the real machine's"), "{link}: {call}: {}", run.err);
        }
        assert!(!host.has_own_file("vm-111"));
        fs::remove_file(&path).unwrap();
    }
}

// What is easily got wrong

/// Whoever waited for the lock goes by how things are when it is had.
#[test]
fn a_record_that_ends_while_somebody_waits_for_its_lock() {
    for call in ["111 post-stop", "reconcile", "to-nvidia"] {
        let host =
            settled().record("vm-111", "0000:01:00", "away", "nvidia").file("run/gpu-handoff/lock-0000:01:00", "");
        let held = fs::File::open(host.path("run/gpu-handoff/lock-0000:01:00")).unwrap();
        held.lock().unwrap();
        let waiting = host.command(call).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        fs::remove_file(host.path("run/gpu-handoff/vm-111")).unwrap();
        drop(held);
        let output = waiting.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()), "{call}");
    }
}

/// Its QEMU may be all there is of a start whose hook was killed.
#[test]
fn a_half_way_record_of_a_vm_that_runs_is_left_alone() {
    for progress in ["leaving", "returning"] {
        let host = settled().record("vm-111", "0000:01:00", progress, "nvidia").running(111, PID);
        let before = host.snapshot().without_lock();
        for call in ["reconcile", "reconcile --unfinished", "reconcile --owed"] {
            assert_eq!(
                host.run(call),
                Run { code: Some(0), out: String::new(), err: String::new() },
                "{progress}: {call}"
            );
        }
        assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{progress}");
    }
}

/// The worker of a run that was killed is about to be through with its call.
#[test]
fn a_worker_that_is_given_a_moment() {
    let host = settled().journal("0000:01:00", PID).alive(PID);
    let waiting = host.command("111 pre-start").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    fs::remove_dir_all(host.path(&format!("proc/{PID}"))).unwrap();
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), ready().err);
    assert!(!host.has_own_file("wedged-0000:01:00"));
}

/// `/proc/locks` names a file by device and inode, and says what kind of lock it is.
#[test]
fn a_lock_of_another_file() {
    let lock = "var/lock/qemu-server/lock-111.conf";
    let is_left_alone = |change: &dyn Fn(&str) -> String| {
        let host = away().flock(lock);
        let line = fs::read_to_string(host.path("proc/locks")).unwrap();
        let host = host.file("proc/locks", &change(&line));
        host.run("reconcile --owed");
        host.own_file("vm-111")["progress"] == "away"
    };
    assert!(is_left_alone(&str::to_string));
    assert!(!is_left_alone(&|line| line.replace("FLOCK", "POSIX")));
    assert!(!is_left_alone(&|line| {
        let file = line.split(' ').find(|word| word.matches(':').count() == 2).unwrap();
        let inode = file.rsplit(':').next().unwrap();
        line.replace(file, &format!("ff:ff:{inode}"))
    }));
}
