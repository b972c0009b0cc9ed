//! What the metrics are made of, read. As `--status` it opens no card's node, asks no driver's library and wakes no card.

use super::metrics::{Card, Metrics, OWED, USERS};
use super::status::{Gpu, Status};
use crate::App;
use crate::config::Config;
use crate::containers::{library, record};
use crate::events::stray;
use crate::gpu::holders::{Holder, Place};
use crate::handoff::kept::owed::Owed;
use crate::sys::Kernel;

/// `status` has been read, by whom its users may be hidden from.
pub fn read(app: &App, status: &Status) -> Metrics {
    let host = status.driver.iter().map(|version| (None, version.clone()));
    Metrics {
        cards: status.gpus.iter().map(card).collect(),
        counters: app.store.counters(),
        drivers: host.chain(in_containers(app.kernel)).collect(),
        has_setup_error: status.setup_error.is_some(),
        needs_reboot: status.reboot_required,
        config_problems: Config::read(app.kernel)
            .map_or(1, |(_, problems)| problems.len() + stray::of_config(app).len()),
    }
}

/// Of those that were attached and run.
fn in_containers(kernel: &dyn Kernel) -> impl Iterator<Item = (Option<u32>, String)> {
    record::all(kernel).into_iter().filter_map(move |ctid| Some((Some(ctid), library::driver(kernel, ctid)?)))
}

fn card(gpu: &Gpu) -> Card {
    Card {
        slot: gpu.slot.id.to_string(),
        name: gpu.name.clone().unwrap_or_default(),
        owner: gpu.has.word(),
        vmid: gpu.has.vmid(),
        users: gpu.users.as_deref().map(users),
        owed: owed(gpu),
    }
}

fn users(users: &[Holder]) -> [u64; USERS.len()] {
    let [mut containers, mut vms, mut units, mut others] = [0; USERS.len()];
    for user in users {
        *match user.place {
            Place::Container(_) => &mut containers,
            Place::Vm(_) => &mut vms,
            Place::Unit(_) => &mut units,
            Place::Unknown => &mut others,
        } += 1;
    }
    [containers, vms, units, others]
}

fn owed(gpu: &Gpu) -> [u64; OWED.len()] {
    let [mut home, mut start, mut thaw, mut look] = [0; OWED.len()];
    for owed in &gpu.owed {
        *match owed {
            Owed::Home => &mut home,
            Owed::Start(_) => &mut start,
            Owed::Thaw(_) => &mut thaw,
            Owed::Look => &mut look,
        } += 1;
    }
    [home, start, thaw, look]
}
