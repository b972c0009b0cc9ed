//! Slots come home: after their VM stopped, or by hand.

use super::attempt::{Attempt, Direction};
use super::facts::Facts;
use super::plan::{self, Plan};
use super::record::{Owner, Progress, Record};
use super::run::{OnFailure, Outcome};
use super::step::Step;
use super::store::Locked;
use super::{Handoff, LOOK_AGAIN, check, is_alive};
use crate::gpu::holders::Watched;
use crate::gpu::inventory::{READ_LIMIT, Slot, VFIO_PCI};
use crate::stop::{Result, Stop};
use crate::sys::ActError;
use std::time::Duration;

/// Who wants a slot to come home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// Its VM has stopped, or is about to have: worth waiting for.
    Proxmox,
    /// Somebody at a terminal, who would rather be told.
    Person,
    /// Whoever watched over a start that was given up; unless the VM is being started again meanwhile.
    Watcher,
}

/// The time of one way home.
#[derive(Debug, Clone, Copy)]
pub(super) struct TimeBox {
    pub begin: Duration,
    pub end: Duration,
    /// What of it went into waiting for a VM to let go.
    pub waited: Duration,
}

impl Handoff<'_> {
    /// Brings home what the record of `owner` names; nothing to do without one.
    ///
    /// # Errors
    /// When something could not be brought home: the record is kept, so that the next call goes on from there.
    pub fn come_home(&self, owner: &Owner, asker: Asker) -> Result<()> {
        self.come_home_unless(owner, asker, &|| false)
    }

    /// As [`Handoff::come_home`], unless there is a reason to leave it, asked for before anything is changed.
    ///
    /// # Errors
    /// As [`Handoff::come_home`].
    pub fn come_home_unless(&self, owner: &Owner, asker: Asker, stays: &dyn Fn() -> bool) -> Result<()> {
        let begin = self.kernel.now();
        let mut time = TimeBox { begin, end: begin + self.config.handoff, waited: Duration::ZERO };
        let mut attempt = Attempt::new(Direction::Home, owner, &[], begin);
        let (locked, record) = match self.turn(owner, asker, stays, &mut attempt, &mut time) {
            Ok(Some(turn)) => turn,
            Ok(None) => return Ok(()),
            Err(stop) => {
                self.note(None, attempt, Some(&stop));
                return Err(stop);
            }
        };
        let done = self.bring_home(&locked, &record, time);
        self.finish_others(&locked, owner);
        done
    }

    /// The lock and what there is to bring home, once nobody uses it any more; none without a record.
    fn turn(
        &self,
        owner: &Owner,
        asker: Asker,
        stays: &dyn Fn() -> bool,
        attempt: &mut Attempt,
        time: &mut TimeBox,
    ) -> Result<Option<(Locked<'_>, Record)>> {
        loop {
            let Some(record) = self.store.record(owner)? else { return Ok(None) };
            attempt.is_about(&record.slots());
            let locked = self.lock(
                self.config.lock,
                &record.slots(),
                &format!("try again: gpu-handoff to-nvidia {}", record.slot()),
            )?;
            // Somebody else may have brought it home, or handed it on, before the lock was ours.
            let Some(record) = self.store.record(owner)? else { return Ok(None) };
            match asker {
                Asker::Proxmox => {}
                Asker::Person => self.refuse_to_take(&record)?,
                Asker::Watcher if owner.vmid().is_some_and(|id| is_alive(self.kernel, id)) => return Ok(None),
                Asker::Watcher => {}
            }
            let in_use = self.is_in_use(&record, time.end)?;
            if stays() {
                return Ok(None);
            }
            if !in_use {
                return Ok(Some((locked, record)));
            }
            // On record before waiting: whoever comes after this run, if it is killed or gives up, goes on from here.
            self.save(&locked, &Record { progress: Progress::Returning, ..record.clone() });
            // Without the lock: the other card's handoff need not wait for this VM.
            drop(locked);
            time.waited += self.wait_until_free(&record, time.end)?;
        }
    }

    /// Brings home what a VM's record names beside `kept`: what its configuration no longer names.
    ///
    /// # Errors
    /// When something could not be brought home: then the record still has it.
    pub fn come_home_but(&self, owner: &Owner, kept: &[String]) -> Result<()> {
        let has_more = |record: &Record| record.without(kept).is_some();
        if !self.store.record(owner)?.is_some_and(|record| has_more(&record)) {
            return Ok(());
        }
        let locked = self.lock(self.config.lock, &[], "see gpu-handoff --status")?;
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let Some(part) = record.without(kept) else { return Ok(()) };
        let mut attempt = Attempt::new(Direction::Home, owner, &part.slots(), self.kernel.now());
        let done = self.bring_part(&locked, &mut attempt, &record, &part);
        self.note(Some(&locked), attempt, done.as_ref().err());
        done
    }

    fn bring_part(&self, locked: &Locked, attempt: &mut Attempt, record: &Record, part: &Record) -> Result<()> {
        let owner = &record.owner;
        let title = part.slots().join(" ");
        let gone: Vec<String> = part.slots().iter().map(ToString::to_string).collect();
        // What was stopped for it may use the slots that stay as well: it runs again when those are home.
        let end_part = || {
            let rest = record.without(&gone);
            Ok(rest.map_or_else(|| locked.remove(owner), |rest| locked.save(&rest))?)
        };
        if is_at_home_on_vfio(part) {
            return end_part();
        }
        self.refuse_wedged(&part.slots())?;
        let end = attempt.begin + self.config.handoff / 2;
        let waited = self.wait_until_free(part, end)?;
        self.story.say(&format!("{title} {owner} -> host: its configuration names it no longer"));
        self.story.phase("wait", waited, "nobody has it open any more");
        self.kernel.worker();
        // Killed meanwhile, all of it comes home: its start is over then, too.
        self.save(locked, &Record { progress: Progress::Returning, ..record.clone() });
        let outcome = self.go_home(locked, part, end)?;
        attempt.phase("wait", waited);
        attempt.add(&outcome);
        if outcome.is_complete() {
            let took = attempt.took(self.kernel.now());
            self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            return end_part();
        }
        self.save(locked, record);
        let reason = format!("{title} stays on record for {owner}: {}", outcome.problem());
        Err(if outcome.out_of_time { Stop::overrun(reason) } else { Stop::failed(reason) })
    }

    /// What a person asks for is refused rather than waited for. By hand and with a VM are two records of one slot.
    fn refuse_to_take(&self, record: &Record) -> Result<()> {
        let slot = record.slot();
        let records = self.store.each_record().into_iter().flatten();
        let mut owners = records.filter(|other| other.slots().contains(&slot)).filter_map(|other| other.owner.vmid());
        if let Some(id) = owners.find(|id| is_alive(self.kernel, *id)) {
            return Err(Stop::refused(format!(
                "{slot} was not touched: VM {id} has it; stop that VM and it comes home by itself: qm stop {id}"
            )));
        }
        match Watched::vfio_of_slots(self.kernel, &self.slots_of(record)).holders(self.kernel).first() {
            Some(holder) => Err(Stop::refused(format!(
                "{slot} was not touched: {holder}; end it ({}), then: gpu-handoff to-nvidia {slot}",
                holder.remedy()
            ))),
            None => Ok(()),
        }
    }

    /// Brings home all of a record but what is wedged.
    pub(super) fn bring_home(&self, locked: &Locked, record: &Record, time: TimeBox) -> Result<()> {
        let mut attempt = Attempt::new(Direction::Home, &record.owner, &record.slots(), time.begin);
        let done = self.bring_home_what_is_free(locked, &mut attempt, record, time);
        self.note(Some(locked), attempt, done.as_ref().err());
        done
    }

    fn bring_home_what_is_free(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &Record,
        time: TimeBox,
    ) -> Result<()> {
        let owner = &record.owner;
        let wedged = self.wedged_among(&record.slots());
        let Some(rest) = record.without(&wedged) else { return self.refuse_wedged(&record.slots()) };
        let title = rest.slots().join(" ");
        if is_at_home_on_vfio(&rest) {
            let by_hand = Owner::Manual(rest.slot().to_string());
            self.story.say(&if *owner != by_hand && self.store.has_record(&by_hand) {
                format!("{title} stays on {VFIO_PCI}, as asked by hand, until: gpu-handoff to-nvidia {}", rest.slot())
            } else {
                format!("{title} is at home on {VFIO_PCI}: nothing to do")
            });
            return self.end_record(locked, record, &wedged, time);
        }
        self.story.say(&format!("{title} {owner} -> host"));
        self.story.phase("wait", time.waited, "nobody has it open any more");
        // Before the record says so: a worker that is there puts right what is cut short from now on.
        self.kernel.worker();
        self.save(locked, &Record { progress: Progress::Returning, ..record.clone() });
        let gone = self.gone(&rest);
        let outcome = self.go_home(locked, &rest, time.end)?;
        attempt.is_about(&rest.slots());
        attempt.phase("wait", time.waited);
        attempt.add(&outcome);
        let took = attempt.took(self.kernel.now());
        if let Some(address) = gone.filter(|_| outcome.is_complete()) {
            // Its home stays on record, for when it comes back.
            Err(Stop::failed(format!(
                "{address} is gone: there is no such device any more; if the card is still there: echo 1 > \
                 /sys/bus/pci/rescan, then: gpu-handoff to-nvidia {}",
                rest.slot()
            )))
        } else if outcome.is_complete() {
            self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            self.end_record(locked, record, &wedged, time)
        } else if outcome.only_stuck() {
            self.end_record(locked, record, &wedged, time)
        } else {
            let slot = rest.slot();
            let message =
                format!("{title} is stranded: {}; mend that, then: gpu-handoff to-nvidia {slot}", outcome.problem());
            Err(if outcome.out_of_time { Stop::overrun(message) } else { Stop::failed(message) })
        }
    }

    /// Everything is home but `left_out` and what is wedged: the record ends, or goes on for those. A call in a slot
    /// that was left out may have come back since; then that slot comes home as well.
    pub(super) fn end_record(
        &self,
        locked: &Locked,
        record: &Record,
        left_out: &[String],
        time: TimeBox,
    ) -> Result<()> {
        let mut left = self.wedged_among(&record.slots());
        left.extend(left_out.iter().cloned());
        match record.only(&left) {
            None => {
                self.start_again(locked, &record.slots(), &record.stopped);
                Ok(locked.remove(&record.owner)?)
            }
            Some(rest) => {
                locked.save(&Record { progress: Progress::Returning, ..rest.clone() })?;
                self.refuse_wedged(&rest.slots())?;
                self.clear_ended_wedges(locked)?;
                self.bring_home(locked, &rest, time)
            }
        }
    }

    /// As far as possible: a step that fails does not keep the others back.
    pub(super) fn go_home(&self, locked: &Locked, record: &Record, end: Duration) -> Result<Outcome> {
        let plan = self.plan_home(record)?;
        self.run(locked, record, &plan, OnFailure::GoOn, end)
    }

    /// Nothing is left to bring home of a record but what was left out: time ran out before anything was touched, or
    /// after all was done.
    pub(super) fn is_back(&self, record: &Record, left_out: &[String]) -> bool {
        let Some(rest) = record.without(left_out) else { return true };
        let holds = |step: &Step| matches!(step.holds(self.kernel, READ_LIMIT), Ok(true));
        // Nobody can see whether there is an id; Proxmox writes one when QEMU starts, which it has not.
        let is_seen = |step: &Step| !matches!(step, Step::RemoveId { .. });
        self.plan_home(&rest).is_ok_and(|plan| plan.iter().all(|(_, step)| !is_seen(step) || holds(step)))
    }

    /// What [`Handoff::come_home`] would do for a person now.
    ///
    /// # Errors
    /// Why it would refuse.
    pub fn plan_come_home(&self, record: &Record) -> Result<Plan> {
        self.refuse_wedged(&record.slots())?;
        self.refuse_to_take(record)?;
        self.plan_home(record)
    }

    /// The way home from where things are now.
    ///
    /// # Errors
    /// When something else is stuck in the kernel with one of the slots.
    pub fn plan_home(&self, record: &Record) -> Result<Plan> {
        let drivers: Vec<&str> = record.functions.iter().filter_map(|f| f.driver.as_deref()).collect();
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let facts = Facts::read(self.kernel, self.slots_of(record), &drivers, &modules)
            .map_err(|error| unreadable(&record.slots(), &error))?;
        if let Some(gone) = check::gone(&facts) {
            self.story.warn(&format!("{gone}; going home as far as it gets"));
        }
        Ok(plan::to_home(&facts, record))
    }

    /// A function that the record names and the machine no longer has.
    fn gone(&self, record: &Record) -> Option<String> {
        let slots = self.slots_of(record);
        let is_there = |address: &str| slots.iter().flat_map(|slot| &slot.functions).any(|f| f.address == address);
        record.functions.iter().map(|home| home.address.clone()).find(|address| !is_there(address))
    }

    /// Whether a VM still has a function open. A VM's post-stop may run while its QEMU is still closing: unbinding
    /// would block until it has.
    pub(super) fn is_in_use(&self, record: &Record, end: Duration) -> Result<bool> {
        let slots = self.slots_of(record);
        let mut groups: Vec<u32> = slots
            .iter()
            .flat_map(|slot| &slot.functions)
            .filter(|function| function.is_on(VFIO_PCI))
            .filter_map(|function| function.iommu_group)
            .collect();
        groups.dedup();
        // A group that a dying QEMU still has is busy after its descriptors are gone; the newer device nodes have no
        // group to ask, so descriptors are looked at too.
        for group in groups {
            let left = end.saturating_sub(self.kernel.now());
            match self.kernel.vfio_group_busy(group, left) {
                Ok(false) => {}
                // Opening waits while a VM's memory is being unmapped.
                Ok(true) | Err(ActError::Stuck { .. }) => return Ok(true),
                Err(error) => return Err(Stop::failed(format!("/dev/vfio/{group}: {error}"))),
            }
        }
        Ok(!Watched::vfio_of_slots(self.kernel, &slots).holders(self.kernel).is_empty())
    }

    /// How long it took until nobody had it open.
    ///
    /// # Errors
    /// When somebody has it still at `end`.
    pub(super) fn wait_until_free(&self, record: &Record, end: Duration) -> Result<Duration> {
        let begin = self.kernel.now();
        while self.is_in_use(record, end)? {
            let waited = self.kernel.now().saturating_sub(begin);
            let asked = self.kernel.is_asked_to_end();
            if asked || self.kernel.now() >= end {
                let holders = Watched::vfio_of_slots(self.kernel, &self.slots_of(record)).holders(self.kernel);
                let who = holders.first().map_or_else(|| "a VM is still closing it".to_string(), ToString::to_string);
                let why = if asked { "asked to end".to_string() } else { format!("after {} s", waited.as_secs()) };
                let message = format!(
                    "{} was not touched: {who} ({why}); end it, then: gpu-handoff to-nvidia {}",
                    record.slots().join(" "),
                    record.slot()
                );
                return Err(if asked { Stop::failed(message) } else { Stop::overrun(message) });
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
        Ok(self.kernel.now().saturating_sub(begin))
    }

    /// Coming home matters more than being able to write that down.
    fn save(&self, locked: &Locked, record: &Record) {
        if let Err(error) = locked.save(record) {
            self.story.warn(&format!("{error:#}"));
        }
    }

    fn slots_of(&self, record: &Record) -> Vec<Slot> {
        record.slots().iter().filter_map(|address| Slot::read(self.kernel, address)).collect()
    }
}

fn is_at_home_on_vfio(record: &Record) -> bool {
    record.functions.iter().all(|function| function.driver.as_deref() == Some(VFIO_PCI))
}

/// A device that does not even let itself be read.
pub(super) fn unreadable(slots: &[&str], error: &ActError) -> Stop {
    Stop::overrun(format!(
        "{} was not touched: reading its attributes {error}; something else is stuck with it, only a reboot frees it",
        slots.join(" ")
    ))
}
