//! What is to leave the host.

use crate::address::SlotId;
use crate::handoff::kept::record::{HomeOf, Owner, Stopped};
use crate::proxmox::pci_id::PciId;
use std::cell::RefCell;

/// Slots that leave the host together.
pub struct Departure<'a> {
    pub owner: Owner,
    pub slots: Vec<SlotId>,
    /// By what the owner comes to them, told behind them: ` (mapping=gpu)`.
    pub by: String,
    /// What the owner's own configuration names, beside these slots: it may be in their IOMMU groups.
    pub listed: Vec<PciId>,
    /// What else the owner takes from the host, where it is now (`policy.others`).
    pub others: Vec<HomeOf>,
    /// Until the backup job ends that runs now.
    pub for_backup: bool,
    /// Called when nothing can go wrong any more but the record does not say so yet: whatever is killed before, what is
    /// half-way is put right; whatever is killed later, somebody watches.
    pub on_ready: &'a dyn Fn(),
    /// Who was asked to let go of the slots.
    pub asked: RefCell<Vec<Stopped>>,
}

impl Departure<'_> {
    /// Slots that nobody but their owner has to do with.
    pub fn of(owner: Owner, slots: Vec<SlotId>) -> Departure<'static> {
        Departure {
            owner,
            slots,
            by: String::new(),
            listed: Vec::new(),
            others: Vec::new(),
            for_backup: false,
            on_ready: &|| {},
            asked: RefCell::default(),
        }
    }
}
