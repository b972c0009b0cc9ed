//! What set-up has yet to do, and why it was not done: `/var/lib/gpu-handoff/setup.pending`. Written by whoever could not
//! wait (the package's postinst, a kernel's installation), shown by `--status`, worked off by the boot unit.

use super::document;
use crate::App;
use crate::exit::Result;
use crate::story::row;
use crate::sys::{Kernel, Share};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

pub const PATH: &str = "/var/lib/gpu-handoff/setup.pending";

/// At boot.
pub const TRIES: u64 = 2;
/// For somebody else to write the file.
const TURN: Duration = Duration::from_secs(5);

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

/// When the boot unit runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The guests are waiting.
    Boot,
    AnyTime,
}

/// Why it was not done yet, and how often the boot unit found so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reason {
    pub why: String,
    pub tries: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending(pub BTreeMap<Task, Reason>);

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
        let reason = |key: &str, value: &Value| {
            let why = value.get("why").and_then(Value::as_str).with_context(|| format!("{key}.why: not a string"))?;
            let tries =
                value.get("tries").and_then(Value::as_u64).with_context(|| format!("{key}.tries: not a number"))?;
            // They are told as one line.
            anyhow::Ok(Reason { why: why.replace(|c: char| c.is_control(), " "), tries })
        };
        let mut tasks = BTreeMap::new();
        for (key, task) in [("vfio", Task::Vfio), ("driver", Task::Driver)] {
            if let Some(value) = value.get(key).filter(|value| !value.is_null()) {
                tasks.insert(task, reason(key, value)?);
            }
        }
        for (release, value) in value.get("kernels").and_then(Value::as_object).into_iter().flatten() {
            tasks.insert(Task::Kernel(release.clone()), reason("kernels", value)?);
        }
        Ok(Pending(tasks))
    }

    pub fn to_json(&self) -> Value {
        let (mut vfio, mut driver, mut kernels) = (Value::Null, Value::Null, serde_json::Map::new());
        for (task, Reason { why, tries }) in &self.0 {
            let reason = json!({"why": why, "tries": tries});
            match task {
                Task::Vfio => vfio = reason,
                Task::Driver => driver = reason,
                Task::Kernel(release) => drop(kernels.insert(release.clone(), reason)),
            }
        }
        json!({"vfio": vfio, "driver": driver, "kernels": kernels})
    }

    /// All reasons, as one line; none when nothing is pending.
    pub fn why(&self) -> Option<String> {
        let reasons: Vec<&str> = self.0.values().map(|reason| reason.why.as_str()).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// Whether it is to be tried now.
    pub fn is_due(&self, task: &Task, at: At) -> bool {
        self.0.get(task).is_some_and(|reason| at == At::AnyTime || reason.tries < TRIES)
    }

    fn write(&self, kernel: &dyn Kernel) -> anyhow::Result<()> {
        if self.0.is_empty() { document::remove(kernel, PATH) } else { document::write(kernel, PATH, self.to_json()) }
    }
}

/// Keeps in mind how a task went.
///
/// # Errors
/// When that cannot be written.
pub fn note(app: &App, task: &Task, outcome: &Result<()>) -> Result<()> {
    change(app, |pending| match outcome {
        Ok(()) => drop(pending.0.remove(task)),
        Err(exit) => pending.0.entry(task.clone()).or_default().why = exit.to_string(),
    })
}

/// # Errors
/// When the file cannot be read or written.
pub fn change(app: &App, change: impl Fn(&mut Pending)) -> Result<()> {
    let read = || -> Result<(Pending, bool)> {
        let before = Pending::read(app.kernel)?;
        let mut now = before.clone();
        change(&mut now);
        let is_other = now != before;
        Ok((now, is_other))
    };
    // Nearly always there is nothing to change.
    if !read()?.1 {
        return Ok(());
    }
    let _turn = app.kernel.lock("/run/gpu-handoff/pending.lock", Share::Alone, TURN);
    match read()? {
        (now, true) => Ok(now.write(app.kernel)?),
        (_, false) => Ok(()),
    }
}

/// As [`note`], but a person who sees what went wrong adds nothing new to it: only `defer` does.
///
/// # Errors
/// What went wrong, or as [`note`].
pub fn noted(app: &App, task: Task, defer: bool, outcome: Result<()>) -> Result<()> {
    if defer || Pending::read(app.kernel)?.0.contains_key(&task) {
        note(app, &task, &outcome)?;
    }
    outcome
}

/// What [`run`] has to do, a line each.
///
/// # Errors
/// As [`Pending::read`].
pub fn plan(app: &App) -> Result<String> {
    let pending = Pending::read(app.kernel)?;
    let lines: String =
        pending.0.iter().map(|(task, reason)| row(&task.to_string(), &format_args!("{}\n", reason.why))).collect();
    Ok(if lines.is_empty() { "nothing to do\n".to_string() } else { lines })
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
        let pending = Pending(tasks.map(|(task, why)| (task, Reason { why: why.to_string(), tries: 1 })).into());
        assert!(pending.is_due(&Task::Vfio, At::Boot) && !pending.is_due(&Task::Kernel(String::new()), At::AnyTime));
        let tried = Pending([(Task::Vfio, Reason { why: String::new(), tries: TRIES })].into());
        assert!(tried.is_due(&Task::Vfio, At::AnyTime) && !tried.is_due(&Task::Vfio, At::Boot));
        assert_eq!(Pending::from_json(&pending.to_json()).unwrap(), pending);
        assert_eq!(pending.why().as_deref(), Some("no room; headers are missing; does not build"));
        let none = Pending::default();
        assert_eq!(Pending::from_json(&none.to_json()).unwrap(), none);
        assert_eq!(none.why(), None);
        for wrong in [json!({"driver": 1}), json!({"driver": {"why": 1, "tries": 0}}), json!({"kernels": {"x": "y"}})] {
            assert!(Pending::from_json(&wrong).is_err(), "{wrong}");
        }
    }
}
