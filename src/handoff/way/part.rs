//! A part of what a record names comes home, and the rest stays.

use super::Handoff;
use super::free::TimeBox;
use super::home::is_at_home_on_vfio;
use crate::address::{SlotId, list};
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::kept::store::Locked;
use crate::handoff::way::attempt::{Attempt, Direction};

impl Handoff<'_> {
    /// Brings home what a VM's record names beside `kept`, and tells why.
    ///
    /// # Errors
    /// When something could not be brought home: then the record still has it.
    pub fn come_home_but(&self, owner: &Owner, kept: &[SlotId], why: &str) -> Result<()> {
        let has_more = |record: &Record| record.without(kept).is_some();
        if !self.store.record(owner)?.is_some_and(|record| has_more(&record)) {
            return Ok(());
        }
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let locked = self.lock(self.config.time.lock, &record.slots(), "see gpu-handoff --status")?;
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let Some(part) = record.without(kept) else { return Ok(()) };
        let mut attempt = Attempt::new(Direction::Home, owner, &part.slots(), self.kernel.now());
        let done = self.bring_part(&locked, &mut attempt, &record, &part, why);
        self.note(Some(&locked), attempt, done.as_ref().err());
        done
    }

    fn bring_part(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &Record,
        part: &Record,
        why: &str,
    ) -> Result<()> {
        let owner = &record.owner;
        let title = list(part.slots());
        let gone = part.slots();
        // What was stopped for it may use the slots that stay as well: it runs again when those are home.
        let end_part = || {
            let rest = record.without(&gone);
            Ok(rest.map_or_else(|| locked.remove(owner), |rest| locked.save(&rest))?)
        };
        if is_at_home_on_vfio(part) {
            return end_part();
        }
        self.refuse_wedged(&part.slots())?;
        let end = attempt.begin + self.config.time.handoff / 2;
        let waited = self.wait_until_free(part, end)?;
        self.story.say(&format!("{title} {owner} -> host: {why}"));
        self.story.phase("wait", waited, "nobody has it open any more");
        self.kernel.worker();
        // Killed meanwhile, all of it comes home: its start is over then, too.
        self.save(locked, &Record { progress: Progress::Returning, ..record.clone() });
        let outcome = match self.go_home(locked, part, TimeBox::of(self, attempt.begin, end), None) {
            Ok(outcome) => outcome,
            Err(exit) => {
                self.save(locked, record);
                return Err(exit);
            }
        };
        attempt.phase("wait", waited);
        attempt.add(&outcome);
        if outcome.is_complete() {
            let took = attempt.took(self.kernel.now());
            self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            return end_part();
        }
        self.save(locked, record);
        let reason = format!("{title} stays on record for {owner}: {}", outcome.problem());
        Err(if outcome.out_of_time { Exit::overrun(reason) } else { Exit::failed(reason) })
    }
}
