//! A VM's threads and interrupts go to their CPUs when it has started, and what was changed outside of it is put back when it
//! has stopped. Nothing that goes wrong with it keeps a VM from anything.

use super::Handoff;
use crate::gpu::interrupts;
use crate::handoff::kept::pinned::{Kept, remember};
use crate::handoff::plan::pin::{Change, Facts, Placed, There, changes, judge};
use crate::proxmox::running;
use crate::sys::{ActError, Action, Lock, Process};
use nix::errno::Errno;
use std::time::Duration;

/// One look with all that follows from it takes milliseconds; a start waits for no more than this.
const LIMIT: Duration = Duration::from_secs(2);

const LEAST: Duration = Duration::from_millis(100);

/// vCPUs are plugged in later, and the guest's driver asks for its interrupts when it is loaded.
const A_WHILE: Duration = Duration::from_secs(60);

const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Handoff<'_> {
    /// What is there of a VM that runs. None where there is nothing to pin, else its QEMU.
    pub fn pin(&self, vmid: u32) -> Option<Process> {
        let pin = self.config.pin_of(vmid)?;
        let pinning = self.pinning(vmid)?;
        let end = self.kernel.now() + LIMIT;
        // Under the lock: whoever puts back does so when it has ended.
        let qemu = self.kernel.process(running::qemu_pid(self.kernel, vmid)?)?;
        let (pin, mistakes) = judge(vmid, pin, &Facts::of_vm(self.kernel, pin, vmid, Some(qemu.pid)));
        for mistake in mistakes {
            self.story.warn(&format!("{mistake}; VM {vmid} goes on without it"));
        }
        let mut changes = changes(&pin, &There::read(self.kernel, vmid, qemu.pid, &pin));
        if let Err(error) = self.keep_what_was(&pinning, vmid, &changes) {
            self.story.warn(&format!("{error:#}; VM {vmid} goes on without what would have to be put back"));
            changes.retain(|change| change.kept().is_none());
        }
        let mut done = Vec::new();
        let mut failed = Vec::new();
        let mut why = None;
        for change in changes {
            match self.kernel.act(&change.action(qemu.pid), self.left(end)) {
                Ok(()) => done.push(change),
                // It has ended meanwhile.
                Err(error) if error.errno() == Some(Errno::ESRCH as i32) => {}
                Err(error) => {
                    failed.push(change);
                    let is_stuck = matches!(error, ActError::Stuck { .. });
                    why.get_or_insert(error);
                    if is_stuck {
                        break;
                    }
                }
            }
        }
        if !done.is_empty() {
            self.story.say(&format!("VM {vmid} is pinned: {}", Placed::of(&done)));
        }
        if let Some(why) = why {
            self.story.warn(&format!("VM {vmid} goes on without this: {}: {why}", Placed::of(&failed)));
        }
        Some(qemu)
    }

    /// As [`Handoff::pin`], with what comes within a minute.
    pub fn pin_for_a_while(&self, vmid: u32) {
        let end = self.kernel.now() + A_WHILE;
        while let Some(qemu) = self.pin(vmid) {
            let is_over = self.kernel.now() >= end || self.kernel.is_asked_to_end();
            if is_over || self.kernel.wait_for_end(qemu, LOOK_AGAIN) {
                return;
            }
        }
    }

    /// What was changed outside of a VM is as it was before, unless somebody has changed it since.
    pub fn unpin(&self, vmid: u32) {
        if !self.store.has_pinned(vmid) {
            return;
        }
        let Some(pinning) = self.pinning(vmid) else { return };
        let end = self.kernel.now() + LIMIT;
        let kept = self.store.pinned(vmid).unwrap_or_else(|error| {
            self.story.warn(&format!("{error:#}: what was changed for VM {vmid} stays as it is"));
            Vec::new()
        });
        let others = self.store.pinned_but(vmid);
        // One that another VM has in common with it is put back by the last of them.
        let is_last = |one: &&Kept| !others.iter().any(|other| other.path == one.path);
        for one in kept.iter().rev().filter(is_last).filter(|one| self.is_as_set(one)) {
            let action = Action::Write { path: one.path.clone(), data: one.was.clone() };
            if let Err(error) = self.kernel.act(&action, self.left(end)) {
                let Kept { path, was, .. } = one;
                self.story
                    .warn(&format!("{path} is not as it was before VM {vmid}: {error}; type: echo {was} > {path}"));
            }
        }
        if let Err(error) = self.store.set_pinned(&pinning, vmid, &[]) {
            self.story.warn(&format!("{error:#}"));
        }
    }

    /// VMs that were pinned and have ended without anybody being told.
    pub fn left_pinned(&self) -> Vec<u32> {
        let mut vms = self.store.pinned_vms();
        vms.retain(|vmid| !running::is_alive(self.kernel, *vmid));
        vms
    }

    /// Never nothing, or what is done at once would seem stuck.
    fn left(&self, end: Duration) -> Duration {
        end.saturating_sub(self.kernel.now()).max(LEAST)
    }

    fn pinning(&self, vmid: u32) -> Option<Lock> {
        let why = match self.store.pinning(LIMIT) {
            Ok(Some(lock)) => return Some(lock),
            Ok(None) => "another VM is being pinned".to_string(),
            Err(error) => format!("{error:#}"),
        };
        self.story.warn(&format!("{why}; the pinning of VM {vmid} is left as it is"));
        None
    }

    /// On record before it is changed.
    fn keep_what_was(&self, pinning: &Lock, vmid: u32, changes: &[Change]) -> anyhow::Result<()> {
        let new: Vec<&Kept> = changes.iter().filter_map(Change::kept).collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut kept = self.store.pinned(vmid)?;
        let others = self.store.pinned_but(vmid);
        new.into_iter().for_each(|new| remember(&mut kept, &others, new));
        self.store.set_pinned(pinning, vmid, &kept)
    }

    /// Whether it still says what we wrote there, and is still what it was. An interrupt of messages ends with its handler, and
    /// its number may be another's; a line of the board stays.
    fn is_as_set(&self, kept: &Kept) -> bool {
        let Kept { path, handler, .. } = kept;
        let is_lasting = handler.is_empty() || handler.starts_with("vfio-intx");
        (is_lasting || interrupts::has_handler(self.kernel, path, handler))
            && self.kernel.text(path).is_some_and(|now| kept.is_set(&now))
    }
}
