use super::starts::with_program;
use super::*;
use std::os::unix::fs::symlink;
use std::time::Instant;

// doctor: how it is asked and how it answers; what it finds is in the files beside this one

/// A host on which all is well: a card that is at home, and VM 111 that takes it, with the hookscript.
pub fn well() -> Host {
    hooked(Host::new().card("0000:01:00", "nvidia", "snd_hda_intel"), 111, "")
}

/// The same VM with some lines more.
pub fn well_but(lines: &str) -> Host {
    hooked(Host::new().card("0000:01:00", "nvidia", "snd_hda_intel"), 111, lines)
}

pub fn hooked(host: Host, id: u32, lines: &str) -> Host {
    let host = if host.path("usr/sbin/gpu-handoff").exists() {
        host
    } else {
        host.file("usr/sbin/gpu-handoff", "").link("var/lib/vz/snippets/gpu-handoff", "usr/sbin/gpu-handoff")
    };
    let hook = "hookscript: local:snippets/gpu-handoff\nmachine: q35\nbios: ovmf\nefidisk0: local-lvm:vm-1-disk-0\ncpu: host\n";
    host.vm(id, &format!("{hook}hostpci0: 0000:01:00,pcie=1\n{lines}"))
}

/// All that is found; looking changes nothing.
#[track_caller]
pub fn findings(host: &Host, call: &str) -> Vec<Value> {
    let before = host.snapshot();
    let run = host.run(&format!("{call} --json"));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let told: Value = serde_json::from_str(&run.out).unwrap_or_else(|_| panic!("{run:?}"));
    assert_eq!(told["schema"], 1);
    let errors = told["errors"].as_u64().unwrap();
    assert_eq!(run.code, Some(i32::from(errors > 0)), "{run:?}");
    told["findings"].as_array().unwrap().clone()
}

pub fn of<'a>(findings: &'a [Value], id: &str) -> Vec<&'a Value> {
    findings.iter().filter(|finding| finding["id"] == id).collect()
}

/// It is found once, there, and in these words; a word of them is how bad it is.
#[track_caller]
pub fn fires(id: &str, host: &Host, place: &str, words: &[&str]) -> Value {
    let all = findings(host, "doctor");
    let [finding] = of(&all, id)[..] else { panic!("{id}: {all:#?}") };
    assert_eq!(finding["place"], place, "{finding:#}");
    let text = finding.to_string();
    for word in words {
        assert!(text.contains(word), "{word}: {finding:#}");
    }
    finding.clone()
}

#[track_caller]
pub fn silent(id: &str, host: &Host) {
    let all = findings(host, "doctor");
    assert!(of(&all, id).is_empty(), "{all:#?}");
}

/// What it advises to type is typed, and then it finds that no more.
#[track_caller]
pub fn fixed(id: &str, host: &Host) {
    let all = findings(host, "doctor");
    let finding = of(&all, id)[0];
    let remedy = finding["remedy"].as_str().unwrap();
    let first = remedy.trim_start_matches("if that is right: ").trim_start_matches("if that is not meant: ");
    let first = first.trim_start_matches("if it is to count: ").trim_start_matches("then: ");
    let first = ["; or", "; then", "; if", "; else", " && update-", " && proxmox-boot-tool"]
        .iter()
        .fold(first, |text, end| text.split(end).next().unwrap());
    type_there(host, first);
    silent(id, host);
}

/// One command, in the tree.
#[track_caller]
pub fn type_there(host: &Host, line: &str) {
    if let Some(call) = line.strip_prefix("gpu-handoff ") {
        let run = host.run(call);
        assert_eq!(run.code, Some(0), "{line}: {run:?}");
        return;
    }
    if line.starts_with("qm set ") || line.starts_with("pct set ") {
        return set(host, line);
    }
    let root = host.path("");
    let root = root.to_str().unwrap().trim_end_matches('/');
    let here = ["etc", "run", "usr", "lib", "root", "sys", "var"]
        .iter()
        .fold(line.to_string(), |line, folder| line.replace(&format!(" /{folder}/"), &format!(" {root}/{folder}/")));
    for folder in ["root", "etc/udev/rules.d", "etc/modprobe.d"] {
        fs::create_dir_all(host.path(folder)).unwrap();
    }
    assert!(["sed ", "mv ", "rm ", "ln ", "echo "].iter().any(|verb| here.starts_with(verb)), "{line}");
    assert!(Command::new("/bin/bash").arg("-c").arg(&here).status().unwrap().success(), "{here}");
}

/// `qm set 111 --machine q35`, `pct set 101 --delete dev0,dev1`, as Proxmox does it.
fn set(host: &Host, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    let [tool, "set", id, key, values @ ..] = &words[..] else { panic!("{line}") };
    let folder = if *tool == "qm" { "qemu-server" } else { "lxc" };
    let path = host.path(&format!("etc/pve/{folder}/{id}.conf"));
    let text = fs::read_to_string(&path).unwrap();
    let value = values.join(" ");
    let value = value.trim_matches('\'');
    let key = key.trim_start_matches("--");
    let goes: Vec<&str> = if key == "delete" { value.split(',').collect() } else { vec![key] };
    let is_left = |line: &&str| !goes.iter().any(|key| line.to_ascii_lowercase().starts_with(&format!("{key}:")));
    let mut left: Vec<String> = text.lines().filter(is_left).map(str::to_string).collect();
    if key != "delete" {
        left.push(format!("{key}: {value}"));
    }
    fs::write(path, left.join("\n") + "\n").unwrap();
}

/// The kernel's log.
pub fn with_log(host: Host, lines: &str) -> Host {
    for program in ["bin/sh", "usr/bin/grep", "usr/bin/tail"] {
        fs::create_dir_all(host.path(program).parent().unwrap()).unwrap();
        symlink(format!("/{program}"), host.path(program)).unwrap();
    }
    host.file("usr/bin/dmesg", &format!("#!/bin/sh\ncat <<'END'\nsomething else\n{lines}\nEND\n"))
}

#[test]
fn where_all_is_well_it_says_so() {
    let host = well();
    assert_eq!(host.run("doctor"), Run { code: Some(0), out: "nothing found\n".to_string(), err: String::new() });
    assert_eq!(host.run("doctor 111").out, "nothing found\n");
    let told: Value = serde_json::from_str(&host.run("doctor --json").out).unwrap();
    let is = json!({"schema": 1, "version": env!("CARGO_PKG_VERSION"), "proxmox": true, "gpus": ["0000:01:00"],
        "guest": null, "findings": [], "errors": 0, "warnings": 0, "notes": 0});
    assert_eq!(told, is);
}

#[test]
fn a_plain_machine_without_proxmox_or_a_card() {
    let host = Host::new().function("0000:00:02.0", "030000", "8086:4680", "i915", 0);
    let out = "this is no Proxmox host: there is nothing in /etc/pve\nno NVIDIA GPU in this host\nnothing found\n";
    assert_eq!(host.run("doctor"), Run { code: Some(0), out: out.to_string(), err: String::new() });
    // Nothing at all, as in a container or a chroot.
    let bare = Host::new().without("sys").without("proc");
    assert_eq!(bare.run("doctor").out, out);
    assert_eq!(bare.run("doctor --fix").code, Some(0));
    assert_eq!(bare.run("doctor --report").code, Some(0));
}

#[test]
fn a_finding_is_told_with_all_that_belongs_to_it() {
    let host = well_but("balloon: 1024\n");
    let run = host.run("doctor");
    assert_eq!(
        run.out,
        "warning  vm-balloon  /etc/pve/qemu-server/111.conf:8\n  \
         found  VM 111 has 4096 MiB and is to go down to 1024\n  \
         why    Memory of a VM with a card is pinned: what the balloon takes from the guest the host does not get.\n  \
         do     qm set 111 --balloon 0\n\
         1 warning; more of one: gpu-handoff doctor --explain vm-balloon\n"
    );
    assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
    let told: Value = serde_json::from_str(&host.run("doctor --json").out).unwrap();
    let finding = json!({"id": "vm-balloon", "severity": "warning", "guest": 111, "fix": false,
        "place": "/etc/pve/qemu-server/111.conf:8", "found": "VM 111 has 4096 MiB and is to go down to 1024",
        "why": "Memory of a VM with a card is pinned: what the balloon takes from the guest the host does not get.",
        "remedy": "qm set 111 --balloon 0"});
    assert_eq!(told["findings"], json!([finding]));
    assert_eq!((&told["errors"], &told["warnings"], &told["notes"]), (&json!(0), &json!(1), &json!(0)));
}

#[test]
fn errors_come_first_and_are_the_exit_code() {
    let host = well_but("balloon: 1024\nmemory: 4096\n").file("proc/meminfo", "MemTotal:        2097152 kB\n");
    let run = host.run("doctor");
    assert_eq!(run.code, Some(1));
    assert!(run.out.starts_with("error    vm-memory "), "{}", run.out);
    assert_eq!(run.err, "gpu-handoff: error: not as it should be: vm-memory\n");
}

#[test]
fn one_guest_alone() {
    let host = hooked(well_but("balloon: 1024\n"), 112, "balloon: 512\n")
        .file("proc/cmdline", "pcie_acs_override=downstream\n");
    let host = host.file("etc/pve/lxc/101.conf", "arch: amd64\n");
    assert!(findings(&host, "doctor").len() > 2);
    for id in [111, 112] {
        let found = findings(&host, &format!("doctor {id}"));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0]["guest"], id);
    }
    assert_eq!(findings(&host, "doctor 101")[0]["id"], "ct-not-attached");
}

#[test]
fn who_asks_wrongly_is_told_what_to_type() {
    let host = well().file("etc/pve/nodes/pve2/qemu-server/211.conf", "");
    let not_there = "there is no guest 999; qm list and pct list show those that there are";
    refuses_now(&host, "doctor 999", 2, not_there);
    refuses_now(&host, "doctor 211", 2, "guest 211 is on node pve2: say this there");
    let unknown = "there is no finding frob; those that there are: gpu-handoff doctor --explain all";
    refuses_now(&host, "doctor --explain frob", 2, unknown);
    let all = host.run("doctor --explain all");
    assert_eq!((all.code, all.err.as_str()), (Some(0), ""));
    let one = host.run("doctor --explain iommu-off");
    assert!(one.out.starts_with("iommu-off (error): the IOMMU is off\n\nWithout it no VM can be given a device."));
}

/// A check that no test has seen fire, or keep still, is none.
#[test]
fn every_finding_is_tried_both_ways() {
    let sources = [
        include_str!("doctor_boot.rs"),
        include_str!("doctor_host.rs"),
        include_str!("doctor_driver.rs"),
        include_str!("doctor_guests.rs"),
        include_str!("doctor_containers.rs"),
        include_str!("doctor_ours.rs"),
        include_str!("cluster.rs"),
    ];
    let sources: String = sources.concat().chars().filter(|c| !c.is_whitespace()).collect();
    let all = well().run("doctor --explain all").out;
    let ids: Vec<&str> =
        all.lines().filter(|line| line.contains("  ")).map(|line| line.split(' ').next().unwrap()).collect();
    assert!(ids.len() > 75, "{all}");
    let untried: Vec<String> = ids
        .iter()
        .flat_map(|id| {
            [[format!("fires(\"{id}\""), format!("fires_of(\"{id}\"")], [format!("silent(\"{id}\""), String::from("-")]]
        })
        .filter(|calls| !calls.iter().any(|call| sources.contains(call.as_str()) && call != "-"))
        .map(|calls| calls[0].clone())
        .collect();
    assert_eq!(untried, Vec::<String>::new());
}

#[test]
fn two_hundred_guests_are_looked_at_in_no_time() {
    let mut host = well().file("etc/pve/lxc/1000.conf", "arch: amd64\n");
    for id in 0..100 {
        let card = if id % 10 == 0 { "hostpci0: 0000:01:00,pcie=1\n" } else { "" };
        host = host.vm(
            200 + id,
            &format!("{card}net0: virtio=BC:24:11:2E:55:F3,bridge=vmbr0\nscsi0: local-lvm:vm-1-disk-0\n"),
        );
        let nodes = if id % 10 == 0 {
            "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n"
        } else {
            ""
        };
        host = host.file(
            &format!("etc/pve/lxc/{}.conf", 500 + id),
            &format!("arch: amd64\n{nodes}mp0: local:1/a.raw,mp=/x\n"),
        );
    }
    host.run("doctor");
    let begin = Instant::now();
    assert!(host.run("doctor").code.is_some());
    let took = begin.elapsed();
    // 100 ms are meant; machines that test have other things to do as well.
    assert!(took.as_millis() < 800, "{took:?}");
}

// --fix

/// Something of each kind but nodes, which are made by nobody in a tree.
fn to_fix() -> Host {
    well()
        .without("var/lib/vz/snippets/gpu-handoff")
        .file(&format!("{}/driver_override", device("0000:01:00.0")), "vfio-pci\n")
        .card("0000:02:00", "vfio-pci", "vfio-pci")
}

#[test]
fn what_is_ours_to_put_right_is_put_right_once() {
    let host = to_fix();
    let list = "remove    the id 10de 2684 from vfio-pci\n";
    let planned = host.run("doctor --fix --dry-run");
    let before = host.snapshot();
    assert_eq!(planned.code, Some(0));
    let lines: Vec<&str> = planned.out.lines().collect();
    assert_eq!(
        lines,
        [
            "link      /var/lib/vz/snippets/gpu-handoff -> /usr/sbin/gpu-handoff",
            "clear     driver_override 0000:01:00.0",
            list.trim_end(),
            "remove    the id 10de 22ba from vfio-pci"
        ]
    );
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let done = host.run("doctor --fix");
    assert_eq!((done.code, done.out.as_str()), (Some(0), planned.out.as_str()));
    let text = |path: &str| fs::read_to_string(host.path(path)).unwrap();
    assert_eq!(text(&format!("{}/driver_override", device("0000:01:00.0"))), "\n");
    assert_eq!(text("sys/bus/pci/drivers/vfio-pci/remove_id"), "10de 22ba");
    assert_eq!(
        fs::read_link(host.path("var/lib/vz/snippets/gpu-handoff")).unwrap().to_str(),
        Some("/usr/sbin/gpu-handoff")
    );
    let once = host.snapshot();
    let again = host.run("doctor --fix");
    assert_eq!(again.code, Some(0), "{again:?}");
    assert_eq!(host.snapshot().changes_since(&once), NOTHING, "a second time");
    assert!(!again.out.contains("driver_override") && !again.out.contains("link "), "{}", again.out);
}

#[test]
fn nothing_else_is_touched() {
    let host = well_but("balloon: 1024\n").file("etc/modprobe.d/x.conf", "blacklist nvidia\n");
    let before = host.snapshot();
    let run = host.run("doctor --fix");
    assert_eq!(run.out, "nothing to do: what is left is not for --fix, see gpu-handoff doctor\n");
    assert_eq!((run.code, host.snapshot().changes_since(&before)), (Some(0), Vec::<String>::new()));
}

#[test]
fn nothing_is_put_right_while_a_card_changes_hands() {
    let host = to_fix();
    let lock = host.file("run/gpu-handoff/lock-0000:01:00", "");
    let file = fs::File::open(lock.path("run/gpu-handoff/lock-0000:01:00")).unwrap();
    fs2::FileExt::lock_exclusive(&file).unwrap();
    let before = lock.snapshot().without_lock();
    let run = lock.run("doctor --fix");
    assert_eq!(run.code, Some(5), "{run:?}");
    assert!(run.err.contains("0000:01:00 0000:02:00 is changing hands: nothing was put right"), "{}", run.err);
    assert_eq!(lock.snapshot().without_lock().changes_since(&before), NOTHING);
}

/// A tree has no devices: here the kernel says no, and it is told.
#[test]
fn what_cannot_be_put_right_is_named_and_the_rest_is_done() {
    let host = to_fix().file("proc/driver/nvidia/params", "DeviceFileMode: 438\n");
    let run = host.run("doctor --fix");
    assert_eq!(run.code, Some(1));
    assert!(run.out.contains("make      /dev/nvidiactl 195:255: not done under GPU_HANDOFF_ROOT\n"), "{}", run.out);
    assert!(run.err.starts_with("gpu-handoff: error: not all was put right: make      /dev/nvidiactl"), "{}", run.err);
    assert!(run.out.contains("clear     driver_override 0000:01:00.0\n"));
}

// --report

#[test]
fn a_report_has_what_helps_and_nothing_of_the_network() {
    let private = "net0: virtio=BC:24:11:2E:55:F3,bridge=vmbr0\nipconfig0: ip=192.168.1.17/24\nname: secret-vm\nsshkeys: ssh-rsa\n\
                   args: -netdev x,mac=aa:bb:cc:dd:ee:ff,host=10.1.2.3\n#a description\n";
    let host = with_log(
        well_but(private).file("proc/sys/kernel/hostname", "node7.example.org\n").file("etc/pve/nodes/node8/x", ""),
        "NVRM: Xid (PCI:0000:01:00): 31, pid=1, on node7 by node8.example.org",
    );
    let host = host.config(r#"{"policy":{"unit":"stop"}}"#).file("etc/modprobe.d/x.conf", "options nvidia x=1\n");
    let run = host.run("doctor --report");
    assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
    for part in [
        "== findings\n",
        "== versions\ngpu-handoff ",
        "kernel 6.12.48-1-pve",
        r#"{"policy":{"unit":"stop"}}"#,
        "== kernel command line\nroot=/dev/sda quiet",
        "/etc/modprobe.d/x.conf:1: options nvidia x=1",
        "0000:01:00.0 10de:2684 class 030000 group 1 nvidia",
        "hostpci0: 0000:01:00,pcie=1",
        "machine: q35",
        "NVRM: Xid (PCI:0000:01:00): 31, pid=1, on HOST by HOST",
        "args: -netdev x,mac=MAC,host=IPV4",
    ] {
        assert!(run.out.contains(part), "{part}: {}", run.out);
    }
    for private in
        ["BC:24", "aa:bb", "192.168", "10.1.2.3", "secret", "ssh-rsa", "description", "node7", "node8", "example"]
    {
        assert!(!run.out.contains(private), "{private}: {}", run.out);
    }
}

#[test]
fn a_report_overwrites_nothing() {
    let host = well();
    let (file, call) = (host.path("root/report.txt"), "doctor --report --to /root/report.txt");
    let run = host.run(call);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.out.contains("look at it before you give it away"));
    assert_eq!(fs::read_to_string(&file).unwrap(), host.run("doctor --report").out);
    refuses_now(&host, call, 2, "/root/report.txt is there already: name another file");
}

// What others ask for the same thing

#[test]
fn advice_of_other_verbs_is_the_same_as_doctors() {
    let host = with_program(well(), "usr/sbin/qm", "set").vm(112, "hostpci0: 0000:09:00\n");
    let absent = fires_of("vm-device-absent", &host, "doctor 112");
    let plan = host.run("plan 112");
    assert!(
        plan.err.contains(absent["found"].as_str().unwrap()) && plan.err.contains(absent["remedy"].as_str().unwrap())
    );
}

#[track_caller]
pub fn fires_of(id: &str, host: &Host, call: &str) -> Value {
    let all = findings(host, call);
    of(&all, id).first().copied().unwrap_or_else(|| panic!("{id}: {all:#?}")).clone()
}
