//! Proxmox runs `gpu-handoff ID PHASE` around a guest's life (PVE::GuestHelpers::exec_hookscript).
//!
//! Only pre-start can stop what Proxmox is doing, so everything that can say no says so there. A guest without a GPU
//! costs one read of its configuration.

use super::mapped::{self, Named, Unusable, slot_of, takes_gpu, takes_part};
use super::stray;
use super::watch::{self, After};
use super::{backup, companions, container, nodes};
use crate::App;
use crate::address::{SlotId, list};
use crate::config::Config;
use crate::exit::{Code, Exit, Result};
use crate::gpu::Slot;
use crate::handoff::Handoff;
use crate::handoff::kept::record::{Owner, Progress};
use crate::handoff::plan::{Outline, pin};
use crate::handoff::way::attempt::Direction;
use crate::handoff::way::departure::Departure;
use crate::handoff::way::home::Asker;
use crate::proxmox::pci_id::PciId;
use crate::proxmox::vm::{self, Driver, Dropped, Hostpci, VmConfig};
use crate::proxmox::{guest, mapping, running};
use crate::sys::{Kernel, Lock};
use crate::systemd::Shutdown;
use crate::trouble::Trouble;
use std::cell::OnceCell;
use std::fmt;
use std::io::ErrorKind;

/// # Errors
/// What the hook must tell Proxmox by its exit code.
pub fn run(app: &App, id: u32, phase: &str) -> Result<()> {
    match phase {
        "pre-start" => pre_start(app, id),
        "post-start" => {
            post_start(app, id);
            Ok(())
        }
        "post-stop" => post_stop(app, id),
        _ => Ok(()),
    }
}

fn pre_start(app: &App, vmid: u32) -> Result<()> {
    let done = make_ready(app, vmid).map_err(|exit| nodes::with_a_free_one(app.kernel, vmid, exit));
    // Refused, or half-way: this start is over, and what the VM still has from an earlier one must come home.
    if done.is_err() && app.store.has_record(&Owner::Vm(vmid)) {
        watch::begin(app, vmid, After::Start);
    }
    done
}

fn make_ready(app: &App, vmid: u32) -> Result<()> {
    let owner = Owner::Vm(vmid);
    let Some(vm) = read_config(app.kernel, vmid)? else { return container::pre_start(app, vmid) };
    warn_of_dropped_lines(app, vmid, &vm);
    let refused = |slots: &[SlotId], exit: &Exit| {
        app.handoff(&Config::default()).note_refused(Direction::Vfio, &owner, slots, exit);
    };
    let mut tried: Vec<Vec<SlotId>> = Vec::new();
    loop {
        mapped::wait_for_others(app, vmid, &vm).inspect_err(|exit| refused(&[], exit))?;
        let taken = taken(app, vmid, &vm).map_err(Exit::from);
        let Taken { slots, named } = taken.inspect_err(|exit| refused(&[], exit))?;
        if slots.is_empty() {
            return without_gpu(app, vmid, &vm).inspect_err(|exit| refused(&[], exit));
        }
        let config =
            backup::config_for(app.config_for_hook(), vmid, &vm, &slots).inspect_err(|exit| refused(&slots, exit))?;
        let Err(exit) = make_these_ready(app, &config, vmid, &vm, (&slots, &named)) else { return Ok(()) };
        let by = named.in_brackets();
        tried.push(slots);
        // In the same moment another start may have chosen the same, and have been the first to get its lock.
        let is_late = matches!(exit.code, Code::Refused | Code::Locked) && mapped::has_choice(app.kernel, &vm);
        if !is_late || !has_another_choice(app, vmid, &vm, &tried) {
            return Err(backup::told(named.refused(exit), vmid, &vm));
        }
        app.story.say(&format!("{}{by} is taken meanwhile: looks for another", list(tried.iter().flatten())));
    }
}

/// Now that Proxmox knows who has what.
fn has_another_choice(app: &App, vmid: u32, vm: &VmConfig, tried: &[Vec<SlotId>]) -> bool {
    let others = mapped::wait_for_others(app, vmid, vm);
    others.is_ok() && taken(app, vmid, vm).is_ok_and(|taken| !taken.slots.is_empty() && !tried.contains(&taken.slots))
}

/// A record from an earlier start, when the configuration still had the GPU, ends here.
fn without_gpu(app: &App, vmid: u32, vm: &VmConfig) -> Result<()> {
    let owner = Owner::Vm(vmid);
    if app.store.has_record(&owner)
        && let Err(exit) = home(app, &owner)
    {
        // No reason to keep a VM from starting that does not want the GPU any more.
        app.story.warn(&exit.to_string());
    }
    stray::look(app, vmid, vm)
}

fn make_these_ready(
    app: &App,
    config: &Config,
    vmid: u32,
    vm: &VmConfig,
    (slots, named): (&[SlotId], &Named),
) -> Result<()> {
    let owner = Owner::Vm(vmid);
    let handoff = app.handoff(config);
    let watcher = OnceCell::new();
    let on_ready = || drop(watcher.set(watch::begin(app, vmid, After::Start)));
    let (listed, by) = (listed_by(named, vm), named.in_brackets());
    let others = companions::of(app, config, vmid, vm, (slots, named))?;
    let departure =
        Departure { by, listed, others, on_ready: &on_ready, ..Departure::of(owner.clone(), slots.to_vec()) };
    backup::wait(&handoff, vm, &departure);
    let _locks = make_vms_way(&handoff, &departure)?;
    handoff.leave(&departure)?;
    if let Err(exit) = handoff.come_home_but(&owner, slots, "its configuration names it no longer") {
        // It has what it wants, and the rest comes home when it stops.
        app.story.warn(&exit.to_string());
    }
    Ok(())
}

/// What a start of this VM would take.
///
/// # Errors
/// As for its start; and when that is nothing, or its start would not come here.
pub(super) fn departure(app: &App, vmid: u32) -> Result<Departure<'static>> {
    let vm = read_config(app.kernel, vmid)?.unwrap_or_default();
    let Taken { slots, named } = taken(app, vmid, &vm)?;
    if slots.is_empty() {
        let what = format!("guest {vmid} takes no NVIDIA GPU");
        return Err(Exit::refused(Trouble::new(what, format!("see gpu-handoff plan {vmid}"))));
    }
    // It would take the card, and nobody would know whose it is.
    if vm.hookscript.is_none() {
        return Err(Exit::refused(format!("VM {vmid} has no hookscript yet: gpu-handoff enable {vmid}")));
    }
    let (listed, by) = (listed_by(&named, &vm), named.in_brackets());
    Ok(Departure { by, listed, ..Departure::of(Owner::Vm(vmid), slots) })
}

/// What a VM with this hookscript takes when it is started to be backed up, and by which policy; none where it takes nothing,
/// or is not being backed up.
///
/// # Errors
/// As for its start.
pub(super) fn for_backup(app: &App, vmid: u32) -> Result<Option<(VmConfig, Config, Departure<'static>)>> {
    let vm = read_config(app.kernel, vmid)?.unwrap_or_default();
    if !stray::has_hook(&vm) || !backup::is_under_way(&vm) {
        return Ok(None);
    }
    let Taken { slots, named } = taken(app, vmid, &vm)?;
    if slots.is_empty() {
        return Ok(None);
    }
    let config = backup::config_for(app.config_for_hook(), vmid, &vm, &slots)?;
    let (listed, by) = (listed_by(&named, &vm), named.in_brackets());
    Ok(Some((vm, config, Departure { by, listed, ..Departure::of(Owner::Vm(vmid), slots) })))
}

/// VMs that have the slots are shut down, where the policy says so. Refused with nothing touched, or when one stays.
fn make_vms_way(handoff: &Handoff, departure: &Departure) -> Result<Vec<Lock>> {
    let refused = |exit: &Exit| {
        handoff.note_refused(Direction::Vfio, &departure.owner, &departure.slots, exit);
    };
    let making_way = handoff.who_makes_way(departure, false).inspect_err(refused)?;
    handoff.take_over(&departure.owner, &making_way).inspect_err(refused)
}

/// As [`plan`]; the slots stay on vfio-pci where another VM makes way.
pub(super) fn plan_after_others(handoff: &Handoff, departure: &Departure, is_asking: bool) -> Result<Outline> {
    let making_way = handoff.who_makes_way(departure, is_asking)?;
    if making_way.is_empty() {
        return handoff.plan_leave(departure);
    }
    let Departure { owner, slots, by, .. } = departure;
    let title = format!("{}{by} other VM -> {owner}", list(slots));
    let steps: Vec<_> = making_way.iter().map(|one| ("stop", one.to_string())).collect();
    Ok(Outline { title, slots: slots.clone(), lines: steps.clone(), steps })
}

/// What pre-start would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, vmid: u32) -> Result<Outline> {
    let owner = Owner::Vm(vmid);
    let vm = read_config(app.kernel, vmid)?.unwrap_or_default();
    warn_of_dropped_lines(app, vmid, &vm);
    let Taken { slots, named } = taken(app, vmid, &vm)?;
    if slots.is_empty() {
        stray::look(app, vmid, &vm)?;
        if stray::has_hook(&vm) {
            stray::nothing_named(app, vmid, &vm).iter().for_each(|what| app.story.warn(&what.to_string()));
        }
        let stale = if app.store.has_record(&owner) { ", but its record's slots would come home" } else { "" };
        let title = format!("guest {vmid} takes no NVIDIA GPU: nothing to do{stale}");
        return Ok(Outline { title, slots, steps: Vec::new(), lines: Vec::new() });
    }
    let (listed, by) = (listed_by(&named, &vm), named.in_brackets());
    // As the hook has it: what is told here is what a start does.
    let config = backup::config_for(app.config_for_hook(), vmid, &vm, &slots)?;
    let others = companions::of(app, &config, vmid, &vm, (&slots, &named))?;
    let departure = Departure { by, listed, others, ..Departure::of(owner, slots) };
    let outline = plan_after_others(&app.handoff(&config), &departure, false)
        .map_err(|exit| backup::told(named.refused(exit), vmid, &vm))?;
    with_pin(app, &config, vmid, outline)
}

/// A start goes on without what cannot be; who asks before it is to know.
fn with_pin(app: &App, config: &Config, vmid: u32, mut outline: Outline) -> Result<Outline> {
    let Some(wish) = config.pin_of(vmid) else { return Ok(outline) };
    let facts = pin::Facts::of_vm(app.kernel, wish, vmid, None);
    let (_, mut mistakes) = pin::judge(vmid, wish, &facts);
    if let Some(last) = mistakes.pop() {
        mistakes.iter().for_each(|mistake| app.story.error(mistake));
        return Err(Exit::usage(format!("{last}; VM {vmid} would start without it")));
    }
    let text = pin::wished(wish, facts.vm.as_ref()).to_string();
    outline.steps.extend(text.split(", ").map(|step| ("pin", step.to_string())));
    outline.lines.push(("pin", text));
    Ok(outline)
}

/// Proxmox drops a line that it cannot read, and starts the VM without what the line was to give it. But a later one may
/// read what this program cannot, and takes a GPU then whoever uses it: so it is made ready all the same.
fn warn_of_dropped_lines(app: &App, vmid: u32, vm: &VmConfig) {
    for line in dropped_lines(app.kernel, vmid, vm) {
        app.story.warn(&line.trouble.of(&format!("VM {vmid}")).to_string());
    }
    for unread in &vm.args.unread {
        app.story.warn(&unread_args(vmid, vm, unread, &"SLOT").of(&format!("VM {vmid}")).to_string());
    }
}

/// A `hostpci` line that is not understood.
pub struct DroppedLine {
    /// In the VM's configuration.
    pub number: usize,
    /// With the line to set instead, where there is one.
    pub trouble: Trouble,
}

pub fn dropped_lines(kernel: &dyn Kernel, vmid: u32, vm: &VmConfig) -> Vec<DroppedLine> {
    let in_words = |dropped: &Dropped| {
        let doubtful = vm.doubtful.iter().find(|(_, doubtful)| doubtful.number == dropped.line);
        let gpu = doubtful.and_then(|(index, doubtful)| Some((index, doubtful, named_gpu(kernel, &doubtful.line)?)));
        let Some((index, doubtful, gpu)) = gpu else { return dropped.to_string().into() };
        let told = dropped.told("not understood");
        let what = format!("{told}; Proxmox may understand it, so {gpu} is given to the VM all the same");
        let instead = doubtful.instead.as_ref();
        let instead = instead.map(|value| format!("qm set {vmid} --hostpci{index} '{value}'"));
        Trouble::new(what, instead.unwrap_or_default()).joined("; if it is a mistake: ")
    };
    let hostpci = vm.warnings.iter().filter(|dropped| dropped.is_hostpci);
    hostpci.map(|dropped| DroppedLine { number: dropped.line, trouble: in_words(dropped) }).collect()
}

/// What of `args` may name a device that nobody can tell; `device` is what to name instead.
pub fn unread_args(vmid: u32, vm: &VmConfig, unread: &str, device: &dyn fmt::Display) -> Trouble {
    Trouble::new(
        format!("args has {}, and which device that names cannot be read", unread.escape_debug()),
        format!("qm set {vmid} --hostpci0 {}", vm.hostpci_of(device)),
    )
    .joined("; a GPU belongs into hostpci: ")
}

/// The first NVIDIA GPU that a line names.
fn named_gpu(kernel: &dyn Kernel, line: &Hostpci) -> Option<SlotId> {
    if line.driver == Driver::Keep || line.mdev.is_some() {
        return None;
    }
    let by_mapping = line.mapping.iter().flat_map(|name| mapping::on_this_node(kernel, name));
    let mut ids = line.addresses().chain(by_mapping);
    ids.find(|id| slot_of(kernel, id).is_some_and(|slot| takes_gpu(&slot, id)))?.slot()
}

/// Every address that the VM's configuration names, itself or by a mapping.
pub fn listed(app: &App, vmid: u32, vm: &VmConfig) -> Vec<PciId> {
    mapped::resolve(app, vmid, vm).map(|named| listed_by(&named, vm)).unwrap_or_default()
}

fn listed_by(named: &Named, vm: &VmConfig) -> Vec<PciId> {
    let mut ids: Vec<PciId> = named.ids.values().flatten().cloned().collect();
    ids.extend(vm.hostpci.values().flat_map(Hostpci::addresses));
    ids.extend(vm.doubtful.values().flat_map(|doubtful| doubtful.line.addresses()));
    ids.extend(vm.args.ids.iter().cloned());
    ids
}

/// Of a VM that has a GPU; nobody else pays for being asked.
fn post_start(app: &App, vmid: u32) {
    if app.store.has_record(&Owner::Vm(vmid)) {
        // What is wrong with it was told by pre-start.
        let (config, _) = Config::lenient(app.kernel);
        app.handoff(&config).pin(vmid);
    }
}

fn post_stop(app: &App, vmid: u32) -> Result<()> {
    let owner = Owner::Vm(vmid);
    if !app.store.has_record(&owner) {
        container::post_stop(app, vmid);
        if !adopts_left(app, vmid) {
            return Ok(());
        }
    }
    app.handoff(&Config::default()).unpin(vmid);
    // What is half-way, or cannot be read, is put right or told of.
    let record = app.store.record(&owner).ok().flatten();
    let Some(record) = record.filter(|record| record.progress == Progress::Away) else {
        let _watcher = watch::outlive_qmeventd(app, vmid);
        return home(app, &owner);
    };
    let slots = list(record.slots());
    if running::is_rebooting(app.kernel, vmid) && watch::begin(app, vmid, After::Reboot).has_begun() {
        app.story.say(&format!("{slots} stays on vfio-pci: VM {vmid} reboots"));
        return Ok(());
    }
    if let Some(next) = app.store.next_after(app.kernel, vmid)
        && watch::begin(app, vmid, After::Reboot).has_begun()
    {
        app.story.say(&format!("{slots} stays on vfio-pci: VM {next} takes it over"));
        return Ok(());
    }
    let _watcher = watch::outlive_qmeventd(app, vmid);
    // The answer is there by the time the VM has let go of the card.
    let shutdown = Shutdown::ask(app.kernel);
    let stays = || {
        let stays = shutdown.has_begun();
        if stays {
            app.story.say(&format!("{slots} stays on vfio-pci: the host is shutting down"));
        }
        stays
    };
    let config = app.config_for_hook();
    app.handoff(&config).come_home_unless(&owner, Asker::Proxmox, &stays)
}

/// Whether a VM that got the hookscript while it ran has a card that Proxmox gave it, which then comes home like any other.
fn adopts_left(app: &App, vmid: u32) -> bool {
    let owner = Owner::Vm(vmid);
    let slots = slots_of(app, vmid).unwrap_or_default();
    // Nothing is read beside that for a guest without a GPU.
    if slots.is_empty() {
        return false;
    }
    let config = app.config_for_hook();
    let handoff = app.handoff(&config);
    handoff.left_there(&owner, &slots).is_some() && handoff.adopt(&owner, &slots).is_ok_and(|record| record.is_some())
}

fn home(app: &App, owner: &Owner) -> Result<()> {
    let config = app.config_for_hook();
    app.handoff(&config).come_home(owner, Asker::Proxmox)
}

/// None for a container.
fn read_config(kernel: &dyn Kernel, id: u32) -> Result<Option<VmConfig>> {
    let path = format!("/etc/pve/qemu-server/{id}.conf");
    match kernel.read(&path) {
        Ok(bytes) => Ok(Some(vm::parse(&bytes))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if kernel.exists(&format!("/etc/pve/lxc/{id}.conf")) {
                return Ok(None);
            }
            if guest::is_down(kernel) {
                return Err(Exit::failed(guest::down()));
            }
            let what = format!("there is no guest {id}: {path} does not exist");
            Err(Exit::usage(Trouble::new(what, "qm list shows the VMs")))
        }
        Err(error) => Err(guest::unreadable(&path, &error)),
    }
}

/// What a VM takes.
struct Taken {
    slots: Vec<SlotId>,
    named: Named,
}

/// The NVIDIA slots that this VM takes. What Proxmox handles by itself is left to it: `driver=keep`, mediated devices,
/// SR-IOV virtual functions, and every device that is no NVIDIA GPU.
///
/// # Errors
/// As for the VM's start.
pub fn nvidia_slots(app: &App, vmid: u32, config: &VmConfig) -> std::result::Result<Vec<SlotId>, Unusable> {
    Ok(taken(app, vmid, config)?.slots)
}

fn taken(app: &App, vmid: u32, config: &VmConfig) -> std::result::Result<Taken, Unusable> {
    let kernel = app.kernel;
    let mut slots: Vec<SlotId> = Vec::new();
    let mut add = |slot: SlotId| {
        if !slots.contains(&slot) {
            slots.push(slot);
        }
    };
    let named = mapped::resolve(app, vmid, config)?;
    for (index, hostpci) in config.hostpci.iter().filter(|(_, hostpci)| hostpci.driver != Driver::Keep) {
        for id in named.ids.get(index).into_iter().flatten() {
            let absent = || {
                let written = if let [only] = hostpci.ids.as_slice() { &only.text } else { &hostpci.raw };
                let what = format!("VM {vmid}: hostpci{index} names {written}, but there is no such device");
                let remedy = stray::instead_of_nothing(kernel, vmid, *index, config, written);
                Unusable { index: Some(*index), trouble: Trouble::new(what, remedy) }
            };
            let slot = slot_of(kernel, id).filter(|slot| is_there(slot, id)).ok_or_else(absent)?;
            if takes_part(&slot, id) {
                add(slot.id);
            }
        }
    }
    for id in &config.args.ids {
        let slot = slot_of(kernel, id).filter(|slot| is_there(slot, id));
        let slot = slot.ok_or_else(|| {
            let what = format!("VM {vmid}: args names {id}, but there is no such device");
            Unusable { index: None, trouble: Trouble::new(what, "lspci -D shows what there is") }
        })?;
        if takes_part(&slot, id) {
            add(slot.id);
        }
    }
    for (index, doubtful) in &config.doubtful {
        let Some(gpu) = named_gpu(kernel, &doubtful.line) else { continue };
        match doubtful.line.mapping {
            Some(_) => {
                let ids = mapped::resolve_one(app, vmid, *index, &doubtful.line)?;
                ids.iter()
                    .filter_map(|id| slot_of(kernel, id).filter(|slot| takes_part(slot, id)))
                    .for_each(|slot| add(slot.id));
            }
            None => add(gpu),
        }
    }
    Ok(Taken { slots, named })
}

/// The NVIDIA slots that a VM's configuration names, whether its start gets them or not; of a mapping those of every
/// alternative.
pub fn named_slots(kernel: &dyn Kernel, vm: &VmConfig) -> Vec<SlotId> {
    let lines = vm.hostpci.values().chain(vm.doubtful.values().map(|doubtful| &doubtful.line));
    let lines = lines.filter(|line| line.driver != Driver::Keep && line.mdev.is_none());
    let of_line = |line: &Hostpci| match &line.mapping {
        Some(name) => mapping::on_this_node(kernel, name),
        None => line.addresses().collect(),
    };
    let ids = lines.flat_map(of_line).chain(vm.args.ids.iter().cloned());
    ids.filter_map(|id| slot_of(kernel, &id).filter(|slot| takes_part(slot, &id)).map(|slot| slot.id)).collect()
}

/// The NVIDIA slots that a VM takes as its configuration is now; none of a container.
///
/// # Errors
/// As for its start.
pub fn slots_of(app: &App, vmid: u32) -> Result<Vec<SlotId>> {
    let Some(vm) = read_config(app.kernel, vmid)? else { return Ok(Vec::new()) };
    Ok(nvidia_slots(app, vmid, &vm)?)
}

/// GPUs that a VM is given by `args` work, but Proxmox does not know of them.
pub fn by_args(kernel: &dyn Kernel, vmid: u32) -> Option<Trouble> {
    let vm = read_config(kernel, vmid).ok()??;
    let is_gpu = |id: &&PciId| slot_of(kernel, id).is_some_and(|slot| takes_gpu(&slot, id));
    let id = vm.args.ids.iter().find(is_gpu)?;
    let name = id.slot_name();
    let what = format!(
        "VM {vmid} passes {name} by args, of which Proxmox itself does not know: it does not keep other VMs from it"
    );
    let remedy = format!("qm set {vmid} --hostpci0 {}, and take it out of args", vm.hostpci_of(&name));
    Some(Trouble::new(what, remedy).joined("; better: "))
}

fn is_there(slot: &Slot, id: &PciId) -> bool {
    slot.functions.iter().any(|f| id.covers(f.address))
}
