//! From facts and a wish to a list of steps. Pure: nothing here reads or changes the machine.
//!
//! A plan starts from what is, not from what should have happened, so a handoff that was interrupted anywhere is
//! finished by planning again.

pub mod check;
pub mod facts;
pub mod pin;
pub mod policy;
pub mod step;

use crate::address::{Address, SlotId, only};
use crate::gpu::inventory::{Function, VFIO_PCI};
use crate::gpu::power::Power;
use crate::handoff::kept::record::{HomeOf, Record};
use crate::handoff::plan::facts::{Availability, Facts, GpuDriver};
use crate::handoff::plan::step::Step;
use crate::sorted;
use crate::story;
use crate::story::row;
use crate::sys::Share;
use crate::trouble::Trouble;

/// Steps in the order in which they must be done, each under the phase that the log names.
pub type Plan = Vec<(Phase, Step)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// vfio-pci is loaded, nothing may sleep any more, and the overrides say where each function shall go.
    Prepare,
    /// The functions lose the driver they have.
    Release,
    /// The functions get the driver they shall have.
    Bind,
    /// What is needed beside the GPU: the driver's other modules, its device nodes, the console.
    Complete,
    /// The overrides go back to what the administrator finds normal: unset. Who might sleep before may sleep again.
    Clear,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prepare => "prepare",
            Phase::Release => "release",
            Phase::Bind => "bind",
            Phase::Complete => "complete",
            Phase::Clear => "clear",
        }
    }
}

/// Every function of the slots to vfio-pci, its override kept there until it comes home. `record` says where home is.
///
/// # Errors
/// One line saying why there is no safe way.
pub fn to_vfio(facts: &Facts, record: &Record) -> Result<Plan, Trouble> {
    let mut plan = Plan::new();
    if facts.vfio_pci != Availability::Registered {
        plan.push((Phase::Prepare, load(&["vfio_pci"])));
    }
    for (function, home) in with_home(facts, record).filter(|(_, home)| home.driver.as_deref() != Some(VFIO_PCI)) {
        let mut power = home.power.awake().unlike(&function.power);
        // While a VM has it `d3cold_allowed` stays 0, but `power/control` is vfio-pci's own: it sets `auto` when it binds
        // and wakes the function when a VM opens it.
        if function.is_on(VFIO_PCI) {
            power.control = None;
        }
        set_power(&mut plan, Phase::Prepare, function.address, power);
    }
    // Before unbinding: opening a dead device node makes the kernel load nvidia, which would take the GPU back.
    for function in facts.functions() {
        // One that lives on vfio-pci without an override needs none, and none is left behind on it.
        let lives_there = record.home_of(function.address).is_some_and(|home| home.driver.as_deref() == Some(VFIO_PCI));
        let settled = lives_there && function.is_on(VFIO_PCI) && function.driver_override.is_none();
        if !settled && function.driver_override.as_deref() != Some(VFIO_PCI) {
            plan.push((Phase::Prepare, override_to(function.address, Some(VFIO_PCI))));
        }
    }
    let releases = |function: &Function| function.driver.as_deref().is_some_and(|driver| driver != VFIO_PCI);
    if facts.functions().any(releases) {
        plan.extend(record.frozen.iter().map(|ctid| (Phase::Release, Step::Freeze { ctid: *ctid })));
    }
    let mut reload_drm = false;
    // Unloading a module in use fails and changes nothing; unbinding one would hang. So what can fail comes first.
    for (driver, modules) in &facts.gpu_drivers {
        match way_out(facts, driver, modules)? {
            WayOut::Unload(order) => {
                // A module may have more than one driver: once it is gone for the first, it is for the others.
                let unload = order.into_iter().map(|module| (Phase::Release, Step::Unload { module }));
                let missing: Vec<_> = unload.filter(|step| !plan.contains(step)).collect();
                plan.extend(missing);
            }
            WayOut::Unbind => {}
            WayOut::UnbindWithoutDrm => {
                reload_drm = true;
                plan.push((Phase::Release, Step::Unload { module: "nvidia_drm".to_string() }));
            }
        }
    }
    // A framebuffer that goes with its module takes the console along by itself.
    let screen = facts.functions().find(|f| facts.console.screen == Some(f.address));
    // What could not be attached again is left to the kernel.
    let detach = facts.console.is_attached
        && facts.console.can_attach
        && screen.is_some_and(|function| !has_lost_screen(&plan, function));
    if detach {
        plan.push((Phase::Release, Step::Console { attach: false }));
    }
    release(&mut plan, facts.functions().filter(|f| f.is_nvidia_gpu()));
    // Nobody can open what has no driver any more, and what else is released may take its time. Also one that a handoff
    // which was killed had frozen.
    plan.extend(thaw(record));
    release(&mut plan, facts.functions().filter(|f| !f.is_nvidia_gpu()));
    for function in facts.functions().filter(|f| !f.is_on(VFIO_PCI)) {
        plan.push((Phase::Bind, probe(function.address, VFIO_PCI)));
    }
    if reload_drm {
        plan.push((Phase::Complete, load(&["nvidia_drm"])));
    }
    // The screen of another card is as good for a console meanwhile.
    let is_off = detach || !facts.console.is_attached;
    if record.console && is_off && facts.console.has_other && facts.console.can_attach {
        plan.push((Phase::Complete, Step::Console { attach: true }));
    }
    Ok(plan)
}

fn release<'a>(plan: &mut Plan, functions: impl Iterator<Item = &'a Function>) {
    for function in functions {
        let Some(driver) = function.driver.as_deref().filter(|d| *d != VFIO_PCI) else { continue };
        if !is_unloaded(plan, function) {
            plan.push((Phase::Release, unbind(function.address, driver)));
        }
    }
}

/// How the driver's module stack must be had while this is carried out: what is loaded or unloaded there is everybody's.
pub fn share(plan: &Plan) -> Share {
    let changes = |step: &Step| match step {
        Step::Load { modules } => modules.iter().any(|module| module != "vfio_pci"),
        Step::Unload { .. } => true,
        _ => false,
    };
    if plan.iter().any(|(_, step)| changes(step)) { Share::Alone } else { Share::Together }
}

/// What somebody is told who asks beforehand, under the phases that a run would log.
pub struct Outline {
    pub title: String,
    /// None when there is nothing to plan, and the title says why.
    pub slots: Vec<SlotId>,
    /// Each by itself, for programs.
    pub steps: Vec<(&'static str, String)>,
    /// The lines of the log, but for the times.
    pub lines: Vec<(&'static str, String)>,
}

impl Outline {
    pub fn to_text(&self) -> String {
        if self.slots.is_empty() { format!("{}\n", self.title) } else { titled(&self.title, &self.lines) }
    }
}

/// A plan for people: a line per phase.
pub fn to_text(title: &str, slots: &[SlotId], plan: &Plan) -> String {
    titled(title, &lines(slots, plan))
}

/// What the log of a run has, but for the times.
pub fn lines(slots: &[SlotId], plan: &Plan) -> Vec<(&'static str, String)> {
    by_phase(plan)
        .map(|(phase, steps)| (phase.name(), in_one_go(steps.iter().map(|(_, step)| step), only(slots))))
        .collect()
}

/// The steps of each phase, in the order of the plan.
pub fn by_phase(plan: &Plan) -> impl Iterator<Item = (Phase, &[(Phase, Step)])> {
    plan.chunk_by(|(one, _), (other, _)| one == other).filter_map(|steps| Some((steps.first()?.0, steps)))
}

/// `unload nvidia_uvm nvidia, unbind from snd_hda_intel .1`; `only` is the slot that the title names.
pub fn in_one_go<'a>(steps: impl IntoIterator<Item = &'a Step>, only: Option<SlotId>) -> String {
    let mut text = String::new();
    let mut verb = String::new();
    for step in steps {
        if step.verb() != verb {
            verb = step.verb();
            if !text.is_empty() {
                text.push_str(", ");
            }
            text.push_str(&verb);
        }
        let object = step.object(only);
        if !object.is_empty() {
            text.push(' ');
            text.push_str(&object);
        }
    }
    text
}

fn titled(title: &str, lines: &[(&'static str, String)]) -> String {
    let lines: Vec<String> = lines.iter().map(|(phase, what)| row(phase, what)).collect();
    story::titled(title, &if lines.is_empty() { "nothing to do".to_string() } else { lines.join("\n") })
}

/// How a GPU leaves its driver.
enum WayOut {
    /// Nothing else needs the modules: a module in use says so, where unbinding would wait for ever.
    Unload(Vec<String>),
    /// Another GPU needs them.
    Unbind,
    /// As `Unbind`, but nvidia_drm holds every GPU and must be away meanwhile.
    UnbindWithoutDrm,
}

fn way_out(facts: &Facts, driver: &str, modules: &GpuDriver) -> Result<WayOut, Trouble> {
    if modules.elsewhere.is_empty() {
        return match &modules.unload_order {
            Ok(order) => Ok(WayOut::Unload(order.clone())),
            Err(holder) => Err(Trouble::new(
                format!("module {holder} holds {driver} and is none that gpu-handoff may unload"),
                format!("unload it first: modprobe -r {holder}"),
            )),
        };
    }
    Ok(if driver == "nvidia" && facts.drm_holds_gpus { WayOut::UnbindWithoutDrm } else { WayOut::Unbind })
}

fn is_unloaded(plan: &Plan, function: &Function) -> bool {
    plan.iter().any(|(_, step)| matches!(step, Step::Unload { module } if Some(module) == function.module.as_ref()))
}

/// Whether unloading what drives its screen comes before this in the plan.
fn has_lost_screen(plan: &Plan, function: &Function) -> bool {
    let unloads_drm = plan.iter().any(|(_, step)| matches!(step, Step::Unload { module } if module == "nvidia_drm"));
    is_unloaded(plan, function) || (function.is_on("nvidia") && unloads_drm)
}

fn with_home<'a>(facts: &'a Facts, record: &'a Record) -> impl Iterator<Item = (&'a Function, &'a HomeOf)> {
    facts.functions().filter_map(|f| Some((f, record.home_of(f.address)?)))
}

fn set_power(plan: &mut Plan, phase: Phase, address: Address, power: Power) {
    if !power.is_empty() {
        plan.push((phase, Step::Power { address, power }));
    }
}

/// Every function of the record back to its home, what was loaded before loaded again, every trace removed.
pub fn to_home(facts: &Facts, record: &Record) -> Plan {
    let mut plan: Plan = thaw(record).collect();
    // A driver that meets a card which has fallen off the bus may look at it for ever (`pciPbiCheck` of NVIDIA's 550.163.01):
    // with vfio-pci it is in nobody's way.
    let fallen = sorted::set(facts.functions().filter(|f| f.is_gone).map(|f| f.address.slot));
    let functions: Vec<(&Function, &HomeOf)> =
        with_home(facts, record).filter(|(f, _)| !fallen.contains(&f.address.slot)).collect();
    // A function that lives on vfio-pci never left; one that somebody gave another driver is home enough.
    let lives_there = |home: &HomeOf| home.driver.as_deref() == Some(VFIO_PCI);
    let returning: Vec<(&Function, &HomeOf)> = functions
        .iter()
        .filter(|(function, home)| !lives_there(home) && (function.driver.is_none() || function.is_on(VFIO_PCI)))
        .copied()
        .collect();

    for (function, home) in &returning {
        // Only what the record can give back is changed.
        set_power(&mut plan, Phase::Release, function.address, home.power.awake().unlike(&function.power));
    }
    // Before unbinding: an id left in vfio-pci would take the function back, and an identical card with it.
    let leaving = functions.iter().filter(|(_, home)| !lives_there(home));
    let ids = sorted::set(leaving.map(|(f, _)| (f.vendor, f.device)));
    for (vendor, device) in ids.into_iter().filter(|id| !facts.static_ids.contains(id)) {
        plan.push((Phase::Release, Step::RemoveId { vendor, device }));
    }
    for (function, home) in &returning {
        if home.driver.is_some() && function.driver_override != home.driver {
            plan.push((Phase::Release, override_to(function.address, home.driver.as_deref())));
        }
    }
    let modules = modules_to_load(facts, record, &functions, &returning);
    for (function, home) in &returning {
        // A module takes every unbound device it knows, also one that is at home without a driver.
        if home.driver.is_none() && function.driver_override.is_none() && !modules.is_empty() {
            plan.push((Phase::Release, override_to(function.address, Some(VFIO_PCI))));
        }
    }
    for (function, _) in returning.iter().filter(|(f, _)| f.is_on(VFIO_PCI)) {
        plan.push((Phase::Release, unbind(function.address, VFIO_PCI)));
    }
    if !modules.is_empty() {
        plan.push((Phase::Bind, Step::Load { modules }));
    }
    for (function, home) in &returning {
        if let Some(driver) = &home.driver {
            plan.push((Phase::Bind, probe(function.address, driver)));
        }
    }
    if functions.iter().any(|(_, home)| home.driver.as_deref() == Some("nvidia")) {
        plan.push((Phase::Complete, Step::MakeNodes));
    }
    if record.console && !facts.console.is_busy && !functions.is_empty() {
        plan.push((Phase::Complete, Step::Console { attach: true }));
    }
    for (function, home) in functions.iter().filter(|(_, home)| !lives_there(home)) {
        // Moving changes it, and so does the driver at home when it binds.
        let moves = returning.iter().any(|(f, _)| f.address == function.address);
        let power = if moves { home.power.clone() } else { home.power.unlike(&function.power) };
        set_power(&mut plan, Phase::Clear, function.address, power);
    }
    for (function, home) in &functions {
        let ours = function.driver_override.is_some() || returning.iter().any(|(f, _)| f.address == function.address);
        if ours && !lives_there(home) {
            plan.push((Phase::Clear, override_to(function.address, None)));
        }
    }
    plan
}

/// The drivers that wait for nothing but their module, and whatever else of the GPU's driver was loaded before.
fn modules_to_load(
    facts: &Facts,
    record: &Record,
    functions: &[(&Function, &HomeOf)],
    returning: &[(&Function, &HomeOf)],
) -> Vec<String> {
    let mut modules: Vec<String> = Vec::new();
    for (_, home) in returning {
        if let (Some(driver), Some(module)) = (&home.driver, &home.module)
            && !facts.registered.contains(driver)
            && !modules.contains(module)
        {
            modules.push(module.clone());
        }
    }
    // Without a GPU to drive they would only fail to load.
    let drives = |home: &HomeOf| home.module.as_ref().is_some_and(|module| record.modules.contains(module));
    let has_gpu = functions.iter().any(|(f, home)| f.is_nvidia_gpu() && f.driver == home.driver && drives(home))
        || returning.iter().any(|(f, home)| f.is_nvidia_gpu() && drives(home));
    for module in record.modules.iter().filter(|_| has_gpu) {
        if !facts.loaded.contains(module) && !modules.contains(module) {
            modules.push(module.clone());
        }
    }
    modules
}

fn thaw(record: &Record) -> impl Iterator<Item = (Phase, Step)> {
    record.frozen.iter().map(|ctid| (Phase::Release, Step::Thaw { ctid: *ctid }))
}

fn load(modules: &[&str]) -> Step {
    Step::Load { modules: modules.iter().map(|module| (*module).to_string()).collect() }
}

fn override_to(address: Address, driver: Option<&str>) -> Step {
    Step::Override { address, driver: driver.map(str::to_string) }
}

fn unbind(address: Address, driver: &str) -> Step {
    Step::Unbind { address, driver: driver.to_string() }
}

fn probe(address: Address, driver: &str) -> Step {
    Step::Probe { address, driver: driver.to_string() }
}

#[cfg(test)]
mod tests;
