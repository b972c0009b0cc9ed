//! One VM after another: who has the slots is shut down first, and the slots stay with vfio-pci in between.
//!
//! Nothing of ours is locked meanwhile but that nobody else takes over from the same VM. Its post-stop sees that and leaves
//! the slots where they are; should the one that takes over not live to the end of it, they come home as after any stop.

use super::halt::{PHASE, QM};
use super::vm_resume::shutdown_unit;
use super::{Handoff, LOOK_AGAIN, again};
use crate::address::{SlotId, list};
use crate::config::ForVm;
use crate::decimal::whole_seconds;
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::{Owner, Record};
use crate::handoff::plan::check;
use crate::handoff::plan::facts::Facts;
use crate::handoff::way::departure::Departure;
use crate::handoff::way::home::unreadable;
use crate::proxmox::{ha, running, vm};
use crate::sys::Lock;
use crate::systemd;
use crate::trouble::Trouble;
use std::fmt;
use std::time::Duration;

/// From the end of QEMU to that of what Proxmox does about it.
const CLEANUP: Duration = Duration::from_secs(30);

/// A VM that is shut down so that another has its slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MakesWay {
    pub vmid: u32,
    /// Stopped hard if it does not shut down in time.
    pub is_forced: bool,
    /// Started again after that.
    pub runs_again: bool,
    slots: Vec<SlotId>,
}

impl fmt::Display for MakesWay {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let how = if self.is_forced { ", and stop it if that takes too long" } else { "" };
        let then = if self.runs_again { ", and start it again afterwards" } else { "" };
        write!(f, "shut down VM {}{how}{then}; {} stays on vfio-pci", self.vmid, list(&self.slots))
    }
}

impl Handoff<'_> {
    /// The VMs that have these slots and are to be shut down: by the policy, or because a person `is_asking` for it. None
    /// where one of them is not to be: then who wants the slots is refused.
    ///
    /// # Errors
    /// Why a VM cannot be shut down, or it would be in vain.
    pub fn who_makes_way(&self, departure: &Departure, is_asking: bool) -> Result<Vec<MakesWay>> {
        let Departure { owner, slots, .. } = departure;
        let mut making_way = Vec::new();
        for record in self.store.each_record().into_iter().flatten() {
            let Some(vmid) = record.owner.vmid().filter(|_| record.owner != *owner && owner.vmid().is_some()) else {
                continue;
            };
            let had: Vec<SlotId> = record.slots().into_iter().filter(|slot| slots.contains(slot)).collect();
            if had.is_empty() || running::qemu_pid(self.kernel, vmid).is_none() {
                continue;
            }
            let policy = self.config.policy.for_vm(vmid);
            if policy == ForVm::Refuse && !is_asking {
                return Ok(Vec::new());
            }
            let runs_again = self.config.policy.vm_resume;
            making_way.push(MakesWay { vmid, is_forced: policy == ForVm::Stop, runs_again, slots: had });
        }
        // Whoever has its card since is not to make way for one that is only started again.
        if owner.vmid().is_some_and(|vmid| !making_way.is_empty() && self.is_started_again(vmid)) {
            return Ok(Vec::new());
        }
        if !making_way.is_empty() {
            for one in &making_way {
                self.refuse_to_shut_down(owner, one)?;
            }
            self.refuse_in_vain(departure, &making_way)?;
        }
        Ok(making_way)
    }

    /// What the VM's own state says against it.
    fn refuse_to_shut_down(&self, owner: &Owner, one: &MakesWay) -> Result<()> {
        let vmid = one.vmid;
        let refused = |why: String| {
            let what = format!("{} was not touched: VM {vmid} has it and {why}", list(&one.slots));
            Err(Exit::refused(Trouble::new(what, format!("then {}", again(owner)))))
        };
        let config = self.kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")).unwrap_or_default();
        if let Some(lock) = vm::parse(&config).lock.filter(|lock| !lock.is_empty()) {
            return refused(format!(
                "is locked ({}): wait until that is over, or if nothing is at it: qm unlock {vmid}",
                lock.escape_debug()
            ));
        }
        if ha::manages(self.kernel, "vm", vmid) {
            return refused(format!(
                "is managed by HA, which would start it again: ha-manager set vm:{vmid} --state stopped"
            ));
        }
        if let Some(other) = self.store.next_after(self.kernel, vmid).filter(|other| Some(*other) != owner.vmid()) {
            return refused(format!("VM {other} takes it over already: see gpu-handoff --status"));
        }
        if running::is_locked(self.kernel, vmid) && self.store.next_after(self.kernel, vmid).is_none() {
            return refused("Proxmox is at work on that VM: wait until that is over".to_string());
        }
        Ok(())
    }

    /// Nobody is shut down for what would be refused all the same.
    fn refuse_in_vain(&self, departure: &Departure, making_way: &[MakesWay]) -> Result<()> {
        let Departure { owner, slots, by, listed, .. } = departure;
        self.refuse_as_it_is(departure)?;
        let is_had = |slot: &SlotId| making_way.iter().any(|one| one.slots.contains(slot));
        let rest: Vec<SlotId> = slots.iter().copied().filter(|slot| !is_had(slot)).collect();
        if rest.is_empty() {
            return Ok(());
        }
        let rest = Departure { by: by.clone(), listed: listed.clone(), ..Departure::of(owner.clone(), rest) };
        self.intend(&rest).map(drop)
    }

    /// What the machine itself says against it, whoever uses the slots.
    ///
    /// # Errors
    /// Why they cannot leave.
    pub fn refuse_as_it_is(&self, Departure { slots, listed, .. }: &Departure) -> Result<()> {
        self.refuse_wedged(slots)?;
        let facts = Facts::read(self.kernel, self.read_slots(slots)?, &[], &[]);
        let facts = facts.map_err(|error| unreadable(slots, &error))?.avoiding(&self.store.wedged_slots());
        check::check(&facts, listed).map_err(|why| Exit::refused(why.of(&format!("{} was not touched", list(slots)))))
    }

    /// Shuts them down, and waits until they have let go. As long as what is given back is kept, nobody else takes over.
    ///
    /// # Errors
    /// When one does not shut down in time: then it goes on, or comes to its end later, and nothing else has changed.
    pub fn take_over(&self, owner: &Owner, making_way: &[MakesWay]) -> Result<Vec<Lock>> {
        let Some(next) = owner.vmid().filter(|_| !making_way.is_empty()) else { return Ok(Vec::new()) };
        let mut locks = Vec::new();
        for one in making_way {
            match self.store.take_over_from(one.vmid, next)? {
                Some(lock) => locks.push(lock),
                None => {
                    let other = self.store.next_after(self.kernel, one.vmid);
                    // A person's switch, which starts this VM.
                    if other == Some(next) {
                        continue;
                    }
                    let who = other.map_or_else(|| "another VM".to_string(), |other| format!("VM {other}"));
                    let slots = list(&one.slots);
                    return Err(Exit::refused(Trouble::new(
                        format!("{slots} was not touched: {who} takes it over from VM {} already", one.vmid),
                        format!("see gpu-handoff --status, then {}", again(owner)),
                    )));
                }
            }
        }
        let begin = self.kernel.now();
        let done = self.shut_all_down(owner, making_way, begin);
        // Asked to end it does not know how that goes on: see forget_who_goes_on.
        if done.is_err() && !self.kernel.is_asked_to_end() {
            for problem in making_way.iter().filter_map(|one| self.owe_no_start(one.vmid).err()) {
                self.story.warn(&problem.to_string());
            }
        }
        done?;
        let who: Vec<String> = making_way.iter().map(|one| format!("VM {}", one.vmid)).collect();
        self.story.phase(PHASE, self.kernel.now().saturating_sub(begin), &who.join(", "));
        Ok(locks)
    }

    fn shut_all_down(&self, owner: &Owner, making_way: &[MakesWay], begin: Duration) -> Result<()> {
        for one in making_way {
            let id = one.vmid;
            if one.runs_again {
                self.owe_start(id, &one.slots, &again(owner))?;
            }
            let then = if one.runs_again { ", and started again afterwards" } else { "" };
            self.story.say(&format!(
                "{} VM {id} -> {owner}: VM {id} is shut down for it, for up to {} s{then}",
                list(&one.slots),
                whole_seconds(self.config.time.stop)
            ));
            self.shut_down(one).map_err(|problem| {
                Exit::failed(format!("{} was not touched: VM {id} is not shut down: {problem}", list(&one.slots)))
            })?;
        }
        making_way.iter().try_for_each(|one| self.wait_for_end(owner, one, begin))
    }

    /// It goes on by itself: a run that is killed meanwhile leaves nothing half asked for.
    fn shut_down(&self, one: &MakesWay) -> std::result::Result<(), crate::sys::ActError> {
        let id = one.vmid.to_string();
        let timeout = self.config.time.stop.as_secs().max(1).to_string();
        let mut line = vec![QM, "shutdown", &id, "--timeout", &timeout];
        if one.is_forced {
            line.extend(["--forceStop", "1"]);
        }
        systemd::run_transient(self.kernel, &shutdown_unit(one.vmid), &line)
    }

    fn wait_for_end(&self, owner: &Owner, one: &MakesWay, begin: Duration) -> Result<()> {
        let (vmid, slots) = (one.vmid, list(&one.slots));
        let runs = || running::qemu_pid(self.kernel, vmid).is_some();
        let mut end = begin + self.config.time.stop + if one.is_forced { CLEANUP } else { Duration::ZERO };
        while runs() {
            let why = match self.kernel.is_asked_to_end() {
                true => "asked to end while VM",
                false if self.kernel.now() >= end => "VM",
                false => {
                    self.kernel.sleep(LOOK_AGAIN);
                    continue;
                }
            };
            let took = self.kernel.now().saturating_sub(begin).as_secs();
            return Err(Exit::refused(Trouble::new(
                format!("{slots} was not touched: {why} {vmid} has not shut down after {took} s"),
                format!("stop it: qm stop {vmid}; then {}", again(owner)),
            )));
        }
        // What Proxmox does about its end, with its lock, and takes its note away before; then QEMU lets go of the card.
        end = self.kernel.now() + CLEANUP;
        let is_cleaned = || !running::is_noted(self.kernel, vmid) && !running::is_locked(self.kernel, vmid);
        while !is_cleaned() && self.kernel.now() < end && !self.kernel.is_asked_to_end() {
            self.kernel.sleep(LOOK_AGAIN);
        }
        let record: Option<Record> = self.store.record(&Owner::Vm(vmid))?;
        record.map_or(Ok(()), |record| self.wait_until_free(&record, end).map(drop))
    }
}
