//! What systemd is asked for: units stopped and started, work that outlives this run, whether the host goes down.

use crate::sys::{ActError, Kernel};
use std::time::Duration;

const SYSTEMCTL: &str = "/usr/bin/systemctl";
const SYSTEMD_RUN: &str = "/usr/bin/systemd-run";

/// Asking systemd for something takes it milliseconds, unless it is very busy.
const ANSWER: Duration = Duration::from_secs(5);

/// Whether the host is shutting down or rebooting (`systemctl is-system-running`: `stopping`).
pub fn is_stopping(kernel: &dyn Kernel) -> bool {
    // Its exit code says no more than the word, and is a failure for most of them.
    match kernel.program(SYSTEMCTL, &["show", "--property=SystemState", "--value"], ANSWER) {
        Ok(state) => state.trim() == "stopping",
        Err(_) => false,
    }
}

/// `ActiveState` of a unit: `active`, `inactive`, `failed`, `activating`, …; none when systemd does not answer.
pub fn state(kernel: &dyn Kernel, unit: &str) -> Option<String> {
    let text = kernel.program(SYSTEMCTL, &["show", "--property=ActiveState", "--value", "--", unit], ANSWER).ok()?;
    Some(text.trim().to_string())
}

/// Stops a unit and waits until it has; its state is what counts, not what systemctl says of it.
///
/// # Errors
/// systemctl's words when the unit is not stopped in the end.
pub fn stop(kernel: &dyn Kernel, unit: &str, limit: Duration) -> Result<(), ActError> {
    let said = kernel.program(SYSTEMCTL, &["stop", "--", unit], limit);
    match state(kernel, unit).as_deref() {
        Some("inactive" | "failed") => Ok(()),
        state => Err(said.err().unwrap_or_else(|| {
            ActError::Program(format!("{unit} is {} after systemctl stop", state.unwrap_or("in an unknown state")))
        })),
    }
}

/// # Errors
/// systemctl's words when the unit does not run in the end.
pub fn start(kernel: &dyn Kernel, unit: &str, limit: Duration) -> Result<(), ActError> {
    let said = kernel.program(SYSTEMCTL, &["start", "--", unit], limit);
    match state(kernel, unit).as_deref() {
        Some("active" | "activating" | "reloading") => Ok(()),
        state => Err(said.err().unwrap_or_else(|| {
            ActError::Program(format!("{unit} is {} after systemctl start", state.unwrap_or("in an unknown state")))
        })),
    }
}

/// Lets this program run once more with these arguments, in a transient unit of its own that outlives this run.
/// A unit of that name that is there already is left to do its work.
///
/// # Errors
/// systemd-run's words.
pub fn run_later(kernel: &dyn Kernel, unit: &str, arguments: &[&str]) -> Result<(), ActError> {
    if matches!(state(kernel, unit).as_deref(), Some("active" | "activating")) {
        return Ok(());
    }
    let program = std::env::current_exe().map_err(ActError::Os)?;
    let program = program.to_string_lossy();
    let name = format!("--unit={unit}");
    let mut line = vec!["--quiet", "--collect", "--no-block", &name, "--", &program];
    line.extend(arguments);
    kernel.program(SYSTEMD_RUN, &line, ANSWER).map(|_| ())
}
