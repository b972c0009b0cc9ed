//! Nodes in running containers that are no longer the host's: found by device number.
//!
//! What counts is the number that the host's driver has now. A node of the host may itself be a leftover of an earlier
//! load, and a container keeps the node that it was started with.

use crate::gpu::containers::{self, Given};
use crate::gpu::nodes;
use crate::proxmox::ct::CtConfig;
use crate::sys::{DeviceNumber, Kernel};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// For a look at a node, unless the container mounted something there that does not answer.
const LOOK: Duration = Duration::from_secs(2);

/// A node as a running container sees it, where that is not how the host has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// In the container: `/dev/nvidia-uvm`.
    pub path: String,
    /// None when the container does not have it.
    pub inside: Option<DeviceNumber>,
    pub host: DeviceNumber,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.inside {
            Some(inside) => write!(f, "{} is {inside} inside, {} on the host", self.path, self.host),
            None => write!(f, "{} is missing inside, {} on the host", self.path, self.host),
        }
    }
}

/// Of those that its configuration gives it. None for a container that does not run.
pub fn stale(kernel: &dyn Kernel, ctid: u32) -> Vec<Stale> {
    let mut host = nodes::wanted(kernel);
    host.extend(nodes::drm(kernel));
    let Some(config) = containers::config(kernel, ctid).filter(|_| !host.is_empty()) else { return Vec::new() };
    let expected = expected(&config, &host);
    let Some(init) = containers::init(kernel, ctid).filter(|_| !expected.is_empty()) else { return Vec::new() };
    let mut stale = Vec::new();
    for (path, (node, number)) in expected {
        // What cannot be seen is not judged: it is ending, or does not answer, and the others would not either.
        let Ok(inside) = kernel.device_number_inside(init, &path, LOOK) else { break };
        // What the host itself has no node for could not be given to it.
        let is_right = inside == Some(number) || (inside.is_none() && kernel.device_number(node).ok() != Some(number));
        if !is_right {
            stale.push(Stale { path, inside, host: number });
        }
    }
    stale
}

/// By path inside: the host's node and its number. `host` are all nodes that the driver has.
fn expected<'a>(config: &CtConfig, host: &'a [(String, DeviceNumber)]) -> BTreeMap<String, (&'a str, DeviceNumber)> {
    let mut expected = BTreeMap::new();
    for Given { host: given, inside, .. } in containers::given(config) {
        for (node, number) in host {
            // The node itself, or one in a directory that is given as a whole.
            let rest = node.strip_prefix(&given).filter(|rest| rest.is_empty() || rest.starts_with('/'));
            if let Some(rest) = rest {
                expected.insert(format!("{inside}{rest}"), (node.as_str(), *number));
            }
        }
    }
    expected
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxmox::ct;

    #[test]
    fn only_what_the_configuration_gives_is_expected() {
        let number = |minor| DeviceNumber { major: 195, minor };
        let host: Vec<(String, DeviceNumber)> =
            [("/dev/nvidia0", 0), ("/dev/nvidia1", 1), ("/dev/nvidiactl", 255), ("/dev/dri/card0", 7)]
                .map(|(path, minor)| (path.to_string(), number(minor)))
                .to_vec();
        let config = ct::parse(
            b"dev0: /dev/nvidiactl,gid=44\nlxc.mount.entry: /dev/nvidia1 dev/nvidia0 none bind,optional,create=file\n\
              lxc.mount.entry: /dev/dri dev/dri none bind,optional,create=dir\ndev1: /dev/nvidia-uvm\ndev2: /dev/kfd\n\
              [pve:pending]\ndev3: /dev/nvidia0\n",
        );
        let expected = expected(&config, &host);
        let found: Vec<_> =
            expected.iter().map(|(path, (node, number))| (path.as_str(), *node, number.minor)).collect();
        assert_eq!(
            found,
            [
                ("/dev/dri/card0", "/dev/dri/card0", 7),
                ("/dev/nvidia0", "/dev/nvidia1", 1),
                ("/dev/nvidiactl", "/dev/nvidiactl", 255)
            ]
        );
    }
}
