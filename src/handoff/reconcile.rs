//! What a record says is ours and nobody works on or uses any more comes home. What no record names is not touched.

use super::record::{Owner, Progress, Record};
use super::store::Locked;
use super::{Handoff, LOOK_AGAIN, WORKER_GRACE, is_alive};
use crate::proxmox::running;
use crate::stop::Result;
use std::time::Duration;

/// A QEMU that is just ending may take this long to let go.
const LETTING_GO: Duration = Duration::from_secs(5);

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Handoffs that were cut short.
    Unfinished,
    /// Those, and slots whose VM does not run.
    All,
}

impl Handoff<'_> {
    /// Brings home what was left behind.
    ///
    /// # Errors
    /// The first that could not be brought home; the others were tried all the same.
    pub fn reconcile(&self, reach: Reach) -> Result<()> {
        if self.store.records()?.is_empty() {
            return Ok(());
        }
        if reach == Reach::Unfinished {
            self.let_workers_end();
        }
        let locked = self.lock()?;
        let mut first = None;
        for record in self.store.records()? {
            if self.is_left_behind(&record, reach) {
                first = first.or(self.fetch(&locked, &record).err());
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// A worker starts this as its last act and may not be gone yet: as long as it is there, its slot counts as wedged,
    /// and nobody would come back for it.
    fn let_workers_end(&self) {
        let is_stuck = |slot: &String| {
            let wedge = self.store.wedge(slot).ok().flatten();
            wedge.is_some_and(|wedge| wedge.is_still_stuck(self.kernel))
        };
        let end = self.kernel.now() + WORKER_GRACE;
        while self.store.wedged_slots().iter().any(is_stuck) && self.kernel.now() < end {
            self.kernel.sleep(LOOK_AGAIN);
        }
    }

    /// Every record that [`Handoff::reconcile`] would act on.
    ///
    /// # Errors
    /// Names the record that cannot be read.
    pub fn left_behind(&self, reach: Reach) -> Result<Vec<Record>> {
        let mut records = self.store.records()?;
        records.retain(|record| self.is_left_behind(record, reach));
        Ok(records)
    }

    /// A handoff that was killed is put right before another begins, or the other would plan around a half-moved card.
    pub(super) fn finish_others(&self, locked: &Locked, owner: &Owner) {
        let records = self.store.records().unwrap_or_default();
        for record in records.iter().filter(|record| record.owner != *owner) {
            if self.is_left_behind(record, Reach::Unfinished)
                && let Err(stop) = self.fetch(locked, record)
            {
                self.story.warn(&stop.message);
            }
        }
    }

    /// Called with the lock held or for show: whoever worked on an unfinished handoff is dead.
    fn is_left_behind(&self, record: &Record, reach: Reach) -> bool {
        match (&record.owner, record.progress) {
            (Owner::Vm(id), Progress::Away) => reach == Reach::All && !is_alive(self.kernel, *id),
            (Owner::Vm(id), _) => running::qemu_pid(self.kernel, *id).is_none(),
            (Owner::Manual(_), Progress::Away) => false,
            (Owner::Manual(_), _) => true,
        }
    }

    fn fetch(&self, locked: &Locked, record: &Record) -> Result<()> {
        let begin = self.kernel.now();
        self.refuse_wedged(&record.slots())?;
        let waited = self.wait_until_free(record, begin + LETTING_GO.min(self.config.handoff / 3))?;
        self.bring_home(locked, record, begin, waited)
    }
}
