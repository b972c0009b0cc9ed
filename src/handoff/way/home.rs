//! Slots come home: after their VM stopped, or by hand.

use super::Handoff;
use crate::address::{Address, SlotId, list};
use crate::exit::{Exit, Result};
use crate::gpu::containers;
use crate::gpu::holders::Devices;
use crate::gpu::inventory::{self, READ_LIMIT, VFIO_PCI};
use crate::handoff::kept::record::{Owner, Progress, Record, Stopped};
use crate::handoff::kept::store::{Locked, Stack};
use crate::handoff::kept::wedge::{Call, Wedge};
use crate::handoff::plan::check;
use crate::handoff::plan::facts::Facts;
use crate::handoff::plan::policy;
use crate::handoff::plan::step::Step;
use crate::handoff::plan::{self, Plan};
use crate::handoff::way::attempt::{Attempt, Direction};
use crate::handoff::way::free::TimeBox;
use crate::handoff::way::run::{OnFailure, Outcome};
use crate::proxmox::running::is_alive;
use crate::sys::{ActError, Share};
use crate::trouble::Trouble;
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
        let mut time = TimeBox::of(self, begin, begin + self.config.time.handoff);
        let mut attempt = Attempt::new(Direction::Home, owner, &[], begin);
        let (locked, record) = match self.turn(owner, asker, stays, &mut attempt, &mut time) {
            Ok(Some(turn)) => turn,
            Ok(None) => return Ok(()),
            Err(exit) => {
                let exit = self.hand_over(owner, exit);
                self.note(None, attempt, Some(&exit));
                return Err(exit);
            }
        };
        let done = self.bring_home(&locked, &record, time);
        self.finish_others(&locked, owner);
        done
    }

    /// The locks and what there is to bring home, once nobody uses it any more; none without a record.
    fn turn(
        &self,
        owner: &Owner,
        asker: Asker,
        stays: &dyn Fn() -> bool,
        attempt: &mut Attempt,
        time: &mut TimeBox,
    ) -> Result<Option<(Locked<'_>, Record)>> {
        let Some(record) = self.store.record(owner)? else { return Ok(None) };
        attempt.is_about(&record.slots());
        let again = again_home(&record);
        let locked = self.lock(self.config.time.lock, &record.slots(), &again)?;
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
        if in_use {
            // On record before waiting: whoever comes after this run, if it is killed or gives up, goes on from here.
            // The other cards' handoffs need not wait for this VM, and this card's have to.
            self.save(&locked, &Record { progress: Progress::Returning, ..record.clone() });
            time.waited += self.wait_until_free(&record, time.end)?;
        }
        Ok(Some((locked, record)))
    }

    /// What a person asks for is refused rather than waited for. By hand and with a VM are two records of one slot.
    fn refuse_to_take(&self, record: &Record) -> Result<()> {
        let slot = record.slot();
        let first = record.slots().into_iter().next();
        let has_it = |other: &Record| first.is_some_and(|slot| other.slots().contains(&slot));
        let records = self.store.each_record().into_iter().flatten();
        let mut owners = records.filter(has_it).filter_map(|other| other.owner.vmid());
        if let Some(id) = owners.find(|id| is_alive(self.kernel, *id)) {
            return Err(Exit::refused(Trouble::new(
                format!("{slot} was not touched: VM {id} has it"),
                format!("stop that VM and it comes home by itself: qm shutdown {id}"),
            )));
        }
        let devices = Devices::vfio_of_slots(self.kernel, &self.slots_of(record));
        let holders = devices.holders(self.kernel, self.config.time.handoff / 3);
        let holders = holders.map_err(|problem| Exit::refused(format!("{slot} was not touched: {problem}")))?;
        match holders.first() {
            Some(holder) => Err(Exit::refused(Trouble::new(
                format!("{slot} was not touched: {holder}"),
                format!("end it ({}), then: gpu-handoff to-nvidia {slot}", holder.remedy()),
            ))),
            None => Ok(()),
        }
    }

    /// Brings home all of a record but what is wedged.
    pub(super) fn bring_home(&self, locked: &Locked, record: &Record, time: TimeBox) -> Result<()> {
        let mut attempt = Attempt::new(Direction::Home, &record.owner, &record.slots(), time.begin);
        let mut record = record.clone();
        self.thaw(locked, &mut record);
        let done = self.bring_home_what_is_free(locked, &mut attempt, &mut record, time);
        let done = done.map_err(|exit| self.hand_over(&record.owner, exit));
        self.note(Some(locked), attempt, done.as_ref().err());
        done
    }

    fn bring_home_what_is_free(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &mut Record,
        time: TimeBox,
    ) -> Result<()> {
        let wedged = self.wedged_among(&record.slots());
        let Some(rest) = record.without(&wedged) else {
            self.leave_wedged_to_itself(locked, record);
            return self.refuse_wedged(&record.slots());
        };
        let owner = &record.owner;
        let title = list(rest.slots());
        if is_at_home_on_vfio(&rest) {
            let slots = rest.slots();
            let by_hand = slots.first().map(|slot| Owner::Manual(*slot)).filter(|by_hand| owner != by_hand);
            let for_backup = by_hand.as_ref().and_then(|by_hand| self.store.record(by_hand).ok()?);
            self.story.say(&match by_hand {
                Some(_) if for_backup.is_some_and(|record| record.for_backup) => {
                    format!("{title} stays on {VFIO_PCI} until the backup job ends")
                }
                Some(by_hand) if self.store.has_record(&by_hand) => {
                    format!(
                        "{title} stays on {VFIO_PCI}, as asked by hand, until: gpu-handoff to-nvidia {}",
                        rest.slot()
                    )
                }
                _ => format!("{title} is at home on {VFIO_PCI}: nothing to do"),
            });
            return self.end_record(locked, record, &wedged, time);
        }
        // Before the record says so: a worker that is there puts right what is cut short from now on.
        self.kernel.worker();
        self.save(locked, &Record { progress: Progress::Returning, ..record.clone() });
        let waits_since = self.kernel.now();
        let (stack, plan) = self.stack_to_go_home(&rest, time, None)?;
        let end = time.end + self.kernel.now().saturating_sub(waits_since);
        self.story.say(&format!("{title} {owner} -> host"));
        self.story.phase("wait", time.waited, "nobody has it open any more");
        let gone = self.gone(&rest);
        let outcome = self.run_home(locked, &stack, &rest, &plan, end);
        drop(stack);
        attempt.is_about(&rest.slots());
        attempt.phase("wait", time.waited);
        attempt.add(&outcome);
        let took = attempt.took(self.kernel.now());
        if outcome.is_complete() {
            // The kernel forgets with a device what was set on it: when it comes back it goes where all go at boot.
            for address in &gone {
                self.story.warn(&format!(
                    "{address} is gone: there is no such device any more, and nothing to bring home; if the card is \
                     still there: echo 1 > /sys/bus/pci/rescan"
                ));
            }
            if gone.len() < rest.functions.len() {
                self.story.say(&format!("{title} is home after {} ms", took.as_millis()));
            }
            self.end_record(locked, record, &wedged, time)
        } else if outcome.only_stuck() {
            self.end_record(locked, record, &wedged, time)
        } else {
            let slot = rest.slot();
            let what = format!("{title} is stranded: {}", outcome.problem());
            let trouble = Trouble::new(what, format!("fix that, then: gpu-handoff to-nvidia {slot}"));
            Err(if outcome.out_of_time { Exit::overrun(trouble) } else { Exit::failed(trouble) })
        }
    }

    /// Everything is home but `left_out` and what is wedged: the record ends, or goes on for those. A call in a slot
    /// that was left out may have come back since; then that slot comes home as well.
    pub(super) fn end_record(
        &self,
        locked: &Locked,
        record: &Record,
        left_out: &[SlotId],
        time: TimeBox,
    ) -> Result<()> {
        let mut left = self.wedged_among(&record.slots());
        left.extend(left_out);
        let mut record = record.clone();
        self.thaw(locked, &mut record);
        match record.only(&left) {
            None => {
                if let Some(first) = record.frozen.first() {
                    let who: Vec<String> = record.frozen.iter().map(ToString::to_string).collect();
                    let title = list(record.slots());
                    return Err(Exit::failed(Trouble::new(
                        format!("{title} is home, but container {} is still frozen", who.join(" ")),
                        format!("thaw it: echo 0 > {}", containers::freezer(*first)),
                    )));
                }
                // First where it is to be from now on.
                self.start_again(&record.slots(), &record.stopped)?;
                record.stopped.clear();
                self.bring_others_home(locked, &record, time)?;
                Ok(locked.remove(&record.owner)?)
            }
            Some(mut rest) => {
                rest.progress = Progress::Returning;
                self.leave_wedged_to_itself(locked, &mut rest);
                locked.save(&rest)?;
                self.refuse_wedged(&rest.slots())?;
                self.clear_ended_wedges(locked)?;
                self.bring_home(locked, &rest, time)
            }
        }
    }

    /// All of a record is wedged. Whoever was stopped for it stays so until the call comes back, for that would have to
    /// wait for whoever opens the card meanwhile. But where nobody has it open any more the call waits for ever, and nobody
    /// else should: only NVIDIA's services and VMs, which would look at the card that hangs.
    pub(super) fn leave_wedged_to_itself(&self, locked: &Locked, record: &mut Record) {
        if record.stopped.is_empty() {
            return;
        }
        let is_hopeless = |slot: &SlotId| {
            let wedge = self.store.wedge(*slot).ok().flatten();
            wedge.is_some_and(|wedge| self.forgets_attached(&wedge)) && self.holder_of(*slot).is_none()
        };
        if !record.slots().iter().any(is_hopeless) {
            return;
        }
        let waits = |what: &Stopped| match what {
            Stopped::Unit(unit) => policy::is_nvidia_service(unit),
            Stopped::Vm(_) => true,
            Stopped::Container(_) => false,
        };
        let (services, others): (Vec<Stopped>, Vec<Stopped>) = record.stopped.iter().cloned().partition(waits);
        if others.is_empty() {
            return;
        }
        match self.start_again(&record.slots(), &others) {
            Ok(()) => {
                record.stopped = services;
                self.save(locked, record);
            }
            Err(exit) => self.story.warn(&exit.to_string()),
        }
    }

    /// Lets go on whoever is frozen: at once, whatever becomes of the handoff, and not within its time.
    pub(super) fn thaw(&self, locked: &Locked, record: &mut Record) {
        let had = record.frozen.len();
        let wedges: Vec<Wedge> =
            record.slots().iter().filter_map(|slot| self.store.wedge(*slot).ok().flatten()).collect();
        // Freezing it may have hung as well: then it freezes when that call comes back. Of a call that an earlier version
        // kept without saying what it is that is not thought: hardly ever does one hang in a write to a cgroup, and a
        // container that is thawed would be owed for as long as the other call takes.
        let freezes_yet = |ctid: u32| {
            let freeze = Some(Call::Freeze(ctid));
            wedges.iter().any(|wedge| wedge.call == freeze && wedge.is_still_stuck(self.kernel))
        };
        record.frozen.retain(|ctid| !self.is_thawed(*ctid) || freezes_yet(*ctid));
        if record.frozen.len() < had {
            self.save(locked, record);
        }
    }

    fn is_thawed(&self, ctid: u32) -> bool {
        let step = Step::Thaw { ctid };
        let limit = step.share(self.config.time.handoff);
        let holds = || step.holds(self.kernel, limit).unwrap_or(false);
        let act = || step.actions(self.kernel).iter().try_for_each(|action| self.kernel.act(action, limit));
        if holds() {
            return true;
        }
        let done = act();
        if let Err(error) = &done {
            self.story.warn(&format!("{step}: {error}"));
        }
        done.is_ok() && holds()
    }

    /// As far as possible: a step that fails does not keep the others back. `stack` is had already, if it will do.
    pub(super) fn go_home(
        &self,
        locked: &Locked,
        record: &Record,
        time: TimeBox,
        stack: Option<Stack>,
    ) -> Result<Outcome> {
        let waits_since = self.kernel.now();
        let (stack, plan) = self.stack_to_go_home(record, time, stack)?;
        let end = time.end + self.kernel.now().saturating_sub(waits_since);
        Ok(self.run_home(locked, &stack, record, &plan, end))
    }

    pub(super) fn run_home(
        &self,
        locked: &Locked,
        stack: &Stack,
        record: &Record,
        plan: &Plan,
        end: Duration,
    ) -> Outcome {
        let mut outcome = self.run(locked, stack, record, plan, OnFailure::GoOn, end);
        if outcome.is_complete()
            && let Some(restored) = self.restore_dri(locked, stack, record, end)
        {
            let phases = std::mem::take(&mut outcome.phases);
            outcome = restored;
            outcome.phases.splice(0..0, phases);
        }
        if outcome.is_complete() {
            outcome.prevented = self.fallen(record).map(|address| format!("{address} does not answer"));
        }
        outcome
    }

    pub(super) fn stack_to_go_home(
        &self,
        record: &Record,
        time: TimeBox,
        stack: Option<Stack>,
    ) -> Result<(Stack, Plan)> {
        let plan_now = || {
            let plan = self.plan_home(record)?;
            let share = match plan::share(&plan) {
                Share::Alone => Share::Alone,
                Share::Together => self.share_to_restore(),
            };
            Ok((plan, share))
        };
        let (plan, share) = plan_now()?;
        if let Some(stack) = stack.filter(|stack| stack.is_enough_for(share)) {
            return Ok((stack, plan));
        }
        self.stack_for(share, &record.slots(), &again_home(record), time.patience, &plan_now)
    }

    /// Nothing is left to bring home of a record but what was left out: time ran out before anything was touched, or
    /// after all was done.
    pub(super) fn is_back(&self, record: &Record, left_out: &[SlotId]) -> bool {
        let Some(rest) = record.without(left_out) else { return true };
        let holds = |step: &Step| matches!(step.holds(self.kernel, READ_LIMIT), Ok(true));
        // Nobody can see whether there is an id; Proxmox writes one when QEMU starts, which it has not.
        let is_seen = |step: &Step| !matches!(step, Step::RemoveId { .. });
        self.fallen(&rest).is_none()
            && self.plan_home(&rest).is_ok_and(|plan| plan.iter().all(|(_, step)| !is_seen(step) || holds(step)))
    }

    /// One that is there, and has fallen off the bus: it was left where it was.
    fn fallen(&self, record: &Record) -> Option<Address> {
        let has_fallen = |address: &Address| matches!(inventory::is_gone(self.kernel, *address), Ok(true));
        record.functions.iter().map(|home| home.address).find(has_fallen)
    }

    /// What [`Handoff::come_home`] would do for a person now.
    ///
    /// # Errors
    /// Why it would refuse.
    pub fn plan_come_home(&self, record: &Record) -> Result<Plan> {
        self.refuse_wedged(&record.slots())?;
        self.refuse_to_take(record)?;
        let mut plan = self.plan_home(record)?;
        if let Some(others) = record.of_others() {
            plan.extend(self.plan_home(&others)?);
        }
        Ok(plan)
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

    /// Functions that the record names and the machine no longer has.
    fn gone(&self, record: &Record) -> Vec<Address> {
        let slots = self.slots_of(record);
        let is_there = |address: &Address| slots.iter().flat_map(|slot| &slot.functions).any(|f| f.address == *address);
        record.functions.iter().map(|home| home.address).filter(|address| !is_there(address)).collect()
    }

    /// Coming home matters more than being able to write that down.
    pub(super) fn save(&self, locked: &Locked, record: &Record) {
        if let Err(error) = locked.save(record) {
            self.story.warn(&format!("{error:#}"));
        }
    }
}

fn again_home(record: &Record) -> String {
    format!("try again: gpu-handoff to-nvidia {}", record.slot())
}

pub(super) fn is_at_home_on_vfio(record: &Record) -> bool {
    record.functions.iter().all(|function| function.driver.as_deref() == Some(VFIO_PCI))
}

/// A device that does not even let itself be read.
pub(super) fn unreadable(slots: &[SlotId], error: &ActError) -> Exit {
    Exit::overrun(Trouble::new(
        format!("{} was not touched: reading its attributes {error}", list(slots)),
        "something else is stuck with it, only a reboot frees it",
    ))
}
