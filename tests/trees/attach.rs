use super::*;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

// container attach, container detach

pub const CONFIG: &str = "etc/pve/lxc/101.conf";
pub const RECORD: &str = "var/lib/gpu-handoff/containers/101.json";

/// What a container's configuration says before it is attached.
pub const BEFORE: &str = "arch: amd64\nhostname: infer\nrootfs: local:101/a.raw\n\n[snap]\narch: amd64\n";

pub const RULES: &str = "lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 511:* rwm\n";

/// The lines that style mount adds.
pub fn lines(rules: &str, gpu: &str) -> String {
    let nodes = [gpu, "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"];
    let mounts = nodes.map(|node| format!("lxc.mount.entry: /dev/{node} dev/{node} none bind,optional,create=file\n"));
    format!("{rules}{}", mounts.concat())
}

fn devs() -> String {
    let nodes = ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"];
    (0..).zip(nodes).map(|(number, node)| format!("dev{number}: /dev/{node},mode=0666\n")).collect()
}

/// `BEFORE` with these lines at the end of its main section.
pub fn with(added: &str) -> String {
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
pub fn beside(path: &str) -> String {
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
