//! LXC containers use the host's GPU: its nodes are let into them, and the driver and CUDA inside are of the host's
//! version.
//!
//! What a container is given stands in its own configuration, where Proxmox reads it; which of those lines are ours is
//! kept in `/var/lib/gpu-handoff`, so that they can be brought up to date and taken out again.

pub mod attach;
pub mod check;
mod config;
pub mod detach;
pub mod edit;
pub mod library;
pub mod line;
pub mod record;
pub mod rules;
pub mod setup;
pub mod stale;
pub mod sync;
pub mod theirs;

mod attaching;
mod cuda;
mod host;
mod index;
mod inside;
mod judge;
mod seen;
mod stages;
mod there;
mod wanted;

use crate::address::SlotId;
use crate::exit::Exit;
use crate::trouble::Trouble;

/// What a container shall have. Of one that is attached already, what is not said stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// None for the only GPU there is.
    pub gpus: Vec<SlotId>,
    pub style: Option<Style>,
    /// The DRM nodes as well, for what draws or encodes video through them.
    pub dri: bool,
}

/// How device nodes get into a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// `lxc.mount.entry` with `optional`: the container starts without the GPU too.
    #[default]
    Mount,
    /// `devN`: Proxmox refuses to start the container while a node is missing.
    Dev,
}

/// Which containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    One(u32),
    /// All that were attached.
    All,
}

/// It was refused for this container, which is as it was.
fn untouched(ctid: u32, why: impl Into<Trouble>) -> Exit {
    Exit::refused(why.into().of(&format!("container {ctid} was not touched")))
}
