//! Handoffs on a simulated machine, with everything going wrong that can go wrong.
//!
//! For every plan that the planner makes, every change that a run asks for meets every fault that the kernel, the worker
//! or the person at the console can have ready for it. Afterwards one more run must put everything right.
//!
//! All of that for the situations that differ in kind; of the others every plan, and one fault at every second change.
//! `SIMULATION_ALL=1` tries everything everywhere, which takes some minutes.
//! `SIMULATION_ONLY=text` runs only the situations whose description contains the text; `SIMULATION_STORY=1` lets the
//! runs tell their story.

#![allow(
    clippy::disallowed_methods,
    clippy::too_many_lines,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr
)]

mod bench;
mod beside;
mod cases;
mod change;
mod check;
mod counts;
mod faults;
mod files;
mod hosted;
mod kernel;
mod machine;
mod modules;
mod order;
mod pci;
mod sabotage;
mod scenarios;
mod setup;
mod state;
mod turns;
mod watch;

use bench::Bench;
use cases::Then;
use faults::{Fault, Kind};
use gpu_handoff::sys::Action;
use setup::{Busy, Setup};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Of the different things that went wrong, how many are told in full, each with its first case.
const TOLD: usize = 6;

#[derive(Default)]
struct Tally {
    situations: usize,
    refused: usize,
    plans: BTreeSet<String>,
    /// Plans, and whether with every fault.
    tried: BTreeSet<(bool, String)>,
    /// Plans with an illegal order, made on purpose, all objected to.
    spoilt: usize,
    /// By kind of fault: cases, and those that converged.
    cases: BTreeMap<&'static str, (usize, usize)>,
    /// By what went wrong: how often, and the first case in full.
    failures: BTreeMap<String, (usize, String)>,
    failed: usize,
    not_modelled: BTreeSet<String>,
}

impl Tally {
    fn fail(&mut self, problem: &str, text: String) {
        self.failed += 1;
        // Numbers and details tell apart what is alike.
        let kind: String = problem.chars().filter(|c| !c.is_ascii_digit()).take(60).collect();
        self.failures.entry(kind).or_insert((0, text)).0 += 1;
    }
}

fn main() -> ExitCode {
    let begin = Instant::now();
    let only = std::env::var("SIMULATION_ONLY").unwrap_or_default();
    let setups: Vec<Setup> = setup::setups().into_iter().filter(|s| s.to_string().contains(&only)).collect();
    let tally = Mutex::new(Tally::default());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (setups, tally, next) = (&setups, &tally, &next);
            scope.spawn(move || {
                let mut bench = Bench::new(directory(thread));
                while let Some(setup) = setups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    try_setup(&mut bench, setup, tally);
                }
                let seen = bench.kernel.not_modelled.borrow().clone();
                tally.lock().unwrap().not_modelled.extend(seen);
            });
        }
    });
    let mut tally = tally.into_inner().unwrap();
    let mut bench = Bench::new(directory(threads));
    if let Err(problem) =
        scenarios::play(&mut bench).map(|number| println!("simulation: {number} scenarios as expected"))
    {
        tally.fail(&problem, problem.clone());
    }
    match watch::play(&mut bench) {
        Ok(text) => println!("simulation: {text}"),
        Err(problem) => tally.fail(&problem, format!("a start beside a watcher: {problem}")),
    }
    match beside::play(&mut bench) {
        Ok(text) => println!("simulation: {text}"),
        Err(problem) => tally.fail(&problem, format!("a watcher beside Proxmox: {problem}")),
    }
    match turns::play(&mut bench) {
        Ok(text) => println!("simulation: {text}"),
        Err(problem) => tally.fail(&problem, format!("one VM after another: {problem}")),
    }
    match counts::play(&mut bench) {
        Ok(text) => println!("simulation: {text}"),
        Err(problem) => tally.fail(&problem, problem.clone()),
    }
    for sabotage in sabotage::Sabotage::ALL {
        match sabotage::caught(&mut bench, sabotage) {
            Ok(notice) => println!(
                "simulation: broken on purpose, {sabotage:?}: caught: {}",
                notice.split(';').next().unwrap_or("")
            ),
            Err(problem) => tally.fail(&problem, format!("broken on purpose, {sabotage:?}: {problem}")),
        }
    }
    report(&tally);
    println!("simulation: {:.1} s on {threads} threads", begin.elapsed().as_secs_f64());
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// In memory where there is such a place: records are written a hundred thousand times.
fn directory(thread: usize) -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let base = if memory.is_dir() { memory } else { std::env::temp_dir() };
    base.join(format!("gpu-handoff-simulation-{}-{thread}", std::process::id()))
}

fn try_setup(bench: &mut Bench, setup: &Setup, tally: &Mutex<Tally>) {
    let ready = match setup.prepare(bench) {
        Ok(Some(ready)) => ready,
        Ok(None) => return,
        Err(problem) => return tally.lock().unwrap().fail(&problem, format!("{setup}\n{problem}")),
    };
    bench.log.clear();
    let acts = match cases::without_fault(bench, setup, &ready) {
        Ok(acts) => acts,
        Err(problem) => return tally.lock().unwrap().fail(&problem, dump(bench, setup, "no fault", &problem)),
    };
    let whole = setup.is_core() || std::env::var_os("SIMULATION_ALL").is_some();
    {
        let mut tally = tally.lock().unwrap();
        tally.situations += 1;
        if acts.is_empty() && setup.busy == Busy::Passing && setup.take.contains(&1) {
            let problem = "refused for somebody who is gone in a moment";
            return tally.fail(problem, dump(bench, setup, "no fault", problem));
        }
        if acts.is_empty() && setup.busy != Busy::Nobody {
            tally.refused += 1;
        }
        if acts.is_empty() {
            return;
        }
        let key = format!("{:?} {} {acts:?}", setup.way, setup.machine.poller);
        // Whichever thread is first, a situation that differs in kind gets its due.
        let is_new = tally.tried.insert((whole, key.clone()));
        tally.plans.insert(key);
        if !is_new {
            return;
        }
    }
    match cases::spoil(bench, &ready) {
        Ok(number) => tally.lock().unwrap().spoilt += number,
        Err(problem) => tally.lock().unwrap().fail(&problem, dump(bench, setup, "no fault", &problem)),
    }
    let mut cases: BTreeMap<&'static str, (usize, usize)> = BTreeMap::new();
    let mut failures = Vec::new();
    let mut attempt = |bench: &mut Bench, fault: Fault, then: Then| {
        let count = cases.entry(fault.kind.name()).or_default();
        count.0 += 1;
        let done = cases::with_fault(bench, setup, &ready, fault, then);
        match &done {
            Ok(()) => count.1 += 1,
            Err(problem) => {
                let text = dump(bench, setup, &format!("{fault:?}, then {then:?}"), problem);
                failures.push((problem.clone(), text));
            }
        }
    };
    for (index, act) in acts.iter().enumerate() {
        for (kind, then) in what_befalls(act, index, whole) {
            if kind.is_hang() && setup.mixes_unbound() {
                continue;
            }
            attempt(bench, Fault { at: index + 1, kind }, then);
        }
    }
    if whole && let Err(problem) = cases::with_a_lock_taken(bench, setup, &ready) {
        let text = dump(bench, setup, "a lock is taken", &problem);
        tally.lock().unwrap().fail(&problem, text);
    }
    if whole {
        // Not every one: neighbours rarely differ.
        let looks = bench.looks_of(&ready);
        for at in (1..=looks).step_by(11) {
            let then = [Then::Again, Then::Else, Then::Keeper][at % 3];
            attempt(bench, Fault { at, kind: Kind::KillAtLook }, then);
        }
    }
    let mut tally = tally.lock().unwrap();
    for (name, (all, converged)) in cases {
        let count = tally.cases.entry(name).or_default();
        count.0 += all;
        count.1 += converged;
    }
    for (problem, text) in failures {
        tally.fail(&problem, text);
    }
}

/// Of every fault that can befall a change, with both things that can come after it, all; or one, which
/// differs from change to change, at every second change.
fn what_befalls(act: &Action, index: usize, all: bool) -> Vec<(Kind, Then)> {
    let mut cases = Vec::new();
    for (turn, kind) in faults::kinds_for(act).into_iter().enumerate() {
        // Once the worker's last act has put everything right, one thing after it is as good as the other.
        let is_settled =
            kind.is_hang() || matches!(kind, Kind::KillBefore { alone: false } | Kind::KillAfter { alone: false });
        let thens: &[Then] = match (is_settled, (index + turn) % 3) {
            (false, 0) => &[Then::Again, Then::Keeper],
            (false, 1) => &[Then::Else, Then::Keeper],
            (false, _) => &[Then::Again, Then::Else],
            (true, 0) => &[Then::Again],
            (true, 1) => &[Then::Else],
            (true, _) => &[Then::Keeper],
        };
        cases.extend(thens.iter().map(|then| (kind, *then)));
    }
    if all {
        return cases;
    }
    if index % 2 == 1 {
        return Vec::new();
    }
    let mut hasher = DefaultHasher::new();
    format!("{index} {act:?}").hash(&mut hasher);
    let chosen = usize::try_from(hasher.finish() % cases.len() as u64).unwrap_or(0);
    vec![cases[chosen]]
}

fn dump(bench: &Bench, setup: &Setup, fault: &str, problem: &str) -> String {
    let mut text = format!("{problem}\n  situation: {setup}\n  fault: {fault}\n");
    for line in &bench.log {
        text.push_str(&format!("  {line}\n"));
    }
    let state = bench.kernel.state.borrow();
    for (address, function) in &state.functions {
        text.push_str(&format!(
            "  {address} {:?} override {:?}{}{}\n",
            function.driver,
            function.driver_override,
            if function.link_is_gone { ", link gone" } else { "" },
            if function.locked { ", locked" } else { "" }
        ));
    }
    text.push_str(&format!("  modules {:?}, ids {:04x?}\n", state.modules, state.vfio_ids));
    for (name, bytes) in bench.files() {
        text.push_str(&format!("  {name}: {}\n", String::from_utf8_lossy(&bytes)));
    }
    text
}

fn report(tally: &Tally) {
    let mut failures: Vec<&(usize, String)> = tally.failures.values().collect();
    failures.sort_by_key(|(times, _)| std::cmp::Reverse(*times));
    for (times, text) in failures.iter().take(TOLD) {
        println!("simulation: FAILED {times} times: {text}");
    }
    if failures.len() > TOLD {
        println!("simulation: and {} other kinds of failure", failures.len() - TOLD);
    }
    for path in &tally.not_modelled {
        println!("simulation: note: {path} is not modelled and was taken for absent");
    }
    for (name, (all, converged)) in &tally.cases {
        println!("simulation: {name:<24} {all:>6} cases, {converged:>6} converged");
    }
    let (all, converged) = tally.cases.values().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    println!(
        "simulation: {} situations without a fault, {} of them refused for being busy",
        tally.situations, tally.refused
    );
    println!("simulation: broken on purpose, {} plans in an illegal order: caught", tally.spoilt);
    println!("simulation: {} plans, {all} cases, {converged} converged, {} failures", tally.plans.len(), tally.failed);
}
