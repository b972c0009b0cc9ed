//! What others wrote that would keep the GPU from changing hands, a line each. Told, never edited.

use crate::App;
use crate::address::SlotId;
use crate::causes::{self, Facts};
use crate::config::Config;
use crate::handoff::way::elsewhere::{self, Elsewhere};
use crate::sys::Kernel;
use crate::trouble::Trouble;

const DIRECTORY: &str = "/etc/modprobe.d";

/// Proxmox's own blacklist of nvidiafb.
const PVE_BLACKLIST: &str = "pve-blacklist.conf";

/// Of cards that a VM names, if they are on vfio-pci although no handoff put them there: that, and what
/// is behind it.
pub fn of_cards(app: &App, config: &Config, slots: &[SlotId]) -> Vec<String> {
    let is_named = |card: &Elsewhere| slots.contains(&card.slot);
    if !elsewhere::find(app.kernel, &app.store, config, false).iter().any(is_named) {
        return Vec::new();
    }
    find(app, config)
}

/// What shows, then what is behind it, then what to do once that is fixed.
pub fn find(app: &App, config: &Config) -> Vec<String> {
    let kernel = app.kernel;
    let causes = Facts::read(kernel, config).causes();
    let shows = elsewhere::find(kernel, &app.store, config, !causes.is_empty());
    let mut found: Vec<String> = shows.into_iter().map(|card| card.text).collect();
    let is_unexplained = causes.is_empty() && !found.is_empty();
    found.extend(causes.iter().map(ToString::to_string));
    if !causes.is_empty() {
        found.push(causes::when_fixed());
    } else if is_unexplained {
        found.push(causes::NO_CAUSE.to_string());
    }
    found.extend(renamed(kernel).map(|(_, trouble)| trouble.to_string()));
    found
}

/// Proxmox's own file under a name that its package does not know, by its path.
pub fn renamed(kernel: &dyn Kernel) -> Option<(String, Trouble)> {
    let is_renamed = |name: &String| name.starts_with("pve-blacklist") && name != PVE_BLACKLIST;
    let name = kernel.list(DIRECTORY).into_iter().find(is_renamed)?;
    let path = format!("{DIRECTORY}/{name}");
    let what = format!("{path} was Proxmox's {PVE_BLACKLIST}, which belongs to pve-manager");
    let remedy = format!("mv {path} {DIRECTORY}/{PVE_BLACKLIST}");
    Some((path, Trouble::new(what, remedy).joined(": give it its name again: ")))
}
