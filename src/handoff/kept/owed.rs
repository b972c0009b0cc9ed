//! What a handoff that is over still owes others: to bring a card home, to start again what was stopped, to let go on what
//! was frozen, to look again whether a call has come back. All of it stands in files of `/run/gpu-handoff`, and a file
//! that stands there has `gpu-handoff-keeper.path` start the keeper: a timer that runs `gpu-handoff reconcile --owed`
//! until nothing is left. So whoever is killed, or gives up, hands over what he owes by doing nothing.

use super::record::{Progress, Record, Stopped};
use super::store::Store;
use super::wedge::Wedge;
use crate::address::SlotId;
use serde_json::{Value, json};
use std::fmt;
use std::time::Duration;

pub const TIMER: &str = "gpu-handoff-keeper.timer";

/// How often the keeper looks.
pub const EVERY: Duration = Duration::from_secs(10);

/// What fails again and again is tried less and less often, but is tried.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owed {
    /// The card comes home.
    Home,
    Start(Stopped),
    Thaw(u32),
    /// Whether the call has come back.
    Look,
}

impl Owed {
    pub fn to_json(&self) -> Value {
        match self {
            Owed::Home => json!({"what": "home"}),
            Owed::Start(Stopped::Container(ctid)) => json!({"what": "start", "container": ctid}),
            Owed::Start(Stopped::Unit(unit)) => json!({"what": "start", "unit": unit}),
            Owed::Start(Stopped::Vm(vmid)) => json!({"what": "start", "vm": vmid}),
            Owed::Thaw(ctid) => json!({"what": "thaw", "container": ctid}),
            Owed::Look => json!({"what": "look"}),
        }
    }
}

impl fmt::Display for Owed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Owed::Home => f.write_str("bring it home"),
            Owed::Start(what) => write!(f, "start {what}"),
            Owed::Thaw(ctid) => write!(f, "thaw container {ctid}"),
            Owed::Look => f.write_str("look again"),
        }
    }
}

/// What is owed for a slot. While its owner has it, that is what is to be started when it is home.
pub fn of_slot(store: &Store, slot: SlotId, wedge: Option<&Wedge>) -> Vec<Owed> {
    let mut owed: Vec<Owed> = wedge.iter().map(|_| Owed::Look).collect();
    let records = store.each_record().into_iter().flatten();
    for record in records.filter(|record| record.slots().contains(&slot)) {
        owed.extend(of_record(&record));
    }
    let waiting = store.to_start().unwrap_or_default().into_iter();
    let waiting = waiting.filter(|entry| entry.since == 0 && entry.slots.contains(&slot));
    for start in waiting.map(|entry| Owed::Start(entry.what)) {
        if !owed.contains(&start) {
            owed.push(start);
        }
    }
    owed
}

pub fn of_record(record: &Record) -> Vec<Owed> {
    let home = (record.progress != Progress::Away).then_some(Owed::Home);
    let thaw = record.frozen.iter().map(|ctid| Owed::Thaw(*ctid));
    // Last stopped, first started.
    let start = record.stopped.iter().rev().cloned().map(Owed::Start);
    home.into_iter().chain(thaw).chain(start).collect()
}

pub fn to_text(owed: &[Owed]) -> String {
    owed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// How long to leave alone what has failed so many times.
pub fn pause(tries: u64) -> Duration {
    let doublings = u32::try_from(tries.saturating_sub(1)).unwrap_or(u32::MAX).min(10);
    (EVERY * 2u32.pow(doublings)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::super::record::Owner;
    use super::*;

    #[test]
    fn what_fails_is_tried_less_and_less_often_but_is_tried() {
        let pauses: Vec<u64> = [1, 2, 3, 6, 7, 8, 1_000_000].map(|tries| pause(tries).as_secs()).to_vec();
        assert_eq!(pauses, [10, 20, 40, 320, 600, 600, 600]);
    }

    #[test]
    fn a_record_owes_home_unless_its_owner_has_it() {
        let mut record = Record::new(Owner::Vm(111));
        record.stopped = vec![Stopped::Container(101), Stopped::Unit("x.service".to_string())];
        record.frozen = vec![102];
        assert_eq!(
            to_text(&of_record(&record)),
            "bring it home, thaw container 102, start x.service, start container 101"
        );
        record.progress = Progress::Away;
        record.frozen.clear();
        assert_eq!(to_text(&of_record(&record)), "start x.service, start container 101");
    }
}
