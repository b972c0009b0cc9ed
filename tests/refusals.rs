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
use tree::{Host, Run, device};

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

/// The exit code and the one line are these, and nothing was touched.
#[track_caller]
fn refuses(host: &Host, call: &str, code: i32, message: &str) {
    let before = host.snapshot().without_lock();
    let expected = Run { code: Some(code), out: String::new(), err: format!("gpu-handoff: error: {message}\n") };
    assert_eq!(host.run(call), expected, "{call}");
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
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
    assert_eq!(host.run("111 pre-start"), ready("VM 111"), "{what}");
}

fn ready(owner: &str) -> Run {
    success(&format!("0000:01:00 is already on vfio-pci: nothing to do for {owner}"))
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
        let record = fs::read(host.path("run/gpu-handoff/vm-111")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        let expected = json!({"schema": 1, "progress": "away", "modules": [], "functions": [
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
    assert_eq!(
        host.run("111 pre-start"),
        success("0000:02:00 0000:01:00 is already on vfio-pci: nothing to do for VM 111")
    );
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
                   install the kernel's modules or reboot into the installed kernel";
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
                   goes to a VM as a whole; move the card to another slot, or unbind 0000:02:00.0 from nvme first";
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
#[ignore = "fails: one virtual function in the slot makes the hook leave the whole slot to Proxmox"]
fn the_whole_slot_of_a_physical_function() {
    let message = "0000:01:00 was not touched: 0000:01:00.0 has 3 SR-IOV virtual functions, which would vanish; \
                   remove them first: echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs";
    let host = with_virtual_functions(host()).vm(111, "hostpci0: 01:00");
    refuses(&host, "111 pre-start", 3, message);
}

#[test]
#[ignore = "fails: by hand a slot of virtual functions is taken like any other"]
fn a_slot_of_virtual_functions_by_hand() {
    let message = "slot 0000:01:01 has no NVIDIA GPU; gpu-handoff --status shows those there are";
    for verb in ["to-vfio", "to-nvidia"] {
        refuses(&with_virtual_functions(host()), &format!("{verb} 01:01"), 3, message);
    }
}

#[test]
#[ignore = "fails: a mapping to a virtual function is refused as one to a GPU"]
fn a_mapping_to_a_virtual_function() {
    let mapping = "vf\n\tmap id=10de:2684,iommugroup=23,node=pve,path=0000:01:01.0\n";
    let host = with_virtual_functions(host()).file("etc/pve/mapping/pci.cfg", mapping);
    ignores(&host.vm(111, "hostpci0: mapping=vf"), "111 pre-start");
}

#[test]
fn mediated_devices_exist() {
    let uuid = "sys/class/mdev_bus/0000:01:00.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/mdev_type";
    let message = "0000:01:00 was not touched: 0000:01:00.0 has mediated devices (vGPU), which would vanish; see \
                   /sys/class/mdev_bus/0000:01:00.0";
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
    for name in ["gpu", "either", "both", "elsewhere", "unknown"] {
        let host = with_mappings(host()).vm(111, &format!("hostpci3: mapping={name},pcie=1"));
        let message = format!(
            "VM 111: hostpci3 uses mapping={name}, which is not supported yet for GPUs; name the device instead: qm \
             set 111 --hostpci3 0000:01:00,pcie=1 (with its address)"
        );
        refuses(&host, "111 pre-start", 2, &message);
    }
}

#[test]
fn a_mapping_to_other_devices_here() {
    for config in ["mapping=disk", "mapping=gpu,mdev=nvidia-63", "driver=keep,mapping=gpu"] {
        ignores(&with_mappings(host()).vm(111, &format!("hostpci0: {config}")), "111 pre-start");
    }
    accepts(&with_mappings(settled()).vm(111, "hostpci0: mapping=disk\nhostpci1: 01:00"), "beside a GPU");
}

#[test]
#[ignore = "fails: only addresses count as listed by the VM"]
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
    let taken = || settled().record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID);
    let starting =
        settled().record("vm-112", "0000:01:00", "away", "nvidia").flock("var/lock/qemu-server/lock-112.conf");
    let has_it = "0000:01:00 was not touched: VM 112 has it; stop that VM";
    for host in [taken(), starting] {
        refuses(
            &host,
            "111 pre-start",
            3,
            &format!("{has_it} first (qm stop 112), then start VM 111 again: qm start 111"),
        );
        refuses(
            &host,
            "to-vfio",
            3,
            &format!("{has_it} first (qm stop 112), then try again: gpu-handoff to-vfio 0000:01:00"),
        );
        refuses(&host, "to-nvidia", 3, &format!("{has_it} and it comes home by itself: qm stop 112"));
    }
    // Of a VM's several cards each is taken.
    let second = taken().card("0000:02:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 02:00\nhostpci1: 01:00");
    let message = "0000:01:00 was not touched: VM 112 has it; stop that VM first (qm stop 112), then start VM 111 \
                   again: qm start 111";
    refuses(&second, "111 pre-start", 3, message);
}

/// The record outlived its VM: the next one takes the slot over, with the home that the record knew.
#[test]
fn a_vm_that_is_gone_has_nothing() {
    let left = || settled().record("vm-112", "0000:01:00", "away", "nvidia");
    let pid_file = format!("{PID}\n");
    let qemu = format!("proc/{PID}/cmdline");
    for (what, host) in [
        ("no pid file", left()),
        ("no such process", left().file("run/qemu-server/112.pid", &pid_file)),
        ("another program", left().file("run/qemu-server/112.pid", &pid_file).file(&qemu, "/usr/bin/tail\0-f\0")),
        ("another VM", left().running(113, PID).file("run/qemu-server/112.pid", &pid_file)),
        ("another lock", left().flock("var/lock/qemu-server/lock-113.conf")),
    ] {
        accepts(&host, what);
        let inherited = fs::read_to_string(host.path("run/gpu-handoff/vm-111")).unwrap();
        assert_eq!(inherited.matches(r#""driver":"nvidia""#).count(), 2, "{what}: {inherited}");
        assert!(!host.path("run/gpu-handoff/vm-112").exists(), "{what}");
    }
}

// Our own files

#[test]
fn a_record_that_is_not_understood() {
    for (text, problem) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{}", "schema: not a number"),
        (r#"{"schema":2}"#, "schema 2: written by a newer gpu-handoff; install that version again"),
        (r#"{"schema":1,"progress":"lost"}"#, r#"progress: "lost" is unknown"#),
        (r#"{"schema":1,"progress":"away","functions":[{}],"modules":[]}"#, "slot: missing"),
    ] {
        for name in ["vm-111", "vm-112", "manual-0000:01:00"] {
            let file = format!("run/gpu-handoff/{name}");
            let host = host().file(&file, text);
            let message = format!("{}: {problem}", host.path(&file).display());
            for call in ["111 pre-start", "to-vfio", "to-nvidia"] {
                refuses(&host, call, 1, &message);
            }
            if name == "vm-111" {
                refuses(&host, "111 post-stop", 1, &message);
            }
        }
    }
}

#[test]
fn a_mistake_in_the_configuration() {
    for (json, problem) in [
        (r#"{"time":{"lock":3}}"#, "time.lock: unknown key"),
        (r#"{"tine":{}}"#, "tine: unknown key"),
        (r#"{"time":{"lock_s":"3"}}"#, "time.lock_s: expected seconds above 0, at most 3600, got \"3\""),
        (
            r#"{"gpus":{"0000:01:00":{"home":"amdgpu"}}}"#,
            "gpus.0000:01:00.home: expected auto or nvidia or nouveau or vfio-pci or none, got \"amdgpu\"",
        ),
        (r#"{"policy":{"containers":{"web":"stop"}}}"#, "policy.containers.web: unknown key"),
        ("{\n  \"time\": }", "expected value at line 2 column 11"),
    ] {
        let problem = format!("/etc/gpu-handoff/config.json: {problem}");
        for call in ["to-vfio", "to-vfio 01:00", "handoff vfio", "to-nvidia"] {
            refuses(&settled().config(json), call, 2, &problem);
        }
        // A VM's start goes on, one without a GPU does not even look.
        let host = settled().config(json);
        let Run { code, out, err } = host.run("111 pre-start");
        assert_eq!((code, out), (Some(0), String::new()), "{json}");
        let warning = format!("gpu-handoff: warning: {problem}; going on with the defaults\n{}", ready("VM 111").err);
        assert_eq!(err, warning);
        ignores(&settled().config(json).vm(111, "cores: 2"), "111 pre-start");
    }
}

#[test]
fn another_handoff_is_under_way() {
    let taken = |host: Host| host.config(r#"{"time":{"lock_s":0.2}}"#).file("run/gpu-handoff/lock", "");
    let message = "another handoff is under way and did not end within 0.2 s; see gpu-handoff --status, then try again";
    let host = taken(settled().card("0000:02:00", "nvidia", "").record("vm-111", "0000:01:00", "away", "nvidia"));
    let lock = fs::File::open(host.path("run/gpu-handoff/lock")).unwrap();
    lock.lock().unwrap();
    // Also about another card: there is one lock.
    for call in ["111 pre-start", "111 post-stop", "to-vfio 02:00", "to-vfio 01:00", "to-nvidia 01:00"] {
        refuses(&host, call, 5, message);
    }
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
    assert_eq!(String::from_utf8(output.stderr).unwrap(), ready("VM 111").err);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_wedged_slot() {
    let stuck = format!("proc/{PID}/comm");
    let message = "0000:01:00 is wedged: unbind from nvidia 0000:01:00.0 never came back since 2026-11-20T12:00:00Z \
                   (PID 5000001); nothing was touched; end what uses the GPU, or reboot the host";
    let host = settled()
        .record("vm-111", "0000:01:00", "leaving", "nvidia")
        .wedged("0000:01:00", PID)
        .file(&stuck, "gpu-handoff\n");
    for call in ["111 pre-start", "111 post-stop", "to-vfio", "to-nvidia"] {
        refuses(&host, call, 4, message);
    }
}

#[test]
fn a_wedge_that_has_ended() {
    for (call, owner) in [("111 pre-start", "VM 111"), ("to-vfio", "vfio-pci by hand")] {
        let host = settled().wedged("0000:01:00", PID);
        assert_eq!(host.run(call), ready(owner));
        assert!(!host.path("run/gpu-handoff/wedged-0000:01:00").exists(), "{call}");
    }
    // Another slot's is none of this one's business, and stays.
    let host = settled().wedged("0000:02:00", PID).file(&format!("proc/{PID}/comm"), "gpu-handoff\n");
    accepts(&host, "another slot");
    assert!(host.path("run/gpu-handoff/wedged-0000:02:00").exists());
}

/// Nobody knows then whether the call ended, so the slot is left alone.
#[test]
#[ignore = "fails: such a file counts as none, or is removed, and the run goes on"]
fn a_wedge_that_is_not_understood() {
    for text in ["", "{", "[]", r#"{"step":"unbind"}"#, r#"{"step":"unbind","pid":"5000001"}"#] {
        let host = settled().file("run/gpu-handoff/wedged-0000:01:00", text);
        let before = host.snapshot().without_lock();
        assert_eq!(host.run("111 pre-start").code, Some(4), "{text}");
        assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{text}");
    }
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
    ] {
        refuses(&host(), call, 2, &format!("{problem}; see gpu-handoff --help"));
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
#[ignore = "fails: what follows the dot, and how long a bus is, is not looked at"]
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
        let expected = success("0000:0a:00 is already on vfio-pci: nothing to do for vfio-pci by hand");
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
    let before = host.snapshot().without_lock();
    let Run { code, out, err } = host.run("111 post-stop");
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    // A busy machine may wait longer than it was told to.
    let (told, remedy) = err.split_once(" after ").unwrap();
    assert_eq!(
        told,
        "gpu-handoff: error: 0000:01:00 was not touched: PID 5000001 (kvm, VM 111) has /dev/vfio/devices/vfio0 open"
    );
    assert!(remedy.ends_with(" s; end it, then: gpu-handoff to-nvidia 0000:01:00\n"), "{remedy}");
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING);
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
        ("on its way there", recorded("leaving").flock(lock), "moving", vm.clone()),
        ("on its way home", recorded("returning").flock(lock), "moving", vm.clone()),
        ("on its way by hand", by_hand("leaving").flock(lock), "moving", Value::Null),
        ("another card on its way", recorded("away").running(111, PID).flock(lock), "vm", vm.clone()),
        ("with a VM that is gone", recorded("away"), "stranded", vm.clone()),
        ("left on its way there", recorded("leaving").running(111, PID), "stranded", vm.clone()),
        ("left on its way home", recorded("returning").file(lock, ""), "stranded", vm.clone()),
        ("by hand", by_hand("away"), "manual", Value::Null),
        ("left by hand", by_hand("returning"), "stranded", Value::Null),
        ("a wedge that has ended", settled().wedged("0000:01:00", PID), "none", Value::Null),
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
    let wedged = |host: Host| host.wedged("0000:01:00", PID).file(&format!("proc/{PID}/comm"), "gpu-handoff\n");
    let gpu = status(&wedged(host()))["gpus"][0].clone();
    assert_eq!(gpu["owner"], json!({"kind": "wedged", "vmid": null}));
    let step = "unbind from nvidia 0000:01:00.0";
    assert_eq!(gpu["wedged"], json!({"step": step, "pid": PID, "since": "2026-11-20T12:00:00Z"}));
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
#[ignore = "fails: whichever VM has any node of the GPU open is told to own it"]
fn status_of_a_gpu_that_a_vm_draws_on() {
    let host = with_drm_node(host()).process(PID, "kvm", "/qemu.slice/112.scope", &[NULL]);
    let gpu = status(&host)["gpus"][0].clone();
    assert_eq!(gpu["owner"], json!({"kind": "host", "vmid": null}));
    assert_eq!(gpu["users"], users(json!([user(PID, "kvm", "/dev/dri/card0", "vmid", json!(112))])));
}

/// The other card can still be told about; that one file cannot be read is said beside it.
#[test]
#[ignore = "fails: one record that is not understood hides every GPU"]
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
        .file("run/reboot-required.pkgs", "gpu-handoff\n");
    let user = match nix::unistd::geteuid().is_root() {
        true => ["PID 5000001 (kvm, VM 111) has /dev/vfio/devices/vfio0 open\n", ""],
        false => ["unknown: only root may see that\n", "  used by  unknown: only root may see that\n"],
    };
    let expected = format!(
        "0000:01:00  VM 111\n  \
           .0  display  10de:2684  group 1    vfio-pci       home nvidia\n  \
           .1  audio    10de:22ba  group 1    vfio-pci       home nvidia\n  \
           used by  {}  \
           last     host -> VM 111 in 84 ms (release 20, bind 64)\n\
         0000:41:00  wedged\n  \
           .0  3D       10de:2330  group 65   nvidia\n\
         {}  \
           wedged   unbind from nvidia 0000:41:00.0 since 2026-11-20T12:00:00Z (PID 5000001)\n  \
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
