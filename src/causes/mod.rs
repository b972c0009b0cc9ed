//! What, beside a handoff, decides who has a card when the host has booted: whatever keeps the home driver away from it,
//! gives it to vfio-pci, or removes it. Everything that matters is read once; finding is pure.
//!
//! Of each the place is told, what it does, and what to type. None of it is ours to change.

mod cause;
pub mod cmdline;
mod directives;
mod facts;
mod glob;
mod ids;
mod scripts;
mod udev;

use crate::address::SlotId;
use crate::config::{Config, Home};
use crate::gpu::inventory::{VFIO_PCI, nvidia_slots};
use crate::modprobe;
use crate::sys::Kernel;

pub use cause::{Cause, Effect, NO_CAUSE, THEN, replace, take_out, when_fixed};
pub use facts::{Facts, Function, RuleFile, Script, ScriptKind, Words};
pub use ids::is_keeper;

/// Our own file with what modprobe is told.
pub(super) const OURS: &str = "/etc/modprobe.d/gpu-handoff.conf";

const NVIDIA: [&str; 4] = ["nvidia", "nvidia_drm", "nvidia_modeset", "nvidia_uvm"];

impl Facts {
    pub fn read(kernel: &dyn Kernel, config: &Config) -> Facts {
        let slots = nvidia_slots(kernel);
        let home = |slot: SlotId| config.homes.get(&slot).cloned();
        let (mut functions, mut modules) = (Vec::new(), Vec::new());
        let mut needs = |names: &[&str]| {
            for name in names {
                if !modules.iter().any(|other| other == name) {
                    modules.push((*name).to_string());
                }
            }
        };
        for slot in &slots {
            match home(slot.id) {
                None => needs(&NVIDIA),
                Some(Home::Driver(driver)) if driver == "nvidia" => needs(&NVIDIA),
                Some(Home::Driver(driver)) if driver == VFIO_PCI => continue,
                Some(Home::Driver(driver)) => needs(&[&modprobe::module(&driver)]),
                Some(Home::None) => continue,
            }
            functions.extend(slot.functions.iter().map(|function| {
                let ids = (u32::from(function.vendor), u32::from(function.device));
                Function::read(kernel, function.address, ids.0, ids.1, function.class)
            }));
        }
        if slots.is_empty() {
            needs(&NVIDIA);
        }
        Facts {
            functions,
            has_card: !slots.is_empty(),
            modules,
            directives: modprobe::read(kernel).into_iter().filter(|line| line.place.path != OURS).collect(),
            command_lines: cmdline::read(kernel),
            rules: udev::read(kernel),
            scripts: scripts::read(kernel),
            overrides: scripts::overrides(kernel),
            has_driverctl: kernel.exists("/usr/sbin/driverctl"),
        }
    }

    /// Every cause that was found. Pure.
    pub fn causes(&self) -> Vec<Cause> {
        if self.has_card && self.functions.is_empty() {
            return Vec::new();
        }
        let mut causes = cmdline::find(self);
        causes.extend(directives::find(self));
        causes.extend(scripts::find(self));
        causes.extend(udev::find(self));
        causes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with one card whose home is nvidia, and nothing in its way.
    pub fn facts() -> Facts {
        let function = |number: u8, device: u32, class: u32| Function {
            address: Some("0000:01:00".parse::<SlotId>().unwrap().function(number)),
            vendor: 0x10de,
            device,
            subvendor: 0x1043,
            subdevice: 0x88e2,
            class,
            modalias: format!(
                "pci:v000010DEd{device:08X}sv00001043sd000088E2bc{:02X}sc{:02X}i00",
                class >> 16,
                class >> 8 & 0xff
            ),
        };
        Facts {
            functions: vec![function(0, 0x2684, 0x03_0000), function(1, 0x22ba, 0x04_0300)],
            has_card: true,
            modules: NVIDIA.map(str::to_string).to_vec(),
            directives: Vec::new(),
            command_lines: Vec::new(),
            rules: Vec::new(),
            scripts: Vec::new(),
            overrides: Vec::new(),
            has_driverctl: false,
        }
    }

    #[test]
    fn nothing_is_in_the_way_of_cards_that_are_not_to_have_a_driver() {
        let directives = || modprobe::parse("/etc/modprobe.d/x.conf", "blacklist nvidia\nblacklist nouveau\n");
        let count = |facts: Facts| facts.causes().len();
        assert_eq!(count(Facts { directives: directives(), ..facts() }), 1);
        let on_vfio = Facts { functions: Vec::new(), modules: Vec::new(), directives: directives(), ..facts() };
        assert_eq!(count(on_vfio), 0);
        let on_nouveau = Facts { modules: vec!["nouveau".to_string()], directives: directives(), ..facts() };
        assert_eq!(on_nouveau.causes()[0].text, "blacklist nouveau");
    }

    #[test]
    fn a_cause_is_one_line_with_what_to_type() {
        let directives = modprobe::parse("/etc/modprobe.d/x.conf", "\nblacklist nvidia_uvm\n");
        assert_eq!(
            Facts { directives, ..facts() }.causes()[0].to_string(),
            "/etc/modprobe.d/x.conf:2: blacklist nvidia_uvm keeps nvidia_uvm from being loaded at boot, which CUDA in \
             containers needs; to take it out: sed -i '2s/^/# /' /etc/modprobe.d/x.conf"
        );
    }
}
