//! A handoff: slots go to a VM, or to vfio-pci by hand, and come home again.
//!
//! There is no undo list. A plan is made from how things are and how they shall be, so undoing, finishing what was
//! killed and coming home are one and the same: plan the way home from here, carry it out, verify each step.

pub mod attempt;
pub mod check;
pub mod elsewhere;
pub mod facts;
pub mod halt;
pub mod history;
pub mod home;
pub mod in_the_way;
pub mod intent;
pub mod journal;
pub mod leave;
pub mod mend;
pub mod origin;
pub mod owed;
pub mod plan;
pub mod policy;
pub mod reconcile;
pub mod record;
pub mod resume;
pub mod run;
pub mod step;
pub mod store;
pub mod wedge;

use crate::config::Config;
use crate::gpu::holders::{Reach, Watched};
use crate::gpu::{Slot, nvidia};
use crate::proxmox::running;
use crate::stop::{Result, Stop};
use crate::story::Story;
use crate::sys::{Kernel, Process, Share};
use journal::Journal;
use plan::Plan;
use record::{Owner, Progress, Record};
use run::{OnFailure, Outcome, Run};
use std::collections::BTreeSet;
use std::time::Duration;
use step::Step;
use store::{Locked, Stack, Store};
use wedge::{Foreign, Wedge};

/// How often to look again while waiting for something to end.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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
    fn lock(&self, limit: Duration, slots: &[&str], again: &str) -> Result<Locked<'_>> {
        let end = self.kernel.now() + limit;
        let mut wanted: BTreeSet<String> = slots.iter().map(ToString::to_string).collect();
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
                self.settle_journals(&locked)?;
                self.clear_ended_wedges(&locked)?;
                return Ok(locked);
            }
        }
    }

    fn not_locked(&self, limit: Duration, slots: &[&str], again: &str) -> Stop {
        let why = if self.kernel.is_asked_to_end() {
            "asked to end while another handoff is under way".to_string()
        } else {
            format!("another handoff is under way and did not end within {} s", limit.as_secs_f64())
        };
        let title = if slots.is_empty() { String::new() } else { format!("{} was not touched: ", slots.join(" ")) };
        Stop::locked(format!("{title}{why}; see gpu-handoff --status, then {again}"))
    }

    /// Whatever a record names together with one of these slots, and what goes together with that.
    fn add_neighbours(&self, slots: &mut BTreeSet<String>) {
        let records: Vec<Record> = self.store.each_record().into_iter().flatten().collect();
        loop {
            let had = slots.len();
            for record in &records {
                if record.slots().iter().any(|slot| slots.contains(*slot)) {
                    slots.extend(record.slots().into_iter().map(str::to_string));
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
        slots: &[&str],
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
    fn settle_journals(&self, locked: &Locked) -> Result<()> {
        for (name, journal) in self.store.journals() {
            let journal = match journal {
                Ok(journal) if journal.slots.iter().any(|slot| locked.has(slot)) => journal,
                Ok(_) => continue,
                // Whose call it was about is not known; a record says what to bring home all the same.
                Err(error) => {
                    self.story.warn(&format!("{error:#}; going on without it"));
                    locked.forget_journal(&name)?;
                    continue;
                }
            };
            let end = self.kernel.now() + WORKER_GRACE.min(self.config.handoff / 4);
            let at_it = || wedge::who_is_at_it(self.kernel, &journal.step, journal.worker);
            let is_at_it = || at_it().is_some_and(|process| self.kernel.caller() != Some(process));
            while is_at_it() && self.kernel.now() < end {
                self.kernel.sleep(LOOK_AGAIN);
            }
            if let Some(process) = at_it().filter(|process| self.kernel.caller() != Some(*process)) {
                self.note_wedge(locked, &journal.slots, &journal.step, process)?;
            }
            locked.forget_journal(&name)?;
        }
        Ok(())
    }

    fn clear_ended_wedges(&self, locked: &Locked) -> Result<()> {
        for slot in self.store.wedged_slots().into_iter().filter(|slot| locked.has(slot)) {
            // One that cannot be read may still be stuck: it stays, and only its slot is refused.
            let Ok(Some(wedge)) = self.store.wedge(&slot) else { continue };
            // A worker calls this program as its last act, after its call came back.
            if !wedge.is_still_stuck(self.kernel) || self.kernel.caller() == Some(wedge.process) {
                locked.clear_wedge(&slot)?;
            }
        }
        Ok(())
    }

    /// Those of the slots with a call that has not come back, or of which that is not known.
    fn wedged_among(&self, slots: &[&str]) -> Vec<String> {
        let is_wedged = |slot: &&&str| match self.store.wedge(slot) {
            Ok(wedge) => wedge.is_some_and(|wedge| wedge.is_still_stuck(self.kernel)),
            Err(_) => true,
        };
        slots.iter().filter(is_wedged).map(|slot| (*slot).to_string()).collect()
    }

    /// A slot with a call that never came back is left alone until that call ends.
    fn refuse_wedged(&self, slots: &[&str]) -> Result<()> {
        for slot in slots {
            let wedge = self.store.wedge(slot).map_err(|error| {
                Stop::overrun(format!("{slot} may be wedged and was not touched: {error:#}; a reboot clears that"))
            })?;
            if let Some(wedge) = wedge.filter(|wedge| wedge.is_still_stuck(self.kernel)) {
                return Err(Stop::overrun(format!(
                    "{slot} is wedged and left alone: {wedge}; {}",
                    self.remedy_of_wedge(slot, &wedge)
                )));
            }
            if let Some(foreign) = Foreign::wait(self.kernel, slot, || self.store.has_call(self.kernel, slot)) {
                let holder = self.holder_of(slot).map(|holder| format!("{holder}; ")).unwrap_or_default();
                return Err(Stop::overrun(format!(
                    "{slot} is wedged and left alone: {foreign}; {holder}until that ends nobody can have the card, and if \
                     it never does, only a reboot frees it; other cards keep working"
                )));
            }
        }
        Ok(())
    }

    fn run(
        &self,
        locked: &Locked,
        _stack: &Stack,
        record: &Record,
        plan: &Plan,
        on_failure: OnFailure,
        end: Duration,
    ) -> Outcome {
        let slots = record.slots();
        let journal =
            |step: &Step, worker: Process| locked.write_journal(&Journal::new(&record.owner, &slots, step, worker));
        let run = Run {
            kernel: self.kernel,
            story: self.story,
            on_failure,
            end,
            handoff: self.config.handoff,
            journal: &journal,
        };
        let outcome = run.carry_out(plan);
        let mut noted = Ok(());
        for (step, process) in &outcome.stuck {
            let slots = Journal::new(&record.owner, &slots, step, *process).slots;
            let step = step.to_string();
            let process = wedge::who_is_at_it(self.kernel, &step, *process).unwrap_or(*process);
            noted = noted.and(self.note_wedge(locked, &slots, &step, process));
        }
        // Without a wedge the journal stays: it says the same to whoever comes next.
        if let Err(error) = noted.and_then(|()| Ok(locked.end_journal(&record.owner)?)) {
            self.story.warn(&error.message);
        }
        outcome
    }

    /// Keeps which call is stuck; until it ends nobody may go near the slots.
    fn note_wedge(&self, locked: &Locked, slots: &[String], step: &str, process: Process) -> Result<()> {
        let wedge = Wedge { step: step.to_string(), process, since: utc(self.kernel.unix_time()) };
        for slot in slots {
            locked.set_wedge(slot, &wedge)?;
        }
        Ok(())
    }

    /// Who uses a card, and what to type to end that.
    fn holder_of(&self, slot: &str) -> Option<String> {
        let slots: Vec<Slot> = Slot::read(self.kernel, slot).into_iter().collect();
        let watched = Watched::of_slots(self.kernel, &slots, Reach::Slots);
        let holders = watched.holders(self.kernel, self.config.handoff / 6).unwrap_or_default();
        holders.first().map(|holder| format!("{holder}; end it ({})", holder.remedy()))
    }

    /// Whether the driver forgets who had the card attached through its control device: then the call waits for ever.
    fn forgets_attached(&self, wedge: &Wedge) -> bool {
        wedge.step.contains("from nvidia")
            && nvidia::version(self.kernel).is_some_and(nvidia::Version::forgets_attached)
    }

    /// What to do about a call that never came back.
    fn remedy_of_wedge(&self, slot: &str, wedge: &Wedge) -> String {
        let holder = self.holder_of(slot);
        let then = if self.forgets_attached(wedge) {
            "the card comes home by itself when the call ends; it never does, with this version of the driver, where \
             somebody had the card attached through /dev/nvidiactl: then only a reboot frees it"
        } else {
            "the card comes home by itself when the call ends; if it never does, only a reboot frees it"
        };
        format!(
            "{}; other cards keep working",
            [holder.as_deref(), Some(then)].map(Option::unwrap_or_default).join("; ").trim_start_matches("; ")
        )
    }
}

/// Whether a VM runs, or Proxmox is in the middle of starting or stopping it.
pub fn is_alive(kernel: &dyn Kernel, vmid: u32) -> bool {
    // The lock first: whoever lets go of it after a start has started QEMU before.
    running::is_locked(kernel, vmid) || running::qemu_pid(kernel, vmid).is_some()
}

/// Whether a VM has what its record names, or is still being started.
pub fn is_with(kernel: &dyn Kernel, record: &Record, vmid: u32) -> bool {
    let is_starting = |caller: Process| kernel.process(caller.pid) == Some(caller);
    is_alive(kernel, vmid) || (record.progress == Progress::Away && record.caller.is_some_and(is_starting))
}

/// What to type to try a handoff to this owner again.
fn again(owner: &Owner) -> String {
    match owner {
        Owner::Vm(id) => format!("start VM {id} again: qm start {id}"),
        Owner::Manual(slot) => format!("try again: gpu-handoff to-vfio {slot}"),
    }
}

/// `2026-11-20T12:00:00Z` (days to civil date, proleptic Gregorian calendar).
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_795_176_000), "2026-11-20T12:00:00Z");
    }
}
