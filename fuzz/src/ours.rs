//! What gpu-handoff itself wrote, perhaps another version of it, and what an administrator wrote for it. What is written
//! is read back.

use crate::machine::Machine;
use crate::{assert_one_line, parts};
use gpu_handoff::config::{self, Config, Home, PATH};
use gpu_handoff::handoff::kept::journal::Journal;
use gpu_handoff::handoff::kept::record::{Owner, Record};
use gpu_handoff::handoff::kept::wedge::Wedge;
use gpu_handoff::handoff::plan::step::Step;
use gpu_handoff::setup::driver::record::Installation as Installed;
use gpu_handoff::setup::kept::document;
use gpu_handoff::setup::kept::pending::Pending;
use std::time::Duration;

/// The name of the file, then what is in it.
pub fn record(data: &[u8]) {
    let [name, text] = parts(data);
    let owner = std::str::from_utf8(name).ok().and_then(Owner::from_file_name);
    let owner = owner.unwrap_or(Owner::Vm(111));
    assert_eq!(Owner::from_file_name(&owner.file_name()), Some(owner.clone()));
    match Record::parse(owner.clone(), text) {
        Ok(record) => {
            assert_eq!(Record::parse(owner, record.to_json().as_bytes()).expect("was written"), record);
            let mut slots = record.slots();
            assert!(record.functions.iter().take(100).all(|f| record.home_of(f.address).is_some()));
            let all = slots.len();
            slots.sort_unstable();
            slots.dedup();
            assert_eq!(slots.len(), all);
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
}

pub fn journal(data: &[u8]) {
    match Journal::parse(data) {
        Ok(journal) => {
            assert_eq!(Journal::parse(journal.to_json().as_bytes()).expect("was written"), journal);
            let step = Step::Unload { module: journal.step.clone() };
            let next = Journal { step: step.to_string(), call: Some(step.call()), ..journal };
            assert_eq!(Journal::parse(next.to_json().as_bytes()).expect("was written"), next);
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
}

pub fn wedge(data: &[u8]) {
    match Wedge::parse(data) {
        Ok(wedge) => {
            assert_eq!(Wedge::parse(wedge.to_json().to_string().as_bytes()).expect("was written"), wedge);
            assert!(wedge.to_string().contains(&wedge.since));
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
}

pub fn config(data: &[u8]) {
    let machine = Machine::default().file(PATH, data);
    let _ = config::effective(&machine);
    Config::lenient(&machine).1.iter().for_each(|problem| assert_one_line(problem));
    match Config::strict(&machine) {
        Ok(config) => {
            for time in [config.time.handoff, config.time.lock] {
                assert!(time <= Duration::from_secs(3600));
            }
            for (slot, home) in &config.homes {
                assert_eq!(slot.to_string().parse(), Ok(*slot));
                if let Home::Driver(driver) = home {
                    assert!(matches!(driver.as_str(), "nvidia" | "nouveau" | "vfio-pci"), "{driver}");
                }
            }
        }
        Err(problem) => {
            assert!(problem.starts_with(PATH));
            assert_one_line(&problem);
        }
    }
}

/// What set-up keeps: the driver that was installed, and what is yet to be done.
pub fn setup(data: &[u8]) {
    let value = match document::parse(data) {
        Ok(value) => value,
        Err(error) => return assert_one_line(&format!("{error:#}")),
    };
    match Installed::from_json(&value) {
        Ok(record) => {
            assert_eq!(Installed::from_json(&record.to_json()).expect("was written"), record);
            assert!(record.copies.iter().all(|version| !version.contains('/')));
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
    match Pending::from_json(&value) {
        Ok(pending) => {
            assert_eq!(Pending::from_json(&pending.to_json()).expect("was written"), pending);
            assert_one_line(&pending.why().unwrap_or_default());
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
}
