//! The cluster that a node is in, as Proxmox's cluster file system (pmxcfs) knows it.

use crate::sorted;
use crate::sys::Kernel;
use serde_json::Value;

/// It is there where a node is in a cluster.
pub const COROSYNC: &str = "/etc/pve/corosync.conf";

/// What pmxcfs says of the nodes, when it is asked (status.c, cfs_create_memberlist_msg).
const MEMBERS: &str = "/etc/pve/.members";

pub const NODES: &str = "/etc/pve/nodes";

pub struct Cluster {
    /// Whether changes are taken; none where nobody says.
    pub is_quorate: Option<bool>,
    /// By name, this one among them.
    pub nodes: Vec<Node>,
}

pub struct Node {
    pub name: String,
    /// None where nobody says.
    pub is_online: Option<bool>,
}

pub fn is_in_one(kernel: &dyn Kernel) -> bool {
    kernel.exists(COROSYNC)
}

/// What this node is called.
pub fn this_node(kernel: &dyn Kernel) -> String {
    let host = kernel.text("/proc/sys/kernel/hostname").unwrap_or_default();
    host.split('.').next().unwrap_or_default().to_string()
}

impl Cluster {
    pub fn read(kernel: &dyn Kernel) -> Cluster {
        let told = kernel.read(MEMBERS).ok().and_then(|bytes| parse(&bytes));
        // A node that was taken out of the cluster leaves its folder behind.
        let by_folders = || {
            let node = |name| Node { name, is_online: None };
            Cluster { is_quorate: None, nodes: kernel.list(NODES).into_iter().map(node).collect() }
        };
        let mut cluster = told.unwrap_or_else(by_folders);
        sorted::sort_by_key(&mut cluster.nodes, |node| node.name.clone());
        cluster
    }
}

/// None of a node that is in no cluster.
fn parse(bytes: &[u8]) -> Option<Cluster> {
    let document: Value = serde_json::from_slice(bytes).ok()?;
    let is_set = |value: &Value, key: &str| Some(value.get(key)?.as_u64()? == 1);
    let nodes = document.get("nodelist")?.as_object()?.iter();
    Some(Cluster {
        is_quorate: document.get("cluster").and_then(|cluster| is_set(cluster, "quorate")),
        nodes: nodes.map(|(name, node)| Node { name: name.clone(), is_online: is_set(node, "online") }).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pmxcfs_says_of_the_nodes() {
        let text = r#"{
"nodename": "pve1",
"version": 4,
"cluster": { "name": "lab", "version": 3, "nodes": 2, "quorate": 1 },
"nodelist": {
  "pve2": { "id": 2, "online": 0, "ip": "10.0.0.2"},
  "pve1": { "id": 1, "online": 1, "ip": "10.0.0.1"}
  }
}
"#;
        let cluster = parse(text.as_bytes()).unwrap();
        let nodes: Vec<_> = cluster.nodes.iter().map(|node| (node.name.as_str(), node.is_online)).collect();
        assert_eq!(nodes, [("pve1", Some(true)), ("pve2", Some(false))]);
        assert_eq!(cluster.is_quorate, Some(true));
        let without = text.replace("\"quorate\": 1", "\"quorate\": 0");
        assert_eq!(parse(without.as_bytes()).unwrap().is_quorate, Some(false));
        // Of a host by itself.
        assert!(parse(b"{\n\"nodename\": \"pve\",\n\"version\": 0\n}\n").is_none() && parse(b"{").is_none());
    }
}
