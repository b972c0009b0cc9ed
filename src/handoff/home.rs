//! Slots come home: after their VM stopped, or by hand.

use super::facts::Facts;
use super::plan;
use super::record::{Owner, Progress, Record};
use super::run::{OnFailure, Outcome, run};
use super::{Direction, Handoff, Last};
use crate::gpu::holders::Watched;
use crate::gpu::inventory::{Slot, VFIO_PCI};
use crate::stop::{Result, Stop};
use std::time::Duration;

/// How often to look whether a VM has let go.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Handoff<'_> {
    /// Brings home what the record of `owner` names; nothing to do without one.
    ///
    /// # Errors
    /// When something could not be brought home: the record is kept, so that the next call goes on from there.
    pub fn come_home(&self, owner: &Owner) -> Result<()> {
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let begin = self.kernel.now();
        let end = begin + self.config.handoff;
        // Without the lock: the other card's handoff need not wait for this VM.
        let waited = self.wait_until_free(&record, end)?;
        let locked = self.lock()?;
        // Somebody else may have brought it home, or handed it on, while we waited.
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let slots = record.slots();
        self.refuse_wedged(&locked, &slots)?;
        let title = slots.join(" ");
        if record.functions.iter().all(|f| f.driver.as_deref() == Some(VFIO_PCI)) {
            locked.remove(owner)?;
            self.story.say(&format!("{title} is at home on {VFIO_PCI}: nothing to do"));
            return Ok(());
        }
        self.story.say(&format!("{title} {owner} -> host"));
        self.story.phase("wait", waited, "nobody has it open any more");
        let record = Record { progress: Progress::Returning, ..record.clone() };
        locked.save(&record)?;
        let mut outcome = self.bring_home(&record, end);
        outcome.phases.insert(0, ("wait", waited));
        let took = self.kernel.now().saturating_sub(begin);
        let result = if outcome.is_complete() {
            locked.remove(owner)?;
            self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            Ok(())
        } else {
            self.note_wedged(&locked, &slots, &outcome);
            Err(not_home(&title, &slots, &outcome))
        };
        let exit = result.as_ref().map_or_else(|stop: &Stop| stop.code as u8, |()| 0);
        let last = Last { direction: Direction::Home, vmid: owner.vmid(), exit, took, outcomes: &[&outcome] };
        self.note_last(&locked, &slots, &last);
        result
    }

    /// As far as possible: a step that fails does not keep the others back.
    pub(super) fn bring_home(&self, record: &Record, end: Duration) -> Outcome {
        let slots = self.slots_of(record);
        let drivers: Vec<&str> = record.functions.iter().filter_map(|f| f.driver.as_deref()).collect();
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let facts = Facts::read(self.kernel, slots, &drivers, &modules);
        for gone in record.functions.iter().filter(|home| !facts.functions().any(|f| f.address == home.address)) {
            self.story.warn(&format!("{} is gone: no such device any more", gone.address));
        }
        run(self.kernel, self.story, &plan::to_home(&facts, record), OnFailure::GoOn, end)
    }

    /// A VM's post-stop may run while its QEMU is still closing: unbinding would block until it has.
    fn wait_until_free(&self, record: &Record, end: Duration) -> Result<Duration> {
        let begin = self.kernel.now();
        let slots = self.slots_of(record);
        let watched = Watched::vfio_of_slots(self.kernel, &slots);
        let on_vfio = || slots.iter().flat_map(|slot| &slot.functions).filter(|f| f.is_on(VFIO_PCI));
        let groups: Vec<u32> = on_vfio().filter_map(|f| f.iommu_group).collect();
        loop {
            // A group that a dying QEMU still has is busy after its descriptors are gone; the newer device nodes have
            // no group to ask, so descriptors are looked at too.
            let busy = groups.iter().find(|group| self.kernel.vfio_group_busy(**group));
            let holders = if busy.is_none() { watched.holders(self.kernel) } else { Vec::new() };
            let waited = self.kernel.now().saturating_sub(begin);
            if busy.is_none() && holders.is_empty() {
                return Ok(waited);
            }
            if self.kernel.now() >= end {
                let holders = watched.holders(self.kernel);
                let who = holders.first().map_or_else(|| "somebody".to_string(), ToString::to_string);
                return Err(Stop::overrun(format!(
                    "{} was not touched: {who} after {} s; end it, then: gpu-handoff to-nvidia {}",
                    record.slots().join(" "),
                    waited.as_secs(),
                    record.slots().first().unwrap_or(&"")
                )));
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
    }

    fn slots_of(&self, record: &Record) -> Vec<Slot> {
        record.slots().iter().filter_map(|address| Slot::read(self.kernel, address)).collect()
    }
}

fn not_home(title: &str, slots: &[&str], outcome: &Outcome) -> Stop {
    let problem = outcome.problem();
    if outcome.stuck.is_some() {
        return Stop::overrun(format!("{title} is wedged: {problem}; see gpu-handoff --status; a reboot frees it"));
    }
    let message = format!(
        "{title} is stranded: {problem}; mend that, then: gpu-handoff to-nvidia {}",
        slots.first().unwrap_or(&"")
    );
    if outcome.out_of_time { Stop::overrun(message) } else { Stop::failed(message) }
}
