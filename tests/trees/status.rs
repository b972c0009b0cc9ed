use super::*;

// Status

/// What `--status --json` says; it reads only.
#[track_caller]
pub fn status(host: &Host) -> Value {
    let before = host.snapshot();
    let Run { code, out, err } = host.run("--status --json");
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    assert_eq!(host.run("status --json").out, out);
    assert!(out.ends_with("}\n") && out.lines().count() == 1, "{out}");
    serde_json::from_str(&out).unwrap()
}

/// Only root may see every process, so only to root an empty list means that there is no user.
pub fn users(users: Value) -> Value {
    if nix::unistd::geteuid().is_root() { users } else { Value::Null }
}

/// A user of which one of `ctid`, `vmid` and `unit` is known.
pub fn user(pid: u32, command: &str, via: &str, known: &str, what: Value) -> Value {
    let mut user =
        json!({"pid": pid, "command": command, "via": via, "mapped": false, "ctid": null, "vmid": null, "unit": null});
    user[known] = what;
    user
}

#[test]
fn status_has_every_key() {
    let last = json!({"schema": 1, "time": "2026-11-20T12:00:00Z", "direction": "home", "vmid": 111, "slots": ["0000:01:00"],
        "exit": 0, "ms": 84, "phases": [{"name": "wait", "ms": 10}], "reason": null});
    let host = with_drm_node(host())
        .function("0000:41:00.0", "030200", "10de:2330", "vfio-pci", 65)
        .function("0000:21:00.0", "030000", "10de:2204", "", 33)
        .function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2)
        .without(&format!("{}/iommu_group", device("0000:21:00.0")))
        .file(&format!("{}/driver_override", device("0000:41:00.0")), "vfio-pci\n")
        .process(PID, "ffmpeg", "/lxc/101/ns", &[NULL])
        .process(PID + 1, "Xorg", "/system.slice/lightdm.service", &[NULL])
        .process(PID + 2, "sleep", "/", &[NULL])
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:41:00.0")), "1:5\n")
        .process(PID + 3, "kvm", "/qemu.slice/112.scope", &["/dev/zero"])
        .file("run/gpu-handoff/last-0000:01:00", &last.to_string())
        .file("run/reboot-required.pkgs", "linux-base\ngpu-handoff\n");
    let expected = json!({"schema": 1, "gpus": [
        {
            "slot": "0000:01:00",
            "owner": {"kind": "host", "vmid": null},
            "functions": [
                {"address": "0000:01:00.0", "class": "030000", "id": "10de:2684", "driver": "nvidia",
                 "home": "nvidia", "override": null, "iommu_group": 1},
                {"address": "0000:01:00.1", "class": "040300", "id": "10de:22ba", "driver": "snd_hda_intel",
                 "home": "snd_hda_intel", "override": null, "iommu_group": 1},
            ],
            "users": users(json!([
                user(PID, "ffmpeg", "/dev/dri/card0", "ctid", json!(101)),
                user(PID + 1, "Xorg", "/dev/dri/card0", "unit", json!("lightdm.service")),
                user(PID + 2, "sleep", "/dev/dri/card0", "unit", Value::Null),
            ])),
            "wedged": null,
            "owed": [],
            "dri": null,
            "causes": [],
            "mappings": [],
            "name": null,
            "since": "2026-11-20T12:00:00Z",
            "guests": [{"vmid": 111, "ctid": null, "name": "test", "hook": false}],
            "last": last,
        },
        {
            "slot": "0000:21:00",
            "owner": {"kind": "none", "vmid": null},
            "functions": [
                {"address": "0000:21:00.0", "class": "030000", "id": "10de:2204", "driver": null,
                 "home": null, "override": null, "iommu_group": null},
            ],
            "users": users(json!([])),
            "wedged": null,
            "owed": [],
            "dri": null,
            "causes": [],
            "mappings": [],
            "name": null,
            "since": null,
            "guests": [],
            "last": null,
        },
        {
            "slot": "0000:41:00",
            "owner": {"kind": "vm", "vmid": 112},
            "functions": [
                {"address": "0000:41:00.0", "class": "030200", "id": "10de:2330", "driver": "vfio-pci",
                 "home": "vfio-pci", "override": "vfio-pci", "iommu_group": 65},
            ],
            "users": users(json!([user(PID + 3, "kvm", "/dev/vfio/devices/vfio0", "vmid", json!(112))])),
            "wedged": null,
            "owed": [],
            "dri": null,
            "causes": [],
            "mappings": [],
            "name": null,
            "since": null,
            "guests": [],
            "last": null,
        },
    ], "driver": null, "setup": {"reboot_required": true, "error": null}, "problems": []});
    let mut told = status(&host);
    let findings = told.as_object_mut().unwrap().remove("findings").unwrap();
    assert_eq!(told, expected);
    let keys: Vec<&str> = findings[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["fix", "found", "guest", "id", "place", "remedy", "severity", "why"]);
}

#[test]
fn status_without_a_gpu() {
    let host = Host::new().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    let setup = json!({"reboot_required": false, "error": null});
    let expected = json!({"schema": 1, "gpus": [], "driver": null, "setup": setup, "problems": [], "findings": []});
    assert_eq!(status(&host), expected);
    let text = Run { code: Some(0), out: "no NVIDIA GPU in this host\n".to_string(), err: String::new() };
    assert_eq!(host.run("--status"), text);
}

#[test]
fn status_tells_who_has_it() {
    let recorded = |progress: &str| settled().record("vm-111", "0000:01:00", progress, "nvidia");
    let by_hand = |progress: &str| settled().record("manual-0000:01:00", "0000:01:00", progress, "nvidia");
    let asked_for = || settled().record_by(111, "0000:01:00", "nvidia", PID);
    let unmoved = |progress: &str| host().record("vm-111", "0000:01:00", progress, "nvidia");
    let lock = "run/gpu-handoff/lock-0000:01:00";
    let vm = json!(111);
    for (what, host, kind, vmid) in [
        ("on its driver", host(), "host", Value::Null),
        ("on nouveau", Host::new().card("0000:01:00", "nouveau", ""), "host", Value::Null),
        ("on vfio-pci", settled(), "none", Value::Null),
        ("on pci-stub", Host::new().card("0000:01:00", "pci-stub", ""), "none", Value::Null),
        ("without a driver", Host::new().card("0000:01:00", "", ""), "none", Value::Null),
        ("with a running VM", recorded("away").running(111, PID), "vm", vm.clone()),
        ("with a VM in its start", recorded("away").flock("var/lock/qemu-server/lock-111.conf"), "vm", vm.clone()),
        ("with a VM whose caller lives", asked_for().alive(PID), "vm", vm.clone()),
        ("with a VM whose caller does not", asked_for(), "stranded", vm.clone()),
        ("with a VM whose caller is another now", asked_for().stat(PID, 'S', START + 1), "stranded", vm.clone()),
        ("on its way there", recorded("leaving").flock(lock), "moving", vm.clone()),
        ("on its way home", recorded("returning").flock(lock), "moving", vm.clone()),
        ("on its way by hand", by_hand("leaving").flock(lock), "moving", Value::Null),
        ("another card on its way", recorded("away").running(111, PID).flock(lock), "vm", vm.clone()),
        ("with a VM that is gone", recorded("away"), "stranded", vm.clone()),
        ("left on its way there", recorded("leaving").running(111, PID), "stranded", vm.clone()),
        ("left on its way home", recorded("returning").file(lock, ""), "stranded", vm.clone()),
        ("left before anything was moved", unmoved("leaving"), "host", Value::Null),
        ("left when all was home", unmoved("returning"), "host", Value::Null),
        ("by hand", by_hand("away"), "manual", Value::Null),
        ("left by hand", by_hand("returning"), "stranded", Value::Null),
        ("a wedge that has ended", settled().wedged("0000:01:00", PID), "none", Value::Null),
        ("a wedge's PID again", settled().wedged("0000:01:00", PID).stat(PID, 'D', START + 1), "none", Value::Null),
        ("another card's record", host().record("vm-111", "0000:02:00", "away", "nvidia"), "host", Value::Null),
    ] {
        let gpu = &status(&host)["gpus"][0];
        assert_eq!(gpu["owner"], json!({"kind": kind, "vmid": vmid}), "{what}");
        assert_eq!(gpu["wedged"], Value::Null, "{what}");
    }
}

#[test]
fn status_tells_where_home_is() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID);
    let functions = &status(&host)["gpus"][0]["functions"];
    assert_eq!((&functions[0]["driver"], &functions[0]["home"]), (&json!("vfio-pci"), &json!("nvidia")));
}

#[test]
fn status_of_a_wedged_slot() {
    let wedged = |host: Host| host.wedged("0000:01:00", PID).alive(PID);
    let gpu = status(&wedged(host()))["gpus"][0].clone();
    assert_eq!(gpu["owner"], json!({"kind": "wedged", "vmid": null}));
    let step = "unbind from nvidia 0000:01:00.0";
    assert_eq!(gpu["wedged"], json!({"step": step, "pid": PID, "start": START, "since": "2026-11-20T12:00:00Z"}));
    let of_vm = wedged(host()).record("vm-111", "0000:01:00", "leaving", "nvidia");
    assert_eq!(status(&of_vm)["gpus"][0]["owner"], json!({"kind": "wedged", "vmid": 111}));
}

#[test]
fn status_leaves_virtual_functions_out() {
    let status = status(&with_virtual_functions(host()));
    assert_eq!(status["gpus"].as_array().unwrap().len(), 1);
    assert_eq!(status["gpus"][0]["slot"], json!("0000:01:00"));
}

/// Without a record it is where the configuration says; only of the GPU, and in whatever spelling.
#[test]
fn status_tells_where_home_will_be() {
    let homes = |host: &Host| {
        let functions = &status(host)["gpus"][0]["functions"];
        [functions[0]["home"].clone(), functions[1]["home"].clone()]
    };
    let configured = |slot: &str, home: &str| format!(r#"{{"gpus":{{"{slot}":{{"home":"{home}"}}}}}}"#);
    for (slot, home, expected) in [
        ("0000:0a:00", "nouveau", json!("nouveau")),
        ("0000:0A:00", "nouveau", json!("nouveau")),
        ("0A:00", "vfio-pci", json!("vfio-pci")),
        ("0a:00", "none", Value::Null),
        ("0a:00", "auto", json!("nvidia")),
    ] {
        let host = Host::new().card("0000:0a:00", "nvidia", "snd_hda_intel").config(&configured(slot, home));
        assert_eq!(homes(&host), [expected, json!("snd_hda_intel")], "{slot}: {home}");
    }
    let Run { out, err, .. } = host().config(&configured("0b:00", "none")).run("--status --json");
    assert!(err.contains("gpus.0000:0b:00 in /etc/gpu-handoff/config.json names no NVIDIA GPU"), "{err}");
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["gpus"][0]["functions"][0]["home"], json!("nvidia"));
    let text = host().config(&configured("01:00", "nouveau")).run("--status").out;
    assert!(text.contains("  .0  display  10de:2684  group 1    nvidia         home nouveau\n"), "{text}");
    // A record knows better.
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia").config(&configured("01:00", "none"));
    assert_eq!(homes(&host.running(111, PID)), [json!("nvidia"), json!("snd_hda_intel")]);
}

#[test]
fn status_does_not_need_the_configuration() {
    let Run { code, out, err } = host().config("{").run("--status --json");
    let problem = "/etc/gpu-handoff/config.json: EOF while parsing an object at line 1 column 1";
    assert_eq!((code, err), (Some(0), format!("gpu-handoff: warning: {problem}; going on with the defaults\n")));
    let mut told = serde_json::from_str::<Value>(&out).unwrap();
    assert_eq!(told["problems"].take(), json!([format!("{problem}; going on with the defaults")]));
    told["problems"] = json!([]);
    let mut usual = status(&host());
    let ids = |status: &mut Value| -> Vec<String> {
        let findings = status["findings"].take();
        findings.as_array().unwrap().iter().map(|finding| finding["id"].as_str().unwrap().to_string()).collect()
    };
    let (with, without) = (ids(&mut told), ids(&mut usual));
    let more: Vec<&String> = with.iter().filter(|id| !without.contains(id)).collect();
    assert_eq!(more, ["config-mistake"]);
    assert_eq!(told, usual);
}

/// A VM that draws on the host's GPU (`vga: virtio-gl`) is a user of it, no owner.
#[test]
fn status_of_a_gpu_that_a_vm_draws_on() {
    let host = with_drm_node(host()).process(PID, "kvm", "/qemu.slice/112.scope", &[NULL]);
    let gpu = status(&host)["gpus"][0].clone();
    assert_eq!(gpu["owner"], json!({"kind": "host", "vmid": null}));
    assert_eq!(gpu["users"], users(json!([user(PID, "kvm", "/dev/dri/card0", "vmid", json!(112))])));
}

/// A slot that is none is as good as no record at all.
#[test]
fn status_with_a_record_of_what_is_no_slot() {
    let text = r#"{"schema":1,"progress":"away","functions":[{"slot":"gpu","address":"0000:02:00.0"}],"modules":[]}"#;
    for (name, text, problem) in
        [("manual-gpu", "{}", "named after no slot"), ("vm-333", text, r#"slot: "gpu" is none"#)]
    {
        let host = host().file(&format!("run/gpu-handoff/{name}"), text);
        let run = host.run("--status");
        let line = format!("run/gpu-handoff/{name}: {problem}");
        assert!(run.code == Some(0) && run.err.contains(&line), "{:?} {}", run.code, run.err);
    }
}

/// The other card can still be told about; that one file cannot be read is said beside it.
#[test]
fn status_with_a_record_that_is_not_understood() {
    let host = host().file("run/gpu-handoff/vm-333", "{");
    let run = host.run("--status --json");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(run.err.contains("run/gpu-handoff/vm-333"), "{}", run.err);
    let status: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(status["gpus"][0]["slot"], json!("0000:01:00"));
}

/// As nobody, when there is somebody else to be: without root the users are not known.
#[test]
fn status_without_root() {
    let host = with_drm_node(host()).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let nobody = |call: &str| -> Option<String> {
        let mut command: Command = host.command(call);
        if nix::unistd::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        match command.output() {
            Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
            // The build directory is below root's home.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => panic!("{error}"),
        }
    };
    let Some(out) = nobody("--status --json") else { return };
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["gpus"][0]["users"], Value::Null);
    assert_eq!(status["gpus"][0]["slot"], json!("0000:01:00"));
    let text = nobody("--status").unwrap();
    assert!(text.contains("\n  used by  unknown: only root may see that\n"), "{text}");
}

/// What is found beside it takes no program, looks into no container and wakes no card.
#[test]
fn status_for_programs_asks_nobody() {
    let host =
        host().file("etc/modprobe.d/x.conf", "blacklist nvidia\n").file("etc/pve/lxc/101.conf", "dev0: /dev/nvidia0\n");
    let unit = host.file("usr/lib/systemd/system/gpu-handoff-setup.service", "");
    let loud = "#!/bin/sh\necho \"$0 $*\" >>${0%/usr/*}/calls\n";
    let host =
        ["usr/bin/systemctl", "usr/bin/dmesg", "usr/bin/grep", "usr/bin/tail", "usr/sbin/pct", "usr/bin/mokutil"]
            .iter()
            .fold(unit, |host, program| host.file(program, loud));
    let findings = status(&host)["findings"].clone();
    let about = |id: &str| findings.as_array().unwrap().iter().find(|finding| finding["id"] == id).cloned();
    let hook = about("vm-no-hook").unwrap();
    assert_eq!((&hook["guest"], &hook["remedy"]), (&json!(111), &json!("gpu-handoff enable 111")));
    assert!(findings.to_string().contains("/etc/modprobe.d/x.conf:1"), "{findings}");
    assert!(!host.path("calls").exists());
}

#[test]
fn status_for_people() {
    let host = settled()
        .function("0000:41:00.0", "030200", "10de:2330", "nvidia", 65)
        .record("vm-111", "0000:01:00", "away", "nvidia")
        .running(111, PID)
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
        .process(PID, "kvm", "/qemu.slice/111.scope", &[NULL])
        .file(
            "run/gpu-handoff/last-0000:01:00",
            r#"{"direction":"vfio","vmid":111,"exit":0,"ms":84,
                "phases":[{"name":"release","ms":20},{"name":"bind","ms":64}]}"#,
        )
        .file(
            "run/gpu-handoff/last-0000:41:00",
            r#"{"direction":"home","vmid":null,"exit":1,"ms":7,"phases":[{"name":"wait","ms":7}]}"#,
        )
        .wedged("0000:41:00", PID)
        .alive(PID)
        .file("run/reboot-required.pkgs", "gpu-handoff\n");
    let user = match nix::unistd::geteuid().is_root() {
        true => ["PID 5000001 (kvm, VM 111) has /dev/vfio/devices/vfio0 open\n", ""],
        false => ["unknown: only root may see that\n", "  used by  unknown: only root may see that\n"],
    };
    let expected = format!(
        "0000:01:00  VM 111 (test)\n  \
           .0  display  10de:2684  group 1    vfio-pci       home nvidia\n  \
           .1  audio    10de:22ba  group 1    vfio-pci       home snd_hda_intel\n  \
           guest    VM 111 (test) names it WITHOUT the hook: gpu-handoff enable 111\n  \
           used by  {}  \
           last     host -> VM 111 in 84 ms (release 20, bind 64)\n\
         0000:41:00  wedged\n  \
           .0  3D       10de:2330  group 65   nvidia\n\
         {}  \
           wedged   unbind from nvidia 0000:41:00.0 has not come back since\n           2026-11-20T12:00:00Z (PID 5000001)\n  \
           owed     look again\n  \
           remedy   if the call never ends: reboot\n  \
           last     vfio-pci -> host in 7 ms (wait 7), failed\n\
         reboot required: the host preparation takes effect with the next boot\n",
        user[0], user[1]
    );
    assert_eq!(host.run("--status"), Run { code: Some(0), out: expected, err: String::new() });
}

#[test]
fn status_as_a_check() {
    let settings = "/etc/gpu-handoff/config.json";
    for (host, faults) in [
        (host(), ""),
        (Host::new(), ""),
        (settled().record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID), ""),
        (settled().record("manual-0000:01:00", "0000:01:00", "away", "nvidia"), ""),
        (settled().record("vm-111", "0000:01:00", "away", "nvidia"), "0000:01:00 is stranded"),
        (host().wedged("0000:01:00", PID).alive(PID), "0000:01:00 is wedged"),
        (host().file("run/reboot-required.pkgs", "gpu-handoff\n"), "a reboot is required"),
        (
            host().config("{").file("run/reboot-required.pkgs", "gpu-handoff\n"),
            &format!(
                "a reboot is required; {settings}: EOF while parsing an object at line 1 column 1; going on with the \
                 defaults"
            ),
        ),
    ] {
        let plain = host.run("--status");
        let checked = host.run("--status --check");
        assert_eq!((plain.code, &plain.out), (Some(0), &checked.out));
        let told = checked.err.strip_prefix(&plain.err).unwrap();
        if faults.is_empty() {
            assert_eq!((checked.code, told), (Some(0), ""));
        } else {
            let expected = format!("gpu-handoff: error: not as it should be: {faults}\n");
            assert_eq!((checked.code, told), (Some(1), expected.as_str()));
        }
    }
}

// Who listens

/// Neither a reader that went away nor descriptors that were never open change what a run does.
#[test]
fn nobody_listens() {
    for (call, code) in [
        ("--status", 0),
        ("--status --json", 0),
        ("history", 0),
        ("history --json", 0),
        ("--help", 0),
        ("--version", 0),
        ("frobnicate", 2),
        ("999 pre-start", 2),
        // Gets as far as unloading a module, which is not done here, and goes back.
        ("111 pre-start", 1),
        ("111 post-stop", 0),
        ("to-nvidia", 0),
        ("plan 111", 0),
        ("plan 999", 2),
        ("to-vfio --dry-run", 0),
        ("reconcile", 0),
    ] {
        let host = host();
        assert_eq!(host.run(call).code, Some(code), "{call}, heard");

        let broken = || Stdio::from(io::pipe().unwrap().1);
        let status = host.command(call).stdout(broken()).stderr(broken()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{call}, broken pipes");

        let program = host.command(call);
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(r#"exec "$0" "$@" <&- >&- 2>&-"#).arg(program.get_program()).args(program.get_args());
        shell.env_clear().env("GPU_HANDOFF_ROOT", host.path(""));
        assert_eq!(shell.status().unwrap().code(), Some(code), "{call}, closed");
        // A closed descriptor's number is given to the next file that is opened.
        if let Ok(lock) = fs::read_to_string(host.path("run/gpu-handoff/lock-0000:01:00")) {
            assert_eq!(lock, "", "{call}");
        }
    }
}

#[test]
fn a_full_disk_is_told() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = host().command("--status --json").stdout(full).output().unwrap();
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "gpu-handoff: error: standard output: No space left on device (os error 28)\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

/// The process that does what may block leaves the working directory; it must not leave the tree with it.
#[test]
fn a_root_that_is_relative() {
    let host = settled().file(&format!("{}/driver_override", device("0000:01:00.0")), "vfio-pci\n");
    let root = host.path("");
    let relative = root.file_name().unwrap();
    let mut command = host.command("--status --json");
    let output = command.current_dir(root.parent().unwrap()).env("GPU_HANDOFF_ROOT", relative).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), host.run("--status --json").out);
}

#[test]
fn a_card_that_mappings_stand_for() {
    let cfg = "gpu\n\tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00\n\nany\n\tmap id=10de:2684,node=pve,path=0000:01:00.0\n\n\
               other\n\tmap id=10de:2684,node=pve2,path=0000:01:00\n";
    let host = host().file("etc/pve/mapping/pci.cfg", cfg);
    assert_eq!(status(&host)["gpus"][0]["mappings"], json!(["any", "gpu"]));
    assert!(host.run("--status").out.contains("\n  mapping  any, gpu\n"));
}
