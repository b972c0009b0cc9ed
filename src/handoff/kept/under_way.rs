//! Whether somebody has one of our locks; they are only looked at.

use super::store::{BOOKS, DIRECTORY, KEEPER, LOCK, WATCH, watch_file};
use crate::address::SlotId;
use crate::sys::{Kernel, flock_is_held};

/// Whether a handoff of this slot is under way, or of any; its lock is only looked at.
pub fn is_under_way(kernel: &dyn Kernel, slot: Option<SlotId>) -> bool {
    let is_held = |name: &str| flock_is_held(kernel, &format!("{DIRECTORY}/{name}"));
    match slot {
        Some(slot) => is_held(&format!("{LOCK}-{slot}")),
        None => {
            let is_handoffs =
                |name: &str| name.starts_with(LOCK) && name != BOOKS && name != KEEPER && !name.starts_with(WATCH);
            kernel.list(DIRECTORY).iter().any(|name| is_handoffs(name) && is_held(name))
        }
    }
}

/// Whether somebody watches over a start of this VM.
pub fn is_watched(kernel: &dyn Kernel, vmid: u32) -> bool {
    flock_is_held(kernel, &format!("{DIRECTORY}/{}", watch_file(vmid)))
}
