//! The `script` of /etc/vzdump.conf: `SCRIPT PHASE [MODE VMID]` (PVE::VZDump::run_hook_script).
//!
//! A VM that is stopped is started to be backed up, and gives its card back right after. With this script the card is freed
//! before the first such VM and stays on vfio-pci until the job ends, so that whoever is stopped for it is stopped once. It
//! fails no backup: what is in the way says so when the VM starts. Should neither job-end nor job-abort come, the keeper
//! brings the card home when the job's lock is free.

use super::{backup, hookscript};
use crate::App;
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::Owner;
use crate::handoff::way::departure::Departure;
use crate::handoff::way::home::Asker;
use crate::proxmox::running;
use std::env;

/// Whoever this program calls has it in his environment, and may call this program.
const CHAINED: &str = "GPU_HANDOFF_VZDUMP";

/// What is ours of a phase.
pub fn run(app: &App, words: &[String]) {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        _ if is_chained() => Ok(()),
        ["backup-start", _, vmid, ..] => vmid.parse().map_or(Ok(()), |vmid| free(app, vmid)),
        ["job-end" | "job-abort", ..] => {
            bring_home(app);
            Ok(())
        }
        _ => Ok(()),
    };
    if let Err(exit) = done {
        app.story.warn(&exit.to_string());
    }
}

/// Last of all: another script with the same words and in the same environment takes the place of this program, and its
/// exit code is the one.
///
/// # Errors
/// When it cannot be run.
pub fn chain(app: &App, words: &[String]) -> Result<()> {
    let Some(script) = app.config_for_hook().vzdump.filter(|_| !is_chained()) else { return Ok(()) };
    let error = app.kernel.make_way_for(&script, words, CHAINED);
    Err(Exit::failed(format!("vzdump.script {script} was not run: {error}")))
}

fn is_chained() -> bool {
    env::var_os(CHAINED).is_some()
}

/// Each card by itself, as if by hand.
fn free(app: &App, vmid: u32) -> Result<()> {
    if running::qemu_pid(app.kernel, vmid).is_some() {
        return Ok(());
    }
    let Some((vm, config, departure)) = hookscript::for_backup(app, vmid)? else { return Ok(()) };
    let handoff = app.handoff(&config);
    backup::wait(&handoff, &vm, &departure);
    for slot in departure.slots {
        let owner = Owner::Manual(slot);
        // Freed by hand, or for a VM before this one.
        if app.store.has_record(&owner) {
            continue;
        }
        let listed = departure.listed.clone();
        handoff.leave(&Departure { listed, for_backup: true, ..Departure::of(owner, vec![slot]) })?;
    }
    Ok(())
}

/// What this job, or one before it that was killed, has had freed. A card that a VM has by now comes home when that stops.
fn bring_home(app: &App) {
    let records = app.store.each_record().into_iter().flatten().filter(|record| record.for_backup);
    let config = app.config_for_hook();
    for record in records {
        if let Err(exit) = app.handoff(&config).come_home(&record.owner, Asker::Person) {
            app.story.warn(&exit.to_string());
        }
    }
}
