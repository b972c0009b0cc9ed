//! Nodes in running containers that are no longer the host's: found by device number.

use crate::sys::{DeviceNumber, Kernel};

/// A node as a running container sees it, where that is not how the host has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// In the container: `/dev/nvidia-uvm`.
    pub path: String,
    /// None when the container does not have it.
    pub inside: Option<DeviceNumber>,
    pub host: DeviceNumber,
}

/// Of those that its configuration gives it. None for a container that does not run.
pub fn stale(_kernel: &dyn Kernel, _ctid: u32) -> Vec<Stale> {
    Vec::new()
}
