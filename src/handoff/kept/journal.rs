//! The step that a handoff is at, written before the step is taken.
//!
//! Each handoff has one, named after whom its slots go to. Finding one without anybody holding the locks of its slots
//! means that a handoff was killed in the middle; its worker may still be in the call that the journal names.

use super::record::{Owner, process};
use super::wedge::Call;
use crate::address::{self, SlotId};
use crate::json::put;
use crate::sys::Process;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const SCHEMA: u64 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    pub owner: Owner,
    /// The slots that the step may leave in an unknown state.
    pub slots: Vec<SlotId>,
    pub step: String,
    /// None where an earlier version wrote it, which kept the words alone.
    pub call: Option<Call>,
    /// Who carries the step out.
    pub worker: Process,
}

impl Journal {
    pub fn to_json(&self) -> String {
        let mut value = json!({
            "schema": SCHEMA,
            "owner": self.owner.file_name(),
            "slots": address::to_json(&self.slots),
            "step": self.step,
            "pid": self.worker.pid,
            "start": self.worker.start,
        });
        if let Some(call) = &self.call {
            put(&mut value, "call", call.to_json());
        }
        value.to_string()
    }

    /// # Errors
    /// When the text is not a journal of this schema.
    pub fn parse(bytes: &[u8]) -> Result<Journal> {
        let value: Value = serde_json::from_slice(bytes)?;
        ensure!(value.get("schema").and_then(Value::as_u64) == Some(SCHEMA), "schema: expected {SCHEMA}");
        let text = |name: &str| value.get(name).and_then(Value::as_str).with_context(|| format!("{name}: no string"));
        let slots = value.get("slots").context("slots: no list")?;
        Ok(Journal {
            owner: Owner::from_file_name(text("owner")?).context("owner: unknown")?,
            slots: address::from_json(slots).with_context(|| format!("slots: {slots} is no list of slots"))?,
            step: text("step")?.to_string(),
            call: Call::of(&value),
            worker: process(&value).context("pid, start: no numbers")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let (owner, slots) = (Owner::Vm(111), vec!["0000:02:00".parse().unwrap()]);
        let (step, worker) = ("a step".to_string(), Process { pid: 7, start: 99 });
        let without = Journal { owner, slots, step, call: None, worker };
        let journal = Journal { call: Some(Call::Load(vec!["nvidia".to_string()])), ..without.clone() };
        for journal in [without, journal] {
            assert_eq!(Journal::parse(journal.to_json().as_bytes()).unwrap(), journal);
        }
        assert!(Journal::parse(b"{}").is_err());
    }
}
