//! A kernel call that never came back. Until it does, nobody may go near its slot: every other call would wait for it.

use super::record;
use crate::sys::{Kernel, Process};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wedge {
    pub step: String,
    pub process: Process,
    /// Date and time, UTC.
    pub since: String,
}

impl Wedge {
    pub fn is_still_stuck(&self, kernel: &dyn Kernel) -> bool {
        kernel.process(self.process.pid) == Some(self.process)
    }

    pub fn to_json(&self) -> Value {
        json!({"step": self.step, "pid": self.process.pid, "start": self.process.start, "since": self.since})
    }

    /// # Errors
    /// When the text is not what [`Wedge::to_json`] writes.
    pub fn parse(bytes: &[u8]) -> Result<Wedge> {
        let value: Value = serde_json::from_slice(bytes)?;
        let text = |name: &str| value.get(name).and_then(Value::as_str).with_context(|| format!("{name}: no string"));
        Ok(Wedge {
            step: text("step")?.to_string(),
            process: record::process(&value).context("pid, start: no numbers")?,
            since: text("since")?.to_string(),
        })
    }
}

/// The process that is in a call of this step: modprobe, which outlives the worker that started it, or the worker.
pub fn who_is_at_it(kernel: &dyn Kernel, step: &str, worker: Process) -> Option<Process> {
    let loader = step.strip_prefix("load ").and_then(|modules| loader(kernel, modules));
    loader.or_else(|| kernel.process(worker.pid).filter(|process| *process == worker))
}

/// The modprobe that was started to load these modules.
fn loader(kernel: &dyn Kernel, modules: &str) -> Option<Process> {
    let mut wanted = vec!["-a", "--"];
    wanted.extend(modules.split(' '));
    let is_it = |pid: &i32| {
        // kmod has many names, and this is the argument that it was started with.
        let command_line = kernel.text(&format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command_line.trim_end_matches('\0').split('\0');
        words.next().is_some_and(|program| program.ends_with("modprobe")) && words.eq(wanted.iter().copied())
    };
    let is_named = |pid: &i32| kernel.text(&format!("/proc/{pid}/comm")).as_deref() == Some("modprobe");
    let pids = kernel.list("/proc").into_iter().filter_map(|name| name.parse::<i32>().ok());
    pids.filter(is_named).find(is_it).and_then(|pid| kernel.process(pid))
}

impl fmt::Display for Wedge {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} has not come back since {} (PID {})", self.step, self.since, self.process.pid)
    }
}
