//! Who takes over the slots of a VM that is shut down for it: a lock as long as that lasts, and the name of who has it.

use super::store::{DIRECTORY, Store};
use crate::sys::{Kernel, Lock, Share, flock_is_held};
use anyhow::Result;
use std::time::Duration;

fn lock_file(vmid: u32) -> String {
    format!("next-{vmid}")
}

fn name_file(vmid: u32) -> String {
    format!("next-{vmid}.vm")
}

impl Store {
    /// For VM `next`, until it is dropped; none when another takes over already.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn take_over_from(&self, vmid: u32, next: u32) -> Result<Option<Lock>> {
        let Some(lock) = self.take(&lock_file(vmid), Share::Alone, Duration::ZERO)? else { return Ok(None) };
        self.write(&name_file(vmid), &next.to_string())?;
        Ok(Some(lock))
    }

    /// The VM that takes over the slots of this one right now.
    pub fn next_after(&self, kernel: &dyn Kernel, vmid: u32) -> Option<u32> {
        if !flock_is_held(kernel, &format!("{DIRECTORY}/{}", lock_file(vmid))) {
            return None;
        }
        String::from_utf8(self.read(&name_file(vmid)).ok()??).ok()?.trim().parse().ok()
    }
}
