//! What may be asked for.

use crate::containers::{Who, Wish};
use crate::events::watch::After;
use crate::handoff::way::reconcile::Scope;
use crate::setup;

/// A whole command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    pub call: Call,
    /// Only warnings and errors are told.
    pub quiet: bool,
}

/// One for each verb.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    Hook { id: u32, phase: String },
    Status { json: bool, check: bool },
    History { json: bool, vmid: Option<u32>, count: Option<usize> },
    ToVfio { slot: Option<String>, dry_run: bool },
    ToNvidia { slot: Option<String>, dry_run: bool },
    Plan { vmid: u32, json: bool },
    Reconcile { scope: Scope, dry_run: bool },
    Resume,
    Watch { vmid: u32, after: After },
    Attach { ctid: u32, wish: Wish, dry_run: bool },
    Detach { ctid: u32, dry_run: bool },
    Setup { ctid: u32, wish: Wish, driver_only: bool, dry_run: bool },
    Check { who: Who },
    Sync { who: Who, dry_run: bool },
    Enable { id: u32, dry_run: bool },
    Disable { id: u32, dry_run: bool },
    SetUp { what: setup::What, dry_run: bool },
    ConfigCheck,
    ConfigShow,
    Udev,
    Settle,
    Help { topic: String },
    Everyday,
    Version,
}

impl Call {
    /// Whether anything on this machine may be another after it.
    pub(super) fn changes(&self) -> bool {
        matches!(
            self,
            Call::ToVfio { dry_run: false, .. }
                | Call::ToNvidia { dry_run: false, .. }
                | Call::Reconcile { dry_run: false, .. }
                | Call::Resume
                | Call::Watch { .. }
                | Call::Attach { dry_run: false, .. }
                | Call::Detach { dry_run: false, .. }
                | Call::Setup { dry_run: false, .. }
                | Call::Sync { dry_run: false, .. }
                | Call::Enable { dry_run: false, .. }
                | Call::Disable { dry_run: false, .. }
                | Call::SetUp { dry_run: false, .. }
                | Call::Udev
                | Call::Settle
        )
    }
}
