use super::attach::{CONFIG, config, container, minor, ready, record, two_cards};
use super::*;

// What containers are given already: whoever wrote it, in whatever way

/// A container that runs, with this configuration.
fn running(host: Host, ctid: u32, config: &str) -> Host {
    host.file(&format!("etc/pve/lxc/{ctid}.conf"), &format!("arch: amd64\n{config}\n"))
        .file(&format!("sys/fs/cgroup/lxc/{ctid}/cgroup.events"), "populated 1\nfrozen 0\n")
        .file(&format!("sys/fs/cgroup/lxc/{ctid}/cgroup.freeze"), "0\n")
}

/// Only who could open the card that goes is kept from it meanwhile.
#[test]
fn who_has_only_another_card_is_not_frozen() {
    let drm = |host: Host, address: &str, name: &str, number: &str| {
        host.file(&format!("{}/drm/{name}/dev", device(address)), &format!("{number}\n"))
    };
    let host = two_cards().function("0000:00:02.0", "030000", "8086:4680", "i915", 40).vm(111, "hostpci0: 01:00");
    let host = drm(host, "0000:01:00.0", "renderD129", "226:129");
    let host = drm(host, "0000:00:02.0", "renderD128", "226:128");
    let shared = "dev8: /dev/nvidiactl\ndev9: /dev/nvidia-uvm\nlxc.cgroup2.devices.allow: c 195:* rwm";
    let host = running(host, 201, &format!("dev0: /dev/nvidia1\n{shared}"));
    let host = running(host, 202, "dev0: /dev/dri/renderD128,gid=104");
    let host = running(host, 203, &format!("lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind\n{shared}"));
    let host = running(host, 204, "lxc.mount.entry: /dev/dri dev/dri none bind,create=dir");
    let host = running(host, 205, "dev0: /dev/dri/renderD129");
    let host = running(host, 206, "lxc.include: /etc/lxc/gpu.conf");
    let host = host.file("etc/lxc/gpu.conf", "lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind\n");
    let frozen = |host: &Host| -> Vec<u32> {
        let out = host.run("plan 111").out;
        let frozen = out.split_once("freeze container ").unwrap().1.split(',').next().unwrap();
        frozen.split(' ').map(|ctid| ctid.parse().unwrap()).collect()
    };
    assert_eq!(frozen(&host), [203, 204, 205, 206]);
    // The numbers of the cards are those of now.
    let host = minor(minor(host, "0000:01:00", "1"), "0000:02:00", "0");
    assert_eq!(frozen(&host), [201, 204, 205]);
}

const SHARED: [&str; 4] = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"];

/// The nodes that attach writes lines for.
fn adds(host: &Host, style: &str) -> Vec<String> {
    let run = host.run(&format!("container attach 101 --style {style} --dry-run"));
    assert_eq!(run.code, Some(0), "{}", run.err);
    let node = |line: &str| {
        let line = line.strip_prefix("  add       ")?;
        let value =
            line.strip_prefix("lxc.mount.entry: /dev/").or_else(|| line.split_once(": /dev/").map(|(_, rest)| rest))?;
        Some(value.split([' ', ',']).next().unwrap().to_string())
    };
    run.out.lines().filter_map(node).collect()
}

/// In whatever way a container has a node, it is not given again in either.
#[test]
fn a_node_is_given_once() {
    let entry = |name: &str| format!("lxc.mount.entry: /dev/{name} dev/{name} none bind,optional,create=file\n");
    for theirs in [
        "dev0: /dev/nvidia0,gid=44\n".to_string(),
        "dev7: path=/dev/nvidia0,deny-write=1\n".to_string(),
        entry("nvidia0"),
        "lxc.mount.entry = /dev/nvidia0  dev/nvidia0 none rw,bind 0 0\n".to_string(),
        "lxc.mount.entry: /dev//nvidia0 ./dev/nvidia0 none bind,ro\n".to_string(),
        "lxc.mount.entry: /dev/nvidia0 /var/lib/lxc/101/rootfs/dev/nvidia0 none bind\n".to_string(),
        "mp0: /dev/nvidia0,mp=/dev/nvidia0\n".to_string(),
        "lxc.include: /etc/lxc/gpu.conf\n".to_string(),
        "[pve:pending]\ndev0: /dev/nvidia0\n".to_string(),
    ] {
        let host = container(ready(), &format!("arch: amd64\n{theirs}"));
        let host = host.file("etc/lxc/gpu.conf", "lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind\n");
        for (style, others) in [("mount", &SHARED[..]), ("dev", &SHARED[..3])] {
            assert_eq!(adds(&host, style), others, "{style}: {theirs}");
        }
    }
    // What is of another time, or ignored, gives nothing.
    for theirs in [
        "#dev0: /dev/nvidia0\n",
        "[snap]\ndev0: /dev/nvidia0\n",
        "dev0: /dev/nvidia0\n[pve:pending]\ndelete: dev0\n",
        "lxc.mount.entry: /dev/nvidia0 dev/gpu none bind\n",
        "lxc.mount.entry: /dev/nvidia0 /dev/nvidia0 none bind\n",
        "lxc.mount.entry: /dev/nvidia0 dev/nvidia00 none bind\n",
    ] {
        let host = container(ready(), &format!("arch: amd64\n{theirs}"));
        assert_eq!(adds(&host, "dev")[0], "nvidia0", "{theirs}");
    }
    // All of them.
    for theirs in ["lxc.mount.entry: /dev dev none rbind\n", "lxc.hook.mount: /usr/share/lxc/hooks/nvidia\n"] {
        let host = container(ready(), &format!("arch: amd64\n{theirs}"));
        for style in ["mount", "dev"] {
            assert_eq!(adds(&host, style), NOTHING, "{theirs}");
        }
    }
}

/// By a link, and by a node of the same number elsewhere.
#[test]
fn the_same_node_under_another_name() {
    let node = format!("{}/drm/card0/dev", device("0000:01:00.0"));
    let host = ready().file(&node, NULL_NUMBER);
    fs::create_dir_all(host.path("dev/dri/by-path")).unwrap();
    std::os::unix::fs::symlink(NULL, host.path("dev/dri/by-path/pci-0000:01:00.0-card")).unwrap();
    let by_path = "/dev/dri/by-path/pci-0000:01:00.0-card";
    let host = container(host, &format!("arch: amd64\nlxc.mount.entry: {by_path} dev/dri/card0 none bind\n"));
    let out = host.run("container attach 101 --dri --style dev --dry-run").out;
    assert!(out.contains("/dev/nvidia0") && !out.contains("card0"), "{out}");
    let host = container(host, "arch: amd64\nlxc.mount.entry: /dev/dri dev/dri none bind,create=dir\n");
    let out = host.run("container attach 101 --dri --style dev --dry-run").out;
    assert!(out.contains("/dev/nvidia0") && !out.contains("card0"), "{out}");
}

#[test]
fn something_else_is_where_the_node_shall_be() {
    let line = "lxc.mount.entry: /dev/nvidia1 dev/nvidia0 none bind";
    let host = container(two_cards(), &format!("arch: amd64\n{line}\n"));
    let message = format!(
        "container 101 was not touched: something else than the host's /dev/nvidia0 is given to it there, by {line}; take \
         that line out of /etc/pve/lxc/101.conf, then: gpu-handoff container attach 101 --gpu 0000:01:00"
    );
    refuses(&host, "container attach 101 --gpu 01:00", 3, &message);
    refuses(&host, "container attach 101 --gpu 01:00 --style dev", 3, &message);
    assert_eq!(host.run("container attach 101 --gpu 02:00").code, Some(0));
}

/// The line that makes two of one goes, whoever came second.
#[test]
fn attach_takes_back_what_is_given_twice() {
    let host = ready();
    host.run("container attach 101");
    let both = config(&host).replace("rootfs:", "dev0: /dev/nvidia0,gid=44\nrootfs:");
    let host = container(host, &both);
    let checked = host.run("container check 101");
    let twice = "  twice     /dev/nvidia0 by dev0 and by lxc.mount.entry: it does not start with that: pct set 101 --delete dev0\n";
    assert!(checked.out.contains(twice) && checked.code == Some(1), "{}", checked.out);
    assert_eq!(host.run("container attach 101").code, Some(0));
    assert!(!config(&host).contains("/dev/nvidia0 dev/nvidia0"), "{}", config(&host));
    assert!(!host.run("container check 101").out.contains("twice"));
    host.run("container detach 101");
    assert!(config(&host).contains("dev0: /dev/nvidia0,gid=44\n"));
}

/// Proxmox says of these that the device does not exist.
#[test]
fn one_that_proxmox_does_not_start_with_dev() {
    for ostype in ["unmanaged", "nixos"] {
        let host = container(ready(), &format!("arch: amd64\nostype: {ostype}\n"));
        let why = format!(
            "container 101 gets mounts and no dev[n]: it is privileged and of ostype {ostype}, and Proxmox starts none such \
             with dev[n] (\"does not exist\")"
        );
        let run = host.run("container attach 101 --style dev");
        assert_eq!(run.code, Some(0));
        assert!(run.err.starts_with(&format!("gpu-handoff: warning: {why}\n")), "{}", run.err);
        assert!(config(&host).contains("/dev/nvidia0 dev/nvidia0") && !config(&host).contains("dev0:"));
        assert_eq!(record(&host)["style"], json!("mount"));
        let host = container(host, &format!("arch: amd64\nostype: {ostype}\nunprivileged: 1\n"));
        assert_eq!(host.run("container attach 101 --style dev").err.lines().count(), 1);
        assert!(config(&host).contains("dev0: /dev/nvidia0"));
        let by_hand = container(ready(), &format!("ostype: {ostype}\ndev0: /dev/nvidia0\ndev3: /dev/nvidiactl\n"));
        let out = by_hand.run("container check 101").out;
        assert!(out.contains(": pct set 101 --delete dev0,dev3, then gpu-handoff container attach 101\n"), "{out}");
    }
    let debian = container(ready(), "arch: amd64\nostype: debian\n");
    assert_eq!(debian.run("container attach 101 --style dev").err.lines().count(), 1);
}

/// What check says to type is accepted, and then it says it no more.
#[test]
fn what_is_advised_works() {
    let entries = "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n\
                   lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n";
    for (rules, what) in [
        ("lxc.cgroup2.devices.allow: c 195:* rwm\nlxc.cgroup2.devices.allow: c 509:* rwm\n", "none for nvidia-uvm 511"),
        (
            "lxc.cgroup.devices.allow: c 195:* rwm\n",
            "none for nvidia 195, nvidia-uvm 511; lxc.cgroup.devices.allow is of",
        ),
        ("lxc.cgroup2.devices.allow: c 195:1 rwm\nlxc.cgroup2.devices.allow: c 511:* rwm\n", "none for nvidia 195:"),
    ] {
        for (mut host, flags) in [(ready(), ""), (two_cards(), " --gpu 0000:01:00")] {
            host = container(host, &format!("arch: amd64\n{rules}{entries}"));
            let run = host.run("container check 101");
            assert_eq!(run.code, Some(1));
            assert!(run.out.contains("  attached  not by gpu-handoff: its lines are somebody else's\n"), "{}", run.out);
            let advice = format!("gpu-handoff container attach 101{flags}");
            let line = run.out.lines().find(|line| line.starts_with("  rules     none for ")).unwrap();
            assert!(line.contains(what) && line.ends_with(&format!(": {advice}")), "{line}");
            assert_eq!(host.run(advice.strip_prefix("gpu-handoff ").unwrap()).code, Some(0));
            let after = host.run("container check 101");
            assert_eq!(after.code, Some(0), "{}", after.out);
        }
    }
    // The card is with a VM: then that is what stands in the way.
    let host = container(settled(), &format!("arch: amd64\n{entries}")).running(111, PID);
    let out = host.run("container check 101").out;
    assert!(
        out.contains("VM 111 has it; stop that first: qm shutdown 111, then: gpu-handoff container attach 101\n"),
        "{out}"
    );
}

#[test]
fn hand_written_containers_are_listed_as_well() {
    let host = ready()
        .file("etc/pve/lxc/102.conf", "dev0: /dev/nvidia0\n")
        .file("etc/pve/lxc/103.conf", "dev0: /dev/dri/renderD128\n")
        .file("etc/pve/lxc/104.conf", "lxc.include: /etc/lxc/gpu.conf\n")
        .file("etc/pve/lxc/105.conf", "lxc.hook.mount: /usr/share/lxc/hooks/nvidia\n")
        .file("etc/lxc/gpu.conf", "lxc.cgroup2.devices.allow = c 195:* rwm\n");
    let out = host.run("container check --all").out;
    let listed: Vec<&str> = out.lines().filter_map(|line| line.strip_prefix("container ")).collect();
    assert_eq!(listed, ["102", "104", "105"], "{out}");
    assert!(
        out.contains("calls nvidia-container-cli, which this host lacks: the container does not start: install"),
        "{out}"
    );
    let told = host.run("container detach 105").err;
    let end = "somebody else's: lxc.hook.mount: /usr/share/lxc/hooks/nvidia; to take them out: remove the lxc.* ones from \
               /etc/pve/lxc/105.conf in an editor\n";
    assert!(told.ends_with(end), "{told}");
}

/// Proxmox starts no container with a device that does not exist.
#[test]
fn devices_that_are_not_there() {
    let cap = |minor: u32| format!("DeviceFileMinor: {minor}\nDeviceFileMode: 256\nDeviceFileModify: 1\n");
    let host = ready()
        .file("proc/devices", "Character devices:\n195 nvidia\n236 nvidia-caps\n511 nvidia-uvm\nBlock devices:\n")
        .file("proc/driver/nvidia/params", "ModifyDeviceFiles: 1\nDeviceFileMode: 438\n")
        .file("proc/driver/nvidia/capabilities/mig/config", &cap(1))
        .file("proc/driver/nvidia/capabilities/mig/monitor", &cap(2));
    let host = container(host, "dev0: /dev/nvidia0\ndev1: /dev/nvidia-caps/nvidia-cap1\ndev2: /dev/nothing\n");
    let out = host.run("container check 101").out;
    let made = "  devices   dev0 is /dev/nvidia0, dev1 is /dev/nvidia-caps/nvidia-cap1, which does not exist: it does not start: \
                gpu-handoff reconcile\n";
    assert!(out.contains(made), "{out}");
    let not = "  devices   dev2 is /dev/nothing, which does not exist: it does not start: pct set 101 --delete dev2\n";
    assert!(out.contains(not), "{out}");
    // Only what somebody is given.
    let out = host.run("reconcile --dry-run").out;
    assert!(out.contains("/dev/nvidia-caps/nvidia-cap1") && !out.contains("nvidia-cap2"), "{out}");
    fs::create_dir_all(host.path("dev/nvidia-caps")).unwrap();
    for node in ["nvidia0", "nvidia-caps/nvidia-cap1", "nothing"] {
        std::os::unix::fs::symlink(NULL, host.path(&format!("dev/{node}"))).unwrap();
    }
    let run = host.run("container check 101");
    assert_eq!((run.code, run.out.contains("devices")), (Some(0), false), "{}", run.out);
    assert!(host.path(CONFIG).exists());
}

/// A directory of nodes is mounted node by node where one of them has its own line.
#[test]
fn a_directory_beside_one_of_its_nodes() {
    let host = ready()
        .file("proc/devices", "Character devices:\n195 nvidia\n236 nvidia-caps\n511 nvidia-uvm\nBlock devices:\n");
    let host = host.file("dev/nvidia-caps/nvidia-cap1", "").file("dev/nvidia-caps/nvidia-cap2", "");
    assert_eq!(adds(&host, "mount").last().unwrap(), "nvidia-caps");
    let host = container(host, "arch: amd64\ndev0: /dev/nvidia-caps/nvidia-cap1\n");
    assert_eq!(adds(&host, "mount")[5..], ["nvidia-caps/nvidia-cap2"]);
    assert!(!adds(&host, "dev").contains(&"nvidia-caps/nvidia-cap1".to_string()));
}
