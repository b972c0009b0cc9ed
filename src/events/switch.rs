//! A person has a VM take the GPU of another: that is shut down, whatever the policy says, and this one is started.

use super::hookscript;
use crate::App;
use crate::exit::{Exit, Result};
use crate::handoff::way::halt::QM;
use crate::proxmox::running;
use crate::trouble::Trouble;
use std::time::Duration;

/// A start of a VM may take as long as Proxmox lets it; its hook has time boxes of its own.
const START: Duration = Duration::from_secs(3600);

/// # Errors
/// Why a VM that has the GPU is not shut down, or this one was not started.
pub fn switch(app: &App, vmid: u32) -> Result<()> {
    refuse_running(app, vmid)?;
    let config = app.config_for_verb()?;
    let handoff = app.handoff(&config);
    let departure = hookscript::departure(app, vmid)?;
    let making_way = handoff.who_makes_way(&departure, true)?;
    if making_way.is_empty() {
        handoff.plan_leave(&departure)?;
    }
    // Until its hook is through, nobody else takes over.
    let _locks = handoff.take_over(&departure.owner, &making_way)?;
    let started = app.kernel.program(QM, &["start", &vmid.to_string()], START);
    let see = "see gpu-handoff --status";
    started.map_err(|error| Exit::failed(Trouble::new(format!("VM {vmid} was not started: {error}"), see)))?;
    app.story.say(&format!("VM {vmid} is started"));
    Ok(())
}

/// What [`switch`] would do now.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, vmid: u32) -> Result<String> {
    refuse_running(app, vmid)?;
    let config = app.config_for_verb()?;
    let mut planned = hookscript::plan_after_others(&app.handoff(&config), &hookscript::departure(app, vmid)?, true)?;
    planned.lines.push(("start", format!("{QM} start {vmid}")));
    Ok(planned.to_text())
}

fn refuse_running(app: &App, vmid: u32) -> Result<()> {
    match running::qemu_pid(app.kernel, vmid) {
        Some(_) => Err(Exit::refused(Trouble::new(format!("VM {vmid} runs already"), "see gpu-handoff --status"))),
        None => Ok(()),
    }
}
