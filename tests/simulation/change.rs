//! One change by the kernel's rules, and what comes of those that hang.

use super::pci::{Block, Reply};
use super::state::{Hung, NodeState, State, Until};
use gpu_handoff::sys::{Action, Process};
use nix::libc;
use std::time::Duration;

/// How long a worker whose call has come back lives on: it has started reconcile and then ends.
const LINGER: Duration = Duration::from_millis(2);

/// One change, by the kernel's rules.
pub fn apply(state: &mut State, action: &Action) -> Reply {
    let releases = match action {
        Action::Unload { .. } => true,
        Action::Write { path, .. } => path.ends_with("/unbind") && !path.contains("/vfio-pci/"),
        _ => false,
    };
    if releases {
        state.note_release();
    }
    let reply = change(state, action);
    state.settle_console();
    reply
}

fn change(state: &mut State, action: &Action) -> Reply {
    match action {
        Action::Write { path, data } => state.write(path, data),
        Action::Load { modules } => state.load_all(modules),
        Action::Unload { module } => state.unload(module),
        Action::MakeNode(node) => {
            let (number, mode, uid, gid) = (node.number, node.mode, node.uid, node.gid);
            state.nodes.insert(node.path.clone(), NodeState { number, mode, uid, gid });
            Reply::Done
        }
        // No thread runs in it.
        Action::Pin { .. } => Reply::Errno(libc::ESRCH),
    }
}

/// Ends every hang whose time has come: what it held is free, what it was about is done.
pub fn settle(state: &mut State) {
    while let Some(index) = state.hung.iter().position(|hung| has_come(state, &hung.until)) {
        let hung = state.hung.remove(index);
        for address in &hung.locks {
            if let Some(function) = state.functions.get_mut(address) {
                function.locked = false;
            }
        }
        state.in_between.retain(|module| !hung.modules.contains(module));
        match apply(state, &hung.action) {
            Reply::Blocks(block) => {
                let Block { until, locks, modules } = block;
                state.hung.push(Hung { until, locks, modules, ..hung });
            }
            _ => {
                for address in &hung.locks {
                    // An unbind that had begun is through with it, whatever else was to be done.
                    if state.functions.get(address).is_some_and(|f| f.link_is_gone) {
                        state.complete_unbind(address);
                    }
                }
                state.settle_console();
                outlive(state, hung.process);
            }
        }
    }
}

/// Its run is gone, so it starts reconcile; then it ends.
pub fn outlive(state: &mut State, worker: Process) {
    let end = state.now + LINGER;
    if let Some(process) = state.processes.get_mut(&worker.pid) {
        process.ends = Some(end);
        state.outlived.push(worker);
    }
}

fn has_come(state: &State, until: &Until) -> bool {
    match until {
        Until::Never => false,
        Until::Time(time) => state.now >= *time,
        Until::Unused(address) => state.usage(address) == 0,
        Until::GroupFree(address) => !state.is_group_taken(state.functions[address].group),
        Until::Silent(address) => state.sound_number(address).is_none_or(|number| state.is_open(number) == 0),
        Until::Unlocked(address) => !state.functions[address].locked,
        Until::Settled(module) => !state.in_between.contains(module),
    }
}
