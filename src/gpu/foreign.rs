//! A remove that hangs and is none of ours.

use super::inventory::{Function, Slot};
use super::nvidia::{self, InKernel};
use crate::address::{Address, SlotId};
use crate::sys::Kernel;
use serde_json::{Value, json};
use std::fmt;
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    address: Address,
    /// Who asked for it, as far as can be seen.
    pub who: Option<InKernel>,
}

impl Foreign {
    /// The driver link goes before the driver's remove is called, and the driver's own entry at its end. `has_call`: one
    /// of ours is at work on the slot or stuck there, and may be that very call.
    pub fn find(kernel: &dyn Kernel, slot: &Slot, has_call: impl Fn() -> bool) -> Option<Foreign> {
        let is_leaving =
            |gpu: &&Function| gpu.driver.is_none() && kernel.exists(&format!("{}/{}", nvidia::GPUS, gpu.address));
        let address = slot.functions.iter().find(is_leaving).filter(|_| !has_call())?.address;
        Some(Foreign { address, who: nvidia::in_the_driver(kernel, &["nv_pci_remove"]) })
    }

    /// As [`Foreign::find`], of one that is not through within `limit`.
    pub fn wait(kernel: &dyn Kernel, slot: SlotId, limit: Duration, has_call: impl Fn() -> bool) -> Option<Foreign> {
        let end = kernel.now() + limit;
        loop {
            let found = Foreign::find(kernel, &Slot::read(kernel, slot)?, &has_call)?;
            if kernel.now() >= end {
                return Some(found);
            }
            kernel.sleep(LOOK_AGAIN);
        }
    }

    pub fn step(&self) -> String {
        format!("unbind from nvidia {}", self.address)
    }

    pub fn to_json(&self) -> Value {
        json!({"step": self.step(), "pid": self.who.as_ref().map(|who| who.pid), "start": null, "since": null})
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} does not come back, which gpu-handoff did not ask for: ", self.step())?;
        match &self.who {
            Some(who) => write!(f, "PID {} ({}) is in it", who.pid, who.command),
            None => write!(f, "the driver still lists it in {}", nvidia::GPUS),
        }
    }
}
