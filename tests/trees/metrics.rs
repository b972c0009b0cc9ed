use super::*;
use std::os::unix::fs::PermissionsExt;

// The metrics

const COUNTERS: &str = "var/lib/gpu-handoff/counters.json";
const FILE: &str = "srv/gpu-handoff.prom";

/// What `metrics` says; it reads only.
#[track_caller]
fn metrics(host: &Host) -> String {
    let before = host.snapshot();
    let Run { code, out, err } = host.run("metrics");
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    assert!(out.ends_with("\n# EOF\n"), "{out}");
    out
}

/// Of the samples of a family those that are not 0, without the program's name.
fn samples(text: &str, family: &str) -> Vec<String> {
    let ours = text.lines().filter_map(|line| line.strip_prefix("gpu_handoff_"));
    let ours = ours.filter(|line| line.starts_with(family) && !line.ends_with(" 0") && !line.ends_with(" 0.0"));
    ours.map(str::to_string).collect()
}

/// With a folder for the file, and the file configured.
fn told(host: Host) -> Host {
    fs::create_dir_all(host.path("srv")).unwrap();
    host.config(&format!(r#"{{"metrics":{{"textfile":"/{FILE}"}}}}"#))
}

fn written(host: &Host) -> String {
    fs::read_to_string(host.path(FILE)).unwrap_or_default()
}

#[test]
fn a_host_without_a_gpu() {
    let host = Host::new().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    let text = metrics(&host);
    let version = format!("build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    assert_eq!(samples(&text, ""), [version]);
    for family in ["gpu_handoff_owner_info{", "gpu_handoff_driver_info{", "gpu_handoff_users{"] {
        assert!(!text.contains(family), "{text}");
    }
    for line in [r#"gpu_handoff_handoffs_total{direction="home",result="failed"} 0"#, "gpu_handoff_setup_error 0"] {
        assert!(text.lines().any(|other| other == line), "{text}");
    }
}

#[test]
fn two_cards_and_one_with_a_vm() {
    let host = with_drm_node(host())
        .process(PID, "ffmpeg", "/lxc/101/ns", &[NULL])
        .process(PID + 1, "Xorg", "/system.slice/lightdm.service", &[NULL])
        .process(PID + 2, "kvm", "/qemu.slice/114.scope", &[NULL])
        .process(PID + 3, "sleep", "/", &[NULL])
        .card("0000:41:00", "vfio-pci", "vfio-pci")
        .record("vm-112", "0000:41:00", "away", "nvidia")
        .running(112, PID + 4)
        .file("usr/share/misc/pci.ids", "# a list\n10de  NVIDIA Corporation\n\t2684  AD102 [GeForce RTX 4090]\n")
        .file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue\n");
    let text = metrics(&host);
    let owner = |slot, owner, vmid| {
        format!(r#"owner_info{{slot="{slot}",card="NVIDIA GeForce RTX 4090",owner="{owner}",vmid="{vmid}"}} 1"#)
    };
    assert_eq!(samples(&text, "owner_info"), [owner("0000:01:00", "host", ""), owner("0000:41:00", "vm", "112")]);
    if nix::unistd::geteuid().is_root() {
        let users =
            ["container", "vm", "unit", "other"].map(|kind| format!(r#"users{{slot="0000:01:00",kind="{kind}"}} 1"#));
        assert_eq!(samples(&text, "users"), users);
    }
    assert_eq!(samples(&text, "driver_info"), [r#"driver_info{place="host",ctid="",version="550.163.01"} 1"#]);
    for family in ["stranded", "wedged", "owed"] {
        assert_eq!(samples(&text, family), Vec::<String>::new());
    }
}

#[test]
fn what_is_not_as_it_should_be() {
    let left = settled().record("vm-111", "0000:01:00", "returning", "nvidia");
    let mut record = left.own_file("vm-111");
    record["stopped"] = json!([{"unit": "x.service"}, {"container": 101}]);
    record["frozen"] = json!([102]);
    let left = left.file("run/gpu-handoff/vm-111", &record.to_string());
    let owed = |what: &str, count: u8| format!(r#"owed{{slot="0000:01:00",what="{what}"}} {count}"#);
    let text = metrics(&left);
    assert_eq!(samples(&text, "owed"), [owed("home", 1), owed("start", 2), owed("thaw", 1)]);
    assert_eq!(samples(&text, "stranded"), [r#"stranded{slot="0000:01:00"} 1"#]);
    assert_eq!(samples(&text, "wedged"), Vec::<String>::new());

    let text = metrics(&settled().wedged("0000:01:00", PID).alive(PID));
    assert_eq!(samples(&text, "owed"), [owed("look", 1)]);
    assert_eq!(samples(&text, "wedged"), [r#"wedged{slot="0000:01:00"} 1"#]);
    assert_eq!(samples(&text, "stranded"), Vec::<String>::new());
    assert!(samples(&text, "owner_info")[0].contains(r#"owner="wedged""#), "{text}");

    let host = host()
        .file("var/lib/gpu-handoff/setup.pending", r#"{"driver":{"why":"no headers","tries":1}}"#)
        .file("run/reboot-required.pkgs", "gpu-handoff\n")
        .config(r#"{"tine":1,"time":{"lock_s":"x"},"gpus":{"09:00":{"home":"none"}}}"#);
    let run = host.run("metrics");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(samples(&run.out, "setup_error"), ["setup_error 1"]);
    assert_eq!(samples(&run.out, "reboot_required"), ["reboot_required 1"]);
    assert_eq!(samples(&run.out, "config_problems"), ["config_problems 3"]);
    let run = host.config("{").run("metrics");
    assert_eq!(samples(&run.out, "config_problems"), ["config_problems 1"]);
}

#[test]
fn the_driver_in_a_container() {
    let attached =
        json!({"schema": 1, "style": "mount", "slots": ["0000:01:00"], "dri": false, "lines": [], "newline": false});
    let host = host()
        .file("etc/pve/lxc/101.conf", "arch: amd64\n")
        .file("var/lib/gpu-handoff/containers/101.json", &attached.to_string());
    assert_eq!(samples(&metrics(&host), "driver_info"), Vec::<String>::new(), "it does not run");
    let host = host
        .file("sys/fs/cgroup/lxc/101/cgroup.procs", &format!("{PID}\n"))
        .file(&format!("proc/{PID}/status"), &format!("NSpid:\t{PID}\t1\n"));
    assert_eq!(samples(&metrics(&host), "driver_info"), Vec::<String>::new(), "it has no driver");
    let libraries = host.path(&format!("proc/{PID}/root/usr/lib64"));
    fs::create_dir_all(&libraries).unwrap();
    std::os::unix::fs::symlink("libcuda.so.550.54.14", libraries.join("libcuda.so.1")).unwrap();
    assert_eq!(
        samples(&metrics(&host), "driver_info"),
        [r#"driver_info{place="container",ctid="101",version="550.54.14"} 1"#]
    );
}

#[test]
fn handoffs_are_counted_and_written_down() {
    // In a tree the way there fails at the first change, and goes back; the way home gets through.
    let host = told(host());
    assert_eq!(host.run("111 pre-start").code, Some(1));
    let text = written(&host);
    assert_eq!(samples(&text, "handoffs_total"), [r#"handoffs_total{direction="vfio",result="failed"} 1"#]);
    assert!(samples(&text, "owner_info")[0].contains(r#"owner="host",vmid="""#), "{text}");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia");
    assert_eq!(host.run("111 post-stop").code, Some(0));
    let text = written(&host);
    assert_eq!(
        samples(&text, "handoffs_total"),
        [
            r#"handoffs_total{direction="vfio",result="failed"} 1"#,
            r#"handoffs_total{direction="home",result="done"} 1"#
        ]
    );
    let counts: Vec<String> = samples(&text, "phase_duration_seconds_count");
    let count = |way: &str, phase: &str, count: u8| {
        format!(r#"phase_duration_seconds_count{{direction="{way}",phase="{phase}"}} {count}"#)
    };
    for expected in [count("vfio", "check", 1), count("home", "wait", 1), count("home", "release", 2)] {
        assert!(counts.contains(&expected), "{expected}: {counts:?}");
    }
    for way in ["vfio", "home"] {
        assert!(text.contains(&format!("gpu_handoff_duration_seconds_count{{direction=\"{way}\"}} 1\n")), "{text}");
    }
    assert!(text.contains("# TYPE gpu_handoff_handoffs_total counter\n") && !text.contains("# EOF"), "{text}");
    assert_eq!(host.path(FILE).metadata().unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(fs::read_dir(host.path("srv")).unwrap().count(), 1);
    // The same as is printed, but for how it is written.
    assert_eq!(samples(&metrics(&host), ""), samples(&text, ""));
    // What the history forgets was counted.
    let host = host.without("var/lib/gpu-handoff/history.jsonl");
    assert_eq!(samples(&metrics(&host), "handoffs_total"), samples(&text, "handoffs_total"));
    assert_eq!(host.path(COUNTERS).metadata().unwrap().permissions().mode() & 0o777, 0o644);
}

/// A refusal is one, and so is a start that finds all done.
#[test]
fn what_else_writes_it() {
    let busy = || with_drm_node(host()).process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let recorded = || settled().record("vm-111", "0000:01:00", "away", "nvidia");
    for (host, call, code, owner) in [
        (busy(), "111 pre-start", 3, r#"owner="host",vmid="""#),
        (settled(), "111 pre-start", 0, r#"owner="none",vmid="""#),
        (settled(), "to-vfio", 0, r#"owner="manual",vmid="""#),
        (recorded(), "reconcile --owed", 1, r#"owner="stranded",vmid="111""#),
        (host(), "reconcile", 0, r#"owner="host",vmid="""#),
        (host(), "settle", 0, r#"owner="host",vmid="""#),
        (host(), "setup pending", 0, r#"owner="host",vmid="""#),
        (host(), "metrics --write", 0, r#"owner="host",vmid="""#),
    ] {
        let host = told(host);
        let run = host.run(call);
        assert_eq!(run.code, Some(code), "{call}: {}", run.err);
        let text = written(&host);
        assert!(samples(&text, "owner_info").concat().contains(owner), "{call}: {}\n{text}", run.err);
    }
    assert_eq!(
        samples(
            &written(&{
                let host = told(busy());
                host.run("111 pre-start");
                host
            }),
            "handoffs_total"
        ),
        [r#"handoffs_total{direction="vfio",result="refused"} 1"#]
    );
}

/// Proxmox waits for a hook, which need not wait for the file.
#[test]
fn a_hook_has_a_unit_write_it() {
    let host = events::with_systemd(told(settled())).file("lib/systemd/system/gpu-handoff-metrics.service", "");
    assert_eq!(host.run("111 pre-start").code, Some(0));
    let asked = fs::read_to_string(host.path("calls")).unwrap();
    assert!(asked.contains("systemctl start --no-block -- gpu-handoff-metrics.service\n"), "{asked}");
    assert_eq!(written(&host), "");
    host.run("to-home");
    assert_ne!(written(&host), "", "a person is told whether it works");
}

#[test]
fn what_does_not_write_it() {
    let plain = || host().vm(112, "cores: 2");
    for (host, calls) in [
        (plain(), &["112 pre-start", "112 post-start", "112 post-stop", "111 post-stop", "999 pre-start"][..]),
        (
            plain(),
            &["--status", "plan 111", "history", "reconcile --dry-run", "to-vfio --dry-run", "metrics", "doctor"],
        ),
    ] {
        let host = told(host);
        let before = host.snapshot();
        for call in calls {
            host.run(call);
            assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}");
        }
    }
    // Nobody asked for it.
    let host = host();
    host.run("111 pre-start");
    assert!(!host.path(FILE).exists() && !host.has_own_file("metrics.lock"));
    let message = "metrics.textfile is not set in /etc/gpu-handoff/config.json: nothing to write to";
    assert_eq!(host.run("metrics --write"), refusal(2, message));
}

/// Whatever is wrong with it, a handoff goes as it would have gone.
#[test]
fn a_file_that_cannot_be_written() {
    let recorded = || host().record("vm-111", "0000:01:00", "away", "nvidia");
    for (host, call, code) in [
        (recorded(), "111 post-stop", 0),
        (recorded(), "reconcile", 0),
        (settled(), "111 pre-start", 0),
        (host(), "111 pre-start", 1),
    ] {
        let host = told(host).without("srv");
        let run = host.run(call);
        assert_eq!(run.code, Some(code), "{call}: {}", run.err);
        let warning = format!(
            "gpu-handoff: warning: /{FILE} was not written: No such file or directory (os error 2); only the metrics are affected\n"
        );
        assert_eq!(run.err.matches(&warning).count(), 1, "{call}: {}", run.err);
        assert!(!host.path("srv").exists());
        let run = host.run("metrics --write");
        assert_eq!(run, refusal(1, &format!("/{FILE} was not written: No such file or directory (os error 2)")));
    }
}

#[test]
fn counters_that_are_broken_or_cannot_be_written() {
    let recorded = || host().record("vm-111", "0000:01:00", "away", "nvidia");
    for broken in ["", "{", "\0\0\0", "[1]", r#"{"schema":1,"handoffs":{"home":[1,"x"]},"times":7}"#, r#"{"schema":9}"#]
    {
        let host = recorded().file(COUNTERS, broken);
        assert_eq!(samples(&metrics(&host), "handoffs_total"), Vec::<String>::new(), "{broken}");
        let run = host.run("111 post-stop");
        assert_eq!(run.code, Some(0), "{broken}: {}", run.err);
        assert!(!run.err.contains("warning"), "{broken}: {}", run.err);
        let home = r#"handoffs_total{direction="home",result="done"} 1"#;
        assert_eq!(samples(&metrics(&host), "handoffs_total"), [home], "{broken}");
    }
    let host = recorded();
    fs::create_dir_all(host.path(COUNTERS)).unwrap();
    let run = host.run("111 post-stop");
    assert_eq!(run.code, Some(0), "{}", run.err);
    let warning = format!("gpu-handoff: warning: {}: Is a directory (os error 21)\n", host.path(COUNTERS).display());
    assert_eq!(run.err.matches(&warning).count(), 1, "{}", run.err);
    assert_eq!(host.history().len(), 1);
}
