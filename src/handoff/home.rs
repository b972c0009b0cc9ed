//! Slots come home: after their VM stopped, or by hand.

use super::facts::Facts;
use super::plan::{self, Plan};
use super::record::{Owner, Progress, Record};
use super::run::{OnFailure, Outcome};
use super::store::Locked;
use super::{Direction, Handoff, LOOK_AGAIN, Last};
use crate::gpu::holders::Watched;
use crate::gpu::inventory::{self, Slot, VFIO_PCI};
use crate::stop::{Result, Stop};
use std::time::Duration;

impl Handoff<'_> {
    /// Brings home what the record of `owner` names; nothing to do without one.
    ///
    /// # Errors
    /// When something could not be brought home: the record is kept, so that the next call goes on from there.
    pub fn come_home(&self, owner: &Owner) -> Result<()> {
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let begin = self.kernel.now();
        self.refuse_wedged(&record.slots())?;
        // Without the lock: the other card's handoff need not wait for this VM.
        let waited = self.wait_until_free(&record, begin + self.config.handoff)?;
        let locked = self.lock()?;
        // Somebody else may have brought it home, or handed it on, while we waited.
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        self.finish_others(&locked, owner);
        self.bring_home(&locked, &record, begin, waited)
    }

    /// `begin` is when the time box of this handoff began, `waited` what of it went into waiting for the VM.
    pub(super) fn bring_home(&self, locked: &Locked, record: &Record, begin: Duration, waited: Duration) -> Result<()> {
        let slots = record.slots();
        self.refuse_wedged(&slots)?;
        let owner = &record.owner;
        let title = slots.join(" ");
        if record.functions.iter().all(|f| f.driver.as_deref() == Some(VFIO_PCI)) {
            locked.remove(owner)?;
            self.story.say(&format!("{title} is at home on {VFIO_PCI}: nothing to do"));
            return Ok(());
        }
        self.story.say(&format!("{title} {owner} -> host"));
        self.story.phase("wait", waited, "nobody has it open any more");
        locked.save(&Record { progress: Progress::Returning, ..record.clone() })?;
        let mut outcome = self.go_home(locked, record, begin + self.config.handoff)?;
        outcome.phases.insert(0, ("wait", waited));
        let took = self.kernel.now().saturating_sub(begin);
        let result = if outcome.is_complete() {
            locked.remove(owner)?;
            self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            Ok(())
        } else {
            Err(self.not_home(&slots, &outcome))
        };
        let exit = result.as_ref().map_or_else(|stop: &Stop| stop.code as u8, |()| 0);
        let last = Last { direction: Direction::Home, vmid: owner.vmid(), exit, took, outcomes: &[&outcome] };
        self.note_last(locked, &slots, &last);
        result
    }

    /// As far as possible: a step that fails does not keep the others back.
    pub(super) fn go_home(&self, locked: &Locked, record: &Record, end: Duration) -> Result<Outcome> {
        let plan = self.plan_home(record);
        self.run(locked, record, &plan, OnFailure::GoOn, end)
    }

    /// The way home from where things are now.
    pub fn plan_home(&self, record: &Record) -> Plan {
        let drivers: Vec<&str> = record.functions.iter().filter_map(|f| f.driver.as_deref()).collect();
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let mut slots = self.slots_of(record);
        slots.retain(|slot| !self.store.has_call(self.kernel, &slot.address));
        let facts = Facts::read(self.kernel, slots, &drivers, &modules);
        for gone in record.functions.iter().filter(|home| !inventory::device_exists(self.kernel, &home.address)) {
            self.story.warn(&format!("{} is gone: there is no such device any more", gone.address));
        }
        plan::to_home(&facts, record)
    }

    /// A VM's post-stop may run while its QEMU is still closing: unbinding would block until it has.
    ///
    /// # Errors
    /// When somebody has it still at `end`.
    pub(super) fn wait_until_free(&self, record: &Record, end: Duration) -> Result<Duration> {
        let begin = self.kernel.now();
        let slots = self.slots_of(record);
        let watched = Watched::vfio_of_slots(self.kernel, &slots);
        let on_vfio = || slots.iter().flat_map(|slot| &slot.functions).filter(|f| f.is_on(VFIO_PCI));
        let groups: Vec<u32> = on_vfio().filter_map(|f| f.iommu_group).collect();
        loop {
            // A group that a dying QEMU still has is busy after its descriptors are gone; the newer device nodes have
            // no group to ask, so descriptors are looked at too.
            let busy = groups.iter().any(|group| self.kernel.vfio_group_busy(*group));
            let waited = self.kernel.now().saturating_sub(begin);
            if !busy && watched.holders(self.kernel).is_empty() {
                return Ok(waited);
            }
            if self.kernel.now() >= end || self.kernel.is_asked_to_end() {
                let holders = watched.holders(self.kernel);
                let who = holders.first().map_or_else(|| "somebody has it open".to_string(), ToString::to_string);
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

    fn not_home(&self, slots: &[&str], outcome: &Outcome) -> Stop {
        let title = slots.join(" ");
        let slot = slots.first().unwrap_or(&"");
        let problem = outcome.problem();
        if outcome.stuck.is_some() {
            return Stop::overrun(format!("{title} is wedged: {problem}; {}", self.remedy_of_wedge(slot)));
        }
        let message = format!("{title} is stranded: {problem}; mend that, then: gpu-handoff to-nvidia {slot}");
        if outcome.out_of_time { Stop::overrun(message) } else { Stop::failed(message) }
    }
}
