//! `/run/gpu-handoff/to-start`: what was stopped for a handoff that is over, and does not run again yet, or not for long.

use super::record::Stopped;
use crate::address::{self, SlotId};
use crate::json::put;
use anyhow::Context;
use serde_json::{Value, json};

const SCHEMA: u64 = 1;

/// Something that was stopped for these slots and is to run again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToStart {
    pub what: Stopped,
    pub slots: Vec<SlotId>,
    /// How often it did not start.
    pub tries: u64,
    /// Not before this time: seconds since 1970, UTC.
    pub after: u64,
    /// Since when it runs again, in the same seconds; zero while it does not.
    pub since: u64,
}

impl ToStart {
    #[must_use]
    pub fn new(what: Stopped, slots: &[SlotId]) -> ToStart {
        ToStart { what, slots: slots.to_vec(), tries: 0, after: 0, since: 0 }
    }

    pub fn to_json(entries: &[ToStart]) -> String {
        let one = |entry: &ToStart| {
            let mut value = json!({"what": entry.what.to_json(), "slots": address::to_json(&entry.slots)});
            if entry.tries > 0 {
                put(&mut value, "tries", entry.tries);
                put(&mut value, "after", entry.after);
            }
            if entry.since > 0 {
                put(&mut value, "since", entry.since);
            }
            value
        };
        let entries: Vec<Value> = entries.iter().map(one).collect();
        json!({"schema": SCHEMA, "entries": entries}).to_string()
    }

    /// # Errors
    /// When the text is not what [`ToStart::to_json`] writes.
    pub fn parse_all(bytes: &[u8]) -> anyhow::Result<Vec<ToStart>> {
        let value: Value = serde_json::from_slice(bytes)?;
        anyhow::ensure!(value.get("schema").and_then(Value::as_u64) == Some(SCHEMA), "schema: expected {SCHEMA}");
        let entries = value.get("entries").and_then(Value::as_array).context("entries: no list")?;
        entries
            .iter()
            .map(|entry| ToStart::parse(entry).with_context(|| format!("{entry} is not understood")))
            .collect()
    }

    fn parse(entry: &Value) -> Option<ToStart> {
        let number = |key| entry.get(key).and_then(Value::as_u64).unwrap_or(0);
        Some(ToStart {
            what: Stopped::from_json(entry.get("what")?)?,
            slots: address::from_json(entry.get("slots")?)?,
            tries: number("tries"),
            after: number("after"),
            since: number("since"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let slots = ["0000:01:00".parse().unwrap()];
        let entry = |what| ToStart::new(what, &slots);
        let entries = [
            entry(Stopped::Container(101)),
            ToStart { tries: 3, after: 1_795_176_000, ..entry(Stopped::Unit("x.service".to_string())) },
            ToStart { tries: 1, after: 1_795_176_010, since: 1_795_176_000, ..entry(Stopped::Container(102)) },
            entry(Stopped::Vm(111)),
        ];
        assert_eq!(ToStart::parse_all(ToStart::to_json(&entries).as_bytes()).unwrap(), entries);
        for bad in ["", "{}", r#"{"schema":1}"#, r#"{"schema":1,"entries":[{"what":{},"slots":[]}]}"#] {
            assert!(ToStart::parse_all(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
