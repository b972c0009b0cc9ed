//! On which other nodes of the cluster a VM may start, and what those have told that they have for it.

use super::mapped::{slot_of, takes_part};
use crate::address::SlotId;
use crate::exit::{Code, Exit};
use crate::handoff::kept::told::{Card, Told, ago};
use crate::proxmox::cluster::{self, Cluster, Node};
use crate::proxmox::mapping::{self, Mappings};
use crate::proxmox::vm::{self, VmConfig};
use crate::proxmox::{ha, pci_id::PciId};
use crate::sorted;
use crate::sys::Kernel;

/// A node on which a VM may start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherNode {
    pub name: String,
    /// None where it told nothing that can be understood.
    pub told: Option<Told>,
    /// What the VM names and the node has not, by what it told.
    pub lacks: Vec<String>,
    /// What the VM would get there, where all of that is nobody's but the host's.
    free: Vec<String>,
}

/// Where else a VM may start.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    pub nodes: Vec<OtherNode>,
    /// HA may start it there by itself; else a person who migrates it.
    pub by_ha: bool,
    /// What keeps HA from nodes that lack something.
    pub remedy: String,
}

/// What a line of a VM names.
enum Need {
    Slot(SlotId),
    Mapping(String),
}

/// All nodes but this one, and what each told; none where there is no cluster.
pub fn others(kernel: &dyn Kernel) -> Vec<(Node, Option<Told>)> {
    if !cluster::is_in_one(kernel) {
        return Vec::new();
    }
    let this = cluster::this_node(kernel);
    let nodes = Cluster::read(kernel).nodes.into_iter().filter(|node| node.name != this);
    nodes.map(|node| (Told::read(kernel, &node.name).ok().flatten(), node)).map(|(told, node)| (node, told)).collect()
}

/// Where HA may start it; of one that HA leaves alone, where its mapping stands for something.
pub fn of_vm(kernel: &dyn Kernel, vmid: u32, vm: &VmConfig) -> Elsewhere {
    let others = others(kernel);
    if others.is_empty() {
        return Elsewhere::default();
    }
    let needs = needs(kernel, vm);
    let mappings = kernel.read(mapping::PATH).map(|bytes| mapping::parse(&bytes)).unwrap_or_default();
    let is_mapped = |node: &str| {
        let mut names = needs.iter().filter_map(|need| if let Need::Mapping(name) = need { Some(name) } else { None });
        names.any(|name| mappings.get(name).is_some_and(|nodes| nodes.contains_key(node)))
    };
    let only = ha::only_nodes(kernel, "vm", vmid);
    let by_ha = ha::manages(kernel, "vm", vmid);
    let may = |node: &str| match &only {
        _ if !by_ha => is_mapped(node),
        Some(only) => only.iter().any(|one| one == node),
        None => true,
    };
    let all = others.into_iter().filter(|(node, _)| may(&node.name));
    let nodes: Vec<OtherNode> = all.map(|(node, told)| OtherNode::new(node, told, &needs, &mappings)).collect();
    let mut would_do = vec![cluster::this_node(kernel)];
    would_do.extend(nodes.iter().filter(|node| node.lacks.is_empty()).map(|node| node.name.clone()));
    sorted::sort(&mut would_do);
    Elsewhere { nodes, by_ha, remedy: ha::keep_to(kernel, "vm", vmid, &would_do.join(",")) }
}

/// The GPUs that it names here, as it names them.
fn needs(kernel: &dyn Kernel, vm: &VmConfig) -> Vec<Need> {
    let slot_here = |id: PciId| Some(slot_of(kernel, &id).filter(|slot| takes_part(slot, &id))?.id);
    let mut needs = Vec::new();
    for line in vm.hostpci.values() {
        match &line.mapping {
            Some(name) if mapping::on_this_node(kernel, name).into_iter().any(|id| slot_here(id).is_some()) => {
                needs.push(Need::Mapping(name.clone()));
            }
            Some(_) => {}
            None => needs.extend(sorted::set(line.addresses().filter_map(slot_here)).into_iter().map(Need::Slot)),
        }
    }
    needs
}

impl OtherNode {
    fn new(Node { name, is_online }: Node, told: Option<Told>, needs: &[Need], mappings: &Mappings) -> OtherNode {
        let (mut lacks, mut free) = (Vec::new(), Vec::new());
        let cards = told.as_ref().map(|told| told.cards.as_slice()).unwrap_or_default();
        for need in needs {
            let (slots, lack) = match need {
                Need::Slot(slot) => (vec![*slot], format!("has no NVIDIA GPU at {slot}")),
                Need::Mapping(mapping) => match mappings.get(mapping).and_then(|nodes| nodes.get(&name)) {
                    None => (Vec::new(), format!("is not in its mapping {mapping}")),
                    Some(entries) => {
                        let slots: Vec<SlotId> =
                            entries.iter().flat_map(|one| one.ids().filter_map(|id| id.slot())).collect();
                        let lack = format!("has no NVIDIA GPU where its mapping {mapping} says");
                        (slots, lack)
                    }
                },
            };
            let would_do = |card: &&Card| slots.iter().any(|slot| slot.to_string() == card.slot);
            let there: Vec<&Card> = cards.iter().filter(would_do).collect();
            if there.is_empty() && (told.is_some() || slots.is_empty()) {
                lacks.push(lack);
            }
            // Two lines with one mapping get two cards.
            let is_left = |card: &&&Card| card.is_free() && !free.contains(&card.slot);
            let one = there.iter().find(is_left).map(|card| card.slot.clone());
            free.extend(one);
        }
        if free.len() < needs.len() || is_online == Some(false) {
            free.clear();
        }
        OtherNode { name, told, lacks, free }
    }
}

/// HA tries a start that was refused once more, then on another node. It does not know where a card is free.
pub fn with_a_free_one(kernel: &dyn Kernel, vmid: u32, exit: Exit) -> Exit {
    if exit.code != Code::Refused || !ha::manages(kernel, "vm", vmid) {
        return exit;
    }
    let config = kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")).unwrap_or_default();
    let nodes = of_vm(kernel, vmid, &vm::parse(&config)).nodes;
    let now = kernel.unix_time();
    let free = nodes.iter().find_map(|node| Some((node, node.told.as_ref().filter(|_| !node.free.is_empty())?)));
    let Some((node, told)) = free else { return exit };
    let (free, ago) = (node.free.join(" "), ago(told.age(now)));
    exit.and(&format!("or where {free} was free {ago} ago: ha-manager relocate vm:{vmid} {}", node.name))
}
