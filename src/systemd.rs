//! What systemd is asked for: units stopped and started, work that outlives this run, whether the host goes down.

use crate::sys::{ActError, Kernel, Running};
use std::cell::{OnceCell, RefCell};
use std::time::Duration;

const SYSTEMCTL: &str = "/usr/bin/systemctl";
const SYSTEMD_RUN: &str = "/usr/bin/systemd-run";

/// Asking systemd for something takes it milliseconds, unless it is very busy.
pub const ANSWER: Duration = Duration::from_secs(5);

/// Whether the host is shutting down or rebooting. Asking goes on beside this run, until somebody wants to know.
pub struct Shutdown {
    answer: RefCell<Option<Running>>,
    is_stopping: OnceCell<bool>,
}

impl Shutdown {
    pub fn ask(kernel: &dyn Kernel) -> Shutdown {
        // Not `is-system-running`, whose exit code is a failure for most of its answers.
        let answer = kernel.start_program(SYSTEMCTL, &["show", "--property=SystemState", "--value"]).ok();
        Shutdown { answer: RefCell::new(answer), is_stopping: OnceCell::new() }
    }

    pub fn has_begun(&self) -> bool {
        let read = || self.answer.take().and_then(|answer| answer.finish(Some(ANSWER)).ok());
        *self.is_stopping.get_or_init(|| read().is_some_and(|state| state.trim() == "stopping"))
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
    match begin_later(kernel, unit, arguments).and_then(|running| running.finish(Some(ANSWER))) {
        // Asked only then: it costs as much as starting the unit.
        Err(_) if matches!(state(kernel, unit).as_deref(), Some("active" | "activating")) => Ok(()),
        answer => answer.map(|_| ()),
    }
}

/// As [`run_later`], without waiting until systemd has been told.
///
/// # Errors
/// When systemd-run could not be started.
pub fn begin_later(kernel: &dyn Kernel, unit: &str, arguments: &[&str]) -> Result<Running, ActError> {
    let program = std::env::current_exe().map_err(ActError::Os)?;
    let program = program.to_string_lossy();
    // How the kernel names a file that was replaced since: by an upgrade, while this runs.
    let program = program.trim_end_matches(" (deleted)");
    let name = format!("--unit={unit}");
    let mut line = vec!["--quiet", "--collect", "--no-block", &name];
    // A worker that is stuck stays behind, and comes back for the card when its call does.
    line.push("--property=KillMode=process");
    // What it has to say is in the journal already, by way of syslog.
    line.push("--property=StandardError=null");
    line.extend(["--", program]);
    line.extend(arguments);
    kernel.start_program(SYSTEMD_RUN, &line)
}
