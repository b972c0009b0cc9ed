//! What giving slots away means before anything is touched: who refuses it, who must go first, the record and the plan.

use super::{Handoff, again, command, in_the_way};
use crate::address::{Address, SlotId, list, only};
use crate::config::{self, ForContainer, Home, Policy};
use crate::exit::{Exit, Result};
use crate::gpu::holders::{Devices, Ends, Found, Holder, Place, Reach, hidden};
use crate::gpu::inventory::{Function, Slot, VFIO_PCI};
use crate::gpu::power::Power;
use crate::gpu::{behind, containers, model, nodes, nvidia, started};
use crate::handoff::kept::record::is_with;
use crate::handoff::kept::record::{HomeOf, Owner, Record, Stopped};
use crate::handoff::plan::check;
use crate::handoff::plan::facts::Facts;
use crate::handoff::plan::policy::{self, Halt, Release};
use crate::handoff::plan::step::Step;
use crate::handoff::plan::{self, Outline, Plan};
use crate::handoff::way::departure::Departure;
use crate::handoff::way::halt;
use crate::handoff::way::home::unreadable;
use crate::handoff::way::let_go;
use crate::handoff::way::vm_resume::is_itself;
use crate::proxmox::running;
use crate::systemd;
use crate::trouble::Trouble;

/// More holders than this are counted, not named.
const NAMED_HOLDERS: usize = 5;

/// All that is known before anything is touched.
pub struct Intent {
    /// As it is written before the first step.
    pub(super) record: Record,
    /// Earlier records, of owners that need these slots no more.
    pub(super) abandoned: Vec<Record>,
    pub(super) facts: Facts,
    /// Who is asked to let go, before it is seen who must be stopped.
    pub(super) releases: Vec<Release>,
    /// Who is stopped before.
    pub(super) halts: Vec<Halt>,
    pub(super) devices: Devices,
    pub plan: Plan,
}

impl Intent {
    /// Who is stopped, and the steps.
    fn outline(&self, title: String, slots: &[SlotId]) -> Outline {
        let before = self.releases.iter().map(|release| (let_go::PHASE, release.to_string()));
        let before: Vec<_> = before.chain(self.halts.iter().map(|halt| (halt::PHASE, halt.to_string()))).collect();
        let mut lines = Vec::new();
        for phase in [let_go::PHASE, halt::PHASE] {
            let of_phase: Vec<&str> =
                before.iter().filter(|(name, _)| *name == phase).map(|(_, what)| &**what).collect();
            lines.extend((!of_phase.is_empty()).then(|| (phase, of_phase.join(", "))));
        }
        lines.extend(plan::lines(slots, &self.plan));
        let steps = self.plan.iter().map(|(phase, step)| (phase.name(), step.to_string()));
        let steps = before.into_iter().chain(steps).collect();
        Outline { title, slots: slots.to_vec(), steps, lines }
    }

    /// `.0 nvidia, .1 snd_hda_intel; not in use`
    pub(super) fn found(&self, slots: &[SlotId]) -> String {
        let driver =
            |f: &Function| format!("{} {}", f.address.below(only(slots)), f.driver.as_deref().unwrap_or("no driver"));
        let functions: Vec<String> = self.facts.functions().map(driver).collect();
        let used = if self.halts.is_empty() { "not in use" } else { "in use" };
        format!("{}; {used}", functions.join(", "))
    }
}

impl Handoff<'_> {
    /// What [`Handoff::leave`] would do now.
    ///
    /// # Errors
    /// Why it would refuse.
    pub fn plan_leave(&self, departure: &Departure) -> Result<Outline> {
        let Departure { owner, slots, by, .. } = departure;
        Ok(self.intend(departure)?.outline(format!("{}{by} host -> {owner}", list(slots)), slots))
    }

    /// Everything that can say no says so here. Reads only.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn intend(&self, departure: &Departure) -> Result<Intent> {
        let Departure { owner, slots: names, listed, .. } = departure;
        self.refuse_wedged(names)?;
        let slots = self.read_slots(names)?;
        let earlier = self.earlier_records(owner, &slots)?;
        let mut record = self.record_for(owner, &slots, &earlier);
        add_others(&mut record.others, &departure.others);
        let abandoned = earlier.into_iter().filter(|r| r.owner != *owner && r.owner.vmid().is_some()).collect();
        let modules: Vec<&str> = record.modules.iter().map(String::as_str).collect();
        let facts = Facts::read(self.kernel, slots, &[], &modules).map_err(|error| unreadable(names, &error))?;
        let facts = facts.avoiding(&self.store.wedged_slots());
        record.console |= facts.console.is_attached && facts.console.screen.is_some();
        let refuse = |why: Trouble| Exit::refused(why.of(&format!("{} was not touched", list(names))));
        let then = format!("then {}", again(owner));
        check::check(&facts, listed).map_err(refuse)?;
        let needed = facts.functions().find_map(|function| behind::in_use(self.kernel, function));
        needed.map_or(Ok(()), |why| Err(refuse(why.and(&then))))?;
        let plan = plan::to_vfio(&facts, &record).map_err(refuse)?;
        let devices = self.devices(&facts, &plan);
        if devices.is_blind {
            let busy = nvidia::busy(self.kernel);
            let what = format!("{busy}, so who uses the card is not known");
            return Err(refuse(Trouble::new(what, format!("when that is over, {}", again(owner)))));
        }
        // What is left of the time is for the steps, and for going back.
        let limit = self.config.time.handoff / 3;
        let found = devices.find_lasting(self.kernel, limit, &|holder| {
            !is_own(owner, holder) && !policy::stops(&self.config.policy, holder)
        });
        let found = found.map_err(|problem| refuse(Trouble::new(problem, &then)))?;
        let releases = policy::releases(&self.config.policy, &found.holders, &departure.asked.borrow());
        let is_asked =
            |holder: &Holder| releases.iter().any(|release| policy::in_which(holder).as_ref() == Some(&release.who));
        let others: Vec<Holder> = found.holders.iter().filter(|holder| !is_asked(holder)).cloned().collect();
        let halts = self.decide(owner, &facts, &others).map_err(|keepers| {
            busy(owner, names, &self.config.policy, &keepers, self.of_all_cards(&facts, &keepers))
        })?;
        if !found.hidden.is_empty() {
            self.story.warn(&format!("not seen is what these have in memory: {}", hidden(&found.hidden)));
        }
        if halts.is_empty() && releases.is_empty() {
            let unseen = self.unseen(&facts, &plan, &devices, &found);
            unseen.map_or(Ok(()), |why| Err(refuse(why.and(&then))))?;
        }
        add_missing(&mut record.frozen, self.to_freeze(&facts, &halts));
        let plan = if record.frozen.is_empty() { plan } else { plan::to_vfio(&facts, &record).map_err(refuse)? };
        Ok(Intent { record, abandoned, facts, releases, halts, devices, plan })
    }

    /// Who must go, by the policy; the error is who keeps the GPU.
    pub(super) fn decide(
        &self,
        owner: &Owner,
        facts: &Facts,
        holders: &[Holder],
    ) -> std::result::Result<Vec<Halt>, Vec<Holder>> {
        let holders: Vec<Holder> = holders.iter().filter(|holder| !is_own(owner, holder)).cloned().collect();
        let services = match facts.functions().any(|f| f.is_on("nvidia") || f.is_on("nvidia-nvswitch")) {
            true => policy::nvidia_services()
                .filter(|unit| systemd::has_processes(self.kernel, &format!("system.slice/{unit}")))
                .collect(),
            false => Vec::new(),
        };
        let slots: Vec<SlotId> = facts.slots.iter().map(|slot| slot.id).collect();
        policy::decide(&self.config.policy, &holders, &services, &self.just_started(&slots))
    }

    /// Why a function that is unbound alone might make that hang, although nobody was seen that has it open.
    fn unseen(&self, facts: &Facts, plan: &Plan, devices: &Devices, found: &Found) -> Option<Trouble> {
        let is_unbound = |function: &&Function| {
            plan.iter().any(|(_, step)| matches!(step, Step::Unbind { address, .. } if *address == function.address))
        };
        facts.functions().filter(is_unbound).find_map(|function| {
            let own = Devices::of_function(self.kernel, function);
            let on_nvidia = function.is_on("nvidia");
            let devices = if on_nvidia { devices } else { &own };
            if !on_nvidia && own.is_idle(self.kernel) {
                return None;
            }
            in_the_way::unseen(self.kernel, function, devices, found.clone(), self.config.time.handoff / 6)
        })
    }

    /// Why somebody is in the way who may use another card.
    fn of_all_cards(&self, facts: &Facts, keepers: &[Holder]) -> &'static str {
        let is_alone = facts.gpu_drivers.get("nvidia").is_some_and(|driver| driver.elsewhere.is_empty());
        let is_control = |holder: &Holder| holder.number == nodes::CONTROL && !is_alone;
        let mut gpus = facts.functions().filter(|function| function.is_nvidia_gpu());
        match keepers.iter().any(is_control) {
            false => "",
            true if gpus.any(|gpu| started::may_be(self.kernel, gpu.address)) => {
                ", which is for all cards: the driver has started this card and does not say for whom"
            }
            true => {
                ", which is for all cards: with this version of the driver nobody could ever have this one again if somebody \
                 began to use it through that in the last moment"
            }
        }
    }

    /// Containers that could open the GPU while it changes hands.
    fn to_freeze(&self, facts: &Facts, halts: &[Halt]) -> Vec<u32> {
        if !facts.functions().any(|f| f.is_nvidia_gpu() && f.driver.as_deref().is_some_and(|driver| driver != VFIO_PCI))
        {
            return Vec::new();
        }
        let mut containers = containers::with_gpu(self.kernel, &facts.slots);
        containers.retain(|ctid| {
            let is_left = self.config.policy.for_container(*ctid) == ForContainer::Leave;
            !is_left && !halts.contains(&Halt::Stop(Stopped::Container(*ctid)))
        });
        containers
    }

    pub(super) fn read_slots(&self, ids: &[SlotId]) -> Result<Vec<Slot>> {
        let read = |id: &SlotId| {
            Slot::read(self.kernel, *id).ok_or_else(|| Exit::refused(format!("there is no device in slot {id}")))
        };
        ids.iter().map(read).collect()
    }

    /// Records that know something of these slots.
    fn earlier_records(&self, owner: &Owner, slots: &[Slot]) -> Result<Vec<Record>> {
        self.refuse_unreadable(owner, slots)?;
        let mut earlier = Vec::new();
        for record in self.store.each_record() {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    let problem = format!("{error:#}");
                    refuse_unknown_homes(slots, &problem)?;
                    self.story.warn(&problem);
                    continue;
                }
            };
            let Some(slot) = slots.iter().find(|slot| record.slots().contains(&slot.id)) else {
                continue;
            };
            // Without such a VM its start was given up: who comes next inherits what the record knew.
            if let Some(id) =
                record.owner.vmid().filter(|id| record.owner != *owner && is_with(self.kernel, &record, *id))
            {
                let slot = slot.id;
                let what = format!("{slot} was not touched: VM {id} has it");
                let remedy = format!(
                    "stop that VM (qm shutdown {id}), or if it does not run: gpu-handoff to-nvidia {slot}; then {}",
                    again(owner)
                );
                return Err(Exit::refused(Trouble::new(what, remedy)));
            }
            earlier.push(record);
        }
        Ok(earlier)
    }

    /// The owner's own record would be written over: what stands in it must not be lost.
    fn refuse_unreadable(&self, owner: &Owner, slots: &[Slot]) -> Result<()> {
        let Err(error) = self.store.record(owner) else { return Ok(()) };
        let problem = format!("{error:#}");
        refuse_unknown_homes(slots, &problem)?;
        let title = list(slots.iter().map(|slot| slot.id));
        Err(Exit::refused(Trouble::new(
            format!("{title} was not touched: an earlier record of {owner} cannot be read: {problem}"),
            format!("if gpu-handoff --status shows the card at home, remove that file; then {}", again(owner)),
        )))
    }

    /// Where every function is at home: what an earlier record says, else what the configuration says, else here.
    pub(super) fn record_for(&self, owner: &Owner, slots: &[Slot], earlier: &[Record]) -> Record {
        // What is with vfio-pci by hand stays there until the opposite call; a VM may use it there meanwhile.
        let by_hand = |slot: &Slot| earlier.iter().any(|r| r.owner != *owner && r.owner == Owner::Manual(slot.id));
        let known: Vec<&Record> = earlier.iter().filter(|r| r.owner == *owner || r.owner.vmid().is_some()).collect();
        let mut functions = Vec::new();
        let mut modules: Vec<String> = Vec::new();
        let console = known.iter().any(|record| record.console);
        for slot in slots {
            for function in &slot.functions {
                let home = known.iter().find_map(|record| record.home_of(function.address));
                let home = home.cloned().unwrap_or_else(|| self.home_now(slot, function, by_hand(slot)));
                if function.is_nvidia_gpu() && (function.driver == home.driver || function.is_on(VFIO_PCI)) {
                    add_missing(&mut modules, self.modules_of(&home));
                }
                functions.push(home);
            }
        }
        let (mut stopped, mut frozen, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for record in known {
            add_others(&mut others, &record.others);
            add_missing(&mut stopped, record.stopped.iter().cloned());
            add_missing(&mut frozen, record.frozen.iter().copied());
            // An own record may name slots that the configuration no longer does: they come home with the rest.
            let own = record.owner == *owner;
            let extra = record.functions.iter().filter(|f| own && !slots.iter().any(|slot| slot.id == f.slot));
            functions.extend(extra.cloned());
            add_missing(&mut modules, record.modules.iter().cloned());
        }
        // It is being started, or runs.
        stopped.retain(|what| !is_itself(what, owner));
        let by_hand = owner.vmid().is_some_and(|id| !running::is_locked(self.kernel, id));
        let caller = self.kernel.caller();
        Record { functions, others, modules, stopped, frozen, console, caller, by_hand, ..Record::new(owner.clone()) }
    }

    fn home_now(&self, slot: &Slot, function: &Function, by_hand: bool) -> HomeOf {
        let (driver, module) = match self.config.homes.get(&slot.id).filter(|_| !by_hand) {
            Some(Home::Driver(driver)) if function.is_nvidia_gpu() && !function.is_on(driver) => {
                (Some(driver.clone()), Some(driver.replace('-', "_")))
            }
            Some(Home::None) if function.is_nvidia_gpu() => (None, None),
            configured => self.found_home(slot, function, configured, by_hand),
        };
        let power = Power::read(self.kernel, function.address);
        let model = model::of(self.kernel, function);
        HomeOf { slot: slot.id, address: function.address, driver, module, power, model }
    }

    /// The modules of a GPU's home driver, in the order in which they are loaded.
    fn modules_of(&self, home: &HomeOf) -> Vec<String> {
        let unloadable = |m: &&String| matches!(m.as_str(), "nvidia" | "nouveau");
        let Some(module) = home.module.as_ref().filter(unloadable) else { return Vec::new() };
        let mut order = nvidia::unload_order(self.kernel, module).unwrap_or_default();
        order.reverse();
        order
    }

    fn devices(&self, facts: &Facts, plan: &Plan) -> Devices {
        let unloads =
            |name: &str| plan.iter().any(|(_, step)| matches!(step, Step::Unload { module } if module == name));
        let reach = if unloads("nvidia") { Reach::Unloading } else { Reach::Unbinding };
        let mut devices = Devices::of_slots(self.kernel, &facts.slots, reach);
        if unloads("nvidia_drm") {
            devices.add_all_drm(self.kernel, &nodes::gpus_of_nvidia_drm(self.kernel));
        }
        devices
    }
}

/// A record that cannot be read may be the one that knows where a slot on vfio-pci is at home.
fn refuse_unknown_homes(slots: &[Slot], problem: &str) -> Result<()> {
    match slots.iter().flat_map(|slot| &slot.functions).find(|function| function.is_on(VFIO_PCI)) {
        Some(away) => Err(unknown_home(away.address, problem)),
        None => Ok(()),
    }
}

/// A function on vfio-pci whose home may stand in a file that cannot be read.
pub fn unknown_home(address: Address, problem: &str) -> Exit {
    let what = format!(
        "{address} was not touched: it is on {VFIO_PCI}, and the file that may say where it is at home cannot be \
         read: {problem}"
    );
    Exit::refused(Trouble::new(what, "if it is at home there, remove that file"))
}

/// The VM itself may have its GPU already: then there is nothing left to do.
fn is_own(owner: &Owner, holder: &Holder) -> bool {
    owner.vmid().is_some_and(|id| holder.place == Place::Vm(id))
}

/// Who keeps the GPU, the policy that would stop them, and all that must be typed, in one line.
fn busy(owner: &Owner, slots: &[SlotId], policy: &Policy, keepers: &[Holder], why: &str) -> Exit {
    let mut who: Vec<String> = keepers.iter().take(NAMED_HOLDERS).map(in_words).collect();
    if keepers.len() > NAMED_HOLDERS {
        who.push(format!("{} more", keepers.len() - NAMED_HOLDERS));
    }
    let what = format!("{} was not touched, it is in use: {}{why}", list(slots), who.join(", "));
    let mut parts = Vec::new();
    let keys = policy::that_would_do(policy, keepers);
    if !keys.is_empty() {
        parts.push(format!("{} in {} would end that by itself", keys.join(", "), config::PATH));
    }
    let mut told: Vec<String> = Vec::new();
    for holder in keepers {
        if let Ends::Told(how) = &holder.ends {
            add_missing(&mut told, [how.clone()]);
        }
    }
    let then = if told.is_empty() { "" } else { "then " };
    parts.extend(told);
    let commands = policy::commands(keepers).into_iter().chain([command(owner)]);
    parts.push(format!("{then}type: {}", commands.collect::<Vec<_>>().join("; ")));
    Exit::refused(Trouble::new(what, parts.join("; ")))
}

/// With what of it would not be understood from the command that ends it.
fn in_words(holder: &Holder) -> String {
    match &holder.ends {
        Ends::Typed(_, why) if !why.is_empty() => format!("{holder}: {why}"),
        Ends::Passes => format!("{holder}: it ends by itself"),
        _ => holder.to_string(),
    }
}

/// What is on a driver of the host now, before what an earlier record says of it.
fn add_others(others: &mut Vec<HomeOf>, more: &[HomeOf]) {
    others.retain(|home| !more.iter().any(|one| one.address == home.address));
    others.extend(more.iter().cloned());
}

pub(super) fn add_missing<T: PartialEq>(list: &mut Vec<T>, more: impl IntoIterator<Item = T>) {
    for entry in more {
        if !list.contains(&entry) {
            list.push(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    use crate::handoff::way::tests::{ask, slot};
    use crate::sys::{DeviceNumber, How, Process};

    /// Only where a card can be used through a node that says nothing of cards, and which of them it is cannot be told.
    #[test]
    fn whoever_uses_all_cards_is_told_why_he_is_in_the_way_of_one() {
        let why = |files: &[(&str, &str)], elsewhere: &[&str], number| {
            let (process, via) = (Process { pid: 7, start: 99 }, "/dev/nvidiactl".to_string());
            let (command, place) = ("python3".to_string(), Place::Unknown);
            let holder = Holder { process, command, number, via, how: How::Open, place, ends: Ends::Kill };
            ask(files, &Config::default(), |handoff| {
                let mut facts = Facts::read(handoff.kernel, vec![slot("0000:01:00", "nvidia")], &[], &[]).unwrap();
                let driver = facts.gpu_drivers.get_mut("nvidia").unwrap();
                driver.elsewhere = elsewhere.iter().map(|slot| slot.parse().unwrap()).collect();
                handoff.of_all_cards(&facts, &[holder])
            })
        };
        assert!(why(&[], &["0000:02:00"], nodes::CONTROL).ends_with("has started this card and does not say for whom"));
        // No interrupt of the driver's: it has not started the card.
        let irq = ("sys/bus/pci/devices/0000:01:00.0/irq", "16\n");
        let interrupts = ("proc/interrupts", " 16: 0 IO-APIC 16-fasteoi ehci_hcd:usb1\n");
        let not_started = why(&[irq, interrupts], &["0000:02:00"], nodes::CONTROL);
        assert!(not_started.contains("nobody could ever have this one again"));
        let of_the_card = DeviceNumber { minor: 0, ..nodes::CONTROL };
        assert_eq!((why(&[], &["0000:02:00"], of_the_card), why(&[], &[], nodes::CONTROL)), ("", ""));
    }
}
