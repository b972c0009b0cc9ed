//! A VM that was shut down for another is started again after that (`policy.vm_resume`).

use super::starts::with_program;
use super::switch::{VM, calls};
use super::*;
use std::os::unix::fs::PermissionsExt;

const POLICY: &str = r#"{"vm":"shutdown","vm_resume":true}"#;

/// VM 111 runs with the card, and VM 112 takes it as well.
fn two() -> Host {
    super::switch::two(POLICY).file("etc/pve/lxc/101.conf", "arch: amd64\n")
}

/// A record of the VM that owes these a start.
fn owing(host: Host, vmid: u32, stopped: &Value) -> Host {
    let name = format!("vm-{vmid}");
    let host = host.record(&name, "0000:01:00", "away", "vfio-pci");
    let mut record = host.own_file(&name);
    record["stopped"] = stopped.clone();
    host.file(&format!("run/gpu-handoff/{name}"), &record.to_string())
}

/// VM 112 has ended, and VM 111 is to be started; that does what qm is asked for.
fn waiting() -> Host {
    let entry = json!({"what": {"vm": 111}, "slots": ["0000:01:00"]});
    let host = settled().vm(112, VM).running(111, PID);
    let pid = fs::read_to_string(host.path("run/qemu-server/111.pid")).unwrap();
    let host = host.without("run/qemu-server/111.pid").file("starts-111", &pid);
    let host = with_program(with_program(host, "usr/bin/systemd-run", "systemd-run-qm"), "usr/sbin/qm", "qm");
    host.file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": [entry]}).to_string())
}

fn stopped(host: &Host, vmid: u32) -> Value {
    host.own_file(&format!("vm-{vmid}"))["stopped"].clone()
}

/// What is to be started, the first first.
fn to_start(host: &Host) -> Vec<Value> {
    let entries = host.own_file("to-start")["entries"].clone();
    entries.as_array().unwrap().iter().map(|entry| entry["what"].clone()).collect()
}

/// A systemctl that says so of this unit, and nothing else.
fn with_active(host: Host, unit: &str) -> Host {
    let host = host.file("usr/bin/systemctl", &format!("#!/bin/sh\ncase $* in *{unit}) echo active ;; esac\n"));
    fs::set_permissions(host.path("usr/bin/systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
    host
}

/// It is not started, and why is told.
#[track_caller]
fn is_not_started(host: &Host, why: &str) {
    let run = host.run("resume");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(run.err.contains(why), "{}", run.err);
    assert_eq!(calls(host), NOTHING, "{why}");
}

#[test]
fn it_is_started_when_the_other_has_ended() {
    let host = two();
    let step = "  stop      shut down VM 111, and start it again afterwards; 0000:01:00 stays on vfio-pci";
    plans(&host, "plan 112", &["0000:01:00 other VM -> VM 112", step]);
    let run = host.run("112 pre-start");
    assert_eq!(run.code, Some(0), "{}", run.err);
    let first = "0000:01:00 VM 111 -> VM 112: VM 111 is shut down for it, for up to 2 s, and started again afterwards";
    assert_eq!(told(&run)[0], first);
    assert_eq!(stopped(&host, 112), json!([{"vm": 111}]));
    assert!(!host.has_own_file("vm-111") && !host.has_own_file("to-start"));
    let host = host.running(112, PID + 1);
    assert_eq!(status(&host)["gpus"][0]["owed"], json!([{"what": "start", "vm": 111}]));
    // Who is not told of its end, and the keeper, see to nothing meanwhile.
    host.run("reconcile --owed");
    assert_eq!(stopped(&host, 112), json!([{"vm": 111}]));
    let host = host.without("run/qemu-server/112.pid");
    let run = host.run("112 post-stop");
    assert!(run.err.contains("then start again: VM 111"), "{}", run.err);
    assert!(!host.has_own_file("vm-112"));
    assert_eq!(to_start(&host), [json!({"vm": 111})]);
    assert_eq!(status(&host)["gpus"][0]["owed"], json!([{"what": "start", "vm": 111}]));
}

#[test]
fn it_runs_again_and_nothing_is_owed() {
    let host = waiting();
    let run = host.run("resume");
    assert_eq!((run.code, told(&run)), (Some(0), vec!["VM 111 runs again".to_string()]));
    assert_eq!(calls(&host), ["qm start 111"]);
    assert!(!host.has_own_file("to-start"));
}

#[test]
fn not_unless_it_is_configured() {
    for call in ["112 pre-start", "switch 112"] {
        let host = super::switch::two(r#"{"vm":"shutdown"}"#);
        assert_eq!(host.run(call).code, Some(0));
        assert!(!fs::read_to_string(host.path("run/gpu-handoff/vm-112")).unwrap_or_default().contains("stopped"));
    }
    // A person's switch is no other thing than the policy; its hook takes over what is owed.
    let host = super::switch::two(r#"{"vm_resume":true}"#);
    assert_eq!(host.run("switch 112").code, Some(0));
    assert_eq!(stopped(&host, 111), json!([{"vm": 111}]));
    host.run("112 pre-start");
    assert_eq!(stopped(&host, 112), json!([{"vm": 111}]));
}

/// Last stopped, first started: who was stopped for VM 111 comes after it, and its start leaves him as he is.
#[test]
fn it_comes_before_who_was_stopped_for_it() {
    let owed = json!([{"container": 101}, {"vm": 111}, {"container": 102}]);
    let host = owing(waiting().without("run/gpu-handoff/to-start"), 112, &owed);
    host.run("112 post-stop");
    assert_eq!(to_start(&host), [json!({"container": 102}), json!({"vm": 111}), json!({"container": 101})]);
    // As if 102 ran already.
    let entry = |what: Value| json!({"what": what, "slots": ["0000:01:00"]});
    let entries = json!([entry(json!({"vm": 111})), entry(json!({"container": 101}))]);
    let host = host.file("run/gpu-handoff/to-start", &json!({"schema": 1, "entries": entries}).to_string());
    assert_eq!(host.run("111 pre-start").code, Some(0));
    assert_eq!(stopped(&host, 111), json!([{"container": 101}]));
    // Its start may fail yet.
    assert_eq!(to_start(&host), [json!({"vm": 111})]);
}

#[test]
fn what_is_owed_passes_on() {
    let chain = owing(two().without("run/gpu-handoff/vm-111"), 112, &json!([{"container": 101}, {"vm": 111}]));
    let chain = chain.without("run/qemu-server/111.pid").running(112, PID).vm(113, VM);
    assert_eq!(chain.run("113 pre-start").code, Some(0));
    assert_eq!(stopped(&chain, 113), json!([{"container": 101}, {"vm": 111}, {"vm": 112}]));
    // Whoever starts it himself is owed nothing.
    let back = owing(two().without("run/gpu-handoff/vm-111"), 112, &json!([{"vm": 111}]));
    let back = back.without("run/qemu-server/111.pid").running(112, PID);
    assert_eq!(back.run("111 pre-start").code, Some(0));
    assert_eq!(stopped(&back, 111), json!([{"vm": 112}]));
    // A reboot is no end.
    let reboot = with_program(owing(host(), 112, &json!([{"vm": 111}])), "usr/bin/systemd-run", "systemd-run");
    let reboot = reboot.file("run/qemu-server/112.reboot", "").flock("var/lock/qemu-server/lock-112.conf");
    assert_eq!(reboot.run("112 post-stop").code, Some(0));
    assert_eq!(stopped(&reboot, 112), json!([{"vm": 111}]));
}

/// VM 112 takes one of its two cards; the other comes home without it.
#[test]
fn it_is_owed_once() {
    let host = two().card("0000:02:00", "vfio-pci", "vfio-pci").record("vm-113", "0000:02:00", "away", "vfio-pci");
    let mut record = host.own_file("vm-111");
    let more = host.own_file("vm-113")["functions"].as_array().unwrap().clone();
    record["functions"].as_array_mut().unwrap().extend(more);
    let host = host.without("run/gpu-handoff/vm-113").file("run/gpu-handoff/vm-111", &record.to_string());
    assert_eq!(host.run("112 pre-start").code, Some(0));
    assert_eq!((stopped(&host, 112), stopped(&host, 111)), (json!([{"vm": 111}]), json!(null)));
    assert_eq!(host.run("reconcile --owed").code, Some(0));
    assert!(!host.has_own_file("vm-111") && !host.has_own_file("to-start"));
}

#[test]
fn one_that_does_not_shut_down_is_owed_nothing() {
    let host = two().file("ignores-acpi", "");
    assert_eq!(host.run("112 pre-start").code, Some(3));
    assert_eq!(stopped(&host, 111), json!(null));
}

/// Who wanted the card was killed in between.
#[test]
fn it_is_owed_from_before_it_is_shut_down() {
    let owed = json!([{"vm": 111}]);
    // It has shut down: then it comes back.
    let ended = || owing(two().without("run/qemu-server/111.pid"), 111, &owed);
    let host = ended();
    assert_eq!(host.run("111 post-stop").code, Some(0));
    assert_eq!(to_start(&host), [json!({"vm": 111})]);
    let host = ended();
    assert_eq!(host.run("reconcile --owed").code, Some(0));
    assert_eq!(to_start(&host), [json!({"vm": 111})]);
    // Or another start is first.
    let host = ended();
    assert_eq!(host.run("112 pre-start").code, Some(0));
    assert_eq!(stopped(&host, 112), owed);
    // Or its own.
    let host = ended();
    assert_eq!(host.run("111 pre-start").code, Some(0));
    assert_eq!(stopped(&host, 111), json!(null));
}

#[test]
fn one_that_goes_on_after_all_is_owed_nothing() {
    let owed = json!([{"container": 101}, {"vm": 111}]);
    let running = || owing(two(), 111, &owed);
    let at_it = running().file("run/gpu-handoff/next-111.vm", "112").flock("run/gpu-handoff/next-111");
    at_it.run("reconcile --owed");
    assert_eq!(stopped(&at_it, 111), owed);
    // qm is still at it.
    let shutting = with_active(running(), "gpu-handoff-shutdown-111.service");
    shutting.run("reconcile --owed");
    assert_eq!(stopped(&shutting, 111), owed);
    let host = running();
    host.run("reconcile --owed");
    assert_eq!(stopped(&host, 111), json!([{"container": 101}]));
}

#[test]
fn it_waits_for_what_must_be_over_first() {
    let vm = "hostpci0: 0000:01:00";
    for (host, why) in [
        (
            waiting().vm(111, &format!("lock: backup\n{vm}")),
            "it is locked (backup), if nothing is at it: qm unlock 111",
        ),
        (
            waiting().running(111, PID).vm(111, &format!("lock: backup\n{vm}")),
            "it is locked (backup), if nothing is at it: qm unlock 111",
        ),
        (waiting().flock("var/lock/qemu-server/lock-111.conf"), "Proxmox is at work on it"),
        (
            waiting().vm(112, &format!("lock: backup\n{VM}")),
            "VM 112 is being backed up, and may come back for the card",
        ),
    ] {
        is_not_started(&host, &format!("VM 111 was stopped for a handoff and waits: {why}"));
        let entry = host.own_file("to-start")["entries"][0].clone();
        assert_eq!((&entry["what"], &entry["tries"]), (&json!({"vm": 111}), &json!(1)));
    }
    // A backup of one that runs, or has no card, is in nobody's way.
    let host =
        waiting().vm(112, "lock: backup\ncores: 2").vm(113, &format!("lock: backup\n{VM}")).running(113, PID + 1);
    assert_eq!(told(&host.run("resume")), ["VM 111 runs again"]);
}

#[test]
fn one_that_does_not_start_is_tried_again() {
    let host = waiting().without("starts-111");
    let run = host.run("resume");
    let why = "VM 111 was stopped for a handoff and does not run again, as its task log says; start it: qm start 111";
    assert!(run.err.contains(why), "{}", run.err);
    assert_eq!(calls(&host), ["qm start 111"]);
    assert_eq!(host.own_file("to-start")["entries"][0]["tries"], json!(1));
}

#[test]
fn one_that_nobody_may_start_is_forgotten() {
    let ha = "vm: 111\n\tstate started\n";
    for (host, why) in [
        (waiting().without("etc/pve/qemu-server/111.conf"), "this node does not have it any more"),
        (waiting().file("etc/pve/ha/resources.cfg", ha), "HA manages it now, and starts it"),
        (waiting().vm(111, "template: 1\nhostpci0: 0000:01:00"), "it is a template now"),
    ] {
        is_not_started(&host, &format!("VM 111 is not started again: {why}"));
        assert!(!host.has_own_file("to-start"));
    }
    // Of nobody anything is known.
    let down = waiting().without("etc/pve").without("starts-111");
    down.run("resume");
    assert_eq!(to_start(&down), [json!({"vm": 111})]);
}

#[test]
fn nothing_is_started_while_the_host_goes_down() {
    let host = with_program(waiting(), "usr/bin/systemctl", "systemctl-stopping");
    assert_eq!(host.run("resume"), Run { code: Some(0), out: String::new(), err: String::new() });
    assert_eq!((calls(&host).len(), to_start(&host)), (0, vec![json!({"vm": 111})]));
}

#[test]
fn one_that_somebody_started_runs_already() {
    let host = waiting().running(111, PID);
    assert_eq!(told(&host.run("resume")), ["VM 111 runs again"]);
    assert_eq!(calls(&host), NOTHING);
    assert!(!host.has_own_file("to-start"));
}

/// Somebody has started VM 112 meanwhile: it keeps its card, whatever the policy says of a person's start.
#[test]
fn nobody_makes_way_for_one_that_is_started_again() {
    let host = owing(two(), 112, &json!([])).without("run/gpu-handoff/vm-111").without("run/qemu-server/111.pid");
    let host = host.running(112, PID);
    let unit = "sys/fs/cgroup/system.slice/gpu-handoff-start-111.service/cgroup.events";
    let again = with_active(host.file(unit, "populated 1\nfrozen 0\n"), "gpu-handoff-start-111.service");
    let run = again.run("111 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(run.err.contains("0000:01:00 was not touched: VM 112 has it"), "{}", run.err);
    assert_eq!(calls(&again), NOTHING);
    let by_a_person = again.file(unit, "populated 0\nfrozen 0\n");
    assert_eq!(by_a_person.run("111 pre-start").code, Some(0));
    assert_eq!(calls(&by_a_person), ["qm shutdown 112 --timeout 2"]);
}
