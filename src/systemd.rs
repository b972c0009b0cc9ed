//! What systemd is asked for: units stopped and started, work that outlives this run, whether the host goes down.

use crate::sys::{ActError, Kernel, Running};
use std::cell::{OnceCell, RefCell};
use std::time::Duration;

pub const SYSTEMCTL: &str = "/usr/bin/systemctl";
const SYSTEMD_RUN: &str = "/usr/bin/systemd-run";

/// Of the unified hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// Asking systemd for something takes it milliseconds, unless it is very busy.
pub const ANSWER: Duration = Duration::from_secs(5);

/// Of a transient unit: when its first process ends, the others go on.
const LEAVES_OTHERS: &str = "--property=KillMode=process";

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

/// Whether the host is still coming up.
pub fn is_booting(kernel: &dyn Kernel) -> bool {
    let state = kernel.program(SYSTEMCTL, &["show", "--property=SystemState", "--value"], ANSWER);
    state.is_ok_and(|state| matches!(state.trim(), "initializing" | "starting"))
}

/// `ActiveState` of a unit: `active`, `inactive`, `failed`, `activating`, …; none when systemd does not answer.
pub fn state(kernel: &dyn Kernel, unit: &str) -> Option<String> {
    let text = kernel.program(SYSTEMCTL, &["show", "--property=ActiveState", "--value", "--", unit], ANSWER).ok()?;
    Some(text.trim().to_string())
}

/// Whether there is no such unit any more, or nobody may start it. False when systemd does not answer.
pub fn is_no_more(kernel: &dyn Kernel, unit: &str) -> bool {
    let state = kernel.program(SYSTEMCTL, &["show", "--property=LoadState", "--value", "--", unit], ANSWER);
    state.is_ok_and(|state| matches!(state.trim(), "not-found" | "masked"))
}

/// Whether any process is alive in a cgroup, `system.slice/x.service` or `lxc/101`: quicker than asking systemd, and true
/// whatever the command said that started or stopped it.
pub fn has_processes(kernel: &dyn Kernel, cgroup: &str) -> bool {
    let events = kernel.text(&format!("{CGROUPS}/{cgroup}/cgroup.events")).unwrap_or_default();
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

/// As [`start`], and one that runs is stopped before.
///
/// # Errors
/// systemctl's words.
pub fn restart(kernel: &dyn Kernel, unit: &str) -> Result<(), ActError> {
    kernel.program(SYSTEMCTL, &["restart", "--no-block", "--", unit], ANSWER).map(|_| ())
}

/// Runs a program in a transient unit, which outlives this run. A unit of that name that is there already is left to do
/// its work.
///
/// # Errors
/// systemd-run's words.
pub fn run_transient(kernel: &dyn Kernel, unit: &str, program: &[&str]) -> Result<(), ActError> {
    run(kernel, unit, &transient(unit, &[], program))
}

/// As [`run_transient`]; what the program leaves behind goes on after it.
///
/// # Errors
/// systemd-run's words.
pub fn run_and_leave(kernel: &dyn Kernel, unit: &str, program: &[&str]) -> Result<(), ActError> {
    run(kernel, unit, &transient(unit, &[LEAVES_OTHERS], program))
}

/// Lets this program run once more with these arguments, as [`run_transient`] does.
///
/// # Errors
/// systemd-run's words.
pub fn run_later(kernel: &dyn Kernel, unit: &str, arguments: &[&str]) -> Result<(), ActError> {
    run(kernel, unit, &once_more(unit, arguments)?)
}

/// Lets this program run with these arguments every so many seconds, until somebody stops the timer of that name.
///
/// # Errors
/// systemd-run's words.
pub fn run_again_and_again(kernel: &dyn Kernel, unit: &str, every: &str, arguments: &[&str]) -> Result<(), ActError> {
    let mut line = vec![format!("--on-active={every}"), format!("--on-unit-inactive={every}")];
    line.extend(once_more(unit, arguments)?);
    match kernel.program(SYSTEMD_RUN, &words(&line), ANSWER) {
        Err(_) if state(kernel, &format!("{unit}.timer")).as_deref() == Some("active") => Ok(()),
        answer => answer.map(|_| ()),
    }
}

/// As [`run_later`], without waiting until systemd has been told.
///
/// # Errors
/// When systemd-run could not be started.
pub fn begin_later(kernel: &dyn Kernel, unit: &str, arguments: &[&str]) -> Result<Running, ActError> {
    kernel.start_program(SYSTEMD_RUN, &words(&once_more(unit, arguments)?))
}

fn run(kernel: &dyn Kernel, unit: &str, line: &[String]) -> Result<(), ActError> {
    match kernel.program(SYSTEMD_RUN, &words(line), ANSWER) {
        // Asked only then: it costs as much as starting the unit.
        Err(_) if matches!(state(kernel, unit).as_deref(), Some("active" | "activating")) => Ok(()),
        answer => answer.map(|_| ()),
    }
}

fn once_more(unit: &str, arguments: &[&str]) -> Result<Vec<String>, ActError> {
    let program = std::env::current_exe().map_err(ActError::Os)?;
    let program = program.to_string_lossy();
    // How the kernel names a file that was replaced since: by an upgrade, while this runs.
    let program = program.trim_end_matches(" (deleted)");
    let properties = [
        // A worker that is stuck stays behind, and comes back for the card when its call does.
        LEAVES_OTHERS,
        // What it has to say is in the journal already, by way of syslog.
        "--property=StandardError=null",
    ];
    Ok(transient(unit, &properties, &[&[program], arguments].concat()))
}

fn transient(unit: &str, properties: &[&str], program: &[&str]) -> Vec<String> {
    let name = format!("--unit={unit}");
    let options = ["--quiet", "--collect", "--no-block", &name];
    [&options, properties, &["--"], program].concat().iter().map(ToString::to_string).collect()
}

fn words(line: &[String]) -> Vec<&str> {
    line.iter().map(String::as_str).collect()
}
