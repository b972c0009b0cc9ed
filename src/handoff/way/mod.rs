//! The ways there and back, each under the locks that it needs.

pub mod attempt;
pub mod departure;
pub mod dri;
pub mod elsewhere;
pub mod free;
pub mod given;
pub mod halt;
pub mod home;
pub mod in_the_way;
pub mod intent;
pub mod keeper;
pub mod leave;
pub mod let_go;
pub mod origin;
pub mod others;
pub mod part;
pub mod pin;
pub mod reconcile;
pub mod resume;
pub mod run;
pub mod stuck;
pub mod takeover;
pub mod vm_resume;

use crate::address::{SlotId, list};
use crate::config::Config;
use crate::decimal::seconds;
use crate::exit::{Exit, Result};
use crate::handoff::kept::journal::Journal;
use crate::handoff::kept::record::{Owner, Record};
use crate::handoff::kept::store::{Locked, Stack, Store};
use crate::handoff::kept::wedge::{self, Wedge};
use crate::sorted;
use crate::story::Story;
use crate::sys::{Kernel, Share};
use crate::trouble::Trouble;
use crate::utc::utc;
use std::collections::BTreeSet;
use std::time::Duration;

/// How often to look again while waiting for something to end.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A worker whose parent was killed is given this long to end before its call counts as stuck.
const WORKER_GRACE: Duration = Duration::from_secs(2);

/// What a handoff works with.
pub struct Handoff<'a> {
    pub kernel: &'a dyn Kernel,
    pub store: &'a Store,
    pub config: &'a Config,
    pub story: &'a Story,
}

impl Handoff<'_> {
    /// The locks of these slots, and of all that a record names together with one of them. `again` is how to try again.
    fn lock(&self, limit: Duration, slots: &[SlotId], again: &str) -> Result<Locked<'_>> {
        let end = self.kernel.now() + limit;
        let mut wanted = sorted::set(slots.iter().copied());
        loop {
            self.add_neighbours(&mut wanted);
            let left = end.saturating_sub(self.kernel.now());
            let Some(locked) = self.store.lock(&wanted, left)? else {
                return Err(self.not_locked(limit, slots, again));
            };
            // Before they were ours a record may have come to name more.
            let had = wanted.len();
            self.add_neighbours(&mut wanted);
            if wanted.len() == had {
                self.close_journals(&locked)?;
                self.clear_ended_wedges(&locked)?;
                return Ok(locked);
            }
        }
    }

    fn not_locked(&self, limit: Duration, slots: &[SlotId], again: &str) -> Exit {
        let why = if self.kernel.is_asked_to_end() {
            "asked to end while another handoff is under way".to_string()
        } else {
            format!("another handoff is under way and did not end within {} s", seconds(limit))
        };
        let title = if slots.is_empty() { String::new() } else { format!("{} was not touched: ", list(slots)) };
        Exit::locked(Trouble::new(format!("{title}{why}"), format!("see gpu-handoff --status, then {again}")))
    }

    /// Whatever a record names together with one of these slots, and what goes together with that.
    fn add_neighbours(&self, slots: &mut BTreeSet<SlotId>) {
        let records: Vec<Record> = self.store.each_record().into_iter().flatten().collect();
        loop {
            let had = slots.len();
            for record in &records {
                if record.slots().iter().any(|slot| slots.contains(slot)) {
                    slots.extend(record.slots());
                    slots.extend(record.others.iter().map(|home| home.slot));
                }
            }
            if slots.len() == had {
                return;
            }
        }
    }

    /// The module stack's lock, as a plan needs it, and the plan as it is under that lock. `share` is a guess.
    fn stack_for<T>(
        &self,
        mut share: Share,
        slots: &[SlotId],
        again: &str,
        limit: Duration,
        plan: &dyn Fn() -> Result<(T, Share)>,
    ) -> Result<(Stack, T)> {
        let end = self.kernel.now() + limit;
        loop {
            let left = end.saturating_sub(self.kernel.now());
            let stack = self.store.stack(share, left)?.ok_or_else(|| self.not_locked(limit, slots, again))?;
            let (planned, needed) = plan()?;
            if stack.is_enough_for(needed) {
                return Ok((stack, planned));
            }
            // Meanwhile somebody else took his card away, or brought it back.
            share = needed;
        }
    }

    /// A journal without a lock holder was left by a handoff that was killed. What it had done is in the record; but
    /// its last call may still be in the kernel.
    fn close_journals(&self, locked: &Locked) -> Result<()> {
        for (name, journal) in self.store.journals() {
            let journal = match journal {
                Ok(journal) if journal.slots.iter().any(|slot| locked.has(*slot)) => journal,
                Ok(_) => continue,
                // Whose call it was about is not known; a record says what to bring home all the same.
                Err(error) => {
                    self.story.warn(&format!("{error:#}; going on without it"));
                    locked.forget_journal(&name)?;
                    continue;
                }
            };
            let end = self.kernel.now() + WORKER_GRACE.min(self.config.time.handoff / 4);
            let at_it = || wedge::who_is_at_it(self.kernel, journal.call.as_ref(), journal.worker);
            let is_at_it = || at_it().is_some_and(|process| self.kernel.caller() != Some(process));
            while is_at_it() && self.kernel.now() < end {
                self.kernel.sleep(LOOK_AGAIN);
            }
            if let Some(process) = at_it().filter(|process| self.kernel.caller() != Some(*process)) {
                self.note_wedge(locked, &Journal { worker: process, ..journal })?;
            }
            locked.forget_journal(&name)?;
        }
        Ok(())
    }

    fn clear_ended_wedges(&self, locked: &Locked) -> Result<()> {
        for slot in self.store.wedged_slots().into_iter().filter(|slot| locked.has(*slot)) {
            // One that cannot be read may still be stuck: it stays, and only its slot is refused.
            let Ok(Some(wedge)) = self.store.wedge(slot) else { continue };
            // A worker calls this program as its last act, after its call came back.
            if !wedge.is_still_stuck(self.kernel) || self.kernel.caller() == Some(wedge.process) {
                locked.clear_wedge(slot)?;
            }
        }
        Ok(())
    }

    /// Keeps which call is stuck; until it ends nobody may go near the slots. `at`: the step with its slots, and who is in
    /// its call.
    fn note_wedge(&self, locked: &Locked, at: &Journal) -> Result<()> {
        let (step, call) = (at.step.clone(), at.call.clone());
        let wedge = Wedge { step, call, process: at.worker, since: utc(self.kernel.unix_time()) };
        for slot in &at.slots {
            locked.set_wedge(*slot, &wedge)?;
        }
        Ok(())
    }
}

/// What to type to try a handoff to this owner again.
fn again(owner: &Owner) -> String {
    let command = command(owner);
    match owner {
        Owner::Vm(id) => format!("start VM {id} again: {command}"),
        Owner::Manual(_) => format!("try again: {command}"),
    }
}

/// The mere command of [`again`].
fn command(owner: &Owner) -> String {
    match owner {
        Owner::Vm(id) => format!("qm start {id}"),
        Owner::Manual(slot) => format!("gpu-handoff to-vfio {slot}"),
    }
}

#[cfg(test)]
mod tests;
