use super::*;

// History

const FILE: &str = "var/lib/gpu-handoff/history.jsonl";

/// The lines but for when it was and how long it took; those are looked at here.
#[track_caller]
fn lines(host: &Host) -> Vec<Value> {
    let mut lines = host.history();
    for line in &mut lines {
        let time = line["time"].take();
        let time = time.as_str().unwrap();
        assert!(time.len() == 20 && time.starts_with("20") && time.ends_with('Z'), "{time}");
        let all = line["ms"].take().as_u64().unwrap();
        let phases = line["phases"].as_array_mut().unwrap();
        assert!(phases.iter().map(|phase| phase["ms"].as_u64().unwrap()).sum::<u64>() <= all);
        phases.iter_mut().for_each(|phase| *phase = phase["name"].take());
    }
    lines
}

fn line(direction: &str, vmid: Option<u32>, exit: u8, phases: &[&str], reason: &str) -> Value {
    let reason = if reason.is_empty() { Value::Null } else { json!(reason) };
    json!({"schema": 1, "time": null, "direction": direction, "vmid": vmid, "slots": ["0000:01:00"], "exit": exit,
        "ms": null, "phases": phases, "reason": reason})
}

/// The one line of an error.
fn reason(run: &Run) -> String {
    let last = run.err.lines().last().unwrap();
    last.strip_prefix("gpu-handoff: error: ").unwrap().to_string()
}

#[test]
fn no_history_yet() {
    for (host, what) in [(host(), "none"), (host().file(FILE, ""), "empty")] {
        let before = host.snapshot();
        let none = Run { code: Some(0), out: "no handoff yet\n".to_string(), err: String::new() };
        assert_eq!(host.run("history"), none, "{what}");
        assert_eq!(host.run("history --json"), Run { out: String::new(), ..none }, "{what}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{what}");
    }
}

#[test]
fn what_was_begun_is_in_the_history() {
    // Fails at the first change that is not made in a tree, and goes back.
    let host = host();
    let there = host.run("111 pre-start");
    let by_hand = host.run("to-vfio");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia");
    assert_eq!(host.run("111 post-stop").code, Some(0));
    let failed = ["check", "prepare", "release", "release", "complete", "clear"];
    assert_eq!(
        lines(&host),
        [
            line("vfio", Some(111), 1, &failed, &reason(&there)),
            line("vfio", None, 1, &failed, &reason(&by_hand)),
            line("home", Some(111), 0, &["wait", "release", "complete"], ""),
        ]
    );
    // One document for both.
    assert_eq!(host.own_file("last-0000:01:00"), host.history()[2]);
    assert_eq!(status(&host)["gpus"][0]["last"], host.history()[2]);
}

#[test]
fn what_was_refused_is_in_the_history() {
    let busy = || with_drm_node(host()).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let wedged = || settled().wedged("0000:01:00", PID).alive(PID);
    let of_112 = || host().record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID);
    let quick = |host: Host| host.config(r#"{"time":{"handoff_s":1}}"#);
    let held = || {
        settled()
            .record("vm-111", "0000:01:00", "away", "nvidia")
            .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
            .process(PID, "kvm", "/qemu.slice/111.scope", &[NULL])
    };
    for (host, call, direction, vmid, exit) in [
        (busy(), "111 pre-start", "vfio", Some(111), 3),
        (busy(), "to-vfio", "vfio", None, 3),
        (wedged(), "111 pre-start", "vfio", Some(111), 4),
        (of_112(), "111 pre-start", "vfio", Some(111), 3),
        (host().file("run/gpu-handoff/vm-111", "{}"), "111 pre-start", "vfio", Some(111), 3),
        (wedged().record("vm-111", "0000:01:00", "away", "nvidia"), "111 post-stop", "home", Some(111), 4),
        (held(), "to-nvidia", "home", Some(111), 3),
        (quick(held()), "111 post-stop", "home", Some(111), 4),
        (settled().file("run/gpu-handoff/vm-112", "{}"), "to-nvidia", "home", None, 3),
    ] {
        let run = host.run(call);
        assert_eq!(run.code, Some(exit.into()), "{call}: {}", run.err);
        assert_eq!(lines(&host), [line(direction, vmid, exit, &[], &reason(&run))], "{call}");
        assert!(!host.has_own_file("last-0000:01:00"), "{call}: {}", run.err);
    }
}

/// Which slots it would have been about is not known then.
#[test]
fn what_was_refused_without_a_slot_is_in_the_history() {
    for (config, exit) in [("hostpci0: 0000:09:00", 3), ("hostpci0: mapping=gpu", 3)] {
        let host = host().vm(111, config);
        let run = host.run("111 pre-start");
        assert_eq!(run.code, Some(exit.into()), "{}", run.err);
        let mut expected = line("vfio", Some(111), exit, &[], &reason(&run));
        expected["slots"] = json!([]);
        assert_eq!(lines(&host), [expected]);
    }
    let host = host().file("run/gpu-handoff/vm-111", "{}");
    let run = host.run("111 post-stop");
    let mut expected = line("home", Some(111), 1, &[], &reason(&run));
    expected["slots"] = json!([]);
    assert_eq!(lines(&host), [expected]);
}

/// Somebody else holds it, so that nobody may make room; the line is there all the same.
#[test]
fn who_did_not_get_the_lock_is_in_the_history() {
    let host = host()
        .record("vm-111", "0000:01:00", "away", "nvidia")
        .config(r#"{"time":{"lock_s":0.1}}"#)
        .file("run/gpu-handoff/lock", "");
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    let there = host.run("111 pre-start");
    let home = host.run("111 post-stop");
    assert_eq!(
        lines(&host),
        [line("vfio", Some(111), 5, &[], &reason(&there)), line("home", Some(111), 5, &[], &reason(&home)),]
    );
}

#[test]
fn what_was_no_handoff_is_not_in_the_history() {
    let recorded = || settled().record("vm-111", "0000:01:00", "away", "vfio-pci");
    for (host, calls) in [
        (settled(), &["111 pre-start", "111 pre-start", "to-vfio", "to-vfio"][..]),
        (host(), &["to-nvidia", "reconcile", "111 post-stop", "111 post-start", "plan 111", "to-vfio --dry-run"]),
        (host(), &["999 pre-start", "to-vfio 09:00", "frobnicate", "--status", "history"]),
        (recorded(), &["to-nvidia"]),
        (recorded(), &["111 post-stop"]),
        (with_drm_node(host()).process(PID, "x", "/", &[NULL]), &["plan 111", "to-vfio --dry-run"]),
        (host().vm(111, "cores: 2"), &["111 pre-start"]),
    ] {
        for call in calls {
            host.run(call);
            assert!(!host.path(FILE).exists(), "{call}");
        }
    }
}

#[test]
fn history_for_people() {
    let host = with_drm_node(host()).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(3));
    let json = host.history().remove(0);
    let Run { code, out, err } = host.run("history");
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let (time, ms) = (json["time"].as_str().unwrap(), &json["ms"]);
    assert_eq!(out, format!("{time}  host -> VM 111  0000:01:00  {ms} ms  refused  {}\n", reason(&run)));
}

#[test]
fn of_one_vm_and_the_newest() {
    let entry = |hour: u8, vmid: u32| {
        let time = format!("2026-11-20T{hour:02}:00:00Z");
        json!({"schema": 1, "time": time, "direction": "home", "vmid": vmid, "slots": [], "exit": 0, "ms": 1, "phases": [], "reason": null})
            .to_string()
            + "\n"
    };
    // A zone with one offset, an hour east of Greenwich, as in tzfile(5).
    let counts: Vec<u8> = [0, 0, 0, 0, 1, 4].into_iter().flat_map(u32::to_be_bytes).collect();
    let part = [b"TZif2".as_slice(), &[0; 15], &counts, &3600_u32.to_be_bytes(), &[0, 0], b"CET\0"].concat();
    let host = host().file(FILE, &[entry(12, 111), entry(13, 112), entry(14, 111)].concat());
    let utc = host.run("history").out;
    fs::write(host.path("etc/localtime"), [&part, &part, b"\nCET-1\n".as_slice()].concat()).unwrap();
    for (call, times) in [
        ("history", &["2026-11-20 13:00:00", "2026-11-20 14:00:00", "2026-11-20 15:00:00"][..]),
        ("history -n 2", &["2026-11-20 14:00:00", "2026-11-20 15:00:00"]),
        ("history 111", &["2026-11-20 13:00:00", "2026-11-20 15:00:00"]),
        ("history 111 -n 1", &["2026-11-20 15:00:00"]),
    ] {
        let out = host.run(call).out;
        assert_eq!(out.lines().map(|line| &line[..19]).collect::<Vec<_>>(), times, "{call}");
    }
    assert_eq!(host.run("history 113").out, "no handoff yet\n");
    assert_eq!(host.run("history 112 --json").out.lines().count(), 1);
    assert!(host.run("history --json").out.contains("2026-11-20T12:00:00Z"));
    // What TZ names counts more; what there is not, is UTC.
    let output = host.command("history").env("TZ", ":Nowhere").output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), utc);
    assert!(utc.starts_with("2026-11-20T12:00:00Z"));
}

/// A power loss, or a disk that was full for a while.
#[test]
fn a_line_of_the_history_that_is_not_understood() {
    let host = host().record("vm-111", "0000:01:00", "away", "nvidia").file(FILE, "{}\n{\"schema\":1,\"ti");
    let file = host.path(FILE);
    assert_eq!(host.run("111 post-stop").code, Some(0));
    let warning = |number: u8, problem: &str| {
        format!("gpu-handoff: warning: {}: line {number}: {problem}, left out\n", file.display())
    };
    let warnings = warning(1, "schema: not a number") + &warning(2, "cut short or damaged");
    for call in ["history", "history --json"] {
        let Run { code, out, err } = host.run(call);
        assert_eq!((code, err.as_str(), out.lines().count()), (Some(0), warnings.as_str(), 1), "{call}: {out}");
    }
}

/// Nothing depends on it, so a disk that takes nothing more costs a warning.
#[test]
fn a_history_that_cannot_be_written() {
    let recorded = || host().record("vm-111", "0000:01:00", "away", "nvidia");
    let full = |host: Host| {
        fs::create_dir_all(host.path("var/lib/gpu-handoff")).unwrap();
        std::os::unix::fs::symlink("/dev/full", host.path(FILE)).unwrap();
        (host, FILE, "No space left on device (os error 28)")
    };
    let no_directory = |host: Host| (host.file("var/lib/gpu-handoff", ""), FILE, "File exists (os error 17)");
    for make in [full, no_directory] {
        for (host, call, code) in [
            (recorded(), "111 post-stop", 0),
            (recorded(), "reconcile", 0),
            (host(), "111 pre-start", 1),
            (with_drm_node(host()).process(PID, "x", "/", &[NULL]), "111 pre-start", 3),
        ] {
            let (host, file, problem) = make(host);
            let run = host.run(call);
            assert_eq!(run.code, Some(code), "{call}: {}", run.err);
            let warning = format!("gpu-handoff: warning: {}: {problem}\n", host.path(file).display());
            assert_eq!(run.err.matches(&warning).count(), 1, "{call}: {}", run.err);
            assert!(!host.has_own_file("vm-111"), "{call}: {}", run.err);
        }
    }
}

#[test]
fn a_history_that_cannot_be_read() {
    let host = host();
    fs::create_dir_all(host.path(FILE)).unwrap();
    let file = host.path(FILE);
    let error = format!("gpu-handoff: error: {}: Is a directory (os error 21)\n", file.display());
    for call in ["history", "history --json"] {
        assert_eq!(host.run(call), Run { code: Some(1), out: String::new(), err: error.clone() }, "{call}");
    }
}

#[test]
fn anybody_may_read_the_history() {
    use std::os::unix::fs::PermissionsExt;
    let host = host();
    let program = host.command("111 pre-start");
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(r#"umask 022; exec "$0" "$@""#).arg(program.get_program()).args(program.get_args());
    shell.env_clear().env("GPU_HANDOFF_ROOT", host.path("")).stderr(Stdio::null());
    assert_eq!(shell.status().unwrap().code(), Some(1));
    let mode = |path: &str| host.path(path).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(FILE), mode("var/lib/gpu-handoff")), (0o644, 0o755));
}
