//! A kernel call that never came back. Until it does, nobody may go near its slot: every other call would wait for it.

use super::journal;
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
            process: journal::process(&value).context("pid, start: no numbers")?,
            since: text("since")?.to_string(),
        })
    }
}

impl fmt::Display for Wedge {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} has not come back since {} (PID {})", self.step, self.since, self.process.pid)
    }
}
