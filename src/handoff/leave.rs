//! Slots leave the host: to a VM that starts, or to vfio-pci by hand.

use super::facts::Facts;
use super::home::TimeBox;
use super::home::unreadable;
use super::plan::{self, Plan};
use super::record::{HomeOf, Owner, Progress, Record};
use super::run::{OnFailure, Outcome};
use super::store::Locked;
use super::{Direction, Handoff, Last, again, check, is_with};
use crate::config::Home;
use crate::gpu::holders::{Place, Reach, Watched};
use crate::gpu::inventory::{self, Function, Slot, VFIO_PCI};
use crate::gpu::power::Power;
use crate::stop::{Code, Result, Stop};
use std::time::Duration;

/// More holders than this are counted, not named.
const NAMED_HOLDERS: usize = 5;

/// Of the time box, what the way there may take; the rest is for going back.
const WAY_THERE: (u32, u32) = (2, 3);

/// All that is known before anything is touched.
struct Intent {
    /// As it is written before the first step.
    record: Record,
    /// Earlier records, of owners that need these slots no more.
    abandoned: Vec<Record>,
    facts: Facts,
    plan: Plan,
}

impl Handoff<'_> {
    /// Gives slots to `owner`. `listed` tells whether the owner's own configuration names a function.
    ///
    /// # Errors
    /// Refused with nothing touched, or failed and rolled back, or wedged.
    pub fn leave(&self, owner: &Owner, slots: &[String], listed: &dyn Fn(&str) -> bool) -> Result<()> {
        let names: Vec<&str> = slots.iter().map(String::as_str).collect();
        let locked = self.lock(self.config.lock, &names, &again(owner))?;
        self.finish_others(&locked, owner);
        let begin = self.kernel.now();
        let Intent { record, abandoned, facts, plan } = self.intend(owner, slots, listed)?;
        let title = slots.join(" ");
        let settled = Record { progress: Progress::Away, ..record.clone() };
        if plan.is_empty() {
            locked.save(&settled)?;
            forget(&locked, &abandoned, slots)?;
            self.story.say(&format!("{title} is already on {VFIO_PCI}: nothing to do"));
            return Ok(());
        }
        self.story.say(&format!("{title} host -> {owner}"));
        let checked = self.kernel.now().saturating_sub(begin);
        self.story.phase("check", checked, &describe(&facts));
        self.tell_of_firmware(&facts);
        // Before the record says so: a worker that is there puts right what is cut short from now on.
        self.kernel.worker();
        locked.save(&record)?;
        forget(&locked, &abandoned, slots)?;
        let budget = self.config.handoff * WAY_THERE.0 / WAY_THERE.1;
        let mut outcome = self.run(&locked, &record, &plan, OnFailure::Stop, begin + budget)?;
        outcome.phases.insert(0, ("check", checked));
        if !outcome.is_complete() {
            return Err(self.go_back(&locked, &record, &outcome, begin));
        }
        locked.save(&settled)?;
        let took = self.kernel.now().saturating_sub(begin);
        let last = Last { direction: Direction::Vfio, vmid: owner.vmid(), exit: 0, took, outcomes: &[&outcome] };
        self.note_last(&locked, &record.slots(), &last);
        self.story.say(&format!("{title} is on {VFIO_PCI}{} after {} ms", for_whom(owner), took.as_millis()));
        Ok(())
    }

    /// What [`Handoff::leave`] would do now.
    ///
    /// # Errors
    /// Why it would refuse.
    pub fn plan_leave(&self, owner: &Owner, slots: &[String], listed: &dyn Fn(&str) -> bool) -> Result<Plan> {
        Ok(self.intend(owner, slots, listed)?.plan)
    }

    /// Everything that can say no says so here. Reads only.
    fn intend(&self, owner: &Owner, slots: &[String], listed: &dyn Fn(&str) -> bool) -> Result<Intent> {
        let names: Vec<&str> = slots.iter().map(String::as_str).collect();
        self.refuse_wedged(&names)?;
        let slots = self.read_slots(slots)?;
        let earlier = self.earlier_records(owner, &slots)?;
        let mut record = self.record_for(owner, &slots, &earlier);
        let abandoned = earlier.into_iter().filter(|r| r.owner != *owner && r.owner.vmid().is_some()).collect();
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let facts = Facts::read(self.kernel, slots, &[], &modules).map_err(|error| unreadable(&names, &error))?;
        let facts = facts.avoiding(&self.store.wedged_slots());
        record.console |= facts.console.is_attached && facts.console.screen.is_some();
        let refuse = |reason: String| Stop::refused(format!("{} was not touched: {reason}", names.join(" ")));
        check::check(&facts, listed).map_err(refuse)?;
        let plan = plan::to_vfio(&facts, &record).map_err(refuse)?;
        self.refuse_busy(owner, &facts, &plan)?;
        Ok(Intent { record, abandoned, facts, plan })
    }

    fn read_slots(&self, addresses: &[String]) -> Result<Vec<Slot>> {
        let read = |address: &String| {
            Slot::read(self.kernel, address)
                .ok_or_else(|| Stop::refused(format!("there is no device in slot {address}")))
        };
        addresses.iter().map(read).collect()
    }

    /// Records that know something of these slots.
    fn earlier_records(&self, owner: &Owner, slots: &[Slot]) -> Result<Vec<Record>> {
        let mut earlier = Vec::new();
        for record in self.store.each_record() {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    self.refuse_unknown_homes(slots, &format!("{error:#}"))?;
                    continue;
                }
            };
            let Some(slot) = slots.iter().find(|slot| record.slots().contains(&slot.address.as_str())) else {
                continue;
            };
            // Without such a VM its start was given up: who comes next inherits what the record knew.
            if let Some(id) =
                record.owner.vmid().filter(|id| record.owner != *owner && is_with(self.kernel, &record, *id))
            {
                return Err(Stop::refused(format!(
                    "{0} was not touched: VM {id} has it; stop that VM (qm stop {id}), or if it does not run: \
                     gpu-handoff to-nvidia {0}; then {1}",
                    slot.address,
                    again(owner)
                )));
            }
            earlier.push(record);
        }
        Ok(earlier)
    }

    /// A record that cannot be read may be the one that knows where a slot on vfio-pci is at home.
    fn refuse_unknown_homes(&self, slots: &[Slot], problem: &str) -> Result<()> {
        if let Some(away) = slots.iter().flat_map(|slot| &slot.functions).find(|function| function.is_on(VFIO_PCI)) {
            return Err(unknown_home(&away.address, problem));
        }
        self.story.warn(problem);
        Ok(())
    }

    /// Where every function is at home: what an earlier record says, else what the configuration says, else here.
    fn record_for(&self, owner: &Owner, slots: &[Slot], earlier: &[Record]) -> Record {
        // What is with vfio-pci by hand stays there until the opposite call; a VM may use it there meanwhile.
        let by_hand =
            |slot: &Slot| earlier.iter().any(|r| r.owner != *owner && r.owner == Owner::Manual(slot.address.clone()));
        let known: Vec<&Record> = earlier.iter().filter(|r| r.owner == *owner || r.owner.vmid().is_some()).collect();
        let mut functions = Vec::new();
        let mut modules: Vec<String> = Vec::new();
        let console = known.iter().any(|record| record.console);
        for slot in slots {
            for function in &slot.functions {
                let home = known.iter().find_map(|record| record.home_of(&function.address));
                let home = home.cloned().unwrap_or_else(|| self.home_now(slot, function, by_hand(slot)));
                if function.is_nvidia_gpu() && function.driver == home.driver {
                    add_missing(&mut modules, self.modules_of(function));
                }
                functions.push(home);
            }
        }
        for record in known {
            // An own record may name slots that the configuration no longer does: they come home with the rest.
            let own = record.owner == *owner;
            let extra = record.functions.iter().filter(|f| own && !slots.iter().any(|slot| slot.address == f.slot));
            functions.extend(extra.cloned());
            add_missing(&mut modules, record.modules.iter().cloned());
        }
        let (owner, caller) = (owner.clone(), self.kernel.caller());
        Record { owner, progress: Progress::Leaving, functions, modules, console, caller }
    }

    fn home_now(&self, slot: &Slot, function: &Function, by_hand: bool) -> HomeOf {
        let here = || (function.driver.clone(), function.module.clone());
        let (driver, module) = match self.config.homes.get(&slot.address).filter(|_| !by_hand) {
            Some(Home::Driver(driver)) if function.is_nvidia_gpu() && !function.is_on(driver) => {
                (Some(driver.clone()), Some(driver.replace('-', "_")))
            }
            Some(Home::None) if function.is_nvidia_gpu() => (None, None),
            _ => here(),
        };
        let power = Power::read(self.kernel, &function.address);
        HomeOf { slot: slot.address.clone(), address: function.address.clone(), driver, module, power }
    }

    /// The modules of a GPU's driver, in the order in which they are loaded.
    fn modules_of(&self, gpu: &Function) -> Vec<String> {
        let unloadable = |m: &&String| matches!(m.as_str(), "nvidia" | "nouveau");
        let Some(module) = gpu.module.as_ref().filter(unloadable) else { return Vec::new() };
        let mut order = crate::gpu::nvidia::unload_order(self.kernel, module).unwrap_or_default();
        order.reverse();
        order
    }

    fn refuse_busy(&self, owner: &Owner, facts: &Facts, plan: &Plan) -> Result<()> {
        let unloads = |name: &str| {
            plan.iter().any(|(_, step)| matches!(step, super::step::Step::Unload { module } if module == name))
        };
        let reach = if unloads("nvidia") { Reach::Unloading } else { Reach::Unbinding };
        let mut watched = Watched::of_slots(self.kernel, &facts.slots, reach);
        if unloads("nvidia_drm") {
            watched.add_all_drm(self.kernel, &inventory::functions_of_driver(self.kernel, "nvidia"));
        }
        let mut holders = watched.holders(self.kernel);
        // The VM itself may have its GPU already: then there is nothing left to do.
        holders.retain(|holder| owner.vmid().is_none_or(|id| holder.place != Place::Vm(id)));
        let Some(first) = holders.first() else { return Ok(()) };
        let mut who: Vec<String> = holders.iter().take(NAMED_HOLDERS).map(ToString::to_string).collect();
        if holders.len() > NAMED_HOLDERS {
            who.push(format!("{} more", holders.len() - NAMED_HOLDERS));
        }
        let slots: Vec<&str> = facts.slots.iter().map(|slot| slot.address.as_str()).collect();
        Err(Stop::refused(format!(
            "{} was not touched, it is in use: {}; end it ({}), then {}",
            slots.join(" "),
            who.join(", "),
            first.remedy(),
            again(owner)
        )))
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
    fn go_back(&self, locked: &Locked, record: &Record, failed: &Outcome, begin: Duration) -> Stop {
        let slots = record.slots();
        let wedged = self.wedged_among(&slots);
        let mut outcomes = vec![failed];
        let back;
        let stop = match record.without(&wedged) {
            None => self.refuse_wedged(&slots).err(),
            Some(rest) => {
                self.story.warn(&format!("{}; going back", failed.problem()));
                match self.go_home(locked, &rest, begin + self.config.handoff) {
                    Ok(outcome) => {
                        back = outcome;
                        outcomes.push(&back);
                        let time = TimeBox { begin, end: begin + self.config.handoff, waited: Duration::ZERO };
                        self.after_going_back(locked, record, (failed, &back), &wedged, time).err()
                    }
                    Err(stop) => Some(stop),
                }
            }
        };
        let stop = stop.unwrap_or_else(|| {
            let code = if failed.out_of_time { Code::Overrun } else { Code::Failed };
            let title = slots.join(" ");
            Stop {
                code,
                message: format!("{title} is back where it was: {}; then {}", failed.problem(), again(&record.owner)),
            }
        });
        let took = self.kernel.now().saturating_sub(begin);
        let vmid = record.owner.vmid();
        let last = Last { direction: Direction::Vfio, vmid, exit: stop.code as u8, took, outcomes: &outcomes };
        self.note_last(locked, &slots, &last);
        stop
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
        if back.is_complete() || back.only_stuck() {
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

/// A function on vfio-pci whose home may stand in a file that cannot be read.
pub fn unknown_home(address: &str, problem: &str) -> Stop {
    Stop::refused(format!(
        "{address} was not touched: it is on {VFIO_PCI}, and the file that may say where it is at home cannot be \
         read: {problem}; if it is at home there, remove that file"
    ))
}

fn add_missing(modules: &mut Vec<String>, more: impl IntoIterator<Item = String>) {
    for module in more {
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
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

/// `0000:01:00.0 nvidia, 0000:01:00.1 snd_hda_intel; not in use`
fn describe(facts: &Facts) -> String {
    let functions: Vec<String> =
        facts.functions().map(|f| format!("{} {}", f.address, f.driver.as_deref().unwrap_or("no driver"))).collect();
    format!("{}; not in use", functions.join(", "))
}
