//! What set-up has yet to do, and why it was not done: `/var/lib/gpu-handoff/setup.pending`. Written by whoever could not
//! wait (the package's postinst, a kernel's installation), shown by `--status`, worked off by the boot unit.

use super::document;
use super::driver::{self, Wish, kernels};
use super::vfio;
use crate::App;
use crate::gpu::inventory::nvidia_slots;
use crate::stop::{Result, Stop};
use crate::sys::{Kernel, Linux, heed_termination, posix_lock_is_held};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

pub const PATH: &str = "/var/lib/gpu-handoff/setup.pending";

const DPKG_LOCK: &str = "/var/lib/dpkg/lock-frontend";
/// A large upgrade on a slow disk.
const DPKG: Duration = Duration::from_secs(20 * 60);
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    Vfio,
    Driver,
    /// The driver's modules for this kernel.
    Kernel(String),
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Task::Vfio => "vfio",
            Task::Driver => "driver",
            Task::Kernel(_) => "kernel",
        })
    }
}

/// Each with the reason why it was not done yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending(pub BTreeMap<Task, String>);

impl Pending {
    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn read(kernel: &dyn Kernel) -> anyhow::Result<Pending> {
        let document = document::read(kernel, PATH)?;
        document.map_or(Ok(Pending::default()), |value| Pending::from_json(&value).map_err(|error| error.context(PATH)))
    }

    /// # Errors
    /// Names the key that is wrong.
    pub fn from_json(value: &Value) -> anyhow::Result<Pending> {
        let mut tasks = BTreeMap::new();
        // They are told as one line.
        let plain = |why: &str| why.replace(|c: char| c.is_control(), " ");
        for (key, task) in [("vfio", Task::Vfio), ("driver", Task::Driver)] {
            if let Some(why) = document::string(value, key)? {
                tasks.insert(task, plain(&why));
            }
        }
        for (release, why) in value.get("kernels").and_then(Value::as_object).into_iter().flatten() {
            tasks.insert(Task::Kernel(release.clone()), plain(why.as_str().unwrap_or_default()));
        }
        Ok(Pending(tasks))
    }

    pub fn to_json(&self) -> Value {
        let mut value = json!({"vfio": null, "driver": null, "kernels": {}});
        for (task, why) in &self.0 {
            match task {
                Task::Vfio => value["vfio"] = json!(why),
                Task::Driver => value["driver"] = json!(why),
                Task::Kernel(release) => value["kernels"][release] = json!(why),
            }
        }
        value
    }

    /// All reasons, as one line; none when nothing is pending.
    pub fn why(&self) -> Option<String> {
        let reasons: Vec<&str> = self.0.values().map(String::as_str).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    fn write(&self, linux: &Linux) -> anyhow::Result<()> {
        if self.0.is_empty() { document::remove(linux, PATH) } else { document::write(linux, PATH, self.to_json()) }
    }
}

/// Keeps in mind how a task went.
///
/// # Errors
/// When that cannot be written.
pub fn note(app: &App, task: Task, outcome: &Result<()>) -> Result<()> {
    let mut pending = Pending::read(&app.kernel)?;
    let before = pending.clone();
    match outcome {
        Ok(()) => drop(pending.0.remove(&task)),
        Err(stop) => drop(pending.0.insert(task, stop.message.clone())),
    }
    if pending == before { Ok(()) } else { Ok(pending.write(&app.kernel)?) }
}

/// As [`note`], but a person who sees what went wrong adds nothing new to it: only `defer` does.
///
/// # Errors
/// What went wrong, or as [`note`].
pub fn noted(app: &App, task: Task, defer: bool, outcome: Result<()>) -> Result<()> {
    if defer || Pending::read(&app.kernel)?.0.contains_key(&task) {
        note(app, task, &outcome)?;
    }
    outcome
}

/// What [`run`] has to do, a line each.
///
/// # Errors
/// As [`Pending::read`].
pub fn plan(app: &App) -> Result<String> {
    let pending = Pending::read(&app.kernel)?;
    let lines: String = pending.0.iter().map(|(task, why)| format!("{task:<9} {why}\n")).collect();
    Ok(if lines.is_empty() { "nothing to do\n".to_string() } else { lines })
}

/// Works off what is pending, and builds for the running kernel what it lacks of the driver that was set up. Nothing on a
/// host without an NVIDIA GPU, and nothing that delays one where all is well.
///
/// # Errors
/// What could not be done; it stays pending.
pub fn run(app: &App) -> Result<()> {
    let pending = Pending::read(&app.kernel)?;
    let installed = driver::record::read(&app.kernel)?;
    if (pending.0.is_empty() && installed.is_none()) || nvidia_slots(&app.kernel).is_empty() {
        return Ok(());
    }
    heed_termination();
    let mut first = Ok(());
    let mut keep = |outcome: Result<()>| {
        if let Err(stop) = outcome {
            if first.is_ok() {
                first = Err(stop);
            } else {
                app.story.warn(&stop.message);
            }
        }
    };
    let was_cut_off = installed.as_ref().is_some_and(|record| record.began.is_some());
    let is_driver_due = pending.0.contains_key(&Task::Driver) || was_cut_off;
    if !pending.0.is_empty() || was_cut_off {
        wait_for_dpkg(app)?;
    }
    if pending.0.contains_key(&Task::Vfio) {
        let outcome = vfio::setup(app, vfio::Wish::default());
        note(app, Task::Vfio, &outcome)?;
        keep(outcome);
    }
    if is_driver_due {
        let outcome = driver::setup(app, &Wish::default());
        note(app, Task::Driver, &outcome)?;
        keep(outcome);
    }
    keep(kernels::build_for_running(app));
    first
}

/// Whoever installed this package, or a kernel, may have more to install that this needs.
fn wait_for_dpkg(app: &App) -> Result<()> {
    let end = app.kernel.now() + DPKG;
    while posix_lock_is_held(&app.kernel, DPKG_LOCK) {
        if app.kernel.is_asked_to_end() || app.kernel.now() >= end {
            return Err(Stop::failed("dpkg is at work still; once it is done: gpu-handoff setup pending"));
        }
        app.kernel.sleep(LOOK_AGAIN);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let tasks = [
            (Task::Vfio, "no room"),
            (Task::Driver, "headers are missing"),
            (Task::Kernel("6.8.12-4-pve".to_string()), "does not build"),
        ];
        let pending = Pending(tasks.map(|(task, why)| (task, why.to_string())).into());
        assert_eq!(Pending::from_json(&pending.to_json()).unwrap(), pending);
        assert_eq!(pending.why().as_deref(), Some("no room; headers are missing; does not build"));
        let none = Pending::default();
        assert_eq!(Pending::from_json(&none.to_json()).unwrap(), none);
        assert_eq!(none.why(), None);
        assert!(Pending::from_json(&json!({"driver": 1})).is_err());
    }
}
