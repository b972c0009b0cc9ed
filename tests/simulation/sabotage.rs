//! Kernels that are broken on purpose, to show that the checks notice: each claims what it did not do, also to whoever
//! reads it back.

use super::bench::{Bench, Wish};
use super::change::apply;
use super::check::{always, ended_well};
use super::faults::{Fault, Kind};
use super::machine::{Home, Machine};
use super::pci::Reply;
use super::setup::{Busy, Setup, Way};
use super::state::State;
use gpu_handoff::handoff::kept::record::Owner;
use gpu_handoff::sys::{Action, DeviceNumber};
use nix::libc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// remove_id says that there is no such id, and keeps it.
    IdStays,
    /// Clearing an override does nothing; it reads back as cleared.
    OverrideStays,
    /// Binding to snd_hda_intel does nothing; it reads back as bound.
    NotBound,
    /// Binding to vfio-pci does nothing; it reads back as bound.
    NotGiven,
    /// nvidia_drm is not loaded; it reads back as loaded.
    ModuleForgotten,
    /// A node gets the wrong minor; it reads back as right.
    WrongNode,
    /// Limits are ignored: everything takes its time.
    NoDeadline,
    /// Nobody can see which VM runs.
    VmHidden,
    /// The record vanishes with the run that wrote it.
    RecordLost,
}

impl Sabotage {
    pub const ALL: [Sabotage; 9] = [
        Sabotage::IdStays,
        Sabotage::OverrideStays,
        Sabotage::NotBound,
        Sabotage::NotGiven,
        Sabotage::ModuleForgotten,
        Sabotage::WrongNode,
        Sabotage::NoDeadline,
        Sabotage::VmHidden,
        Sabotage::RecordLost,
    ];

    pub fn text_of(self, state: &State, path: &str) -> Option<String> {
        match self {
            Sabotage::OverrideStays if path.ends_with("/driver_override") => {
                let function = state.functions.get(path.split('/').nth(5)?)?;
                // What was written last is what it shows, were it not for clearing.
                let shown = function.driver_override.clone().filter(|_| function.driver == Some("vfio-pci"));
                Some(shown.unwrap_or_else(|| "(null)".to_string()))
            }
            Sabotage::VmHidden if path.starts_with("/run/qemu-server") => Some(String::new()),
            Sabotage::VmHidden if path == "/proc/locks" => Some(String::new()),
            _ => None,
        }
    }

    pub fn link_at(self, path: &str) -> Option<Option<String>> {
        let of_function = |number: &str| path.ends_with(&format!(".{number}/driver"));
        match self {
            Sabotage::NotBound if of_function("1") => Some(Some("snd_hda_intel".to_string())),
            Sabotage::NotGiven if of_function("1") => Some(Some("vfio-pci".to_string())),
            _ => None,
        }
    }

    pub fn is_there(self, path: &str) -> Option<bool> {
        (self == Sabotage::ModuleForgotten && path == "/sys/module/nvidia_drm").then_some(true)
    }

    pub fn device_number(self, state: &State, path: &str) -> Option<DeviceNumber> {
        let is_made = self == Sabotage::WrongNode && state.nodes.contains_key(path);
        is_made.then(|| state.wanted_nodes().into_iter().find(|(p, _)| p == path).map(|(_, n)| n))?
    }

    pub fn carry_out(self, state: &mut State, action: &Action) -> Reply {
        let is_write = |end: &str| matches!(action, Action::Write { path, .. } if path.ends_with(end));
        match (self, action) {
            (Sabotage::IdStays, _) if is_write("/remove_id") => Reply::Errno(libc::ENODEV),
            (Sabotage::OverrideStays, Action::Write { data, .. }) if is_write("/driver_override") && data == "\n" => {
                Reply::Done
            }
            (Sabotage::WrongNode, Action::MakeNode(node)) => {
                let mut wrong = node.clone();
                wrong.number.minor += 7;
                apply(state, &Action::MakeNode(wrong))
            }
            (Sabotage::ModuleForgotten, Action::Load { modules }) => {
                let rest: Vec<String> = modules.iter().filter(|m| *m != "nvidia_drm").cloned().collect();
                apply(state, &Action::Load { modules: rest })
            }
            _ => apply(state, action),
        }
    }
}

/// What the checks noticed of it.
///
/// # Errors
/// When they noticed nothing.
pub fn caught(bench: &mut Bench, sabotage: Sabotage) -> Result<String, String> {
    let way = match sabotage {
        Sabotage::NotGiven | Sabotage::NoDeadline | Sabotage::VmHidden | Sabotage::RecordLost => Way::ToVm,
        _ => Way::FromVmLate,
    };
    let homes = (Home::Nvidia, None);
    let machine =
        Machine { homes, functions: 2, version: "580.105.08", modeset: false, poller: false, vfio_loaded: true };
    let setup = Setup { machine, take: vec![1], way, busy: Busy::Nobody };
    let ready = setup.prepare(bench)?.ok_or("there is no such situation")?;
    let mut wish = ready.wish.clone();
    let mut fault = None;
    if sabotage == Sabotage::VmHidden {
        bench.run(&wish, None);
        bench.kernel.state.borrow_mut().start_qemu(111, &setup.slots());
        wish = Wish::Leave(Owner::Vm(222), setup.slots());
    }
    if sabotage == Sabotage::RecordLost {
        fault = Some(Fault { at: 3, kind: Kind::KillAfter { alone: true } });
    }
    bench.kernel.sabotage.set(Some(sabotage));
    let before = bench.world();
    let ran = bench.run(&wish, fault);
    bench.kernel.sabotage.set(None);
    if sabotage == Sabotage::RecordLost {
        bench.forget_file("vm-111");
    }
    let noticed = ended_well(bench, &wish, fault.map(|fault| fault.kind), &ran, &before, &ready.home)
        .and_then(|()| always(bench, &ready.home));
    noticed.err().ok_or_else(|| format!("not noticed: {ran:?}"))
}
