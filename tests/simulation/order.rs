//! The legal order of a plan's steps, whatever the machine is like when the plan is made. Looks only at the plan and at
//! the machine it was made for; nothing is carried out.

use super::check::Check;
use super::modules::driver_of_module;
use super::state::State;
use gpu_handoff::address::SlotId;
use gpu_handoff::gpu::power::Power;
use gpu_handoff::handoff::kept::record::Record;
use gpu_handoff::handoff::plan::step::Step;
use gpu_handoff::handoff::plan::{Phase, Plan};

/// Steps in order, with the questions that the rules ask.
struct Order<'a> {
    state: &'a State,
    steps: Vec<&'a Step>,
}

impl Order<'_> {
    fn find(&self, wanted: impl Fn(&Step) -> bool) -> Option<usize> {
        self.steps.iter().position(|step| wanted(step))
    }

    fn rule(&self, holds: bool, text: impl FnOnce() -> String) -> Check {
        if holds {
            return Ok(());
        }
        let steps: Vec<String> = self.steps.iter().map(ToString::to_string).collect();
        Err(format!("order: {} in: {}", text(), steps.join(", ")))
    }

    fn override_of(&self, address: &str, driver: Option<&str>) -> Option<usize> {
        self.find(
            |step| matches!(step, Step::Override { address: a, driver: d } if a.to_string() == address && d.as_deref() == driver),
        )
    }

    fn unbind_of(&self, address: &str) -> Option<usize> {
        self.find(|step| matches!(step, Step::Unbind { address: a, .. } if a.to_string() == address))
    }

    fn probe_of(&self, address: &str) -> Option<usize> {
        self.find(|step| matches!(step, Step::Probe { address: a, .. } if a.to_string() == address))
    }

    /// Where the function loses the driver it has: its own unbind, or unloading its driver's module.
    fn release_of(&self, address: &str) -> Option<usize> {
        let driver = self.state.functions.get(address)?.driver;
        let unloads = |step: &Step| matches!(step, Step::Unload { module } if driver_of_module(module).is_some() && driver_of_module(module) == driver);
        self.unbind_of(address).or_else(|| self.find(unloads))
    }

    /// Where the function is given this, or more.
    fn power_of(&self, address: &str, wanted: &Power) -> Option<usize> {
        self.find(
            |step| matches!(step, Step::Power { address: a, power } if a.to_string() == address && wanted.values().all(|value| power.values().any(|other| other == value))),
        )
    }

    fn attach(&self, wanted: bool) -> Option<usize> {
        self.find(|step| matches!(step, Step::Console { attach } if *attach == wanted))
    }

    fn names_only(&self, slots: &[SlotId]) -> Check {
        for step in &self.steps {
            let stranger = step.slot().filter(|slot| !slots.contains(slot));
            self.rule(stranger.is_none(), || format!("{step} names a card that is not meant"))?;
        }
        Ok(())
    }

    /// Nothing twice, and no driver taken from a function that does not have it.
    fn makes_sense(&self) -> Check {
        for (index, step) in self.steps.iter().enumerate() {
            self.rule(!self.steps[..index].contains(step), || format!("{step} comes twice"))?;
            if let Step::Unbind { address, driver } = step {
                let has = self.state.shown_driver(&address.to_string()) == Some(driver);
                self.rule(has, || format!("{step}, which does not have it"))?;
            }
        }
        Ok(())
    }
}

/// # Errors
/// The rule that a plan towards a VM breaks.
pub fn check_leave(state: &State, plan: &Plan, slots: &[SlotId]) -> Check {
    let order = Order { state, steps: plan.iter().map(|(_, step)| step).collect() };
    order.names_only(slots)?;
    order.makes_sense()?;
    let is_ours = |address: &str| slots.iter().any(|slot| address.starts_with(&slot.to_string()));
    for address in state.functions.keys().filter(|address| is_ours(address)) {
        let set = order.override_of(address, Some("vfio-pci"));
        let is_set = state.functions[address].driver_override.as_deref() == Some("vfio-pci");
        let (released, probed) = (order.release_of(address), order.probe_of(address));
        let before = |a: Option<usize>, b: Option<usize>| b.is_none_or(|b| a.is_some_and(|a| a < b));
        order.rule(is_set || before(set, released), || format!("{address} is released before its override is set"))?;
        order.rule(is_set || before(set, probed), || format!("{address} is probed before its override is set"))?;
        let has_driver = state.functions[address].driver.is_some();
        order.rule(!has_driver || before(released, probed), || format!("{address} is probed before it is released"))?;
        let power = &state.functions[address].power;
        let wake = power.awake().unlike(power);
        let moves = released.is_some() || state.shown_driver(address) != Some("vfio-pci");
        order.rule(wake.is_empty() || !moves || before(order.power_of(address, &wake), released.or(probed)), || {
            format!("{address} is released while it may sleep")
        })?;
        let shines = state.console == Some(true) && state.can_attach() && state.screen.as_ref() == Some(address);
        let goes_dark = |step: &Step| matches!(step, Step::Unload { module } if module == "nvidia_drm");
        let unbound = order.unbind_of(address).filter(|_| order.find(goes_dark).is_none());
        order.rule(!shines || before(order.attach(false), unbound), || {
            format!("{address} is unbound with the console on its screen")
        })?;
        let cleared = order.override_of(address, None);
        order.rule(cleared.is_none(), || format!("the override of {address} is cleared"))?;
        let arrives = state.shown_driver(address) == Some("vfio-pci") || probed.is_some();
        order.rule(arrives, || format!("{address} never gets to vfio-pci"))?;
    }
    let first_unbind = order.find(|step| matches!(step, Step::Unbind { .. }));
    let first_release = order.find(|step| matches!(step, Step::Unload { .. } | Step::Unbind { .. }));
    let first_probe = order.find(|step| matches!(step, Step::Probe { .. }));
    for (index, step) in order.steps.iter().enumerate() {
        let Step::Freeze { ctid } = step else { continue };
        let thawed = order.find(|step| matches!(step, Step::Thaw { ctid: other } if other == ctid));
        order.rule(first_release.is_some_and(|release| index < release), || format!("{step} comes too late"))?;
        let in_time = thawed.is_some_and(|thawed| index < thawed && first_probe.is_none_or(|probe| thawed < probe));
        order.rule(in_time, || format!("{step} outlasts the release"))?;
    }
    for (index, step) in order.steps.iter().enumerate() {
        match step {
            Step::Unload { module } => {
                let away: Vec<String> = order.steps[..index]
                    .iter()
                    .filter_map(|step| if let Step::Unload { module } = step { Some(module.clone()) } else { None })
                    .collect();
                let holder = state.holders(module).into_iter().find(|holder| !away.contains(holder));
                order.rule(holder.is_none(), || format!("{module} is unloaded before {holder:?}"))?;
                let driver = driver_of_module(module);
                let other = state.functions.iter().find(|(a, f)| driver.is_some() && f.driver == driver && !is_ours(a));
                order.rule(other.is_none(), || format!("{module} is unloaded, and {other:?} needs it"))?;
                order.rule(first_unbind.is_none_or(|first| index < first), || {
                    format!("unload {module}, which can say no, comes after an unbind, which can hang")
                })?;
            }
            Step::RemoveId { .. } | Step::MakeNodes => {
                order.rule(false, || format!("{step} on the way to a VM"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// # Errors
/// The rule that a plan towards home breaks.
pub fn check_home(state: &State, plan: &Plan, record: &Record) -> Check {
    let order = Order { state, steps: plan.iter().map(|(_, step)| step).collect() };
    order.names_only(&record.slots())?;
    order.makes_sense()?;
    let load = order.find(|step| matches!(step, Step::Load { .. }));
    let nodes = order.find(|step| matches!(step, Step::MakeNodes));
    let (attach, detach) = (order.attach(true), order.attach(false));
    order.rule(detach.is_none(), || "the console is detached on the way home".to_string())?;
    let last_probe = order.steps.iter().rposition(|step| matches!(step, Step::Probe { .. } | Step::Load { .. }));
    order.rule(!record.console || attach > last_probe, || "the console is not attached at home".to_string())?;
    let first_clear = order.find(|step| matches!(step, Step::Override { driver: None, .. }));
    let last_other = order.steps.iter().rposition(|step| !matches!(step, Step::Override { driver: None, .. }));
    order.rule(first_clear.is_none_or(|clear| last_other.is_none_or(|other| other < clear)), || {
        "an override is cleared before everything else is done".to_string()
    })?;
    order
        .rule(nodes.is_none_or(|nodes| load.is_none_or(|load| load < nodes)), || "nodes before modules".to_string())?;
    for step in &order.steps {
        let bad = match step {
            Step::Unload { .. } => true,
            Step::RemoveId { vendor, device } => state.static_ids.contains(&(*vendor, *device)),
            _ => false,
        };
        order.rule(!bad, || format!("{step} on the way home"))?;
    }
    for home in &record.functions {
        let address = &home.address.to_string();
        let Some(function) = state.functions.get(address) else { continue };
        let (unbound, probed) = (order.unbind_of(address), order.probe_of(address));
        if home.driver.as_deref() == Some("vfio-pci") {
            let touched = unbound.or(probed).or(order.override_of(address, None));
            order.rule(touched.is_none(), || format!("{address} lives on vfio-pci and is touched"))?;
            continue;
        }
        let wake = home.power.awake().unlike(&function.power);
        if let Some(moment) = unbound.or(probed) {
            let awake = wake.is_empty() || order.power_of(address, &wake).is_some_and(|wake| wake < moment);
            order.rule(awake, || format!("{address} moves while it may sleep"))?;
            let end = probed.or(unbound);
            let is_given_back = |index: &usize| {
                Some(*index) > end
                    && order.steps[*index] == &Step::Power { address: home.address, power: home.power.clone() }
            };
            let given_back = home.power.is_empty() || (0..order.steps.len()).any(|index| is_given_back(&index));
            order.rule(given_back, || format!("{address} may sleep no more, or too early"))?;
        }
        if let Some(unbind) = unbound {
            let id = order.find(|step| {
                matches!(step, Step::RemoveId { vendor, device } if (*vendor, *device) == (function.vendor, function.device))
            });
            let is_static = state.static_ids.contains(&(function.vendor, function.device));
            order.rule(is_static || id.is_some_and(|id| id < unbind), || {
                format!("{address}: unbind before remove_id")
            })?;
            order.rule(load.is_none_or(|load| unbind < load), || format!("{address}: modules before unbind"))?;
        }
        if let Some(driver) = home.driver.as_deref() {
            let set = order.override_of(address, Some(driver));
            let is_set = function.driver_override.as_deref() == Some(driver);
            for moment in [unbound, probed].into_iter().flatten() {
                order.rule(is_set || set.is_some_and(|set| set < moment), || {
                    format!("{address} is let go before its override says {driver}")
                })?;
            }
            order.rule(probed.is_none_or(|probe| load.is_none_or(|load| load < probe)), || {
                format!("{address} is probed before its driver is loaded")
            })?;
            let is_home = state.shown_driver(address).is_some_and(|now| now != "vfio-pci");
            order.rule(is_home || probed.is_some(), || format!("{address} never gets home"))?;
        } else {
            order.rule(probed.is_none(), || format!("{address} is probed, but has no driver at home"))?;
        }
    }
    Ok(())
}

/// Plans spoilt on purpose: each of these must break a rule. How many there were.
///
/// # Errors
/// The spoilt plan that nobody objected to.
pub fn objections(plan: &Plan, check: &dyn Fn(&Plan) -> Check) -> Result<usize, String> {
    let mut spoilt: Vec<(String, Plan)> = Vec::new();
    let has = |kind: fn(&Step) -> bool| plan.iter().any(|(_, step)| kind(step));
    if has(|step| matches!(step, Step::Unbind { .. } | Step::Unload { .. }))
        && has(|step| matches!(step, Step::Probe { .. }))
    {
        spoilt.push(("turned round".to_string(), plan.iter().rev().cloned().collect()));
    }
    // Thawing what an earlier handoff left frozen may be needless.
    let has_frozen = |ctid: u32| plan.iter().any(|(_, step)| *step == Step::Freeze { ctid });
    for (index, (phase, step)) in plan.iter().enumerate() {
        let mut other = plan.clone();
        match step {
            Step::Probe { .. } | Step::RemoveId { .. } | Step::Power { .. } => drop(other.remove(index)),
            // On the way there another screen may be as good, or there may be none.
            Step::Console { attach: true } if plan.iter().any(|(phase, _)| *phase == Phase::Prepare) => continue,
            Step::Console { .. } => drop(other.remove(index)),
            Step::Override { driver: Some(_), .. } => {
                let moved = other.remove(index);
                other.push(moved);
            }
            Step::Override { driver: None, .. } => {
                let moved = other.remove(index);
                other.insert(0, moved);
            }
            Step::Unbind { driver, .. } => {
                let stranger =
                    Step::Unbind { address: "0000:77:00.0".parse().expect("an address"), driver: driver.clone() };
                other[index] = (*phase, stranger);
            }
            Step::Thaw { ctid } if has_frozen(*ctid) => drop(other.remove(index)),
            Step::Load { .. } | Step::Unload { .. } | Step::MakeNodes | Step::Freeze { .. } | Step::Thaw { .. } => {
                continue;
            }
        }
        spoilt.push((format!("without or with another place for {step}"), other));
    }
    let count = spoilt.len();
    for (how, plan) in spoilt {
        if check(&plan).is_ok() {
            let steps: Vec<String> = plan.iter().map(|(_, step)| step.to_string()).collect();
            return Err(format!("order: nobody objects to a plan {how}: {}", steps.join(", ")));
        }
    }
    Ok(count)
}
