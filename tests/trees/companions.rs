use super::*;

// What a VM takes from the host beside its GPU

const HOME: &str = r#"{"policy":{"others":"home"},"gpus":{"01:00":{"home":"vfio-pci"}}}"#;
const VM: &str = "hostpci0: 0000:01:00\nhostpci1: 0000:05:00,pcie=1\nhostpci2: 0000:06:00.0\n";

/// A card that is at home on vfio-pci, which passes every check and has nothing to do, a USB controller and a disk.
fn with_others() -> Host {
    settled()
        .vm(111, VM)
        .config(HOME)
        .function("0000:05:00.0", "0c0330", "1b36:000d", "xhci_hcd", 5)
        .function("0000:06:00.0", "010802", "1b36:0010", "nvme", 6)
        .function("0000:06:00.1", "020000", "8086:1533", "igb", 6)
}

#[test]
fn where_they_were_is_on_record_before_proxmox_takes_them() {
    let host = with_others();
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(0), "{}", run.err);
    let others = host.own_file("vm-111")["others"].clone();
    let homes: Vec<(&str, &str)> = others
        .as_array()
        .unwrap()
        .iter()
        .map(|home| (home["address"].as_str().unwrap(), home["driver"].as_str().unwrap()))
        .collect();
    assert_eq!(
        homes,
        [("0000:05:00.0", "xhci_hcd"), ("0000:06:00.0", "nvme")],
        "and not the function that no line names"
    );
    // Another start, as after a reboot: Proxmox has them, and what was known of them stays.
    let driver = format!("{}/driver", device("0000:05:00.0"));
    let host = host.without(&driver).link(&driver, "sys/bus/pci/drivers/vfio-pci");
    assert_eq!(host.run("111 pre-start").code, Some(0));
    assert_eq!(host.own_file("vm-111")["others"].as_array().unwrap().len(), 2);
    // They never left as far as this tree can tell, so that nothing is to be done but for the first.
    let plan = host.run("to-nvidia 01:00 --dry-run");
    let lines = "  release   remove_id 1b36:000d 1b36:0010, driver_override=xhci_hcd 0000:05:00.0, unbind from vfio-pci \
                 0000:05:00.0\n  bind      bind to xhci_hcd 0000:05:00.0\n  clear     clear driver_override 0000:05:00.0\n";
    assert!(plan.out.ends_with(lines), "{}{}", plan.out, plan.err);
}

/// A tree of files unloads no module, so the card goes back, and Proxmox never came to take the others.
#[test]
fn after_a_start_that_failed_they_are_where_they_were() {
    let host = host().vm(111, "hostpci0: 0000:01:00\nhostpci1: 0000:05:00\n").config(r#"{"policy":{"others":"home"}}"#);
    let host = host.function("0000:05:00.0", "0c0330", "1b36:000d", "xhci_hcd", 5);
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(run.err.contains("0000:01:00 is back where it was") && !run.err.contains("0000:05:00"), "{}", run.err);
    assert!(!host.has_own_file("vm-111"));
}

#[test]
fn by_default_nobody_asks_for_them() {
    let host = with_others().config(r#"{"gpus":{"01:00":{"home":"vfio-pci"}}}"#);
    assert_eq!(host.run("111 pre-start").code, Some(0));
    assert_eq!(host.own_file("vm-111")["others"], json!(null));
}

#[test]
fn one_that_the_host_uses_keeps_the_vm_from_starting() {
    let disk = format!("{}/nvme/nvme0/nvme0n1", device("0000:06:00.0"));
    let used = |host: Host| {
        host.file(&format!("{disk}/dev"), "259:0\n").file("proc/mounts", "/dev/nvme0n1 /srv ext4 rw 0 0\n")
    };
    let why = "the disk nvme0n1 is on 0000:06:00.0 and is mounted at /srv";
    let message =
        format!("VM 111 was not started: {why}; unmount it: umount /srv; then start VM 111 again: qm start 111");
    refuses(&used(with_others()), "111 pre-start", 3, &message);
    let plan = used(with_others()).run("plan 111");
    assert_eq!((plan.code, plan.err.contains(why)), (Some(3), true), "{}", plan.err);
    // Nobody asked for it to come home, so it goes, as it always did, but not without a word.
    let run = used(with_others().config(r#"{"gpus":{"01:00":{"home":"vfio-pci"}}}"#)).run("111 pre-start");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(run.err.contains(&format!("warning: VM 111 takes from the host what it uses: {why}\n")), "{}", run.err);
    // A network card that the host is reached by.
    let net = format!("{}/net/eth0/brport/state", device("0000:06:00.1"));
    let bridged = with_others().vm(111, "hostpci0: 0000:01:00\nhostpci1: 0000:06:00.1\n").file(&net, "3\n");
    let run = bridged.run("111 pre-start");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(run.err.contains("the network interface eth0 is on 0000:06:00.1 and is a port of a bridge"), "{}", run.err);
}

#[test]
fn what_proxmox_does_not_take_is_left_alone() {
    for vm in [
        "hostpci0: 0000:01:00\nhostpci1: 0000:05:00,driver=keep\n",
        "hostpci0: 0000:01:00\nargs: -device vfio-pci,host=0000:05:00.0\n",
    ] {
        let host = with_others().vm(111, vm);
        let run = host.run("111 pre-start");
        assert_eq!(run.code, Some(0), "{vm}: {}", run.err);
        assert_eq!(host.own_file("vm-111")["others"], json!(null), "{vm}");
    }
    // A mapping is resolved for this node.
    let mapping = "usb\n\tmap id=1b36:000d,iommugroup=5,node=pve,path=0000:05:00.0\n";
    let host =
        with_others().vm(111, "hostpci0: 0000:01:00\nhostpci1: mapping=usb\n").file("etc/pve/mapping/pci.cfg", mapping);
    let run = host.run("111 pre-start");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(host.own_file("vm-111")["others"][0]["address"], "0000:05:00.0");
}
