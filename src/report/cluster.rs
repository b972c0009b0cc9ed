//! `gpu-handoff --status --cluster`: every node of the cluster, and who has its cards, as each has told it last; and what this
//! one tells.

use super::screen::cut;
use super::status::{Gpu, Status};
use super::zone::Zone;
use crate::driver::installed;
use crate::handoff::kept::told::{Card, Told, ago};
use crate::proxmox::cluster::{self, Cluster};
use crate::setup::driver::facts;
use crate::setup::hookscript::{PROGRAM, link_is_missing};
use crate::story::printable;
use crate::sys::Kernel;
use serde_json::{Value, json};

const SCHEMA: u64 = 1;

/// What this node has to tell.
pub fn of_this_node(kernel: &dyn Kernel, status: &Status) -> Told {
    let release = facts::running(kernel);
    // A host without a card has no use for one.
    let installed = || if status.gpus.is_empty() { None } else { installed::version(kernel, &release) };
    let told = Told {
        version: env!("CARGO_PKG_VERSION").to_string(),
        driver: status.driver.clone().or_else(installed),
        has_hook: kernel.exists(PROGRAM) && matches!(link_is_missing(kernel), Ok(false)),
        cards: status.gpus.iter().map(card).collect(),
        kernel: release,
        ..Told::default()
    };
    told.at(kernel.unix_time())
}

fn card(gpu: &Gpu) -> Card {
    let id = gpu.slot.gpu().map(|function| format!("{:04x}:{:04x}", function.vendor, function.device));
    Card {
        slot: gpu.slot.id.to_string(),
        name: gpu.name.clone(),
        id: id.unwrap_or_default(),
        owner: gpu.has.word().to_string(),
        vmid: gpu.has.vmid(),
        since: gpu.since.clone(),
    }
}

/// All nodes, by name.
pub struct Nodes {
    is_quorate: Option<bool>,
    now: u64,
    nodes: Vec<Node>,
}

struct Node {
    name: String,
    is_this: bool,
    is_online: Option<bool>,
    /// What it told last, or why that is not known.
    told: Result<Option<Told>, String>,
}

impl Nodes {
    /// Of this one what holds now.
    pub fn read(kernel: &dyn Kernel, status: &Status) -> Nodes {
        let this = cluster::this_node(kernel);
        let Cluster { is_quorate, mut nodes } = Cluster::read(kernel);
        if !nodes.iter().any(|node| node.name == this) {
            nodes.insert(0, cluster::Node { name: this.clone(), is_online: None });
        }
        let node = |cluster::Node { name, is_online }| {
            let is_this = name == this;
            let told = if is_this { Ok(Some(of_this_node(kernel, status))) } else { Told::read(kernel, &name) };
            Node { name, is_this, is_online, told }
        };
        Nodes { is_quorate, now: kernel.unix_time(), nodes: nodes.into_iter().map(node).collect() }
    }

    /// What of other nodes cannot be understood.
    pub fn problems(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter_map(|node| node.told.as_ref().err().map(String::as_str))
    }

    pub fn to_json(&self) -> Value {
        let node = |node: &Node| {
            let told = node.told.as_ref().ok().and_then(Option::as_ref);
            json!({
                "node": node.name,
                "this": node.is_this,
                "online": node.is_online,
                "age_s": told.map(|told| told.age(self.now)),
                "told": told.map(Told::to_json),
                "problem": node.told.as_ref().err(),
            })
        };
        json!({"schema": SCHEMA, "quorate": self.is_quorate, "nodes": self.nodes.iter().map(node).collect::<Vec<_>>()})
    }

    /// Times are told in this zone.
    pub fn to_text(&self, zone: &Zone) -> String {
        let mut text: String = self.nodes.iter().map(|node| node.to_text(self.now, zone)).collect();
        if self.is_quorate == Some(false) {
            text.push_str("this node has no quorum: what others do now it is not told\n");
        }
        text
    }
}

impl Node {
    fn to_text(&self, now: u64, zone: &Zone) -> String {
        let mut words = vec![match (self.is_this, self.is_online) {
            (true, _) => "this node".to_string(),
            (false, Some(true)) => "online".to_string(),
            (false, Some(false)) => "offline".to_string(),
            (false, None) => "not known to be online".to_string(),
        }];
        let mut cards = String::new();
        match &self.told {
            Ok(None) => words.push("has told nothing".to_string()),
            Err(_) => words.push("what it told cannot be understood".to_string()),
            Ok(Some(told)) => {
                if !self.is_this {
                    words.push(format!("told {} ago", ago(told.age(now))));
                }
                words.push(format!("gpu-handoff {}", told.version));
                words.extend(told.driver.iter().map(|version| format!("driver {version}")));
                cards = told.cards.iter().map(|card| of_card(card, zone)).collect();
                if told.cards.is_empty() {
                    cards = "  no NVIDIA GPU\n".to_string();
                }
            }
        }
        // Others wrote it.
        let line = printable(&format!("{}  {}", self.name, words.join(", ")));
        format!("{}{cards}", cut(&line))
    }
}

/// `  0000:01:00  VM 111 since 2026-11-20 21:04:11  NVIDIA GeForce RTX 4090`
fn of_card(card: &Card, zone: &Zone) -> String {
    let owner = match card.vmid {
        Some(id) if card.owner == "vm" => format!("VM {id}"),
        Some(id) => format!("{} (VM {id})", card.owner),
        None => card.owner.clone(),
    };
    let since = card.since.as_ref().map_or_else(String::new, |time| format!(" since {}", zone.local(time)));
    let name = card.name.as_deref().unwrap_or(&card.id);
    cut(&printable(&format!("  {}  {owner}{since}  {name}", card.slot)))
}
