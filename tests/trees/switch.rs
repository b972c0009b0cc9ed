//! One VM after another.

use super::starts::with_program;
use super::*;

pub const VM: &str = "hookscript: local:snippets/gpu-handoff\nhostpci0: 0000:01:00";

/// VM 111 runs with the card, and VM 112 takes it as well.
pub fn two(policy: &str) -> Host {
    let host = settled().vm(112, VM).record("vm-111", "0000:01:00", "away", "vfio-pci").running(111, PID);
    let host = with_program(host, "usr/bin/systemd-run", "systemd-run-qm");
    with_program(host, "usr/sbin/qm", "qm").config(&format!(r#"{{"time":{{"stop_s":2}},"policy":{policy}}}"#))
}

pub fn calls(host: &Host) -> Vec<String> {
    fs::read_to_string(host.path("calls")).unwrap_or_default().lines().map(String::from).collect()
}

/// Refused, nobody was asked to shut down, and VM 111 has the card.
#[track_caller]
fn keeps(host: &Host, call: &str, why: &str) {
    refuses(host, call, 3, &format!("0000:01:00 was not touched: VM 111 has it{why}start VM 112 again: qm start 112"));
    assert_eq!(calls(host), NOTHING, "{call}");
}

#[test]
fn a_vm_that_has_the_card_is_shut_down_if_the_policy_says_so() {
    for (policy, hard) in [
        (r#"{"vm":"shutdown"}"#, ""),
        (r#"{"vms":{"111":"shutdown"}}"#, ""),
        (r#"{"vm":"refuse","vms":{"111":"stop"}}"#, " --forceStop 1"),
    ] {
        let host = two(policy);
        let how = if hard.is_empty() { "" } else { ", and stop it if that takes too long" };
        let step = format!("  stop      shut down VM 111{how}; 0000:01:00 stays on vfio-pci");
        plans(&host, "plan 112", &["0000:01:00 other VM -> VM 112", &step]);
        let run = host.run("112 pre-start");
        assert_eq!(run.code, Some(0), "{}", run.err);
        assert_eq!(
            told(&run),
            [
                "0000:01:00 VM 111 -> VM 112: VM 111 is shut down for it, for up to 2 s",
                "  stop N ms  VM 111",
                "0000:01:00 is already on vfio-pci: nothing to do"
            ]
        );
        assert_eq!(calls(&host), [format!("qm shutdown 111 --timeout 2{hard}")]);
        assert!(!host.has_own_file("vm-111"));
        assert_eq!(host.own_file("vm-112")["functions"][0]["driver"], json!("vfio-pci"));
    }
}

/// As after a QEMU that died, of which Proxmox hears a moment later.
#[test]
fn what_proxmox_has_yet_to_do_about_its_end_is_waited_for() {
    let host = two(r#"{"vm":"shutdown"}"#).file("run/qemu-server/111.cleanup", "");
    let note = host.path("run/qemu-server/111.cleanup");
    let cleaning = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        fs::remove_file(note).unwrap();
        std::time::Instant::now()
    });
    let run = host.run("112 pre-start");
    let end = std::time::Instant::now();
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(cleaning.join().unwrap() < end, "it did not wait");
    assert!(!host.has_own_file("vm-111"));
}

#[test]
fn a_vm_keeps_its_card_unless_the_policy_says_otherwise() {
    let keep = "; stop that VM (qm shutdown 111), or if it does not run: gpu-handoff to-nvidia 0000:01:00; then ";
    for policy in ["{}", r#"{"vms":{"112":"shutdown"}}"#, r#"{"vm":"shutdown","vms":{"111":"refuse"}}"#] {
        keeps(&two(policy), "112 pre-start", keep);
    }
    // Nobody is shut down for a backup.
    let backup = two(r#"{"vm":"shutdown"}"#).vm(112, &format!("lock: backup\n{VM}"));
    assert_eq!(backup.run("112 pre-start").code, Some(3));
    assert_eq!(calls(&backup), NOTHING);
}

#[test]
fn a_vm_that_cannot_be_shut_down() {
    let host = || two(r#"{"vm":"shutdown"}"#);
    for (host, why) in [
        (
            host().vm(111, &format!("lock: backup\n{VM}")),
            " and is locked (backup): wait until that is over, or if nothing is at it: qm unlock 111; then ",
        ),
        (
            host().file("etc/pve/ha/resources.cfg", "vm: 111\n\tstate started\n"),
            " and is managed by HA, which would start it again: ha-manager set vm:111 --state stopped; then ",
        ),
        (
            host().flock("var/lock/qemu-server/lock-111.conf"),
            " and Proxmox is at work on that VM: wait until that is over; then ",
        ),
        (
            host().file("run/gpu-handoff/next-111.vm", "113").flock("run/gpu-handoff/next-111"),
            " and VM 113 takes it over already: see gpu-handoff --status; then ",
        ),
    ] {
        keeps(&host, "112 pre-start", why);
        refuses(
            &host,
            "switch 112",
            3,
            &format!("0000:01:00 was not touched: VM 111 has it{why}start VM 112 again: qm start 112"),
        );
    }
}

/// It would be in vain.
#[test]
fn nobody_is_shut_down_for_a_start_that_is_refused_all_the_same() {
    let host = two(r#"{"vm":"shutdown"}"#).function("0000:07:00.0", "010802", "144d:a80a", "nvme", 1);
    let run = host.run("112 pre-start");
    assert_eq!(run.code, Some(3));
    assert!(run.err.contains("0000:07:00.0"), "{}", run.err);
    assert_eq!(calls(&host), NOTHING);
}

#[test]
fn a_vm_that_ignores_what_it_is_asked_for() {
    let host = two(r#"{"vm":"shutdown"}"#).file("ignores-acpi", "");
    let run = host.run("112 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
    let end = "error: 0000:01:00 was not touched: VM 111 has not shut down after 2 s; stop it: qm stop 111; then start VM 112 \
               again: qm start 112";
    assert_eq!(told(&run).last().unwrap(), end);
    assert!(host.has_own_file("vm-111") && !host.has_own_file("vm-112"));
}

#[test]
fn the_card_stays_where_it_is_between_two_vms() {
    let ended = || host().record("vm-111", "0000:01:00", "away", "nvidia").file("run/gpu-handoff/next-111.vm", "112");
    let taken = || ended().flock("run/gpu-handoff/next-111");
    // Whoever takes over holds the lock; in a tree there is one line of locks, and Proxmox's own is the other.
    let both = with_program(taken(), "usr/bin/systemd-run", "systemd-run");
    let locks = fs::read_to_string(both.path("proc/locks")).unwrap();
    let both = both.flock("var/lock/qemu-server/lock-111.conf");
    let more = fs::read_to_string(both.path("proc/locks")).unwrap();
    let both = both.file("proc/locks", &format!("{locks}{more}"));
    assert_eq!(both.run("111 post-stop"), success("0000:01:00 stays on vfio-pci: VM 112 takes it over"));
    assert!(both.has_own_file("vm-111"));
    // Nobody who would bring it home if need be; and nobody who takes over any more.
    for host in [taken(), ended()] {
        assert_eq!(host.run("111 post-stop").code, Some(0));
        assert!(!host.has_own_file("vm-111"));
    }
    // The keeper leaves it alone meanwhile.
    assert_eq!(taken().run("reconcile --owed").code, Some(0));
    assert!(taken().has_own_file("vm-111"));
}

#[test]
fn a_person_switches() {
    let host = two("{}");
    let step = "  stop      shut down VM 111; 0000:01:00 stays on vfio-pci";
    let lines = ["0000:01:00 other VM -> VM 112", step, "  start     /usr/sbin/qm start 112"];
    plans(&host, "switch 112 --dry-run", &lines);
    let run = host.run("switch 112");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(told(&run).last().unwrap(), "VM 112 is started");
    assert_eq!(calls(&host), ["qm shutdown 111 --timeout 2", "qm start 112"]);
    // Nobody has it: it is only started.
    let free = two("{}").without("run/gpu-handoff").without("run/qemu-server/111.pid");
    assert_eq!(free.run("switch 112").code, Some(0));
    assert_eq!(calls(&free), ["qm start 112"]);
    refuses(&two("{}"), "switch 111", 3, "VM 111 runs already; see gpu-handoff --status");
    let no_hook = two("{}").vm(112, "hostpci0: 0000:01:00");
    refuses(&no_hook, "switch 112", 3, "VM 112 has no hookscript yet: gpu-handoff enable 112");
    let none = two("{}").vm(113, "cores: 2");
    refuses(&none, "switch 113", 3, "guest 113 takes no NVIDIA GPU; see gpu-handoff plan 113");
}
