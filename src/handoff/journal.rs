//! The step that a handoff is at, written before the step is taken.
//!
//! Each handoff has one, named after whom its slots go to. Finding one without anybody holding the locks of its slots
//! means that a handoff was killed in the middle; its worker may still be in the call that the journal names.

use super::record::Owner;
use super::step::Step;
use crate::sys::Process;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const SCHEMA: u64 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    pub owner: Owner,
    /// The slots that the step may leave in an unknown state.
    pub slots: Vec<String>,
    pub step: String,
    /// Who carries the step out.
    pub worker: Process,
}

impl Journal {
    pub fn new(owner: &Owner, slots: &[&str], step: &Step, worker: Process) -> Journal {
        let of_step = slots.iter().filter(|slot| step.slot().is_none_or(|own| own == **slot));
        Journal {
            owner: owner.clone(),
            slots: of_step.map(|slot| (*slot).to_string()).collect(),
            step: step.to_string(),
            worker,
        }
    }

    pub fn to_json(&self) -> String {
        json!({
            "schema": SCHEMA,
            "owner": self.owner.file_name(),
            "slots": self.slots,
            "step": self.step,
            "pid": self.worker.pid,
            "start": self.worker.start,
        })
        .to_string()
    }

    /// # Errors
    /// When the text is not a journal of this schema.
    pub fn parse(bytes: &[u8]) -> Result<Journal> {
        let value: Value = serde_json::from_slice(bytes)?;
        ensure!(value.get("schema").and_then(Value::as_u64) == Some(SCHEMA), "schema: expected {SCHEMA}");
        let text = |name: &str| value.get(name).and_then(Value::as_str).with_context(|| format!("{name}: no string"));
        let slots = value.get("slots").and_then(Value::as_array).context("slots: no list")?;
        Ok(Journal {
            owner: Owner::from_file_name(text("owner")?).context("owner: unknown")?,
            slots: slots
                .iter()
                .map(|slot| slot.as_str().map(str::to_string).context("slots: not a string"))
                .collect::<Result<_>>()?,
            step: text("step")?.to_string(),
            worker: process(&value).context("pid, start: no numbers")?,
        })
    }
}

/// The process that a journal or a wedge names.
pub fn process(value: &Value) -> Option<Process> {
    let pid = value.get("pid")?.as_i64()?.try_into().ok()?;
    Some(Process { pid, start: value.get("start")?.as_u64()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let unbind = Step::Unbind { address: "0000:02:00.0".to_string(), driver: "nvidia".to_string() };
        let worker = Process { pid: 7, start: 99 };
        let journal = Journal::new(&Owner::Vm(111), &["0000:01:00", "0000:02:00"], &unbind, worker);
        assert_eq!(journal.slots, ["0000:02:00"]);
        assert_eq!(Journal::parse(journal.to_json().as_bytes()).unwrap(), journal);
        let unload = Step::Unload { module: "nvidia".to_string() };
        let journal = Journal::new(&Owner::Vm(111), &["0000:01:00", "0000:02:00"], &unload, worker);
        assert_eq!(journal.slots.len(), 2);
        assert!(Journal::parse(b"{}").is_err());
    }
}
