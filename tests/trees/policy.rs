use super::*;
use std::os::unix::fs::PermissionsExt;

// Who must go, and who is stopped for that

const ALL: &str = r#"{"policy":{"process":"kill","unit":"stop","container":"stop","containers":{"102":"refuse"}}}"#;
const IN_UNIT: &str = "/system.slice/ollama.service";

#[test]
fn the_plan_says_who_is_stopped() {
    let host = with_drm_node(host())
        .config(ALL)
        .process(PID, "ffmpeg", "/lxc/101/ns", &[NULL])
        .process(PID + 1, "ollama", IN_UNIT, &[NULL])
        .process(PID + 2, "game", "/user.slice/user-0.slice/session-3.scope", &[NULL])
        .file("sys/fs/cgroup/system.slice/nvidia-persistenced.service/cgroup.events", "populated 1\nfrozen 0\n");
    let run = host.run("plan 111");
    let stopped = "  stop      stop container 101, kill PID 5000003 (game), stop ollama.service, stop \
                   nvidia-persistenced.service";
    assert_eq!(run.out.lines().nth(1), Some(stopped), "{}", run.err);
    assert_eq!(run.code, Some(0));
}

#[test]
fn one_that_keeps_the_gpu_keeps_everybody_running() {
    let host = with_drm_node(host()).config(ALL).process(PID, "ollama", IN_UNIT, &[NULL]).process(
        PID + 1,
        "ffmpeg",
        "/lxc/102/ns",
        &[NULL],
    );
    let message = format!(
        "0000:01:00 was not touched, it is in use: PID 5000002 (ffmpeg, container 102) has /dev/dri/card0 open; {}type: pct \
         shutdown 102; qm start 111",
        would("policy.containers.102 \"stop\"")
    );
    refuses(&host, "111 pre-start", 3, &message);
}

#[test]
fn a_container_that_could_open_it_is_frozen_meanwhile() {
    let container = |host: Host, id: u32| {
        host.file(&format!("sys/fs/cgroup/lxc/{id}/cgroup.events"), "populated 1\nfrozen 0\n")
            .file(&format!("sys/fs/cgroup/lxc/{id}/cgroup.freeze"), "0\n")
            .file(&format!("etc/pve/lxc/{id}.conf"), "dev0: /dev/nvidia0\n")
    };
    let host = container(container(host(), 103), 104).config(r#"{"policy":{"containers":{"104":"leave"}}}"#);
    let plan = host.run("plan 111").out;
    let lines: Vec<&str> = plan.lines().filter(|line| line.contains("container")).collect();
    let line = "  release   freeze container 103, unload nvidia, thaw container 103, unbind from snd_hda_intel .1";
    assert_eq!(lines, [line], "{plan}");
    let frozen = host.file("sys/fs/cgroup/lxc/103/cgroup.freeze", "1\n");
    assert!(!frozen.run("plan 111").out.contains("container"), "whoever froze it will thaw it");
}

/// A systemctl and a systemd-run that note what they are asked for; stopping the unit ends its process.
fn with_systemd(host: Host) -> Host {
    let systemctl = "#!/bin/sh\nroot=${0%/usr/bin/*}\necho \"systemctl $*\" >>$root/calls\ncase $1 in\n\
                     stop) rm -r $root/proc/5000001 ;;\n\
                     show) case $2 in *ActiveState) if [ -d $root/proc/5000001 ]; then echo active; else echo inactive; fi ;; esac ;;\nesac\n";
    let run = "#!/bin/sh\necho \"systemd-run $*\" >>${0%/usr/bin/*}/calls\n";
    let host = host.file("usr/bin/systemctl", systemctl).file("usr/bin/systemd-run", run);
    for name in ["systemctl", "systemd-run"] {
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(host.path(&format!("usr/bin/{name}")), mode).unwrap();
    }
    host
}

#[test]
fn what_was_stopped_starts_again_when_the_handoff_fails() {
    // A tree of files unloads no module, so the handoff goes back.
    let host = with_systemd(with_drm_node(host())).config(ALL).process(PID, "ollama", IN_UNIT, &[NULL]);
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(run.err.contains(" ms  stop ollama.service\n"), "{}", run.err);
    assert!(run.err.contains("then start again: ollama.service"), "{}", run.err);
    let calls = fs::read_to_string(host.path("calls")).unwrap();
    assert!(calls.contains("systemctl stop --no-block -- ollama.service\n"), "{calls}");
    let later = calls.lines().last().unwrap();
    assert!(later.starts_with("systemd-run --quiet --collect --no-block --unit=gpu-handoff-resume "), "{calls}");
    assert!(later.ends_with("gpu-handoff resume"), "{calls}");
    assert!(!host.has_own_file("vm-111"));
    let entries = json!([{"what": {"unit": "ollama.service"}, "slots": ["0000:01:00"]}]);
    assert_eq!(host.own_file("to-start")["entries"], entries);
}

#[test]
fn one_that_does_not_stop_is_named_and_nothing_moves() {
    let host = with_drm_node(host()).config(r#"{"policy":{"unit":"stop"},"time":{"stop_s":0.3}}"#).process(
        PID,
        "ollama",
        IN_UNIT,
        &[NULL],
    );
    let without = host.run("111 pre-start");
    assert_eq!(without.code, Some(1));
    let end = "error: 0000:01:00 is back where it was: ollama.service does not stop: /usr/bin/systemctl is not \
               installed; then start VM 111 again: qm start 111";
    assert_eq!(told(&without).last().unwrap(), end);
    let deaf = with_systemd(host).file("proc/5000001/comm", "ollama\n");
    let systemctl = fs::read_to_string(deaf.path("usr/bin/systemctl")).unwrap().replace("stop) rm -r", "stop) test -d");
    let deaf = deaf.file("usr/bin/systemctl", &systemctl);
    let run = deaf.run("111 pre-start");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("ollama.service does not stop (after 0 s)"), "{}", run.err);
}

/// A program of the administrator's that notes how it is called, and then does this in the tree.
fn with_program(host: Host, path: &str, does: &str) -> Host {
    let text = format!("#!/bin/sh\nroot=${{0%/{path}}}\necho \"{path} $*\" >>$root/calls\n{does}\n");
    let host = host.file(path, &text);
    fs::set_permissions(host.path(path), fs::Permissions::from_mode(0o755)).unwrap();
    host
}

const ASKED: &str =
    r#"{"policy":{"units":{"ollama.service":{"release":["/opt/unload","-m","a b"]}}},"time":{"stop_s":3}}"#;
const LETS_GO: &str = "rm -r $root/proc/5000001";

fn using_ollama() -> Host {
    with_systemd(with_drm_node(host())).process(PID, "ollama", IN_UNIT, &[NULL])
}

fn calls(host: &Host) -> String {
    fs::read_to_string(host.path("calls")).unwrap_or_default()
}

#[test]
fn one_that_lets_go_when_it_is_asked_runs_on() {
    let host = with_program(using_ollama().config(ASKED), "opt/unload", LETS_GO);
    let plan = host.run("plan 111");
    let line = "  ask       ollama.service by /opt/unload -m a b, else refuse";
    assert_eq!(plan.out.lines().nth(1), Some(line), "{}{}", plan.out, plan.err);
    let plan: serde_json::Value = serde_json::from_str(&host.run("plan 111 --json").out).unwrap();
    let first = &plan["steps"][0];
    assert_eq!(first["phase"], "ask", "{plan}");
    assert_eq!(calls(&host), "", "a plan asks nobody");
    // A tree of files unloads no module, so the handoff goes back.
    let run = host.run("111 pre-start");
    let lines = told(&run);
    assert!(lines[0].ends_with("0000:01:00 host -> VM 111"), "{}", run.err);
    assert!(lines[1].contains("ask") && lines[1].ends_with(" ms  ollama.service"), "{}", run.err);
    assert!(lines[2].contains("check") && lines[2].ends_with("not in use"), "{}", run.err);
    assert_eq!(lines.iter().filter(|line| line.contains("host -> VM 111")).count(), 1, "{}", run.err);
    let calls = calls(&host);
    assert!(calls.starts_with("opt/unload -m a b\n") && calls.matches("unload").count() == 1, "{calls}");
    assert!(!calls.contains("systemctl stop"), "{calls}");
}

#[test]
fn one_that_does_not_let_go_is_refused_or_stopped() {
    let end = "error: 0000:01:00 was not touched, it is in use: PID 5000001 (ollama, ollama.service) has /dev/dri/card0 open; ";
    let key = would("policy.units.ollama.service.else \"stop\"");
    for (does, why) in [
        ("echo no such model >&2; exit 7", "no such model"),
        ("sleep 60", "did not end within 1 s"),
        ("true", "it still has the GPU open"),
    ] {
        let host = with_program(using_ollama().config(ASKED), "opt/unload", does);
        let run = host.run("111 pre-start");
        assert_eq!(run.code, Some(3), "{}", run.err);
        let lines = told(&run);
        assert!(lines[1].ends_with(" ms  ollama.service, FAILED"), "{}", run.err);
        let warning = &lines[2];
        assert!(warning.starts_with("warning: ollama.service does not let go: /opt/unload: "), "{}", run.err);
        assert!(warning.contains(why), "{}", run.err);
        assert_eq!(*lines.last().unwrap(), format!("{end}{key}type: systemctl stop ollama.service; qm start 111"));
        assert!(!host.has_own_file("vm-111"));
    }
    let without = using_ollama().config(ASKED).run("111 pre-start");
    assert!(without.err.contains("/opt/unload: /opt/unload is not installed"), "{}", without.err);
    let stopping = ASKED.replace(r#""a b"]"#, r#""a b"],"else":"stop""#);
    let run = with_program(using_ollama().config(&stopping), "opt/unload", "true").run("111 pre-start");
    assert!(
        run.err.contains("ollama.service, FAILED") && run.err.contains(" ms  stop ollama.service\n"),
        "{}",
        run.err
    );
}

#[test]
fn nobody_is_asked_where_another_keeps_the_gpu() {
    let host = with_program(using_ollama().config(ASKED), "opt/unload", LETS_GO);
    let host = host.process(PID + 1, "ffmpeg", "/lxc/102/ns", &[NULL]);
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(run.err.contains("PID 5000002 (ffmpeg, container 102)") && !run.err.contains("5000001"), "{}", run.err);
    assert_eq!(calls(&host), "");
}

#[test]
fn a_container_is_asked_from_inside() {
    let config =
        r#"{"policy":{"containers":{"101":{"release":["/usr/bin/unload","x"],"else":"stop"}}},"time":{"stop_s":9}}"#;
    let host = with_drm_node(host()).config(config).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let host = with_program(with_systemd(host), "usr/sbin/pct", LETS_GO);
    let plan = host.run("plan 111");
    assert!(plan.out.contains("  ask       container 101 by /usr/bin/unload x, else stop\n"), "{}", plan.out);
    let run = host.run("111 pre-start");
    assert!(run.err.contains(" ms  container 101\n"), "{}", run.err);
    assert!(calls(&host).starts_with("usr/sbin/pct exec 101 -- /usr/bin/unload x\n"), "{}", calls(&host));
}
