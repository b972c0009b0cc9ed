use super::*;

// By hand

#[test]
fn bad_usage() {
    for (call, problem) in [
        ("111", "guest 111 needs a phase, such as pre-start"),
        ("99999999999 pre-start", "99999999999 is no guest id"),
        ("frobnicate", "frobnicate is unknown"),
        ("to-vfio --force", "--force is unknown"),
        ("to-vfio 01:00 02:00", "02:00 is too much"),
        ("handoff", "handoff needs vfio or nvidia"),
        ("handoff nouveau", "handoff needs vfio or nvidia"),
        ("to-nvidia --json", "--json goes with --status, doctor, history and plan"),
        ("stauts", "stauts is unknown, did you mean --status?"),
        ("--status 01:00", "01:00 is too much"),
        ("plan", "plan needs the id of a VM"),
        ("plan gpu", "gpu is no guest id"),
        ("plan 99999999999", "99999999999 is no guest id"),
        ("plan 111 112", "112 is too much"),
        ("reconcile 01:00", "01:00 is too much"),
        ("reconcile --all", "--all goes with container check and container sync"),
        ("to-vfio --unfinished", "--unfinished goes with reconcile"),
        ("--status --dry-run", "--dry-run goes with a verb that changes something, and plan VMID is that of a start"),
        (
            "111 pre-start --dry-run",
            "--dry-run goes with a verb that changes something, and plan VMID is that of a start",
        ),
        ("plan 111 --dry-run", "--dry-run goes with a verb that changes something, and plan VMID is that of a start"),
    ] {
        refuses_now(&host(), call, 2, &format!("{problem}; see gpu-handoff --help"));
    }
}

#[test]
fn no_slot_named_and_none_to_choose() {
    let empty = || Host::new().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    let message = "there is no NVIDIA GPU in this host; lspci -nn shows what there is";
    for call in ["to-vfio", "to-nvidia", "to_vfio", "to_nvidia", "handoff vfio", "handoff nvidia"] {
        refuses(&empty(), call, 3, message);
    }
}

#[test]
fn no_slot_named_and_two_to_choose_from() {
    let two = host().card("0000:41:00", "nvidia", "");
    let message = "there are several NVIDIA GPUs, say which: 0000:01:00 or 0000:41:00";
    for call in ["to-vfio", "to-nvidia", "handoff vfio", "handoff nvidia"] {
        refuses(&two, call, 2, message);
    }
}

#[test]
fn bad_spellings_of_a_slot() {
    for slot in [
        "gpu",
        "0",
        "01",
        "1:0",
        "01:0",
        "0000:1:0",
        "01-00",
        "0000:01:00:00",
        "01:00.",
        "01:00.x",
        "0x01:00",
        "00:01:00",
    ] {
        let message = format!("{slot} is no slot; a slot is written like 0000:01:00");
        for verb in ["to-vfio", "to-nvidia"] {
            refuses(&host(), &format!("{verb} {slot}"), 2, &message);
        }
    }
}

#[test]
fn worse_spellings_of_a_slot() {
    for slot in ["01:00.00", "01:00.123", "0000:001:00", "0000:01:000"] {
        let message = format!("{slot} is no slot; a slot is written like 0000:01:00");
        refuses(&host(), &format!("to-nvidia {slot}"), 2, &message);
    }
}

#[test]
fn good_spellings_of_a_slot() {
    for slot in ["0000:0a:00", "0000:0A:00", "0a:00", "0A:00", "0a:00.0", "0000:0a:00.1"] {
        let host = Host::new().card("0000:0a:00", "vfio-pci", "vfio-pci");
        let expected = success("0000:0a:00 is already on vfio-pci: nothing to do");
        assert_eq!(host.run(&format!("to-vfio {slot}")), expected, "{slot}");
        assert!(host.path("run/gpu-handoff/manual-0000:0a:00").exists(), "{slot}");
    }
}

#[test]
fn a_slot_without_an_nvidia_gpu() {
    let host = host().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    for verb in ["to-vfio", "to-nvidia"] {
        let message = "slot 0000:02:00 has no NVIDIA GPU; gpu-handoff --status shows those there are";
        refuses(&host, &format!("{verb} 02:00"), 3, message);
        let message = "there is no device in slot 0000:03:00; lspci -D shows what there is";
        refuses(&host, &format!("{verb} 03:00.0"), 3, message);
    }
}

#[test]
fn nothing_to_bring_home() {
    for (gpu, line) in [
        ("nvidia", "0000:01:00 is at home on nvidia: nothing to do"),
        ("", "0000:01:00 is at home without a driver: nothing to do"),
        ("vfio-pci", "0000:01:00 is at home on vfio-pci: no handoff of ours put it there, nothing to do"),
    ] {
        let host = Host::new().card("0000:01:00", gpu, "snd_hda_intel");
        let before = host.snapshot();
        assert_eq!(host.run("to-nvidia"), success(line));
        assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    }
}

/// Going home goes by the record, whatever the configuration has become.
#[test]
fn a_record_of_a_card_that_lives_on_vfio_pci() {
    for (call, record) in [
        ("111 post-stop", "vm-111"),
        ("111 pre-start", "vm-111"),
        ("to-nvidia", "vm-111"),
        ("to-nvidia", "manual-0000:01:00"),
    ] {
        let host = settled().vm(111, "cores: 2").record(record, "0000:01:00", "away", "vfio-pci");
        assert_eq!(host.run(call), success("0000:01:00 is at home on vfio-pci: nothing to do"), "{call}");
        assert!(!host.path(&format!("run/gpu-handoff/{record}")).exists(), "{call}");
    }
}

#[test]
fn post_stop_without_a_configuration() {
    let host = settled().without("etc/pve").record("vm-111", "0000:01:00", "away", "vfio-pci");
    assert_eq!(host.run("111 post-stop"), success("0000:01:00 is at home on vfio-pci: nothing to do"));
}

#[test]
fn a_vm_that_never_lets_go() {
    let host = settled()
        .config(r#"{"time":{"handoff_s":1}}"#)
        .record("vm-111", "0000:01:00", "away", "nvidia")
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
        .process(PID, "kvm", "/qemu.slice/111.scope", &[NULL]);
    let who = "0000:01:00 was not touched: PID 5000001 (kvm, VM 111) has /dev/vfio/devices/vfio0 open";
    // A person would rather be told than wait.
    let message = format!("{who}; end it (qm shutdown 111), then: gpu-handoff to-nvidia 0000:01:00");
    refuses_now(&host, "to-nvidia", 3, &message);
    let Run { code, out, err } = host.run("111 post-stop");
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    // A busy machine may wait longer than it was told to.
    let (told, rest) = err.split_once(" (after ").unwrap();
    assert_eq!(told, format!("gpu-handoff: error: {who}"));
    let (waited, remedy) = rest.split_once(" s); ").unwrap();
    assert!(waited.parse::<u32>().is_ok(), "{err}");
    assert_eq!(remedy, "end it, then: gpu-handoff to-nvidia 0000:01:00\n");
    // Whoever comes next goes on from here.
    let record = host.own_file("vm-111");
    assert_eq!((&record["progress"], &record["functions"][0]["driver"]), (&json!("returning"), &json!("nvidia")));
    let gpu = status(&host)["gpus"][0].clone();
    assert_eq!(gpu["functions"][0]["driver"], json!("vfio-pci"));
    assert_eq!(gpu["functions"][0]["override"], Value::Null);
}

#[test]
fn somebody_who_asks_how() {
    for call in ["plan --help", "help plan", "help", "container --help", "watch -h"] {
        let run = host().run(call);
        assert_eq!((run.code, run.err.as_str()), (Some(0), ""), "{call}");
        assert!(run.out.contains("\n  gpu-handoff "), "{call}: {}", run.out);
    }
    let output = Command::new(host().command("x").get_program()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stdout).unwrap().contains("\n  gpu-handoff plan VMID\n"));
    assert_eq!(output.stderr, b"gpu-handoff: error: nothing to do; see gpu-handoff --help\n");
}

/// By its first name and its older one, and the slot with a flag or without.
#[test]
fn one_way_home_and_several_spellings() {
    for call in ["to-home", "to-home 01:00", "to-home --gpu 01:00", "to-nvidia --gpu 0000:01:00"] {
        assert_eq!(host().run(call), success("0000:01:00 is at home on nvidia: nothing to do"), "{call}");
    }
}

#[test]
fn a_plan_for_programs() {
    let planned = |host: &Host, call: &str| {
        let run = host.run(call);
        (run.code, serde_json::from_str::<Value>(&run.out).unwrap(), run.err)
    };
    let steps = json!([
        {"phase": "prepare", "step": "driver_override=vfio-pci 0000:01:00.0"},
        {"phase": "release", "step": "unload nouveau"},
        {"phase": "bind", "step": "bind to vfio-pci 0000:01:00.0"},
    ]);
    let host = Host::new()
        .function("0000:01:00.0", "030000", "10de:2684", "nouveau", 1)
        .vm(111, "hostpci0: 01:00")
        .vm(112, "hostpci0: 09:00")
        .vm(113, "cores: 2");
    for call in ["plan 111 --json", "plan 111 --output-format json"] {
        let expected =
            json!({"schema": 1, "vmid": 111, "slots": ["0000:01:00"], "steps": steps, "exit": 0, "reason": null});
        assert_eq!(planned(&host, call), (Some(0), expected, String::new()));
    }
    let (code, refused, err) = planned(&host, "plan 112 --json");
    let reason = refused["reason"].as_str().unwrap();
    assert_eq!((code, err), (Some(3), format!("gpu-handoff: error: {reason}\n")));
    assert_eq!((&refused["exit"], &refused["steps"], &refused["slots"]), (&json!(3), &json!([]), &json!([])));
    let (code, nothing, _) = planned(&host, "plan 113 --json");
    assert_eq!((code, &nothing["steps"], &nothing["reason"]), (Some(0), &json!([]), &Value::Null));
}

/// Warnings and errors are told all the same, and so is what was asked for.
#[test]
fn somebody_who_wants_to_read_less() {
    let silence = Run { code: Some(0), out: String::new(), err: String::new() };
    assert_eq!(host().run("to-home --quiet"), silence);
    let run = host().run("to-vfio 09:00 --quiet");
    assert_eq!((run.code, run.err.lines().count()), (Some(3), 1), "{}", run.err);
    assert_eq!(host().run("--status --quiet"), host().run("--status"));
    let owned = host().file("run/gpu-handoff/vm-112", "{}");
    assert!(owned.run("to-home --quiet").err.starts_with("gpu-handoff: warning: "));
}
