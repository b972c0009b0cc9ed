//! The cluster: whether other nodes on which a VM may start have what it needs there, by what they have told.

use super::facts::Facts;
use super::facts::guests::Vm;
use super::finding::{Area, Check, Hit, Severity};
use super::vm::takers;
use crate::events::nodes::OtherNode;
use crate::handoff::kept::told::Told;
use crate::proxmox::cluster::COROSYNC;
use crate::proxmox::{ha, mapping};
use crate::setup::hookscript::VOLUME;

const INSTALL: &str = "apt install ./gpu-handoff_*_amd64.deb";

pub const AREA: Area = Area {
    title: "Other nodes of the cluster",
    checks: &[
        Check {
            id: "vm-ha",
            severity: Severity::Warning,
            title: "HA manages a VM that takes a card",
            why: "When its start is refused HA tries other nodes, which need a card at the same address, and then gives up.",
            more: "See the page on backups and high availability.",
            find: managed,
        },
        Check {
            id: "vm-not-on-all-nodes",
            severity: Severity::Note,
            title: "a guest with the hookscript is in a cluster",
            why: "On a node without this program it does not start, or keeps its card from that host.",
            more: "Install it on all nodes that may start the guest; enable ID --storage STORAGE has it start on the others, \
                   too. It is there where a node has told what it has: see gpu-handoff --status --cluster.",
            find: silent,
        },
        Check {
            id: "cluster-no-card",
            severity: Severity::Warning,
            title: "a VM may start on a node that lacks its card",
            why: "Its start fails there, and HA puts it into the state error.",
            more: "Where it may start is what HA's rules and groups say, and for a VM that HA leaves alone the nodes of its \
                   mapping; what is there is what the node has told.",
            find: no_card,
        },
        Check {
            id: "cluster-no-hook",
            severity: Severity::Warning,
            title: "a VM may start on a node that lacks its hookscript",
            why: "Proxmox does not start a guest whose hookscript is not there.",
            more: "The package makes the link; a hookscript on a shared storage is on every node.",
            find: no_hook,
        },
        Check {
            id: "cluster-no-driver",
            severity: Severity::Note,
            title: "a VM may start on a node without NVIDIA's driver",
            why: "There the card comes home to nobody: neither that host nor its containers can use it.",
            more: "Nothing is wrong with that where only VMs use the card.",
            find: no_driver,
        },
        Check {
            id: "cluster-versions",
            severity: Severity::Note,
            title: "another node has another version of this program",
            why: "What holds for a guest here need not hold where it goes.",
            more: "The cluster's configuration is read by all of them.",
            find: versions,
        },
    ],
};

fn managed(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let text = vm.surprises.ha.as_ref()?;
        let remedy =
            format!("keep HA off it: ha-manager remove vm:{}; or give each node that may start it such a card", vm.id);
        Some(Hit::at(ha::RESOURCES, text, remedy).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

fn silent(facts: &Facts) -> Vec<Hit> {
    let all = &facts.guests.nodes;
    let silent: Vec<&str> = all.iter().filter(|(_, told)| told.is_none()).map(|(name, _)| name.as_str()).collect();
    let nodes = match silent.as_slice() {
        [] if all.is_empty() => "the others".to_string(),
        [] => return Vec::new(),
        silent => silent.join(" and "),
    };
    let hit = |vm: &Vm| {
        let trouble = vm.surprises.cluster.as_ref()?;
        Some(Hit::at(COROSYNC, &trouble.what, format!("{INSTALL}, on {nodes}")).of(vm.id))
    };
    facts.guests.vms.iter().filter(|vm| vm.has_hook).filter_map(hit).collect()
}

/// Where each VM may start beside this node, and what is there.
fn elsewhere(vm: &Vm) -> impl Iterator<Item = (&OtherNode, &Told)> {
    vm.elsewhere.nodes.iter().filter_map(|node| Some((node, node.told.as_ref()?)))
}

/// The file that says that a VM may start elsewhere.
fn place(vm: &Vm) -> &'static str {
    if vm.elsewhere.by_ha { ha::RESOURCES } else { mapping::PATH }
}

fn no_card(facts: &Facts) -> Vec<Hit> {
    let of = |vm: &Vm| {
        let hit = |node: &OtherNode, lack: &String| {
            let found = format!("VM {} may start on {}, which {lack}", vm.id, node.name);
            let remedy = match vm.elsewhere.by_ha {
                true => vm.elsewhere.remedy.clone(),
                false => "see: pvesh get /cluster/mapping/pci".to_string(),
            };
            Hit::at(place(vm), found, remedy).of(vm.id)
        };
        let nodes = vm.elsewhere.nodes.iter();
        nodes.flat_map(|node| node.lacks.iter().map(|lack| hit(node, lack)).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    takers(facts).flat_map(of).collect()
}

fn no_hook(facts: &Facts) -> Vec<Hit> {
    let is_local = |vm: &&Vm| vm.config.hookscript.as_deref() == Some(VOLUME);
    let of = |vm: &Vm| {
        let hit = |node: &OtherNode| {
            let found = format!("VM {} may start on {}, where its hookscript {VOLUME} is not", vm.id, node.name);
            Hit::at(place(vm), found, format!("apt install --reinstall ./gpu-handoff_*_amd64.deb, on {}", node.name))
                .of(vm.id)
        };
        elsewhere(vm).filter(|(_, told)| !told.has_hook).map(|(node, _)| hit(node)).collect::<Vec<_>>()
    };
    facts.guests.vms.iter().filter(is_local).flat_map(of).collect()
}

fn no_driver(facts: &Facts) -> Vec<Hit> {
    let of = |vm: &Vm| {
        let lacks = |told: &Told| told.driver.is_none() && !told.cards.is_empty();
        let hit = |node: &OtherNode| {
            let found = format!("VM {} may start on {}, which has no driver of NVIDIA's", vm.id, node.name);
            Hit::at(place(vm), found, format!("gpu-handoff setup driver, on {}", node.name)).of(vm.id)
        };
        elsewhere(vm).filter(|(_, told)| lacks(told)).map(|(node, _)| hit(node)).collect::<Vec<_>>()
    };
    takers(facts).flat_map(of).collect()
}

fn versions(facts: &Facts) -> Vec<Hit> {
    let ours = env!("CARGO_PKG_VERSION");
    let hit = |(name, told): &(String, Option<Told>)| {
        let other = told.as_ref().map(|told| told.version.as_str()).filter(|version| *version != ours)?;
        let found = format!("{name} has gpu-handoff {other}, this node {ours}");
        Some(Hit::at(crate::handoff::kept::told::path(name), found, format!("{INSTALL}, on the older one")))
    };
    facts.guests.nodes.iter().filter_map(hit).collect()
}
