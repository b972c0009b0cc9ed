//! Starts again what was stopped for a handoff, once that is over: from a transient unit, without the lock, because
//! what is started may take its time and may itself have a hook that comes here.
//!
//! `/run/gpu-handoff/to-start` has what is to be started. It is written before a record ends, and each entry is taken out
//! when that runs or is there no more, so that whoever is killed in between loses nothing. What does not start is tried
//! again by the keeper.

use super::{Handoff, LOOK_AGAIN};
use crate::address::SlotId;
use crate::exit::{Code, Exit, Result};
use crate::gpu::containers;
use crate::handoff::kept::owed;
use crate::handoff::kept::record::Stopped;
use crate::handoff::kept::to_start::ToStart;
use crate::handoff::plan::policy::is_nvidia_service;
use crate::handoff::way::halt::PCT;
use crate::systemd;
use std::time::Duration;

/// The transient unit.
const UNIT: &str = "gpu-handoff-resume";

/// The verb that it runs.
pub const VERB: &str = "resume";

/// Something that failed to start is tried again after this.
const PAUSE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 3;

impl Handoff<'_> {
    /// Whatever of `what` was stopped for these slots starts again, soon and by itself. Called before the record ends.
    ///
    /// # Errors
    /// When that could not be written down: then the record must keep it.
    pub(super) fn start_again(&self, slots: &[SlotId], what: &[Stopped]) -> Result<()> {
        if what.is_empty() {
            return Ok(());
        }
        self.to_start();
        let names: Vec<String> = what.iter().map(ToString::to_string).collect();
        let names = names.join(", ");
        // Last stopped, first started.
        let new =
            what.iter().rev().map(|what| ToStart { what: what.clone(), slots: slots.to_vec(), tries: 0, after: 0 });
        let new: Vec<ToStart> = new.collect();
        let kept = self.store.change_to_start(|entries| {
            entries.retain(|entry| !what.contains(&entry.what));
            entries.extend(new);
        });
        kept.map_err(|error| Exit::failed(format!("{error:#}; {names} stays stopped for now")))?;
        match self.resume_later() {
            Ok(()) => self.story.say(&format!("  then start again: {names}")),
            Err(problem) => {
                self.story.warn(&format!(
                    "{problem}; {names} starts again with the keeper's next look, or type: gpu-handoff resume"
                ));
            }
        }
        Ok(())
    }

    /// What is still to be started for these slots, in the order in which it was stopped.
    pub(super) fn to_start_for(&self, slots: &[SlotId]) -> Vec<Stopped> {
        let is_for = |entry: &ToStart| entry.slots.iter().any(|slot| slots.contains(slot));
        self.to_start().into_iter().rev().filter(is_for).map(|entry| entry.what).collect()
    }

    /// Starts what is to be started.
    ///
    /// # Errors
    /// When somebody had the lock of a slot that something was stopped for. What did not start is told of; both are
    /// tried again by the keeper.
    pub fn resume(&self) -> Result<()> {
        let mut seen: Vec<Stopped> = Vec::new();
        let mut locked_out = None;
        let is_there = |what: &Stopped| self.to_start().into_iter().find(|entry| entry.what == *what);
        while let Some(entry) = self.to_start().into_iter().find(|entry| !seen.contains(&entry.what)) {
            let what = &entry.what;
            seen.push(what.clone());
            // Under the lock for a moment: a handoff that has just begun takes back what it wants stopped.
            match self.lock(self.config.time.lock, &entry.slots, "try again: gpu-handoff resume") {
                Ok(locked) => drop(locked),
                Err(exit) if exit.code == Code::Locked => {
                    locked_out = Some(exit);
                    continue;
                }
                Err(exit) => return Err(exit),
            }
            if is_there(what).is_none() {
                continue;
            }
            if systemd::Shutdown::ask(self.kernel).has_begun() {
                return Ok(());
            }
            let done = self.start_at_last(what);
            let tries = entry.tries + 1;
            let after = self.kernel.unix_time() + owed::pause(tries).as_secs();
            match &done {
                Ok(()) => self.story.say(&format!("{what} runs again")),
                Err(problem) => self.story.error(&format!("{what} was stopped for a handoff and {problem}")),
            }
            let is_done = done.is_ok() || self.is_no_more(what);
            self.store.change_to_start(|entries| {
                entries.retain(|other| !is_done || other.what != *what);
                for other in entries.iter_mut().filter(|other| other.what == *what) {
                    (other.tries, other.after) = (tries, after);
                }
            })?;
        }
        locked_out.map_or(Ok(()), Err)
    }

    fn start_at_last(&self, what: &Stopped) -> std::result::Result<(), String> {
        for _ in 1..ATTEMPTS {
            if self.start(what).is_ok() {
                return Ok(());
            }
            self.kernel.sleep(PAUSE);
        }
        self.start(what)
    }

    /// What was removed meanwhile can never be started: nobody is owed that.
    fn is_no_more(&self, what: &Stopped) -> bool {
        match what {
            // Without Proxmox's file system nothing is known of any container.
            Stopped::Container(ctid) => {
                self.kernel.exists("/etc/pve/lxc") && !self.kernel.exists(&format!("/etc/pve/lxc/{ctid}.conf"))
            }
            Stopped::Unit(unit) => systemd::is_no_more(self.kernel, unit),
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

    /// As [`Handoff::resume_what_was_forgotten`], but for what has failed and is left alone for a while.
    pub(super) fn resume_what_is_due(&self) {
        let now = self.kernel.unix_time();
        if self.to_start().iter().any(|entry| entry.after <= now) {
            self.resume_what_was_forgotten();
        }
    }

    fn resume_later(&self) -> std::result::Result<(), String> {
        systemd::run_later(self.kernel, UNIT, &[VERB]).map_err(|error| error.to_string())
    }

    pub(super) fn to_start(&self) -> Vec<ToStart> {
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
                let asked = self.kernel.program(PCT, &["start", &ctid.to_string()], self.config.time.stop);
                (asked.map(|_| ()), remedy)
            }
        };
        // What counts is how things are: under HA a start is only queued.
        let end = self.kernel.now() + self.config.time.stop / if asked.is_ok() { 1 } else { 10 };
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
