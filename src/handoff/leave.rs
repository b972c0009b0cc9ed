//! Slots leave the host: to a VM that starts, or to vfio-pci by hand.

use super::attempt::{Attempt, Direction};
use super::facts::Facts;
use super::halt;
use super::home::TimeBox;
use super::intent::{Intent, add_missing};
use super::policy;
use super::record::{Owner, Progress, Record, Stopped};
use super::run::{OnFailure, Outcome};
use super::store::Locked;
use super::{Handoff, again};
use crate::gpu::holders::Holder;
use crate::gpu::inventory::VFIO_PCI;
use crate::stop::{Code, Result, Stop};
use std::time::Duration;

/// Of the time box, what the way there may take; the rest is for going back.
const WAY_THERE: (u32, u32) = (2, 3);

impl Handoff<'_> {
    /// Gives slots to `owner`. `listed` tells whether the owner's own configuration names a function.
    ///
    /// # Errors
    /// Refused with nothing touched, or failed and rolled back, or wedged.
    pub fn leave(&self, owner: &Owner, slots: &[String], listed: &dyn Fn(&str) -> bool) -> Result<()> {
        self.leave_watched(owner, slots, listed, &|| {})
    }

    /// As [`Handoff::leave`]. `watch` is called when nothing can go wrong any more but the record does not say so yet:
    /// whatever is killed before, what is half-way is put right; whatever is killed later, somebody watches.
    ///
    /// # Errors
    /// As [`Handoff::leave`].
    pub fn leave_watched(
        &self,
        owner: &Owner,
        slots: &[String],
        listed: &dyn Fn(&str) -> bool,
        watch: &dyn Fn(),
    ) -> Result<()> {
        let names: Vec<&str> = slots.iter().map(String::as_str).collect();
        let locked = self.lock(self.config.lock, &names, &again(owner));
        let locked = locked.inspect_err(|stop| self.note_refused(Direction::Vfio, owner, &names, stop))?;
        self.finish_others(&locked, owner);
        let mut attempt = Attempt::new(Direction::Vfio, owner, &names, self.kernel.now());
        let done = self.leave_locked(&locked, &mut attempt, owner, slots, listed, watch);
        self.note(Some(&locked), attempt, done.as_ref().err());
        done
    }

    fn leave_locked(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        owner: &Owner,
        slots: &[String],
        listed: &dyn Fn(&str) -> bool,
        watch: &dyn Fn(),
    ) -> Result<()> {
        let begin = attempt.begin;
        let names: Vec<&str> = slots.iter().map(String::as_str).collect();
        let intent = self.intend(owner, slots, listed)?;
        let found = intent.found();
        let Intent { mut record, abandoned, facts, halts, watched, plan } = intent;
        let title = slots.join(" ");
        add_missing(&mut record.stopped, self.take_to_start(locked, &names)?);
        if plan.is_empty() {
            watch();
            locked.save(&settled(&record))?;
            forget(locked, &abandoned, slots)?;
            self.story.say(&format!("{title} is already on {VFIO_PCI}: nothing to do"));
            return Ok(());
        }
        self.story.say(&format!("{title} host -> {owner}"));
        let checked = self.kernel.now().saturating_sub(begin);
        self.story.phase("check", checked, &found);
        self.tell_of_firmware(&facts);
        // Before the record says so: a worker that is there puts right what is cut short from now on.
        self.kernel.worker();
        locked.save(&record)?;
        forget(locked, &abandoned, slots)?;
        attempt.is_about(&record.slots());
        attempt.phase("check", checked);
        let decide = |holders: &[Holder]| self.decide(owner, &facts, holders);
        let way = self.make_way(locked, &mut record, halts, &watched, &decide);
        if let Some(took) = way.took {
            attempt.phase(halt::PHASE, took);
        }
        // That has a time of its own.
        let begin_of_steps = begin + way.took.unwrap_or_default();
        let budget = self.config.handoff * WAY_THERE.0 / WAY_THERE.1;
        let outcome = match way.problem {
            None => self.run(locked, &record, &plan, OnFailure::Stop, begin_of_steps + budget)?,
            Some(problem) => Outcome::prevented(problem),
        };
        attempt.add(&outcome);
        if !outcome.is_complete() {
            let end = begin_of_steps + self.config.handoff;
            let time = TimeBox { begin, end, waited: Duration::ZERO };
            return Err(self.go_back(locked, attempt, &record, &outcome, time));
        }
        watch();
        locked.save(&settled(&record))?;
        self.start_what_serves_others(locked, &record, &facts);
        let took = attempt.took(self.kernel.now());
        self.story.say(&format!("{title} is on {VFIO_PCI}{} after {} ms", for_whom(owner), took.as_millis()));
        Ok(())
    }

    /// NVIDIA's services serve the cards that stay as well.
    fn start_what_serves_others(&self, locked: &Locked, record: &Record, facts: &Facts) {
        if facts.gpu_drivers.get("nvidia").is_some_and(|driver| !driver.elsewhere.is_empty()) {
            let is_service = |what: &&Stopped| matches!(what, Stopped::Unit(unit) if policy::is_nvidia_service(unit));
            let services: Vec<Stopped> = record.stopped.iter().filter(is_service).cloned().collect();
            self.start_again(locked, &record.slots(), &services);
        }
    }

    /// The console on a framebuffer of the firmware's goes for good, and who loses it should not have to find out why.
    fn tell_of_firmware(&self, facts: &Facts) {
        let goes = |address: &&String| facts.functions().any(|f| f.address == **address && !f.is_on(VFIO_PCI));
        if let Some(address) = facts.console.firmware.as_ref().filter(goes) {
            self.story.say(&format!(
                "  note: {address} has the screen that the firmware set up; vfio-pci takes it, and its console cannot \
                 come back before the next boot"
            ));
        }
    }

    /// The way there failed: the GPU goes back to where it was, all of it but what is wedged.
    fn go_back(
        &self,
        locked: &Locked,
        attempt: &mut Attempt,
        record: &Record,
        failed: &Outcome,
        time: TimeBox,
    ) -> Stop {
        let slots = record.slots();
        let wedged = self.wedged_among(&slots);
        let stop = match record.without(&wedged) {
            None => self.refuse_wedged(&slots).err(),
            Some(rest) => {
                self.story.warn(&format!("{}; going back", failed.problem()));
                match self.go_home(locked, &rest, time.end) {
                    Ok(back) => {
                        attempt.add(&back);
                        self.after_going_back(locked, record, (failed, &back), &wedged, time).err()
                    }
                    Err(stop) => Some(stop),
                }
            }
        };
        stop.unwrap_or_else(|| {
            let code = if failed.out_of_time { Code::Overrun } else { Code::Failed };
            let title = slots.join(" ");
            Stop {
                code,
                message: format!("{title} is back where it was: {}; then {}", failed.problem(), again(&record.owner)),
            }
        })
    }

    /// Fine when everything is back.
    fn after_going_back(
        &self,
        locked: &Locked,
        record: &Record,
        (failed, back): (&Outcome, &Outcome),
        left_out: &[String],
        time: TimeBox,
    ) -> Result<()> {
        if back.is_complete() || back.only_stuck() || (back.failures.is_empty() && self.is_back(record, left_out)) {
            return self.end_record(locked, record, left_out, time);
        }
        let message = format!(
            "{} is stranded: {}, and on the way back: {}; mend that, then: gpu-handoff to-nvidia {}",
            record.slots().join(" "),
            failed.problem(),
            back.problem(),
            record.slot()
        );
        Err(if failed.out_of_time { Stop::overrun(message) } else { Stop::failed(message) })
    }
}

/// The GPU is with its owner.
fn settled(record: &Record) -> Record {
    Record { progress: Progress::Away, frozen: Vec::new(), ..record.clone() }
}

fn for_whom(owner: &Owner) -> String {
    owner.vmid().map_or_else(String::new, |id| format!(", ready for VM {id},"))
}

/// Other slots of the same record still have to come home.
fn forget(locked: &Locked, abandoned: &[Record], taken: &[String]) -> Result<()> {
    for record in abandoned {
        match record.without(taken) {
            Some(rest) => locked.save(&rest)?,
            None => locked.remove(&record.owner)?,
        }
    }
    Ok(())
}
