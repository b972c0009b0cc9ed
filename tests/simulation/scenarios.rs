//! A few plain stories with the outcome that each must have. A machine with a real kernel can play the same stories, so
//! their names, their moments and their outcomes are plain text: an exit code, then the driver of every function in
//! order of address.

use super::bench::{Bench, Wish, World};
use super::machine::{AtHome, Home, Machine, slot};
use super::setup::{Busy, occupy};
use gpu_handoff::handoff::record::Owner;
use std::collections::BTreeMap;
use std::time::Duration;

/// What happens, in a word or two.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// pre-start of this VM with these cards, and QEMU when that succeeds.
    Start(u32, &'static [usize]),
    /// QEMU ends; post-stop.
    Stop(u32),
    /// pre-start, and then Proxmox gives the start up.
    Abort(u32, &'static [usize]),
    Reconcile,
    ToVfio(usize),
    ToNvidia(usize),
    Occupy(Busy),
    /// Who was busy ends.
    Vacate,
}

struct Scenario {
    name: &'static str,
    homes: (Home, Option<Home>),
    version: &'static str,
    modeset: bool,
    story: &'static [(Moment, &'static str)],
}

use Moment::{Abort, Occupy, Reconcile, Start, Stop, ToNvidia, ToVfio, Vacate};

const HOME: &str = "0: nvidia snd_hda_intel";
const AWAY: &str = "0: vfio-pci vfio-pci";
const TWO_HOME: &str = "0: nvidia snd_hda_intel nvidia snd_hda_intel";

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "round-trip",
        homes: (Home::Nvidia, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Stop(111), HOME), (Start(111, &[1]), AWAY), (Stop(111), HOME)],
    },
    Scenario {
        name: "round-trip-nouveau",
        homes: (Home::Nouveau, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Stop(111), "0: nouveau snd_hda_intel")],
    },
    Scenario {
        name: "round-trip-none",
        homes: (Home::Unbound, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Stop(111), "0: - snd_hda_intel")],
    },
    Scenario {
        name: "round-trip-vfio",
        homes: (Home::Vfio, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Stop(111), AWAY)],
    },
    Scenario {
        name: "round-trip-mixed",
        homes: (Home::Mixed, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Stop(111), "0: vfio-pci snd_hda_intel")],
    },
    Scenario {
        name: "by-hand",
        homes: (Home::Nvidia, None),
        version: "580.105.08",
        modeset: false,
        story: &[(ToVfio(1), AWAY), (Start(111, &[1]), AWAY), (Stop(111), AWAY), (ToNvidia(1), HOME)],
    },
    Scenario {
        name: "aborted-start",
        homes: (Home::Nvidia, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Abort(111, &[1]), AWAY), (Reconcile, HOME)],
    },
    Scenario {
        name: "taken-over",
        homes: (Home::Nvidia, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Abort(111, &[1]), AWAY), (Start(222, &[1]), AWAY), (Stop(222), HOME)],
    },
    Scenario {
        name: "second-vm",
        homes: (Home::Nvidia, None),
        version: "580.105.08",
        modeset: false,
        story: &[(Start(111, &[1]), AWAY), (Start(222, &[1]), "3: vfio-pci vfio-pci"), (Stop(111), HOME)],
    },
    Scenario {
        name: "two-cards-one-busy",
        homes: (Home::Nvidia, Some(Home::Nvidia)),
        version: "580.95.05",
        modeset: true,
        story: &[
            (Occupy(Busy::First), TWO_HOME),
            (Start(111, &[1]), "3: nvidia snd_hda_intel nvidia snd_hda_intel"),
            (Vacate, TWO_HOME),
            (Start(111, &[1]), "0: vfio-pci vfio-pci nvidia snd_hda_intel"),
            (Start(222, &[2]), "0: vfio-pci vfio-pci vfio-pci vfio-pci"),
            (Stop(111), "0: nvidia snd_hda_intel vfio-pci vfio-pci"),
            (Stop(222), TWO_HOME),
        ],
    },
    Scenario {
        name: "two-cards-one-vm",
        homes: (Home::Nvidia, Some(Home::Nvidia)),
        version: "595.45.04",
        modeset: true,
        story: &[(Start(111, &[1, 2]), "0: vfio-pci vfio-pci vfio-pci vfio-pci"), (Stop(111), TWO_HOME)],
    },
];

/// How many there are.
///
/// # Errors
/// The moments with another outcome.
pub fn play(bench: &mut Bench) -> Result<usize, String> {
    let mut problems = Vec::new();
    for scenario in SCENARIOS {
        let Scenario { homes, version, modeset, .. } = *scenario;
        let machine = Machine { homes, functions: 2, version, modeset, poller: false, vfio_loaded: true };
        let state = machine.build();
        let home = AtHome::of(&state);
        bench.restore(&World { state, files: BTreeMap::new() });
        for (moment, expected) in scenario.story {
            let outcome = happen(bench, *moment);
            if outcome != *expected {
                problems.push(format!("{}: {moment:?}: {outcome}, expected {expected}", scenario.name));
            }
        }
        if let Err(problem) = super::check::is_home(bench, &home) {
            problems.push(format!("{}: {problem}", scenario.name));
        }
    }
    if problems.is_empty() { Ok(SCENARIOS.len()) } else { Err(problems.join("\n")) }
}

fn happen(bench: &mut Bench, moment: Moment) -> String {
    let slots = |cards: &[usize]| cards.iter().map(|card| slot(*card)).collect::<Vec<_>>();
    let code = match moment {
        Start(vmid, cards) => {
            let code = run(bench, &Wish::Leave(Owner::Vm(vmid), slots(cards)));
            if code == 0 {
                bench.kernel.state.borrow_mut().start_qemu(vmid, &slots(cards));
            }
            code
        }
        Abort(vmid, cards) => run(bench, &Wish::Leave(Owner::Vm(vmid), slots(cards))),
        Stop(vmid) => {
            bench.kernel.state.borrow_mut().stop_qemu(vmid, Duration::from_millis(100));
            run(bench, &Wish::Home(Owner::Vm(vmid)))
        }
        Reconcile => run(bench, &Wish::Reconcile),
        ToVfio(card) => run(bench, &Wish::Leave(Owner::Manual(slot(card)), slots(&[card]))),
        ToNvidia(card) => run(bench, &Wish::Home(Owner::Manual(slot(card)))),
        Occupy(busy) => u8::from(!occupy(&mut bench.kernel.state.borrow_mut(), busy)),
        Vacate => {
            bench.kernel.state.borrow_mut().processes.retain(|_, process| process.command != "user");
            0
        }
    };
    let state = bench.kernel.state.borrow();
    let drivers: Vec<&str> = state.functions.keys().map(|a| state.shown_driver(a).unwrap_or("-")).collect();
    format!("{code}: {}", drivers.join(" "))
}

fn run(bench: &mut Bench, wish: &Wish) -> u8 {
    bench.run(wish, None).end.code().unwrap_or(255)
}
