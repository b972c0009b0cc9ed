//! Who lays claim to a card: VMs by their configuration, containers that were attached to it.

use crate::address::SlotId;
use crate::containers::record;
use crate::events::{hookscript, stray};
use crate::proxmox::{guest, vm};
use crate::sorted;
use crate::sys::Kernel;
use serde_json::{Value, json};
use std::fmt;

/// So many characters a line has beside blanks and brackets.
const ROOM: usize = 64;

/// One guest's, with the slots that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub guest: Guest,
    /// As Proxmox shows it.
    pub name: Option<String>,
    pub slots: Vec<SlotId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    Vm {
        id: u32,
        hook: Hook,
    },
    /// One that was attached.
    Container(u32),
}

/// Which hookscript a VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Ours,
    Another,
    None,
}

/// Of the guests of this node, as far as they can be read: only root may.
pub fn all(kernel: &dyn Kernel) -> Vec<Claim> {
    let vms = kernel.list("/etc/pve/qemu-server").into_iter();
    let vms = vms.filter_map(|name| of_vm(kernel, name.strip_suffix(".conf")?.parse().ok()?));
    let mut claims: Vec<Claim> = vms.filter(|claim| !claim.slots.is_empty()).collect();
    sorted::sort_by_key(&mut claims, |claim| claim.guest.id());
    claims.extend(record::all(kernel).into_iter().filter_map(|id| of_container(kernel, id)));
    claims
}

fn of_vm(kernel: &dyn Kernel, id: u32) -> Option<Claim> {
    let bytes = kernel.read(&format!("/etc/pve/qemu-server/{id}.conf")).ok()?;
    let config = vm::parse(&bytes);
    if config.template {
        return None;
    }
    let slots = hookscript::named_slots(kernel, &config);
    let hook = match &config.hookscript {
        _ if stray::has_hook(&config) => Hook::Ours,
        Some(_) => Hook::Another,
        None => Hook::None,
    };
    Some(Claim { guest: Guest::Vm { id, hook }, name: guest::name(&bytes, "name"), slots })
}

fn of_container(kernel: &dyn Kernel, id: u32) -> Option<Claim> {
    let bytes = kernel.read(&format!("/etc/pve/lxc/{id}.conf")).ok()?;
    let record = record::read(kernel, id).ok()??;
    Some(Claim { guest: Guest::Container(id), name: guest::name(&bytes, "hostname"), slots: record.slots })
}

impl Guest {
    fn id(self) -> u32 {
        match self {
            Guest::Vm { id, .. } | Guest::Container(id) => id,
        }
    }
}

impl Claim {
    pub fn is_of_vm(&self, vmid: u32) -> bool {
        matches!(self.guest, Guest::Vm { id, .. } if id == vmid)
    }

    /// The name in brackets, cut to so many characters.
    pub fn name_in(&self, room: usize) -> String {
        let Some(name) = &self.name else { return String::new() };
        match name.char_indices().nth(room) {
            Some((end, _)) => format!(" ({}…)", &name[..end]),
            None => format!(" ({name})"),
        }
    }

    pub fn to_json(&self) -> Value {
        let (vmid, ctid, hook) = match self.guest {
            Guest::Vm { id, hook } => (Some(id), None, Some(hook == Hook::Ours)),
            Guest::Container(id) => (None, Some(id), None),
        };
        json!({"vmid": vmid, "ctid": ctid, "name": self.name, "hook": hook})
    }
}

/// A name never pushes out of the line what is to be typed.
impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (who, what) = match self.guest {
            Guest::Vm { id, hook: Hook::Ours } => (format!("VM {id}"), "names it".to_string()),
            Guest::Vm { id, hook: Hook::None } => {
                (format!("VM {id}"), format!("names it WITHOUT the hook: gpu-handoff enable {id}"))
            }
            Guest::Vm { id, hook: Hook::Another } => {
                (format!("VM {id}"), format!("names it with another hook; for both: gpu-handoff enable {id}"))
            }
            Guest::Container(id) => (format!("container {id}"), "is attached to it".to_string()),
        };
        let room = ROOM.saturating_sub(who.len() + what.len());
        write!(f, "{who}{} {what}", if room == 0 { String::new() } else { self.name_in(room) })
    }
}
