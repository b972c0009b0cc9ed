//! A kernel call that never came back. Until it does, nobody may go near its slot: every other call would wait for it.

use super::record;
use crate::json::put;
use crate::sys::{Kernel, Process};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wedge {
    pub step: String,
    /// None where an earlier version wrote it, which kept the words alone.
    pub call: Option<Call>,
    pub process: Process,
    /// Date and time, UTC.
    pub since: String,
}

/// What of a step counts for whoever finds it under way still: its words are for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// By modprobe, in this order.
    Load(Vec<String>),
    /// A driver is made to let go of a function.
    Unbind {
        driver: String,
    },
    /// Of this container.
    Freeze(u32),
    Other,
}

impl Call {
    pub fn to_json(&self) -> Value {
        match self {
            Call::Load(modules) => json!({"load": modules}),
            Call::Unbind { driver } => json!({"unbind": driver}),
            Call::Freeze(ctid) => json!({"freeze": ctid}),
            Call::Other => json!({}),
        }
    }

    /// Of a journal or a wedge. None where it does not say, as those of 0.1.0; nor is what another version may have added
    /// a reason to let go of a card.
    pub fn of(file: &Value) -> Option<Call> {
        let call = file.get("call")?.as_object()?;
        let Some((kind, what)) = call.iter().next() else { return Some(Call::Other) };
        match kind.as_str() {
            "load" => {
                let modules = what.as_array()?.iter().map(|module| module.as_str().map(str::to_string));
                Some(Call::Load(modules.collect::<Option<_>>()?))
            }
            "unbind" => Some(Call::Unbind { driver: what.as_str()?.to_string() }),
            "freeze" => Some(Call::Freeze(what.as_u64()?.try_into().ok()?)),
            _ => None,
        }
    }
}

impl Wedge {
    pub fn is_still_stuck(&self, kernel: &dyn Kernel) -> bool {
        kernel.process(self.process.pid) == Some(self.process)
    }

    /// As it is kept.
    pub fn to_json(&self) -> Value {
        let mut value = self.told();
        if let Some(call) = &self.call {
            put(&mut value, "call", call.to_json());
        }
        value
    }

    /// As others are told: what decides is nobody else's.
    pub fn told(&self) -> Value {
        json!({"step": self.step, "pid": self.process.pid, "start": self.process.start, "since": self.since})
    }

    /// # Errors
    /// When the text is not what [`Wedge::to_json`] writes.
    pub fn parse(bytes: &[u8]) -> Result<Wedge> {
        let value: Value = serde_json::from_slice(bytes)?;
        let text = |name: &str| value.get(name).and_then(Value::as_str).with_context(|| format!("{name}: no string"));
        Ok(Wedge {
            step: text("step")?.to_string(),
            call: Call::of(&value),
            process: record::process(&value).context("pid, start: no numbers")?,
            since: text("since")?.to_string(),
        })
    }
}

/// The process that is in a call: modprobe, which outlives the worker that started it, or the worker.
pub fn who_is_at_it(kernel: &dyn Kernel, call: Option<&Call>, worker: Process) -> Option<Process> {
    let loader = match call {
        Some(Call::Load(modules)) => loader(kernel, &|loaded| loaded.eq(modules.iter().map(String::as_str))),
        Some(Call::Unbind { .. } | Call::Freeze(_) | Call::Other) => None,
        // Not known whether it loads. A modprobe that loads what handoffs load, as this program calls it, is either that
        // call or keeps the driver just as busy: to wait for it costs time at most, to go on beside it may hang.
        None => loader(kernel, &|loaded| {
            let mut loaded = loaded.peekable();
            let is_ours = |module: &str| module.starts_with("nvidia") || matches!(module, "nouveau" | "vfio_pci");
            loaded.peek().is_some() && loaded.all(is_ours)
        }),
    };
    loader.or_else(|| kernel.process(worker.pid).filter(|process| *process == worker))
}

/// The modprobe that was started, as this program does it, to load such modules.
fn loader(kernel: &dyn Kernel, is_wanted: &dyn Fn(&mut dyn Iterator<Item = &str>) -> bool) -> Option<Process> {
    let is_it = |pid: &i32| {
        // kmod has many names, and this is the argument that it was started with.
        let command_line = kernel.text(&format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command_line.trim_end_matches('\0').split('\0');
        words.next().is_some_and(|program| program.ends_with("modprobe"))
            && (words.next(), words.next()) == (Some("-a"), Some("--"))
            && is_wanted(&mut words)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn wedge(call: Option<Call>) -> Wedge {
        let process = Process { pid: 7, start: 99 };
        Wedge { step: "a step".to_string(), call, process, since: "2026-11-20T12:00:00Z".to_string() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let load = Call::Load(vec!["nvidia".to_string(), "nvidia_uvm".to_string()]);
        let unbind = Call::Unbind { driver: "nvidia".to_string() };
        for call in [None, Some(load), Some(unbind), Some(Call::Freeze(101)), Some(Call::Other)] {
            let wedge = wedge(call);
            assert_eq!(Wedge::parse(wedge.to_json().to_string().as_bytes()).unwrap(), wedge);
            assert_eq!(wedge.told().get("call"), None);
        }
    }

    #[test]
    fn one_that_does_not_say_what_it_is_counts_all_the_same() {
        let words = r#""step":"unbind from nvidia 0000:01:00.0","pid":7,"start":99,"since":"x""#;
        for call in ["", r#","call":null"#, r#","call":{"reset":1}"#, r#","call":{"load":[1]}"#, r#","call":"load""#] {
            let wedge = Wedge::parse(format!("{{{words}{call}}}").as_bytes()).unwrap();
            assert_eq!(wedge.call, None, "{call}");
        }
    }
}
