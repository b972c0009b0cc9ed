//! Starts again what was stopped for a handoff, once that is over: from a transient unit, without the lock, because
//! what is started may take its time and may itself have a hook that comes here.
//!
//! `/run/gpu-handoff/to-start` has what is to be started. It is written before a record ends, and each entry is taken out
//! when that has run for a while or is there no more, so that whoever is killed in between loses nothing. What does not
//! start, or soon fails, is tried again by the keeper.
//!
//! Last stopped, first started, VMs as well: so whoever was stopped for a VM that is to run again stays as it is. That one's
//! start finds the card idle, and owes it from then on.

use super::{Handoff, LOOK_AGAIN};
use crate::address::SlotId;
use crate::exit::{Code, Exit, Result};
use crate::gpu::containers;
use crate::handoff::kept::owed;
use crate::handoff::kept::record::Stopped;
use crate::handoff::kept::to_start::ToStart;
use crate::handoff::plan::policy::is_nvidia_service;
use crate::handoff::way::halt::{PCT, stop_unit};
use crate::proxmox::running;
use crate::systemd;
use std::time::Duration;

/// The transient unit.
const UNIT: &str = "gpu-handoff-resume";

/// The verb that it runs.
pub const VERB: &str = "resume";

/// Something that failed to start is tried again after this.
const PAUSE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 3;

/// Who runs again has this long to open the GPU. Until then nobody can see that it uses that: a handoff that begins
/// meanwhile stops it once more, and who fails without the GPU is started once more.
const SETTLES: Duration = Duration::from_secs(10);

/// Meanwhile more may come to be started.
const LOOK_FOR_MORE: Duration = Duration::from_millis(200);

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
        let new: Vec<ToStart> = what.iter().rev().map(|what| ToStart::new(what.clone(), slots)).collect();
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
        // Not what somebody has stopped since it ran again.
        let is_owed = |entry: &ToStart| match entry.what {
            _ if entry.since == 0 => true,
            // A handoff stops none: it makes way before, and that is owed on a record.
            Stopped::Vm(_) => false,
            _ => self.runs(&entry.what) || self.has_failed(&entry.what),
        };
        let is_for = |entry: &ToStart| entry.slots.iter().any(|slot| slots.contains(slot)) && is_owed(entry);
        self.to_start().into_iter().rev().filter(is_for).map(|entry| entry.what).collect()
    }

    /// What was started again for these slots so shortly before that it may not have opened the GPU yet.
    pub(super) fn just_started(&self, slots: &[SlotId]) -> Vec<Stopped> {
        let is_for = |entry: &ToStart| entry.since > 0 && entry.slots.iter().any(|slot| slots.contains(slot));
        let is_vm = |what: &Stopped| matches!(what, Stopped::Vm(_));
        let entries = self.to_start().into_iter();
        let entries = entries.filter(|entry| is_for(entry) && !is_vm(&entry.what) && self.runs(&entry.what));
        entries.map(|entry| entry.what).collect()
    }

    /// Starts what is to be started, and sees that it goes on.
    ///
    /// # Errors
    /// When somebody had the lock of a slot that something was stopped for. What did not start is told of; both are
    /// tried again by the keeper.
    pub fn resume(&self) -> Result<()> {
        let mut seen: Vec<Stopped> = Vec::new();
        let mut locked_out = None;
        loop {
            let entries = self.to_start();
            if let Some(entry) = entries.iter().find(|entry| entry.since == 0 && !seen.contains(&entry.what)) {
                match self.start_one(entry) {
                    Ok(Started::Runs) => continue,
                    Ok(Started::Not) => {}
                    Ok(Started::Shutdown) => return Ok(()),
                    Err(exit) if exit.code == Code::Locked => locked_out = Some(exit),
                    Err(exit) => return Err(exit),
                }
                seen.push(entry.what.clone());
                continue;
            }
            let now = self.kernel.unix_time();
            let settles = entries.iter().filter(|entry| entry.since > 0).map(|entry| left_to_settle(entry, now)).min();
            match settles {
                None => break,
                Some(0) => seen.extend(self.see_who_stays(now)?),
                Some(_) if self.kernel.is_asked_to_end() => break,
                Some(_) => self.kernel.sleep(LOOK_FOR_MORE),
            }
        }
        locked_out.map_or(Ok(()), Err)
    }

    fn start_one(&self, entry: &ToStart) -> Result<Started> {
        let what = &entry.what;
        // Under the lock for a moment: a handoff that has just begun takes back what it wants stopped.
        drop(self.lock(self.config.time.lock, &entry.slots, "try again: gpu-handoff resume")?);
        if !self.to_start().iter().any(|entry| entry.what == *what) {
            return Ok(Started::Runs);
        }
        if systemd::Shutdown::ask(self.kernel).has_begun() {
            return Ok(Started::Shutdown);
        }
        if let Stopped::Vm(vmid) = what
            && let Some(why) = self.is_not_to_start(*vmid)
        {
            self.story.say(&format!("{what} is not started again: {why}"));
            self.store.change_to_start(|entries| entries.retain(|other| other.what != *what))?;
            return Ok(Started::Not);
        }
        let done = self.start_at_last(what);
        match &done {
            Ok(()) => self.story.say(&format!("{what} runs again")),
            Err(problem) => self.story.error(&format!("{what} was stopped for a handoff and {problem}")),
        }
        if done.is_err() && self.is_no_more(what) {
            self.store.change_to_start(|entries| entries.retain(|other| other.what != *what))?;
            return Ok(Started::Not);
        }
        let now = self.kernel.unix_time();
        let since = if done.is_ok() { now } else { 0 };
        self.change_entry(what, &|entry| {
            entry.tries += 1;
            entry.since = since;
            entry.after = now + if since > 0 { SETTLES } else { owed::pause(entry.tries) }.as_secs();
        })?;
        Ok(if since > 0 { Started::Runs } else { Started::Not })
    }

    /// Of those whose time has come: who has failed is the keeper's from now on, and nobody else is owed anything any more.
    /// What does not run and has not failed was stopped by somebody who meant it.
    fn see_who_stays(&self, now: u64) -> Result<Vec<Stopped>> {
        let is_due = |entry: &ToStart| entry.since > 0 && left_to_settle(entry, now) == 0;
        let due: Vec<Stopped> = self.to_start().into_iter().filter(is_due).map(|entry| entry.what).collect();
        let failed: Vec<Stopped> = due.into_iter().filter(|what| self.has_failed(what)).collect();
        self.store.change_to_start(|entries| entries.retain(|entry| !is_due(entry) || failed.contains(&entry.what)))?;
        // Not one that a handoff has stopped once more since.
        let still = self.to_start();
        for what in failed.iter().filter(|what| still.iter().any(|entry| entry.what == **what && is_due(entry))) {
            self.story
                .warn(&format!("{what} was stopped for a handoff, ran again, and has failed since; it is tried again"));
            self.change_entry(what, &|entry| {
                entry.since = 0;
                entry.after = now + owed::pause(entry.tries).as_secs();
            })?;
        }
        Ok(failed)
    }

    fn change_entry(&self, what: &Stopped, change: &dyn Fn(&mut ToStart)) -> Result<()> {
        self.store
            .change_to_start(|entries| entries.iter_mut().filter(|entry| entry.what == *what).for_each(change))?;
        Ok(())
    }

    fn start_at_last(&self, what: &Stopped) -> std::result::Result<(), String> {
        if let Stopped::Vm(vmid) = what {
            // There is a whole handoff in it: once more is the keeper's.
            return self.start_vm(*vmid);
        }
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
            Stopped::Vm(vmid) => self.is_not_to_start(*vmid).is_some(),
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

    fn runs(&self, what: &Stopped) -> bool {
        match what {
            Stopped::Unit(unit) => systemd::state(self.kernel, unit).as_deref() == Some("active"),
            Stopped::Container(ctid) => containers::runs(self.kernel, *ctid),
            Stopped::Vm(vmid) => running::qemu_pid(self.kernel, *vmid).is_some(),
        }
    }

    /// Whoever asked for it may have been killed since, and that goes on by itself: until it is over the container runs, and
    /// then it does not.
    fn wait_until_stopped(&self, ctid: u32) {
        let unit = format!("{}.service", stop_unit(ctid));
        let end = self.kernel.now() + self.config.time.stop;
        let is_at_it = || matches!(systemd::state(self.kernel, &unit).as_deref(), Some("active" | "activating"));
        while is_at_it() && self.kernel.now() < end && !self.kernel.is_asked_to_end() {
            self.kernel.sleep(LOOK_FOR_MORE);
        }
    }

    fn has_failed(&self, what: &Stopped) -> bool {
        matches!(what, Stopped::Unit(unit) if systemd::state(self.kernel, unit).as_deref() == Some("failed"))
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
                self.wait_until_stopped(*ctid);
                if containers::runs(self.kernel, *ctid) {
                    return Ok(());
                }
                let asked = self.kernel.program(PCT, &["start", &ctid.to_string()], self.config.time.stop);
                (asked.map(|_| ()), remedy)
            }
            Stopped::Vm(vmid) => return self.start_vm(*vmid),
        };
        // What counts is how things are: under HA a start is only queued.
        let end = self.kernel.now() + self.config.time.stop / if asked.is_ok() { 1 } else { 10 };
        loop {
            if self.runs(what) {
                return Ok(());
            }
            if self.has_failed(what) || self.kernel.now() >= end {
                let why = asked.err().map_or_else(|| "it was asked to".to_string(), |error| error.to_string());
                return Err(format!("does not run again ({why}); start it: {remedy}"));
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
    }
}

/// How it went with one entry.
enum Started {
    Runs,
    Not,
    /// The host goes down: nothing is started any more.
    Shutdown,
}

/// In seconds; none where the clock was set back meanwhile.
fn left_to_settle(entry: &ToStart, now: u64) -> u64 {
    if now < entry.since { 0 } else { (entry.since + SETTLES.as_secs()).saturating_sub(now) }
}
