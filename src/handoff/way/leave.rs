//! Slots leave the host: to a VM that starts, or to vfio-pci by hand.

use super::{Handoff, again};
use crate::address::{Address, SlotId, list};
use crate::exit::{Code, Exit, Result};
use crate::gpu::holders::{Devices, Holder};
use crate::gpu::inventory::VFIO_PCI;
use crate::handoff::kept::record::{Owner, Progress, Record, Stopped};
use crate::handoff::kept::store::{Locked, Stack};
use crate::handoff::plan::check;
use crate::handoff::plan::facts::Facts;
use crate::handoff::plan::policy::{self, Halt};
use crate::handoff::plan::{self, Plan};
use crate::handoff::way::attempt::{Attempt, Direction};
use crate::handoff::way::departure::Departure;
use crate::handoff::way::free::TimeBox;
use crate::handoff::way::halt::{self, Way};
use crate::handoff::way::home::unreadable;
use crate::handoff::way::intent::{Intent, add_missing};
use crate::handoff::way::let_go;
use crate::handoff::way::run::{OnFailure, Outcome};
use crate::handoff::way::vm_resume::is_itself;
use crate::sys::Share;
use crate::trouble::Trouble;
use std::time::Duration;

/// Of the time box, what the way there may take; the rest is for going back.
const WAY_THERE: (u32, u32) = (2, 3);

/// Who must be stopped, and what was seen when that was decided.
struct Halts<'a> {
    halts: Vec<Halt>,
    devices: Devices,
    facts: &'a Facts,
}

impl Handoff<'_> {
    /// Gives slots to their new owner.
    ///
    /// # Errors
    /// Refused with nothing touched, or failed and rolled back, or wedged.
    pub fn leave(&self, departure: &Departure) -> Result<()> {
        let Departure { owner, slots, .. } = departure;
        let locked = self.lock(self.config.time.lock, slots, &again(owner));
        let locked = locked.inspect_err(|exit| self.note_refused(Direction::Vfio, owner, slots, exit))?;
        self.finish_others(&locked, owner);
        let mut attempt = Attempt::new(Direction::Vfio, owner, slots, self.kernel.now());
        let done = self.leave_locked(&locked, &mut attempt, departure);
        let done = done.map_err(|exit| self.hand_over(owner, exit));
        self.note(Some(&locked), attempt, done.as_ref().err());
        done
    }

    fn leave_locked(&self, locked: &Locked, attempt: &mut Attempt, departure: &Departure) -> Result<()> {
        let Departure { owner, slots, .. } = departure;
        let title = list(slots);
        let (mut stack, intent, asked_for) = self.intend_with_all_who_let_go(departure)?;
        let begin = attempt.begin;
        let found = intent.found(slots);
        let Intent { mut record, abandoned, mut facts, releases: _, halts, devices, mut plan } = intent;
        record.for_backup = departure.for_backup;
        let mut to_start = self.to_start_for(slots);
        // This very start may fail yet: who wanted it comes back for it, or sees that it runs.
        to_start.retain(|what| !is_itself(what, owner));
        add_missing(&mut record.stopped, to_start.iter().cloned());
        if plan.is_empty() && halts.is_empty() {
            (departure.on_ready)();
            self.put_on_record(locked, &with_its_owner(&record), departure, &to_start, &abandoned)?;
            self.story.say(&format!("{title}{} is already on {VFIO_PCI}: nothing to do", departure.by));
            return Ok(());
        }
        match asked_for {
            Some(took) => attempt.phase(let_go::PHASE, took),
            None => self.story.say(&title_of(departure)),
        }
        let mut begin_of_steps = begin + asked_for.unwrap_or_default();
        let checked = self.kernel.now().saturating_sub(begin_of_steps);
        self.story.phase("check", checked, &found);
        self.tell_of_firmware(&facts);
        // Before the record says so: a worker that is there puts right what is cut short from now on.
        self.kernel.worker();
        self.put_on_record(locked, &record, departure, &to_start, &abandoned)?;
        self.keep_dri(locked);
        attempt.is_about(&record.slots());
        attempt.phase("check", checked);
        if !halts.is_empty() {
            // What is stopped may take its time, and others have cards of their own.
            drop(stack);
            let halts = Halts { halts, devices, facts: &facts };
            match self.halt(locked, attempt, &mut record, halts, departure, &mut begin_of_steps) {
                Ok(now) => (stack, facts, plan) = now,
                Err(problem) => {
                    let time = TimeBox::of(self, begin, begin_of_steps + self.config.time.handoff);
                    return Err(self.go_back(locked, attempt, &mut record, &Outcome::prevented(problem), time, None));
                }
            }
        }
        let budget = self.config.time.handoff * WAY_THERE.0 / WAY_THERE.1;
        let outcome = self.run(locked, &stack, &record, &plan, OnFailure::Stop, begin_of_steps + budget);
        attempt.add(&outcome);
        if !outcome.is_complete() {
            let time = TimeBox::of(self, begin, begin_of_steps + self.config.time.handoff);
            return Err(self.go_back(locked, attempt, &mut record, &outcome, time, Some(stack)));
        }
        (departure.on_ready)();
        locked.save(&with_its_owner(&record))?;
        drop(stack);
        self.tell_dri();
        self.start_what_serves_others(&record, &facts);
        let took = attempt.took(self.kernel.now());
        self.story.say(&format!("{title} is on {VFIO_PCI}{} after {} ms", for_whom(owner), took.as_millis()));
        Ok(())
    }

    /// What is to be done, under the stack's lock, after everybody was asked to let go who may be asked, and how long that
    /// took; none when there was nobody. The handoff's own time does not run meanwhile.
    fn intend_with_all_who_let_go(&self, departure: &Departure) -> Result<(Stack, Intent, Option<Duration>)> {
        let mut took = None;
        loop {
            let first = self.share_to_leave(departure)?;
            let again = again(&departure.owner);
            let (stack, intent) = self.stack_for(first, &departure.slots, &again, self.config.time.lock, &|| {
                let intent = self.intend(departure)?;
                let share = plan::share(&intent.plan);
                Ok((intent, share))
            })?;
            if intent.releases.is_empty() {
                return Ok((stack, intent, took));
            }
            drop(stack);
            if took.is_none() {
                self.story.say(&title_of(departure));
            }
            let begin = self.kernel.now();
            self.ask_to_let_go(&intent.releases, &intent.devices);
            departure.asked.borrow_mut().extend(intent.releases.into_iter().map(|release| release.who));
            *took.get_or_insert_default() += self.kernel.now().saturating_sub(begin);
        }
    }

    /// From here on it is this record's: what was to be started again for these slots, and what earlier records named.
    fn put_on_record(
        &self,
        locked: &Locked,
        record: &Record,
        departure: &Departure,
        to_start: &[Stopped],
        abandoned: &[Record],
    ) -> Result<()> {
        locked.save(record)?;
        locked.take_over(to_start)?;
        forget(locked, abandoned, &departure.slots)
    }

    /// Stops who must go, without the stack's lock, and plans once more. That has a time of its own, which the steps begin
    /// after.
    fn halt(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &mut Record,
        Halts { halts, devices, facts }: Halts,
        departure: &Departure,
        begin_of_steps: &mut Duration,
    ) -> std::result::Result<(Stack, Facts, Plan), String> {
        let decide = |holders: &[Holder]| self.decide(&departure.owner, facts, holders);
        let way: Way = self.make_way(locked, record, halts, &devices, &decide);
        if let Some(took) = way.took {
            attempt.phase(halt::PHASE, took);
            *begin_of_steps += took;
        }
        let waits_since = self.kernel.now();
        let now = match way.problem {
            Some(problem) => return Err(problem),
            None => self.plan_once_more(record, departure).map_err(|exit| exit.to_string())?,
        };
        *begin_of_steps += self.kernel.now().saturating_sub(waits_since);
        Ok(now)
    }

    /// How the stack will be needed, as far as can be seen without its lock: then it is taken like that at once.
    fn share_to_leave(&self, departure: &Departure) -> Result<Share> {
        self.refuse_wedged(&departure.slots)?;
        let slots = self.read_slots(&departure.slots)?;
        let facts = Facts::read(self.kernel, slots, &[], &[]).map_err(|error| unreadable(&departure.slots, &error))?;
        let facts = facts.avoiding(&self.store.wedged_slots());
        let plan = plan::to_vfio(&facts, &Record::new(departure.owner.clone()));
        // Whatever is wrong with it: the plan that counts says so.
        Ok(plan.map_or(Share::Together, |plan| plan::share(&plan)))
    }

    /// Others may have moved their cards while something was being stopped.
    fn plan_once_more(&self, record: &Record, departure: &Departure) -> Result<(Stack, Facts, Plan)> {
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let plan_now = || {
            let slots = self.read_slots(&departure.slots)?;
            let facts =
                Facts::read(self.kernel, slots, &[], &modules).map_err(|error| unreadable(&departure.slots, &error))?;
            let facts = facts.avoiding(&self.store.wedged_slots());
            check::check(&facts, &departure.listed).map_err(Exit::failed)?;
            let plan = plan::to_vfio(&facts, record).map_err(Exit::failed)?;
            let share = plan::share(&plan);
            Ok(((facts, plan), share))
        };
        let (_, first) = plan_now()?;
        let (stack, (facts, plan)) =
            self.stack_for(first, &departure.slots, &again(&record.owner), self.config.time.lock, &plan_now)?;
        Ok((stack, facts, plan))
    }

    /// NVIDIA's services serve the cards that stay as well.
    fn start_what_serves_others(&self, record: &Record, facts: &Facts) {
        if facts.gpu_drivers.get("nvidia").is_some_and(|driver| !driver.elsewhere.is_empty()) {
            let is_service = |what: &&Stopped| matches!(what, Stopped::Unit(unit) if policy::is_nvidia_service(unit));
            let services: Vec<Stopped> = record.stopped.iter().filter(is_service).cloned().collect();
            // The record has them as well, for when its own card is home.
            if let Err(exit) = self.start_again(&record.slots(), &services) {
                self.story.warn(&exit.to_string());
            }
        }
    }

    /// The console on a framebuffer of the firmware's goes for good, and who loses it should not have to find out why.
    fn tell_of_firmware(&self, facts: &Facts) {
        let goes = |address: &Address| facts.functions().any(|f| f.address == *address && !f.is_on(VFIO_PCI));
        if let Some(address) = facts.console.firmware.filter(goes) {
            self.story.say(&format!(
                "  note: {address} has the screen that the firmware set up; vfio-pci takes it, and its console cannot \
                 come back before the next boot"
            ));
        }
    }

    /// The way there failed: the GPU goes back to where it was, all of it but what is wedged. Whoever was frozen goes on
    /// at once.
    fn go_back(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &mut Record,
        failed: &Outcome,
        time: TimeBox,
        stack: Option<Stack>,
    ) -> Exit {
        self.thaw(locked, record);
        let slots = record.slots();
        let wedged = self.wedged_among(&slots);
        let exit = match record.without(&wedged) {
            None => {
                drop(stack);
                self.leave_wedged_to_itself(locked, record);
                self.refuse_wedged(&slots).err()
            }
            Some(rest) => {
                self.story.say(&format!("{} goes back", list(rest.slots())));
                match self.go_home(locked, &rest, time, stack) {
                    Ok(back) => {
                        attempt.add_back(&back);
                        self.after_going_back(locked, record, (failed, &back), &wedged, time).err()
                    }
                    Err(exit) => Some(exit),
                }
            }
        };
        exit.unwrap_or_else(|| {
            let code = if failed.out_of_time { Code::Overrun } else { Code::Failed };
            let what = format!("{} is back where it was: {}", list(&slots), failed.problem());
            Exit::new(code, Trouble::new(what, format!("then {}", again(&record.owner))))
        })
    }

    /// Fine when everything is back.
    fn after_going_back(
        &self,
        locked: &Locked,
        record: &Record,
        (failed, back): (&Outcome, &Outcome),
        left_out: &[SlotId],
        time: TimeBox,
    ) -> Result<()> {
        if back.is_complete() || back.only_stuck() || (back.failures.is_empty() && self.is_back(record, left_out)) {
            return self.end_record(locked, record, left_out, time);
        }
        let title = list(record.slots());
        let trouble = Trouble::new(
            format!("{title} is stranded: {}, and on the way back: {}", failed.problem(), back.problem()),
            format!("fix that, then: gpu-handoff to-nvidia {}", record.slot()),
        );
        Err(if failed.out_of_time { Exit::overrun(trouble) } else { Exit::failed(trouble) })
    }
}

/// The GPU is with its owner.
fn with_its_owner(record: &Record) -> Record {
    Record { progress: Progress::Away, frozen: Vec::new(), ..record.clone() }
}

fn title_of(Departure { owner, slots, by, .. }: &Departure) -> String {
    format!("{}{by} host -> {owner}", list(slots))
}

fn for_whom(owner: &Owner) -> String {
    owner.vmid().map_or_else(String::new, |id| format!(", ready for VM {id},"))
}

/// Other slots of the same record still have to come home.
fn forget(locked: &Locked, abandoned: &[Record], taken: &[SlotId]) -> Result<()> {
    for record in abandoned {
        match record.without(taken) {
            Some(mut rest) => {
                // Who took the card owes that, and nobody else: the VM needs all that it had.
                rest.stopped.retain(|what| !matches!(what, Stopped::Vm(_)));
                locked.save(&rest)?;
            }
            None => locked.remove(&record.owner)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_card_has_nobody_frozen_for_it() {
        let record =
            Record { frozen: vec![101], stopped: vec![Stopped::Container(102)], ..Record::new(Owner::Vm(111)) };
        let with_its_owner = with_its_owner(&record);
        assert_eq!((with_its_owner.progress, with_its_owner.frozen.len()), (Progress::Away, 0));
        assert_eq!(with_its_owner.stopped, record.stopped);
    }

    #[test]
    fn for_whom_it_is_ready() {
        assert_eq!(for_whom(&Owner::Vm(111)), ", ready for VM 111,");
        assert_eq!(for_whom(&Owner::Manual("0000:01:00".parse().unwrap())), "");
    }
}
