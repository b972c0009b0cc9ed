//! One handoff from its beginning to its end, for who asks later: `--status` about the last of a slot, `history` about all.

use super::Handoff;
use crate::address::{self, SlotId};
use crate::exit::Exit;
use crate::handoff::kept::history;
use crate::handoff::kept::record::Owner;
use crate::handoff::kept::store::Locked;
use crate::handoff::way::run::Outcome;
use crate::utc::utc;
use serde_json::{Value, json};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Vfio,
    Home,
}

/// A handoff that somebody wants: refused, or done as far as it went.
pub struct Attempt {
    direction: Direction,
    vmid: Option<u32>,
    slots: Vec<SlotId>,
    /// A time of [`crate::sys::Kernel::now`].
    pub begin: Duration,
    took: Option<Duration>,
    there: Vec<(&'static str, Duration)>,
    /// The way back of one that failed.
    back: Vec<(&'static str, Duration)>,
}

impl Attempt {
    pub fn new(direction: Direction, owner: &Owner, slots: &[SlotId], begin: Duration) -> Attempt {
        let vmid = owner.vmid();
        Attempt { direction, vmid, slots: slots.to_vec(), begin, took: None, there: Vec::new(), back: Vec::new() }
    }

    pub fn is_about(&mut self, slots: &[SlotId]) {
        self.slots = slots.to_vec();
    }

    pub fn phase(&mut self, name: &'static str, took: Duration) {
        self.there.push((name, took));
    }

    pub fn add(&mut self, outcome: &Outcome) {
        self.there.extend(&outcome.phases);
    }

    pub fn add_back(&mut self, outcome: &Outcome) {
        self.back.extend(&outcome.phases);
    }

    /// What all of it took; the first to ask decides when it was over.
    pub fn took(&mut self, now: Duration) -> Duration {
        *self.took.get_or_insert(now.saturating_sub(self.begin))
    }

    /// Not refused, and there was something to do.
    fn has_begun(&self) -> bool {
        !self.there.is_empty()
    }

    fn to_json(&self, time: &str, took: Duration, exit: Option<&Exit>) -> Value {
        let ways = [("there", &self.there), ("back", &self.back)];
        let phase =
            |way, (name, took): &(&str, Duration)| json!({"name": name, "ms": took.as_millis() as u64, "way": way});
        let phases: Vec<Value> =
            ways.iter().flat_map(|(way, phases)| phases.iter().map(|one| phase(*way, one))).collect();
        json!({
            "schema": history::SCHEMA,
            "time": time,
            "direction": match self.direction { Direction::Vfio => "vfio", Direction::Home => "home" },
            "vmid": self.vmid,
            "slots": address::to_json(&self.slots),
            "exit": exit.map_or(0, |exit| exit.code as u8),
            "ms": took.as_millis() as u64,
            "phases": phases,
            "reason": exit.map(ToString::to_string),
        })
    }
}

impl Handoff<'_> {
    /// Writes down how it ended. Only for being asked about later, so that failing to is no failure.
    pub(super) fn note(&self, locked: Option<&Locked>, mut attempt: Attempt, exit: Option<&Exit>) {
        if exit.is_none() && !attempt.has_begun() {
            return;
        }
        let took = attempt.took(self.kernel.now());
        let document = attempt.to_json(&utc(self.kernel.unix_time()), took, exit);
        let warn = |done: anyhow::Result<()>| {
            if let Err(error) = done {
                self.story.warn(&format!("{error:#}"));
            }
        };
        if let Some(locked) = locked.filter(|_| attempt.has_begun()) {
            attempt.slots.iter().for_each(|slot| warn(locked.set_last(*slot, &document)));
        }
        self.store.remember(&document).into_iter().for_each(|error| warn(Err(error)));
    }

    /// As [`Handoff::note`], of one that was refused before anybody took the lock for it.
    pub fn note_refused(&self, direction: Direction, owner: &Owner, slots: &[SlotId], exit: &Exit) {
        self.note(None, Attempt::new(direction, owner, slots, self.kernel.now()), Some(exit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document() {
        let slot: SlotId = "0000:01:00".parse().unwrap();
        let mut attempt = Attempt::new(Direction::Vfio, &Owner::Vm(111), &[slot], Duration::from_secs(5));
        attempt.phase("check", Duration::from_micros(7900));
        assert_eq!(attempt.took(Duration::from_millis(5084)), Duration::from_millis(84));
        assert_eq!(attempt.took(Duration::from_secs(9)), Duration::from_millis(84));
        let time = "2026-11-20T12:00:00Z";
        let expected = json!({"schema": 1, "time": time, "direction": "vfio", "vmid": 111, "slots": ["0000:01:00"],
            "exit": 0, "ms": 84, "phases": [{"name": "check", "ms": 7, "way": "there"}], "reason": null});
        assert_eq!(attempt.to_json(time, Duration::from_millis(84), None), expected);
        let by_hand = Owner::Manual(slot);
        let attempt = Attempt::new(Direction::Home, &by_hand, &[slot], Duration::ZERO);
        let refused = attempt.to_json(time, Duration::ZERO, Some(&Exit::refused("busy")));
        let expected = json!({"schema": 1, "time": time, "direction": "home", "vmid": null, "slots": ["0000:01:00"],
            "exit": 3, "ms": 0, "phases": [], "reason": "busy"});
        assert_eq!(refused, expected);
    }
}
