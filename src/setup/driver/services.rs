//! NVIDIA's services that are stopped while an installer is at work: which those are is on disk before the first is
//! stopped, so that they run again whoever is killed. `reconcile` starts what nobody is at work for any more.

use super::record::LOCK;
use crate::App;
use crate::exit::{Exit, Result};
use crate::setup::kept::document;
use crate::sys::{Kernel, Lock, Share, flock_is_held};
use crate::systemd;
use serde_json::json;
use std::time::Duration;

/// Forgotten with a reboot, which starts them as well. While this is there, something is owed, and the keeper comes:
/// [`crate::handoff::kept::store::SET_UP`].
pub const PATH: &str = "/run/gpu-handoff/setup-stopped";

/// Held by whoever sets up the driver.
pub const TURN: &str = "/run/gpu-handoff/setup.lock";

/// One set-up at a time, kernels included.
///
/// # Errors
/// When another run has it, or the lock file cannot be made.
pub fn take_turn(app: &App) -> Result<Lock> {
    match app.kernel.lock(TURN, Share::Alone, Duration::ZERO) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => {
            Err(Exit::locked("another run is setting up the driver: wait for it, its log is in /var/log/gpu-handoff"))
        }
        Err(error) => Err(Exit::failed(format!("{}: {error}", TURN))),
    }
}

/// Those that are to be started again.
///
/// # Errors
/// Names the file when it cannot be read or understood.
pub fn owed(kernel: &dyn Kernel) -> anyhow::Result<Vec<String>> {
    document::read(kernel, PATH)?.map_or(Ok(Vec::new()), |value| document::strings(&value, "units"))
}

/// # Errors
/// When that cannot be kept in mind, or one does not stop.
pub fn stop(app: &App, units: &[String]) -> Result<()> {
    let mut all = owed(app.kernel)?;
    all.extend(units.iter().filter(|unit| !all.contains(unit)).cloned().collect::<Vec<_>>());
    document::write(app.kernel, PATH, json!({ "units": all }))?;
    for unit in units {
        systemd::stop(app.kernel, unit).map_err(|error| Exit::failed(format!("{unit} does not stop: {error}")))?;
    }
    Ok(())
}

/// Starts all that are owed; one that does not start is told, and no longer owed.
pub fn start_again(app: &App) {
    let units = match owed(app.kernel) {
        Ok(units) if units.is_empty() => return,
        Ok(units) => units,
        Err(error) => return app.story.warn(&format!("{error:#}")),
    };
    for unit in &units {
        if let Err(error) = systemd::start(app.kernel, unit) {
            app.story.warn(&format!(
                "{unit} was stopped while the driver was set up, and does not start: {error}; try: systemctl start {unit}"
            ));
        }
    }
    if let Err(error) = document::remove(app.kernel, PATH) {
        app.story.warn(&format!("{error:#}"));
    }
}

/// What is not to be started again after all.
///
/// # Errors
/// Names the file that could not be removed.
pub fn forget(app: &App) -> Result<()> {
    Ok(document::remove(app.kernel, PATH)?)
}

/// As [`start_again`], unless a set-up, or an installer that one left behind, is still at work.
pub fn start_forgotten(app: &App) {
    let kernel = app.kernel;
    if kernel.exists(PATH) && ![TURN, LOCK].iter().any(|lock| flock_is_held(kernel, lock)) {
        start_again(app);
        app.story.say("started again what was stopped for a set-up of the driver that was cut off");
    }
}
