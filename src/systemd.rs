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

/// Whether a unit of the host's has processes, read from its cgroup: quicker than asking systemd.
pub fn has_processes(kernel: &dyn Kernel, unit: &str) -> bool {
    let events = kernel.text(&format!("/sys/fs/cgroup/system.slice/{unit}/cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

/// What systemd stops together with a unit because it requires that unit, and what requires those in turn: of all that,
/// what is active, whatever requires something before that something.
pub fn stopped_along(kernel: &dyn Kernel, unit: &str) -> Vec<String> {
    let mut found = vec![unit.to_string()];
    let mut looked_at = 0;
    while let Some(unit) = found.get(looked_at) {
        let asked = ["show", "--property=RequiredBy,BoundBy,ConsistsOf", "--value", "--", unit];
        let names = kernel.program(SYSTEMCTL, &asked, ANSWER).unwrap_or_default();
        for name in names.split_whitespace() {
            let is_new = !found.iter().any(|other| other == name);
            if is_new && state(kernel, name).as_deref() == Some("active") {
                found.push(name.to_string());
            }
        }
        looked_at += 1;
    }
    found.remove(0);
    found.reverse();
    found
}

/// Asks for a unit to be stopped; its state tells when it is.
///
/// # Errors
/// systemctl's words.
pub fn stop(kernel: &dyn Kernel, unit: &str) -> Result<(), ActError> {
    kernel.program(SYSTEMCTL, &["stop", "--no-block", "--", unit], ANSWER).map(|_| ())
}

/// Asks for a unit to be started; its state tells when it runs.
///
/// # Errors
/// systemctl's words.
pub fn start(kernel: &dyn Kernel, unit: &str) -> Result<(), ActError> {
    kernel.program(SYSTEMCTL, &["start", "--no-block", "--", unit], ANSWER).map(|_| ())
}

/// As [`start`], and one that runs is stopped before; its state tells when it runs; its state tells when it does.
///
/// # Errors
/// systemctl's words.
pub fn restart(kernel: &dyn Kernel, unit: &str) -> Result<(), ActError> {
    kernel.program(SYSTEMCTL, &["restart", "--no-block", "--", unit], ANSWER).map(|_| ())
}

/// Runs a program in a transient unit, which outlives this run. Under a unit of that name that is already at work,
/// nothing is started.
///
/// # Errors
/// systemd-run's words.
pub fn run_transient(kernel: &dyn Kernel, unit: &str, program: &[&str]) -> Result<(), ActError> {
    if matches!(state(kernel, unit).as_deref(), Some("active" | "activating")) {
        return Ok(());
    }
    let name = format!("--unit={unit}");
    let line = [&["--quiet", "--collect", "--no-block", &name, "--"], program].concat();
    kernel.program(SYSTEMD_RUN, &line, ANSWER).map(|_| ())
}

/// Lets this program run once more with these arguments, as [`run_transient`] does.
///
/// # Errors
/// systemd-run's words.
pub fn run_later(kernel: &dyn Kernel, unit: &str, arguments: &[&str]) -> Result<(), ActError> {
    let program = std::env::current_exe().map_err(ActError::Os)?;
    run_transient(kernel, unit, &[&[&*program.to_string_lossy()], arguments].concat())
}
