//! The machines that handoffs are tried on, and what they look like at home.

use super::hosted::Running;
use super::state::{NodeState, Pci, State};
use gpu_handoff::address::SlotId;
use gpu_handoff::gpu::power::Power;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Where a card's functions are at home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Home {
    Nvidia,
    Nouveau,
    /// The GPU has no driver, the other functions have theirs.
    Unbound,
    /// No function has a driver.
    Bare,
    /// All functions on vfio-pci by the administrator's ids.
    Vfio,
    /// The GPU on vfio-pci by the administrator's ids, the other functions with their drivers.
    Mixed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Machine {
    /// By card.
    pub homes: (Home, Option<Home>),
    /// Functions of each card: display and audio, or USB and UCSI as well.
    pub functions: usize,
    pub version: &'static str,
    pub modeset: bool,
    pub poller: bool,
    /// vfio_pci is loaded already at home, as host preparation has it.
    pub vfio_loaded: bool,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:?}", self.homes.0)?;
        if let Some(second) = self.homes.1 {
            write!(f, "+{second:?}")?;
        }
        write!(f, ", {} functions, {} modeset={}", self.functions, self.version, u8::from(self.modeset))?;
        if self.poller {
            f.write_str(", nodes polled")?;
        }
        if !self.vfio_loaded {
            f.write_str(", vfio-pci not loaded")?;
        }
        Ok(())
    }
}

const CLASSES: [u32; 4] = [0x03_0000, 0x04_0300, 0x0c_0330, 0x0c_8000];

pub fn slot(card: usize) -> SlotId {
    format!("0000:0{card}:00").parse().expect("a slot")
}

impl Machine {
    pub fn cards(&self) -> usize {
        1 + usize::from(self.homes.1.is_some())
    }

    pub fn slots(&self) -> Vec<SlotId> {
        (1..=self.cards()).map(slot).collect()
    }

    fn home_of(&self, card: usize) -> Home {
        if card == 1 { self.homes.0 } else { self.homes.1.unwrap_or(self.homes.0) }
    }

    pub fn has(&self, home: Home) -> bool {
        (1..=self.cards()).any(|card| self.home_of(card) == home)
    }

    /// The machine at rest.
    pub fn build(&self) -> State {
        let mut state = State { version: self.version, modeset: self.modeset, poller: self.poller, ..State::empty() };
        // Cards of one home are twins: an id that is written for one captures the other.
        let twins = self.homes.1.is_none_or(|second| second == self.homes.0);
        for card in 1..=self.cards() {
            for (number, class) in CLASSES.iter().take(self.functions).enumerate() {
                let model = if twins { 0 } else { 0x10 * card };
                let function = Pci {
                    vendor: 0x10de,
                    device: u16::try_from(0x2600 + 0x100 * number + model).unwrap_or(0),
                    class: *class,
                    group: u32::try_from(10 + card).unwrap_or(0),
                    driver: None,
                    link_is_gone: false,
                    driver_override: None,
                    locked: false,
                    minor: None,
                    turn: 0,
                    drm: None,
                    power: power_at_home(number),
                    is_gone: false,
                };
                state.functions.insert(format!("{}.{number}", slot(card)), function);
            }
        }
        self.settle_at_home(&mut state);
        // The driver of the second function allows sleep by itself; that of the first has an administrator's rule.
        for function in state.functions.values_mut().filter(|f| f.driver == Some("nvidia") && self.modeset) {
            function.power.control = Some("auto".to_string());
        }
        state.other_screen = self.functions == 4 && self.modeset;
        state.settle_console();
        // Somebody prefers it dark.
        if self.version == "595.45.04" && state.other_screen {
            state.console = Some(false);
        }
        let nodes = state.wanted_nodes();
        for (path, number) in nodes {
            state.nodes.insert(path, NodeState { number, mode: 0o666, uid: 0, gid: 44 });
        }
        state
    }

    fn settle_at_home(&self, state: &mut State) {
        for card in 1..=self.cards() {
            let addresses: Vec<String> =
                state.functions.keys().filter(|a| a.starts_with(&slot(card).to_string())).cloned().collect();
            for (number, address) in addresses.iter().enumerate() {
                let on_vfio = match self.home_of(card) {
                    Home::Vfio => true,
                    Home::Mixed => number == 0,
                    _ => false,
                };
                if on_vfio {
                    let function = &state.functions[address];
                    state.static_ids.push((function.vendor, function.device));
                }
            }
        }
        if self.vfio_loaded || !state.static_ids.is_empty() {
            let _ = state.load("vfio_pci");
        }
        let driver_modules = [
            ("snd_hda_intel", true),
            ("i2c_nvidia_gpu", self.functions > 2),
            ("nvidia", self.has(Home::Nvidia)),
            ("nouveau", self.has(Home::Nouveau)),
        ];
        for (module, wanted) in driver_modules {
            if wanted {
                let _ = state.load(module);
            }
        }
        let _ = state.attach("xhci_hcd");
        // Loading bound whatever matches: who is at home without a driver was unbound by hand.
        for card in 1..=self.cards() {
            let addresses: Vec<String> =
                state.functions.keys().filter(|a| a.starts_with(&slot(card).to_string())).cloned().collect();
            for (number, address) in addresses.iter().enumerate() {
                if self.home_of(card) == Home::Bare || (self.home_of(card) == Home::Unbound && number == 0) {
                    state.complete_unbind(address);
                }
            }
        }
        if self.has(Home::Nvidia) {
            for module in ["nvidia_uvm", "nvidia_modeset", "nvidia_drm"] {
                let _ = state.load(module);
            }
        }
    }
}

/// As they are before any driver: the fourth function is on a kernel or bus without such attributes.
fn power_at_home(number: usize) -> Power {
    let text = |text: &str| Some(text.to_string());
    match number {
        2 => Power { control: text("on"), d3cold_allowed: text("0") },
        3 => Power::default(),
        _ => Power { control: text("on"), d3cold_allowed: text("1") },
    }
}

/// What must be again what it was, once everything is home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AtHome {
    /// By function: driver, override, and whether it may sleep.
    pub functions: BTreeMap<String, (Option<&'static str>, Option<String>, Power)>,
    /// Loaded modules but for vfio_pci, which stays once it is needed.
    pub modules: BTreeSet<String>,
    pub vfio_ids: BTreeSet<(u16, u16)>,
    pub running: Running,
    /// Whether the framebuffer console is on a screen, while there is one.
    pub console: Option<bool>,
    /// By GPU, its number in /dev/dri.
    pub dri: BTreeMap<String, Option<u64>>,
}

impl AtHome {
    pub fn of(state: &State) -> AtHome {
        let functions = state.functions.iter().map(|(address, f)| {
            let driver = if f.link_is_gone { None } else { f.driver };
            (address.clone(), (driver, f.driver_override.clone(), f.power.clone()))
        });
        AtHome {
            functions: functions.collect(),
            modules: state.modules.iter().filter(|m| *m != "vfio_pci").cloned().collect(),
            vfio_ids: state.vfio_ids.iter().copied().collect(),
            running: state.running(),
            console: state.console,
            dri: state.functions.iter().map(|(address, f)| (address.clone(), f.drm.map(|(_, minor)| minor))).collect(),
        }
    }

    /// GPUs with another number in /dev/dri than at home, or without one.
    pub fn other_nodes(&self, state: &State) -> Vec<String> {
        let now = AtHome::of(state).dri;
        self.dri.iter().filter(|(address, was)| now.get(*address) != Some(was)).map(|(a, _)| a.clone()).collect()
    }

    /// Everything that is not as it was at home, a line each. `only`: of these slots, else of the whole machine.
    pub fn differences(&self, state: &State, only: Option<&[String]>) -> Vec<String> {
        let now = AtHome::of(state);
        let concerns = |address: &str| only.is_none_or(|slots| slots.iter().any(|slot| address.starts_with(slot)));
        let mut lines = Vec::new();
        for (address, home) in self.functions.iter().filter(|(address, _)| concerns(address)) {
            let is = now.functions.get(address);
            if is != Some(home) {
                lines.push(format!("{address} is {is:?}, at home {home:?}"));
            }
        }
        if only.is_some() {
            return lines;
        }
        if now.modules != self.modules {
            lines.push(format!("modules are {:?}, at home {:?}", now.modules, self.modules));
        }
        lines.extend(now.running.difference(&self.running));
        if now.console != self.console {
            lines.push(format!("the console is {:?}, at home {:?}", now.console, self.console));
        }
        // Without vfio-pci there are no ids; once it is loaded, the administrator's are there.
        let administrators: BTreeSet<(u16, u16)> = state.static_ids.iter().copied().collect();
        if state.drivers.contains(&"vfio-pci") && now.vfio_ids != administrators {
            lines.push(format!("ids of vfio-pci are {:04x?}, the administrator's {administrators:04x?}", now.vfio_ids));
        }
        for (path, number) in state.wanted_nodes() {
            match state.nodes.get(&path) {
                Some(NodeState { number: is, mode: 0o666, uid: 0, gid: 44 }) if *is == number => {}
                other => lines.push(format!("{path} is {other:?}, should be {number}")),
            }
        }
        lines
    }
}
