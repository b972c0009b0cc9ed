//! Parsers together: a whole machine, and all of `/run/gpu-handoff`.

use crate::machine::Machine;
use crate::{assert_one_line, parts};
use gpu_handoff::address::SlotId;
use gpu_handoff::config::Config;
use gpu_handoff::gpu::inventory::nvidia_slots;
use gpu_handoff::gpu::power::Power;
use gpu_handoff::handoff::Handoff;
use gpu_handoff::handoff::kept::history::History;
use gpu_handoff::handoff::kept::record::{HomeOf, Owner, Progress, Record, Stopped};
use gpu_handoff::handoff::kept::store::Store;
use gpu_handoff::handoff::plan::facts::Facts;
use gpu_handoff::handoff::plan::step::Step;
use gpu_handoff::handoff::plan::{self, Plan};
use gpu_handoff::handoff::way::departure::Departure;
use gpu_handoff::handoff::way::reconcile::Scope;
use gpu_handoff::report::status::Status;
use gpu_handoff::report::zone::Zone;
use gpu_handoff::report::{history, screen};
use gpu_handoff::story::Story;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

const HISTORY: &str = "history.jsonl";

/// Larger machines only take longer.
const ENOUGH: usize = 16 * 1024;

/// A tree of files as [`Machine::from_text`] reads it: all that is read before a handoff, the plans, the status.
pub fn machine(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(ENOUGH)]) else { return };
    let machine = Machine::from_text(text);
    let slots = nvidia_slots(&machine);
    let ids: Vec<SlotId> = slots.iter().map(|slot| slot.id).collect();
    let store = Store::at(PathBuf::from("/nonexistent"));
    let status = Status::read(&machine, &store, true);
    assert_eq!(status.to_json()["gpus"].as_array().map(Vec::len), Some(slots.len()));
    screen::to_text(&status, &Zone(Vec::new()));

    let (config, story) = (Config::default(), Story::silent());
    let handoff = Handoff { kernel: &machine, store: &store, config: &config, story: &story };
    if let Ok(intent) = handoff.intend(&Departure::of(Owner::Vm(111), ids.clone())) {
        check(&intent.plan, &ids);
    }
    let homes = slots.iter().flat_map(|slot| &slot.functions).map(|function| HomeOf {
        slot: function.address.slot,
        address: function.address,
        driver: function.driver.clone(),
        module: function.module.clone(),
        model: None,
        power: Power { control: Some("auto".to_string()), d3cold_allowed: Some("1".to_string()) },
    });
    let record = Record {
        owner: Owner::Vm(111),
        progress: Progress::Away,
        functions: homes.collect(),
        others: Vec::new(),
        modules: vec!["nvidia".to_string()],
        stopped: vec![Stopped::Container(101)],
        frozen: vec![102],
        console: data.len() % 2 == 0,
        caller: None,
        by_hand: false,
        for_backup: false,
    };
    check(&handoff.plan_home(&record).expect("nothing is stuck"), &ids);
    let facts = Facts::read(&machine, slots, &["nvidia"], &["nvidia"]).expect("nothing is stuck");
    if let Ok(plan) = plan::to_vfio(&facts, &record) {
        check(&plan, &ids);
    }
}

/// A plan touches nothing but its slots, and does nothing twice in a row.
fn check(plan: &Plan, slots: &[SlotId]) {
    for (_, step) in plan {
        assert!(step.slot().is_none_or(|slot| slots.contains(&slot)), "{step}");
        assert!(!matches!(step, Step::Load { modules } if modules.is_empty()));
    }
    let twice = plan.windows(2).find(|pair| pair[0].1 == pair[1].1);
    assert!(twice.is_none(), "twice in a row: {}", plan::to_text("plan", slots, plan));
    plan::to_text("plan", slots, plan);
}

/// The files of `/run/gpu-handoff`: a VM's record, one by hand, a wedge, the journal, what happened last; and the history.
pub fn store(data: &[u8]) {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let folder = std::env::temp_dir().join(format!("gpu-handoff-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder can be made");
        folder
    });
    let files: [&[u8]; 6] = parts(data);
    let names = ["vm-111", "manual-0000:01:00", "wedged-0000:01:00", "journal", "last-0000:01:00", HISTORY];
    for (name, text) in names.iter().zip(files) {
        let path = FOLDER.join(name);
        if text.is_empty() {
            let _ = fs::remove_file(path);
        } else {
            fs::write(path, text).expect("the folder can be written to");
        }
    }
    let machine = Machine::default()
        .gpu("0000:01:00.0", "vfio-pci")
        .file("/proc/812/stat", b"812 (x) D 1 1 1 0 -1 1 1 1 1 1 1 1 1 1 20 0 1 0 4711 1 1 1");
    let past = History::at(FOLDER.join(HISTORY)).read().expect("the folder can be read");
    assert_eq!(history::to_json(&past).lines().count(), past.entries.len());
    assert_eq!(history::to_text(&past, &Zone(data.to_vec())).lines().count(), past.entries.len().max(1));
    past.problems.iter().for_each(|problem| assert_one_line(problem));
    let store = Store::at(FOLDER.clone());
    let status = Status::read(&machine, &store, true);
    status.to_json();
    screen::to_text(&status, &Zone(Vec::new()));
    let (config, story) = (Config::default(), Story::silent());
    let handoff = Handoff { kernel: &machine, store: &store, config: &config, story: &story };
    for record in store.records().unwrap_or_default() {
        let plan = handoff.plan_home(&record);
        check(&plan.unwrap_or_default(), &["0000:01:00".parse().expect("a slot")]);
    }
    for scope in [Scope::All, Scope::Unfinished] {
        handoff.left_behind(scope);
    }
    store.journals();
    let _ = handoff.plan_leave(&Departure::of(Owner::Vm(112), vec!["0000:01:00".parse().expect("a slot")]));
}
