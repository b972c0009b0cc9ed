//! Where a function is at home that no record knows.
//!
//! With the driver that it has; but vfio-pci is a home only where something puts it there for good. A VM that ran without
//! the hook leaves its card with vfio-pci, by an id that Proxmox gave it (`new_id`), until somebody takes it back.

use super::{Handoff, again};
use crate::address::SlotId;
use crate::causes;
use crate::config::{Config, Home};
use crate::exit::Result;
use crate::gpu::inventory::{Function, READ_LIMIT, Slot, VFIO_PCI, driver_exists, read_override};
use crate::gpu::static_ids;
use crate::gpu::would_take::would_take;
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::proxmox::running::is_alive;

/// A driver, and the module that it is in.
type Found = (Option<String>, Option<String>);

impl Handoff<'_> {
    /// `configured` is what the configuration says of the slot's GPU.
    pub(super) fn found_home(
        &self,
        slot: &Slot,
        function: &Function,
        configured: Option<&Home>,
        by_hand: bool,
    ) -> Found {
        let here = (function.driver.clone(), function.module.clone());
        let is_meant = configured.is_some_and(|home| *home == Home::Driver(VFIO_PCI.to_string()));
        if by_hand || is_meant || !function.is_on(VFIO_PCI) || self.is_static(function) {
            return here;
        }
        // On a host where nothing would take the GPU it is there for VMs alone.
        let leader = slot.gpu().filter(|gpu| gpu.is_on(VFIO_PCI) && configured.is_none());
        if leader.is_some_and(|gpu| self.is_static(gpu) || would_take(self.kernel, gpu).is_none()) {
            return here;
        }
        match would_take(self.kernel, function) {
            Some(taker) => {
                let linked = format!("/sys/bus/pci/drivers/{}/module", taker.driver);
                let module = self.kernel.link_name(&linked).ok();
                let is_built_in = module.is_none() && driver_exists(self.kernel, &taker.driver);
                (Some(taker.driver), module.or_else(|| (!is_built_in).then_some(taker.module)))
            }
            None if slot.gpu().is_some() => (None, None),
            None => here,
        }
    }

    /// By an id that the administrator gave vfio-pci, an override, which Proxmox never sets, or whatever else acts at boot.
    fn is_static(&self, function: &Function) -> bool {
        let takes = || causes::Facts::read(self.kernel, &Config::default()).causes();
        static_ids::read(self.kernel).contains(&(function.vendor, function.device))
            || read_override(self.kernel, function.address, READ_LIMIT).is_ok_and(|driver| driver.is_some())
            || takes().iter().any(|cause| cause.effect == causes::Effect::Takes)
    }

    /// Of these slots the ones that are on vfio-pci although they are at home elsewhere, and that no record names: as they
    /// would be recorded for `owner`.
    pub fn left_there(&self, owner: &Owner, slots: &[SlotId]) -> Option<Record> {
        // One that cannot be read may be the one that names them.
        let known: Vec<Record> = self.store.records().ok()?;
        let is_known = |slot: SlotId| known.iter().any(|record| record.slots().contains(&slot));
        let read = |slot: &SlotId| {
            let is_free = !is_known(*slot) && !self.store.has_call(self.kernel, *slot);
            Slot::read(self.kernel, *slot).filter(|slot| is_free && slot.functions.iter().any(|f| f.is_on(VFIO_PCI)))
        };
        let slots: Vec<Slot> = slots.iter().filter_map(read).collect();
        let record = Record { progress: Progress::Away, caller: None, ..self.record_for(owner, &slots, &[]) };
        let is_away = |slot: &Slot| {
            let is_there = |function: &Function| {
                let home = record.home_of(function.address);
                function.is_on(VFIO_PCI) && home.is_some_and(|home| home.driver.as_deref() != Some(VFIO_PCI))
            };
            slot.functions.iter().any(is_there)
        };
        let away: Vec<SlotId> = slots.iter().filter(|slot| is_away(slot)).map(|slot| slot.id).collect();
        record.only(&away)
    }

    /// Puts that on record: from now on it comes home like what was given to the VM by us.
    ///
    /// # Errors
    /// When the record cannot be written. None when there is nothing of the kind any more.
    pub fn adopt(&self, owner: &Owner, slots: &[SlotId]) -> Result<Option<Record>> {
        let locked = self.lock(self.config.time.lock, slots, &again(owner))?;
        let Some(record) = self.left_there(owner, slots) else { return Ok(None) };
        locked.save(&record)?;
        Ok(Some(record))
    }

    /// Whether the VM has what was put on record for it.
    pub fn is_running(&self, owner: &Owner) -> bool {
        owner.vmid().is_some_and(|vmid| is_alive(self.kernel, vmid))
    }
}
