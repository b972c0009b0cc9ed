//! Where the threads and interrupts of a VM are that has a GPU, and what of that is not as configured.

use crate::config::Config;
use crate::handoff::plan::pin::{Facts, Placed, There, changes, judge};
use crate::json::put;
use crate::proxmox::running;
use crate::sys::Kernel;
use serde_json::Value;

pub struct Pinned {
    placed: Placed,
    differs: Vec<String>,
}

impl Pinned {
    /// None for a VM that is not to be pinned, and costs nothing then.
    pub fn read(kernel: &dyn Kernel, config: &Config, vmid: u32) -> Option<Pinned> {
        let wish = config.pin_of(vmid)?;
        let qemu = running::qemu_pid(kernel, vmid)?;
        let (pin, mut differs) = judge(vmid, wish, &Facts::of_vm(kernel, wish, vmid, Some(qemu)));
        let there = There::read(kernel, vmid, qemu, &pin);
        let changes = changes(&pin, &there);
        if !changes.is_empty() {
            differs.push(format!("not as configured, which is {}", Placed::of(&changes)));
        }
        Some(Pinned { placed: there.placed(), differs })
    }

    pub fn to_json(&self) -> Value {
        let mut value = self.placed.to_json();
        put(&mut value, "differs", self.differs.as_slice());
        value
    }

    pub fn lines(&self) -> impl Iterator<Item = String> {
        [self.placed.to_string()].into_iter().chain(self.differs.iter().cloned())
    }
}
