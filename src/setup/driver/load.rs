//! Loading the driver, as the last step of setting it up.

use crate::App;
use crate::config::Config;
use crate::events::notes::handoff_is_under_way;
use crate::exit::{Exit, Result};
use crate::gpu::inventory::{Slot, nvidia_slots};
use crate::handoff::way::reconcile::Scope;
use crate::sys::Action;
use std::time::Duration;

const NVIDIA_SMI: &str = "/usr/bin/nvidia-smi";

/// Loading the driver has it look at every GPU; taking it out has it let go of them.
pub const LOAD: Duration = Duration::from_secs(120);
const SMI: Duration = Duration::from_secs(60);

/// Loads the driver where a GPU is at home, with those of its modules that were loaded before, makes the device nodes,
/// and asks nvidia-smi. `wanted` is the version that it must be.
///
/// # Errors
/// The words of whoever said no.
pub fn load(app: &App, config: &Config, before: &[String], wanted: Option<&str>) -> Result<()> {
    let is_at_home = |driver: Option<&str>| driver.is_none_or(|driver| driver == "nvidia");
    let slots = || nvidia_slots(app.kernel);
    let has_gpu = || slots().iter().filter_map(Slot::gpu).any(|gpu| is_at_home(gpu.driver.as_deref()));
    let outcome = if has_gpu() { try_load(app, config, before, wanted) } else { Ok(()) };
    // A VM may have taken it meanwhile.
    if has_gpu() && !handoff_is_under_way(app.kernel) {
        return outcome;
    }
    app.story.say("driver: no GPU is at home, so nothing is loaded: it is when one comes home");
    Ok(())
}

fn try_load(app: &App, config: &Config, before: &[String], wanted: Option<&str>) -> Result<()> {
    let mut modules = ["nvidia", "nvidia_uvm"].map(str::to_string).to_vec();
    modules.extend(before.iter().filter(|module| !modules.contains(module)).cloned().collect::<Vec<_>>());
    app.kernel
        .act(&Action::Load { modules }, LOAD)
        .map_err(|error| Exit::failed(format!("driver: its modules cannot be loaded: {error}")))?;
    // A GPU may have come home meanwhile and found no driver; and the nodes are made.
    if let Err(exit) = app.handoff(config).reconcile(Scope::All) {
        app.story.warn(&exit.to_string());
    }
    let said = app.kernel.program(NVIDIA_SMI, &["--query-gpu=driver_version", "--format=csv,noheader"], SMI);
    let said = said.map_err(|error| Exit::failed(format!("driver: nvidia-smi does not work: {error}")))?;
    let first = said.lines().next().unwrap_or_default().trim();
    if let Some(wanted) = wanted.filter(|wanted| *wanted != first) {
        return Err(Exit::failed(format!("driver: nvidia-smi says {}, not {wanted}", first.escape_debug())));
    }
    let number = said.lines().count();
    app.story.say(&format!("driver: nvidia-smi finds {number} GPU(s) with driver {}", first.escape_debug()));
    Ok(())
}
