use super::starts::with_program;
use super::*;
use std::os::unix::fs::PermissionsExt;

// enable and disable

const OURS: &str = "hookscript: local:snippets/gpu-handoff\n";

fn with_tools(host: Host) -> Host {
    with_program(with_program(host, "usr/sbin/qm", "set"), "usr/sbin/pct", "set")
}

/// VM 111 and container 101, without hookscripts.
fn host() -> Host {
    with_tools(Host::new().vm(111, "memory: 64\n").file("etc/pve/lxc/101.conf", "memory: 64\n"))
}

fn said(text: &str) -> Run {
    Run { code: Some(0), out: String::new(), err: format!("gpu-handoff: {text}\n") }
}

fn read(host: &Host, path: &str) -> String {
    fs::read_to_string(host.path(path)).unwrap()
}

#[test]
fn both_kinds_of_guests_there_and_back() {
    let host = host();
    for (id, tool, name, path) in
        [(111, "qm", "VM 111", "etc/pve/qemu-server/111.conf"), (101, "pct", "container 101", "etc/pve/lxc/101.conf")]
    {
        let before = read(&host, path);
        let planned = host.run(&format!("enable {id} --dry-run"));
        assert!(planned.out.ends_with(&format!("/usr/sbin/{tool} set {id} --hookscript local:snippets/gpu-handoff\n")));
        assert_eq!(read(&host, path), before);
        let done = format!("{name} has the hookscript local:snippets/gpu-handoff from its next start on");
        assert_eq!(host.run(&format!("enable {id}")), said(&done));
        assert_eq!(read(&host, path), format!("{before}{OURS}"));
        assert_eq!(
            host.run(&format!("enable {id}")),
            said(&format!("{name} has the hookscript already: nothing to do"))
        );
        let planned = host.run(&format!("disable {id} --dry-run"));
        assert_eq!(planned.out, format!("/usr/sbin/{tool} set {id} --delete hookscript\n"));
        assert_eq!(host.run(&format!("disable {id}")), said(&format!("{name} has no hookscript any more")));
        assert_eq!(read(&host, path), before);
        assert_eq!(host.run(&format!("disable {id}")), said(&format!("{name} has no hookscript: nothing to do")));
        let calls =
            format!("{tool} set {id} --hookscript local:snippets/gpu-handoff\n{tool} set {id} --delete hookscript\n");
        assert!(read(&host, "calls").ends_with(&calls));
    }
    let link = fs::read_link(host.path("var/lib/vz/snippets/gpu-handoff")).unwrap();
    assert_eq!(link.to_str(), Some("/usr/sbin/gpu-handoff"));
}

/// Without it the guest does not start.
#[test]
fn a_link_that_is_gone_is_made_again() {
    let host = host().vm(111, OURS);
    let plan = host.run("enable 111 --dry-run").out;
    assert_eq!(plan, "ln -s /usr/sbin/gpu-handoff /var/lib/vz/snippets/gpu-handoff\n");
    assert_eq!(host.run("enable 111"), said("VM 111 has the hookscript already: nothing to do"));
    assert!(fs::read_link(host.path("var/lib/vz/snippets/gpu-handoff")).is_ok());
    assert_eq!(host.run("enable 111 --dry-run").out, "VM 111 has the hookscript already: nothing to do\n");
}

#[test]
fn another_hookscript_stays() {
    let host = host().vm(111, "hookscript: local:snippets/backup.sh\n");
    let message = "VM 111 was not changed: its hookscript is local:snippets/backup.sh, and a guest has only one; to have \
                   both, let one call the other as in /usr/share/doc/gpu-handoff/examples/chain-hookscript";
    refuses(&host, "enable 111", 3, message);
    let message = "VM 111 was not changed: its hookscript is local:snippets/backup.sh, which is not this program";
    refuses(&host, "disable 111", 3, message);
}

#[test]
fn guests_that_are_not_here() {
    let host = host().file("etc/pve/nodes/pve2/lxc/102.conf", "");
    refuses(&host, "enable 102", 2, "guest 102 is on node pve2: say this there");
    refuses(&host, "disable 103", 2, "there is no guest 103; qm list and pct list show those that there are");
}

#[test]
fn a_vm_with_a_gpu_keeps_the_hook_that_brings_it_home() {
    let host = with_tools(settled()).vm(111, OURS).record("vm-111", "0000:01:00", "away", "nvidia");
    let message =
        "VM 111 was not changed: it has a GPU, which comes home by the hookscript; stop it first: qm shutdown 111";
    refuses(&host, "disable 111", 3, message);
}

#[test]
fn what_proxmox_says_is_passed_on() {
    let locked = host().file("locked", "");
    let message = "VM 111 was not changed: /usr/sbin/qm set 111 --hookscript local:snippets/gpu-handoff: can't lock file \
                   '/var/lock/qemu-server/lock-111.conf' - got timeout";
    assert_eq!(locked.run("enable 111"), refusal(1, message));
    let without = Host::new().vm(111, "");
    let message = "VM 111 was not changed: /usr/sbin/qm set 111 --hookscript local:snippets/gpu-handoff: /usr/sbin/qm is \
                   not installed";
    assert_eq!(without.run("enable 111"), refusal(1, message));
    let occupied = host().file("var/lib/vz/snippets/gpu-handoff", "#!/bin/sh\n");
    let message = "/var/lib/vz/snippets/gpu-handoff is no link to /usr/sbin/gpu-handoff; move it away, then try again";
    refuses(&occupied, "enable 111", 3, message);
}

/// What counts is how the guest is, and not how the program ended.
#[test]
fn what_is_so_afterwards_counts() {
    let host = host().file("fails-late", "");
    for (verb, arguments, done) in [
        (
            "enable",
            "--hookscript local:snippets/gpu-handoff",
            "has the hookscript local:snippets/gpu-handoff from its next start on",
        ),
        ("disable", "--delete hookscript", "has no hookscript any more"),
    ] {
        let run = host.run(&format!("{verb} 111"));
        let text = format!(
            "gpu-handoff: warning: /usr/sbin/qm set 111 {arguments}: unable to release the lock; the change is made all the \
             same\ngpu-handoff: VM 111 {done}\n"
        );
        assert_eq!(run, Run { code: Some(0), out: String::new(), err: text });
    }
}

#[test]
fn the_cluster_s_file_system_may_be_down_or_read_only() {
    let down = "there is nothing in /etc/pve: Proxmox's cluster file system is down; systemctl restart pve-cluster";
    for call in ["enable 111", "enable 111 --dry-run", "disable 111", "plan 111"] {
        assert_eq!(Host::new().run(call), refusal(1, down), "{call}");
    }
    let meanwhile = host().file("goes-down", "");
    let message = format!(
        "whether VM 111 was changed is not known: /usr/sbin/qm set 111 --hookscript local:snippets/gpu-handoff: Unable to \
         load access control list: Connection refused; and now {down}"
    );
    assert_eq!(meanwhile.run("enable 111"), refusal(1, &message));
    let host = host().vm(112, OURS).file("etc/pve/local/x", "");
    fs::set_permissions(host.path("etc/pve/local"), fs::Permissions::from_mode(0o555)).unwrap();
    let read_only = "/etc/pve is read-only, the cluster has no quorum; see: pvecm status";
    assert_eq!(host.run("enable 111"), refusal(3, &format!("VM 111 was not changed: {read_only}")));
    assert_eq!(host.run("disable 112"), refusal(3, &format!("VM 112 was not changed: {read_only}")));
}

#[test]
fn a_card_that_the_host_never_has_is_told_of() {
    let host = with_tools(settled()).file("etc/driverctl.d/0000:01:00.0", "vfio-pci\n");
    let run = host.run("enable 111");
    assert_eq!(run.code, Some(0));
    for words in [
        "warning: 0000:01:00 is on vfio-pci, and no handoff put it there",
        "warning: /etc/driverctl.d/0000:01:00.0:1: vfio-pci gives 0000:01:00.0 to vfio-pci at boot",
    ] {
        assert!(run.err.contains(words), "{}", run.err);
    }
    let wished = host.config(r#"{"gpus":{"01:00":{"home":"vfio-pci"}}}"#);
    assert!(!wished.run("enable 111").err.contains("warning"));
}

#[test]
fn high_availability_and_clusters_are_told_of() {
    let host = host().file("etc/pve/ha/resources.cfg", "vm: 111\n\tstate started\n").file("etc/pve/corosync.conf", "");
    let run = host.run("enable 111");
    let lines: Vec<&str> = run.err.lines().collect();
    assert_eq!(run.code, Some(0));
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[1].starts_with("gpu-handoff: warning: VM 111 is managed by HA: "), "{lines:?}");
    assert!(lines[2].starts_with("gpu-handoff: warning: this node is in a cluster: VM 111 starts only "), "{lines:?}");
    assert_eq!(host.run("enable 101").err.lines().count(), 2, "101 is not managed");
}

/// VM 111 ran before it had the hook: Proxmox gave vfio-pci the ids of its card, and left it there. NVIDIA's driver and
/// that of the audio function are loaded.
fn left_on_vfio() -> Host {
    let host =
        with_tools(Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").driver("nvidia").driver("snd_hda_intel"));
    host.vm(111, "hostpci0: 0000:01:00,pcie=1")
}

fn homes(host: &Host, record: &str) -> Vec<Value> {
    let record = host.own_file(record);
    record["functions"].as_array().unwrap().iter().map(|function| function["driver"].clone()).collect()
}

#[test]
fn a_card_that_was_left_on_vfio_pci_comes_home() {
    let host = left_on_vfio();
    let plan = host.run("enable 111 --dry-run").out;
    for line in [
        "0000:01:00 vfio-pci -> host, where Proxmox left it",
        "  release   remove_id 10de:22ba 10de:2684, driver_override=nvidia .0, driver_override=snd_hda_intel .1, unbind \
         from vfio-pci .0 .1",
        "  bind      bind to nvidia .0, bind to snd_hda_intel .1",
    ] {
        assert!(plan.lines().any(|other| other == line), "{line}: {plan}");
    }
    // A tree of files unbinds nothing: it is stranded there, and on record.
    let run = host.run("enable 111");
    let said = "gpu-handoff: Proxmox has left 0000:01:00 on vfio-pci when VM 111 ran without the hookscript: now it goes \
                home: 0000:01:00.0 to nvidia, 0000:01:00.1 to snd_hda_intel\n";
    assert!(run.err.contains(said), "{}", run.err);
    assert_eq!(homes(&host, "vm-111"), ["nvidia", "snd_hda_intel"]);
    let removed = fs::read_to_string(host.path("sys/bus/pci/drivers/vfio-pci/remove_id")).unwrap();
    assert!(removed.starts_with("10de "), "{removed}");
    // By hand it is the same.
    let plan = left_on_vfio().run("to-nvidia --dry-run").out;
    assert!(plan.contains("  bind      bind to nvidia .0, bind to snd_hda_intel .1\n"), "{plan}");
}

/// While the VM runs nothing moves, and then it comes home with the rest.
#[test]
fn a_vm_that_runs_since_before_it_had_the_hook() {
    let host = left_on_vfio().running(111, PID);
    let said = "0000:01:00 is on record for VM 111; when that stops, it goes home: 0000:01:00.0 to nvidia, 0000:01:00.1 to \
                snd_hda_intel\n";
    assert!(host.run("enable 111 --dry-run").out.ends_with(said));
    let run = host.run("enable 111");
    assert_eq!(run.code, Some(0), "{}", run.err);
    let said = "VM 111 runs with 0000:01:00 since before it had the hookscript; when it stops, it goes home: 0000:01:00.0 to \
                nvidia, 0000:01:00.1 to snd_hda_intel\n";
    assert!(run.err.ends_with(said), "{}", run.err);
    assert_eq!(homes(&host, "vm-111"), ["nvidia", "snd_hda_intel"]);
    assert_eq!(host.own_file("vm-111")["progress"], json!("away"));
    // One that got the hookscript in another way: its post-stop finds the card there.
    let host = left_on_vfio();
    let run = host.run("111 post-stop");
    assert!(run.err.contains("0000:01:00 VM 111 -> host"), "{}", run.err);
    assert_eq!(homes(&host, "vm-111"), ["nvidia", "snd_hda_intel"]);
    assert_eq!(settled().run("111 post-stop").err, "");
    // Of another VM that runs with it, without the hook.
    let host = left_on_vfio().vm(112, "hostpci0: 01:00").running(112, PID);
    let run = host.run("enable 111");
    assert!(
        run.err.contains(
            "0000:01:00 is on vfio-pci for VM 112, which runs without the hookscript: gpu-handoff enable 112\n"
        )
    );
    assert!(!host.has_own_file("vm-111"));
}

/// A start with the hook finds the card there: that is no home.
#[test]
fn vfio_pci_is_no_home_by_accident() {
    let host = left_on_vfio();
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(homes(&host, "vm-111"), ["nvidia", "snd_hda_intel"]);
    // What nothing would take is unbound; and by what the modules are for, when they are not loaded.
    let host = Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 0000:01:00");
    let host = host.file(
        "lib/modules/6.12.48-1-pve/modules.alias",
        "alias pci:v000010DEd*sv*sd*bc03sc*i* nouveau\nalias pci:v000010DEd*sv*sd*bc03sc00i00* nvidia\n",
    );
    host.run("111 pre-start");
    assert_eq!(homes(&host, "vm-111"), [json!("nvidia"), Value::Null]);
}

/// The configuration says it of the GPU alone.
#[test]
fn a_gpu_whose_home_is_without_a_driver() {
    let host = left_on_vfio().config(r#"{"gpus":{"0000:01:00":{"home":"none"}}}"#);
    host.run("111 pre-start");
    assert_eq!(homes(&host, "vm-111"), [Value::Null, json!("snd_hda_intel")]);
}

#[test]
fn where_something_puts_it_there_it_is_at_home() {
    let is_home = |host: Host, what: &str| {
        host.run("111 pre-start");
        assert_eq!(homes(&host, "vm-111"), ["vfio-pci", "vfio-pci"], "{what}");
    };
    let ids = "vfio-pci.ids=10de:2684,10de:22ba";
    is_home(left_on_vfio().file("proc/cmdline", &format!("quiet {ids}\n")), "command line");
    let options = "options vfio-pci ids=10de:2684,10de:22ba\n";
    is_home(left_on_vfio().file("etc/modprobe.d/vfio.conf", options), "modprobe.d");
    let mut driverctl = left_on_vfio();
    for number in 0..2 {
        driverctl =
            driverctl.file(&format!("{}/driver_override", device(&format!("0000:01:00.{number}"))), "vfio-pci\n");
    }
    is_home(driverctl, "driver_override");
    is_home(left_on_vfio().config(r#"{"gpus":{"01:00":{"home":"vfio-pci"}}}"#), "the configuration");
    let by_hand = left_on_vfio().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    is_home(by_hand, "by hand");
    // Nothing on this host would take it.
    is_home(settled(), "no driver");
    let kept =
        settled().file("lib/modules/6.12.48-1-pve/modules.alias", "alias pci:v000010DEd*sv*sd*bc03sc*i* nvidia\n");
    is_home(kept.file("etc/modprobe.d/x.conf", "blacklist nvidia\n"), "kept away");
    assert_eq!(left_on_vfio().config(r#"{"gpus":{"01:00":{"home":"vfio-pci"}}}"#).run("to-nvidia").code, Some(0));
}

/// On a storage that every node has: a script that does nothing where the program is not.
#[test]
fn a_hookscript_on_a_shared_storage() {
    let storages = "nfs: nas\n\tserver a\n\tcontent iso,snippets\n\nnfs: plain\n\tserver a\n\tcontent iso\n\ndir: own\n\t\
                    path /srv\n\tcontent snippets\n\nlvmthin: thin\n\tcontent images\n";
    let host = || host().file("etc/pve/storage.cfg", storages).file("mnt/pve/nas/snippets/other", "");
    let script = "mnt/pve/nas/snippets/gpu-handoff";
    let usual = host();
    let plan = usual.run("enable 111 --storage nas --dry-run").out;
    assert_eq!(
        plan,
        "write /mnt/pve/nas/snippets/gpu-handoff\n/usr/sbin/qm set 111 --hookscript nas:snippets/gpu-handoff\n"
    );
    assert!(!usual.path(script).exists());
    let done = "VM 111 has the hookscript nas:snippets/gpu-handoff from its next start on";
    assert_eq!(usual.run("enable 111 --storage nas"), said(done));
    assert_eq!(fs::metadata(usual.path(script)).unwrap().permissions().mode() & 0o777, 0o755);
    // The program is not on this machine, or it is and does not know such a guest.
    let ran = Command::new(usual.path(script)).args(["999", "post-start"]).status().unwrap();
    assert_eq!(ran.code(), Some(0));
    for call in ["enable 111", "enable 111 --storage nas"] {
        assert_eq!(usual.run(call), said("VM 111 has the hookscript already: nothing to do"), "{call}");
    }
    assert_eq!(usual.run("disable 111"), said("VM 111 has no hookscript any more"));
    assert!(usual.path(script).exists(), "other guests may name it");
    // One that has the link moves; an older script of ours is renewed.
    let moved = host().vm(111, OURS).file(script, "#!/bin/sh\n# Put here by: gpu-handoff enable ID\n");
    assert_eq!(moved.run("enable 111 --storage nas"), said(done));
    assert_eq!(read(&moved, script), read(&usual, script));

    let those = "those that are shared and have snippets: nas";
    refuses(&host(), "enable 111 --storage away", 2, &format!("there is no storage away; {those}"));
    for (name, why) in [
        ("plain", "has no snippets: pvesm set plain --content iso,snippets"),
        ("own", "is not shared, so that other nodes have no such file on it"),
        ("thin", "keeps no files"),
    ] {
        refuses(&host(), &format!("enable 111 --storage {name}"), 3, &format!("storage {name} {why}; {those}"));
    }
    let away = host().without("mnt/pve/nas/snippets");
    let message = "/mnt/pve/nas/snippets is not there: storage nas is not mounted, or was never used for snippets; see: pvesm \
                   status --storage nas";
    refuses(&away, "enable 111 --storage nas", 3, message);
    let theirs = host().file(script, "#!/bin/sh\n");
    let message =
        "/mnt/pve/nas/snippets/gpu-handoff is there and is not gpu-handoff's script; move it away, then try again";
    refuses(&theirs, "enable 111 --storage nas", 3, message);
}

/// Under HA, or wherever other nodes may start it, the link is only where the package is.
#[test]
fn a_cluster_is_told_where_the_hookscript_should_be() {
    let storages = "nfs: nas\n\tserver a\n\tcontent snippets\n";
    let host = host().file("etc/pve/corosync.conf", "").file("mnt/pve/nas/snippets/other", "");
    let told = host.run("enable 111 --dry-run").err;
    assert!(
        told.contains("or have its hookscript on a shared storage: gpu-handoff enable 111 --storage STORAGE\n"),
        "{told}"
    );
    let host = host.file("etc/pve/storage.cfg", storages);
    let told = host.run("enable 111").err;
    let advice = "enable 111 --storage nas";
    assert!(told.ends_with(&format!(": gpu-handoff {advice}\n")), "{told}");
    let shared = host.run(advice).err;
    assert!(
        shared.contains("on nodes without gpu-handoff VM 111 starts all the same and its card stays on"),
        "{shared}"
    );
    assert!(!shared.contains("--storage"), "{shared}");
}

#[test]
fn what_keeps_it_from_starting_is_told_when_it_is_enabled() {
    let host = with_tools(super::host()).vm(112, "machine: q35").vm(113, "hostpci0: mapping=gpu");
    let told = host.run("enable 112").err;
    assert!(
        told.contains("warning: VM 112 names no device yet (hostpci): qm set 112 --hostpci0 0000:01:00,pcie=1\n"),
        "{told}"
    );
    let host = host.vm(114, "args: -device vfio-pci,host=01:00.0");
    let told = host.run("enable 114 --dry-run").err;
    assert!(
        told.contains("warning: VM 114 passes 0000:01:00 by args, of which Proxmox itself does not know: "),
        "{told}"
    );
    let unknown = host.vm(115, "hostpci0: 01:00,newkey=1");
    let told = unknown.run("enable 115").err;
    assert!(
        told.contains("warning: VM 115: line 2 'hostpci0: 01:00,newkey=1' is not understood: there is no option"),
        "{told}"
    );
    let no_iommu = with_tools(super::host()).without(&format!("{}/iommu_group", device("0000:01:00.0")));
    let told = no_iommu.run("enable 111").err;
    assert!(
        told.contains(
            "warning: as things are VM 111 would not start: 0000:01:00 was not touched: 0000:01:00.0 is in no IOMMU \
                       group: the IOMMU is off; "
        ),
        "{told}"
    );
    let host = unknown;
    let told = host.run("enable 113").err;
    assert!(
        told.contains("warning: as things are VM 113 would not start: VM 113: hostpci0 uses mapping=gpu, which "),
        "{told}"
    );
}
