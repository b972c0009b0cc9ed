//! What a VM takes from the host beside its GPU: a USB controller, a disk, a network card. Proxmox takes it without asking
//! who uses it, and never gives it back (`policy.others`).

use super::mapped::{Named, slot_of};
use crate::App;
use crate::address::SlotId;
use crate::config::Config;
use crate::exit::{Exit, Result};
use crate::gpu::Function;
use crate::gpu::behind;
use crate::gpu::inventory::VFIO_PCI;
use crate::gpu::power::Power;
use crate::handoff::kept::record::HomeOf;
use crate::proxmox::vm::{Driver, VmConfig};

/// Where those are that Proxmox will take when this VM starts; none unless they are to come home. `slots` are handed over
/// anyway.
///
/// # Errors
/// Refused when the host cannot do without one.
pub fn of(
    app: &App,
    config: &Config,
    vmid: u32,
    vm: &VmConfig,
    (slots, named): (&[SlotId], &Named),
) -> Result<Vec<HomeOf>> {
    let come_home = config.policy.brings_others_home;
    let mut homes: Vec<HomeOf> = Vec::new();
    for function in taken(app, vm, named, slots) {
        if homes.iter().any(|home| home.address == function.address) {
            continue;
        }
        if let Some(why) = behind::in_use(app.kernel, &function) {
            if come_home {
                let why = why.and(&format!("then start VM {vmid} again: qm start {vmid}"));
                return Err(Exit::refused(why.of(&format!("VM {vmid} was not started"))));
            }
            app.story.warn(&format!("VM {vmid} takes from the host what it uses: {}", why.what));
        }
        // Whether it may sleep is nobody's business here.
        homes.push(HomeOf { power: Power::default(), ..HomeOf::now(app.kernel, &function) });
    }
    Ok(if come_home { homes } else { Vec::new() })
}

/// Functions with a driver of the host's that a `hostpci` line names.
fn taken(app: &App, vm: &VmConfig, named: &Named, slots: &[SlotId]) -> Vec<Function> {
    let lines = vm.hostpci.iter().filter(|(_, line)| line.driver != Driver::Keep && line.mdev.is_none());
    let ids = lines.filter_map(|(index, _)| named.ids.get(index)).flatten();
    let mut functions = Vec::new();
    for id in ids {
        let Some(slot) = slot_of(app.kernel, id).filter(|slot| !slots.contains(&slot.id)) else { continue };
        let is_meant = |function: &Function| id.covers(function.address) && is_at_home(function);
        functions.extend(slot.functions.into_iter().filter(is_meant));
    }
    functions
}

fn is_at_home(function: &Function) -> bool {
    function.driver.as_deref().is_some_and(|driver| !matches!(driver, VFIO_PCI | "pci-stub"))
}
