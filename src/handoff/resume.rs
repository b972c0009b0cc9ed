//! Starts again what was stopped for a handoff, once that is over: from a transient unit, without the lock, because
//! what is started may take its time and may itself have a hook that comes here.
//!
//! `/run/gpu-handoff/to-start` has what is to be started. It is written under the lock before a record ends, and each
//! entry is taken out when it runs or has failed for good, so that whoever is killed in between loses nothing.

use super::halt::PCT;
use super::policy::is_nvidia_service;
use super::record::Stopped;
use super::store::Locked;
use super::{Handoff, LOOK_AGAIN};
use crate::gpu::containers;
use crate::stop::Result;
use crate::systemd;
use anyhow::Context;
use serde_json::{Value, json};
use std::time::Duration;

const SCHEMA: u64 = 1;

/// The transient unit.
const UNIT: &str = "gpu-handoff-resume";

/// The verb that it runs.
pub const VERB: &str = "resume";

/// Something that failed to start is tried again after this.
const PAUSE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 3;

/// Something that was stopped for these slots and is to run again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToStart {
    pub what: Stopped,
    pub slots: Vec<String>,
}

impl ToStart {
    pub fn to_json(entries: &[ToStart]) -> String {
        let entries: Vec<Value> =
            entries.iter().map(|entry| json!({"what": entry.what.to_json(), "slots": entry.slots})).collect();
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
        let slots = entry.get("slots")?.as_array()?;
        Some(ToStart {
            what: Stopped::from_json(entry.get("what")?)?,
            slots: slots.iter().map(|slot| slot.as_str().map(str::to_string)).collect::<Option<_>>()?,
        })
    }
}

impl Handoff<'_> {
    /// Whatever of `what` was stopped for these slots starts again, soon and by itself. Called before the record ends.
    pub(super) fn start_again(&self, locked: &Locked, slots: &[&str], what: &[Stopped]) {
        if what.is_empty() {
            return;
        }
        let slots: Vec<String> = slots.iter().map(|slot| (*slot).to_string()).collect();
        // Last stopped, first started.
        let new = what.iter().rev().map(|what| ToStart { what: what.clone(), slots: slots.clone() });
        let mut entries = self.to_start();
        entries.retain(|entry| !what.contains(&entry.what));
        entries.extend(new);
        let kept = locked.set_to_start(&entries).map_err(|error| format!("{error:#}"));
        let names: Vec<String> = what.iter().map(ToString::to_string).collect();
        match kept.and_then(|()| self.resume_later()) {
            Ok(()) => self.story.say(&format!("  then start again: {}", names.join(", "))),
            Err(problem) => {
                self.story.warn(&format!("{problem}; what was stopped stays so, start it: {}", names.join(", ")));
            }
        }
    }

    /// What is still to be started for these slots, and shall now stay stopped until they are back.
    pub(super) fn take_to_start(&self, locked: &Locked, slots: &[&str]) -> Result<Vec<Stopped>> {
        let (taken, rest): (Vec<ToStart>, Vec<ToStart>) = self
            .to_start()
            .into_iter()
            .partition(|entry| entry.slots.iter().any(|slot| slots.contains(&slot.as_str())));
        if !taken.is_empty() {
            locked.set_to_start(&rest)?;
        }
        // In the order in which it was stopped.
        Ok(taken.into_iter().rev().map(|entry| entry.what).collect())
    }

    /// Starts what is to be started.
    ///
    /// # Errors
    /// When the lock is not to be had; what could not be started is told and given up.
    pub fn resume(&self) -> Result<()> {
        let mut attempts = 0;
        loop {
            // Under the lock for a moment: a handoff that has just begun takes back what it wants stopped.
            let locked = self.lock(self.config.lock + self.config.handoff, &[], "try again: gpu-handoff resume")?;
            let entry = self.to_start().into_iter().next();
            drop(locked);
            let Some(entry) = entry else { return Ok(()) };
            if systemd::Shutdown::ask(self.kernel).has_begun() {
                return Ok(());
            }
            attempts += 1;
            match self.start(&entry.what) {
                Ok(()) => self.story.say(&format!("{} runs again", entry.what)),
                Err(_) if attempts < ATTEMPTS => {
                    self.kernel.sleep(PAUSE);
                    continue;
                }
                Err(problem) => self.story.error(&format!("{} was stopped for a handoff and {problem}", entry.what)),
            }
            attempts = 0;
            let locked = self.lock(self.config.lock + self.config.handoff, &[], "try again: gpu-handoff resume")?;
            let mut entries = self.to_start();
            entries.retain(|other| *other != entry);
            locked.set_to_start(&entries)?;
        }
    }

    /// Whether anything waits to be started; whoever was to do it may have been killed.
    pub(super) fn resume_what_was_forgotten(&self) {
        if !self.to_start().is_empty()
            && let Err(problem) = self.resume_later()
        {
            self.story.warn(&problem);
        }
    }

    fn resume_later(&self) -> std::result::Result<(), String> {
        systemd::run_later(self.kernel, UNIT, &[VERB]).map_err(|error| error.to_string())
    }

    fn to_start(&self) -> Vec<ToStart> {
        self.store.to_start().unwrap_or_else(|error| {
            self.story.warn(&format!("{error:#}"));
            Vec::new()
        })
    }

    fn start(&self, what: &Stopped) -> std::result::Result<(), String> {
        let (asked, remedy) = match what {
            // One of NVIDIA's may run again already, for the cards that stayed; it must see those that came back.
            Stopped::Unit(unit) if is_nvidia_service(unit) => {
                (systemd::restart(self.kernel, unit), format!("systemctl start {unit}"))
            }
            Stopped::Unit(unit) => (systemd::start(self.kernel, unit), format!("systemctl start {unit}")),
            Stopped::Container(ctid) => {
                let remedy = format!("pct start {ctid}");
                if containers::runs(self.kernel, *ctid) {
                    return Ok(());
                }
                let asked = self.kernel.program(PCT, &["start", &ctid.to_string()], self.config.stop);
                (asked.map(|_| ()), remedy)
            }
        };
        // What counts is how things are: under HA a start is only queued.
        let end = self.kernel.now() + self.config.stop / if asked.is_ok() { 1 } else { 10 };
        loop {
            let (runs, failed) = match what {
                Stopped::Unit(unit) => {
                    let state = systemd::state(self.kernel, unit);
                    (state.as_deref() == Some("active"), state.as_deref() == Some("failed"))
                }
                Stopped::Container(ctid) => (containers::runs(self.kernel, *ctid), false),
            };
            if runs {
                return Ok(());
            }
            if failed || self.kernel.now() >= end {
                let why = asked.err().map_or_else(|| "it was asked to".to_string(), |error| error.to_string());
                return Err(format!("does not run again ({why}); start it: {remedy}"));
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let entry = |what| ToStart { what, slots: vec!["0000:01:00".to_string()] };
        let entries = [entry(Stopped::Container(101)), entry(Stopped::Unit("x.service".to_string()))];
        assert_eq!(ToStart::parse_all(ToStart::to_json(&entries).as_bytes()).unwrap(), entries);
        for bad in ["", "{}", r#"{"schema":1}"#, r#"{"schema":1,"entries":[{"what":{},"slots":[]}]}"#] {
            assert!(ToStart::parse_all(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
