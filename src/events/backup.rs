//! A VM that is started only to be backed up: whether it is given its GPU, by `policy.backup`.

use crate::address::{SlotId, list};
use crate::config::{self, Backup, Config};
use crate::decimal::whole_seconds;
use crate::exit::{Code, Exit, Result};
use crate::handoff::Handoff;
use crate::handoff::way::departure::Departure;
use crate::proxmox::vm::VmConfig;
use crate::trouble::Trouble;
use std::time::Duration;

/// Whoever uses the GPU is looked for in all processes.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Proxmox's lock in the configuration, from before the first phase of vzdump's script to after the last.
pub fn is_under_way(vm: &VmConfig) -> bool {
    vm.lock.as_deref() == Some("backup")
}

/// A VM that is stopped is started to be backed up, with its GPU and all.
///
/// # Errors
/// That it is to have none.
pub fn config_for(config: Config, vmid: u32, vm: &VmConfig, slots: &[SlotId]) -> Result<Config> {
    match config.backup {
        _ if !is_under_way(vm) => Ok(config),
        Backup::Refuse => Err(Exit::refused(Trouble::new(
            format!(
                "{} was not touched: VM {vmid} is only started for a backup, and policy.backup is refuse in {}",
                list(slots),
                config::PATH
            ),
            format!("so this backup fails; back VM {vmid} up while it runs, or set policy.backup to idle"),
        ))),
        Backup::Idle | Backup::Wait => Ok(Config { policy: config.policy.for_idle(), ..config }),
        Backup::Policy => Ok(config),
    }
}

/// Until whoever uses the GPU has done so, where that is wanted; what is in the way still says so when it is taken.
pub fn wait(handoff: &Handoff, vm: &VmConfig, departure: &Departure) {
    let (kernel, limit) = (handoff.kernel, handoff.config.time.backup);
    // What the machine lacks no time brings.
    if handoff.config.backup != Backup::Wait || !is_under_way(vm) || handoff.refuse_as_it_is(departure).is_err() {
        return;
    }
    let (begin, mut is_told) = (kernel.now(), false);
    while let Err(exit) = handoff.intend(departure).map(drop) {
        let waited = kernel.now().saturating_sub(begin);
        if exit.code != Code::Refused || waited >= limit || kernel.is_asked_to_end() {
            return;
        }
        if !is_told {
            is_told = true;
            let seconds = whole_seconds(limit);
            handoff.story.say(&format!("waits for up to {seconds} s: {}", exit.trouble.found()));
        }
        kernel.sleep(LOOK_AGAIN.min(limit.saturating_sub(waited)));
    }
}

/// What it means that a start was refused, where Proxmox itself only says that the hook failed.
pub fn told(exit: Exit, vmid: u32, vm: &VmConfig) -> Exit {
    if !is_under_way(vm) {
        return exit;
    }
    exit.and(&format!("VM {vmid} was only to be started for a backup, which fails with this"))
}
