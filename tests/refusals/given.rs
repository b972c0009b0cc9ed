use super::attach::{minor, two_cards};
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
        out.lines().filter_map(|line| line.split_once("freeze container ")?.1.parse().ok()).collect()
    };
    assert_eq!(frozen(&host), [203, 204, 205, 206]);
    // The numbers of the cards are those of now.
    let host = minor(minor(host, "0000:01:00", "1"), "0000:02:00", "0");
    assert_eq!(frozen(&host), [201, 204, 205]);
}
