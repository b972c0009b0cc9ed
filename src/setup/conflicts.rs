//! What others wrote that would keep the GPU from changing hands, a line each. Told, never edited.

use crate::App;
use crate::causes::{self, Cause, Facts};
use crate::config::{Config, Home};
use crate::gpu::Slot;
use crate::gpu::inventory::{long_form, nvidia_slots};
use crate::handoff::store::Store;
use crate::sys::Kernel;

const DIRECTORY: &str = "/etc/modprobe.d";

/// Proxmox's own blacklist of nvidiafb.
const PVE_BLACKLIST: &str = "pve-blacklist.conf";

/// Of cards that a VM names by these addresses, if they are on vfio-pci although no handoff put them there: that, and what
/// is behind it.
pub fn of_cards(app: &App, config: &Config, addresses: &[&str]) -> Vec<String> {
    let slots: Vec<String> = addresses.iter().map(|address| long_form(address)).collect();
    let is_named =
        |line: &String| slots.iter().any(|slot| line.split(' ').next().is_some_and(|own| slot.starts_with(own)));
    let shows = effects(&app.kernel, &app.store, config, false);
    if !shows.iter().any(is_named) {
        return Vec::new();
    }
    find(app, config)
}

/// What, of all that acts at boot, keeps this card from its home; nothing for one that is where it should be.
pub fn behind(kernel: &dyn Kernel, store: &Store, config: &Config, slot: &str) -> Vec<Cause> {
    let gpu = Slot::read(kernel, slot).and_then(|slot| slot.gpu().cloned());
    // Nearly every card is with its driver, and then nothing has to be read.
    if gpu.is_none_or(|gpu| gpu.driver.is_some_and(|driver| !causes::is_keeper(&driver))) {
        return Vec::new();
    }
    let shows = |line: &String| line.split(' ').next() == Some(slot);
    match effects(kernel, store, config, true).iter().any(shows) {
        true => Facts::read(kernel, config).causes(),
        false => Vec::new(),
    }
}

/// What shows, then what is behind it, then what to do once that is mended.
pub fn find(app: &App, config: &Config) -> Vec<String> {
    let kernel = &app.kernel;
    let causes = Facts::read(kernel, config).causes();
    let mut found = effects(kernel, &app.store, config, !causes.is_empty());
    let is_unexplained = causes.is_empty() && !found.is_empty();
    found.extend(causes.iter().map(ToString::to_string));
    if !causes.is_empty() {
        found.push(causes::THEN.to_string());
    } else if is_unexplained {
        found.push(causes::NO_CAUSE.to_string());
    }
    found.extend(renamed(kernel));
    found
}

/// Cards that are on vfio-pci, or another driver that is not their home, although nothing of ours put them there; and
/// those without a driver, where something `is_blocked` or the driver is loaded.
fn effects(kernel: &dyn Kernel, store: &Store, config: &Config, is_blocked: bool) -> Vec<String> {
    let records: Vec<_> = store.each_record().into_iter().flatten().collect();
    let mut told = Vec::new();
    for slot in nvidia_slots(kernel) {
        let is_ours = records.iter().any(|record| record.slots().contains(&slot.address.as_str()));
        let home = config.homes.get(&slot.address);
        let Some(gpu) = slot.gpu().filter(|_| !is_ours) else { continue };
        let is_driver_there = is_blocked || kernel.exists("/sys/module/nvidia");
        match gpu.driver.as_deref() {
            Some(driver) if home == Some(&Home::Driver(driver.to_string())) => {}
            Some(driver) if causes::is_keeper(driver) => {
                told.push(format!(
                    "{} is on {driver}, and no handoff put it there: the host does not have it",
                    slot.address
                ));
            }
            // That there is no driver yet is no fault.
            None if home != Some(&Home::None) && is_driver_there => {
                told.push(format!("{} has no driver", slot.address));
            }
            _ => {}
        }
    }
    told
}

fn renamed(kernel: &dyn Kernel) -> Option<String> {
    let is_renamed = |name: &String| name.starts_with("pve-blacklist") && name != PVE_BLACKLIST;
    let name = kernel.list(DIRECTORY).into_iter().find(is_renamed)?;
    Some(format!(
        "{DIRECTORY}/{name} was Proxmox's {PVE_BLACKLIST}, which belongs to pve-manager: give it its name again: mv \
         {DIRECTORY}/{name} {DIRECTORY}/{PVE_BLACKLIST}"
    ))
}
