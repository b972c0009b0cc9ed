//! Containers that run, and which of them could open an NVIDIA GPU.

use super::nodes::NVIDIA_MAJOR;
use crate::proxmox::ct::{self, CtConfig};
use crate::sys::Kernel;
use crate::systemd;

/// Where Proxmox has LXC put a container's processes (`lxc.cgroup.dir.container = lxc/ID`).
const CGROUPS: &str = "lxc";

/// Of the containers of this node.
const CONFIGS: &str = "/etc/pve/lxc";

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
        .filter(|ctid| config(kernel, *ctid).is_some_and(|config| has_gpu(&config)))
        .collect()
}

/// By its device nodes: `/dev/nvidia…`, any of `/dev/dri`, or leave to use NVIDIA's major.
fn has_gpu(config: &CtConfig) -> bool {
    has_nvidia(config) || given(config).next().is_some()
}

/// As [`has_gpu`], but what it has of `/dev/dri` may be another vendor's.
pub fn has_nvidia(config: &CtConfig) -> bool {
    let major = format!("{NVIDIA_MAJOR}:");
    let by_rule = config
        .devices_allow()
        .any(|rule| rule.split_whitespace().nth(1).is_some_and(|number| number.starts_with(&major)));
    by_rule || given(config).any(|node| node.host.starts_with("/dev/nvidia"))
}

/// A device node, or a directory of them, that a configuration gives its container.
#[derive(Debug, PartialEq, Eq)]
pub struct Given<'a> {
    /// Its path on the host: `/dev/nvidia…` or below `/dev/dri`.
    pub host: &'a str,
    /// In the container.
    pub inside: String,
}

pub fn given(config: &CtConfig) -> impl Iterator<Item = Given<'_>> {
    let devices = config.dev.values().filter_map(|dev| dev.device.as_ref());
    let by_dev = devices.map(|device| Given { host: &device.path, inside: device.path.clone() });
    let by_mount = config.mount_entries().filter_map(|entry| {
        let mut words = entry.split_whitespace();
        let (host, target) = (words.next()?, words.next()?);
        Some(Given { host, inside: format!("/{}", target.trim_start_matches('/')) })
    });
    let is_gpu = |path: &str| path.starts_with("/dev/nvidia") || path == "/dev/dri" || path.starts_with("/dev/dri/");
    by_dev.chain(by_mount).filter(move |node| is_gpu(node.host))
}

/// The configuration of a container of this node.
pub fn config(kernel: &dyn Kernel, ctid: u32) -> Option<CtConfig> {
    kernel.read(&format!("{CONFIGS}/{ctid}.conf")).ok().map(|bytes| ct::parse(&bytes))
}

/// Whether any container of this node, running or not, is given this node.
pub fn is_given_to_any(kernel: &dyn Kernel, node: &str) -> bool {
    let all = kernel.list(CONFIGS).into_iter().filter_map(|name| name.strip_suffix(".conf")?.parse().ok());
    all.filter_map(|ctid| config(kernel, ctid)).any(|config| given(&config).any(|given| given.host == node))
}

/// The PID, on the host, of a running container's init. None as long as LXC itself is still preparing the container.
pub fn init(kernel: &dyn Kernel, ctid: u32) -> Option<i32> {
    let mut cgroups = vec![format!("{}/{CGROUPS}/{ctid}", systemd::CGROUPS)];
    let mut found: Option<(usize, i32)> = None;
    let mut looked_at = 0;
    while let Some(cgroup) = cgroups.get(looked_at) {
        let processes = kernel.text(&format!("{cgroup}/cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            // Containers may have containers: of several inits the outermost is meant.
            let depth = depth_of_init(kernel, pid).filter(|depth| found.is_none_or(|(least, _)| *depth < least));
            found = depth.map(|depth| (depth, pid)).or(found);
        }
        if found.is_some_and(|(depth, _)| depth == 2) {
            break;
        }
        let inner = kernel.list(cgroup).into_iter().map(|name| format!("{cgroup}/{name}"));
        let inner: Vec<String> = inner.filter(|path| kernel.exists(&format!("{path}/cgroup.procs"))).collect();
        cgroups.extend(inner);
        looked_at += 1;
    }
    let (_, pid) = found?;
    let is_lxc = kernel.link_name(&format!("/proc/{pid}/exe")).is_ok_and(|program| program.starts_with("lxc-"));
    (!is_lxc).then_some(pid)
}

/// In how many PID namespaces a process is, if it is the first of the innermost.
fn depth_of_init(kernel: &dyn Kernel, pid: i32) -> Option<usize> {
    let status = kernel.text(&format!("/proc/{pid}/status"))?;
    let numbers: Vec<&str> = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().collect();
    (numbers.len() > 1 && numbers.last() == Some(&"1")).then_some(numbers.len())
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
