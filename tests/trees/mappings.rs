//! GPUs that a VM has by a resource mapping.

use super::*;

/// One device for this node, however it is written: it is that device.
#[test]
fn a_mapping_with_one_alternative() {
    for path in ["0000:01:00", "0000:01:00.0", "0000:01:00.0;0000:01:00.1"] {
        // Proxmox compares the id with each of several devices.
        let host = settled().file(&format!("{}/device", device("0000:01:00.1")), "0x2684\n");
        let cfg = format!("gpu\n\tmap id=10de:2684,iommugroup=1,node=pve,path={path}\n");
        let host = host.file("etc/pve/mapping/pci.cfg", &cfg).vm(111, "hostpci3: mapping=gpu,pcie=1");
        plans(&host, "plan 111", &["0000:01:00 (mapping=gpu) host -> VM 111", "  nothing to do"]);
        let message = "0000:01:00 (mapping=gpu) is already on vfio-pci: nothing to do";
        assert_eq!(host.run("111 pre-start"), success(message), "{path}");
    }
}

/// What Proxmox finds wrong with a mapping keeps the VM from starting, before anything is touched.
#[test]
fn a_mapping_that_proxmox_refuses() {
    let here = "map id=10de:2684,iommugroup=1,node=pve,path=0000:01:00";
    for (lines, why) in [
        (here.replace("2684", "2204"), "'id' does not match for 'gpu' (10de:2684 != 10de:2204)"),
        (here.replace("group=1", "group=7"), "'iommugroup' does not match for 'gpu' (1 != 7)"),
        (here.replace("iommugroup=1,", ""), "missing expected property 'iommugroup' for device '0000:01:00.0'"),
        (
            format!("{here},subsystem-id=1043:889a"),
            "unexpected property 'subsystem-id' configured for device '0000:01:00.0'",
        ),
        (format!("{here}\n\tmdev 1"), "'mdev' does not match for 'gpu' (0 != 1)"),
        // Of several devices the id counts for each, and of several alternatives none may be wrong.
        (here.replace("01:00", "01:00;0000:02:00"), "'id' does not match for 'gpu' (144d:a80a != 10de:2684)"),
        (
            format!("{here}\n\t{}", here.replace("01:00", "02:00")),
            "'id' does not match for 'gpu' (144d:a80a != 10de:2684)",
        ),
    ] {
        let host = host().function("0000:02:00.0", "010802", "144d:a80a", "nvme", 2);
        let host = host.file("etc/pve/mapping/pci.cfg", &format!("gpu\n\t{lines}\n")).vm(111, "hostpci3: mapping=gpu");
        let message = format!(
            "VM 111: hostpci3 uses mapping=gpu, which Proxmox refuses: PCI device mapping invalid (hardware probably changed): \
             {why}; fix it in Datacenter, Resource Mappings; what it says now: pvesh get /cluster/mapping/pci/gpu"
        );
        refuses(&host, "111 pre-start", 3, &message);
    }
}

/// Two cards, and VM 111 that takes one of them.
fn with_pool(lines: &str) -> Host {
    let cfg = "gpu\n\tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00\n\
               \tmap id=10de:2684,iommugroup=2,node=pve,path=0000:02:00\n";
    settled().card("0000:02:00", "vfio-pci", "vfio-pci").file("etc/pve/mapping/pci.cfg", cfg).vm(111, lines)
}

/// Of several the first that is free, in the file's order, as Proxmox chooses.
#[test]
fn a_mapping_with_several_alternatives() {
    let free = || with_pool("hostpci0: mapping=gpu");
    let takes = |host: &Host, slot: &str, by: &str| {
        plans(host, "plan 111", &[&format!("{slot} ({by}) host -> VM 111"), "  nothing to do"]);
    };
    takes(&free(), "0000:01:00", "mapping=gpu");
    let reserved = |line: &str| free().running(112, PID).file(RESERVED, &format!("{line}\n"));
    // One function is enough.
    takes(&reserved(&format!("0000:01:00.1 112 pid:{PID}")), "0000:02:00", "mapping=gpu");
    takes(&reserved("0000:01:00.0 112 time:99999999999"), "0000:02:00", "mapping=gpu");
    // Left over: of a start that was given up, of another QEMU; and a VM's own.
    takes(&reserved("0000:01:00.0 112 time:1"), "0000:01:00", "mapping=gpu");
    takes(&reserved("0000:01:00.0 112 pid:1"), "0000:01:00", "mapping=gpu");
    takes(&reserved("0000:01:00.0 111 time:99999999999"), "0000:01:00", "mapping=gpu");
    // On its way to a VM that has not reserved it yet.
    let leaving = free().record("vm-112", "0000:01:00", "away", "vfio-pci").flock("var/lock/qemu-server/lock-112.conf");
    takes(&leaving, "0000:02:00", "mapping=gpu");
    takes(&free().record("vm-112", "0000:01:00", "away", "vfio-pci"), "0000:01:00", "mapping=gpu");
    // A line before it counts as well, by an address or a mapping.
    let line = "hostpci0: 0000:01:00\nhostpci1: mapping=gpu";
    takes(&with_pool(line), "0000:01:00 0000:02:00", "mapping=gpu");
    let line = "hostpci0: mapping=gpu\nhostpci1: mapping=gpu";
    takes(&with_pool(line), "0000:01:00 0000:02:00", "mapping=gpu, mapping=gpu");
}

#[test]
fn a_running_vm_has_what_it_was_given() {
    let host = with_pool("hostpci0: mapping=gpu").record("vm-111", "0000:02:00", "away", "vfio-pci");
    plans(&host, "plan 111", &["0000:01:00 (mapping=gpu) host -> VM 111", "  nothing to do"]);
    plans(&host.running(111, PID), "plan 111", &["0000:02:00 (mapping=gpu) host -> VM 111", "  nothing to do"]);
}

#[test]
fn a_mapping_of_which_nothing_is_free() {
    let host = with_pool("hostpci0: mapping=gpu").record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID);
    let host = host.record("vm-113", "0000:02:00", "away", "nvidia").flock("var/lock/qemu-server/lock-113.conf");
    let message = "mapping=gpu, of which none is free: 0000:01:00 was not touched: VM 112 has it; stop that VM (qm shutdown 112), \
                   or if it does not run: gpu-handoff to-nvidia 0000:01:00; then start VM 111 again: qm start 111";
    refuses(&host, "111 pre-start", 3, message);
}

/// The first alternative is Proxmox's business if it is no NVIDIA GPU, and then that is what it gives.
#[test]
fn a_mapping_that_gives_another_device() {
    let host = || with_mappings(settled());
    ignores(&host().vm(111, "hostpci0: mapping=either").file("etc/pve/mapping/pci.cfg", EITHER), "111 pre-start");
    let second = host().running(112, PID).vm(111, "hostpci0: mapping=either").file("etc/pve/mapping/pci.cfg", EITHER);
    let second = second.file("run/qemu-server/pci-id-reservations", &format!("0000:02:00.0 112 pid:{PID}\n"));
    plans(&second, "plan 111", &["0000:01:00 (mapping=either) host -> VM 111", "  nothing to do"]);
}

const EITHER: &str = "either\n\tmap id=144d:a80a,iommugroup=2,node=pve,path=0000:02:00\n\
                      \tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00.0\n";

#[test]
fn a_mapping_that_this_node_does_not_have() {
    for (name, host) in [("elsewhere", with_mappings(host())), ("unknown", with_mappings(host())), ("gpu", host())] {
        let message = format!(
            "VM 111: hostpci3 uses mapping={name}, which /etc/pve/mapping/pci.cfg does not have for this node; see: \
             pvesh get /cluster/mapping/pci"
        );
        refuses(&host.vm(111, &format!("hostpci3: mapping={name},pcie=1")), "111 pre-start", 3, &message);
    }
}

#[test]
fn a_mapping_with_a_line_that_is_not_understood() {
    let file = "etc/pve/mapping/pci.cfg";
    let text = "gpu\n\tmap id=10de:2684,node=pve,path=0000:01:00,later=1\n\nother\n\tmap id=x,node=elsewhere\n";
    let host = host().file(file, text).vm(111, "hostpci0: mapping=gpu");
    refuses(
        &host,
        "111 pre-start",
        3,
        "VM 111: hostpci0 uses mapping=gpu, whose entry for this node is not understood (/etc/pve/mapping/pci.cfg:2: map \
         id=10de:2684,node=pve,path=0000:01:00,later=1), so which device it gives is not known; see: pvesh get \
         /cluster/mapping/pci",
    );
    // Of another node's, or another mapping's, nothing follows for this one.
    let host = host.vm(111, "hostpci0: mapping=other");
    let message = "VM 111: hostpci0 uses mapping=other, which /etc/pve/mapping/pci.cfg does not have for this node; see: \
                   pvesh get /cluster/mapping/pci";
    refuses(&host, "111 pre-start", 3, message);
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

// What QEMU has in the end, where Proxmox chose otherwise

/// VM 112 was made ready for with the second card while VM 111 was on its way to the first.
fn started_at_once(first: &str, second: &str) -> Host {
    let cfg = "gpu\n\tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00\n\
               \tmap id=10de:2684,iommugroup=2,node=pve,path=0000:02:00\n";
    let mut host = settled()
        .card("0000:02:00", "vfio-pci", "vfio-pci")
        .file("etc/pve/mapping/pci.cfg", cfg)
        .vm(111, "hostpci0: mapping=gpu")
        .vm(112, "hostpci0: mapping=gpu")
        .record("vm-111", "0000:01:00", "away", "vfio-pci")
        .file(&format!("{}/vfio-dev/vfio0/dev", device("0000:01:00.0")), NULL_NUMBER)
        .file(&format!("{}/vfio-dev/vfio1/dev", device("0000:02:00.0")), "1:5\n");
    for (vmid, pid, slot) in [(111, PID, first), (112, PID + 1, second)] {
        let open = if slot == "0000:01:00" { NULL } else { "/dev/zero" };
        host = host.running(vmid, pid).process(pid, "kvm", &format!("/qemu.slice/{vmid}.scope"), &[open]);
        let given = format!(
            "/usr/bin/kvm\0-id\0{vmid}\0-pidfile\0/var/run/qemu-server/{vmid}.pid\0-device\0vfio-pci,host={slot}.0,id=hostpci0.0\0\
             -device\0vfio-pci,host={slot}.1,id=hostpci0.1\0"
        );
        host = host.file(&format!("proc/{pid}/cmdline"), &given).file(&format!("run/qemu-server/{vmid}.cleanup"), "");
    }
    host
}

fn slots_on_record(host: &Host, name: &str) -> Vec<String> {
    let functions = host.own_file(name)["functions"].as_array().unwrap().clone();
    let mut slots: Vec<String> = functions.iter().map(|one| one["slot"].as_str().unwrap().to_string()).collect();
    slots.dedup();
    slots
}

#[test]
fn a_vm_that_has_what_was_made_ready_for_it() {
    let host = started_at_once("0000:01:00", "0000:02:00").record("vm-112", "0000:02:00", "away", "vfio-pci");
    let before = host.snapshot().without_lock();
    for call in ["watch 111", "watch 112"] {
        assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
    }
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING);
}

/// Each has the other's: whoever looks first puts both right.
#[test]
fn two_vms_that_have_each_other_s_card() {
    for first in [111, 112] {
        let host = started_at_once("0000:02:00", "0000:01:00").record("vm-112", "0000:02:00", "away", "vfio-pci");
        let run = host.run(&format!("watch {first}"));
        let (own, other, theirs) = if first == 111 { ("02", "01", 112) } else { ("01", "02", 111) };
        assert_eq!(
            told(&run),
            [
                format!("0000:{other}:00 is with VM {theirs}, and on its record now"),
                format!("0000:{own}:00 is with VM {first}, and on its record now")
            ]
        );
        for _ in 0..2 {
            assert_eq!(slots_on_record(&host, "vm-111"), ["0000:02:00"]);
            assert_eq!(slots_on_record(&host, "vm-112"), ["0000:01:00"]);
            assert_eq!(host.own_file("vm-112")["progress"], json!("away"));
            // The other finds nothing to do.
            assert_eq!(host.run(&format!("watch {theirs}")).err, "");
        }
    }
}

/// VM 111 has what nobody made ready, and what was made ready for it nobody has.
#[test]
fn a_vm_that_has_another_card() {
    let host = started_at_once("0000:02:00", "").without(&format!("proc/{}", PID + 1));
    let run = host.run("watch 111");
    assert_eq!(told(&run), ["0000:02:00 is with VM 111, and on its record now"]);
    assert_eq!(slots_on_record(&host, "vm-111"), ["0000:02:00"]);
    assert!(!host.has_own_file("vm-112"));
    // What cannot be seen as a whole is not put right.
    let host = started_at_once("0000:02:00", "");
    let path = format!("proc/{PID}/cmdline");
    let given = fs::read_to_string(host.path(&path)).unwrap();
    let host = host.file(&path, &format!("{given}-name\0{}\0", "x".repeat(40_000)));
    host.run("watch 111");
    assert_eq!(slots_on_record(&host, "vm-111"), ["0000:01:00"]);
    // A VM that names its card by its address has that.
    let host = started_at_once("0000:02:00", "").vm(111, "hostpci0: 0000:02:00");
    assert_eq!(host.run("watch 111").err, "");
    assert_eq!(slots_on_record(&host, "vm-111"), ["0000:01:00"]);
}

/// What a record says beside its slots stays, and so do the records of others and what stands in them.
#[test]
fn only_the_slots_of_a_record_are_put_right() {
    let host = started_at_once("0000:02:00", "").without(&format!("proc/{}", PID + 1));
    let host = host.record_by(111, "0000:01:00", "vfio-pci", PID + 7).record(
        "manual-0000:02:00",
        "0000:02:00",
        "away",
        "nvidia",
    );
    let host = host.card("0000:03:00", "vfio-pci", "vfio-pci").record("vm-113", "0000:03:00", "away", "nvidia");
    let mut other = host.own_file("vm-113");
    other["stopped"] = json!([{"container": 103}]);
    let host = host.file("run/gpu-handoff/vm-113", &other.to_string());
    let (before, by_hand) = (host.own_file("vm-111"), host.own_file("manual-0000:02:00"));
    host.run("watch 111");
    assert_eq!(slots_on_record(&host, "vm-111"), ["0000:02:00"]);
    let mut after = host.own_file("vm-111");
    after["functions"] = before["functions"].clone();
    assert_eq!(after, before);
    assert_eq!((host.own_file("vm-113"), host.own_file("manual-0000:02:00")), (other, by_hand));
}

// Another start with the same mapping

const RESERVED: &str = "run/qemu-server/pci-id-reservations";

/// VM 112 is on its way to the first card: Proxmox holds its lock, and has reserved nothing yet.
fn other_on_its_way() -> Host {
    with_pool("hostpci0: mapping=gpu")
        .config(r#"{"time":{"lock_s":0.3,"stop_s":0.1,"handoff_s":1}}"#)
        .record("vm-112", "0000:01:00", "leaving", "nvidia")
        .flock("var/lock/qemu-server/lock-112.conf")
}

/// Proxmox would give this VM the card that is changing hands: it knows of reservations only.
#[test]
fn a_start_that_proxmox_does_not_know_of_yet_is_waited_for() {
    let message = "VM 112 is still on its way to 0000:01:00 after 1 s, so which device of its mapping VM 111 gets is not \
                   known; then start VM 111 again: qm start 111";
    let run = other_on_its_way().run("111 pre-start");
    assert_eq!((run.code, told(&run).as_slice()), (Some(5), &[format!("error: {message}")][..]));
    let reserved =
        other_on_its_way().file(RESERVED, "0000:01:00.0 112 time:99999999999\n0000:01:00.1 112 time:99999999999\n");
    let started = |host: &Host| {
        let run = host.run("111 pre-start");
        assert_eq!(run.code, Some(0), "{}", run.err);
        assert_eq!(slots_on_record(host, "vm-111"), ["0000:02:00"]);
    };
    started(&reserved);
    // A hook that was called by hand is no start.
    let by_hand = other_on_its_way();
    let mut record = by_hand.own_file("vm-112");
    record["by_hand"] = json!(true);
    started(&by_hand.file("run/gpu-handoff/vm-112", &record.to_string()));
    // Where it can have no other card there is nothing to wait for.
    let none_left = other_on_its_way().record("vm-113", "0000:02:00", "away", "vfio-pci").running(113, PID);
    let run = none_left.run("111 pre-start");
    assert!(run.err.contains("of which none is free"), "{}", run.err);
}

/// Both have chosen the first card before either was on record.
#[test]
fn of_two_that_choose_the_same_in_the_same_moment_the_second_takes_another() {
    let lock = "run/gpu-handoff/lock-0000:01:00";
    let host = with_pool("hostpci0: mapping=gpu").running(112, PID).file(lock, "");
    let held = fs::File::open(host.path(lock)).unwrap();
    held.lock().unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| host.run("111 pre-start"));
        std::thread::sleep(std::time::Duration::from_millis(500));
        let function = |number: u8| json!({"slot": "0000:01:00", "address": format!("0000:01:00.{number}")});
        let record = json!({"schema": 1, "progress": "away", "functions": [function(0), function(1)], "modules": []});
        fs::write(host.path("run/gpu-handoff/vm-112"), record.to_string()).unwrap();
        fs::create_dir_all(host.path("run/qemu-server")).unwrap();
        fs::write(host.path(RESERVED), "0000:01:00.0 112 time:99999999999\n0000:01:00.1 112 time:99999999999\n")
            .unwrap();
        drop(held);
        let run = second.join().unwrap();
        assert_eq!(run.code, Some(0), "{}", run.err);
        assert!(run.err.contains("0000:01:00 (mapping=gpu) is taken meanwhile: looks for another\n"), "{}", run.err);
    });
    assert_eq!(slots_on_record(&host, "vm-111"), ["0000:02:00"]);
}
