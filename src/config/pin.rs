//! Where a VM's threads and interrupts run: `vms.VMID.pin`.

use crate::cpus::Cpus;
use serde_json::Value;

/// What a list of CPUs is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// One to one: the first vCPU on the first of them.
    Vcpus,
    Emulator,
    /// Without such a list they run where the emulator does.
    Iothreads,
    /// The interrupts of the devices that are passed.
    Irq,
}

pub const PARTS: [Part; 4] = [Part::Vcpus, Part::Emulator, Part::Iothreads, Part::Irq];

impl Part {
    /// Its key.
    pub fn key(self) -> &'static str {
        match self {
            Part::Vcpus => "vcpus",
            Part::Emulator => "emulator",
            Part::Iothreads => "iothreads",
            Part::Irq => "irq",
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pin {
    pub lists: Vec<(Part, Cpus)>,
    /// Of the CPUs that the vCPUs run on.
    pub governor: Option<String>,
}

impl Pin {
    pub fn of(&self, part: Part) -> Option<&Cpus> {
        self.lists.iter().find(|(other, _)| *other == part).map(|(_, cpus)| cpus)
    }

    /// Of a document that was weeded.
    fn parse(value: &Value) -> Pin {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        Pin {
            lists: PARTS.iter().filter_map(|part| Some((*part, Cpus::parse(text(part.key())?)?))).collect(),
            governor: text("governor").map(str::to_string),
        }
    }
}

/// By VMID, of a document that was weeded.
pub(super) fn all(document: &Value) -> Vec<(u32, Pin)> {
    let vms = document.get("vms").and_then(Value::as_object).into_iter().flatten();
    vms.filter_map(|(id, entry)| Some((id.parse().ok()?, Pin::parse(entry.get("pin")?)))).collect()
}
