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
