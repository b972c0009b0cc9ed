//! Pinning: what a start does of it, what is asked beforehand, what is put back. No thread of a tree can be pinned: that it would
//! be is seen in what the program says it goes on without.

use super::*;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

const CONF: &str = "hostpci0: 0000:01:00,pcie=1\ncores: 2";
const PIN: &str = r#"{"vcpus":"2-3","emulator":"0-1","irq":"0-1","governor":"performance"}"#;
const IRQ: &str = "proc/irq/45/smp_affinity_list";
const POLICY: &str = "sys/devices/system/cpu/cpufreq/policy2/scaling_governor";

/// A host with CPUs 0 to 7, of which 2 and 3 have one governor.
fn with_cpus(mut host: Host) -> Host {
    host = host.file("sys/devices/system/cpu/online", "0-7\n").file(POLICY, "powersave\n");
    let policy = "sys/devices/system/cpu/cpufreq/policy2";
    host = host.file(&format!("{policy}/scaling_available_governors"), "performance powersave \n");
    for cpu in [2, 3] {
        host = host.link(&format!("sys/devices/system/cpu/cpu{cpu}/cpufreq"), policy);
    }
    host
}

fn thread(host: Host, id: u32, name: &str, cpus: &str) -> Host {
    let folder = format!("proc/{PID}/task/{id}");
    host.file(&format!("{folder}/comm"), &format!("{name}\n"))
        .file(&format!("{folder}/status"), &format!("Name:\t{name}\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n"))
}

/// Its QEMU runs, with the card and one interrupt of it.
fn with_qemu(host: Host, vmid: u32) -> Host {
    let arguments = format!(
        "/usr/bin/kvm\0-id\0{vmid}\0-pidfile\0/var/run/qemu-server/{vmid}.pid\0-device\0vfio-pci,host=0000:01:00.0,id=hostpci0.0\0"
    );
    let host = host
        .running(vmid, PID)
        .alive(PID)
        .process(PID, "kvm", &format!("/qemu.slice/{vmid}.scope"), &[])
        .file(&format!("proc/{PID}/cmdline"), &arguments)
        .file("sys/fs/cgroup/qemu.slice/cpuset.cpus.effective", "0-7\n");
    let host = [(PID, "kvm"), (PID + 1, "CPU 0/KVM"), (PID + 2, "CPU 1/KVM"), (PID + 3, "IO iothread-vir")]
        .into_iter()
        .fold(host, |host, (id, name)| thread(host, id, name, "0-7"));
    let lines = "            CPU0       CPU1
  44:          0          0  IR-PCI-MSIX-0000:02:00.0    0-edge      vfio-msix[0](0000:02:00.0)
  45:          0          7  IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)
  46:          0          0  IR-PCI-MSIX-0000:01:00.0    1-edge      nvidia\n";
    let all = "0-7\n";
    let host = host.file("proc/irq/44/smp_affinity_list", all).file("proc/irq/46/smp_affinity_list", all);
    host.file("proc/interrupts", lines).file(IRQ, all)
}

fn pinned(pin: &str) -> Host {
    let host = with_cpus(settled().vm(111, CONF).record("vm-111", "0000:01:00", "away", "vfio-pci"));
    with_pin(with_qemu(host, 111), pin)
}

fn with_pin(host: Host, pin: &str) -> Host {
    host.config(&format!(r#"{{"vms":{{"111":{{"pin":{pin}}}}}}}"#))
}

fn read(host: &Host, path: &str) -> String {
    fs::read_to_string(host.path(path)).unwrap().trim().to_string()
}

/// The interrupt's CPUs and the governor.
fn outside(host: &Host) -> (String, String) {
    (read(host, IRQ), read(host, POLICY))
}

fn is(irq: &str, governor: &str) -> (String, String) {
    (irq.to_string(), governor.to_string())
}

const NOT_IN_A_TREE: &str = "gpu-handoff: warning: VM 111 goes on without this: vCPUs 0-1 on 2-3, emulator on 0-1, \
                             iothreads on 0-1: not done under GPU_HANDOFF_ROOT\n";

#[test]
fn a_start_pins_what_is_there_and_keeps_what_was() {
    let host = pinned(PIN);
    let run = host.run("111 post-start");
    let expected = format!("gpu-handoff: VM 111 is pinned: interrupt 45 on 0-1, governor performance\n{NOT_IN_A_TREE}");
    assert_eq!((run.code, run.err), (Some(0), expected));
    assert_eq!(outside(&host), is("0-1", "performance"));
    let kept = json!({"schema": 1, "changes": [
        [format!("/{IRQ}"), "0-7", "0-1", "vfio-msix[0](0000:01:00.0)"],
        [format!("/{POLICY}"), "powersave", "performance", ""],
    ]});
    assert_eq!(host.own_file("pin-111"), kept);
    for other in [44, 46] {
        assert_eq!(read(&host, &format!("proc/irq/{other}/smp_affinity_list")), "0-7");
    }
    // Once more, and somewhere else: what was before the first time is what was.
    assert_eq!(host.run("111 post-start").err, NOT_IN_A_TREE);
    assert_eq!(host.own_file("pin-111"), kept);
    let host = with_pin(host, r#"{"vcpus":"2-3","irq":"4","governor":"performance"}"#);
    assert_eq!(host.run("111 post-start").code, Some(0));
    assert_eq!(host.own_file("pin-111")["changes"][0][1], json!("0-7"));
    assert_eq!(outside(&host), is("4", "performance"));
}

#[test]
fn threads_that_are_where_they_shall_be_are_let_be() {
    let mut host = pinned(r#"{"vcpus":"2-3","emulator":"0-1","iothreads":"5"}"#);
    for (id, name, cpus) in [
        (PID, "kvm", "0-1"),
        (PID + 1, "CPU 0/KVM", "2"),
        (PID + 2, "CPU 1/KVM", "3"),
        (PID + 3, "IO iothread-vir", "5"),
    ] {
        host = thread(host, id, name, cpus);
    }
    ignores_but_for_locks(&host, "111 post-start");
    let host = thread(host, PID + 4, "CPU 2/KVM", "0-7");
    // It has more vCPUs than its configuration, and there is no CPU for that one.
    ignores_but_for_locks(&host, "111 post-start");
    let host = thread(host, PID + 2, "CPU 1/KVM", "2");
    assert!(host.run("111 post-start").err.contains("goes on without this: vCPU 1 on 3: "));
}

#[track_caller]
fn ignores_but_for_locks(host: &Host, call: &str) {
    let before = host.snapshot();
    assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
    let changes = host.snapshot().changes_since(&before);
    assert!(changes.iter().all(|line| line.starts_with("run/gpu-handoff/pinning: ")), "{changes:?}");
}

#[test]
fn who_has_no_gpu_or_no_pin_pays_nothing() {
    let with_none = pinned(PIN).without("run/gpu-handoff/vm-111");
    ignores(&with_none, "111 post-start");
    let another = pinned(PIN).config(&format!(r#"{{"vms":{{"112":{{"pin":{PIN}}}}}}}"#));
    ignores(&another, "111 post-start");
    ignores(&another.config("{}"), "111 post-start");
}

/// The start goes on without that list, and with the others.
#[test]
fn what_cannot_be_is_left_out_by_a_start_and_refused_to_who_asks() {
    let check = "online; online are 0-7";
    let nowhere = "in /etc/gpu-handoff/config.json: CPU 9 is not there or not ";
    for (pin, conf, cpuset, message, is_of_file) in [
        (r#"{"irq":"9"}"#, CONF, "0-7", format!("irq {nowhere}{check}"), true),
        (r#"{"emulator":"0,9","irq":"0-1"}"#, CONF, "0-7", format!("emulator {nowhere}{check}"), true),
        (
            r#"{"vcpus":"2-3","irq":"0-1","governor":"schedutil"}"#,
            CONF,
            "0-7",
            "governor in /etc/gpu-handoff/config.json: these CPUs do not have schedutil, but performance powersave"
                .to_string(),
            true,
        ),
        (
            r#"{"vcpus":"2-4","irq":"0-1"}"#,
            "hostpci0: 0000:01:00,pcie=1\ncores: 2\nsockets: 2",
            "0-7",
            "vcpus in /etc/gpu-handoff/config.json: 2-4 is too few for the 4 vCPUs that the VM may have (sockets x cores)"
                .to_string(),
            false,
        ),
        (
            r#"{"iothreads":"4,6","irq":"0-1"}"#,
            "hostpci0: 0000:01:00,pcie=1\naffinity: 0-5,7",
            "0-7",
            "iothreads in /etc/gpu-handoff/config.json: CPU 6 is not in affinity of the VM's configuration, 0-5,7".to_string(),
            false,
        ),
    ] {
        let host = pinned(pin).vm(111, conf).file("sys/fs/cgroup/qemu.slice/cpuset.cpus.effective", cpuset);
        let line = format!("vms.111.pin.{message}");
        let asked = host.run("plan 111");
        let expected = format!("gpu-handoff: error: {line}; VM 111 would start without it\n");
        assert_eq!((asked.code, asked.err, asked.out), (Some(2), expected, String::new()));
        assert_eq!(host.run("plan 111 --json").code, Some(2));
        let checked = host.run("config check");
        assert_eq!(checked.code, Some(if is_of_file { 2 } else { 0 }), "{pin}: {}", checked.err);
        assert_eq!(checked.err.contains(&line), is_of_file, "{pin}: {}", checked.err);
        let run = host.run("111 post-start");
        assert_eq!(run.code, Some(0));
        assert!(run.err.contains(&format!("warning: {line}; VM 111 goes on without it\n")), "{}", run.err);
        assert_eq!(read(&host, IRQ), if pin.contains(r#""irq":"0-1""#) { "0-1" } else { "0-7" }, "{pin}");
    }
    // Known only while it runs.
    let host = pinned(r#"{"emulator":"0-1"}"#).file("sys/fs/cgroup/qemu.slice/cpuset.cpus.effective", "1-7\n");
    let run = host.run("111 post-start");
    let line = "vms.111.pin.emulator in /etc/gpu-handoff/config.json: CPU 0 is not in the cpuset of QEMU's cgroup, 1-7; VM 111 \
                goes on without it\n";
    assert_eq!((run.code, run.err), (Some(0), format!("gpu-handoff: warning: {line}")));
}

#[test]
fn what_a_start_would_do() {
    let host = pinned(PIN).without("run/gpu-handoff/vm-111").without("run/qemu-server/111.pid");
    let line = "  pin       vCPUs 0-1 on 2-3, emulator on 0-1, interrupts on 0-1, governor performance";
    plans(&host, "plan 111", &["0000:01:00 host -> VM 111", line]);
    let json: Value = serde_json::from_str(&host.run("plan 111 --json").out).unwrap();
    assert_eq!(json["steps"][0], json!({"phase": "pin", "step": "vCPUs 0-1 on 2-3"}));
    assert_eq!(json["steps"].as_array().unwrap().len(), 4);
}

/// What is written in the tree stays for the next run.
fn after_a_start() -> Host {
    let host = pinned(PIN);
    assert_eq!(host.run("111 post-start").code, Some(0));
    assert_eq!(outside(&host), is("0-1", "performance"));
    host
}

fn ended(host: Host) -> Host {
    host.without("run/qemu-server/111.pid").without(&format!("proc/{PID}"))
}

#[test]
fn what_was_is_put_back_when_the_vm_has_stopped() {
    let host = ended(after_a_start());
    let run = host.run("111 post-stop");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(outside(&host), is("0-7", "powersave"));
    assert!(!host.has_own_file("pin-111"));
}

#[test]
fn the_keeper_puts_back_what_nobody_else_did() {
    for (call, with_record) in [("reconcile --owed", false), ("reconcile", false), ("reconcile", true)] {
        let host = after_a_start();
        let host = if with_record { host } else { host.without("run/gpu-handoff/vm-111") };
        // As long as it runs it is as it is.
        assert_eq!(host.run(call).code, Some(0), "{call}");
        assert_eq!(outside(&host), is("0-1", "performance"), "{call}");
        let host = ended(host);
        if !with_record {
            let line = "  put back  interrupts' affinities and governors";
            plans(&host, &format!("{call} --dry-run"), &["VM 111 was pinned", line]);
        }
        assert_eq!(host.run(call).code, Some(0), "{call}");
        assert_eq!(outside(&host), is("0-7", "powersave"), "{call}");
        assert!(!host.has_own_file("pin-111"), "{call}");
    }
}

#[test]
fn what_is_not_ours_any_more_is_let_be() {
    let put_back = |host: Host| {
        let host = ended(host);
        assert_eq!(host.run("111 post-stop").code, Some(0));
        assert!(!host.has_own_file("pin-111"));
        outside(&host)
    };
    // Somebody has changed it since.
    let host = after_a_start().file(IRQ, "3\n").file(POLICY, "schedutil\n");
    assert_eq!(put_back(host), is("3", "schedutil"));
    // The kernel writes a list in its own way.
    let host = after_a_start().file(IRQ, "0,1\n");
    assert_eq!(put_back(host), is("0-7", "powersave"));
    // The number has come to be another interrupt's, which happens to be on the same CPUs.
    let lines = "  45:  0  7  IR-PCI-MSIX-0000:05:00.0    0-edge      nvme0q0\n";
    assert_eq!(put_back(after_a_start().file("proc/interrupts", lines)), is("0-1", "powersave"));
    // It is gone.
    let host = ended(after_a_start().without("proc/irq/45"));
    assert_eq!(host.run("111 post-stop").code, Some(0));
    assert_eq!(read(&host, POLICY), "powersave");
}

/// A line of the board stays when QEMU has gone, and with it where it goes.
#[test]
fn a_line_of_the_board_is_put_back_without_its_handler() {
    let lines = "  45:  0  7  IR-IO-APIC  45-fasteoi   snd_hda_intel, vfio-intx(0000:01:00.0)\n";
    let host = pinned(PIN).file("proc/interrupts", lines);
    assert_eq!(host.run("111 post-start").code, Some(0));
    assert_eq!(read(&host, IRQ), "0-1");
    let host = ended(host.file("proc/interrupts", "  45:  0  7  IR-IO-APIC  45-fasteoi   snd_hda_intel\n"));
    assert_eq!(host.run("111 post-stop").code, Some(0));
    assert_eq!(read(&host, IRQ), "0-7");
}

/// Two VMs have a governor in common: the last of them puts it back, whichever that is.
#[test]
fn what_two_vms_have_in_common_is_put_back_by_the_last() {
    for last in [111, 112] {
        let host = after_a_start();
        let second = json!({"schema": 1, "changes": [
            [format!("/{POLICY}"), "powersave", "performance", ""],
        ]});
        let host = host.file("run/gpu-handoff/pin-112", &second.to_string());
        if last == 112 {
            let host = ended(host).file("var/lock/qemu-server/other", "");
            let host = with_second(host);
            assert_eq!(host.run("reconcile --owed").code, Some(0));
            assert_eq!(outside(&host), is("0-7", "performance"));
            assert!(!host.has_own_file("pin-111") && host.has_own_file("pin-112"));
            let host = host.without("run/qemu-server/112.pid");
            assert_eq!(host.run("reconcile --owed").code, Some(0));
            assert_eq!(outside(&host), is("0-7", "powersave"));
        } else {
            assert_eq!(host.run("reconcile --owed").code, Some(0));
            assert!(host.has_own_file("pin-111") && !host.has_own_file("pin-112"));
            assert_eq!(outside(&host), is("0-1", "performance"));
        }
    }
}

fn with_second(host: Host) -> Host {
    host.running(112, PID + 9).alive(PID + 9)
}

/// One that is the second finds what the first has set, and remembers what was before that.
#[test]
fn the_second_remembers_what_was_before_the_first() {
    let first = json!({"schema": 1, "changes": [
        [format!("/{POLICY}"), "powersave", "schedutil", ""],
    ]});
    let host = pinned(PIN).file("run/gpu-handoff/pin-112", &first.to_string()).file(POLICY, "schedutil\n");
    assert_eq!(host.run("111 post-start").code, Some(0));
    assert_eq!(read(&host, POLICY), "performance");
    assert_eq!(host.own_file("pin-111")["changes"][1][1], json!("powersave"));
}

/// Without that on record nothing is changed that would have to be put back.
#[test]
fn what_cannot_be_remembered_is_not_changed() {
    let host = pinned(PIN).file("run/gpu-handoff/pin-111", "no JSON");
    let run = host.run("111 post-start");
    assert_eq!(run.code, Some(0));
    assert!(run.err.contains("goes on without what would have to be put back"), "{}", run.err);
    assert_eq!(outside(&host), is("0-7", "powersave"));
}

/// Where the kernel says no to an interrupt the rest is done all the same. This attribute says no to whoever writes.
#[test]
fn an_interrupt_that_stays_where_it_is() {
    let host = pinned(r#"{"vcpus":"2-3","irq":"7","governor":"performance"}"#).without(IRQ);
    symlink("/sys/devices/system/cpu/online", host.path(IRQ)).unwrap();
    let run = host.run("111 post-start");
    assert_eq!(run.code, Some(0));
    assert!(run.err.contains("VM 111 is pinned: governor performance\n"), "{}", run.err);
    let line = "goes on without this: vCPUs 0-1 on 2-3, interrupt 45 on 7: ";
    assert!(run.err.contains(line), "{}", run.err);
    let host = ended(host);
    assert_eq!(host.run("111 post-stop").code, Some(0));
    assert_eq!(read(&host, POLICY), "powersave");
}

/// Whether Proxmox notes that the start is through, or is too old for that.
#[test]
fn the_watcher_sees_to_what_comes_later() {
    for is_noted in [true, false] {
        let host = pinned(r#"{"irq":"0-1"}"#).file("proc/interrupts", "           CPU0\n");
        let host = if is_noted { host.file("run/qemu-server/111.cleanup", "") } else { host };
        ignores_but_for_locks(&host, "111 post-start");
        let watcher = host.command("watch 111").stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(read(&host, IRQ), "0-7");
        let line = "  45:  0  7  IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)\n";
        fs::write(host.path("proc/.new"), line).unwrap();
        fs::rename(host.path("proc/.new"), host.path("proc/interrupts")).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while read(&host, IRQ) != "0-1" && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!((read(&host, IRQ).as_str(), host.has_own_file("pin-111")), ("0-1", true), "{is_noted}");
        // It ends with QEMU, and does not stay its minute.
        let host = ended(host);
        let begin = Instant::now();
        let output = watcher.wait_with_output().unwrap();
        assert!(output.status.success() && begin.elapsed() < Duration::from_secs(30), "{output:?}");
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(err.starts_with("gpu-handoff: VM 111 is pinned: interrupt 45 on 0-1\n"), "{err}");
        assert_eq!(host.run("reconcile").code, Some(0));
        assert_eq!(read(&host, IRQ), "0-7");
    }
}

#[test]
fn status_shows_what_is_where() {
    let host = after_a_start();
    let json = status(&host);
    let pinned = &json["gpus"][0]["pinned"];
    let of = |number: u32, cpus: &str| json!({"number": number, "cpus": cpus});
    assert_eq!(pinned["vcpus"], json!([of(0, "0-7"), of(1, "0-7")]));
    assert_eq!((&pinned["emulator"], &pinned["iothreads"]), (&json!("0-7"), &json!("0-7")));
    assert_eq!((&pinned["interrupts"], &pinned["governors"]), (&json!([of(45, "0-1")]), &json!(["performance"])));
    let differs = "not as configured, which is vCPUs 0-1 on 2-3, emulator on 0-1, iothreads on 0-1";
    assert_eq!(pinned["differs"], json!([differs]));
    let text = host.run("--status").out;
    for line in [
        "  pinned   vCPUs 0-1 on 0-7, emulator on 0-7, iothreads on 0-7, interrupt 45 on\n           0-1, governor performance\n",
        "  pinned   not as configured, which is vCPUs 0-1 on 2-3, emulator on 0-1,\n           iothreads on 0-1\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    // As long as nobody wants it.
    let host = host.config("{}");
    assert_eq!(status(&host)["gpus"][0].get("pinned"), None);
    assert!(!host.run("--status").out.contains("pinned"));
}
