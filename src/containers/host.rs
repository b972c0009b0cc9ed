//! How the host has the GPUs that a container is to get.

use super::record::{self};
use super::rules::{Away, Facts};
use super::{Wish, untouched};
use crate::App;
use crate::address::SlotId;
use crate::exit::{Exit, Result};
use crate::gpu::choice::choose;
use crate::gpu::inventory::{VFIO_PCI, nvidia_slots};
use crate::gpu::nodes;
use crate::gpu::nvidia::{self, Minors};
use crate::handoff::way::reconcile::nodes_to_text;
use crate::proxmox::running::is_alive;
use crate::proxmox::{running, vm};
use crate::sys::{ActError, Action, Kernel, Node};
use crate::trouble::Trouble;
use std::time::Duration;

pub(super) const UVM: &str = "nvidia-uvm";

/// Longer than loading it ever takes, unless something is stuck in the kernel.
const LOAD: Duration = Duration::from_secs(20);
const MAKE: Duration = Duration::from_secs(5);

/// The slots that were named, each once; or the only one there is.
pub(super) fn chosen(app: &App, wish: &Wish) -> Result<Vec<SlotId>> {
    if wish.gpus.is_empty() {
        return Ok(vec![choose(app.kernel, None).map_err(|exit| match nvidia_slots(app.kernel).len() {
            0 | 1 => exit,
            _ => Exit::new(exit.code, format!("{exit} (--gpu SLOT, also more than once)")),
        })?]);
    }
    let mut slots = Vec::new();
    for named in &wish.gpus {
        let slot = choose(app.kernel, Some(*named))?;
        if !slots.contains(&slot) {
            slots.push(slot);
        }
    }
    Ok(slots)
}

pub(super) fn facts(app: &App, ctid: u32, slots: &[SlotId]) -> Result<Facts> {
    Facts::read(app.kernel, slots).map_err(|away| {
        let Whose { who, then } = explain(app, ctid, &away);
        let what = format!("the numbers of {} are not known: {who}", away.slot);
        untouched(ctid, Trouble::new(what, then))
    })
}

/// Who has a GPU of the container, or any GPU if none was attached, instead of the host's driver.
pub(super) fn away(app: &App, ctid: u32) -> Option<String> {
    let kernel = app.kernel;
    let all = || nvidia_slots(kernel).into_iter().map(|slot| slot.id).collect();
    let slots = record::read(kernel, ctid).ok().flatten().map_or_else(all, |record| record.slots);
    let away = Facts::read(kernel, &slots).err()?;
    Some(format!("{}: {}", away.slot, explain(app, ctid, &away).who))
}

/// Who has a card instead of the host's driver, and what to type.
struct Whose {
    who: String,
    then: String,
}

fn explain(app: &App, ctid: u32, away: &Away) -> Whose {
    let Away { slot, driver } = away;
    let slot = *slot;
    let records = app.store.each_record().into_iter().flatten();
    let owner = records.filter(|record| record.slots().contains(&slot)).map(|record| record.owner).next();
    let vm = match &owner {
        Some(owner) => owner.vmid().filter(|vmid| is_alive(app.kernel, *vmid)),
        None => running_vm(app.kernel, slot),
    };
    let again = format!("then: gpu-handoff container attach {ctid}");
    let only = "containers can only use a GPU that NVIDIA's driver has".to_string();
    let (who, then) = match (vm, owner, driver.as_deref()) {
        _ if app.store.has_call(app.kernel, slot) => {
            ("a handoff of it is under way, or stuck".to_string(), format!("see gpu-handoff --status, {again}"))
        }
        (Some(vmid), ..) => (format!("VM {vmid} has it"), format!("stop that first: qm shutdown {vmid}, {again}")),
        (None, Some(owner), _) => {
            (format!("it was given to {owner}"), format!("bring it home first: gpu-handoff to-nvidia {slot}, {again}"))
        }
        (None, None, Some("nvidia")) if Minors::read(app.kernel).is_busy => {
            (nvidia::busy(app.kernel), format!("when that is over, {again}"))
        }
        (None, None, Some("nvidia")) => {
            let who = "the NVIDIA driver has it but does not list it in /proc/driver/nvidia/gpus";
            (who.to_string(), "see dmesg".to_string())
        }
        (None, None, Some(VFIO_PCI)) => ("it is at home on vfio-pci".to_string(), only),
        (None, None, Some(driver)) => (format!("{driver} has it"), only),
        (None, None, None) => {
            ("no driver has it".to_string(), format!("load NVIDIA's first: modprobe nvidia, {again}"))
        }
    };
    Whose { who, then }
}

/// A running VM whose configuration names the slot, when no handoff of ours gave it the card.
pub(super) fn running_vm(kernel: &dyn Kernel, slot: SlotId) -> Option<u32> {
    let names = kernel.list("/etc/pve/qemu-server");
    let vms = names.iter().filter_map(|name| name.strip_suffix(".conf")?.parse::<u32>().ok());
    vms.filter(|vmid| running::qemu_pid(kernel, *vmid).is_some()).find(|vmid| {
        let bytes = kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")).unwrap_or_default();
        let config = vm::parse(&bytes);
        let mut ids = config.hostpci.values().flat_map(vm::Hostpci::addresses);
        ids.any(|id| id.slot() == Some(slot))
    })
}

/// Nobody loads it before the first CUDA program runs, and its major is known only then: as `nvidia-modprobe -u` does.
pub(super) fn load_uvm(app: &App) -> Result<()> {
    let action = Action::Load { modules: vec![UVM.to_string()] };
    match app.kernel.act(&action, LOAD) {
        Ok(()) => app.story.say(&format!("{UVM} loaded")),
        Err(error @ ActError::Stuck { .. }) => return Err(Exit::overrun(format!("loading {UVM} {error}; see dmesg"))),
        Err(error) => {
            return Err(Exit::failed(format!("{UVM} is not loaded and could not be: {error}; try: modprobe {UVM}")));
        }
    }
    Ok(())
}

/// One that cannot be made keeps no container from being attached: the next start of one looks for it again.
pub(super) fn make_nodes(app: &App) {
    let missing = nodes::missing(app.kernel);
    let is_made = |node: &&Node| {
        let made = app.kernel.act(&Action::MakeNode((*node).clone()), MAKE);
        made.inspect_err(|error| app.story.warn(&format!("{} is missing and was not made: {error}", node.path))).is_ok()
    };
    let made: Vec<_> = missing.iter().filter(is_made).cloned().collect();
    if !made.is_empty() {
        app.story.say(&format!("device nodes {}", nodes_to_text(&made)));
    }
}
