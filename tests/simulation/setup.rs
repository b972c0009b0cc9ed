//! Every situation that a handoff can begin in: the machine, which cards go where, who is busy with them.

use super::bench::{Bench, Wish, World};
use super::faults::{Fault, Kind};
use super::kernel::OPENING;
use super::machine::{AtHome, Home, Machine, slot};
use super::state::{CONTROL_MINOR, State, nvidia_number};
use gpu_handoff::address::SlotId;
use gpu_handoff::config::{Config, Policy};
use gpu_handoff::handoff::kept::record::Owner;
use std::fmt;
use std::time::Duration;

const VM: Owner = Owner::Vm(111);
const OTHER_VM: Owner = Owner::Vm(222);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    ToVm,
    FromVm,
    /// QEMU is still closing its descriptors, and Proxmox wrote the cards' ids to new_id once.
    FromVmLate,
    ToHand,
    FromHand,
    /// Another VM was given all cards and never started.
    Takeover,
    /// Another VM's handoff was killed half-way.
    TakeoverHalf,
    /// Two other VMs' handoffs were killed half-way, one on each card.
    TwoHalves,
    /// By hand first, then a VM uses it there.
    OverHand,
    /// The VM was given its cards and never started.
    Reconcile,
    /// The VM was given both cards and now names one of them only.
    OneOfTwo,
    /// As `Reconcile`, and somebody devices over it.
    GivenUp,
}

pub const WAYS: [Way; 12] = [
    Way::ToVm,
    Way::FromVm,
    Way::FromVmLate,
    Way::ToHand,
    Way::FromHand,
    Way::Takeover,
    Way::TakeoverHalf,
    Way::TwoHalves,
    Way::OverHand,
    Way::Reconcile,
    Way::GivenUp,
    Way::OneOfTwo,
];

/// How long udev's worker takes.
const PASSING: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Busy {
    Nobody,
    /// Computes on the first card: its node, the control device, nvidia-uvm.
    First,
    /// The first card's DRM node only.
    FirstDrm,
    /// The first card's sound device only.
    FirstSound,
    /// Computes on the second card.
    Second,
    /// Has the second card's node open and nothing else.
    SecondNode,
    /// Has nvidiactl open and nothing else.
    Control,
    /// Units, containers and a program that the policy has stopped.
    Everybody,
    /// Somebody is inside open() of the first card's node.
    Opening,
    /// The first card has fallen off the bus.
    Gone,
    /// One of udev's workers has the first card's sound device open, for a moment.
    Passing,
}

impl Busy {
    fn policy(self) -> Policy {
        let text: &[u8] = match self {
            Busy::Everybody => br#"{"policy":{"process":"kill","unit":"stop","container":"stop"}}"#,
            _ => b"{}",
        };
        Config::parse(text).unwrap_or_default().policy
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Setup {
    pub machine: Machine,
    /// The cards that the wish is about.
    pub take: Vec<usize>,
    pub way: Way,
    pub busy: Busy,
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}; {:?} of {:?}", self.machine, self.way, self.take)?;
        if self.busy == Busy::Nobody { Ok(()) } else { write!(f, "; busy: {:?}", self.busy) }
    }
}

/// A situation, ready for the run that is put to the test.
pub struct Ready {
    pub before: World,
    pub wish: Wish,
    pub home: AtHome,
}

impl Setup {
    /// One card, whose VM's start was given up: what a watcher is there for.
    pub fn given_up() -> Setup {
        let homes = (Home::Nvidia, None);
        let machine =
            Machine { homes, functions: 2, version: "580.105.08", modeset: false, poller: false, vfio_loaded: true };
        Setup { machine, take: vec![1], way: Way::GivenUp, busy: Busy::Nobody }
    }

    pub fn slots(&self) -> Vec<SlotId> {
        self.take.iter().map(|card| slot(*card)).collect()
    }

    /// None when there is no such situation.
    ///
    /// # Errors
    /// When what leads there did not go as it must.
    pub fn prepare(&self, bench: &mut Bench) -> Result<Option<Ready>, String> {
        let mut state = self.machine.build();
        if !occupy(&mut state, self.busy) {
            return Ok(None);
        }
        let home = AtHome::of(&state);
        bench.config.policy = self.busy.policy();
        if self.is_beyond() {
            return Ok(None);
        }
        bench.log.clear();
        bench.restore(&World { state, files: std::collections::BTreeMap::new() });
        let slots = self.slots();
        let all = self.machine.slots();
        let by_hand = Owner::Manual(slots[0]);
        let first = |bench: &mut Bench, wish: &Wish| match bench.run(wish, None).end.code() {
            Some(0) => Ok(true),
            // Busy is a reason not to begin.
            Some(3) if self.busy != Busy::Nobody => Ok(false),
            _ => Err(format!("the way there: {}", bench.log.join("\n"))),
        };
        let wish = match self.way {
            Way::ToVm => Wish::Leave(VM, slots.clone()),
            Way::ToHand if slots.len() == 1 => Wish::Leave(by_hand, slots.clone()),
            // Whatever the card: it is the way home of the others.
            Way::GivenUp if self.machine.homes != (Home::Nvidia, None) || self.machine.functions != 2 => {
                return Ok(None);
            }
            Way::OneOfTwo if self.machine.functions == 2 && slots.len() == 1 && all.len() == 2 => {
                if !first(bench, &Wish::Leave(VM, all))? {
                    return Ok(None);
                }
                Wish::Keep(VM, slots.clone())
            }
            Way::FromVm | Way::FromVmLate | Way::Reconcile | Way::GivenUp => {
                if !first(bench, &Wish::Leave(VM, slots.clone()))? {
                    return Ok(None);
                }
                if self.way == Way::Reconcile {
                    Wish::Reconcile
                } else if self.way == Way::GivenUp {
                    Wish::Watch(111)
                } else {
                    if !self.let_vm_run(&mut bench.kernel.state.borrow_mut()) {
                        return Ok(None);
                    }
                    Wish::Home(VM)
                }
            }
            Way::FromHand if slots.len() == 1 => {
                if !first(bench, &Wish::Leave(by_hand.clone(), slots.clone()))? {
                    return Ok(None);
                }
                Wish::Home(by_hand)
            }
            Way::Takeover => {
                if !first(bench, &Wish::Leave(OTHER_VM, all))? {
                    return Ok(None);
                }
                Wish::Leave(VM, slots.clone())
            }
            Way::TakeoverHalf => {
                let fault = Fault { at: 5, kind: Kind::KillAfter { alone: true } };
                let ran = bench.run(&Wish::Leave(OTHER_VM, all), Some(fault));
                if ran.end.code().is_some() {
                    return Ok(None);
                }
                Wish::Leave(VM, slots.clone())
            }
            Way::TwoHalves if all.len() == 2 => {
                for (vmid, slot) in [222, 333].into_iter().zip(all) {
                    let fault = Fault { at: 3, kind: Kind::KillAfter { alone: true } };
                    bench.run(&Wish::Leave(Owner::Vm(vmid), vec![slot]), Some(fault));
                }
                Wish::Leave(VM, slots.clone())
            }
            Way::OverHand if slots.len() == 1 => {
                if !first(bench, &Wish::Leave(by_hand, slots.clone()))? {
                    return Ok(None);
                }
                Wish::Leave(VM, slots.clone())
            }
            Way::ToHand | Way::FromHand | Way::OverHand | Way::TwoHalves | Way::OneOfTwo => return Ok(None),
        };
        Ok(Some(Ready { before: bench.world(), wish, home }))
    }

    /// Situations that differ in kind: here every fault is tried at every change.
    pub fn is_core(&self) -> bool {
        use Home::{Mixed, Nouveau, Nvidia, Unbound};
        use Way::{FromHand, FromVm, FromVmLate, GivenUp, OneOfTwo, OverHand};
        use Way::{Reconcile, Takeover, TakeoverHalf, ToVm, TwoHalves};
        let machine = &self.machine;
        if self.busy == Busy::Everybody {
            let plain = machine.functions == 2 && !machine.modeset && !machine.poller && machine.vfio_loaded;
            let alone = (machine.homes, machine.version) == ((Nvidia, None), "565.77");
            let beside = (machine.homes, machine.version) == ((Nvidia, Some(Nvidia)), "580.105.08") && self.take == [1];
            return plain && (alone || beside);
        }
        if self.busy != Busy::Nobody {
            return false;
        }
        if machine.poller || !machine.vfio_loaded {
            return machine.homes == (Nvidia, None) && matches!(self.way, FromVm | ToVm);
        }
        let holding = (machine.version, machine.modeset) == ("580.95.05", true);
        let never_ends = machine.version == "595.45.04" && !machine.modeset && self.way == ToVm && machine.cards() == 2;
        if machine.version != "565.77" && !holding && !never_ends {
            return false;
        }
        match (machine.homes, machine.functions, self.take.as_slice()) {
            ((Nvidia, None), 2, _) => {
                let differs = matches!(
                    self.way,
                    FromVm | FromVmLate | FromHand | Takeover | TakeoverHalf | OverHand | Reconcile | GivenUp
                );
                self.way == ToVm || (differs && !holding && !machine.modeset)
            }
            ((Nvidia, None), 4, _) | ((Nvidia, Some(Unbound)), 2, [1, 2]) => {
                matches!(self.way, ToVm | FromVm) && !machine.modeset
            }
            ((Nouveau, None), 2, _) => matches!(self.way, ToVm | FromVm),
            ((Mixed, None), 2, _) => matches!(self.way, ToVm | FromVmLate),
            ((Unbound, None), 2, _) => self.way == FromVm,
            ((Nvidia, Some(Nvidia)), 2, [1]) => matches!(self.way, ToVm | FromVm | TakeoverHalf | TwoHalves | OneOfTwo),
            ((Nvidia, Some(Nvidia)), 2, [1, 2]) => matches!(self.way, ToVm | FromVm) && !machine.modeset,
            _ => false,
        }
    }

    /// A card at home without a driver that came home alone is taken when nvidia is loaded for the other card later: no
    /// record names it any more, and nothing may stay set on it.
    fn is_beyond(&self) -> bool {
        let mixed = self.mixes_unbound();
        let alone = matches!(self.way, Way::Takeover | Way::TakeoverHalf | Way::TwoHalves | Way::OneOfTwo)
            && self.take.len() == 1;
        // Whoever polls the nodes loads it as well, at any time.
        mixed && (alone || self.machine.poller)
    }

    /// One card is at home on nvidia, the other without a driver. While a call hangs in one of them the other comes home
    /// alone: beyond, as above.
    pub fn mixes_unbound(&self) -> bool {
        self.machine.has(Home::Nvidia) && (self.machine.has(Home::Unbound) || self.machine.has(Home::Bare))
    }

    /// The VM runs for a while. False when what Proxmox does then changes more than this is about.
    fn let_vm_run(&self, state: &mut State) -> bool {
        let slots = self.slots();
        if self.way == Way::FromVmLate {
            let ids: Vec<(u16, u16)> = state
                .functions
                .iter()
                .filter(|(address, _)| slots.iter().any(|slot| address.starts_with(&slot.to_string())))
                .map(|(_, f)| (f.vendor, f.device))
                .collect();
            let others = |state: &State| {
                let drivers =
                    state.functions.iter().filter(|(a, _)| !slots.iter().any(|slot| a.starts_with(&slot.to_string())));
                drivers.map(|(_, f)| f.driver).collect::<Vec<_>>()
            };
            let before = others(state);
            for (vendor, device) in ids {
                state.new_id(vendor, device);
            }
            if others(state) != before {
                return false;
            }
        }
        state.start_qemu(111, &slots);
        state.now += Duration::from_secs(60);
        let closing = if self.way == Way::FromVmLate { Duration::from_millis(300) } else { Duration::ZERO };
        state.stop_qemu(111, closing);
        true
    }
}

/// Somebody is busy from the beginning. False when there is nothing to be busy with.
pub fn occupy(state: &mut State, busy: Busy) -> bool {
    let gpu = |card: usize| format!("{}.0", slot(card));
    let minor = |state: &State, card: usize| state.functions.get(&gpu(card)).and_then(|f| f.minor).map(nvidia_number);
    let control = nvidia_number(CONTROL_MINOR);
    let open = match busy {
        Busy::Nobody => return true,
        Busy::First => minor(state, 1).map(|node| vec![node, control, state.uvm_number()]),
        Busy::FirstDrm => state.drm_number(&gpu(1)).map(|number| vec![number]),
        Busy::FirstSound => state.sound_number(&format!("{}.1", slot(1))).map(|number| vec![number]),
        Busy::Second => minor(state, 2).map(|node| vec![node, control, state.uvm_number()]),
        Busy::SecondNode => minor(state, 2).map(|node| vec![node]),
        Busy::Control => minor(state, 1).map(|_| vec![control]),
        Busy::Everybody => return state.host_everybody(),
        Busy::Opening => {
            state.opening_until = state.now + OPENING;
            return state.is_opening();
        }
        Busy::Gone => {
            state.functions.entry(gpu(1)).and_modify(|function| function.is_gone = true);
            return true;
        }
        Busy::Passing => {
            let Some(number) = state.sound_number(&format!("{}.1", slot(1))) else { return false };
            let end = state.now + PASSING;
            let pid =
                state.start_process("(udev-worker)", "0::/system.slice/systemd-udevd.service/udev\n", vec![number]);
            state.processes.entry(pid).and_modify(|process| process.ends = Some(end));
            return true;
        }
    };
    let Some(open) = open else { return false };
    state.start_process("user", "0::/system.slice/user.service\n", open);
    true
}

/// All machines that are worth telling apart.
pub fn machines() -> Vec<Machine> {
    use Home::{Bare, Mixed, Nouveau, Nvidia, Unbound, Vfio};
    let homes = [
        (Nvidia, None),
        (Nouveau, None),
        (Unbound, None),
        (Bare, None),
        (Vfio, None),
        (Mixed, None),
        (Nvidia, Some(Nvidia)),
        (Nouveau, Some(Nouveau)),
        (Unbound, Some(Unbound)),
        (Vfio, Some(Vfio)),
        (Mixed, Some(Mixed)),
        (Nvidia, Some(Unbound)),
        (Unbound, Some(Nvidia)),
        (Nvidia, Some(Vfio)),
        (Mixed, Some(Nvidia)),
    ];
    let mut machines = Vec::new();
    for homes in homes {
        for functions in [2, 4] {
            for version in ["565.77", "580.95.05", "580.105.08", "595.45.04"] {
                for modeset in [false, true] {
                    for (poller, vfio_loaded) in [(false, true), (true, true), (false, false)] {
                        let machine = Machine { homes, functions, version, modeset, poller, vfio_loaded };
                        let nvidia_matters = version == "565.77" && !modeset && !poller;
                        let vfio_is_loaded_anyway = machine.has(Vfio) || machine.has(Mixed);
                        let is_plain = !poller && vfio_loaded;
                        if (machine.has(Nvidia) || nvidia_matters)
                            && (vfio_loaded || !vfio_is_loaded_anyway)
                            && (is_plain || (functions == 2 && version == "580.105.08") || !machine.has(Nvidia))
                        {
                            machines.push(machine);
                        }
                    }
                }
            }
        }
    }
    machines
}

/// All situations, busy ones included.
pub fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for machine in machines() {
        let takes: &[&[usize]] = if machine.cards() == 2 { &[&[1], &[2], &[1, 2]] } else { &[&[1]] };
        for take in takes {
            for way in WAYS {
                setups.push(Setup { machine, take: take.to_vec(), way, busy: Busy::Nobody });
            }
            for busy in [
                Busy::First,
                Busy::FirstDrm,
                Busy::FirstSound,
                Busy::Second,
                Busy::SecondNode,
                Busy::Control,
                Busy::Opening,
                Busy::Gone,
                Busy::Passing,
            ] {
                for way in [Way::ToVm, Way::ToHand] {
                    setups.push(Setup { machine, take: take.to_vec(), way, busy });
                }
            }
            // Whoever is stopped makes no difference to how the rest goes.
            let ways = [Way::ToVm, Way::FromVm, Way::Takeover, Way::TakeoverHalf, Way::Reconcile];
            let is_plain = machine.functions == 2 && !machine.poller && machine.vfio_loaded;
            for way in ways.into_iter().filter(|_| is_plain) {
                setups.push(Setup { machine, take: take.to_vec(), way, busy: Busy::Everybody });
            }
        }
    }
    setups
}
