//! One case: a run with a fault in its way, and what comes after it until everything is as somebody wants it.

use super::bench::{Bench, Wish};
use super::check::{Check, always, ended_well, history_tells, is_home, other_nodes, reached};
use super::faults::{Fault, Kind};
use super::kernel::OPENING;
use super::order;
use super::setup::{Busy, Ready, Setup};
use gpu_handoff::address::SlotId;
use gpu_handoff::handoff::kept::record::{Owner, Progress, Record};
use gpu_handoff::sys::{Action, Share};
use std::collections::BTreeSet;
use std::time::Duration;

/// What refusing a wedged slot may take: a killed run's worker is given a moment to end.
const AT_ONCE: Duration = Duration::from_secs(3);

/// What follows a run that did not go as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The same wish once more.
    Again,
    /// Something else: the way back, or reconcile.
    Else,
    /// Nobody asks for anything more.
    Keeper,
}

/// # Errors
/// What does not hold, in words.
pub fn without_fault(bench: &mut Bench, setup: &Setup, ready: &Ready) -> Result<Vec<Action>, String> {
    bench.restore(&ready.before);
    plans_are_legal(bench, setup, ready)?;
    let ran = bench.run(&ready.wish, None);
    let acts = bench.kernel.acts.borrow().clone();
    history_tells(bench, &ready.wish, &ran)?;
    ended_well(bench, &ready.wish, None, &ran, &ready.before, &ready.home)?;
    always(bench, &ready.home)?;
    if ran.end.code() == Some(3) {
        return Ok(acts);
    }
    if ran.end.code() != Some(0) {
        return Err(format!("without a fault: {:?}", ran.end));
    }
    plans_are_legal(bench, setup, ready)?;
    // Once more changes nothing.
    let then = bench.world().but_for_time();
    let again = bench.run(&ready.wish, None);
    let now = bench.world().but_for_time();
    if again.end.code() != Some(0) || now != then {
        return Err(format!("not idempotent: {:?}", again.end));
    }
    bring_everything_home(bench, ready)?;
    let other = other_nodes(bench, &ready.home);
    match setup.busy {
        // Nobody is in the way of mending them.
        Busy::Nobody if !other.is_empty() => Err(format!("home, with other nodes in /dev/dri: {other:?}")),
        _ => Ok(acts),
    }
}

/// # Errors
/// What does not hold, in words.
pub fn with_fault(bench: &mut Bench, setup: &Setup, ready: &Ready, fault: Fault, then: Then) -> Check {
    bench.log.clear();
    bench.restore(&ready.before);
    let ran = bench.run(&ready.wish, Some(fault));
    let kind = fault.kind;
    // A step may be of two changes.
    if kind == Kind::Term
        && matches!(ready.wish, Wish::Leave(..))
        && ran.end.code() == Some(0)
        && ran.acts > fault.at + 2
    {
        return Err(format!("asked to end, it made {} changes more", ran.acts - fault.at));
    }
    ended_well(bench, &ready.wish, Some(kind), &ran, &ready.before, &ready.home)?;
    always(bench, &ready.home)?;
    if matches!(kind, Kind::Opened | Kind::Attached) {
        let hangs = !bench.kernel.state.borrow().hung.is_empty();
        if hangs {
            leave_wedged_alone(bench, setup, ready, kind)?;
        }
        if bench.kernel.close_what_was_opened() {
            last_acts(bench, ready)?;
        } else if hangs {
            // This driver never lets go.
            return leave_wedged_alone(bench, setup, ready, kind);
        }
    }
    if kind == Kind::Opening {
        if !bench.store.wedged_slots().is_empty() {
            leave_wedged_alone(bench, setup, ready, kind)?;
        }
        bench.kernel.advance(OPENING);
        if !bench.kernel.state.borrow().outlived.is_empty() {
            last_acts(bench, ready)?;
        }
    }
    if kind.is_hang() {
        leave_wedged_alone(bench, setup, ready, kind)?;
        if !kind.ends() {
            return Ok(());
        }
        if !bench.kernel.let_hangs_end() {
            return Err("the hang did not end".to_string());
        }
        last_acts(bench, ready)?;
    }
    if kind.is_kill() && !kind.is_hang() {
        plans_are_legal(bench, setup, ready)?;
    }
    if matches!(kind, Kind::KillBefore { alone: false } | Kind::KillAfter { alone: false }) {
        last_acts(bench, ready)?;
    }
    let wish = match then {
        Then::Again => ready.wish.clone(),
        Then::Else => opposite(setup, &ready.wish, fault.at),
        Then::Keeper => {
            keeper_brings_home(bench, ready)?;
            return bring_everything_home(bench, ready);
        }
    };
    once_more(bench, ready, &wish, "once more")?;
    bring_everything_home(bench, ready)
}

/// The plan of a run that nothing befalls, spoilt in every way that comes to mind: how many there were, each objected to.
///
/// # Errors
/// The spoilt plan that nobody objected to.
pub fn spoil(bench: &mut Bench, ready: &Ready) -> Result<usize, String> {
    bench.restore(&ready.before);
    let Some(plan) = bench.plan(&ready.wish) else { return Ok(0) };
    let state = bench.kernel.state.borrow().clone();
    match &ready.wish {
        Wish::Leave(_, slots) => order::objections(&plan, &|plan| order::check_leave(&state, plan, slots)),
        Wish::Home(owner) => {
            let record = bench.record(owner).ok_or("no record")?;
            order::objections(&plan, &|plan| order::check_home(&state, plan, &record))
        }
        Wish::Reconcile | Wish::Unfinished | Wish::Owed | Wish::Watch(_) | Wish::Keep(..) => Ok(0),
    }
}

/// Both ways from here are planned in a legal order.
///
/// # Errors
/// The rule that is broken.
pub fn plans_are_legal(bench: &mut Bench, setup: &Setup, ready: &Ready) -> Check {
    let slots = setup.slots();
    let owner = match &ready.wish {
        Wish::Leave(owner, _) | Wish::Home(owner) | Wish::Keep(owner, _) => owner.clone(),
        Wish::Reconcile | Wish::Unfinished | Wish::Owed | Wish::Watch(_) => Owner::Vm(111),
    };
    if let Some(plan) = bench.plan(&Wish::Leave(owner.clone(), slots.clone())) {
        order::check_leave(&bench.kernel.state.borrow(), &plan, &slots)?;
    }
    for record in bench.store.records().unwrap_or_default() {
        if let Some(plan) = bench.plan(&Wish::Home(record.owner.clone())) {
            order::check_home(&bench.kernel.state.borrow(), &plan, &record)?;
        }
    }
    Ok(())
}

/// Somebody else has a lock all the while, and lets go of it; then the keeper, or the same wish once more, gets through.
///
/// # Errors
/// What does not hold, in words.
pub fn with_a_lock_taken(bench: &mut Bench, setup: &Setup, ready: &Ready) -> Check {
    for of_slot in [false, true] {
        let named = |problem: String| {
            format!("somebody has the lock of {}: {problem}", if of_slot { "a slot" } else { "the modules" })
        };
        bench.restore(&ready.before);
        let store = bench.store.clone();
        let text = |error: anyhow::Error| format!("{error:#}");
        let slots: BTreeSet<SlotId> = setup.slots().into_iter().take(1).collect();
        let slot = if of_slot { store.lock(&slots, Duration::ZERO).map_err(text)? } else { None };
        let stack = if of_slot { None } else { store.stack(Share::Alone, Duration::ZERO).map_err(text)? };
        if slot.is_none() && stack.is_none() {
            return Err(named("it cannot be had".to_string()));
        }
        let ran = bench.run(&ready.wish, None);
        match ran.end.code() {
            // Nothing to do, or nothing that a lock is needed for; refused; not had.
            Some(0 | 3 | 5) => {}
            _ => return Err(named(format!("{:?}", ran.end))),
        }
        if ran.end.code() == Some(5) && ran.acts > 0 {
            return Err(named(format!("{} changes without it", ran.acts)));
        }
        always(bench, &ready.home).map_err(named)?;
        drop((slot, stack));
        if matches!(ready.wish, Wish::Home(Owner::Vm(_))) && ran.end.code() == Some(5) {
            keeper_brings_home(bench, ready).map_err(named)?;
        } else if ran.end.code() == Some(5) {
            once_more(bench, ready, &ready.wish, "once more").map_err(named)?;
        }
        bring_everything_home(bench, ready).map_err(named)?;
    }
    Ok(())
}

/// All that nobody has any more, by nobody's doing but the keeper's.
fn keeper_brings_home(bench: &mut Bench, ready: &Ready) -> Check {
    let ran = bench.keeper();
    let named = |problem: String| format!("the keeper: {problem}");
    if let Some(ran) = ran.filter(|ran| ran.end.code() != Some(0)) {
        return Err(named(format!("{:?}", ran.end)));
    }
    always(bench, &ready.home).map_err(named)?;
    let by_hand = |record: &Record| record.owner.vmid().is_none() && record.progress == Progress::Away;
    let records = bench.store.records().map_err(|error| format!("{error:#}"))?;
    if let Some(record) = records.iter().find(|record| !by_hand(record)) {
        return Err(named(format!("{} still has {:?}", record.owner, record.slots())));
    }
    if records.is_empty() { is_home(bench, &ready.home).map_err(named) } else { Ok(()) }
}

/// What the workers do that outlived the run.
fn last_acts(bench: &mut Bench, ready: &Ready) -> Check {
    let before = bench.world();
    let ran = bench.last_acts().ok_or("no worker outlived the run")?;
    let named = |problem: String| format!("the worker's last act: {problem}");
    ended_well(bench, &Wish::Unfinished, None, &ran, &before, &ready.home).map_err(named)?;
    if ran.end.code() != Some(0) {
        return Err(format!("the worker's last act: {:?}", ran.end));
    }
    reached(bench, &Wish::Unfinished, &ready.home).map_err(named)?;
    always(bench, &ready.home).map_err(named)
}

fn once_more(bench: &mut Bench, ready: &Ready, wish: &Wish, what: &str) -> Check {
    let before = bench.world();
    let ran = bench.run(wish, None);
    let named = |problem: String| format!("{what}: {problem}");
    ended_well(bench, wish, None, &ran, &before, &ready.home).map_err(named)?;
    if ran.end.code() != Some(0) {
        return Err(format!("{what}: {:?}", ran.end));
    }
    reached(bench, wish, &ready.home).map_err(named)?;
    always(bench, &ready.home).map_err(named)
}

fn opposite(setup: &Setup, wish: &Wish, at: usize) -> Wish {
    match wish {
        Wish::Leave(owner, _) if at % 2 == 1 => Wish::Home(owner.clone()),
        Wish::Home(owner) if at % 2 == 1 => Wish::Leave(owner.clone(), setup.slots()),
        Wish::Reconcile | Wish::Watch(_) => Wish::Leave(Owner::Vm(111), setup.slots()),
        Wish::Leave(..) | Wish::Home(_) | Wish::Unfinished | Wish::Owed | Wish::Keep(..) => Wish::Reconcile,
    }
}

/// Whatever was asked for: in the end every card must find its way home.
fn bring_everything_home(bench: &mut Bench, ready: &Ready) -> Check {
    once_more(bench, ready, &Wish::Reconcile, "reconcile in the end")?;
    for record in bench.store.records().map_err(|error| format!("{error:#}"))? {
        if matches!(record.owner, Owner::Manual(_)) && record.progress == Progress::Away {
            once_more(bench, ready, &Wish::Home(record.owner), "home in the end")?;
        }
    }
    is_home(bench, &ready.home).map_err(|problem| format!("in the end: {problem}"))
}

/// While a call hangs: its slots are refused at once and untouched, the other card works, the status can be read.
fn leave_wedged_alone(bench: &mut Bench, setup: &Setup, ready: &Ready, kind: Kind) -> Check {
    bench.status()?;
    let was_wedged = bench.store.wedged_slots();
    let again = bench.run(&ready.wish, None);
    let concerned = match &ready.wish {
        Wish::Leave(_, slots) => slots.iter().any(|slot| bench.store.wedged_slots().contains(slot)),
        _ => true,
    };
    if !concerned {
        // It was another card's call: this one gets what it wants.
        reached(bench, &ready.wish, &ready.home)?;
    } else if again.end.code() != Some(4) || (again.acts == 0 && again.took > AT_ONCE) {
        return Err(format!("wedged, and then: {:?}, {} changes, {:?}", again.end, again.acts, again.took));
    }
    always(bench, &ready.home)?;
    let wedged = bench.store.wedged_slots();
    if wedged.is_empty() {
        return Err("nothing says that a call hangs".to_string());
    }
    // What is not wedged may go on; what was wedged before is not touched.
    for act in bench.kernel.acts.borrow().iter() {
        let text = format!("{act:?}");
        if was_wedged.iter().any(|slot| text.contains(&slot.to_string())) {
            return Err(format!("wedged, and then: {text}"));
        }
    }
    for (slot, word) in bench.status()? {
        if wedged.iter().any(|wedged| wedged.to_string() == slot) && word != "wedged" {
            return Err(format!("{slot} is wedged, and its status is {word}"));
        }
    }
    let hangs_in_module = bench.kernel.state.borrow().hung.iter().any(|hung| !hung.modules.is_empty());
    let records = bench.store.records().unwrap_or_default();
    let is_free = |slot: &SlotId| !wedged.contains(slot) && !records.iter().any(|record| record.slots().contains(slot));
    let Some(other) = setup.machine.slots().into_iter().find(is_free) else { return Ok(()) };
    if hangs_in_module || kind == Kind::Term {
        return Ok(());
    }
    let before = bench.world();
    let owner = Owner::Vm(333);
    for wish in [Wish::Leave(owner.clone(), vec![other]), Wish::Home(owner)] {
        let ran = bench.run(&wish, None);
        // Who uses the other card is refused it all the same.
        // And whoever has nvidiactl open may have that one attached as well.
        if ran.end.code() == Some(3) && (setup.busy != Busy::Nobody || kind == Kind::Attached) {
            break;
        }
        if ran.end.code() != Some(0) {
            return Err(format!("{other} is not wedged, and yet: {:?}", ran.end));
        }
        reached(bench, &wish, &ready.home)?;
        always(bench, &ready.home)?;
    }
    bench.restore(&before);
    Ok(())
}
