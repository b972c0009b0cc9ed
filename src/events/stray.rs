//! A VM that has our hookscript and takes no NVIDIA GPU. With a card more or less in the host, addresses shift: then the
//! line that named the GPU names somebody else's device, which Proxmox takes from the host without asking.

use crate::App;
use crate::address::{SlotId, list};
use crate::config::{self, Config};
use crate::exit::{Exit, Result};
use crate::gpu::inventory::{VFIO_PCI, nvidia_slots};
use crate::gpu::{Function, Slot};
use crate::proxmox::mapping;
use crate::proxmox::pci_id::PciId;
use crate::proxmox::vm::{Driver, Hostpci, VmConfig};
use crate::sys::Kernel;
use crate::trouble::Trouble;

/// A device that a line of the VM names, and that is none of NVIDIA's.
struct Stray {
    /// Of its `hostpci` line; none where it is in `args`.
    index: Option<u32>,
    raw: String,
    /// As it is written: an address, or `mapping=NAME`.
    id: String,
    slot: SlotId,
    function: Function,
}

/// Whether this program is the VM's hookscript, on whatever storage the link to it lies.
pub fn has_hook(vm: &VmConfig) -> bool {
    vm.hookscript.as_deref().is_some_and(|volume| volume.ends_with(":snippets/gpu-handoff"))
}

/// What there is to say of a VM that takes no NVIDIA GPU.
pub enum Remark {
    /// It must not start: a GPU was where the host has another device in use now.
    Refused(Trouble),
    Told(Trouble),
}

/// For a VM that takes no NVIDIA GPU.
///
/// # Errors
/// When a GPU was where the host has another device in use now.
pub fn look(app: &App, vmid: u32, vm: &VmConfig) -> Result<()> {
    match remark(app, vmid, vm) {
        Some(Remark::Refused(why)) => Err(Exit::refused(why.of(&format!("VM {vmid} was not started")))),
        Some(Remark::Told(what)) => {
            app.story.warn(&what.to_string());
            Ok(())
        }
        None => Ok(()),
    }
}

/// As [`look`], and tells nobody.
pub fn remark(app: &App, vmid: u32, vm: &VmConfig) -> Option<Remark> {
    if !has_hook(vm) {
        return None;
    }
    let strays = strays(app, vm);
    // What is in `args` Proxmox takes from nobody: QEMU ends without it.
    for (stray, index) in strays.iter().filter_map(|stray| Some((stray, stray.index?))) {
        let Some(why) = was_gpu(app, vmid, stray.slot) else { continue };
        let Some(driver) = stray.function.driver.as_deref().filter(|driver| !matches!(*driver, VFIO_PCI | "pci-stub"))
        else {
            continue;
        };
        let what = format!(
            "hostpci{index} names {}, where an NVIDIA GPU was ({why}) and now is {}, which {driver} has: addresses shift with \
             what is in the host, and Proxmox would take that device from it",
            stray.id,
            what(&stray.function),
        );
        let keep = format!("if VM {vmid} shall have that device: gpu-handoff disable {vmid}");
        return Some(Remark::Refused(Trouble::new(what, where_now(app, vmid, vm, stray)).and(&keep)));
    }
    strays.first().map(|stray| {
        let driver = stray.function.driver.as_deref().map_or_else(String::new, |driver| format!(" ({driver} has it)"));
        let what = format!(
            "VM {vmid} has this hookscript and takes no NVIDIA GPU: {} names {}, which is {}{driver}",
            stray.index.map_or_else(|| "args".to_string(), |index| format!("hostpci{index}")),
            stray.id,
            what(&stray.function),
        );
        Remark::Told(Trouble::new(what, where_now(app, vmid, vm, stray)))
    })
}

/// Where to look for a device that is not there: with the GPUs, unless the VM names one of these.
pub fn instead_of_nothing(kernel: &dyn Kernel, vmid: u32, index: u32, vm: &VmConfig, written: &str) -> String {
    let gpus: Vec<SlotId> = nvidia_slots(kernel).into_iter().map(|slot| slot.id).collect();
    let is_named = |gpu: &SlotId| {
        let mut ids = vm.hostpci.values().flat_map(Hostpci::addresses).chain(vm.args.ids.iter().cloned());
        ids.any(|id| id.slot() == Some(*gpu))
    };
    let raw = vm.hostpci.get(&index).map_or_else(|| written.to_string(), |hostpci| hostpci.raw.clone());
    match gpus.as_slice() {
        [gpu] if !is_named(gpu) && raw.contains(written) && PciId::parse(written).is_some() => {
            format!(
                "the NVIDIA GPU is at {gpu} now: qm set {vmid} --hostpci{index} {}",
                raw.replacen(written, &gpu.to_string(), 1)
            )
        }
        _ => "lspci -D shows what there is".to_string(),
    }
}

/// What a person who asks about such a VM should know beside that.
pub fn nothing_named(app: &App, vmid: u32, vm: &VmConfig) -> Option<Trouble> {
    let names_none = vm.hostpci.is_empty() && vm.doubtful.is_empty() && vm.args.ids.is_empty();
    let gpus = gpus(app);
    (names_none && !gpus.is_empty()).then(|| {
        let each: Vec<String> =
            gpus.iter().map(|slot| format!("qm set {vmid} --hostpci0 {}", vm.hostpci_of(slot))).collect();
        Trouble::new(format!("VM {vmid} names no device yet (hostpci)"), each.join(", or: ")).joined(": ")
    })
}

/// Slots of the configuration that are no GPU's.
pub fn of_config(app: &App) -> Vec<Trouble> {
    let config = Config::own(app.kernel);
    let is_gpu = |slot: SlotId| Slot::read(app.kernel, slot).is_some_and(|slot| slot.is_nvidia_gpu());
    let others = config.homes.keys().filter(|slot| !is_gpu(**slot));
    let gpus = gpus(app);
    others
        .map(|slot| {
            let there = if gpus.is_empty() { "none".to_string() } else { list(&gpus) };
            let what = format!("gpus.{slot} in {} names no NVIDIA GPU", config::PATH);
            Trouble::new(what, format!("those of this host: {there}"))
        })
        .collect()
}

fn gpus(app: &App) -> Vec<SlotId> {
    nvidia_slots(app.kernel).into_iter().map(|slot| slot.id).collect()
}

fn strays(app: &App, vm: &VmConfig) -> Vec<Stray> {
    let doubtful = vm.doubtful.iter().map(|(index, doubtful)| (index, &doubtful.line));
    let mut named: Vec<(Option<u32>, String, String, PciId)> = Vec::new();
    for (index, hostpci) in vm.hostpci.iter().chain(doubtful) {
        if hostpci.driver == Driver::Keep || hostpci.mdev.is_some() {
            continue;
        }
        let ids = hostpci.ids.iter().map(|written| (written.text.clone(), written.id.clone()));
        let mapping = hostpci.mapping.iter();
        let mapped =
            mapping.flat_map(|name| mapping::on_this_node(app.kernel, name).into_iter().map(move |id| (name, id)));
        let mapped = mapped.map(|(name, id)| (format!("mapping={name}"), id));
        named.extend(ids.chain(mapped).map(|(written, id)| (Some(*index), hostpci.raw.clone(), written, id)));
    }
    named.extend(vm.args.ids.iter().map(|id| (None, String::new(), id.slot_name(), id.clone())));
    let stray = |(index, raw, id, pci): (Option<u32>, String, String, PciId)| {
        let slot = Slot::read(app.kernel, pci.slot()?)?;
        // A part of an NVIDIA card, or a virtual one, is meant.
        if slot.functions.iter().any(|function| function.vendor == NVIDIA) {
            return None;
        }
        let function = slot.functions.into_iter().find(|function| pci.covers(function.address))?;
        Some(Stray { index, raw, id, slot: slot.id, function })
    };
    named.into_iter().filter_map(stray).collect()
}

const NVIDIA: u16 = 0x10de;

/// Who says that there was a GPU in this slot.
fn was_gpu(app: &App, vmid: u32, slot: SlotId) -> Option<String> {
    if Config::own(app.kernel).homes.contains_key(&slot) {
        return Some(format!("gpus.{slot} in {}", config::PATH));
    }
    let past = app.store.history()?.read().ok()?;
    let had_it = past.entries.iter().any(|entry| {
        let slots = entry.get("slots").and_then(|slots| slots.as_array()).into_iter().flatten();
        entry.get("vmid").and_then(|id| id.as_u64()) == Some(u64::from(vmid))
            && entry.get("exit").and_then(|exit| exit.as_u64()) == Some(0)
            && slots.filter_map(|slot| slot.as_str()).any(|other| other.parse() == Ok(slot))
    });
    had_it.then(|| format!("VM {vmid} had it before, see gpu-handoff history"))
}

/// `144d:a808 (class 0108)`
fn what(function: &Function) -> String {
    format!("{:04x}:{:04x} (class {:04x})", function.vendor, function.device, function.class >> 8)
}

fn where_now(app: &App, vmid: u32, vm: &VmConfig, stray: &Stray) -> String {
    let gpus = gpus(app);
    let free = || (0..).find(|index| !vm.hostpci.contains_key(index) && !vm.doubtful.contains_key(index));
    let line = |gpu: &SlotId| match stray.index {
        Some(index) => {
            format!("qm set {vmid} --hostpci{index} {}", stray.raw.replacen(&stray.id, &gpu.to_string(), 1))
        }
        None => format!(
            "qm set {vmid} --hostpci{} {}, and take {} out of args",
            free().unwrap_or_default(),
            vm.hostpci_of(gpu),
            stray.id
        ),
    };
    match gpus.as_slice() {
        [] => "this host has no NVIDIA GPU now; lspci -nn shows what there is".to_string(),
        [gpu] => format!("the NVIDIA GPU is at {gpu} now: {}", line(gpu)),
        several => {
            let each: Vec<String> = several.iter().map(line).collect();
            format!("NVIDIA GPUs are at {} now: {}", list(several), each.join(", or: "))
        }
    }
}
