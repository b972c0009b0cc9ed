use super::*;

// Our own files

/// Or the next file that is opened would be the one that is written to as standard error.
#[test]
fn a_caller_without_standard_input_output_and_error() {
    let host = with_drm_node(host()).process(PID, "ffmpeg", "/job.scope", &[NULL]);
    let line = r#"exec "$0" 111 pre-start <&- >&- 2>&-"#;
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", line, env!("CARGO_BIN_EXE_gpu-handoff")]).env("GPU_HANDOFF_ROOT", host.path(""));
    assert_eq!(shell.status().unwrap().code(), Some(3));
    let said = host.run("111 pre-start").err;
    assert!(said.starts_with("gpu-handoff: error: 0000:01:00 was not touched, it is in use"), "{said}");
    let folder = fs::read_dir(host.path("run/gpu-handoff")).unwrap().map(|entry| entry.unwrap().path());
    for file in folder.filter(|path| path.is_file()) {
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("gpu-handoff: error"), "{}: {text}", file.display());
    }
}

/// Files that are no record, and what is wrong with them.
pub const NO_RECORDS: [(&str, &str, &str); 7] = [
    ("vm-111", "", "EOF while parsing a value at line 1 column 0"),
    ("vm-111", "{}", "schema: not a number"),
    ("vm-111", r#"{"schema":2}"#, "schema 2: written by a newer gpu-handoff; install that version again"),
    ("vm-111", r#"{"schema":1,"progress":"lost"}"#, r#"progress: "lost" is unknown"#),
    ("vm-111", r#"{"schema":1,"progress":"away","functions":[{}],"modules":[]}"#, "slot: missing"),
    ("vm-112", "", "EOF while parsing a value at line 1 column 0"),
    ("manual-0000:01:00", "", "EOF while parsing a value at line 1 column 0"),
];

/// A tree with such a file, and the line that names it.
pub fn with_no_record(host: Host, name: &str, text: &str, problem: &str) -> (Host, String) {
    let file = format!("run/gpu-handoff/{name}");
    let line = format!("{}: {problem}", host.path(&file).display());
    (host.file(&file, text), line)
}

/// It may be the one that knows where a card on vfio-pci is at home.
#[test]
fn a_record_that_is_not_understood_and_a_card_that_is_away() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let error = format!(
            "error: 0000:01:00.0 was not touched: it is on vfio-pci, and the file that may say where it is at \
             home cannot be read: {line}; if it is at home there, remove that file"
        );
        let before = host.snapshot().without_lock();
        for call in ["111 pre-start", "plan 111", "to-vfio", "to-vfio --dry-run"] {
            let run = host.run(call);
            assert_eq!((run.code, run.out.as_str()), (Some(3), ""), "{call}: {}", run.err);
            let told = told(&run);
            let (last, warnings) = told.split_last().unwrap();
            assert_eq!(*last, error, "{call}");
            assert!(warnings.iter().all(|warning| *warning == format!("warning: {line}")), "{call}: {warnings:?}");
            assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
        }
    }
}

/// One that has a driver of the host is at home: the run goes on, unless it would write over that very file.
#[test]
fn a_record_that_is_not_understood_and_a_card_at_home() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(host(), name, text, problem);
        let at_home = format!("warning: {line}\ngpu-handoff: 0000:01:00 is at home on nvidia: nothing to do");
        assert_eq!(host.run("to-nvidia"), success(&at_home));
        let own = if name == "vm-111" { "111 pre-start" } else { "to-vfio" };
        if name != "vm-112" {
            let (owner, again) = match own {
                "to-vfio" => ("vfio-pci by hand", "try again: gpu-handoff to-vfio 0000:01:00"),
                _ => ("VM 111", "start VM 111 again: qm start 111"),
            };
            let message = format!(
                "0000:01:00 was not touched: an earlier record of {owner} cannot be read: {line}; if gpu-handoff --status \
                 shows the card at home, remove that file; then {again}"
            );
            refuses(&host, own, 3, &message);
        }
        for call in ["plan 111", "to-vfio --dry-run"] {
            if name != "vm-112" && beforehand(own).as_deref() == Some(call) {
                continue;
            }
            let Run { code, out, err } = host.run(call);
            assert_eq!((code, err), (Some(0), format!("gpu-handoff: warning: {line}\n")), "{call}");
            assert!(out.ends_with("  bind      bind to vfio-pci .0 .1\n"), "{out}");
        }
        if name == "vm-111" {
            continue;
        }
        let told = told(&host.run("111 pre-start"));
        assert_eq!(told[0], format!("warning: {line}"));
        let end = "error: 0000:01:00 is back where it was: unload nvidia: not done under GPU_HANDOFF_ROOT; then \
                   start VM 111 again: qm start 111";
        assert_eq!(told.last().unwrap(), end);
    }
}

#[test]
fn a_record_that_is_not_understood_when_its_vm_stops() {
    for (name, text, problem) in NO_RECORDS.iter().filter(|(name, ..)| *name == "vm-111") {
        for host in [host(), settled()] {
            let (host, line) = with_no_record(host, name, text, problem);
            refuses(&host, "111 post-stop", 1, &line);
            // No reason to keep a VM from starting that wants no GPU any more.
            let host = host.vm(111, "cores: 2");
            let before = host.snapshot().without_lock();
            assert_eq!(host.run("111 pre-start"), success(&format!("warning: {line}")));
            assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING);
        }
    }
}

/// Left alone: nobody knows what it is about.
#[test]
fn a_record_that_is_not_understood_and_reconcile() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let before = host.snapshot();
        assert_eq!(host.run("reconcile"), success(&format!("warning: {line}")), "{name}");
        assert_eq!(host.run("reconcile --unfinished"), success(&format!("warning: {line}")), "{name}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{name}");
    }
}

/// Nobody knows then whether a handoff of ours put the card there.
#[test]
fn a_record_that_is_not_understood_and_a_card_to_bring_home() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let run = host.run("to-nvidia");
        assert!(run.err.contains(&line), "{}", run.err);
        assert_ne!(run.code, Some(0), "{}", run.err);
        assert!(!run.err.contains("no handoff of ours put it there"), "{}", run.err);
    }
}

#[test]
fn a_problem_is_told_once() {
    for call in ["111 pre-start", "to-vfio", "to-nvidia", "reconcile"] {
        for host in [host(), settled()] {
            let (host, line) = with_no_record(host, "vm-112", "{}", "schema: not a number");
            let Run { err, .. } = host.run(call);
            assert_eq!(err.matches(&line).count(), 1, "{call}: {err}");
        }
    }
    let host = settled().record("vm-112", "0000:01:00", "leaving", "nvidia").wedged("0000:01:00", PID).alive(PID);
    for call in ["111 pre-start", "to-vfio"] {
        let Run { err, .. } = host.run(call);
        assert_eq!(err.matches("0000:01:00 is wedged").count(), 1, "{call}: {err}");
    }
}

#[test]
fn a_mistake_in_the_configuration() {
    for (json, problem) in [
        (r#"{"time":{"lock":3}}"#, "time.lock: unknown key"),
        (r#"{"tine":{}}"#, "tine: unknown key"),
        (r#"{"time":{"lock_s":"3"}}"#, "time.lock_s: expected seconds from 0.1 to 3600, got \"3\""),
        (
            r#"{"gpus":{"0000:01:00":{"home":"amdgpu"}}}"#,
            "gpus.0000:01:00.home: expected auto or nvidia or nouveau or vfio-pci or none, got \"amdgpu\"",
        ),
        (
            r#"{"gpus":{"0000:01:00.1":{"home":"none"}}}"#,
            "gpus.0000:01:00.1: no slot; a slot is written like 0000:01:00",
        ),
        (
            r#"{"gpus":{"01:00":{"home":"none"},"0000:01:00":{"home":"auto"}}}"#,
            "gpus.01:00: the same slot as 0000:01:00",
        ),
        (r#"{"policy":{"containers":{"web":"stop"}}}"#, "policy.containers.web: unknown key"),
        ("{\n  \"time\": }", "expected value at line 2 column 11"),
    ] {
        let problem = format!("/etc/gpu-handoff/config.json: {problem}");
        for call in ["to-vfio", "to-vfio 01:00", "handoff vfio", "to-nvidia", "config check"] {
            refuses_now(&settled().config(json), call, 2, &problem);
        }
        for call in ["to-vfio --dry-run", "to-nvidia --dry-run", "reconcile --dry-run"] {
            refuses_now(&settled().config(json), call, 2, &problem);
        }
        // It runs by itself too, so it goes on as a hook does.
        let without = if !json.contains('\n') { "without it" } else { "with the defaults" };
        let warned = success(&format!("warning: {problem}; going on {without}"));
        assert_eq!(settled().config(json).run("reconcile"), warned);
        // A VM's start goes on, one without a GPU does not even look.
        let host = settled().config(json);
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out), (Some(0), String::new()), "{json}");
        let warning = format!("gpu-handoff: warning: {problem}; going on {without}\n");
        assert_eq!(err, format!("{warning}{}", ready().err));
        // Who asks beforehand is told what the hook does.
        let out = "0000:01:00 host -> VM 111\n  nothing to do\n".to_string();
        assert_eq!(settled().config(json).run("plan 111"), Run { code: Some(0), out, err: warning });
        ignores(&settled().config(json).vm(111, "cores: 2"), "111 pre-start");
    }
}

/// One typo takes nothing else with it: container 101 is stopped for the VM, as it should be.
#[test]
fn one_mistake_in_a_configuration_that_says_more() {
    let json =
        r#"{"policy":{"containers":{"101":"stop"},"unt":"stop"},"time":{"lock_s":0},"gpus":{"09:00":{"home":"none"}}}"#;
    let host = with_drm_node(host()).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]).config(json);
    let at = "gpu-handoff: warning: /etc/gpu-handoff/config.json";
    let warnings = format!(
        "{at}: policy.unt: unknown key; going on without it\n{at}: time.lock_s: expected seconds from 0.1 to 3600, got 0; \
         going on without it\n"
    );
    let Run { code, out, err } = host.run("plan 111");
    assert_eq!((code, err), (Some(0), warnings));
    assert!(out.contains("stop      stop container 101"), "{out}");
    let Run { code, out, err } = host.run("config check");
    assert_eq!((code, out.as_str(), err.lines().count()), (Some(2), "", 3), "{err}");
    assert!(err.lines().all(|line| line.starts_with("gpu-handoff: error: ")), "{err}");
    let out = host.run("config show").out;
    let line =
        |key: &str| out.lines().find(|line| line.starts_with(key)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line("time.lock_s"), ["time.lock_s", "10", "default"]);
    assert_eq!(line("policy.containers.101"), ["policy.containers.101", "stop", "/etc/gpu-handoff/config.json"]);
    assert!(!out.contains("unt"), "{out}");
}

#[test]
fn a_configuration_without_a_mistake() {
    for host in [host(), host().config(r#"{"policy":{"unit":"stop"},"gpus":{"01:00":{"home":"nouveau"}}}"#)] {
        let out = "/etc/gpu-handoff/config.json: nothing is wrong\n".to_string();
        assert_eq!(host.run("config check"), Run { code: Some(0), out, err: String::new() });
        assert_eq!(host.run("config show").code, Some(0));
    }
    refuses_now(
        &host().config("{"),
        "config show",
        2,
        "/etc/gpu-handoff/config.json: EOF while parsing an object at line 1 column 1",
    );
}

const CLUSTER: &str = "etc/pve/gpu-handoff.json";

/// What all nodes have, and over it the node's own.
#[test]
fn the_clusters_configuration_holds_below_the_nodes_own() {
    let cluster = r#"{"policy":{"unit":"stop","containers":{"101":"stop"}},"time":{"lock_s":7},"gpus":{"01:00":{"home":"none"}}}"#;
    let own = r#"{"policy":{"unit":"refuse"},"gpus":{"0000:01:00":{"home":"auto"}}}"#;
    let host = host().file(CLUSTER, cluster).config(own);
    let out = host.run("config show").out;
    let line = |key: &str| {
        let line = out.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key}: {out}"));
        line.split_whitespace().skip(1).map(str::to_string).collect::<Vec<_>>()
    };
    let (of_node, of_cluster) = ("/etc/gpu-handoff/config.json", "/etc/pve/gpu-handoff.json");
    assert_eq!(line("policy.unit"), ["refuse", of_node]);
    assert_eq!(line("policy.containers.101"), ["stop", of_cluster]);
    assert_eq!(line("time.lock_s"), ["7", of_cluster]);
    assert_eq!(line("time.stop_s"), ["90", "default"]);
    assert_eq!(line("gpus.0000:01:00.home"), ["auto", of_node]);
    assert_eq!(out.matches("gpus.").count(), 1, "{out}");
    assert_eq!(host.run("config check").out, format!("{of_node}, {of_cluster}: nothing is wrong\n"));
    let plan = with_drm_node(super::host())
        .file(CLUSTER, cluster)
        .process(PID, "ffmpeg", "/lxc/101/ns", &[NULL])
        .run("plan 111");
    assert!(plan.out.contains("stop      stop container 101"), "{}{}", plan.out, plan.err);
    // A card of another node is no mistake here, and no reason to think that one was in that slot.
    let elsewhere = super::host().file(CLUSTER, r#"{"gpus":{"0000:99:00":{"home":"none"}}}"#);
    assert_eq!(elsewhere.run("config check").code, Some(0));
}

#[test]
fn a_mistake_in_the_clusters_configuration_takes_nothing_else_with_it() {
    for (text, problem) in [
        (r#"{"tine":{},"time":{"lock_s":7}}"#, "tine: unknown key"),
        ("{", "EOF while parsing an object at line 1 column 1"),
    ] {
        let host = || settled().config(r#"{"time":{"stop_s":5}}"#).file(CLUSTER, text);
        let problem = format!("/etc/pve/gpu-handoff.json: {problem}");
        refuses_now(&host(), "config check", 2, &problem);
        refuses_now(&host(), "to-vfio", 2, &problem);
        let run = host().run("111 pre-start");
        let warning = format!("gpu-handoff: warning: {problem}; going on without it\n");
        assert_eq!((run.code, run.err), (Some(0), format!("{warning}{}", ready().err)));
        let shown = host().run("config show").out;
        assert!(shown.lines().any(|line| line.starts_with("time.stop_s ") && line.contains(" 5 ")), "{shown}");
        let doctor = host().run("doctor").out;
        assert!(doctor.contains("/etc/pve/gpu-handoff.json"), "{doctor}");
    }
}

#[test]
fn another_handoff_is_under_way() {
    let taken = |host: Host| host.config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let why = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then";
    let override_of = |n: u32| format!("sys/bus/pci/devices/0000:01:00.{n}/driver_override");
    let given = settled().file(&override_of(0), "vfio-pci\n").file(&override_of(1), "vfio-pci\n");
    let host = taken(given.card("0000:02:00", "nvidia", "").record("vm-111", "0000:01:00", "away", "nvidia"));
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    for (call, slot, again) in [
        ("111 pre-start", "0000:01:00", "start VM 111 again: qm start 111"),
        ("to-vfio 02:00", "0000:02:00", "try again: gpu-handoff to-vfio 0000:02:00"),
        ("to-vfio 01:00", "0000:01:00", "try again: gpu-handoff to-vfio 0000:01:00"),
    ] {
        refuses_now(&host, call, 5, &format!("{slot} was not touched: {why} {again}"));
    }
    // What is to come home says so, for whoever tries again.
    for call in ["111 post-stop", "to-nvidia 01:00", "reconcile"] {
        let message = format!("0000:01:00 was not touched: {why} try again: gpu-handoff to-nvidia 0000:01:00");
        assert_eq!(host.run(call), refusal(5, &message), "{call}");
        assert_eq!(host.own_file("vm-111")["progress"], "returning", "{call}");
    }
    // Who only asks need not wait.
    plans(&host, "plan 111", &["0000:01:00 host -> VM 111", "  nothing to do"]);
    plans(&host, "to-vfio 01:00 --dry-run", &["0000:01:00 host -> vfio-pci by hand", "  nothing to do"]);
    ignores(&taken(host).vm(111, "cores: 2").without("run/gpu-handoff/vm-111"), "111 pre-start");
}

/// Each card has a lock of its own; and whoever only binds and unbinds shares the driver's modules with the like.
#[test]
fn two_cards_side_by_side() {
    let at_home = |slot: &'static str| {
        move |host: Host| host.file(&format!("sys/bus/pci/devices/{slot}.0/driver_override"), "vfio-pci\n")
    };
    let host = settled().config(r#"{"time":{"lock_s":0.2}}"#).card("0000:02:00", "vfio-pci", "vfio-pci");
    let host = at_home("0000:02:00")(at_home("0000:01:00")(host));
    let host = host.file("run/gpu-handoff/lock-0000:01:00", "").file("run/gpu-handoff/lock", "");
    let slot = fs::File::open(host.path("run/gpu-handoff/lock-0000:01:00")).unwrap();
    slot.lock().unwrap();
    let stack = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    stack.lock_shared().unwrap();
    let why = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then start VM 111 \
               again: qm start 111";
    refuses_now(&host, "111 pre-start", 5, &format!("0000:01:00 was not touched: {why}"));
    assert_eq!(host.run("to-vfio 02:00"), success("0000:02:00 is already on vfio-pci: nothing to do"));
}

/// Whoever unloads modules wants them alone.
#[test]
fn the_last_card_of_the_driver_beside_another() {
    let host = host().config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let stack = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    stack.lock_shared().unwrap();
    let why = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then start VM 111 \
               again: qm start 111";
    refuses_now(&host, "111 pre-start", 5, &format!("0000:01:00 was not touched: {why}"));
}

/// A record binds its slots together: whoever takes one of them over must not be in anybody's way with the other.
#[test]
fn slots_that_a_record_names_together() {
    let functions =
        |slot: &str| json!({"slot": slot, "address": format!("{slot}.0"), "driver": "nvidia", "module": null});
    let both = [functions("0000:01:00"), functions("0000:02:00")];
    let record = json!({"schema": 1, "progress": "away", "functions": both, "modules": []});
    let host = settled().card("0000:02:00", "vfio-pci", "vfio-pci").config(r#"{"time":{"lock_s":0.2}}"#);
    let host = host.file("run/gpu-handoff/vm-222", &record.to_string()).file("run/gpu-handoff/lock-0000:02:00", "");
    let lock = fs::File::open(host.path("run/gpu-handoff/lock-0000:02:00")).unwrap();
    lock.lock().unwrap();
    let why = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then start VM 111 \
               again: qm start 111";
    refuses_now(&host, "111 pre-start", 5, &format!("0000:01:00 was not touched: {why}"));
}

#[test]
fn a_lock_that_is_released_in_time() {
    let host = settled().file("run/gpu-handoff/lock", "");
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    let waiting = host.command("111 pre-start").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!host.path("run/gpu-handoff/vm-111").exists());
    drop(lock);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), ready().err);
    assert_eq!(output.status.code(), Some(0));
}

pub const WEDGED: &str = "0000:01:00 is wedged and left alone: unbind from nvidia 0000:01:00.0 has not come back since \
                      2026-11-20T12:00:00Z (PID 5000001)";
pub const COMES_HOME: &str = "the card comes home by itself when the call ends; if it never does, only a reboot frees it; \
                          other cards keep working";

#[test]
fn a_wedged_slot() {
    let message = format!("{WEDGED}; {COMES_HOME}");
    let wedged = || settled().wedged("0000:01:00", PID).alive(PID);
    for call in ["111 pre-start", "to-vfio"] {
        refuses(&wedged(), call, 4, &message);
    }
    let recorded = wedged().record("vm-111", "0000:01:00", "leaving", "nvidia");
    refuses(&recorded, "111 pre-start", 4, &message);
    for call in ["111 post-stop", "to-nvidia", "reconcile", "reconcile --unfinished"] {
        refuses_now(&recorded, call, 4, &message);
    }
}

#[test]
fn a_wedged_slot_told_beforehand() {
    let host = settled().wedged("0000:01:00", PID).alive(PID).record("vm-111", "0000:01:00", "away", "nvidia");
    for call in ["to-nvidia", "reconcile"] {
        refuses(&host, call, 4, &format!("{WEDGED}; {COMES_HOME}"));
    }
}

#[test]
fn what_to_do_about_a_wedged_slot() {
    let wedged = || with_drm_node(host()).wedged("0000:01:00", PID).alive(PID);
    let held = |host: Host| host.process(PID + 1, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let holder = "PID 5000002 (ffmpeg, container 101) has /dev/dri/card0 open; end it (pct shutdown 101)";
    refuses(&held(wedged()), "111 pre-start", 4, &format!("{WEDGED}; {holder}; {COMES_HOME}"));
    let driver = |version: &str| {
        let line = format!("NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Wed Nov 19 00:00:00 UTC 2026\n");
        wedged().file("proc/driver/nvidia/version", &line)
    };
    let never = "the card comes home by itself when the call ends; it never does, with this version of the driver, where \
                 somebody had the card attached through /dev/nvidiactl: then only a reboot frees it; other cards keep \
                 working";
    refuses(&driver("590.48.01"), "111 pre-start", 4, &format!("{WEDGED}; {COMES_HOME}"));
    refuses(&driver("595.45.04"), "111 pre-start", 4, &format!("{WEDGED}; {never}"));
    refuses(&held(driver("595.45.04")), "111 pre-start", 4, &format!("{WEDGED}; {holder}; {never}"));
    // What the call is decides, and not what it is called.
    for (call, what) in [
        (json!({"unbind": "nvidia"}), never),
        (json!({"unbind": "nvidia-gpu"}), COMES_HOME),
        (json!({"load": ["nvidia"]}), COMES_HOME),
        (json!({}), COMES_HOME),
        (json!({"of a later version": 1}), never),
    ] {
        let host = driver("595.45.04");
        let mut wedge = host.own_file("wedged-0000:01:00");
        wedge["call"] = call;
        let host = host.file("run/gpu-handoff/wedged-0000:01:00", &wedge.to_string());
        refuses(&host, "111 pre-start", 4, &format!("{WEDGED}; {what}"));
    }
}

#[test]
fn a_wedge_that_has_ended() {
    let wedged = || settled().wedged("0000:01:00", PID);
    for call in ["111 pre-start", "to-vfio"] {
        for (what, host) in [
            ("no such process", wedged()),
            ("a zombie", wedged().stat(PID, 'Z', START)),
            ("a later process", wedged().stat(PID, 'D', START + 1)),
        ] {
            assert_eq!(host.run(call), ready(), "{call}: {what}");
            assert!(!host.has_own_file("wedged-0000:01:00"), "{call}: {what}");
        }
    }
    // Another slot's is none of this one's business, and stays.
    let host = settled().wedged("0000:02:00", PID).alive(PID);
    accepts(&host, "another slot");
    assert!(host.has_own_file("wedged-0000:02:00"));
}

/// Nobody knows then whether the call ended, so the slot is left alone.
#[test]
fn a_wedge_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("[]", "step: no string"),
        (r#"{"step":"unbind","since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        // As it was written before the start was.
        (r#"{"step":"unbind","pid":5000001,"since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        (r#"{"step":"unbind","pid":"1","start":1,"since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        (r#"{"step":"unbind","pid":1,"start":1}"#, "since: no string"),
    ] {
        let file = "run/gpu-handoff/wedged-0000:01:00";
        let host = settled().file(file, text);
        let line = format!("{}: {problem}", host.path(file).display());
        let message = format!("0000:01:00 may be wedged and was not touched: {line}; a reboot clears that");
        for call in ["111 pre-start", "to-vfio"] {
            refuses(&host, call, 4, &message);
        }
        let before = host.snapshot();
        let Run { code, out, err } = host.run("--status --json");
        assert_eq!((code, err), (Some(0), format!("gpu-handoff: warning: {line}\n")));
        let gpu = serde_json::from_str::<Value>(&out).unwrap()["gpus"][0].clone();
        assert_eq!(gpu["owner"], json!({"kind": "wedged", "vmid": null}), "{text}");
        assert_eq!(gpu["wedged"], Value::Null, "{text}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING);
        let host = host.record("vm-111", "0000:01:00", "away", "nvidia");
        for call in ["111 post-stop", "to-nvidia", "reconcile"] {
            refuses_now(&host, call, 4, &message);
        }
        // It is another slot's.
        let host = settled().file("run/gpu-handoff/wedged-0000:02:00", text);
        accepts(&host, text);
        assert!(host.has_own_file("wedged-0000:02:00"));
    }
}

// What a killed handoff left

#[test]
fn a_journal_whose_worker_has_ended() {
    for host in [settled(), settled().stat(PID, 'Z', START), settled().stat(PID, 'S', START + 1)] {
        let host = host.journal("0000:01:00", PID);
        accepts(&host, "ended");
        assert!(!host.has_own_file("journal"));
        assert!(!host.has_own_file("wedged-0000:01:00"));
    }
}

/// It is given a moment; then its call counts as stuck, and only its slot is refused.
#[test]
fn a_journal_whose_worker_is_still_at_it() {
    let left = || settled().config(r#"{"time":{"handoff_s":1}}"#).journal("0000:01:00", PID).alive(PID);
    let host = left();
    let Run { code, out, err } = host.run("111 pre-start");
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    let wedge = host.own_file("wedged-0000:01:00");
    let since = wedge["since"].as_str().unwrap();
    assert_eq!(
        err,
        format!(
            "gpu-handoff: error: 0000:01:00 is wedged and left alone: unbind from nvidia 0000:01:00.0 has not come back since {since} \
             (PID 5000001); {COMES_HOME}\n"
        )
    );
    let step = "unbind from nvidia 0000:01:00.0";
    assert_eq!(wedge, json!({"step": step, "pid": PID, "start": START, "since": since}));
    assert!(!host.has_own_file("journal"));
    let host = left().card("0000:02:00", "vfio-pci", "vfio-pci");
    let expected = success("0000:02:00 is already on vfio-pci: nothing to do");
    assert_eq!(host.run("to-vfio 02:00"), expected);
    assert!(host.has_own_file("wedged-0000:01:00"));
}

#[test]
fn a_journal_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{}", "schema: expected 1"),
        (r#"{"schema":1,"owner":"x","slots":[],"step":"","pid":1,"start":1}"#, "owner: unknown"),
    ] {
        let host = settled().file("run/gpu-handoff/journal", text);
        let path = host.path("run/gpu-handoff/journal");
        let warning = format!("gpu-handoff: warning: {}: {problem}; going on without it\n", path.display());
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out.as_str()), (Some(0), ""));
        assert_eq!(err, format!("{warning}{}", ready().err));
        assert!(!path.exists());
    }
}
