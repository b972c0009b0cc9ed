//! The stories of `tests/scenarios.txt`, which the lab plays on a real kernel, on the simulated one.

use super::bench::{Bench, Wish, World};
use super::machine::{AtHome, Home, Machine, slot};
use super::setup::{Busy, occupy};
use gpu_handoff::handoff::kept::record::Owner;
use std::collections::BTreeMap;
use std::time::Duration;

const STORIES: &str = include_str!("../scenarios.txt");

struct Scenario {
    name: &'static str,
    homes: (Home, Option<Home>),
    version: &'static str,
    modeset: bool,
    /// What happens, and what must come of it.
    story: Vec<(&'static str, &'static str)>,
}

fn scenarios() -> Vec<Scenario> {
    let lines = STORIES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut scenarios: Vec<Scenario> = Vec::new();
    for line in lines {
        if let Some(moment) = line.strip_prefix("  ") {
            let moment = moment.split_once(" = ").unwrap_or_else(|| panic!("no outcome: {line}"));
            scenarios.last_mut().unwrap_or_else(|| panic!("no story: {line}")).story.push(moment);
            continue;
        }
        let words: Vec<&str> = line.split(' ').collect();
        let [name, homes, version, modeset] = words[..] else { panic!("no story: {line}") };
        let mut homes = homes.split('+').map(home);
        scenarios.push(Scenario {
            name,
            homes: (homes.next().unwrap_or_else(|| panic!("no home: {line}")), homes.next()),
            version,
            modeset: modeset == "1",
            story: Vec::new(),
        });
    }
    scenarios
}

fn home(word: &str) -> Home {
    match word {
        "nvidia" => Home::Nvidia,
        "nouveau" => Home::Nouveau,
        "none" => Home::Unbound,
        "vfio" => Home::Vfio,
        other => panic!("no home: {other}"),
    }
}

/// How many there are.
///
/// # Errors
/// The moments with another outcome.
pub fn play(bench: &mut Bench) -> Result<usize, String> {
    let mut problems = Vec::new();
    let scenarios = scenarios();
    for scenario in &scenarios {
        let Scenario { homes, version, modeset, .. } = *scenario;
        let machine = Machine { homes, functions: 2, version, modeset, poller: false, vfio_loaded: true };
        let state = machine.build();
        let home = AtHome::of(&state);
        bench.restore(&World { state, files: BTreeMap::new() });
        for (moment, expected) in &scenario.story {
            let outcome = happen(bench, moment);
            if outcome != *expected {
                problems.push(format!("{}: {moment}: {outcome}, expected {expected}", scenario.name));
            }
        }
        if let Err(problem) = super::check::is_home(bench, &home) {
            problems.push(format!("{}: {problem}", scenario.name));
        }
    }
    if problems.is_empty() { Ok(scenarios.len()) } else { Err(problems.join("\n")) }
}

fn happen(bench: &mut Bench, moment: &str) -> String {
    let words: Vec<&str> = moment.split(' ').collect();
    let number = |word: &str| word.parse().unwrap_or_else(|_| panic!("no number: {moment}"));
    let slots = |cards: &str| cards.split(',').map(|card| slot(number(card) as usize)).collect::<Vec<_>>();
    let code = match words[..] {
        ["start", vmid, cards] => {
            let code = run(bench, &Wish::Leave(Owner::Vm(number(vmid)), slots(cards)));
            if code == 0 {
                bench.kernel.state.borrow_mut().start_qemu(number(vmid), &slots(cards));
            }
            code
        }
        ["abort", vmid, cards] => run(bench, &Wish::Leave(Owner::Vm(number(vmid)), slots(cards))),
        ["stop", vmid] => {
            bench.kernel.state.borrow_mut().stop_qemu(number(vmid), Duration::from_millis(100));
            run(bench, &Wish::Home(Owner::Vm(number(vmid))))
        }
        ["reconcile"] => run(bench, &Wish::Reconcile),
        ["to-vfio", card] => run(bench, &Wish::Leave(Owner::Manual(slots(card).remove(0)), slots(card))),
        ["to-nvidia", card] => run(bench, &Wish::Home(Owner::Manual(slots(card).remove(0)))),
        ["occupy", card] => {
            let busy = if card == "1" { Busy::First } else { Busy::Second };
            u8::from(!occupy(&mut bench.kernel.state.borrow_mut(), busy))
        }
        ["vacate"] => {
            bench.kernel.state.borrow_mut().processes.retain(|_, process| process.command != "user");
            0
        }
        _ => panic!("nobody knows how to {moment}"),
    };
    let state = bench.kernel.state.borrow();
    let drivers: Vec<&str> = state.functions.keys().map(|a| state.shown_driver(a).unwrap_or("-")).collect();
    format!("{code}: {}", drivers.join(" "))
}

fn run(bench: &mut Bench, wish: &Wish) -> u8 {
    bench.run(wish, None).end.code().unwrap_or(255)
}
