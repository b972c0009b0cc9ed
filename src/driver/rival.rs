//! Drivers that have a card which is to be NVIDIA's driver's at home.

use crate::address::SlotId;
use crate::causes;
use crate::config::{Config, Home};
use crate::gpu::inventory::nvidia_slots;
use crate::sys::Kernel;
use std::fmt;

/// Those of the kernel itself, by their modules: nouveau, and from 7.0 on nova.
pub const RIVALS: [&str; 3] = ["nouveau", "nova_core", "nova_drm"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    /// The slot of the card that it has; none of a module that is only loaded.
    pub slot: Option<SlotId>,
    pub driver: String,
    /// None when it is built into the kernel.
    pub module: Option<String>,
}

impl fmt::Display for Rival {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.module {
            Some(module) if *module != self.driver => write!(f, "{} ({module})", self.driver)?,
            _ => f.write_str(&self.driver)?,
        }
        match &self.slot {
            Some(slot) => write!(f, " has {slot}"),
            None => f.write_str(" is loaded"),
        }
    }
}

/// Whoever has a card now that is neither NVIDIA's driver, nor one that keeps it for VMs, nor its home by configuration.
pub fn on_cards(kernel: &dyn Kernel, config: &Config) -> Vec<Rival> {
    let slots = nvidia_slots(kernel).into_iter();
    let one = |slot: crate::gpu::Slot| {
        let gpu = slot.gpu()?;
        let driver = gpu.driver.clone()?;
        let is_home = config.homes.get(&slot.id) == Some(&Home::Driver(driver.clone()));
        let is_none = driver == "nvidia" || is_home || causes::is_keeper(&driver);
        let rival = || Rival { slot: Some(slot.id), module: gpu.module.clone(), driver };
        (!is_none).then(rival)
    };
    slots.filter_map(one).collect()
}

/// Those, and whichever of the known ones is loaded: it takes each card that no other driver has.
pub fn all(kernel: &dyn Kernel, config: &Config) -> Vec<Rival> {
    let mut all = on_cards(kernel, config);
    let is_home = |name: &str| config.homes.values().any(|home| *home == Home::Driver(name.to_string()));
    for name in RIVALS {
        let is_told = all.iter().any(|rival| rival.module.as_deref() == Some(name));
        if !is_told && !is_home(name) && kernel.exists(&format!("/sys/module/{name}")) {
            all.push(Rival { slot: None, driver: name.to_string(), module: Some(name.to_string()) });
        }
    }
    all
}
