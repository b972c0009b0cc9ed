//! What a VM has in the end, where Proxmox chose otherwise than was expected: that goes on its record, and what was made
//! ready in vain goes to whoever has it, or home.

use super::Handoff;
use crate::address::{SlotId, list};
use crate::exit::Result;
use crate::gpu::Slot;
use crate::gpu::holders::{Devices, Place};
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::way::intent::add_missing;
use crate::handoff::way::vm_resume::is_itself;
use crate::sorted;
use std::collections::BTreeMap;

impl Handoff<'_> {
    /// A VM that runs has these slots, whatever its record says.
    ///
    /// # Errors
    /// When a record cannot be written, or something could not be brought home: then a record still has it.
    pub fn has_been_given(&self, owner: &Owner, has: &[SlotId]) -> Result<()> {
        let is_right = |record: &Record| sorted::set(record.slots()) == sorted::set(has.iter().copied());
        let Some(record) = self.store.record(owner)?.filter(|record| !is_right(record)) else { return Ok(()) };
        let mut slots = record.slots();
        slots.extend(has);
        for other in self.others_with(owner, &record, has).into_keys() {
            slots.extend(self.store.record(&other)?.iter().flat_map(Record::slots));
        }
        let locked = self.lock(self.config.time.lock, &slots, "see gpu-handoff --status")?;
        let Some(record) = self.store.record(owner)? else { return Ok(()) };
        let missing: Vec<SlotId> = has.iter().copied().filter(|slot| !record.slots().contains(slot)).collect();
        let records: Vec<Record> = self.store.each_record().into_iter().flatten().collect();
        let mut known = vec![record.clone()];
        known.extend(records.iter().filter(|other| other.owner != *owner && names_any(other, &missing)).cloned());
        // Of what a slot is in two records: first where it is to be from now on.
        let all = self.record_for(owner, &self.read_slots(has)?, &known);
        let all = Record { progress: Progress::Away, caller: record.caller, by_hand: record.by_hand, ..all };
        locked.save(&all)?;
        let mut gone = Vec::new();
        for (other, slots) in self.others_with(owner, &record, has) {
            let theirs = self.store.record(&other)?;
            if theirs.iter().flat_map(Record::slots).all(|slot| locked.has(slot)) {
                locked.save(&handed(&all, &slots, theirs, &other))?;
                self.story.say(&format!("{} is with {other}, and on its record now", list(&slots)));
                gone.extend(slots);
            }
        }
        for other in known.iter().filter(|known| known.owner != *owner && known.owner.vmid().is_some()) {
            let Some(other) = self.store.record(&other.owner)? else { continue };
            other.without(&missing).map_or_else(|| locked.remove(&other.owner), |rest| locked.save(&rest))?;
        }
        if let Some(rest) = all.without(&gone) {
            locked.save(&rest)?;
        }
        if !missing.is_empty() {
            self.story.say(&format!("{} is with {owner}, and on its record now", list(&missing)));
        }
        drop(locked);
        self.come_home_but(owner, has, "Proxmox gave it another")
    }

    /// Of what a VM's record names beside what it has, whose it is instead.
    fn others_with(&self, owner: &Owner, record: &Record, has: &[SlotId]) -> BTreeMap<Owner, Vec<SlotId>> {
        let mut others: BTreeMap<Owner, Vec<SlotId>> = BTreeMap::new();
        for slot in record.slots().into_iter().filter(|slot| !has.contains(slot)) {
            let Some(devices) = Slot::read(self.kernel, slot).map(|slot| Devices::vfio_of_slots(self.kernel, &[slot]))
            else {
                continue;
            };
            // Who cannot be seen keeps it from coming home as well, and then it stays on record.
            let holders = devices.holders(self.kernel, self.config.time.handoff / 6).unwrap_or_default();
            let vms = holders.iter().filter_map(|holder| match holder.place {
                Place::Vm(id) => Some(Owner::Vm(id)),
                _ => None,
            });
            if let Some(other) = vms.into_iter().find(|other| other != owner) {
                others.entry(other).or_default().push(slot);
            }
        }
        others
    }
}

fn names_any(record: &Record, slots: &[SlotId]) -> bool {
    record.slots().iter().any(|slot| slots.contains(slot))
}

/// The record of `owner`, `theirs` until now, with `slots` as `from` knows them.
fn handed(from: &Record, slots: &[SlotId], theirs: Option<Record>, owner: &Owner) -> Record {
    let mut record = theirs.unwrap_or_else(|| Record {
        progress: Progress::Away,
        by_hand: from.by_hand,
        ..Record::new(owner.clone())
    });
    let functions = from.functions.iter().filter(|function| slots.contains(&function.slot)).cloned();
    add_missing(&mut record.functions, functions);
    add_missing(&mut record.modules, from.modules.iter().cloned());
    // Nobody knows any more for which of the slots: it is started again for each.
    add_missing(&mut record.stopped, from.stopped.iter().filter(|what| !is_itself(what, owner)).cloned());
    record.console |= from.console;
    record
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::power::Power;
    use crate::handoff::kept::record::{HomeOf, Stopped};

    fn record(vmid: u32, slots: &[&str]) -> Record {
        let home = |slot: &&str| {
            let slot: SlotId = slot.parse().unwrap();
            let driver = Some("nvidia".to_string());
            HomeOf {
                slot,
                address: slot.function(0),
                module: driver.clone(),
                driver,
                power: Power::default(),
                model: None,
            }
        };
        Record { functions: slots.iter().map(home).collect(), ..Record::new(Owner::Vm(vmid)) }
    }

    #[test]
    fn what_is_handed_on_is_known_as_before() {
        let mut from = record(111, &["0000:01:00", "0000:02:00"]);
        from.stopped = vec![Stopped::Container(101)];
        from.modules = vec!["nvidia".to_string()];
        let slots: Vec<SlotId> = vec!["0000:02:00".parse().unwrap()];
        let new = handed(&from, &slots, None, &Owner::Vm(112));
        assert_eq!((new.slots(), new.progress, &new.owner), (slots.clone(), Progress::Away, &Owner::Vm(112)));
        assert_eq!((&new.stopped, &new.modules), (&from.stopped, &from.modules));
        assert!(!new.by_hand && !new.console);
        let both = handed(&from, &slots, Some(record(112, &["0000:03:00"])), &Owner::Vm(112));
        assert_eq!(both.slots().iter().map(ToString::to_string).collect::<Vec<_>>(), ["0000:03:00", "0000:02:00"]);
        let from = Record { by_hand: true, console: true, ..from };
        let new = handed(&from, &slots, None, &Owner::Vm(112));
        assert!(new.by_hand && new.console);
    }
}
