use super::*;

// Guests

#[test]
fn an_unknown_guest() {
    let message = "there is no guest 999: /etc/pve/qemu-server/999.conf does not exist; qm list shows the VMs";
    refuses(&host(), "999 pre-start", 2, message);
    for phase in ["post-start", "pre-stop", "post-stop", "no-such-phase"] {
        ignores(&host(), &format!("999 {phase}"));
    }
}

#[test]
fn a_container() {
    let host = host().file("etc/pve/lxc/101.conf", "arch: amd64\ndev0: /dev/nvidia0\n");
    for phase in ["pre-start", "post-start", "pre-stop", "post-stop"] {
        ignores(&host, &format!("101 {phase}"));
    }
    plans(&host, "plan 101", &["guest 101 takes no NVIDIA GPU: nothing to do"]);
}

#[test]
fn other_phases_of_a_vm_with_a_gpu() {
    for phase in ["post-start", "pre-stop", "post-stop", "no-such-phase"] {
        ignores(&host(), &format!("111 {phase}"));
    }
}

/// What of a guest's configuration takes no NVIDIA GPU from the host.
#[test]
fn vms_that_take_no_gpu() {
    const SNAPSHOT: &str = "[before]\nhostpci0: 01:00\nsnaptime: 1763640000";
    for (what, config) in [
        ("nothing passed through", "cores: 4"),
        ("another vendor's GPU", "hostpci0: 02:00,x-vga=1"),
        ("an NVIDIA device that is no GPU", "hostpci0: 03:00"),
        ("two such devices", "hostpci0: 02:00;03:00.0"),
        ("left on its driver", "hostpci0: 01:00,driver=keep"),
        ("a mediated device", "hostpci0: 01:00.0,mdev=nvidia-63"),
        ("only a pending change", "[PENDING]\nhostpci0: 01:00"),
        ("only a snapshot", SNAPSHOT),
        ("only a special section", "[special:cloudinit]\nhostpci0: 01:00"),
        ("only the description", "#hostpci0: 01:00"),
    ] {
        let host = host()
            .function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2)
            .function("0000:03:00.0", "0c0330", "10de:1ad6", "xhci_hcd", 3)
            .vm(111, config);
        let before = host.snapshot();
        assert_eq!(host.run("111 pre-start"), Run { code: Some(0), out: String::new(), err: String::new() }, "{what}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{what}");
        plans(&host, "plan 111", &["guest 111 takes no NVIDIA GPU: nothing to do"]);
    }
}

#[test]
fn the_current_section_counts_whatever_follows() {
    let config = "hostpci0: 01:00\n[PENDING]\nhostpci0: 02:00\n[before]\nhostpci0: 09:00";
    accepts(&settled().vm(111, config), config);
}

/// Every way to write it makes the same slot ready, whole.
#[test]
fn every_form_of_hostpci() {
    for config in [
        "hostpci0: 01:00",
        "hostpci0: 0000:01:00",
        "hostpci0: 01:00.0",
        "hostpci15: 0000:01:00.0",
        "hostpci0: 01:00.0;01:00.1",
        "hostpci0: 0000:01:00.0;0000:01:00.1,pcie=1,x-vga=1",
        "hostpci0: host=01:00",
        "hostpci0: host=0000:01:00.0,pcie=1",
        "hostpci0: pcie=1,01:00.0",
        "hostpci0: romfile=vbios.rom,x-vga=1,host=01:00;02:00",
        "hostpci0: 01:00.0\nhostpci1: 01:00.1",
        "hostpci3: 02:00\nhostpci7: 01:00,driver=vfio",
    ] {
        let host = settled().function("0000:02:00.0", "010802", "144d:a80a", "nvme", 2).vm(111, config);
        let before = host.snapshot().without_lock();
        accepts(&host, config);
        let record = host.own_file("vm-111");
        let expected = json!({"schema": 1, "progress": "away", "modules": [], "caller": null, "by_hand": true, "functions": [
            {"slot": "0000:01:00", "address": "0000:01:00.0", "driver": "vfio-pci", "module": "vfio_pci"},
            {"slot": "0000:01:00", "address": "0000:01:00.1", "driver": "vfio-pci", "module": "vfio_pci"},
        ]});
        assert_eq!(record, expected, "{config}");
        let host = host.without("run/gpu-handoff");
        assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{config}");
    }
}

#[test]
fn two_cards_of_one_vm() {
    let host = settled().card("0000:02:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 02:00\nhostpci1: 01:00");
    assert_eq!(host.run("111 pre-start"), success("0000:02:00 0000:01:00 is already on vfio-pci: nothing to do"));
}

#[test]
fn a_line_that_proxmox_drops_is_a_warning() {
    let host = host().vm(111, "hostpci0: 0G:00");
    let before = host.snapshot();
    assert_eq!(
        host.run("111 pre-start"),
        success("warning: VM 111: line 2 'hostpci0: 0G:00' is ignored: option 'host' cannot be '0G:00'")
    );
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
}

#[test]
fn a_line_that_proxmox_drops_is_a_warning_beforehand() {
    let Run { code, out, err } = host().vm(111, "hostpci0: 0G:00").run("plan 111");
    let line = "warning: VM 111: line 2 'hostpci0: 0G:00' is ignored: option 'host' cannot be '0G:00'";
    assert_eq!((code, err), (Some(0), format!("gpu-handoff: {line}\n")));
    assert_eq!(out, "guest 111 takes no NVIDIA GPU: nothing to do\n");
}

/// A later Proxmox may read it, and would take the card whoever uses it.
#[test]
fn an_option_that_is_not_known_on_a_gpus_line() {
    let host = settled().vm(111, "hostpci0: 0000:01:00,pcie=1,newkey=1");
    let run = host.run("111 pre-start");
    let warning = "gpu-handoff: warning: VM 111: line 2 'hostpci0: 0000:01:00,pcie=1,newkey=1' is not understood: there is no \
                   option 'newkey'; Proxmox may understand it, so 0000:01:00 is given to the VM all the same; if it is a \
                   mistake: qm set 111 --hostpci0 '0000:01:00,pcie=1'\n";
    assert_eq!((run.code, run.err), (Some(0), format!("{warning}{}", ready().err)));
    assert!(host.has_own_file("vm-111"));
    for line in ["hostpci0: 01:00,driver=other", "hostpci16: 01:00", "hostpci3: x=y,host=01:00.0;01:00.1"] {
        let out = settled().vm(111, line).run("plan 111").out;
        assert!(out.starts_with("0000:01:00 host -> VM 111\n"), "{line}: {out}");
    }
    for line in
        ["hostpci0: 02:00,newkey=1", "hostpci0: 01:00,driver=keep,newkey=1", "hostpci0: 01:00.0,mdev=a,newkey=1"]
    {
        let host = settled().function("0000:02:00.0", "010802", "144d:a80a", "nvme", 2).vm(111, line);
        let run = host.run("plan 111");
        assert_eq!(run.out, "guest 111 takes no NVIDIA GPU: nothing to do\n", "{line}");
        assert!(run.err.contains(" is ignored: "), "{}", run.err);
    }
    let used = super::host()
        .vm(111, "hostpci0: 01:00,newkey=1")
        .file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), NULL_NUMBER);
    let run = used.process(PID, "job", "/x", &[NULL]).run("111 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
}

#[test]
fn what_qemu_itself_is_told_to_pass() {
    for args in [
        "args: -device vfio-pci,host=01:00.0,multifunction=on -device vfio-pci,host=01:00.1",
        "args: -device 'vfio-pci,host=0000:01:00.0'",
        r#"args: -device '{"driver":"vfio-pci","host":"0000:01:00.0"}'"#,
    ] {
        accepts(&settled().vm(111, args), args);
    }
    let message = "VM 111: args names 0000:05:00.0, but there is no such device; lspci -D shows what there is";
    refuses(&host().vm(111, "args: -device vfio-pci,host=05:00.0"), "111 pre-start", 3, message);
    let run = host().vm(111, "args: -device vfio-pci,id=gpu").run("plan 111");
    assert!(run.err.contains("args has vfio-pci,id=gpu, and which device that names cannot be read"), "{}", run.err);
    ignores(&host().vm(111, "args: -cpu host,kvm=off -device virtio-net-pci,id=x"), "111 pre-start");
    let neighbour = with_neighbour(settled(), "010802", "nvme");
    accepts(&neighbour.vm(111, "hostpci0: 01:00\nargs: -device vfio-pci,host=02:00.0"), "a neighbour by args");
}

/// A card more, and the line names somebody else's device.
#[test]
fn an_address_that_has_shifted() {
    const OURS: &str = "machine: q35\nhookscript: local:snippets/gpu-handoff\n";
    let shifted = |lines: &str| {
        Host::new()
            .card("0000:02:00", "nvidia", "snd_hda_intel")
            .function("0000:01:00.0", "010802", "144d:a808", "nvme", 14)
            .vm(111, lines)
    };
    let hooked = || shifted(&format!("{OURS}hostpci0: 0000:01:00,pcie=1"));
    let at = "the NVIDIA GPU is at 0000:02:00 now: qm set 111 --hostpci0 0000:02:00,pcie=1";
    let was = |why: &str| {
        format!(
            "VM 111 was not started: hostpci0 names 0000:01:00, where an NVIDIA GPU was ({why}) and now is 144d:a808 (class \
             0108), which nvme has: addresses shift with what is in the host, and Proxmox would take that device from it; \
             {at}; if VM 111 shall have that device: gpu-handoff disable 111"
        )
    };
    let configured = hooked().config(r#"{"gpus":{"0000:01:00":{"home":"nvidia"}}}"#);
    refuses(&configured, "111 pre-start", 3, &was("gpus.0000:01:00 in /etc/gpu-handoff/config.json"));
    let status = configured.run("--status");
    let told = "gpu-handoff: warning: gpus.0000:01:00 in /etc/gpu-handoff/config.json names no NVIDIA GPU; those of this host: \
                0000:02:00\n";
    assert_eq!((status.code, status.err.as_str()), (Some(0), told));
    let entry = r#"{"schema":1,"time":"2026-11-20T12:00:00Z","direction":"vfio","vmid":111,"slots":["0000:01:00"],"exit":0,"ms":1,"phases":[],"reason":null}"#;
    let past = hooked().file("var/lib/gpu-handoff/history.jsonl", &format!("{entry}\n"));
    refuses(&past, "111 pre-start", 3, &was("VM 111 had it before, see gpu-handoff history"));
    // Nobody knows of a GPU there: told, and Proxmox's business.
    let run = hooked().run("111 pre-start");
    let told = format!(
        "gpu-handoff: warning: VM 111 has this hookscript and takes no NVIDIA GPU: hostpci0 names 0000:01:00, which is 144d:a808 \
         (class 0108) (nvme has it); {at}\n"
    );
    assert_eq!((run.code, run.err), (Some(0), told));
    // Nobody has it, or the VM has no hook, or names a part of an NVIDIA card.
    let free = Host::new().card("0000:02:00", "nvidia", "snd_hda_intel").function(
        "0000:01:00.0",
        "010802",
        "144d:a808",
        "vfio-pci",
        14,
    );
    let free = free.vm(111, &format!("{OURS}hostpci0: 01:00")).config(r#"{"gpus":{"01:00":{"home":"nvidia"}}}"#);
    assert_eq!(free.run("111 pre-start").code, Some(0));
    // By a mapping, by a line that a later Proxmox may understand, and by args, which Proxmox takes from nobody.
    let gpu = "the NVIDIA GPU is at 0000:02:00 now: qm set 111 --hostpci";
    let cfg = "gpu\n\tmap id=10de:2684,iommugroup=14,node=pve,path=0000:01:00\n";
    let disk = "which is 144d:a808 (class 0108) (nvme has it)";
    for (lines, told) in [
        ("hostpci3: mapping=gpu,pcie=1", format!("hostpci3 names mapping=gpu, {disk}; {gpu}3 0000:02:00,pcie=1")),
        ("hostpci3: 01:00,newkey=1", format!("hostpci3 names 01:00, {disk}; {gpu}3 0000:02:00,newkey=1")),
        (
            "hostpci0: mapping=none,mdev=x\nargs: -device vfio-pci,host=01:00.0",
            format!("args names 0000:01:00, {disk}; {gpu}1 0000:02:00,pcie=1, and take 0000:01:00 out of args"),
        ),
    ] {
        let host = shifted(&format!("{OURS}{lines}")).file("etc/pve/mapping/pci.cfg", cfg);
        let run = host.run("111 pre-start");
        let told = format!("gpu-handoff: warning: VM 111 has this hookscript and takes no NVIDIA GPU: {told}\n");
        assert_eq!(run.code, Some(0));
        assert!(run.err.ends_with(&told), "{}", run.err);
    }
    let known = r#"{"gpus":{"0000:01:00":{"home":"nvidia"}}}"#;
    let by_mapping =
        shifted(&format!("{OURS}hostpci0: mapping=gpu")).file("etc/pve/mapping/pci.cfg", cfg).config(known);
    assert_eq!(by_mapping.run("111 pre-start").code, Some(3));
    let by_args = shifted(&format!("{OURS}args: -device vfio-pci,host=01:00.0")).config(known);
    assert_eq!(by_args.run("111 pre-start").code, Some(0));
    ignores(&shifted("hostpci0: 0000:01:00"), "111 pre-start");
    ignores(&shifted(OURS), "111 pre-start");
    let told = shifted(OURS).run("plan 111").err;
    assert!(told.contains("VM 111 names no device yet (hostpci): qm set 111 --hostpci0 0000:02:00,pcie=1"), "{told}");
}

/// They connect the GPUs; NVIDIA's driver must have them back, or its fabric manager does not start.
#[test]
fn switches_go_with_the_gpus_and_come_home() {
    let switch = |host: Host, driver: &str| host.function("0000:05:00.0", "068000", "10de:22a3", driver, 5);
    let host = switch(host(), "nvidia-nvswitch").without("sys/module/nvidia_nvswitch");
    let host = host.without("sys/bus/pci/drivers/nvidia-nvswitch/module");
    let host = host.link("sys/bus/pci/drivers/nvidia-nvswitch/module", "sys/module/nvidia");
    let host = host.vm(111, "hostpci0: 01:00\nhostpci1: 05:00");
    let out = host.run("plan 111").out;
    let lines: Vec<&str> = out.lines().filter(|line| line.contains("0000:05:00")).collect();
    assert_eq!(
        lines,
        [
            "0000:01:00 0000:05:00 host -> VM 111",
            "  prepare   driver_override=vfio-pci 0000:01:00.0 0000:01:00.1 0000:05:00.0",
            "  bind      bind to vfio-pci 0000:01:00.0 0000:01:00.1 0000:05:00.0"
        ]
    );
    assert!(out.contains("  release   unload nvidia, unbind from snd_hda_intel 0000:01:00.1\n"), "{out}");
    // A VM that takes only these, and one that Proxmox left on vfio-pci.
    let out = host.vm(111, "hostpci0: 05:00.0").run("plan 111").out;
    assert!(out.contains("  release   unbind from nvidia-nvswitch .0\n"), "{out}");
    let left = switch(settled(), "vfio-pci").driver("nvidia-nvswitch").vm(111, "hostpci0: 01:00\nhostpci1: 05:00");
    left.run("111 pre-start");
    let record = left.own_file("vm-111");
    let switch = record["functions"].as_array().unwrap().iter().find(|f| f["address"] == "0000:05:00.0").unwrap();
    assert_eq!(switch["driver"], json!("nvidia-nvswitch"));
    // As a stranger in the group it is no bridge.
    let stranger = settled().function("0000:05:00.0", "068000", "10de:22a3", "nvidia-nvswitch", 1);
    assert_eq!(stranger.run("111 pre-start").code, Some(3));
}

// Devices

#[test]
fn absent_devices() {
    for (config, named, instead) in [
        ("hostpci0: 05:00", "hostpci0 names 05:00", "qm set 111 --hostpci0 0000:01:00"),
        ("hostpci2: 0000:05:00.0,pcie=1", "hostpci2 names 0000:05:00.0", "qm set 111 --hostpci2 0000:01:00,pcie=1"),
    ] {
        let message =
            format!("VM 111: {named}, but there is no such device; the NVIDIA GPU is at 0000:01:00 now: {instead}");
        refuses(&host().vm(111, config), "111 pre-start", 3, &message);
    }
    for (config, named) in [
        ("hostpci0: 01:00.2", "hostpci0 names 01:00.2"),
        ("hostpci0: 01:00.0;01:00.7,x-vga=1", "hostpci0 names 01:00.0;01:00.7,x-vga=1"),
        ("hostpci0: 01:00\nhostpci1: 00000:01:00", "hostpci1 names 00000:01:00"),
    ] {
        let message = format!("VM 111: {named}, but there is no such device; lspci -D shows what there is");
        refuses(&host().vm(111, config), "111 pre-start", 3, &message);
    }
}

#[test]
fn no_iommu() {
    for address in ["0000:01:00.0", "0000:01:00.1"] {
        let host = host().without(&format!("{}/iommu_group", device(address)));
        let message = format!(
            "0000:01:00 was not touched: {address} is in no IOMMU group: the IOMMU is off; turn on VT-d or AMD-Vi in \
             the firmware and, on Intel, boot with intel_iommu=on"
        );
        refuses(&host, "111 pre-start", 3, &message);
        refuses(&host, "to-vfio", 3, &message);
    }
}

#[test]
fn vfio_pci_is_missing() {
    let message = "0000:01:00 was not touched: vfio-pci is neither loaded nor among the running kernel's modules; \
                   reboot into the installed kernel, or: apt install --reinstall proxmox-kernel-$(uname -r)";
    let without = || host().without("sys/bus/pci/drivers/vfio-pci");
    refuses(&without(), "111 pre-start", 3, message);
    // The modules of a kernel that does not run, and another driver of a similar name.
    let other = without()
        .file("lib/modules/6.8.12-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko: kernel/a.ko\n")
        .file("lib/modules/6.12.48-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci-core.ko: kernel/a.ko\n");
    refuses(&other, "111 pre-start", 3, message);
}

/// Then it would be loaded: the run gets that far and finds no modprobe in the tree.
#[test]
fn vfio_pci_is_not_loaded_yet() {
    for (list, line) in [
        ("modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/pci/vfio-pci-core.ko.zst\n"),
        ("modules.dep", "kernel/a.ko:\nkernel/drivers/vfio/pci/vfio-pci.ko:\n"),
        ("modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n"),
    ] {
        let host = host()
            .without("sys/bus/pci/drivers/vfio-pci")
            .without("sys/module/vfio_pci")
            .file(&format!("lib/modules/6.12.48-1-pve/{list}"), line);
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out.as_str()), (Some(1), ""), "{list}");
        let message = "gpu-handoff: error: 0000:01:00 is back where it was: load vfio_pci: modprobe is not installed; \
                       then start VM 111 again: qm start 111";
        assert_eq!(err.lines().last(), Some(message), "{list}");
    }
}

/// A function of another slot in the card's IOMMU group.
pub fn with_neighbour(host: Host, class: &str, driver: &str) -> Host {
    host.function("0000:02:00.0", class, "144d:a80a", driver, 1)
}

#[test]
fn a_neighbour_in_the_group_that_the_host_uses() {
    let message = "0000:01:00 was not touched: 0000:02:00.0 is in the same IOMMU group (1) and nvme has it: a group \
                   goes to a VM as a whole; move one of the two to another slot, or look in the firmware for ACS, which \
                   makes groups smaller";
    for home in [host, settled] {
        let host = with_neighbour(home(), "010802", "nvme");
        refuses(&host, "111 pre-start", 3, message);
        refuses(&host, "to-vfio 01:00", 3, message);
    }
    let another_vms = with_neighbour(settled(), "010802", "nvme").vm(112, "hostpci0: 02:00");
    refuses(&another_vms, "111 pre-start", 3, message);
}

/// The kernel excuses drivers that do no DMA for the host, not kinds of devices: with any other the group is nobody's, and
/// QEMU would fail late.
#[test]
fn a_bridge_that_works_for_the_host() {
    for (class, driver) in [("060000", "skx_uncore"), ("060100", "lpc_ich")] {
        let message = format!(
            "0000:01:00 was not touched: 0000:02:00.0 is in the same IOMMU group (1) and {driver} has it: a group goes to a \
             VM as a whole; move one of the two to another slot, or look in the firmware for ACS, which makes groups smaller"
        );
        refuses(&with_neighbour(settled(), class, driver), "111 pre-start", 3, &message);
    }
}

#[test]
fn neighbours_in_the_group_that_do_not_matter() {
    for (what, class, driver) in [
        ("on vfio-pci", "010802", "vfio-pci"),
        ("on pci-stub", "010802", "pci-stub"),
        ("unbound", "010802", ""),
        ("a bridge", "060400", "pcieport"),
        ("a host bridge", "060000", ""),
    ] {
        accepts(&with_neighbour(settled(), class, driver), what);
    }
    for lines in ["hostpci0: 01:00;02:00", "hostpci0: 01:00\nhostpci1: 0000:02:00.0,pcie=1"] {
        accepts(&with_neighbour(settled(), "010802", "nvme").vm(111, lines), lines);
    }
    let elsewhere = settled().function("0000:02:00.0", "010802", "144d:a80a", "nvme", 2);
    accepts(&elsewhere, "in another group");
}

// SR-IOV and mediated devices

#[test]
fn a_physical_function_in_use() {
    let attribute = format!("{}/sriov_numvfs", device("0000:01:00.0"));
    let message = "0000:01:00 was not touched: 0000:01:00.0 has 4 SR-IOV virtual functions, which would vanish; \
                   remove them first: echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs";
    refuses(&settled().file(&attribute, "4\n"), "111 pre-start", 3, message);
    accepts(&settled().file(&attribute, "0\n"), "no virtual function now");
}

/// A GPU with virtual functions, of which the first two are in its own slot, as with Ampere cards and later ones.
pub fn with_virtual_functions(mut host: Host) -> Host {
    host = host.file(&format!("{}/sriov_numvfs", device("0000:01:00.0")), "3\n");
    for (group, address) in [(21, "0000:01:00.4"), (22, "0000:01:00.5"), (23, "0000:01:01.0")] {
        host = host
            .function(address, "030200", "10de:2684", "nvidia", group)
            .link(&format!("{}/physfn", device(address)), &device("0000:01:00.0"));
    }
    host
}

#[test]
fn a_virtual_function_is_left_to_proxmox() {
    for config in ["hostpci0: 01:00.4", "hostpci0: 01:00.4;01:00.5", "hostpci0: 0000:01:01", "hostpci0: 01:01.0,pcie=1"]
    {
        ignores(&with_virtual_functions(host()).vm(111, config), "111 pre-start");
    }
}

#[test]
fn the_physical_function_beside_virtual_ones() {
    let message = "0000:01:00 was not touched: 0000:01:00.0 has 3 SR-IOV virtual functions, which would vanish; \
                   remove them first: echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs";
    // The whole slot names the physical function, too.
    for config in ["hostpci0: 01:00.0", "hostpci0: 01:00"] {
        refuses(&with_virtual_functions(host()).vm(111, config), "111 pre-start", 3, message);
    }
    refuses(&with_virtual_functions(host()), "to-vfio", 3, message);
}

#[test]
fn a_slot_of_virtual_functions_by_hand() {
    let message = "slot 0000:01:01 has no NVIDIA GPU; gpu-handoff --status shows those there are";
    for verb in ["to-vfio", "to-nvidia"] {
        refuses(&with_virtual_functions(host()), &format!("{verb} 01:01"), 3, message);
    }
}

#[test]
fn a_mapping_to_a_virtual_function() {
    let mapping = "vf\n\tmap id=10de:2684,iommugroup=23,node=pve,path=0000:01:01.0\n";
    let host = with_virtual_functions(host()).file("etc/pve/mapping/pci.cfg", mapping);
    ignores(&host.vm(111, "hostpci0: mapping=vf"), "111 pre-start");
}

#[test]
fn mediated_devices_exist() {
    let uuid = "sys/class/mdev_bus/0000:01:00.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/mdev_type";
    let message = "0000:01:00 was not touched: 0000:01:00.0 has mediated devices (vGPU), which would vanish; stop what \
                   uses them, then for each: echo 1 > /sys/class/mdev_bus/0000:01:00.0/UUID/remove";
    refuses(&settled().file(uuid, ""), "111 pre-start", 3, message);
    let types = "sys/class/mdev_bus/0000:01:00.0/mdev_supported_types/nvidia-63/name";
    accepts(&settled().file(types, "GRID T4\n"), "it could have some");
}

// Mappings

pub fn with_mappings(host: Host) -> Host {
    host.function("0000:02:00.0", "010802", "144d:a80a", "nvme", 2).file(
        "etc/pve/mapping/pci.cfg",
        "gpu\n\
         \tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00\n\
         \n\
         disk\n\
         \tmap id=10de:2684,iommugroup=1,node=other,path=0000:01:00\n\
         \tmap id=144d:a80a,iommugroup=2,node=pve,path=0000:02:00.0\n\
         \n\
         either\n\
         \tmap id=144d:a80a,iommugroup=2,node=pve,path=0000:02:00\n\
         \tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00.0\n\
         \n\
         both\n\
         \tmap id=144d:a80a,iommugroup=2,node=pve,path=0000:02:00;0000:01:00\n\
         \n\
         elsewhere\n\
         \tmap id=144d:a80a,iommugroup=2,node=other,path=0000:02:00\n",
    )
}
