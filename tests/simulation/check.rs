//! What must hold after every run, whatever befell it, and what must hold in the end. Looks at the machine itself, not
//! at what it shows to the program.

use super::bench::{Bench, End, Ran, Wish, World};
use super::faults::Kind;
use super::machine::AtHome;
use super::state::State;
use gpu_handoff::address::SlotId;
use gpu_handoff::handoff::kept::record::{Owner, Progress, Record, Stopped};
use gpu_handoff::proxmox::running;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

/// Besides its time box a run may wait for a killed run's worker, and for others to let go.
const SLACK: Duration = Duration::from_secs(3);

pub type Check = Result<(), String>;

fn all(problems: Vec<String>) -> Check {
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

/// What must hold at any moment.
pub fn always(bench: &Bench, home: &AtHome) -> Check {
    let state = bench.kernel.state.borrow().clone();
    let records = bench.store.records().map_err(|error| format!("{error:#}"))?;
    let mut problems = Vec::new();

    for address in state.functions.keys() {
        let slot = &address[..address.len() - 2];
        let is_known = records.iter().any(|record| record.slots().iter().any(|own| own.to_string() == slot));
        let moved = home.differences(&state, Some(std::slice::from_ref(address)));
        if !moved.is_empty() && !is_known && !bench.store.wedged_slots().iter().any(|wedged| wedged.to_string() == slot)
        {
            problems.push(format!("forgotten: {}", moved.join("; ")));
        }
    }
    if records.is_empty() && bench.store.wedged_slots().is_empty() {
        problems.extend(home.differences(&state, None).into_iter().map(|line| format!("forgotten: {line}")));
    }

    problems.extend(nothing_is_owed_unknown(bench, &state, &records, home));

    // Who was given a slot, and whose QEMU has it.
    let mut owners: BTreeSet<(String, u32)> = BTreeSet::new();
    for record in records.iter().filter(|record| record.progress == Progress::Away) {
        let Some(vmid) = record.owner.vmid() else { continue };
        if is_running(&state, vmid) || state.pid_files.keys().any(|other| *other != vmid) {
            owners.extend(record.slots().into_iter().map(|slot| (slot.to_string(), vmid)));
        }
    }
    for (vmid, pid) in &state.pid_files {
        let groups = state.processes.get(pid).map(|process| process.groups.clone()).unwrap_or_default();
        let taken = state.functions.iter().filter(|(_, function)| groups.contains(&function.group));
        owners.extend(taken.map(|(address, _)| (address[..address.len() - 2].to_string(), *vmid)));
    }
    for (slot, vmid) in &owners {
        if let Some((_, other)) = owners.iter().find(|(s, other)| s == slot && other > vmid) {
            problems.push(format!("two owners of {slot}: VM {vmid} and VM {other}"));
        }
    }
    for (_, process) in state.living() {
        for (address, function) in &state.functions {
            if process.groups.contains(&function.group) && function.driver != Some("vfio-pci") {
                problems.push(format!("{address} was taken from a running VM"));
            }
        }
    }
    all(problems)
}

/// Whoever is frozen or stopped stands where the keeper looks, and something is there for which the keeper comes.
fn nothing_is_owed_unknown(bench: &Bench, state: &State, records: &[Record], home: &AtHome) -> Vec<String> {
    let to_start = bench.store.to_start().unwrap_or_default();
    let mut problems = Vec::new();
    let frozen = state.frozen();
    for ctid in frozen.iter().filter(|ctid| !records.iter().any(|record| record.frozen.contains(ctid))) {
        problems.push(format!("container {ctid} is frozen, and no record says so"));
    }
    let stopped = state.running().missing(&home.running);
    let is_known = |what: &Stopped| {
        to_start.iter().any(|entry| entry.what == *what) || records.iter().any(|record| record.stopped.contains(what))
    };
    for what in stopped.iter().filter(|what| !is_known(what)) {
        problems.push(format!("{what} was stopped, and nothing says that it is to run again"));
    }
    let moved = home.differences(state, Some(&[String::new()]));
    let is_settled = frozen.is_empty() && stopped.is_empty() && moved.is_empty() && records.is_empty();
    if !is_settled && !bench.has_keeper() {
        problems.push(format!("no keeper comes for {frozen:?}, {stopped:?}, {moved:?}"));
    }
    problems
}

fn is_running(state: &State, vmid: u32) -> bool {
    state.pid_files.contains_key(&vmid) || state.locked_guests.contains(&vmid)
}

/// Whether a run with this fault in its way ended as the contract says.
pub fn ended_well(bench: &Bench, wish: &Wish, kind: Option<Kind>, ran: &Ran, before: &World, home: &AtHome) -> Check {
    let state = bench.kernel.state.borrow().clone();
    if state.hosted.too_early {
        return Err("a driver lost a card before a container that was to be frozen stood still".to_string());
    }
    if ran.took > bench.budget() + SLACK {
        return Err(format!("past the budget: {:?}", ran.took));
    }
    let code = match &ran.end {
        End::Exit(code, _) => *code,
        End::Killed if kind.is_some_and(Kind::is_kill) => return Ok(()),
        End::Killed => return Err("killed by nobody".to_string()),
        End::Stalled(path) => return Err(format!("stands still: reading {path} never returns")),
        End::Panicked(text) => return Err(format!("panic: {text}")),
    };
    let hindered = kind.is_some_and(Kind::goes_on);
    if !hindered && before.state.frozen().is_empty() && !state.frozen().is_empty() {
        return Err(format!("it ended by itself and left containers {:?} frozen", state.frozen()));
    }
    match (wish, code) {
        (_, 0) => reached(bench, wish, home),
        (Wish::Leave(..), 1) if hindered => Ok(()),
        (Wish::Leave(owner, _), 1) => {
            if bench.record(owner).is_some() && !before.files.contains_key(&owner.file_name()) {
                return Err("exit 1 and rolled back, but the record is still there".to_string());
            }
            // Rolled back means home; only what another record keeps away stays away.
            let elsewhere = bench.store.records().unwrap_or_default();
            let differences = home.differences(&state, None);
            if differences.is_empty() || !elsewhere.is_empty() {
                return all(if elsewhere.is_empty() { differences } else { Vec::new() });
            }
            Err(format!("exit 1, but not back where it was: {}", differences.join("; ")))
        }
        (Wish::Home(owner), 1) if bench.record(owner).is_none() => Err("exit 1 without a record".to_string()),
        (Wish::Home(_) | Wish::Reconcile | Wish::Unfinished | Wish::Owed | Wish::Watch(_) | Wish::Keep(..), 1) => {
            Ok(())
        }
        (_, 3) => {
            if bench.world().but_for_time() == before.clone().but_for_time() {
                Ok(())
            } else {
                Err("exit 3, but something changed".to_string())
            }
        }
        (_, 4) if !bench.store.wedged_slots().is_empty() || ran.took > bench.budget() / 2 => Ok(()),
        // Asked to end while it waited.
        (_, 4) if kind == Some(Kind::Term) => Ok(()),
        (_, 4) => Err("exit 4 without a wedge and within the time box".to_string()),
        (_, code) => Err(format!("exit {code}")),
    }
}

/// Whether what was wished for is so.
pub fn reached(bench: &Bench, wish: &Wish, home: &AtHome) -> Check {
    match wish {
        Wish::Leave(owner, slots) => is_with(bench, owner, slots),
        Wish::Home(owner) => {
            if bench.record(owner).is_some() {
                return Err("exit 0, but the record is still there".to_string());
            }
            always(bench, home)
        }
        // Or all of it went home with a start that was killed.
        Wish::Keep(owner, kept) => match bench.record(owner).and_then(|record| record.without(kept)) {
            Some(more) => Err(format!("exit 0, but {owner} still has {:?}", more.slots())),
            None => always(bench, home),
        },
        // A VM that is started again has it.
        Wish::Watch(id) if is_running(&bench.kernel.state.borrow(), *id) => always(bench, home),
        Wish::Watch(id) => reached(bench, &Wish::Home(Owner::Vm(*id)), home),
        Wish::Reconcile | Wish::Unfinished | Wish::Owed => {
            let left: Vec<String> = bench
                .store
                .records()
                .map_err(|error| format!("{error:#}"))?
                .iter()
                .filter(|record| match &record.owner {
                    Owner::Vm(_) if *wish == Wish::Unfinished && record.progress == Progress::Away => false,
                    Owner::Vm(id) => running::qemu_pid(&bench.kernel, *id).is_none(),
                    Owner::Manual(_) => record.progress != Progress::Away,
                })
                .map(|record| format!("exit 0, but {} is not home", record.owner))
                .collect();
            all(left)
        }
    }
}

/// Every function on vfio-pci, held there by its override, and a finished record.
fn is_with(bench: &Bench, owner: &Owner, slots: &[SlotId]) -> Check {
    let state = bench.kernel.state.borrow();
    let mut problems = Vec::new();
    for (address, function) in
        state.functions.iter().filter(|(a, _)| slots.iter().any(|s| a.starts_with(&s.to_string())))
    {
        if function.driver != Some("vfio-pci") || function.link_is_gone {
            problems.push(format!("{address} is on {:?}, not with {owner}", function.driver));
        }
        let lives_there = state.static_ids.contains(&(function.vendor, function.device));
        if function.driver_override.as_deref() != Some("vfio-pci") && !lives_there {
            problems.push(format!("{address} has override {:?}", function.driver_override));
        }
        if function.power.d3cold_allowed.as_deref() == Some("1") && !lives_there {
            problems.push(format!("{address} may lose its power while it is with {owner}"));
        }
    }
    match bench.record(owner) {
        None => problems.push(format!("no record of {owner}")),
        Some(record) if record.progress != Progress::Away => problems.push("the record is not finished".to_string()),
        Some(_) => {}
    }
    problems.extend(unfinished_business(bench, slots));
    all(problems)
}

/// A journal or a wedge of these slots: work in progress that nobody works on.
fn unfinished_business(bench: &Bench, slots: &[SlotId]) -> Vec<String> {
    let files = bench.files();
    let wedges: Vec<String> = slots.iter().map(|slot| format!("wedged-{slot}")).collect();
    let of = |name: &&String| name.starts_with("journal") || wedges.contains(name) || name.starts_with('.');
    files.keys().filter(of).map(|name| format!("{name} is left")).collect()
}

/// Everything is home, and nothing is left behind.
pub fn is_home(bench: &Bench, home: &AtHome) -> Check {
    let mut problems = home.differences(&bench.kernel.state.borrow(), None);
    let other = other_nodes(bench, home);
    // What had no chance to be mended is told.
    let told = bench.status_of_nodes();
    problems.extend(
        other.iter().filter(|gpu| !told.contains(gpu)).map(|gpu| format!("{gpu} has other nodes in /dev/dri, untold")),
    );
    let is_left = |name: &&String| *name != "dri" || other.is_empty();
    problems.extend(bench.files().keys().filter(is_left).map(|name| format!("{name} is left")));
    all(problems)
}

/// Where nvidia_drm follows the cards, those that come home in another order than they were found in change names.
pub fn other_nodes(bench: &Bench, home: &AtHome) -> Vec<String> {
    let state = bench.kernel.state.borrow();
    let mut other = home.other_nodes(&state);
    other.retain(|address| home.functions[address].0 == Some("nvidia") && state.drm_looks_once());
    other
}

/// What a run did is in its history, and what it did not do is not.
pub fn history_tells(bench: &Bench, wish: &Wish, ran: &Ran) -> Check {
    let End::Exit(code, message) = &ran.end else { return Ok(()) };
    let lines = bench.history();
    let (owner, direction) = match wish {
        Wish::Leave(owner, _) => (owner.clone(), "vfio"),
        Wish::Home(owner) | Wish::Keep(owner, _) => (owner.clone(), "home"),
        Wish::Watch(id) => (Owner::Vm(*id), "home"),
        Wish::Reconcile | Wish::Unfinished | Wish::Owed => return Ok(()),
    };
    let mine = lines.iter().filter(|line| line["direction"] == direction && line["vmid"] == json!(owner.vmid()));
    let mine: Vec<&Value> = mine.collect();
    if bench.counted() != lines.len() as u64 {
        return Err(format!("{} handoffs were counted, and the history is {lines:?}", bench.counted()));
    }
    let is_told = match mine.as_slice() {
        // Others' handoffs may have been put right on the way.
        [] => *code == 0 && (ran.acts == 0 || !lines.is_empty()),
        [line] if *code == 0 => ran.acts > 0 && line["exit"] == 0 && line["reason"].is_null(),
        [line] => line["exit"] == *code && line["reason"] == json!(message),
        _ => false,
    };
    if is_told { Ok(()) } else { Err(format!("the history of exit {code} after {} changes is {lines:?}", ran.acts)) }
}
