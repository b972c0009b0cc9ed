use super::*;
use nix::fcntl::{Flock, FlockArg};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

// container attach, container detach

pub const CONFIG: &str = "etc/pve/lxc/101.conf";
pub const RECORD: &str = "var/lib/gpu-handoff/containers/101.json";

/// What a container's configuration says before it is attached.
pub const BEFORE: &str = "arch: amd64\nhostname: infer\nrootfs: local:101/a.raw\n\n[snap]\narch: amd64\n";

const RULES: &str = "lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 511:* rwm\n";

/// The lines that style mount adds.
fn lines(rules: &str, gpu: &str) -> String {
    let nodes = [gpu, "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"];
    let mounts = nodes.map(|node| format!("lxc.mount.entry: /dev/{node} dev/{node} none bind,optional,create=file\n"));
    format!("{rules}{}", mounts.concat())
}

fn devs() -> String {
    let nodes = ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"];
    (0..).zip(nodes).map(|(number, node)| format!("dev{number}: /dev/{node},mode=0666\n")).collect()
}

/// `BEFORE` with these lines at the end of its main section.
fn with(added: &str) -> String {
    BEFORE.replace("\n\n[snap]", &format!("\n{added}\n[snap]"))
}

pub fn uvm(host: Host, major: &str) -> Host {
    host.file("proc/devices", &format!("Character devices:\n195 nvidia\n{major}\nBlock devices:\n511 nvidia-uvm\n"))
}

pub fn minor(host: Host, slot: &str, minor: &str) -> Host {
    host.file(
        &format!("proc/driver/nvidia/gpus/{slot}.0/information"),
        &format!("Model: \t\t x\nDevice Minor: \t {minor}\n"),
    )
}

/// The driver of the only card is loaded, and there is container 101.
pub fn ready() -> Host {
    let host = minor(uvm(host(), "511 nvidia-uvm"), "0000:01:00", "0").file("etc/pve/local/x", "");
    container(host, BEFORE)
}

pub fn two_cards() -> Host {
    minor(ready().card("0000:02:00", "nvidia", "snd_hda_intel"), "0000:02:00", "1")
}

pub fn container(host: Host, config: &str) -> Host {
    host.file(CONFIG, config)
}

pub fn config(host: &Host) -> String {
    String::from_utf8_lossy(&fs::read(host.path(CONFIG)).unwrap()).into_owned()
}

pub fn record(host: &Host) -> Value {
    serde_json::from_slice(&fs::read(host.path(RECORD)).unwrap()).unwrap()
}

/// A success, with these lines.
#[track_caller]
fn says(host: &Host, call: &str, lines: &[&str]) {
    let Run { code, out, err } = host.run(call);
    let err: Vec<&str> = err.lines().map(|line| line.strip_prefix("gpu-handoff: ").unwrap()).collect();
    assert_eq!((code, out.as_str(), err.as_slice()), (Some(0), "", lines), "{call}");
}

pub fn mode(path: PathBuf) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn names(path: PathBuf) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Where a file is written before it is renamed.
fn beside(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').unwrap();
    format!("{folder}/.{name}.new")
}

#[test]
fn attached_and_detached() {
    let host = ready();
    let dry: Vec<String> = lines(RULES, "nvidia0").lines().map(|line| format!("  add       {line}")).collect();
    let title = "container 101 gets 0000:01:00".to_string();
    let expected: Vec<&str> = [&title].into_iter().chain(&dry).map(String::as_str).collect();
    plans(&host, "container attach 101 --dry-run", &expected);
    says(&host, "container attach 101", &["container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf"]);
    assert_eq!(config(&host), with(&lines(RULES, "nvidia0")));
    assert_eq!(mode(host.path(CONFIG)), 0o640);
    assert_eq!(names(host.path("etc/pve/lxc")), ["101.conf"]);
    assert_eq!(record(&host)["slots"], json!(["0000:01:00"]));
    // Once more: nothing.
    let before = host.snapshot();
    says(&host, "container attach 101", &["container 101 has 0000:01:00 already: nothing to do"]);
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    plans(&host, "container attach 101 --dry-run", &[&title, "  nothing to do"]);

    let dry: Vec<String> = dry.iter().map(|line| line.replace("add   ", "remove")).collect();
    let title = "container 101 is detached from 0000:01:00".to_string();
    let expected: Vec<&str> = [&title].into_iter().chain(&dry).map(String::as_str).collect();
    plans(&host, "container detach 101 --dry-run", &expected);
    says(&host, "container detach 101", &["container 101: 7 lines removed in /etc/pve/lxc/101.conf"]);
    assert_eq!(config(&host), BEFORE);
    assert_eq!(mode(host.path(CONFIG)), 0o640);
    assert!(!host.path(RECORD).exists());
    let nothing = "container 101: nothing was attached by this host: nothing to do";
    says(&host, "container detach 101", &[nothing]);
    plans(&host, "container detach 101 --dry-run", &[nothing]);
}

/// The container that runs is told how to get what it was given.
#[test]
fn a_container_that_runs() {
    let host = ready().file("sys/fs/cgroup/lxc/101/cgroup.events", "populated 1\nfrozen 0\n");
    says(
        &host,
        "container attach 101 --style dev",
        &[
            "container 101 gets 0000:01:00: 4 lines added in /etc/pve/lxc/101.conf",
            "container 101 runs and gets it when it starts again: pct reboot 101",
        ],
    );
    says(
        &host,
        "container detach 101",
        &[
            "container 101: 4 lines removed in /etc/pve/lxc/101.conf",
            "container 101 runs and keeps it until it starts again: pct reboot 101",
        ],
    );
}

#[test]
fn the_other_style_takes_the_place_of_the_first() {
    let host = ready().file("proc/driver/nvidia/params", "DeviceFileMode: 432\nModifyDeviceFiles: 0\n");
    says(&host, "container attach 101", &["container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf"]);
    let line = "container 101 gets 0000:01:00: 4 lines added, 7 removed in /etc/pve/lxc/101.conf";
    says(&host, "container attach 101 --style dev", &[line]);
    assert_eq!(config(&host), with(&devs().replace("0666", "0660")));
    says(&host, "container detach 101", &["container 101: 4 lines removed in /etc/pve/lxc/101.conf"]);
    assert_eq!(config(&host), BEFORE);
}

/// Said once: style, GPUs and DRM nodes stay until another call says otherwise.
#[test]
fn what_is_not_said_stays() {
    let render = format!("{}/drm/renderD128/dev", device("0000:02:00.0"));
    let host = two_cards().file(&render, "226:128\n");
    host.run("container attach 101 --gpu 02:00 --style dev --dri");
    let attached = config(&host);
    assert!(attached.contains("renderD128,mode=0666"), "{attached}");
    says(&host, "container attach 101", &["container 101 has 0000:02:00 already: nothing to do"]);
    host.run("container attach 101 --style mount");
    assert!(config(&host).contains("/dev/dri/renderD128 dev/dri") && !config(&host).contains("mode="));
    host.run("container attach 101 --gpu 01:00 --style dev");
    assert!(config(&host).contains("/dev/nvidia0,") && !config(&host).contains("/dev/nvidia1"), "{}", config(&host));
    // Another container, or a card that is no more: as if it were the first time.
    let several =
        "there are several NVIDIA GPUs, say which: 0000:01:00 or 0000:02:00 (--gpu SLOT, also more than once)";
    refuses(&container(host, BEFORE), "container attach 101", 2, several);
}

#[test]
fn one_of_two_cards() {
    let host = two_cards();
    let several =
        "there are several NVIDIA GPUs, say which: 0000:01:00 or 0000:02:00 (--gpu SLOT, also more than once)";
    refuses(&host, "container attach 101", 2, several);
    says(
        &host,
        "container attach 101 --gpu 02:00",
        &["container 101 gets 0000:02:00: 9 lines added in /etc/pve/lxc/101.conf"],
    );
    let rules: String = ["195:1", "195:255", "195:254", "511:*"]
        .map(|number| format!("lxc.cgroup2.devices.allow: c {number} rwm\n"))
        .concat();
    assert_eq!(config(&host), with(&lines(&rules, "nvidia1")));
    // Both: the rules for all of them.
    let both = "container 101 gets 0000:02:00 0000:01:00: 1 line added, 1 replaced, 2 removed in /etc/pve/lxc/101.conf";
    let Run { err, .. } = host.run("container attach 101 --gpu 02:00 --gpu 0000:01:00.0 --gpu 0000:02:00");
    assert!(err.contains("container 101 gets 0000:02:00 0000:01:00: "), "{err} {both}");
    let allowed = config(&host);
    assert!(allowed.contains("c 195:* rwm") && !allowed.contains("c 195:1 rwm"), "{allowed}");
    says(&host, "container detach 101", &["container 101: 8 lines removed in /etc/pve/lxc/101.conf"]);
    assert_eq!(config(&host), BEFORE);
}

#[test]
fn nodes_for_drawing() {
    let drm = |host: Host, name: &str, number: &str| {
        host.file(&format!("{}/drm/{name}/dev", device("0000:01:00.0")), &format!("{number}\n"))
    };
    let host = drm(drm(ready(), "card1", "226:1"), "renderD129", "226:129");
    says(
        &host,
        "container attach 101 --dri",
        &["container 101 gets 0000:01:00: 11 lines added in /etc/pve/lxc/101.conf"],
    );
    for line in [
        "lxc.cgroup2.devices.allow: c 226:1 rwm\n",
        "lxc.cgroup2.devices.allow: c 226:129 rwm\n",
        "lxc.mount.entry: /dev/dri/renderD129 dev/dri/renderD129 none bind,optional,create=file\n",
    ] {
        assert!(config(&host).contains(line), "{line}");
    }
    let host = container(ready(), &format!("unprivileged: 1\n{BEFORE}"));
    says(
        &host,
        "container attach 101 --dri",
        &[
            "warning: container 101: a GPU has no DRM nodes: nvidia-drm is not loaded; then attach again",
            "warning: container 101 is unprivileged: the modes of /dev/dri in the host may keep it from opening them; with \
             --style dev they do not",
            "container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf",
        ],
    );
}

#[test]
fn no_newline_at_the_end() {
    for style in ["mount", "dev"] {
        let host = container(ready(), "arch: amd64\r\nunprivileged: 1");
        assert_eq!(host.run(&format!("container attach 101 --style {style}")).code, Some(0));
        let added = if style == "dev" { devs() } else { lines(RULES, "nvidia0") };
        assert_eq!(config(&host), format!("arch: amd64\r\nunprivileged: 1\n{added}"));
        assert_eq!(host.run("container detach 101").code, Some(0));
        assert_eq!(config(&host), "arch: amd64\r\nunprivileged: 1");
    }
}

/// By the program itself, on every file that Proxmox's parser was tried on: attached and as before again, or refused and
/// as before.
#[test]
fn every_vector() {
    let root = std::env::var_os("VECTORS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vectors"), PathBuf::from);
    // A major that none of them names, so that there is something to add.
    let host = uvm(ready(), "499 nvidia-uvm");
    let (mut attached, mut refused) = (0, 0);
    for entry in fs::read_dir(root.join("ct")).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "conf") {
            continue;
        }
        let bytes = fs::read(&file).unwrap();
        for style in ["mount", "dev"] {
            fs::write(host.path(CONFIG), &bytes).unwrap();
            let run = host.run(&format!("container attach 101 --style {style}"));
            let is_changed = fs::read(host.path(CONFIG)).unwrap() != bytes;
            match run.code {
                Some(0) if is_changed => attached += 1,
                Some(0) => assert!(run.err.contains("already: nothing to do"), "{file:?}: {}", run.err),
                code => {
                    assert_eq!((code, is_changed), (Some(3), false), "{file:?}: {}", run.err);
                    refused += 1;
                }
            }
            assert_eq!(host.path(RECORD).exists(), run.code == Some(0), "{file:?}");
            let detached = host.run("container detach 101");
            assert_eq!(detached.code, Some(0), "{file:?}: {}", detached.err);
            assert_eq!(fs::read(host.path(CONFIG)).unwrap(), bytes, "{file:?}");
        }
    }
    assert!(attached > 3 * refused && refused > 0, "{attached} attached, {refused} refused");
}

#[test]
fn what_somebody_else_wrote_stays() {
    let theirs = "lxc.cgroup2.devices.allow: c 195:* rwm\ndev4: /dev/nvidia-uvm,gid=44\n";
    let host = container(ready(), &with(theirs));
    let told = "container 101: nothing was attached by this host: nothing to do; these lines are somebody else's: dev4: \
                /dev/nvidia-uvm,gid=44 | lxc.cgroup2.devices.allow: c 195:* rwm; to take them out: pct set 101 --delete dev4, and \
                remove the lxc.* ones from /etc/pve/lxc/101.conf in an editor";
    says(&host, "container detach 101", &[told]);
    assert_eq!(config(&host), with(theirs));
    says(&host, "container attach 101", &["container 101 gets 0000:01:00: 5 lines added in /etc/pve/lxc/101.conf"]);
    says(&host, "container detach 101", &["container 101: 5 lines removed in /etc/pve/lxc/101.conf"]);
    assert_eq!(config(&host), with(theirs));
}

#[test]
fn what_somebody_changed_stays_and_is_told() {
    let host = ready();
    host.run("container attach 101");
    let changed = config(&host).replace("/dev/nvidia0 dev/nvidia0 none bind", "/dev/nvidia0 dev/nvidia0 none rbind");
    let host = container(host, &changed);
    let was = "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file";
    let Run { out, .. } = host.run("container detach 101 --dry-run");
    assert!(out.ends_with(&format!("  leave     what somebody made of: {was}\n")), "{out}");
    says(
        &host,
        "container detach 101",
        &[
            &format!("warning: container 101: somebody changed the line for 0000:01:00, left as it is: it was {was}"),
            "container 101: 6 lines removed in /etc/pve/lxc/101.conf",
        ],
    );
    assert_eq!(config(&host), with(&format!("{}\n", was.replace("none bind", "none rbind"))));
}

/// Somebody destroyed the container, and perhaps made another one with that number.
#[test]
fn the_record_of_a_container_that_is_no_more() {
    let host = ready();
    host.run("container attach 101");
    let host = host.without(CONFIG);
    says(&host, "container detach 101", &["container 101 does not exist any more: its record is forgotten"]);
    assert!(!host.path(RECORD).exists());
    let host = container(host, "arch: amd64");
    host.run("container attach 101");
    let host = container(host, BEFORE);
    let nothing = "container 101: nothing that was attached is there any more: nothing to do";
    says(&host, "container detach 101", &[nothing]);
    assert_eq!(config(&host), BEFORE);
    // The new one is attached as if there were no record, whose newline was another file's.
    let host = container(host, "arch: amd64");
    host.run("container attach 101");
    let host = container(host, BEFORE);
    says(&host, "container attach 101", &["container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf"]);
    assert_eq!(record(&host)["newline"], json!(false));
    host.run("container detach 101");
    assert_eq!(config(&host), BEFORE);
    // It may come back from there.
    host.run("container attach 101");
    let host = host.without(CONFIG).file("etc/pve/nodes/pve2/lxc/101.conf", BEFORE);
    refuses(&host, "container detach 101", 2, "guest 101 is on node pve2: its GPU is given to it there");
    assert!(host.path(RECORD).exists());
}

/// The record names lines that did not get there: what a crash between the two leaves.
#[test]
fn a_run_that_was_killed_between_record_and_configuration() {
    for bytes in [BEFORE, "arch: amd64"] {
        let host = container(ready(), bytes);
        host.run("container attach 101");
        let after = config(&host);
        let host = container(host, bytes).file(&beside(CONFIG), "half of it");
        let nothing = "container 101: nothing that was attached is there any more: nothing to do";
        plans(
            &host,
            "container detach 101 --dry-run",
            &["container 101 is detached from 0000:01:00", "  nothing to do"],
        );
        says(&host, "container attach 101", &["container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf"]);
        assert_eq!(config(&host), after);
        assert_eq!(names(host.path("etc/pve/lxc")), ["101.conf"]);
        let host = container(host, bytes);
        says(&host, "container detach 101", &[nothing]);
        assert_eq!(config(&host), bytes);
    }
}

#[test]
fn which_card_is_not_clear() {
    let host = ready().function("0000:03:00.0", "010802", "144d:a80a", "nvme", 9);
    for (gpu, code, message) in [
        ("gpu", 2, "gpu is no slot; a slot is written like 0000:01:00"),
        ("09:00", 3, "there is no device in slot 0000:09:00; lspci -D shows what there is"),
        ("03:00", 3, "slot 0000:03:00 has no NVIDIA GPU; gpu-handoff --status shows those there are"),
    ] {
        refuses(&host, &format!("container attach 101 --gpu {gpu}"), code, message);
    }
    let none = "there is no NVIDIA GPU in this host; lspci -nn shows what there is";
    refuses(&container(Host::new(), BEFORE), "container attach 101", 3, none);
}

#[test]
fn a_card_that_is_away() {
    let away = |owner: &str| {
        let host = container(uvm(settled(), "511 nvidia-uvm"), BEFORE);
        if owner.is_empty() { host } else { host.record(owner, "0000:01:00", "away", "nvidia") }
    };
    let not_known = "container 101 was not touched: the numbers of 0000:01:00 are not known";
    let vm =
        format!("{not_known}: VM 111 has it; stop that first: qm stop 111, then: gpu-handoff container attach 101");
    refuses(&away("vm-111").running(111, PID), "container attach 101", 3, &vm);
    refuses(&away("").running(111, PID), "container attach 101", 3, &vm);
    let home = "bring it home first: gpu-handoff to-nvidia 0000:01:00, then: gpu-handoff container attach 101";
    refuses(&away("vm-111"), "container attach 101", 3, &format!("{not_known}: it was given to VM 111; {home}"));
    let by_hand = format!("{not_known}: it was given to vfio-pci by hand; {home}");
    refuses(&away("manual-0000:01:00"), "container attach 101", 3, &by_hand);
    let only = "containers can only use a GPU that NVIDIA's driver has";
    refuses(&away(""), "container attach 101", 3, &format!("{not_known}: it is at home on vfio-pci; {only}"));
    for (driver, why) in [
        ("nouveau", format!("nouveau has it; {only}")),
        (
            "",
            "no driver has it; load NVIDIA's first: modprobe nvidia, then: gpu-handoff container attach 101"
                .to_string(),
        ),
        ("nvidia", "the NVIDIA driver has it but does not list it in /proc/driver/nvidia/gpus; see dmesg".to_string()),
    ] {
        let host = container(Host::new().card("0000:01:00", driver, "snd_hda_intel"), BEFORE);
        refuses(&host, "container attach 101", 3, &format!("{not_known}: {why}"));
    }
    let stuck =
        "a handoff of it is under way, or stuck; see gpu-handoff --status, then: gpu-handoff container attach 101";
    let host =
        container(Host::new().card("0000:01:00", "", "snd_hda_intel"), BEFORE).wedged("0000:01:00", PID).alive(PID);
    refuses(&host, "container attach 101", 3, &format!("{not_known}: {stuck}"));
    // Detaching needs no card.
    let host = ready();
    host.run("container attach 101");
    let host = host.without("proc/driver");
    assert_eq!(host.run("container detach 101").code, Some(0));
    assert_eq!(config(&host), BEFORE);
}

#[test]
fn no_container_of_proxmox() {
    let host = ready().vm(111, "machine: q35\nhostpci0: 0000:01:00,pcie=1");
    let host = host.file("var/lib/lxc/103/config", "").file("etc/pve/nodes/pve2/lxc/104.conf", BEFORE);
    for (id, message) in [
        ("102", "there is no container 102: /etc/pve/lxc/102.conf does not exist; pct list shows the containers"),
        (
            "111",
            "111 is a VM, no container; a VM takes a GPU as a whole: qm set 111 --hostpci0 0000:01:00,pcie=1 --hookscript \
             local:snippets/gpu-handoff",
        ),
        (
            "103",
            "container 103 is LXC's own (/var/lib/lxc/103/config) and none of Proxmox's: its configuration is yours to \
             edit; pct list shows those of Proxmox",
        ),
        ("104", "guest 104 is on node pve2: its GPU is given to it there"),
    ] {
        for verb in ["attach", "detach"] {
            refuses(&host, &format!("container {verb} {id}"), 2, message);
        }
    }
    let down = "there is nothing in /etc/pve: Proxmox's cluster file system is down; systemctl start pve-cluster";
    refuses(&ready().without("etc/pve"), "container attach 101", 3, down);
}

#[test]
fn a_configuration_that_must_not_be_touched() {
    let template = "container 101 is a template, which never runs; attach its clones: pct clone 101 NEWID";
    let locked = "container 101 is locked (backup) and was not touched; wait until that task is over, or if there is \
                  none: pct unlock 101";
    let mounted = "container 101 is locked (mounted) and was not touched; pct unmount 101";
    for (line, message) in [("template: 1", template), ("lock: backup", locked), ("lock: mounted", mounted)] {
        refuses(&container(ready(), &with(&format!("{line}\n"))), "container attach 101", 3, message);
        // In a snapshot it means nothing.
        let host = container(ready(), &format!("{BEFORE}{line}\n"));
        assert_eq!(host.run("container attach 101").code, Some(0), "{line}");
        if line.starts_with("lock") {
            let host = container(host, &with(&format!("{line}\n{}", lines(RULES, "nvidia0"))));
            refuses(&host, "container detach 101", 3, message);
        }
    }
    let odd = container(ready(), &with("dev1: /etc/passwd\ndev2: gid=44\n"));
    let message = "container 101 was not touched: Proxmox cannot read its dev1 dev2 and starts it with none; mend that: pct \
                   set 101 --delete dev1,dev2";
    refuses(&odd, "container attach 101 --style dev", 3, message);
    assert_eq!(odd.run("container attach 101").code, Some(0));
    let many: String = (0..254).map(|number| format!("dev{number}: /dev/null\n")).collect();
    let message = "container 101 was not touched: there are not enough numbers between dev0 and dev255 left for its \
                   devices; delete some (pct set 101 --delete devN), or use --style mount";
    refuses(&container(ready(), &with(&many)), "container attach 101 --style dev", 3, message);
    let large = container(ready(), &format!("#{}\n{BEFORE}", "x".repeat(1024 * 1024 - BEFORE.len() - 100)));
    let message =
        "container 101 was not touched: /etc/pve/lxc/101.conf would grow beyond the 1 MiB that Proxmox allows";
    refuses(&large, "container attach 101", 3, message);
}

/// Proxmox's cluster file system shows so by a mode, while root may write by any.
#[test]
fn no_quorum() {
    let host = ready();
    let local = host.path("etc/pve/local");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o555)).unwrap();
    let message = "container 101 was not touched: /etc/pve is read-only, the cluster has no quorum; see: pvecm status";
    refuses(&host, "container attach 101", 3, message);
    fs::set_permissions(&local, fs::Permissions::from_mode(0o755)).unwrap();
    host.run("container attach 101");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o555)).unwrap();
    refuses(&host, "container detach 101", 3, message);
    fs::set_permissions(&local, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The kernel says no in the middle: the old file is whole, nothing is beside it, and nothing is on record.
#[test]
fn a_configuration_that_cannot_be_written() {
    let host = ready().file(&format!("{}/x", beside(CONFIG)), "");
    let run = host.run("container attach 101");
    assert_eq!(run.code, Some(3), "{}", run.err);
    let begin = "gpu-handoff: error: container 101 was not touched: /etc/pve/lxc/101.conf cannot be written: ";
    assert!(run.err.starts_with(begin) && run.err.lines().count() == 1, "{}", run.err);
    assert_eq!(config(&host), BEFORE);
    assert!(!host.path(RECORD).exists());
    // Nor is a configuration changed without being on record.
    let host = ready().file(&format!("{}/x", beside(RECORD)), "");
    let run = host.run("container attach 101");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(
        run.err.starts_with("gpu-handoff: error: container 101 was not touched: /var/lib/gpu-handoff"),
        "{}",
        run.err
    );
    assert_eq!(config(&host), BEFORE);
}

#[test]
fn a_record_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        (r#"{"schema":2}"#, "schema 2: written by a newer gpu-handoff; install that version again"),
        (
            r#"{"schema":1,"style":"dev","slots":[],"dri":false,"newline":false,"lines":[{"for":"x","line":"rootfs: x"}]}"#,
            r#"line: "rootfs: x" is not understood"#,
        ),
    ] {
        let host = ready().file(RECORD, text);
        let message = format!(
            "container 101 was not touched: the record of what was attached cannot be read: /{RECORD}: {problem}; if you \
             remove that file, its lines are yours to take out"
        );
        for verb in ["attach", "detach"] {
            refuses(&host, &format!("container {verb} 101"), 1, &message);
        }
    }
}

/// Proxmox holds its lock on the container: who comes in between waits, and in the end gives up.
#[test]
fn proxmox_is_at_work() {
    let host = ready().file("run/lock/lxc/pve-config-101.lock", "");
    let lock = || {
        let file = fs::File::open(host.path("run/lock/lxc/pve-config-101.lock")).unwrap();
        Flock::lock(file, FlockArg::LockExclusive).unwrap()
    };
    let held = lock();
    let begin = Instant::now();
    refuses_now(
        &host,
        "container attach 101",
        5,
        "container 101 was not touched: Proxmox is at work on it (it has held /run/lock/lxc/pve-config-101.lock for 10 s); \
         then try again: gpu-handoff container attach 101",
    );
    assert!(begin.elapsed() >= Duration::from_secs(10));
    assert_eq!(config(&host), BEFORE);
    // What Proxmox writes meanwhile is what is edited.
    let later = BEFORE.replace("infer", "later");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            fs::write(host.path(CONFIG), &later).unwrap();
            drop(held);
        });
        assert_eq!(host.run("container attach 101").code, Some(0));
    });
    assert_eq!(config(&host), with(&lines(RULES, "nvidia0")).replace("infer", "later"));
    host.run("container detach 101");
    // A task that began while we waited.
    let held = lock();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            fs::write(host.path(CONFIG), with("lock: snapshot\n")).unwrap();
            drop(held);
        });
        let run = host.run("container attach 101");
        assert_eq!(run.code, Some(3), "{}", run.err);
    });
    assert_eq!(config(&host), with("lock: snapshot\n"));
    assert!(!host.path(RECORD).exists());
}

/// As `nvidia-modprobe -u` does: its major is known only then.
#[test]
fn nvidia_uvm_is_loaded_first() {
    let not_loaded = || uvm(ready(), "195 nvidia-frontend");
    let problem = "nvidia-uvm is not loaded and could not be: modprobe is not installed; try: modprobe nvidia-uvm";
    refuses_now(&not_loaded(), "container attach 101", 1, problem);
    let host = not_loaded();
    let Run { code, out, .. } = host.run("container attach 101 --dry-run");
    assert_eq!(code, Some(0));
    let told: Vec<&str> = out.lines().collect();
    assert_eq!(told[1], "  load      nvidia-uvm");
    assert_eq!(told[told.len() - 1], "  add       a rule for the major that nvidia-uvm will have");
    let modprobe = "usr/sbin/modprobe";
    let script = format!(
        "#!/bin/sh\n[ \"$*\" = '-a -- nvidia-uvm' ] || exit 9\n/bin/sed -i 's/195 nvidia-frontend/511 nvidia-uvm/' {}\n",
        host.path("proc/devices").display()
    );
    let host = host.file(modprobe, &script);
    fs::set_permissions(host.path(modprobe), fs::Permissions::from_mode(0o755)).unwrap();
    says(
        &host,
        "container attach 101",
        &["nvidia-uvm loaded", "container 101 gets 0000:01:00: 7 lines added in /etc/pve/lxc/101.conf"],
    );
    assert_eq!(config(&host), with(&lines(RULES, "nvidia0")));
}
