//! What the program says no to, and what it only reads, run as Proxmox or a person runs it on a tree of files.
//!
//! Whether something is accepted shows in how far the run gets: a card that is at home on vfio-pci passes every check
//! and then has nothing to do, which is a success.

#[path = "common/tree.rs"]
mod tree;

use serde_json::{Value, json};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tree::{Host, Run, START, device};

/// No kernel gives a process such a number, so it is never that of the program itself.
const PID: u32 = 5_000_001;

/// Every process may open it, so its number (1:3) can stand for that of a GPU's node.
const NULL: &str = "/dev/null";
const NULL_NUMBER: &str = "1:3\n";

/// One GPU that the host uses, and VM 111 that takes it.
fn host() -> Host {
    Host::new().card("0000:01:00", "nvidia", "snd_hda_intel").vm(111, "hostpci0: 0000:01:00,pcie=1")
}

/// The same, but the GPU is at home on vfio-pci.
fn settled() -> Host {
    Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 0000:01:00,pcie=1")
}

/// The exit code and the one line are these, and nothing was touched. Who asks beforehand is told the same, and then
/// not even a lock is taken.
#[track_caller]
fn refuses(host: &Host, call: &str, code: i32, message: &str) {
    let before = host.snapshot();
    if let Some(question) = beforehand(call) {
        assert_eq!(host.run(&question), refusal(code, message), "{question}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{question}");
    }
    refuses_now(host, call, code, message);
}

/// As [`refuses`], but nobody asks beforehand.
#[track_caller]
fn refuses_now(host: &Host, call: &str, code: i32, message: &str) {
    let before = host.snapshot().without_lock();
    assert_eq!(host.run(call), refusal(code, message), "{call}");
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
}

fn refusal(code: i32, message: &str) -> Run {
    Run { code: Some(code), out: String::new(), err: format!("gpu-handoff: error: {message}\n") }
}

/// How to ask what a call would do.
fn beforehand(call: &str) -> Option<String> {
    match call.split_once(' ') {
        Some((id, "pre-start")) => Some(format!("plan {id}")),
        Some((id, _)) if id.parse::<u32>().is_ok() => None,
        _ => Some(format!("{call} --dry-run")),
    }
}

/// These lines on standard output, and nothing changed: not even a lock was taken.
#[track_caller]
fn plans(host: &Host, call: &str, lines: &[&str]) {
    let before = host.snapshot();
    let out: String = lines.iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(host.run(call), Run { code: Some(0), out, err: String::new() }, "{call}");
    assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}");
}

/// The lines that a run wrote, without the name before them and without how long it took.
fn told(run: &Run) -> Vec<String> {
    let line = |line: &str| {
        let line = line.strip_prefix("gpu-handoff: ").unwrap();
        let Some((before, after)) = line.split_once(" ms") else { return line.to_string() };
        format!("{} N ms{after}", before.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end())
    };
    run.err.lines().map(line).collect()
}

/// Success without a word, and not even a lock was taken.
#[track_caller]
fn ignores(host: &Host, call: &str) {
    let before = host.snapshot();
    assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
    assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}");
}

/// Passes every check: a settled card is ready for its VM as it is.
#[track_caller]
fn accepts(host: &Host, what: &str) {
    plans(host, "plan 111", &["0000:01:00 host -> VM 111", "  nothing to do"]);
    assert_eq!(host.run("111 pre-start"), ready(), "{what}");
}

fn ready() -> Run {
    success("0000:01:00 is already on vfio-pci: nothing to do")
}

fn success(line: &str) -> Run {
    Run { code: Some(0), out: String::new(), err: format!("gpu-handoff: {line}\n") }
}

const NOTHING: [&str; 0] = [];

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
        let expected = json!({"schema": 1, "progress": "away", "modules": [], "caller": null, "functions": [
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

// Devices

#[test]
fn absent_devices() {
    for (config, named) in [
        ("hostpci0: 05:00", "hostpci0 names 05:00"),
        ("hostpci2: 0000:05:00.0,pcie=1", "hostpci2 names 0000:05:00.0"),
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
fn with_neighbour(host: Host, class: &str, driver: &str) -> Host {
    host.function("0000:02:00.0", class, "144d:a80a", driver, 1)
}

#[test]
fn a_neighbour_in_the_group_that_the_host_uses() {
    let message = "0000:01:00 was not touched: 0000:02:00.0 is in the same IOMMU group (1) and nvme has it: a group \
                   goes to a VM as a whole; move the card to another slot, or take that device from the host: echo \
                   0000:02:00.0 > /sys/bus/pci/drivers/nvme/unbind";
    for home in [host, settled] {
        let host = with_neighbour(home(), "010802", "nvme");
        refuses(&host, "111 pre-start", 3, message);
        refuses(&host, "to-vfio 01:00", 3, message);
    }
    let another_vms = with_neighbour(settled(), "010802", "nvme").vm(112, "hostpci0: 02:00");
    refuses(&another_vms, "111 pre-start", 3, message);
}

#[test]
fn neighbours_in_the_group_that_do_not_matter() {
    for (what, class, driver) in [
        ("on vfio-pci", "010802", "vfio-pci"),
        ("on pci-stub", "010802", "pci-stub"),
        ("unbound", "010802", ""),
        ("a bridge", "060400", "pcieport"),
        ("a host bridge", "060000", "skx_uncore"),
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
fn with_virtual_functions(mut host: Host) -> Host {
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
    let host = with_virtual_functions(host()).vm(111, "hostpci0: 01:00.0");
    refuses(&host, "111 pre-start", 3, message);
    refuses(&host, "to-vfio", 3, message);
}

/// The whole slot names the physical function too, whose virtual functions would vanish.
#[test]
fn the_whole_slot_of_a_physical_function() {
    let message = "0000:01:00 was not touched: 0000:01:00.0 has 3 SR-IOV virtual functions, which would vanish; \
                   remove them first: echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs";
    let host = with_virtual_functions(host()).vm(111, "hostpci0: 01:00");
    refuses(&host, "111 pre-start", 3, message);
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

fn with_mappings(host: Host) -> Host {
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

#[test]
fn a_mapping_that_may_give_an_nvidia_gpu() {
    for name in ["gpu", "either", "both"] {
        let host = with_mappings(host()).vm(111, &format!("hostpci3: mapping={name},pcie=1"));
        let message = format!(
            "VM 111: hostpci3 uses mapping={name}, which is not supported yet for a GPU; name its slot instead: qm \
             set 111 --hostpci3 0000:01:00,pcie=1"
        );
        refuses(&host, "111 pre-start", 2, &message);
    }
}

#[test]
fn a_mapping_that_this_node_does_not_have() {
    for (name, host) in [("elsewhere", with_mappings(host())), ("unknown", with_mappings(host())), ("gpu", host())] {
        let message = format!(
            "VM 111: hostpci3 uses mapping={name}, which /etc/pve/mapping/pci.cfg does not have for this node; see: \
             pvesh get /cluster/mapping/pci"
        );
        refuses(&host.vm(111, &format!("hostpci3: mapping={name},pcie=1")), "111 pre-start", 2, &message);
    }
}

#[test]
fn a_mapping_to_an_absent_device() {
    let mapping = "gone\n\tmap id=144d:a80a,iommugroup=5,node=pve,path=0000:05:00\n";
    let host = host().file("etc/pve/mapping/pci.cfg", mapping).vm(111, "hostpci0: mapping=gone");
    let Run { code, err, .. } = host.run("111 pre-start");
    assert_eq!(code, Some(3), "{err}");
    assert!(err.contains("there is no such device"), "{err}");
}

#[test]
fn a_mapping_to_other_devices_here() {
    for config in ["mapping=disk", "mapping=gpu,mdev=nvidia-63", "driver=keep,mapping=gpu"] {
        ignores(&with_mappings(host()).vm(111, &format!("hostpci0: {config}")), "111 pre-start");
    }
    accepts(&with_mappings(settled()).vm(111, "hostpci0: mapping=disk\nhostpci1: 01:00"), "beside a GPU");
}

#[test]
fn a_neighbour_that_the_vm_takes_by_a_mapping() {
    let mapping = "disk\n\tmap id=144d:a80a,iommugroup=1,node=pve,path=0000:02:00.0\n";
    let host = with_neighbour(settled(), "010802", "nvme").file("etc/pve/mapping/pci.cfg", mapping);
    accepts(&host.vm(111, "hostpci0: mapping=disk\nhostpci1: 01:00"), "listed by a mapping");
}

// Who has the GPU

#[test]
fn an_unknown_module_holds_the_driver() {
    let message = "0000:01:00 was not touched: module gdrdrv holds nvidia and is none that gpu-handoff may unload; \
                   unload it first: modprobe -r gdrdrv";
    let holder = |of: &str| host().file(&format!("sys/module/{of}/holders/gdrdrv/refcnt"), "0\n");
    refuses(&holder("nvidia"), "111 pre-start", 3, message);
    refuses(&holder("nvidia"), "to-vfio", 3, message);
    let deeper = holder("nvidia_uvm").file("sys/module/nvidia/holders/nvidia_uvm/refcnt", "1\n");
    refuses(&deeper, "111 pre-start", 3, message);
}

/// Opening the card's DRM node is what makes it in use here.
fn with_drm_node(host: Host) -> Host {
    host.file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), NULL_NUMBER)
}

#[test]
fn somebody_uses_the_gpu() {
    for (command, cgroup, who, remedy) in [
        ("ffmpeg", "/lxc/101/ns/system.slice/jellyfin.service", "ffmpeg, container 101", "pct stop 101"),
        ("kvm", "/qemu.slice/112.scope", "kvm, VM 112", "qm stop 112"),
        ("ollama", "/system.slice/ollama.service", "ollama, ollama.service", "systemctl stop ollama.service"),
        ("python3", "/user.slice/user-0.slice/session-3.scope", "python3, session-3.scope", "kill 5000001"),
        ("X", "/", "X", "kill 5000001"),
    ] {
        let host = with_drm_node(host()).process(PID, command, cgroup, &["/dev/zero", NULL]);
        let busy = format!(
            "0000:01:00 was not touched, it is in use: PID 5000001 ({who}) has /dev/dri/card0 open; end it ({remedy}), \
             then"
        );
        refuses(&host, "111 pre-start", 3, &format!("{busy} start VM 111 again: qm start 111"));
        refuses(&host, "to-vfio", 3, &format!("{busy} try again: gpu-handoff to-vfio 0000:01:00"));
    }
}

#[test]
fn many_users_are_counted() {
    let mut host = with_drm_node(host());
    for pid in PID..PID + 7 {
        host = host.process(pid, "cuda", "/lxc/101/ns", &[NULL]);
    }
    let who: Vec<String> =
        (PID..PID + 5).map(|pid| format!("PID {pid} (cuda, container 101) has /dev/dri/card0 open")).collect();
    let message = format!(
        "0000:01:00 was not touched, it is in use: {}, 2 more; end it (pct stop 101), then start VM 111 again: qm \
         start 111",
        who.join(", ")
    );
    refuses(&host, "111 pre-start", 3, &message);
}

#[test]
fn other_open_devices_and_the_vm_itself_are_no_users() {
    let other = with_drm_node(settled()).process(PID, "cat", "/", &["/dev/zero", "/proc/version", "/no/such/file"]);
    accepts(&other, "another device");
    accepts(&with_drm_node(settled()).process(PID, "kvm", "/qemu.slice/111.scope", &[NULL]), "the VM itself");
}

#[test]
fn another_vm_has_the_gpu() {
    let recorded = || settled().record("vm-112", "0000:01:00", "away", "nvidia");
    let taken = || recorded().running(112, PID);
    let starting = || recorded().flock("var/lock/qemu-server/lock-112.conf");
    // Whoever asked for the start still lives.
    let asked_for = || settled().record_by(112, "0000:01:00", "nvidia", PID).alive(PID);
    let has_it = "0000:01:00 was not touched: VM 112 has it; stop that VM (qm stop 112), or if it does not run: \
                  gpu-handoff to-nvidia 0000:01:00; then";
    let for_vm = format!("{has_it} start VM 111 again: qm start 111");
    for host in [taken(), starting(), asked_for()] {
        refuses(&host, "111 pre-start", 3, &for_vm);
        refuses(&host, "to-vfio", 3, &format!("{has_it} try again: gpu-handoff to-vfio 0000:01:00"));
    }
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm stop 112";
    for host in [taken(), starting()] {
        refuses_now(&host, "to-nvidia", 3, stays);
    }
    // Of a VM's several cards each is taken.
    let second = taken().card("0000:02:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 02:00\nhostpci1: 01:00");
    refuses(&second, "111 pre-start", 3, &for_vm);
}

#[test]
fn another_vm_has_the_gpu_told_beforehand() {
    let host = settled().record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID);
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm stop 112";
    refuses(&host, "to-nvidia", 3, stays);
}

/// The way out that the refusal names: a shell that lives on does not keep a card from coming home.
#[test]
fn a_start_that_was_given_up_can_be_ended_by_hand() {
    let host = settled().record_by(112, "0000:01:00", "vfio-pci", PID).alive(PID);
    assert_eq!(host.run("to-nvidia"), success("0000:01:00 is at home on vfio-pci: nothing to do"));
    assert!(!host.has_own_file("vm-112"));
}

/// What is with vfio-pci by hand may be used by a VM, and stays there when the VM stops.
#[test]
fn a_card_by_hand_serves_a_vm() {
    let host = settled().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    let by_hand = host.own_file("manual-0000:01:00");
    accepts(&host, "by hand");
    assert_eq!(host.own_file("vm-111")["functions"][0]["driver"], json!("vfio-pci"));
    assert_eq!(host.own_file("vm-111")["functions"][1]["driver"], json!("vfio-pci"));
    let stays = "0000:01:00 stays on vfio-pci, as asked by hand, until: gpu-handoff to-nvidia 0000:01:00";
    assert_eq!(host.run("111 post-stop"), success(stays));
    assert!(!host.has_own_file("vm-111"));
    assert_eq!(host.own_file("manual-0000:01:00"), by_hand);
}

#[test]
fn a_card_by_hand_that_a_vm_has() {
    let host = settled()
        .record("manual-0000:01:00", "0000:01:00", "away", "nvidia")
        .record("vm-112", "0000:01:00", "away", "vfio-pci")
        .running(112, PID);
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm stop 112";
    refuses_now(&host, "to-nvidia", 3, stays);
}

/// The record outlived its VM: the next one takes the slot over, with the home that the record knew.
#[test]
fn a_vm_that_is_gone_has_nothing() {
    let given = || {
        let override_of = |n: u32| format!("sys/bus/pci/devices/0000:01:00.{n}/driver_override");
        settled().file(&override_of(0), "vfio-pci\n").file(&override_of(1), "vfio-pci\n")
    };
    let left = || given().record("vm-112", "0000:01:00", "away", "nvidia");
    let pid_file = format!("{PID}\n");
    let qemu = format!("proc/{PID}/cmdline");
    for (what, host) in [
        ("no pid file", left()),
        ("no such process", left().file("run/qemu-server/112.pid", &pid_file)),
        ("another program", left().file("run/qemu-server/112.pid", &pid_file).file(&qemu, "/usr/bin/tail\0-f\0")),
        ("another VM", left().running(113, PID).file("run/qemu-server/112.pid", &pid_file)),
        ("another lock", left().flock("var/lock/qemu-server/lock-113.conf")),
        ("a caller that has ended", given().record_by(112, "0000:01:00", "nvidia", PID)),
        ("a zombie", given().record_by(112, "0000:01:00", "nvidia", PID).stat(PID, 'Z', START)),
        ("a later process", given().record_by(112, "0000:01:00", "nvidia", PID).stat(PID, 'S', START + 1)),
    ] {
        accepts(&host, what);
        let inherited = host.own_file("vm-111");
        let driver = |n: usize| inherited["functions"][n]["driver"].clone();
        assert_eq!((driver(0), driver(1)), (json!("nvidia"), json!("snd_hda_intel")), "{what}");
        assert!(!host.has_own_file("vm-112"), "{what}");
    }
}

/// Until QEMU runs, only that tells a start that goes on from one that was given up.
#[test]
fn who_asked_for_it_is_on_record() {
    let caller = std::process::id();
    let host = settled().vm(112, "hostpci0: 01:00").alive(caller);
    accepts(&host, "the first");
    assert_eq!(host.own_file("vm-111")["caller"], json!({"pid": caller, "start": START}));
    assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "vm", "vmid": 111}));
    let message = "0000:01:00 was not touched: VM 111 has it; stop that VM (qm stop 111), or if it does not run: \
                   gpu-handoff to-nvidia 0000:01:00; then start VM 112 again: qm start 112";
    refuses(&host, "112 pre-start", 3, message);
    // It may try again itself.
    accepts(&host, "again");
    let host = host.without(&format!("proc/{caller}"));
    assert_eq!(status(&host)["gpus"][0]["owner"]["vmid"], Value::Null);
    assert_eq!(host.run("112 pre-start"), ready());
    assert!(!host.has_own_file("vm-111"));
}

// Our own files

/// Files that are no record, and what is wrong with them.
const NO_RECORDS: [(&str, &str, &str); 7] = [
    ("vm-111", "", "EOF while parsing a value at line 1 column 0"),
    ("vm-111", "{}", "schema: not a number"),
    ("vm-111", r#"{"schema":2}"#, "schema 2: written by a newer gpu-handoff; install that version again"),
    ("vm-111", r#"{"schema":1,"progress":"lost"}"#, r#"progress: "lost" is unknown"#),
    ("vm-111", r#"{"schema":1,"progress":"away","functions":[{}],"modules":[]}"#, "slot: missing"),
    ("vm-112", "", "EOF while parsing a value at line 1 column 0"),
    ("manual-0000:01:00", "", "EOF while parsing a value at line 1 column 0"),
];

/// A tree with such a file, and the line that names it.
fn with_no_record(host: Host, name: &str, text: &str, problem: &str) -> (Host, String) {
    let file = format!("run/gpu-handoff/{name}");
    let line = format!("{}: {problem}", host.path(&file).display());
    (host.file(&file, text), line)
}

/// It may be the one that knows where a card on vfio-pci is at home.
#[test]
fn a_record_that_is_not_understood_and_a_card_that_is_away() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let error = format!(
            "error: 0000:01:00.0 was not touched: it is on vfio-pci, and the file that may say where it is at \
             home cannot be read: {line}; if it is at home there, remove that file"
        );
        let before = host.snapshot().without_lock();
        for call in ["111 pre-start", "plan 111", "to-vfio", "to-vfio --dry-run"] {
            let run = host.run(call);
            assert_eq!((run.code, run.out.as_str()), (Some(3), ""), "{call}: {}", run.err);
            let told = told(&run);
            let (last, warnings) = told.split_last().unwrap();
            assert_eq!(*last, error, "{call}");
            assert!(warnings.iter().all(|warning| *warning == format!("warning: {line}")), "{call}: {warnings:?}");
            assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
        }
    }
}

/// One that has a driver of the host is at home: the run goes on.
#[test]
fn a_record_that_is_not_understood_and_a_card_at_home() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(host(), name, text, problem);
        for call in ["plan 111", "to-vfio --dry-run"] {
            let Run { code, out, err } = host.run(call);
            assert_eq!((code, err), (Some(0), format!("gpu-handoff: warning: {line}\n")), "{call}");
            assert!(out.ends_with("  bind      bind to vfio-pci 0000:01:00.1\n"), "{out}");
        }
        let at_home = format!("warning: {line}\ngpu-handoff: 0000:01:00 is at home on nvidia: nothing to do");
        assert_eq!(host.run("to-nvidia"), success(&at_home));
        let told = told(&host.run("111 pre-start"));
        assert_eq!(told[0], format!("warning: {line}"));
        let end = "error: 0000:01:00 is back where it was: unload nvidia: not done under GPU_HANDOFF_ROOT; then \
                   start VM 111 again: qm start 111";
        assert_eq!(told.last().unwrap(), end);
    }
}

#[test]
fn a_record_that_is_not_understood_when_its_vm_stops() {
    for (name, text, problem) in NO_RECORDS.iter().filter(|(name, ..)| *name == "vm-111") {
        for host in [host(), settled()] {
            let (host, line) = with_no_record(host, name, text, problem);
            refuses(&host, "111 post-stop", 1, &line);
            // No reason to keep a VM from starting that wants no GPU any more.
            let host = host.vm(111, "cores: 2");
            let before = host.snapshot();
            assert_eq!(host.run("111 pre-start"), success(&format!("warning: {line}")));
            assert_eq!(host.snapshot().changes_since(&before), NOTHING);
        }
    }
}

/// Left alone: nobody knows what it is about.
#[test]
fn a_record_that_is_not_understood_and_reconcile() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let before = host.snapshot();
        assert_eq!(host.run("reconcile"), success(&format!("warning: {line}")), "{name}");
        assert_eq!(host.run("reconcile --unfinished"), success(&format!("warning: {line}")), "{name}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{name}");
    }
}

/// Nobody knows then whether a handoff of ours put the card there.
#[test]
fn a_record_that_is_not_understood_and_a_card_to_bring_home() {
    for (name, text, problem) in NO_RECORDS {
        let (host, line) = with_no_record(settled(), name, text, problem);
        let run = host.run("to-nvidia");
        assert!(run.err.contains(&line), "{}", run.err);
        assert_ne!(run.code, Some(0), "{}", run.err);
        assert!(!run.err.contains("no handoff of ours put it there"), "{}", run.err);
    }
}

#[test]
fn a_problem_is_told_once() {
    for call in ["111 pre-start", "to-vfio", "to-nvidia", "reconcile"] {
        for host in [host(), settled()] {
            let (host, line) = with_no_record(host, "vm-112", "{}", "schema: not a number");
            let Run { err, .. } = host.run(call);
            assert_eq!(err.matches(&line).count(), 1, "{call}: {err}");
        }
    }
    let host = settled().record("vm-112", "0000:01:00", "leaving", "nvidia").wedged("0000:01:00", PID).alive(PID);
    for call in ["111 pre-start", "to-vfio"] {
        let Run { err, .. } = host.run(call);
        assert_eq!(err.matches("0000:01:00 is wedged").count(), 1, "{call}: {err}");
    }
}

#[test]
fn a_mistake_in_the_configuration() {
    for (json, problem) in [
        (r#"{"time":{"lock":3}}"#, "time.lock: unknown key"),
        (r#"{"tine":{}}"#, "tine: unknown key"),
        (r#"{"time":{"lock_s":"3"}}"#, "time.lock_s: expected seconds from 0.1 to 3600, got \"3\""),
        (
            r#"{"gpus":{"0000:01:00":{"home":"amdgpu"}}}"#,
            "gpus.0000:01:00.home: expected auto or nvidia or nouveau or vfio-pci or none, got \"amdgpu\"",
        ),
        (r#"{"policy":{"containers":{"web":"stop"}}}"#, "policy.containers.web: unknown key"),
        ("{\n  \"time\": }", "expected value at line 2 column 11"),
    ] {
        let problem = format!("/etc/gpu-handoff/config.json: {problem}");
        for call in ["to-vfio", "to-vfio 01:00", "handoff vfio", "to-nvidia", "plan 111"] {
            refuses_now(&settled().config(json), call, 2, &problem);
        }
        for call in ["to-vfio --dry-run", "to-nvidia --dry-run", "reconcile --dry-run"] {
            refuses_now(&settled().config(json), call, 2, &problem);
        }
        // It runs by itself too, so it goes on as a hook does.
        let warned = success(&format!("warning: {problem}; going on with the defaults"));
        assert_eq!(settled().config(json).run("reconcile"), warned);
        // A VM's start goes on, one without a GPU does not even look.
        let host = settled().config(json);
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out), (Some(0), String::new()), "{json}");
        let warning = format!("gpu-handoff: warning: {problem}; going on with the defaults\n{}", ready().err);
        assert_eq!(err, warning);
        ignores(&settled().config(json).vm(111, "cores: 2"), "111 pre-start");
    }
}

#[test]
fn another_handoff_is_under_way() {
    let taken = |host: Host| host.config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let why = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then";
    let override_of = |n: u32| format!("sys/bus/pci/devices/0000:01:00.{n}/driver_override");
    let given = settled().file(&override_of(0), "vfio-pci\n").file(&override_of(1), "vfio-pci\n");
    let host = taken(given.card("0000:02:00", "nvidia", "").record("vm-111", "0000:01:00", "away", "nvidia"));
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    // Also about another card: there is one lock.
    for (call, slot, again) in [
        ("111 pre-start", "0000:01:00", "start VM 111 again: qm start 111"),
        ("111 post-stop", "0000:01:00", "try again: gpu-handoff to-nvidia 0000:01:00"),
        ("to-vfio 02:00", "0000:02:00", "try again: gpu-handoff to-vfio 0000:02:00"),
        ("to-vfio 01:00", "0000:01:00", "try again: gpu-handoff to-vfio 0000:01:00"),
        ("to-nvidia 01:00", "0000:01:00", "try again: gpu-handoff to-nvidia 0000:01:00"),
    ] {
        refuses_now(&host, call, 5, &format!("{slot} was not touched: {why} {again}"));
    }
    refuses_now(&host, "reconcile", 5, &format!("{why} try again: gpu-handoff reconcile"));
    // Who only asks need not wait.
    plans(&host, "plan 111", &["0000:01:00 host -> VM 111", "  nothing to do"]);
    plans(&host, "to-vfio 01:00 --dry-run", &["0000:01:00 host -> vfio-pci by hand", "  nothing to do"]);
    ignores(&taken(host).vm(111, "cores: 2").without("run/gpu-handoff/vm-111"), "111 pre-start");
}

#[test]
fn a_lock_that_is_released_in_time() {
    let host = settled().file("run/gpu-handoff/lock", "");
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    let waiting = host.command("111 pre-start").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!host.path("run/gpu-handoff/vm-111").exists());
    drop(lock);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), ready().err);
    assert_eq!(output.status.code(), Some(0));
}

const WEDGED: &str = "0000:01:00 is wedged and left alone: unbind from nvidia 0000:01:00.0 has not come back since \
                      2026-11-20T12:00:00Z (PID 5000001)";
const COMES_HOME: &str = "the card comes home by itself when the call ends; if it never does, only a reboot frees it; \
                          other cards keep working";

#[test]
fn a_wedged_slot() {
    let message = format!("{WEDGED}; {COMES_HOME}");
    let wedged = || settled().wedged("0000:01:00", PID).alive(PID);
    for call in ["111 pre-start", "to-vfio"] {
        refuses(&wedged(), call, 4, &message);
    }
    let recorded = wedged().record("vm-111", "0000:01:00", "leaving", "nvidia");
    refuses(&recorded, "111 pre-start", 4, &message);
    for call in ["111 post-stop", "to-nvidia", "reconcile", "reconcile --unfinished"] {
        refuses_now(&recorded, call, 4, &message);
    }
}

#[test]
fn a_wedged_slot_told_beforehand() {
    let host = settled().wedged("0000:01:00", PID).alive(PID).record("vm-111", "0000:01:00", "away", "nvidia");
    for call in ["to-nvidia", "reconcile"] {
        refuses(&host, call, 4, &format!("{WEDGED}; {COMES_HOME}"));
    }
}

#[test]
fn what_to_do_about_a_wedged_slot() {
    let wedged = || with_drm_node(host()).wedged("0000:01:00", PID).alive(PID);
    let held = |host: Host| host.process(PID + 1, "ffmpeg", "/lxc/101/ns", &[NULL]);
    let holder = "PID 5000002 (ffmpeg, container 101) has /dev/dri/card0 open; end it (pct stop 101)";
    refuses(&held(wedged()), "111 pre-start", 4, &format!("{WEDGED}; {holder}; {COMES_HOME}"));
    let driver = |version: &str| {
        let line = format!("NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Wed Nov 19 00:00:00 UTC 2026\n");
        wedged().file("proc/driver/nvidia/version", &line)
    };
    let never = "with this version of the driver the call never ends: reboot the host when you can; other cards keep \
                 working";
    refuses(&driver("590.48.01"), "111 pre-start", 4, &format!("{WEDGED}; {COMES_HOME}"));
    refuses(&driver("595.45.04"), "111 pre-start", 4, &format!("{WEDGED}; {never}"));
    refuses(&held(driver("595.45.04")), "111 pre-start", 4, &format!("{WEDGED}; {holder}; {never}"));
}

#[test]
fn a_wedge_that_has_ended() {
    let wedged = || settled().wedged("0000:01:00", PID);
    for call in ["111 pre-start", "to-vfio"] {
        for (what, host) in [
            ("no such process", wedged()),
            ("a zombie", wedged().stat(PID, 'Z', START)),
            ("a later process", wedged().stat(PID, 'D', START + 1)),
        ] {
            assert_eq!(host.run(call), ready(), "{call}: {what}");
            assert!(!host.has_own_file("wedged-0000:01:00"), "{call}: {what}");
        }
    }
    // Another slot's is none of this one's business, and stays.
    let host = settled().wedged("0000:02:00", PID).alive(PID);
    accepts(&host, "another slot");
    assert!(host.has_own_file("wedged-0000:02:00"));
}

/// Nobody knows then whether the call ended, so the slot is left alone.
#[test]
fn a_wedge_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("[]", "step: no string"),
        (r#"{"step":"unbind","since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        // As it was written before the start was.
        (r#"{"step":"unbind","pid":5000001,"since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        (r#"{"step":"unbind","pid":"1","start":1,"since":"2026-11-20T12:00:00Z"}"#, "pid, start: no numbers"),
        (r#"{"step":"unbind","pid":1,"start":1}"#, "since: no string"),
    ] {
        let file = "run/gpu-handoff/wedged-0000:01:00";
        let host = settled().file(file, text);
        let line = format!("{}: {problem}", host.path(file).display());
        let message = format!("0000:01:00 may be wedged and was not touched: {line}; a reboot clears that");
        for call in ["111 pre-start", "to-vfio"] {
            refuses(&host, call, 4, &message);
        }
        let before = host.snapshot();
        let Run { code, out, err } = host.run("--status --json");
        assert_eq!((code, err), (Some(0), format!("gpu-handoff: warning: {line}\n")));
        let gpu = serde_json::from_str::<Value>(&out).unwrap()["gpus"][0].clone();
        assert_eq!(gpu["owner"], json!({"kind": "wedged", "vmid": null}), "{text}");
        assert_eq!(gpu["wedged"], Value::Null, "{text}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING);
        let host = host.record("vm-111", "0000:01:00", "away", "nvidia");
        for call in ["111 post-stop", "to-nvidia", "reconcile"] {
            refuses_now(&host, call, 4, &message);
        }
        // It is another slot's.
        let host = settled().file("run/gpu-handoff/wedged-0000:02:00", text);
        accepts(&host, text);
        assert!(host.has_own_file("wedged-0000:02:00"));
    }
}

// What a killed handoff left

#[test]
fn a_journal_whose_worker_has_ended() {
    for host in [settled(), settled().stat(PID, 'Z', START), settled().stat(PID, 'S', START + 1)] {
        let host = host.journal("0000:01:00", PID);
        accepts(&host, "ended");
        assert!(!host.has_own_file("journal"));
        assert!(!host.has_own_file("wedged-0000:01:00"));
    }
}

/// It is given a moment; then its call counts as stuck, and only its slot is refused.
#[test]
fn a_journal_whose_worker_is_still_at_it() {
    let left = || settled().config(r#"{"time":{"handoff_s":0.4}}"#).journal("0000:01:00", PID).alive(PID);
    let host = left();
    let Run { code, out, err } = host.run("111 pre-start");
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    let wedge = host.own_file("wedged-0000:01:00");
    let since = wedge["since"].as_str().unwrap();
    assert_eq!(
        err,
        format!(
            "gpu-handoff: error: 0000:01:00 is wedged and left alone: unbind from nvidia 0000:01:00.0 has not come back since {since} \
             (PID 5000001); {COMES_HOME}\n"
        )
    );
    let step = "unbind from nvidia 0000:01:00.0";
    assert_eq!(wedge, json!({"step": step, "pid": PID, "start": START, "since": since}));
    assert!(!host.has_own_file("journal"));
    let host = left().card("0000:02:00", "vfio-pci", "vfio-pci");
    let expected = success("0000:02:00 is already on vfio-pci: nothing to do");
    assert_eq!(host.run("to-vfio 02:00"), expected);
    assert!(host.has_own_file("wedged-0000:01:00"));
}

#[test]
fn a_journal_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{}", "schema: expected 1"),
        (r#"{"schema":1,"owner":"x","slots":[],"step":"","pid":1,"start":1}"#, "owner: unknown"),
    ] {
        let host = settled().file("run/gpu-handoff/journal", text);
        let path = host.path("run/gpu-handoff/journal");
        let warning = format!("gpu-handoff: warning: {}: {problem}; going on without it\n", path.display());
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out.as_str()), (Some(0), ""));
        assert_eq!(err, format!("{warning}{}", ready().err));
        assert!(!path.exists());
    }
}

// How far a run goes

/// The way there fails at the first change that is not made in a tree; everything is put back and told.
#[test]
fn a_way_there_that_fails() {
    let unload = "unload nvidia: not done under GPU_HANDOFF_ROOT";
    let unbind = "unbind from nvidia 0000:01:00.0: the kernel reported success, but nothing changed";
    // The other card needs the module.
    let second = || host().card("0000:02:00", "nvidia", "snd_hda_intel");
    for (host, problem) in [(host(), unload), (second(), unbind)] {
        let run = host.run("111 pre-start");
        assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{}", run.err);
        assert_eq!(
            told(&run),
            [
                "0000:01:00 host -> VM 111".to_string(),
                "  check N ms  0000:01:00.0 nvidia, 0000:01:00.1 snd_hda_intel; not in use".to_string(),
                "  prepare N ms  driver_override=vfio-pci 0000:01:00.0 0000:01:00.1".to_string(),
                format!("  release N ms  FAILED {problem}"),
                format!("warning: {problem}; going back"),
                "  release N ms  remove_id 10de:22ba 10de:2684".to_string(),
                "  clear N ms  clear driver_override 0000:01:00.0 0000:01:00.1".to_string(),
                format!("error: 0000:01:00 is back where it was: {problem}; then start VM 111 again: qm start 111"),
            ]
        );
        for address in ["0000:01:00.0", "0000:01:00.1"] {
            let path = host.path(&format!("{}/driver_override", device(address)));
            assert_eq!(fs::read_to_string(path).unwrap(), "\n", "{address}");
        }
        for name in ["vm-111", "journal", "wedged-0000:01:00"] {
            assert!(!host.has_own_file(name), "{name}");
        }
        let last = host.own_file("last-0000:01:00");
        assert_eq!((&last["direction"], &last["vmid"], &last["exit"]), (&json!("vfio"), &json!(111), &json!(1)));
        assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "host", "vmid": null}));
    }
}

/// The way home goes as far as it can, says where it stopped, and can be gone on with.
#[test]
fn a_way_home_that_fails() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia");
    for call in ["111 post-stop", "to-nvidia", "reconcile", "reconcile --unfinished"] {
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{call}: {}", run.err);
        let told = told(&run);
        assert_eq!(told[0], "0000:01:00 VM 111 -> host", "{call}");
        assert_eq!(told[1], "  wait N ms  nobody has it open any more", "{call}");
        let end = "error: 0000:01:00 is stranded: unbind from vfio-pci 0000:01:00.0: the kernel reported success, but \
                   nothing changed; mend that, then: gpu-handoff to-nvidia 0000:01:00";
        assert_eq!(told.last().unwrap(), end, "{call}");
        let record = host.own_file("vm-111");
        assert_eq!(record["progress"], json!("returning"), "{call}");
        assert_eq!(record["functions"][0]["driver"], json!("nvidia"), "{call}");
        assert!(!host.has_own_file("journal"), "{call}");
        let last = host.own_file("last-0000:01:00");
        assert_eq!((&last["direction"], &last["vmid"], &last["exit"]), (&json!("home"), &json!(111), &json!(1)));
        assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "stranded", "vmid": 111}), "{call}");
    }
}

/// Towards home a step that fails keeps none of the others back, and the log does not hide it.
#[test]
fn every_step_home_that_fails_is_told() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia");
    let Run { err, .. } = host.run("111 post-stop");
    for problem in [
        "unbind from vfio-pci 0000:01:00.0: the kernel reported success, but nothing changed",
        "unbind from vfio-pci 0000:01:00.1: the kernel reported success, but nothing changed",
        "load nvidia snd_hda_intel: modprobe is not installed",
    ] {
        assert!(err.contains(problem), "{problem}: {err}");
    }
}

#[test]
fn a_device_that_is_gone() {
    let gone = || Host::new().vm(111, "hostpci0: 01:00").record("vm-111", "0000:01:00", "away", "nvidia");
    for call in ["111 post-stop", "reconcile"] {
        let host = gone();
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{call}: {}", run.err);
        let end = "error: 0000:01:00.0 is gone: there is no such device any more; if the card is still there: echo 1 > \
                   /sys/bus/pci/rescan, then: gpu-handoff to-nvidia 0000:01:00";
        assert_eq!(told(&run).last().unwrap(), end, "{call}");
        let mut kept = gone().own_file("vm-111");
        kept["progress"] = json!("returning");
        kept["caller"] = Value::Null;
        assert_eq!(host.own_file("vm-111"), kept, "{call}");
    }
}

// What would be done

#[test]
fn the_plan_of_a_start() {
    let away = [
        "  prepare   driver_override=vfio-pci 0000:01:00.0",
        "  prepare   driver_override=vfio-pci 0000:01:00.1",
        "  release   unload nvidia",
        "  release   unbind from snd_hda_intel 0000:01:00.1",
        "  bind      bind to vfio-pci 0000:01:00.0",
        "  bind      bind to vfio-pci 0000:01:00.1",
    ];
    let lines = |title: &'static str, steps: &[&'static str]| [&[title], steps].concat();
    let for_vm = |steps: &[&'static str]| lines("0000:01:00 host -> VM 111", steps);
    plans(&host(), "plan 111", &for_vm(&away));
    for call in ["to-vfio --dry-run", "to-vfio 01:00 --dry-run", "handoff vfio --dry-run", "--dry-run to_vfio"] {
        plans(&host(), call, &lines("0000:01:00 host -> vfio-pci by hand", &away));
    }
    // What holds the module goes first.
    let mut stack = away.to_vec();
    stack.splice(2..3, ["  release   unload nvidia_uvm", "  release   unload nvidia"]);
    plans(&host().file("sys/module/nvidia/holders/nvidia_uvm/refcnt", "1\n"), "plan 111", &for_vm(&stack));
    // Another card needs the module, or a call that is stuck with one may.
    let mut unbind = away.to_vec();
    unbind[2] = "  release   unbind from nvidia 0000:01:00.0";
    plans(&host().card("0000:02:00", "nvidia", ""), "plan 111", &for_vm(&unbind));
    plans(&host().wedged("0000:02:00", PID).alive(PID), "plan 111", &for_vm(&unbind));
    // vfio-pci comes first.
    let load = [&["  prepare   load vfio_pci"], &away[..]].concat();
    let not_loaded = host()
        .without("sys/bus/pci/drivers/vfio-pci")
        .without("sys/module/vfio_pci")
        .file("lib/modules/6.12.48-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko:\n");
    plans(&not_loaded, "plan 111", &for_vm(&load));
}

#[test]
fn the_plan_of_a_way_home() {
    let home = [
        "  release   remove_id 10de:22ba",
        "  release   remove_id 10de:2684",
        "  release   driver_override=nvidia 0000:01:00.0",
        "  release   driver_override=snd_hda_intel 0000:01:00.1",
        "  release   unbind from vfio-pci 0000:01:00.0",
        "  release   unbind from vfio-pci 0000:01:00.1",
        "  bind      load nvidia",
        "  bind      bind to nvidia 0000:01:00.0",
        "  bind      bind to snd_hda_intel 0000:01:00.1",
        "  complete  device nodes",
        "  clear     clear driver_override 0000:01:00.0",
        "  clear     clear driver_override 0000:01:00.1",
    ];
    let away = || settled().driver("snd_hda_intel");
    let by_hand = away().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    let expected = [&["0000:01:00 vfio-pci by hand -> host"], &home[..]].concat();
    for call in ["to-nvidia --dry-run", "to-nvidia 01:00 --dry-run", "handoff nvidia --dry-run"] {
        plans(&by_hand, call, &expected);
    }
    let of_vm = away().record("vm-111", "0000:01:00", "away", "nvidia");
    let expected = [&["0000:01:00 VM 111 -> host"], &home[..]].concat();
    plans(&of_vm, "to-nvidia --dry-run", &expected);
    plans(&of_vm, "reconcile --dry-run", &expected);
    let unfinished = away().record("vm-111", "0000:01:00", "leaving", "nvidia");
    plans(&unfinished, "reconcile --unfinished --dry-run", &expected);
}

#[test]
fn plans_of_nothing() {
    let at_home = "0000:01:00 is at home on nvidia: nothing to do";
    plans(&host(), "to-nvidia --dry-run", &[at_home]);
    let on_vfio = "0000:01:00 is at home on vfio-pci: no handoff of ours put it there, nothing to do";
    plans(&settled(), "to-nvidia --dry-run", &[on_vfio]);
    let stale = settled().vm(111, "cores: 2").record("vm-111", "0000:01:00", "away", "nvidia");
    let line = "guest 111 takes no NVIDIA GPU: nothing to do, but its record's slots would come home";
    plans(&stale, "plan 111", &[line]);
}

// What was left behind

/// What no record names is not ours, and what somebody has or keeps is not left behind.
#[test]
fn nothing_was_left_behind() {
    let recorded = || settled().record("vm-111", "0000:01:00", "away", "nvidia");
    for (what, host) in [
        ("never used", settled()),
        ("at home", host()),
        ("no GPU", Host::new()),
        ("a running VM", recorded().running(111, PID)),
        ("a VM in its start", recorded().flock("var/lock/qemu-server/lock-111.conf")),
        ("by hand", settled().record("manual-0000:01:00", "0000:01:00", "away", "nvidia")),
        ("other files", settled().file("run/gpu-handoff/lock", "").wedged("0000:01:00", PID)),
        ("a file of nobody", settled().file("run/gpu-handoff/vm-", "{}").file("run/gpu-handoff/vm-x", "{}")),
    ] {
        let had_directory = host.path("run/gpu-handoff").exists();
        for call in ["reconcile", "reconcile --unfinished"] {
            let before = host.snapshot();
            let silent = Run { code: Some(0), out: String::new(), err: String::new() };
            assert_eq!(host.run(call), silent, "{call}: {what}");
            assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}: {what}");
            plans(&host, &format!("{call} --dry-run"), &["nothing was left behind: nothing to do"]);
        }
        assert_eq!(host.path("run/gpu-handoff").exists(), had_directory, "{what}");
    }
}

/// Its hook was called by hand, from a shell that lives: what puts killed handoffs right has no business there.
#[test]
fn a_start_that_may_go_on_is_not_left_behind() {
    let host = settled().record_by(111, "0000:01:00", "nvidia", PID).alive(PID);
    assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "vm", "vmid": 111}));
    ignores(&host, "reconcile --unfinished");
}

/// All of it is where it was before, only the record is left: what is done then can be seen in a tree.
#[test]
fn what_was_left_behind_comes_home() {
    let (vm, by_hand) = ("vm-112", "manual-0000:01:00");
    for (name, progress, call) in [
        (vm, "away", "reconcile"),
        (vm, "leaving", "reconcile"),
        (vm, "returning", "reconcile"),
        (vm, "leaving", "reconcile --unfinished"),
        (vm, "returning", "reconcile --unfinished"),
        (by_hand, "leaving", "reconcile --unfinished"),
        (by_hand, "returning", "reconcile"),
    ] {
        let host = host().record(name, "0000:01:00", progress, "nvidia");
        let owner = if name == vm { "VM 112" } else { "vfio-pci by hand" };
        let run = host.run(call);
        assert_eq!((run.code, run.out.as_str()), (Some(0), ""), "{call}: {}", run.err);
        assert_eq!(
            told(&run),
            [
                format!("0000:01:00 {owner} -> host").as_str(),
                "  wait N ms  nobody has it open any more",
                "  release N ms  remove_id 10de:22ba 10de:2684",
                "0000:01:00 is home after N ms",
            ],
            "{call}"
        );
        assert!(!host.has_own_file(name), "{name}: {call}");
        ignores(&host, call);
    }
    // A VM that does not run is not an unfinished handoff.
    let host = host().record(vm, "0000:01:00", "away", "nvidia");
    ignores(&host, "reconcile --unfinished");
}

/// One that cannot be brought home keeps none of the others back; it decides the exit code.
#[test]
fn what_was_left_behind_and_stays_there() {
    let host = settled()
        .card("0000:02:00", "nvidia", "snd_hda_intel")
        .record("vm-112", "0000:01:00", "away", "nvidia")
        .record("vm-113", "0000:02:00", "away", "nvidia")
        .record("vm-114", "0000:02:00", "away", "nvidia")
        .running(114, PID);
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(host.has_own_file("vm-112") && !host.has_own_file("vm-113") && host.has_own_file("vm-114"), "{}", run.err);
    let errors: Vec<String> = told(&run).into_iter().filter(|line| line.starts_with("error: ")).collect();
    let end = "error: 0000:01:00 is stranded: unbind from vfio-pci 0000:01:00.0: the kernel reported success, but \
               nothing changed; mend that, then: gpu-handoff to-nvidia 0000:01:00";
    assert_eq!(errors, [end]);
}

// By hand

#[test]
fn bad_usage() {
    for (call, problem) in [
        ("111", "guest 111 needs a phase, such as pre-start"),
        ("111 pre-start 112", "112 is too much"),
        ("99999999999 pre-start", "99999999999 is no guest id"),
        ("frobnicate", "frobnicate is unknown"),
        ("to-vfio --force", "--force is unknown"),
        ("to-vfio 01:00 02:00", "02:00 is too much"),
        ("handoff", "handoff needs vfio or nvidia"),
        ("handoff nouveau", "handoff needs vfio or nvidia"),
        ("to-nvidia --json", "--json goes with --status"),
        ("--status 01:00", "01:00 is too much"),
        ("plan", "plan needs the id of a VM"),
        ("plan gpu", "gpu is no guest id"),
        ("plan 99999999999", "99999999999 is no guest id"),
        ("plan 111 112", "112 is too much"),
        ("plan 111 --json", "--json goes with --status"),
        ("reconcile 01:00", "01:00 is too much"),
        ("reconcile --all", "--all is too much"),
        ("to-vfio --unfinished", "--unfinished goes with reconcile"),
        ("--status --dry-run", "--dry-run goes with a verb that changes something; for a VM, see plan"),
        ("111 pre-start --dry-run", "--dry-run goes with a verb that changes something; for a VM, see plan"),
        ("plan 111 --dry-run", "--dry-run goes with a verb that changes something; for a VM, see plan"),
    ] {
        refuses_now(&host(), call, 2, &format!("{problem}; see gpu-handoff --help"));
    }
}

#[test]
fn no_slot_named_and_none_to_choose() {
    let empty = || Host::new().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    let message = "there is no NVIDIA GPU in this host; lspci -nn shows what there is";
    for call in ["to-vfio", "to-nvidia", "to_vfio", "to_nvidia", "handoff vfio", "handoff nvidia"] {
        refuses(&empty(), call, 3, message);
    }
}

#[test]
fn no_slot_named_and_two_to_choose_from() {
    let two = host().card("0000:41:00", "nvidia", "");
    let message = "there are several NVIDIA GPUs, say which: 0000:01:00 or 0000:41:00";
    for call in ["to-vfio", "to-nvidia", "handoff vfio", "handoff nvidia"] {
        refuses(&two, call, 2, message);
    }
}

#[test]
fn bad_spellings_of_a_slot() {
    for slot in [
        "gpu",
        "0",
        "01",
        "1:0",
        "01:0",
        "0000:1:0",
        "01-00",
        "0000:01:00:00",
        "01:00.",
        "01:00.x",
        "0x01:00",
        "00:01:00",
    ] {
        let message = format!("{slot} is no slot; a slot is written like 0000:01:00");
        for verb in ["to-vfio", "to-nvidia"] {
            refuses(&host(), &format!("{verb} {slot}"), 2, &message);
        }
    }
}

#[test]
fn worse_spellings_of_a_slot() {
    for slot in ["01:00.00", "01:00.123", "0000:001:00", "0000:01:000"] {
        let message = format!("{slot} is no slot; a slot is written like 0000:01:00");
        refuses(&host(), &format!("to-nvidia {slot}"), 2, &message);
    }
}

#[test]
fn good_spellings_of_a_slot() {
    for slot in ["0000:0a:00", "0000:0A:00", "0a:00", "0A:00", "0a:00.0", "0000:0a:00.1"] {
        let host = Host::new().card("0000:0a:00", "vfio-pci", "vfio-pci");
        let expected = success("0000:0a:00 is already on vfio-pci: nothing to do");
        assert_eq!(host.run(&format!("to-vfio {slot}")), expected, "{slot}");
        assert!(host.path("run/gpu-handoff/manual-0000:0a:00").exists(), "{slot}");
    }
}

#[test]
fn a_slot_without_an_nvidia_gpu() {
    let host = host().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    for verb in ["to-vfio", "to-nvidia"] {
        let message = "slot 0000:02:00 has no NVIDIA GPU; gpu-handoff --status shows those there are";
        refuses(&host, &format!("{verb} 02:00"), 3, message);
        let message = "there is no device in slot 0000:03:00; lspci -D shows what there is";
        refuses(&host, &format!("{verb} 03:00.0"), 3, message);
    }
}

#[test]
fn nothing_to_bring_home() {
    for (gpu, line) in [
        ("nvidia", "0000:01:00 is at home on nvidia: nothing to do"),
        ("", "0000:01:00 is at home without a driver: nothing to do"),
        ("vfio-pci", "0000:01:00 is at home on vfio-pci: no handoff of ours put it there, nothing to do"),
    ] {
        let host = Host::new().card("0000:01:00", gpu, "snd_hda_intel");
        let before = host.snapshot();
        assert_eq!(host.run("to-nvidia"), success(line));
        assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    }
}

/// Going home goes by the record, whatever the configuration has become.
#[test]
fn a_record_of_a_card_that_lives_on_vfio_pci() {
    for (call, record) in [
        ("111 post-stop", "vm-111"),
        ("111 pre-start", "vm-111"),
        ("to-nvidia", "vm-111"),
        ("to-nvidia", "manual-0000:01:00"),
    ] {
        let host = settled().vm(111, "cores: 2").record(record, "0000:01:00", "away", "vfio-pci");
        assert_eq!(host.run(call), success("0000:01:00 is at home on vfio-pci: nothing to do"), "{call}");
        assert!(!host.path(&format!("run/gpu-handoff/{record}")).exists(), "{call}");
    }
}

#[test]
fn post_stop_without_a_configuration() {
    let host = settled().without("etc/pve").record("vm-111", "0000:01:00", "away", "vfio-pci");
    assert_eq!(host.run("111 post-stop"), success("0000:01:00 is at home on vfio-pci: nothing to do"));
}

#[test]
fn a_vm_that_never_lets_go() {
    let host = settled()
        .config(r#"{"time":{"handoff_s":0.2}}"#)
        .record("vm-111", "0000:01:00", "away", "nvidia")
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
        .process(PID, "kvm", "/qemu.slice/111.scope", &[NULL]);
    let who = "0000:01:00 was not touched: PID 5000001 (kvm, VM 111) has /dev/vfio/devices/vfio0 open";
    // A person would rather be told than wait.
    let message = format!("{who}; end it (qm stop 111), then: gpu-handoff to-nvidia 0000:01:00");
    refuses_now(&host, "to-nvidia", 3, &message);
    let Run { code, out, err } = host.run("111 post-stop");
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    // A busy machine may wait longer than it was told to.
    let (told, rest) = err.split_once(" (after ").unwrap();
    assert_eq!(told, format!("gpu-handoff: error: {who}"));
    let (waited, remedy) = rest.split_once(" s); ").unwrap();
    assert!(waited.parse::<u32>().is_ok(), "{err}");
    assert_eq!(remedy, "end it, then: gpu-handoff to-nvidia 0000:01:00\n");
    // Whoever comes next goes on from here.
    let record = host.own_file("vm-111");
    assert_eq!((&record["progress"], &record["functions"][0]["driver"]), (&json!("returning"), &json!("nvidia")));
    let gpu = status(&host)["gpus"][0].clone();
    assert_eq!(gpu["functions"][0]["driver"], json!("vfio-pci"));
    assert_eq!(gpu["functions"][0]["override"], Value::Null);
}

// Status

/// What `--status --json` says; it reads only.
#[track_caller]
fn status(host: &Host) -> Value {
    let before = host.snapshot();
    let Run { code, out, err } = host.run("--status --json");
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    assert_eq!(host.run("status --json").out, out);
    assert!(out.ends_with("}\n") && out.lines().count() == 1, "{out}");
    serde_json::from_str(&out).unwrap()
}

/// Only root may see every process, so only to root an empty list means that there is no user.
fn users(users: Value) -> Value {
    if nix::unistd::geteuid().is_root() { users } else { Value::Null }
}

/// A user of which one of `ctid`, `vmid` and `unit` is known.
fn user(pid: u32, command: &str, via: &str, known: &str, what: Value) -> Value {
    let mut user = json!({"pid": pid, "command": command, "via": via, "ctid": null, "vmid": null, "unit": null});
    user[known] = what;
    user
}

#[test]
fn status_has_every_key() {
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
        .file(
            "run/gpu-handoff/last-0000:01:00",
            r#"{"direction":"home","vmid":111,"exit":0,"ms":84,"phases":[{"name":"wait","ms":10}]}"#,
        )
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
            "last": {"direction": "home", "vmid": 111, "exit": 0, "ms": 84, "phases": [{"name": "wait", "ms": 10}]},
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
            "last": null,
        },
    ], "setup": {"reboot_required": true, "error": null}});
    assert_eq!(status(&host), expected);
}

#[test]
fn status_without_a_gpu() {
    let host = Host::new().function("0000:02:00.0", "030000", "1002:744c", "amdgpu", 2);
    assert_eq!(status(&host), json!({"schema": 1, "gpus": [], "setup": {"reboot_required": false, "error": null}}));
    let text = Run { code: Some(0), out: "no NVIDIA GPU in this host\n".to_string(), err: String::new() };
    assert_eq!(host.run("--status"), text);
}

#[test]
fn status_tells_who_has_it() {
    let recorded = |progress: &str| settled().record("vm-111", "0000:01:00", progress, "nvidia");
    let by_hand = |progress: &str| settled().record("manual-0000:01:00", "0000:01:00", progress, "nvidia");
    let asked_for = || settled().record_by(111, "0000:01:00", "nvidia", PID);
    let unmoved = |progress: &str| host().record("vm-111", "0000:01:00", progress, "nvidia");
    let lock = "run/gpu-handoff/lock";
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

#[test]
fn status_does_not_need_the_configuration() {
    assert_eq!(status(&host().config("nonsense")), status(&host()));
}

/// A VM that draws on the host's GPU (`vga: virtio-gl`) is a user of it, no owner.
#[test]
fn status_of_a_gpu_that_a_vm_draws_on() {
    let host = with_drm_node(host()).process(PID, "kvm", "/qemu.slice/112.scope", &[NULL]);
    let gpu = status(&host)["gpus"][0].clone();
    assert_eq!(gpu["owner"], json!({"kind": "host", "vmid": null}));
    assert_eq!(gpu["users"], users(json!([user(PID, "kvm", "/dev/dri/card0", "vmid", json!(112))])));
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
        "0000:01:00  VM 111\n  \
           .0  display  10de:2684  group 1    vfio-pci       home nvidia\n  \
           .1  audio    10de:22ba  group 1    vfio-pci       home snd_hda_intel\n  \
           used by  {}  \
           last     host -> VM 111 in 84 ms (release 20, bind 64)\n\
         0000:41:00  wedged\n  \
           .0  3D       10de:2330  group 65   nvidia\n\
         {}  \
           wedged   unbind from nvidia 0000:41:00.0 has not come back since 2026-11-20T12:00:00Z (PID 5000001)\n  \
           last     vfio-pci -> host in 7 ms (wait 7), failed with exit code 1\n\
         reboot required: the host preparation takes effect with the next boot\n",
        user[0], user[1]
    );
    assert_eq!(host.run("--status"), Run { code: Some(0), out: expected, err: String::new() });
}

// Who listens

/// Neither a reader that went away nor descriptors that were never open change what a run does.
#[test]
fn nobody_listens() {
    for (call, code) in [
        ("--status", 0),
        ("--status --json", 0),
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
        if let Ok(lock) = fs::read_to_string(host.path("run/gpu-handoff/lock")) {
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
