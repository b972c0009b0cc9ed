//! Whether a VM still has open what is to come home, and waiting until it has let go.

use super::{Handoff, LOOK_AGAIN};
use crate::address::list;
use crate::exit::{Exit, Result};
use crate::gpu::holders::Devices;
use crate::gpu::inventory::{Slot, VFIO_PCI};
use crate::handoff::kept::record::Record;
use crate::sys::ActError;
use crate::trouble::Trouble;
use std::time::Duration;

/// The time of one way home.
#[derive(Debug, Clone, Copy)]
pub(super) struct TimeBox {
    pub begin: Duration,
    pub end: Duration,
    /// What of it went into waiting for a VM to let go.
    pub waited: Duration,
    /// How long others may keep the driver's module stack; beside the time box.
    pub patience: Duration,
}

impl TimeBox {
    pub fn of(handoff: &Handoff, begin: Duration, end: Duration) -> TimeBox {
        TimeBox { begin, end, waited: Duration::ZERO, patience: handoff.config.time.lock }
    }
}

impl Handoff<'_> {
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
                Err(error) => return Err(Exit::failed(format!("/dev/vfio/{group}: {error}"))),
            }
        }
        let limit = end.saturating_sub(self.kernel.now()) / 2;
        // The groups' word is enough to bring a card home: what has the newer nodes open has a group as well, or is a
        // program of somebody's own, and then unbinding waits for it in the worker.
        Ok(Devices::vfio_of_slots(self.kernel, &slots).holders(self.kernel, limit).is_ok_and(|found| !found.is_empty()))
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
                let devices = Devices::vfio_of_slots(self.kernel, &self.slots_of(record));
                let holders = devices.holders(self.kernel, self.config.time.handoff / 10).unwrap_or_default();
                let who = holders.first().map_or_else(|| "a VM is still closing it".to_string(), ToString::to_string);
                let why = if asked { "asked to end".to_string() } else { format!("after {} s", waited.as_secs()) };
                let what = format!("{} was not touched: {who} ({why})", list(record.slots()));
                let trouble = Trouble::new(what, format!("end it, then: gpu-handoff to-nvidia {}", record.slot()));
                return Err(if asked { Exit::failed(trouble) } else { Exit::overrun(trouble) });
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
        Ok(self.kernel.now().saturating_sub(begin))
    }

    pub(super) fn slots_of(&self, record: &Record) -> Vec<Slot> {
        record.slots().into_iter().filter_map(|slot| Slot::read(self.kernel, slot)).collect()
    }
}
