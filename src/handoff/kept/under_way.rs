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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;
    use nix::sys::stat::{major, minor};
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    /// Not what is locked for a moment of writing, by the keeper, or by whoever watches a start.
    #[test]
    fn only_a_slots_lock_or_the_stacks_is_a_handoff() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-under-way-{}", std::process::id()));
        let directory = root.join(DIRECTORY.trim_start_matches('/'));
        fs::create_dir_all(&directory).unwrap();
        fs::create_dir_all(root.join("proc")).unwrap();
        let is_handoff = |name: &str| {
            fs::write(directory.join(name), "").unwrap();
            let meta = fs::metadata(directory.join(name)).unwrap();
            let device = format!("{:02x}:{:02x}", major(meta.dev()), minor(meta.dev()));
            let line = format!("1: FLOCK  ADVISORY  WRITE 4242 {device}:{} 0 EOF\n", meta.ino());
            fs::write(root.join("proc/locks"), line).unwrap();
            let found = is_under_way(&Linux::at(root.clone()), None);
            fs::remove_file(directory.join(name)).unwrap();
            found
        };
        assert!(is_handoff(LOCK) && is_handoff("lock-0000:01:00"));
        for other in [BOOKS, KEEPER, &watch_file(111), "settle-lock", "vm-111"] {
            assert!(!is_handoff(other), "{other}");
        }
        fs::remove_dir_all(root).unwrap();
    }
}
