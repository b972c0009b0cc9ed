//! What this program left behind, or lacks: records, calls that hang, units, nodes, ids and overrides.

use super::guests::Guests;
use super::host::Host;
use crate::App;
use crate::address::Address;
use crate::causes::{self, Effect};
use crate::config::{Config, Home};
use crate::events::stray;
use crate::gpu::inventory::VFIO_PCI;
use crate::gpu::{Function, Slot, containers, nodes, static_ids};
use crate::proxmox::running::is_alive;
use crate::report::status::{Fault, Status};
use crate::setup::hookscript::{self, PROGRAM};
use crate::sys::{Kernel, Node};
use crate::systemd;
use crate::trouble::Trouble;

/// Of the package; who runs without it has none of them.
const UNITS: [&str; 4] = [
    "gpu-handoff-reconcile.service",
    "gpu-handoff-setup.service",
    "gpu-handoff-keeper.path",
    "gpu-handoff-keeper.service",
];
const UNIT_FOLDERS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];

pub const RULES: &str = "/usr/lib/udev/rules.d/60-gpu-handoff.rules";
pub const OWN_RULES: &str = "/etc/udev/rules.d/60-gpu-handoff.rules";

pub struct Ours {
    pub are_rules_hidden: bool,
    pub faults: Vec<Fault>,
    /// In the configuration, a line each.
    pub mistakes: Vec<(&'static str, String)>,
    /// Its slots that are no GPU's.
    pub slots: Vec<Trouble>,
    pub masked: Vec<String>,
    pub failed: Vec<String>,
    /// What is wrong with the link that guests name as their hookscript.
    pub link: Link,
    pub missing: Vec<Node>,
    /// A container is given nvidia-uvm's node, and the driver runs without that module.
    pub lacks_uvm: bool,
    /// Addresses whose override nobody needs, with what it says.
    pub overrides: Vec<(Address, String)>,
    /// Addresses that a dynamic id has given to vfio-pci, with the id.
    pub ids: Vec<(Address, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    Fine,
    Missing,
    Another(Trouble),
    /// It is there, and this program is not where it points to.
    Dead,
}

impl Ours {
    /// `status`: what was read already, and then no program is run either.
    pub fn read(
        app: &App,
        config: &Config,
        slots: &[Slot],
        host: &Host,
        guests: &Guests,
        status: Option<&Status>,
    ) -> Ours {
        let kernel = app.kernel;
        let faults = match status {
            None => Status::read(kernel, &app.store, nix::unistd::geteuid().is_root()).each_fault(),
            Some(status) => status.each_fault(),
        };
        let installed =
            UNITS.iter().filter(|unit| UNIT_FOLDERS.iter().any(|folder| kernel.exists(&format!("{folder}/{unit}"))));
        let installed: Vec<&str> = installed.copied().collect();
        let uvm = || kernel.exists("/sys/module/nvidia") && !kernel.exists("/sys/module/nvidia_uvm");
        let mut ours = Ours {
            faults,
            are_rules_hidden: kernel.exists(RULES) && (kernel.exists(OWN_RULES) || kernel.link_name(OWN_RULES).is_ok()),
            slots: stray::of_config(app),
            masked: installed.iter().filter(|unit| is_masked(kernel, unit)).map(ToString::to_string).collect(),
            failed: if status.is_none() { failed(kernel, &installed) } else { Vec::new() },
            link: link(kernel),
            missing: containers::missing_nodes(kernel),
            lacks_uvm: uvm() && guests.containers.iter().any(|one| one.given.iter().any(|given| given.has(nodes::UVM))),
            overrides: Vec::new(),
            ids: Vec::new(),
            mistakes: Vec::new(),
        };
        let takes = host.causes.iter().any(|cause| cause.effect == Effect::Takes);
        let records = app.store.each_record();
        // What a record names is still ours, and what cannot be read may name anything.
        let is_recorded = |slot: &Slot| {
            records.iter().any(|record| record.as_ref().map_or(true, |record| record.slots().contains(&slot.id)))
        };
        for slot in slots.iter().filter(|slot| !takes && !is_recorded(slot) && !app.store.has_call(kernel, slot.id)) {
            let is_used = guests.vms.iter().any(|vm| vm.slots.contains(&slot.id) && is_alive(kernel, vm.id));
            let home = config.homes.get(&slot.id);
            if !is_used && home != Some(&Home::Driver(VFIO_PCI.to_string())) {
                ours.add_leftovers(kernel, slot);
            }
        }
        ours
    }

    fn add_leftovers(&mut self, kernel: &dyn Kernel, slot: &Slot) {
        let fixed = static_ids::read(kernel);
        let theirs = kernel.list("/etc/driverctl.d");
        let is_driverctls = |one: &Function| theirs.iter().any(|name| name.ends_with(&one.address.to_string()));
        let is_fixed = |one: &Function| fixed.contains(&(one.vendor, one.device));
        for function in slot.functions.iter().filter(|one| !is_driverctls(one)) {
            match (function.driver.as_deref(), &function.driver_override) {
                (driver, Some(text)) if !causes::is_keeper(text) || driver != Some(text) => {
                    self.overrides.push((function.address, text.clone()));
                }
                (Some(VFIO_PCI), None) if !is_fixed(function) => {
                    let id = format!("{:04x} {:04x}", function.vendor, function.device);
                    self.ids.push((function.address, id));
                }
                _ => {}
            }
        }
    }
}

fn is_masked(kernel: &dyn Kernel, unit: &str) -> bool {
    let folders = ["/etc/systemd/system", "/run/systemd/system"];
    folders.iter().any(|folder| kernel.link_name(&format!("{folder}/{unit}")).is_ok_and(|name| name == "null"))
}

/// One question for all of them.
fn failed(kernel: &dyn Kernel, units: &[&str]) -> Vec<String> {
    if units.is_empty() {
        return Vec::new();
    }
    let mut line = vec!["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager", "--"];
    line.extend(units);
    let said = kernel.program(systemd::SYSTEMCTL, &line, systemd::ANSWER).unwrap_or_default();
    said.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_string).collect()
}

fn link(kernel: &dyn Kernel) -> Link {
    match hookscript::link_is_missing(kernel) {
        Ok(true) => Link::Missing,
        Ok(false) if kernel.exists(PROGRAM) => Link::Fine,
        Ok(false) => Link::Dead,
        Err(exit) => Link::Another(exit.trouble),
    }
}
