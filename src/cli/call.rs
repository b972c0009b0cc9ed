//! What may be asked for.

use crate::address::SlotId;
use crate::containers::{Who, Wish};
use crate::doctor;
use crate::events::watch::After;
use crate::handoff::way::reconcile::Scope;
use crate::setup;

/// A whole command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    pub call: Call,
    /// Only warnings and errors are told.
    pub quiet: bool,
    /// Nothing is changed: what would be done is told.
    pub dry_run: bool,
}

/// One for each verb.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    Hook { id: u32, phase: String },
    Status { json: bool, check: bool },
    WatchStatus { json: bool },
    ClusterStatus { json: bool },
    Doctor(doctor::Wish),
    History { json: bool, vmid: Option<u32>, count: Option<usize> },
    Metrics { write: bool },
    Notify { test: bool },
    ToVfio { slot: Option<SlotId> },
    ToNvidia { slot: Option<SlotId> },
    Plan { vmid: u32, json: bool },
    Switch { vmid: u32 },
    Reconcile { scope: Scope },
    Resume,
    Watch { vmid: u32, after: After },
    Attach { ctid: u32, wish: Wish },
    Detach { ctid: u32 },
    ContainerSetup { ctid: u32, wish: Wish, driver_only: bool },
    Check { who: Who },
    Sync { who: Who },
    Enable { id: u32, storage: Option<String> },
    Disable { id: u32 },
    HostSetup { what: setup::What },
    ConfigCheck,
    ConfigShow,
    Udev,
    Settle,
    Publish,
    Vzdump { words: Vec<String> },
    Help { topic: String },
    Everyday,
    Version,
}

impl Asked {
    /// Whether anything on this machine may be another after it.
    pub(super) fn changes(&self) -> bool {
        let may = matches!(
            self.call,
            Call::ToVfio { .. }
                | Call::ToNvidia { .. }
                | Call::Switch { .. }
                | Call::Reconcile { .. }
                | Call::Resume
                | Call::Watch { .. }
                | Call::Attach { .. }
                | Call::Detach { .. }
                | Call::ContainerSetup { .. }
                | Call::Sync { .. }
                | Call::Enable { .. }
                | Call::Disable { .. }
                | Call::HostSetup { .. }
                | Call::Metrics { write: true }
                | Call::Notify { .. }
                | Call::Doctor(doctor::Wish { how: doctor::How::Fix, .. })
                | Call::Udev
                | Call::Settle
                | Call::Publish
                | Call::Vzdump { .. }
        );
        may && !self.dry_run
    }
}
