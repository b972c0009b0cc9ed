//! Cards that are not with the host although no handoff took them from it, and what is behind that.

use crate::address::SlotId;
use crate::causes::{self, Cause, Facts};
use crate::config::{Config, Home};
use crate::gpu::Slot;
use crate::gpu::inventory::nvidia_slots;
use crate::handoff::kept::record::Record;
use crate::handoff::kept::store::Store;
use crate::sys::Kernel;

/// A card where it should not be.
pub struct Elsewhere {
    pub slot: SlotId,
    pub text: String,
}

/// Those that are on vfio-pci, or another driver that is not their home, although nothing of ours put them there; and
/// those without a driver, where something `is_blocked` or the driver is loaded.
pub fn find(kernel: &dyn Kernel, store: &Store, config: &Config, is_blocked: bool) -> Vec<Elsewhere> {
    let records = records(store);
    let one = |slot: &Slot| one(kernel, &records, config, slot, is_blocked);
    nvidia_slots(kernel).iter().filter_map(one).collect()
}

/// What, of all that acts at boot, keeps this card from its home; nothing for one that is where it should be.
pub fn behind(kernel: &dyn Kernel, store: &Store, config: &Config, slot: SlotId) -> Vec<Cause> {
    // Nearly every card is with its driver, and then nothing has to be read of what acts at boot.
    match Slot::read(kernel, slot).and_then(|slot| one(kernel, &records(store), config, &slot, true)) {
        Some(_) => Facts::read(kernel, config).causes(),
        None => Vec::new(),
    }
}

fn records(store: &Store) -> Vec<Record> {
    store.each_record().into_iter().flatten().collect()
}

fn one(kernel: &dyn Kernel, records: &[Record], config: &Config, slot: &Slot, is_blocked: bool) -> Option<Elsewhere> {
    let is_ours = records.iter().any(|record| record.slots().contains(&slot.id));
    let gpu = slot.gpu().filter(|_| !is_ours)?;
    let home = config.homes.get(&slot.id);
    let is_driver_there = || is_blocked || kernel.exists("/sys/module/nvidia");
    let text = match gpu.driver.as_deref() {
        Some(driver) if home == Some(&Home::Driver(driver.to_string())) => return None,
        Some(driver) if causes::is_keeper(driver) => {
            format!("{} is on {driver}, and no handoff put it there: the host does not have it", slot.id)
        }
        // That there is no driver yet is no fault.
        None if home != Some(&Home::None) && is_driver_there() => format!("{} has no driver", slot.id),
        _ => return None,
    };
    Some(Elsewhere { slot: slot.id, text })
}
