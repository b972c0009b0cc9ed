use super::*;

// How far a run goes

/// The way there fails at the first change that is not made in a tree; everything is put back and told.
#[test]
fn a_way_there_that_fails() {
    let unload = ("unload nvidia", "unload nvidia: not done under GPU_HANDOFF_ROOT");
    let nothing = "unbind from nvidia 0000:01:00.0: the kernel reported success, but nothing changed";
    let unbind = ("unbind from nvidia .0", nothing);
    // The other card needs the module.
    let second = || host().card("0000:02:00", "nvidia", "snd_hda_intel");
    for (host, (step, problem)) in [(host(), unload), (second(), unbind)] {
        let run = host.run("111 pre-start");
        assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{}", run.err);
        assert_eq!(
            told(&run),
            [
                "0000:01:00 host -> VM 111".to_string(),
                "  check N ms  .0 nvidia, .1 snd_hda_intel; not in use".to_string(),
                "  prepare N ms  driver_override=vfio-pci .0 .1".to_string(),
                format!("  release N ms  FAILED {step}"),
                "0000:01:00 goes back".to_string(),
                "  release N ms  remove_id 10de:22ba 10de:2684".to_string(),
                "  clear N ms  clear driver_override .0 .1".to_string(),
                format!("error: 0000:01:00 is back where it was: {problem}; then start VM 111 again: qm start 111"),
            ]
        );
        for address in ["0000:01:00.0", "0000:01:00.1"] {
            let path = host.path(&format!("{}/driver_override", device(address)));
            assert_eq!(fs::read_to_string(path).unwrap(), "\n", "{address}");
        }
        for name in ["vm-111", "journal", "wedged-0000:01:00"] {
            assert!(!host.has_own_file(name), "{name}");
        }
        let last = host.own_file("last-0000:01:00");
        assert_eq!((&last["direction"], &last["vmid"], &last["exit"]), (&json!("vfio"), &json!(111), &json!(1)));
        let phases: Vec<_> = last["phases"].as_array().unwrap().iter().map(|one| (&one["way"], &one["name"])).collect();
        let there = ["check", "prepare", "release"].map(|name| (json!("there"), json!(name)));
        let back = ["release", "complete", "clear"].map(|name| (json!("back"), json!(name)));
        assert_eq!(phases, there.iter().chain(&back).map(|(way, name)| (way, name)).collect::<Vec<_>>());
        let shown = host.run("--status").out;
        // Which may go on below.
        let (_, shown) = shown.split_once("\n  last ").unwrap();
        let shown: Vec<&str> = shown.split("\n0000").next().unwrap().split_whitespace().collect();
        let shown = shown.join(" ");
        assert!(shown.contains("; back: release ") && shown.ends_with("), failed"), "{shown}");
        assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "host", "vmid": null}));
    }
}

/// The way home goes as far as it can, says where it stopped, and can be gone on with.
#[test]
fn a_way_home_that_fails() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia");
    for call in ["111 post-stop", "to-nvidia", "reconcile", "reconcile --unfinished"] {
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{call}: {}", run.err);
        let told = told(&run);
        assert_eq!(told[0], "0000:01:00 VM 111 -> host", "{call}");
        assert_eq!(told[1], "  wait N ms  nobody has it open any more", "{call}");
        let end = "error: 0000:01:00 is stranded: unbind from vfio-pci 0000:01:00.0: the kernel reported success, but \
                   nothing changed; fix that, then: gpu-handoff to-nvidia 0000:01:00";
        assert_eq!(told.last().unwrap(), end, "{call}");
        let record = host.own_file("vm-111");
        assert_eq!(record["progress"], json!("returning"), "{call}");
        assert_eq!(record["functions"][0]["driver"], json!("nvidia"), "{call}");
        assert!(!host.has_own_file("journal"), "{call}");
        let last = host.own_file("last-0000:01:00");
        assert_eq!((&last["direction"], &last["vmid"], &last["exit"]), (&json!("home"), &json!(111), &json!(1)));
        assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "stranded", "vmid": 111}), "{call}");
    }
}

/// Towards home a step that fails keeps none of the others back, and the log does not hide it.
#[test]
fn every_step_home_that_fails_is_told() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia");
    let Run { err, .. } = host.run("111 post-stop");
    for problem in [
        "unbind from vfio-pci 0000:01:00.0: the kernel reported success, but nothing changed",
        "FAILED unbind from vfio-pci .1: the kernel reported success, but nothing changed",
        "FAILED load nvidia snd_hda_intel: modprobe is not installed",
    ] {
        // Once: why the first failed says the error, of the others their lines do.
        assert_eq!(err.matches(problem).count(), 1, "{problem}: {err}");
    }
}

/// A card that was pulled out has no home to come to: its record ends, and what was stopped for it starts again.
#[test]
fn a_card_that_is_gone() {
    let stopped = || {
        let host = Host::new().vm(111, "hostpci0: 01:00").record("vm-111", "0000:01:00", "away", "nvidia");
        let mut record = host.own_file("vm-111");
        record["stopped"] = json!([{"container": 101}]);
        host.file("run/gpu-handoff/vm-111", &record.to_string())
    };
    for call in ["111 post-stop", "reconcile", "reconcile --owed", "to-nvidia 01:00"] {
        let host = stopped();
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(0), ""), "{call}: {}", run.err);
        let warning = "warning: 0000:01:00.0 is gone: there is no such device any more, and nothing to bring home; if \
                       the card is still there: echo 1 > /sys/bus/pci/rescan";
        assert!(told(&run).contains(&warning.to_string()), "{call}: {}", run.err);
        assert!(!host.has_own_file("vm-111"), "{call}");
        assert_eq!(host.own_file("to-start")["entries"][0]["what"], json!({"container": 101}), "{call}");
    }
    refuses(&Host::new(), "to-nvidia 01:00", 3, "there is no device in slot 0000:01:00; lspci -D shows what there is");
}

/// A call that has come back is told of no more, also where no record names its slot.
#[test]
fn a_wedge_that_has_ended() {
    let host = host().wedged("0000:01:00", PID);
    for call in ["reconcile", "reconcile --owed"] {
        assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
        assert!(!host.has_own_file("wedged-0000:01:00"));
    }
}

// What would be done

#[test]
fn the_plan_of_a_start() {
    let away = [
        "  prepare   driver_override=vfio-pci .0 .1",
        "  release   unload nvidia, unbind from snd_hda_intel .1",
        "  bind      bind to vfio-pci .0 .1",
    ];
    let lines = |title: &'static str, steps: &[&'static str]| [&[title], steps].concat();
    let for_vm = |steps: &[&'static str]| lines("0000:01:00 host -> VM 111", steps);
    plans(&host(), "plan 111", &for_vm(&away));
    for call in ["to-vfio --dry-run", "to-vfio 01:00 --dry-run", "handoff vfio --dry-run", "--dry-run to_vfio"] {
        plans(&host(), call, &lines("0000:01:00 host -> vfio-pci by hand", &away));
    }
    // What holds the module goes first.
    let mut stack = away.to_vec();
    stack[1] = "  release   unload nvidia_uvm nvidia, unbind from snd_hda_intel .1";
    plans(&host().file("sys/module/nvidia/holders/nvidia_uvm/refcnt", "1\n"), "plan 111", &for_vm(&stack));
    // Another card needs the module, or a call that is stuck with one may.
    let mut unbind = away.to_vec();
    unbind[1] = "  release   unbind from nvidia .0, unbind from snd_hda_intel .1";
    plans(&host().card("0000:02:00", "nvidia", ""), "plan 111", &for_vm(&unbind));
    plans(&host().wedged("0000:02:00", PID).alive(PID), "plan 111", &for_vm(&unbind));
    // vfio-pci comes first.
    let mut load = away.to_vec();
    load[0] = "  prepare   load vfio_pci, driver_override=vfio-pci .0 .1";
    let not_loaded = host()
        .without("sys/bus/pci/drivers/vfio-pci")
        .without("sys/module/vfio_pci")
        .file("lib/modules/6.12.48-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko:\n");
    plans(&not_loaded, "plan 111", &for_vm(&load));
}

#[test]
fn the_plan_of_a_way_home() {
    let home = [
        "  release   remove_id 10de:22ba 10de:2684, driver_override=nvidia .0, driver_override=snd_hda_intel .1, unbind \
         from vfio-pci .0 .1",
        "  bind      load nvidia, bind to nvidia .0, bind to snd_hda_intel .1",
        "  complete  device nodes",
        "  clear     clear driver_override .0 .1",
    ];
    let away = || settled().driver("snd_hda_intel");
    let by_hand = away().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    let expected = [&["0000:01:00 vfio-pci by hand -> host"], &home[..]].concat();
    for call in ["to-nvidia --dry-run", "to-nvidia 01:00 --dry-run", "handoff nvidia --dry-run"] {
        plans(&by_hand, call, &expected);
    }
    let of_vm = away().record("vm-111", "0000:01:00", "away", "nvidia");
    let expected = [&["0000:01:00 VM 111 -> host"], &home[..]].concat();
    plans(&of_vm, "to-nvidia --dry-run", &expected);
    plans(&of_vm, "reconcile --dry-run", &expected);
    let unfinished = away().record("vm-111", "0000:01:00", "leaving", "nvidia");
    plans(&unfinished, "reconcile --unfinished --dry-run", &expected);
}

#[test]
fn plans_of_nothing() {
    let at_home = "0000:01:00 is at home on nvidia: nothing to do";
    plans(&host(), "to-nvidia --dry-run", &[at_home]);
    let on_vfio = "0000:01:00 is at home on vfio-pci: no handoff of ours put it there, nothing to do";
    plans(&settled(), "to-nvidia --dry-run", &[on_vfio]);
    let stale = settled().vm(111, "cores: 2").record("vm-111", "0000:01:00", "away", "nvidia");
    let line = "guest 111 takes no NVIDIA GPU: nothing to do, but its record's slots would come home";
    plans(&stale, "plan 111", &[line]);
}

// What was left behind

/// What no record names is not ours, and what somebody has or keeps is not left behind.
#[test]
fn nothing_was_left_behind() {
    let recorded = || settled().record("vm-111", "0000:01:00", "away", "nvidia");
    for (what, host) in [
        ("never used", settled()),
        ("at home", host()),
        ("no GPU", Host::new()),
        ("a running VM", recorded().running(111, PID)),
        ("a VM in its start", recorded().flock("var/lock/qemu-server/lock-111.conf")),
        ("by hand", settled().record("manual-0000:01:00", "0000:01:00", "away", "nvidia")),
        ("other files", settled().file("run/gpu-handoff/lock", "").file("run/gpu-handoff/last-0000:01:00", "{}")),
        ("a file of nobody", settled().file("run/gpu-handoff/vm-", "{}").file("run/gpu-handoff/vm-x", "{}")),
    ] {
        let had_directory = host.path("run/gpu-handoff").exists();
        for call in ["reconcile", "reconcile --unfinished"] {
            let before = host.snapshot();
            let silent = Run { code: Some(0), out: String::new(), err: String::new() };
            assert_eq!(host.run(call), silent, "{call}: {what}");
            assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}: {what}");
            plans(&host, &format!("{call} --dry-run"), &["nothing was left behind: nothing to do"]);
        }
        assert_eq!(host.path("run/gpu-handoff").exists(), had_directory, "{what}");
    }
}

/// Its hook was called by hand, from a shell that lives: what puts killed handoffs right has no business there.
#[test]
fn a_start_that_may_go_on_is_not_left_behind() {
    let host = settled().record_by(111, "0000:01:00", "nvidia", PID).alive(PID);
    assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "vm", "vmid": 111}));
    ignores(&host, "reconcile --unfinished");
}

/// All of it is where it was before, only the record is left: what is done then can be seen in a tree.
#[test]
fn what_was_left_behind_comes_home() {
    let (vm, by_hand) = ("vm-112", "manual-0000:01:00");
    for (name, progress, call) in [
        (vm, "away", "reconcile"),
        (vm, "leaving", "reconcile"),
        (vm, "returning", "reconcile"),
        (vm, "leaving", "reconcile --unfinished"),
        (vm, "returning", "reconcile --unfinished"),
        (by_hand, "leaving", "reconcile --unfinished"),
        (by_hand, "returning", "reconcile"),
    ] {
        let host = host().record(name, "0000:01:00", progress, "nvidia");
        let owner = if name == vm { "VM 112" } else { "vfio-pci by hand" };
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(0), ""), "{call}: {}", run.err);
        assert_eq!(
            told(&run),
            [
                format!("0000:01:00 {owner} -> host").as_str(),
                "  wait N ms  nobody has it open any more",
                "  release N ms  remove_id 10de:22ba 10de:2684",
                "0000:01:00 is home after N ms",
            ],
            "{call}"
        );
        assert!(!host.has_own_file(name), "{name}: {call}");
        ignores(&host, call);
    }
    // A VM that does not run is not an unfinished handoff.
    let host = host().record(vm, "0000:01:00", "away", "nvidia");
    ignores(&host, "reconcile --unfinished");
}

/// One that cannot be brought home keeps none of the others back; it decides the exit code.
#[test]
fn what_was_left_behind_and_stays_there() {
    let host = settled()
        .card("0000:02:00", "nvidia", "snd_hda_intel")
        .record("vm-112", "0000:01:00", "away", "nvidia")
        .record("vm-113", "0000:02:00", "away", "nvidia")
        .record("vm-114", "0000:02:00", "away", "nvidia")
        .running(114, PID);
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(host.has_own_file("vm-112") && !host.has_own_file("vm-113") && host.has_own_file("vm-114"), "{}", run.err);
    let errors: Vec<String> = told(&run).into_iter().filter(|line| line.starts_with("error: ")).collect();
    let end = "error: 0000:01:00 is stranded: unbind from vfio-pci 0000:01:00.0: the kernel reported success, but \
               nothing changed; fix that, then: gpu-handoff to-nvidia 0000:01:00";
    assert_eq!(errors, [end]);
}
