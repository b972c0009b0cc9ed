use super::doctor::{findings, fires, hooked, of, silent};
use super::owed::{calls, with_systemd};
use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, Instant};

// Several nodes that share /etc/pve

const MEMBERS: &str = r#"{"nodename": "pve", "version": 3,
"cluster": { "name": "lab", "version": 3, "nodes": 3, "quorate": 1 },
"nodelist": {
  "pve": { "id": 1, "online": 1, "ip": "10.0.0.1"},
  "pve2": { "id": 2, "online": 1, "ip": "10.0.0.2"},
  "pve3": { "id": 3, "online": 0, "ip": "10.0.0.3"}
  }
}"#;

/// As the link `local` in pmxcfs.
fn in_a_cluster(host: Host) -> Host {
    let host = host.file("etc/pve/corosync.conf", "").file("etc/pve/.members", MEMBERS);
    let host =
        ["pve", "pve2", "pve3"].iter().fold(host, |host, node| host.file(&format!("etc/pve/nodes/{node}/x"), ""));
    host.link("etc/pve/local", "etc/pve/nodes/pve")
}

/// The first node, with VM 111.
fn first(host: Host) -> Host {
    in_a_cluster(hooked(host, 111, ""))
}

fn with_card() -> Host {
    Host::new()
        .card("0000:01:00", "nvidia", "snd_hda_intel")
        .file("proc/driver/nvidia/version", "NVRM version: x Kernel Module  550.163.01  x\n")
}

/// Another node of the same cluster.
fn other(name: &str, host: Host, first: &Host) -> Host {
    let host = host.file("proc/sys/kernel/hostname", &format!("{name}\n")).file("etc/x", "");
    symlink(first.path("etc/pve"), host.path("etc/pve")).unwrap();
    host
}

fn told(host: &Host, node: &str) -> Option<Value> {
    let text = fs::read_to_string(host.path(&format!("etc/pve/nodes/{node}/gpu-handoff.json"))).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

/// What a node told, as another would have.
fn tell(host: Host, node: &str, change: impl Fn(&mut Value)) -> Host {
    let card = json!({"slot": "0000:01:00", "name": "GeForce", "id": "10de:2684",
        "owner": {"kind": "host", "vmid": null}, "since": null});
    let mut told = json!({"schema": 1, "time": "2026-11-20T12:00:00Z", "version": env!("CARGO_PKG_VERSION"),
        "kernel": "6.14.8-2-pve", "driver": "550.163.01", "hookscript": true, "gpus": [card]});
    change(&mut told);
    host.file(&format!("etc/pve/nodes/{node}/gpu-handoff.json"), &told.to_string())
}

#[track_caller]
fn publishes(host: &Host) {
    assert_eq!(host.run("publish"), Run { code: Some(0), out: String::new(), err: String::new() });
}

/// It was told so long ago that it may be told again.
fn later(host: &Host, node: &str) {
    let path = host.path(&format!("etc/pve/nodes/{node}/gpu-handoff.json"));
    let mut told = told(host, node).unwrap();
    told["time"] = json!("2026-11-20T12:00:00Z");
    fs::write(path, told.to_string()).unwrap();
}

#[test]
fn each_node_tells_what_it_has_and_all_of_them_see_it() {
    let first = first(with_card());
    let second = other("pve2", Host::new().card("0000:81:00", "vfio-pci", "vfio-pci"), &first);
    publishes(&first);
    publishes(&second);
    let file = fs::metadata(first.path("etc/pve/nodes/pve2/gpu-handoff.json")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o640);
    assert!(file.len() < 1024, "{}", file.len());
    let ours = told(&first, "pve").unwrap();
    assert_eq!((&ours["driver"], &ours["hookscript"]), (&json!("550.163.01"), &json!(true)));
    assert_eq!(ours["gpus"][0]["owner"], json!({"kind": "host", "vmid": null}));
    let theirs = told(&first, "pve2").unwrap();
    assert_eq!((&theirs["driver"], &theirs["hookscript"]), (&Value::Null, &json!(false)));
    let version = env!("CARGO_PKG_VERSION");
    later(&first, "pve2");
    let out = first.run("--status --cluster").out;
    let days = out.split("told ").nth(1).and_then(|rest| rest.split(" ago").next()).unwrap();
    assert!(days.ends_with(" days"), "{out}");
    let name = "AD102 [GeForce RTX 4090]";
    let name = if out.contains(name) { name } else { "10de:2684" };
    assert_eq!(
        out,
        format!(
            "pve  this node, gpu-handoff {version}, driver 550.163.01\n  0000:01:00  host  {name}\n\
             pve2  online, told {days} ago, gpu-handoff {version}\n  0000:81:00  none  {name}\n\
             pve3  offline, has told nothing\n"
        )
    );
    let all: Value = serde_json::from_str(&first.run("--status --cluster --json").out).unwrap();
    let short: Vec<_> = all["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (&node["node"], &node["online"], node["told"].is_null()))
        .collect();
    let word = |name: &str| json!(name);
    assert_eq!(
        short,
        [
            (&word("pve"), &json!(true), false),
            (&word("pve2"), &json!(true), false),
            (&word("pve3"), &json!(false), true)
        ]
    );
    assert_eq!(all["quorate"], true);
    // From the second it reads the same, but for which of them it is.
    assert!(second.run("--status --cluster").out.contains("pve  online, told"));
    let usage = first.run("--status --cluster --watch");
    assert_eq!((usage.code, usage.err.contains("exclude each other")), (Some(2), true), "{}", usage.err);
}

#[test]
fn only_what_is_another_than_before_is_written() {
    let host = first(with_card());
    publishes(&host);
    later(&host, "pve");
    let path = host.path("etc/pve/nodes/pve/gpu-handoff.json");
    let before = fs::metadata(&path).unwrap().ino();
    publishes(&host);
    assert_eq!(fs::metadata(&path).unwrap().ino(), before);
    let host = host.wedged("0000:01:00", PID).alive(PID);
    publishes(&host);
    assert_ne!(fs::metadata(&path).unwrap().ino(), before);
    assert_eq!(told(&host, "pve").unwrap()["gpus"][0]["owner"]["kind"], "wedged");
    // What cannot be understood is written anew.
    fs::write(&path, "{").unwrap();
    publishes(&host);
    assert_eq!(told(&host, "pve").unwrap()["schema"], 1);
}

#[test]
fn changes_are_told_some_time_apart() {
    let host = first(with_card());
    publishes(&host);
    let begin = Instant::now();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let path = host.path("etc/pve/nodes/pve/gpu-handoff.json");
    let mut told_before = told(&host, "pve").unwrap();
    told_before["time"] = json!(gpu_handoff::utc::utc(now - 8));
    fs::write(&path, told_before.to_string()).unwrap();
    let host = host.wedged("0000:01:00", PID).alive(PID);
    publishes(&host);
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
    assert_eq!(told(&host, "pve").unwrap()["gpus"][0]["owner"]["kind"], "wedged");
    // A clock that was set back keeps nobody waiting.
    let mut ahead = told(&host, "pve").unwrap();
    ahead["time"] = json!(gpu_handoff::utc::utc(now + 3600));
    fs::write(&path, ahead.to_string()).unwrap();
    let begin = Instant::now();
    publishes(&host.without("run/gpu-handoff/wedged-0000:01:00"));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

/// Whoever comes while one waits has nothing to add.
#[test]
fn one_waits_and_no_more() {
    let host = first(with_card()).file("run/gpu-handoff/publish-next.lock", "");
    let lock = fs::File::open(host.path("run/gpu-handoff/publish-next.lock")).unwrap();
    lock.lock().unwrap();
    publishes(&host);
    assert_eq!(told(&host, "pve"), None);
    drop(lock);
    publishes(&host);
    assert!(told(&host, "pve").is_some());
}

#[test]
fn without_quorum_nothing_is_written_and_nothing_is_said() {
    let host = first(with_card());
    fs::set_permissions(host.path("etc/pve/nodes/pve"), fs::Permissions::from_mode(0o555)).unwrap();
    let mut child = host.command("publish").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "it does not try again");
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.stdout, output.stderr), (Vec::new(), Vec::new()));
    assert_eq!(told(&host, "pve"), None);
    let without = MEMBERS.replace("\"quorate\": 1", "\"quorate\": 0");
    let out = host.file("etc/pve/.members", &without).run("--status --cluster").out;
    assert!(out.ends_with("this node has no quorum: what others do now it is not told\n"), "{out}");
}

#[test]
fn a_host_by_itself_tells_nobody() {
    let host = hooked(with_card(), 111, "");
    publishes(&host);
    assert!(!host.path("etc/pve/nodes").exists());
    let version = env!("CARGO_PKG_VERSION");
    let out = host.run("--status --cluster").out;
    assert!(
        out.starts_with(&format!("pve  this node, gpu-handoff {version}, driver 550.163.01\n  0000:01:00  host")),
        "{out}"
    );
    assert_eq!(out.lines().count(), 2);
}

fn asks(host: &Host) -> usize {
    calls(host).iter().filter(|call| call.ends_with(" publish")).count()
}

/// A start is told by its watcher: Proxmox does not wait for that.
#[test]
fn what_may_have_changed_something_has_it_told() {
    let away = || settled().record("vm-111", "0000:01:00", "away", "vfio-pci");
    for (call, host, times) in [
        ("111 pre-start", in_a_cluster(settled()), 0),
        ("watch 111", in_a_cluster(away()), 1),
        ("111 post-stop", in_a_cluster(away()), 1),
        ("111 post-stop", in_a_cluster(settled()), 0),
        ("111 post-stop", away(), 0),
        ("to-vfio 0000:01:00", in_a_cluster(settled()), 1),
        ("reconcile", in_a_cluster(settled()), 1),
        ("reconcile --owed", in_a_cluster(settled()), 0),
        ("--status", in_a_cluster(settled()), 0),
        ("publish", in_a_cluster(settled()), 0),
    ] {
        let host = with_systemd(host);
        let run = host.run(call);
        assert_eq!(run.code, Some(0), "{call}: {}", run.err);
        // It is not waited for.
        let end = Instant::now() + Duration::from_secs(5);
        while asks(&host) < times && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(asks(&host), times, "{call}: {:?}", calls(&host));
    }
}

#[test]
fn what_another_node_told_may_be_broken() {
    let host = tell(first(with_card()), "pve3", |_| {}).file("etc/pve/nodes/pve2/gpu-handoff.json", "{\"schema\":1");
    let run = host.run("--status --cluster");
    assert_eq!(run.code, Some(0));
    assert_eq!(run.err, "gpu-handoff: warning: /etc/pve/nodes/pve2/gpu-handoff.json cannot be understood\n");
    assert!(run.out.contains("pve2  online, what it told cannot be understood\npve3  offline, told "), "{}", run.out);
    let all: Value = serde_json::from_str(&host.run("--status --cluster --json").out).unwrap();
    assert_eq!(all["nodes"][1]["told"], Value::Null);
    assert!(all["nodes"][1]["problem"].as_str().unwrap().contains("pve2"));
    // Nobody's words become anything but words.
    let host = tell(host, "pve2", |told| told["version"] = json!("0.1\u{1b}[2J"));
    assert!(host.run("--status --cluster").out.contains("gpu-handoff 0.1?[2J"));
}

// HA

const HA: &str = "etc/pve/ha/resources.cfg";

fn used(host: Host) -> Host {
    let host = host.file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), NULL_NUMBER);
    host.process(PID, "ollama", "/system.slice/ollama.service", &[NULL])
}

/// The node where HA may start it instead, at the end of why it is refused.
#[test]
fn a_refusal_names_a_node_whose_card_is_free() {
    let host = used(first(with_card()));
    let by_itself = host.run("111 pre-start").err;
    assert!(!by_itself.contains("ha-manager"), "{by_itself}");
    let host = host.file(HA, "vm: 111\n\tstate started\n");
    let ask = |host: &Host| host.run("111 pre-start");
    assert_eq!(ask(&host).err, by_itself);
    let now = |told: &mut Value| told["time"] = json!("2999-01-01T00:00:00Z");
    let host = tell(host, "pve2", now);
    let run = ask(&host);
    assert_eq!(run.code, Some(3), "{}", run.err);
    let hint = "; or where 0000:01:00 was free 0 s ago: ha-manager relocate vm:111 pve2\n";
    assert!(run.err.ends_with(hint), "{}", run.err);
    // Not where it is used, elsewhere in the host, or on a node that is down or that HA keeps it from.
    let host = tell(host, "pve2", |told| told["gpus"][0]["owner"] = json!({"kind": "vm", "vmid": 112}));
    assert_eq!(ask(&host).err, by_itself);
    let host = tell(host, "pve2", |told| told["gpus"][0]["slot"] = json!("0000:02:00"));
    let host = tell(host, "pve3", now);
    assert_eq!(ask(&host).err, by_itself);
    let host = tell(host, "pve2", now);
    assert!(ask(&host).err.ends_with(hint));
    let rule = "node-affinity: a\n\tnodes pve,pve3\n\tresources vm:111\n\tstrict 1\n";
    assert_eq!(ask(&host.file("etc/pve/ha/rules.cfg", rule)).err, by_itself);
}

/// Two lines with one mapping take two cards, wherever they are.
#[test]
fn two_cards_are_two() {
    let map = |node: &str, bus: u32| format!("\tmap id=10de:2684,iommugroup={bus},node={node},path=0000:0{bus}:00\n");
    let maps = [map("pve", 1), map("pve", 2), map("pve2", 1), map("pve2", 2)].concat();
    let host = used(in_a_cluster(with_card().card("0000:02:00", "nvidia", "snd_hda_intel")));
    let host = host.vm(111, "hostpci0: mapping=gpu\nhostpci1: mapping=gpu\n").file(HA, "vm: 111\n");
    let host = host.file("etc/pve/mapping/pci.cfg", &format!("gpu\n{maps}"));
    let one = tell(host, "pve2", |_| {});
    assert!(!one.run("111 pre-start").err.contains("relocate"));
    let two = tell(one, "pve2", |told| {
        let mut second = told["gpus"][0].clone();
        second["slot"] = json!("0000:02:00");
        told["gpus"].as_array_mut().unwrap().push(second);
    });
    let err = two.run("111 pre-start").err;
    assert!(err.contains("or where 0000:01:00 0000:02:00 was free"), "{err}");
}

// doctor

fn managed() -> Host {
    first(with_card()).file(HA, "vm: 111\n\tstate started\n")
}

#[test]
fn a_node_that_lacks_the_card() {
    let host = tell(managed(), "pve2", |told| told["gpus"] = json!([]));
    let words = [
        "warning",
        "VM 111 may start on pve2, which has no NVIDIA GPU at 0000:01:00",
        "ha-manager groupadd gpu-111 --nodes pve,pve3 --restricted 1 && ha-manager set vm:111 --group gpu-111",
    ];
    let finding = fires("cluster-no-card", &host, "/etc/pve/ha/resources.cfg", &words);
    assert_eq!(finding["guest"], 111);
    // HA has rules since Proxmox VE 9.
    let host = host.file("usr/share/perl5/PVE/HA/Rules.pm", "");
    let rule = "ha-manager rules add node-affinity gpu-111 --resources vm:111 --nodes pve,pve3 --strict 1";
    fires("cluster-no-card", &host, "/etc/pve/ha/resources.cfg", &[rule]);
    let host = host.file("etc/pve/ha/rules.cfg", "node-affinity: a\n\tnodes pve\n\tresources vm:111\n");
    fires(
        "cluster-no-card",
        &host,
        "/etc/pve/ha/resources.cfg",
        &["ha-manager rules set node-affinity a --nodes pve,pve3 --strict 1"],
    );
    let strict = |nodes: &str| format!("node-affinity: a\n\tnodes {nodes}\n\tresources vm:111\n\tstrict 1\n");
    let host = host.file("etc/pve/ha/rules.cfg", &strict("pve:2,pve3"));
    silent("cluster-no-card", &host);
    fires(
        "cluster-no-card",
        &host.file("etc/pve/ha/rules.cfg", &strict("pve2:1")),
        "/etc/pve/ha/resources.cfg",
        &["pve2"],
    );
    silent("cluster-no-card", &tell(managed(), "pve2", |_| {}));
    // Of a VM that HA leaves alone nobody knows where it goes.
    silent("cluster-no-card", &tell(first(with_card()), "pve2", |told| told["gpus"] = json!([])));
}

#[test]
fn a_mapping_that_another_node_does_not_bear_out() {
    let map = |node: &str, slot: &str| format!("\tmap id=10de:2684,iommugroup=1,node={node},path={slot}\n");
    let host = |more: &str| {
        let host = in_a_cluster(with_card())
            .file("usr/sbin/gpu-handoff", "")
            .link("var/lib/vz/snippets/gpu-handoff", "usr/sbin/gpu-handoff");
        let host = host.vm(111, "hookscript: local:snippets/gpu-handoff\nhostpci0: mapping=gpu,pcie=1\n");
        let host = host.file("etc/pve/mapping/pci.cfg", &format!("gpu\n{}{more}", map("pve", "0000:01:00")));
        tell(host, "pve2", |_| {})
    };
    silent("cluster-no-card", &host(""));
    silent("cluster-no-card", &host(&map("pve2", "0000:01:00")));
    let stale = host(&map("pve2", "0000:02:00"));
    let words = [
        "VM 111 may start on pve2, which has no NVIDIA GPU where its mapping gpu says",
        "pvesh get /cluster/mapping/pci",
    ];
    fires("cluster-no-card", &stale, "/etc/pve/mapping/pci.cfg", &words);
    // HA does not know of mappings.
    let words = ["VM 111 may start on pve2, which is not in its mapping gpu"];
    let all = findings(&host("").file(HA, "vm: 111\n"), "doctor");
    let lacking = of(&all, "cluster-no-card");
    assert_eq!(lacking.len(), 2, "{lacking:#?}");
    assert!(lacking[0]["found"].as_str().unwrap().contains(words[0]), "{lacking:#?}");
}

#[test]
fn a_node_that_lacks_hook_driver_or_version() {
    let place = "/etc/pve/ha/resources.cfg";
    let host = tell(managed(), "pve2", |told| told["hookscript"] = json!(false));
    fires(
        "cluster-no-hook",
        &host,
        place,
        &[
            "VM 111 may start on pve2, where its hookscript local:snippets/gpu-handoff is not",
            "apt install --reinstall",
        ],
    );
    let host = tell(managed(), "pve2", |told| told["driver"] = Value::Null);
    fires(
        "cluster-no-driver",
        &host,
        place,
        &["note", "pve2, which has no driver", "gpu-handoff setup driver, on pve2"],
    );
    let host = tell(managed(), "pve2", |told| told["version"] = json!("0.0.1"));
    fires(
        "cluster-versions",
        &host,
        "/etc/pve/nodes/pve2/gpu-handoff.json",
        &["note", "pve2 has gpu-handoff 0.0.1, this node"],
    );
    let well = tell(managed(), "pve2", |_| {});
    silent("cluster-no-hook", &well);
    silent("cluster-no-driver", &well);
    silent("cluster-versions", &well);
    // One that has told something has the program.
    fires("vm-not-on-all-nodes", &well, "/etc/pve/corosync.conf", &["note", ", on pve3\""]);
    silent("vm-not-on-all-nodes", &tell(well, "pve3", |_| {}));
}

#[test]
fn a_report_to_strangers_names_no_node() {
    let host = tell(managed(), "pve2", |told| told["gpus"] = json!([])).file("etc/pve/nodes/gone/x", "");
    let out = host.run("doctor --report").out;
    assert!(out.contains("VM 111 may start on HOST"), "{out}");
    assert!(!out.contains("pve2") && !out.contains("pve3"), "{out}");
}
