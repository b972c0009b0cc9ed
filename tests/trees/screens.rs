use super::*;
use std::env;

// What --status looks like: tests/fixtures/status. `UPDATE=1 cargo test --test trees screens` writes them anew.

const COLUMNS: usize = 80;

/// The screen is the one that is kept, whatever the terminal's width, and fits into 80 columns.
#[track_caller]
fn shows(host: &Host, name: &str) {
    let at = |columns: &str| {
        let output = host.command("--status").env("COLUMNS", columns).output().unwrap();
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
        String::from_utf8(output.stdout).unwrap()
    };
    let screen = at("80");
    assert_eq!(at("160"), screen);
    for line in screen.lines() {
        assert!(line.chars().count() <= COLUMNS, "{line}");
    }
    // Others than root are not shown who uses a card.
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let path = format!("{}/tests/fixtures/status/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    if env::var_os("UPDATE").is_some() {
        fs::write(&path, &screen).unwrap();
    }
    assert_eq!(screen, fs::read_to_string(&path).unwrap_or_default(), "{path}");
}

const HOOK: &str = "hookscript: local:snippets/gpu-handoff\n";

fn with_version(host: Host) -> Host {
    let version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.105.08  Wed Oct 29 2025\n";
    host.file("proc/driver/nvidia/version", version)
}

fn with_model(host: Host, slot: &str, minor: u32, model: &str) -> Host {
    let information = format!("proc/driver/nvidia/gpus/{slot}.0/information");
    host.file(&information, &format!("Model: \t\t {model}\nIRQ:   \t\t 40\nDevice Minor: \t {minor}\n"))
}

fn last(host: Host, slot: &str, direction: &str, vmid: Option<u32>) -> Host {
    let phases = json!([{"name": "check", "ms": 65}, {"name": "release", "ms": 225}, {"name": "bind", "ms": 50}]);
    let last = json!({"schema": 1, "slots": [slot], "reason": null, "direction": direction, "vmid": vmid, "exit": 0, "ms": 375, "phases": phases,
        "time": "2026-11-20T21:04:11Z"});
    host.file(&format!("run/gpu-handoff/last-{slot}"), &last.to_string())
}

/// Two cards of the same kind, idle; who names which of them, and with which hook.
fn two_alike() -> Host {
    let host = with_version(host()).card("0000:02:00", "nvidia", "snd_hda_intel");
    let host = with_model(host, "0000:01:00", 0, "NVIDIA GeForce RTX 4090");
    let host = with_model(host, "0000:02:00", 1, "NVIDIA GeForce RTX 4090");
    let attached = json!({"schema": 1, "style": "mount", "slots": ["0000:01:00", "0000:02:00"], "dri": false, "lines": [],
        "newline": false});
    last(host, "0000:01:00", "home", Some(111))
        .vm(111, &format!("hostpci0: 0000:01:00,pcie=1\n{HOOK}"))
        .vm(112, "hostpci0: 02:00.0")
        .file("etc/pve/qemu-server/113.conf", "name: a-very-long-name-of-a-machine.example.org\nhostpci0: 02:00\n")
        .vm(114, "hostpci0: 02:00\nhookscript: local:snippets/backup.sh")
        .vm(115, "cores: 2")
        .vm(116, "hostpci0: 01:00\ntemplate: 1")
        .file("etc/pve/lxc/101.conf", "hostname: jellyfin\n")
        .file("var/lib/gpu-handoff/containers/101.json", &attached.to_string())
}

#[test]
fn two_cards_alike_that_are_idle() {
    shows(&two_alike(), "idle");
}

/// With a VM, by hand, and three that want something typed. The name of a card that is away is on record.
#[test]
fn cards_away_and_cards_in_trouble() {
    let mut host = with_version(Host::new());
    for slot in ["0000:01:00", "0000:02:00", "0000:03:00"] {
        host = host.card(slot, "vfio-pci", "vfio-pci");
    }
    for slot in ["0000:04:00", "0000:05:00"] {
        host = host.card(slot, "nvidia", "snd_hda_intel");
    }
    host = host.record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID);
    let mut record = host.own_file("vm-111");
    record["functions"][0]["model"] = json!("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition");
    let host = last(host, "0000:01:00", "vfio", Some(111))
        .file("run/gpu-handoff/vm-111", &record.to_string())
        .vm(111, &format!("hostpci0: 0000:01:00,pcie=1\n{HOOK}"))
        .record("manual-0000:02:00", "0000:02:00", "away", "nvidia")
        .record("vm-112", "0000:03:00", "returning", "nvidia")
        .file("usr/share/misc/pci.ids", "#\n10de  NVIDIA Corporation\n\t2684  AD102 [GeForce RTX 4090]\n");
    let owed = json!({"schema": 1, "entries": [{"what": {"container": 101}, "slots": ["0000:05:00"]}]});
    let host = last(host, "0000:02:00", "vfio", None)
        .wedged("0000:04:00", PID + 7)
        .alive(PID + 7)
        .file("run/gpu-handoff/to-start", &owed.to_string());
    let host = host.file(&format!("{}/drm/card4/dev", device("0000:04:00.0")), NULL_NUMBER);
    shows(&host.process(PID + 8, "python3", "/job.scope", &[NULL]), "trouble");
}

/// Neither a name nor an IOMMU group, many kinds of functions, and a set-up that is not done.
#[test]
fn a_card_of_which_little_is_known() {
    let host = Host::new()
        .function("0000:81:00.0", "030200", "10de:2330", "", 1)
        .function("0000:81:00.1", "068000", "10de:22a3", "nvidia-nvswitch", 1)
        .function("0000:81:00.2", "0c0330", "10de:1ad8", "xhci_hcd", 128)
        .without(&format!("{}/iommu_group", device("0000:81:00.0")))
        .config(r#"{"gpus":{"81:00":{"home":"nouveau"}}}"#)
        .file("run/reboot-required.pkgs", "gpu-handoff\n");
    shows(&host, "unknown");
}

/// As the JSON has it.
#[test]
fn names_and_claims_for_programs() {
    let told = status(&two_alike());
    assert_eq!(told["driver"], json!("580.105.08"));
    let gpu = &told["gpus"][1];
    assert_eq!(gpu["name"], json!("NVIDIA GeForce RTX 4090"));
    let guest = |vmid: Value, ctid: Value, name: &str, hook: Value| json!({"vmid": vmid, "ctid": ctid, "name": name, "hook": hook});
    let guests = json!([
        guest(json!(112), Value::Null, "test", json!(false)),
        guest(json!(113), Value::Null, "a-very-long-name-of-a-machine.example.org", json!(false)),
        guest(json!(114), Value::Null, "test", json!(false)),
        guest(Value::Null, json!(101), "jellyfin", Value::Null),
    ]);
    assert_eq!(gpu["guests"], guests);
    assert_eq!((&gpu["since"], &told["gpus"][0]["since"]), (&Value::Null, &json!("2026-11-20T21:04:11Z")));
}

/// A handoff keeps what the card is called, and a guest without one looks for no name.
#[test]
fn the_name_is_kept_while_the_card_is_away() {
    let host = with_model(settled(), "0000:01:00", 0, "NVIDIA GeForce RTX 4090");
    assert_eq!(host.run("111 pre-start").code, Some(0));
    assert_eq!(host.own_file("vm-111")["functions"][0]["model"], json!("NVIDIA GeForce RTX 4090"));
    assert_eq!(host.own_file("vm-111")["functions"][1]["model"], Value::Null);
    let away = host.without("proc/driver/nvidia");
    assert_eq!(status(&away)["gpus"][0]["name"], json!("NVIDIA GeForce RTX 4090"));
}
