//! Containers that run, and which of them could open an NVIDIA GPU.

use super::nodes::NVIDIA_MAJOR;
use crate::proxmox::ct::{self, CtConfig};
use crate::sys::Kernel;
use crate::systemd;

/// Where Proxmox has LXC put a container's processes (`lxc.cgroup.dir.container = lxc/ID`).
const CGROUPS: &str = "lxc";

/// The attribute that freezes all processes of a container: `1` or `0`.
pub fn freezer(ctid: u32) -> String {
    format!("{}/{CGROUPS}/{ctid}/cgroup.freeze", systemd::CGROUPS)
}

pub fn runs(kernel: &dyn Kernel, ctid: u32) -> bool {
    systemd::has_processes(kernel, &format!("{CGROUPS}/{ctid}"))
}

/// Running containers whose configuration gives them an NVIDIA GPU, but for those that somebody froze already.
pub fn with_gpu(kernel: &dyn Kernel) -> Vec<u32> {
    let running =
        kernel.list(&format!("{}/{CGROUPS}", systemd::CGROUPS)).into_iter().filter_map(|name| name.parse::<u32>().ok());
    running
        .filter(|ctid| kernel.text(&freezer(*ctid)).is_some_and(|text| text == "0") && runs(kernel, *ctid))
        .filter(|ctid| {
            let config = kernel.read(&format!("/etc/pve/lxc/{ctid}.conf"));
            config.is_ok_and(|bytes| has_gpu(&ct::parse(&bytes)))
        })
        .collect()
}

/// By its device nodes: `/dev/nvidia…`, any of `/dev/dri`, or leave to use NVIDIA's major.
fn has_gpu(config: &CtConfig) -> bool {
    let is_node = |path: &str| path.starts_with("/dev/nvidia") || path.starts_with("/dev/dri");
    let by_dev = config.dev.values().filter_map(|dev| dev.device.as_ref()).any(|device| is_node(&device.path));
    let by_mount = config.mount_entries().any(|entry| entry.split_whitespace().next().is_some_and(is_node));
    let major = format!("{NVIDIA_MAJOR}:");
    let by_rule = config
        .devices_allow()
        .any(|rule| rule.split_whitespace().nth(1).is_some_and(|number| number.starts_with(&major)));
    by_dev || by_mount || by_rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gives_a_container_a_gpu() {
        for (line, gives) in [
            ("dev0: /dev/nvidia0,gid=44", true),
            ("dev3: path=/dev/dri/renderD128", true),
            ("lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file", true),
            ("lxc.cgroup2.devices.allow: c 195:* rwm", true),
            ("lxc.cgroup2.devices.allow: c 1951:0 rwm", false),
            ("lxc.mount.entry: /mnt/nvidia0 dev/nvidia0 none bind", false),
            ("dev0: /dev/ttyUSB0", false),
            ("mp0: /dev/nvidia0,mp=/x", false),
        ] {
            assert_eq!(has_gpu(&ct::parse(format!("arch: amd64\n{line}\n").as_bytes())), gives, "{line}");
        }
    }
}
