//! Containers: what `container check` finds of each, and what its configuration alone tells.

use super::facts::Facts;
use super::facts::guests::Container;
use super::finding::{Area, Check, Hit, Severity};
use crate::containers::check::Fact;
use crate::containers::theirs::V1_ALLOW;
use crate::gpu::containers::{Way, is_at_or_below};

pub const AREA: Area = Area {
    title: "Containers",
    checks: &[
        Check {
            id: "ct-node-twice",
            severity: Severity::Error,
            title: "a node is given to a container twice, in two ways",
            why: "Proxmox makes the node of a devN where the mount is already, and the container does not start.",
            more: "devN beside lxc.mount.entry, beside another devN, or beside LXC's own hook.",
            find: |facts| by_fact(facts, "twice"),
        },
        Check {
            id: "ct-node-missing",
            severity: Severity::Error,
            title: "a container is given a node that does not exist",
            why: "Proxmox does not start a container without the nodes of its devN.",
            more: "The driver's nodes are made at boot and by reconcile; those of a card that a VM has do not exist meanwhile.",
            find: |facts| by_fact(facts, "devices"),
        },
        Check {
            id: "ct-rules",
            severity: Severity::Error,
            title: "a container may not open the nodes that are mounted into it",
            why: "CUDA in it fails although the nodes are there.",
            more: "The number of nvidia-uvm is another after some boots and updates, so that a rule that was written by hand goes stale. \
                   Those that attach wrote are kept up to date.",
            find: |facts| by_fact(facts, "rules"),
        },
        Check {
            id: "ct-nodes-incomplete",
            severity: Severity::Warning,
            title: "a container is given a card's node, and not all that goes with it",
            why: "Without /dev/nvidiactl nothing opens the card, and without /dev/nvidia-uvm CUDA does not start.",
            more: "nvidia-smi works without nvidia-uvm, which is why that is overlooked.",
            find: incomplete,
        },
        Check {
            id: "ct-line-useless",
            severity: Severity::Warning,
            title: "a line of a container does not do what it seems to",
            why: "The node is not there, or not usable, in the container.",
            more: "An absolute target that LXC ignores, a devN where Proxmox refuses it, a mode that nobody inside may use.",
            find: |facts| by_fact(facts, "lines"),
        },
        Check {
            id: "ct-cgroup-v1",
            severity: Severity::Warning,
            title: "a device rule of cgroup v1",
            why: "No Proxmox from version 7 on has cgroup v1, so the rule does nothing.",
            more: "lxc.cgroup.devices.allow; today it is lxc.cgroup2.devices.allow.",
            find: cgroup_v1,
        },
        Check {
            id: "ct-lxc-hook",
            severity: Severity::Error,
            title: "LXC's own nvidia hook is set and cannot work",
            why: "The container does not start.",
            more: "The hook calls nvidia-container-cli, of libnvidia-container-tools.",
            find: |facts| by_fact(facts, "hook"),
        },
        Check {
            id: "ct-nodes-stale",
            severity: Severity::Error,
            title: "nodes in a running container are not the host's any more",
            why: "They are another driver's, or nobody's, and cannot be opened.",
            more: "After the driver was loaded anew. The container has to start again.",
            find: |facts| by_fact(facts, "nodes"),
        },
        Check {
            id: "ct-driver",
            severity: Severity::Error,
            title: "the driver in a container is not the host's version",
            why: "Programs in it end with Driver/library version mismatch.",
            more: "Looked at in containers that run.",
            find: |facts| by_fact(facts, "driver"),
        },
        Check {
            id: "ct-cuda",
            severity: Severity::Warning,
            title: "the CUDA toolkit in a container does not fit the driver, or does not work",
            why: "What is built or run with it fails.",
            more: "Looked at in containers that run.",
            find: |facts| by_fact(facts, "cuda"),
        },
        Check {
            id: "ct-docker",
            severity: Severity::Error,
            title: "Docker in a container sets up device cgroups",
            why: "It may not do that in a container, so no inner container with a GPU starts.",
            more: "NVIDIA's runtime for Docker needs no-cgroups. Looked at in containers that run.",
            find: |facts| by_fact(facts, "docker"),
        },
        Check {
            id: "ct-not-attached",
            severity: Severity::Note,
            title: "a container has no GPU",
            why: "Nothing in it can use one.",
            more: "Told only where the container is asked about.",
            find: |facts| by_fact(facts, "attached"),
        },
        Check {
            id: "ct-dri-without-owner",
            severity: Severity::Warning,
            title: "an unprivileged container has nodes of /dev/dri that are nobody's in it",
            why: "The host's groups video and render are not the container's, so that only root of the host could open them.",
            more: "A devN is given a mode or a group of the container's; a mount keeps the host's owner unless lxc.idmap maps it.",
            find: dri_without_owner,
        },
        Check {
            id: "ct-unreadable",
            severity: Severity::Warning,
            title: "a container could not be looked into",
            why: "What is wrong in it is not known.",
            more: "Its configuration cannot be read, or it does not answer.",
            find: unreadable,
        },
    ],
};

fn by_fact(facts: &Facts, name: &str) -> Vec<Hit> {
    let mut found = Vec::new();
    for container in &facts.guests.containers {
        let of = container.facts.iter().flatten().filter(|fact| fact.name == name);
        for (fact, remedy) in of.filter_map(|fact| Some((fact, fact.remedy.as_ref()?))) {
            // A rule of cgroup v1 has a finding of its own.
            let what = fact.alone.as_ref().unwrap_or(&fact.what);
            let what = format!("container {}: {}{what}", container.id, before(name));
            found.push(Hit::at(place(container, fact), what, remedy.trim()).of(container.id));
        }
    }
    found
}

/// What a fact's words leave to its name.
fn before(name: &str) -> &'static str {
    match name {
        "rules" => "device rules: ",
        "driver" => "the driver is ",
        "attached" => "attached: ",
        _ => "",
    }
}

/// The first line that a fact names by its key or by what is in it.
fn place(container: &Container, fact: &Fact) -> String {
    let is_meant = |word: &str| fact.at.iter().any(|at| at == word);
    container.place_of(|setting| {
        let is_dev = setting.key.starts_with("dev") || setting.key.starts_with("mp");
        let is_rule = fact.name == "rules" && setting.key.contains("devices.allow");
        let is_named = setting.key.starts_with("lxc.mount") || setting.key.starts_with("lxc.hook");
        is_rule
            || (is_dev && is_meant(&setting.key))
            || (is_named && setting.value.split_whitespace().next().is_some_and(is_meant))
    })
}

fn incomplete(facts: &Facts) -> Vec<Hit> {
    let which = match facts.slots.as_slice() {
        [first, _, ..] => format!(" --gpu {}", first.id),
        _ => String::new(),
    };
    let hit = |container: &Container| {
        let (card, missing) = container.lacks()?;
        let place = container.place_of(|setting| setting.value == card.value);
        let what = format!("container {} is given {} without {}", container.id, card.host, missing.join(" and "));
        let remedy = match &container.attaching {
            Some(Ok(())) => format!("gpu-handoff container attach {}{which}", container.id),
            Some(Err(why)) => why.clone(),
            None => format!("gpu-handoff doctor {} tells what to type", container.id),
        };
        Some(Hit::at(place, what, remedy).of(container.id))
    };
    facts.guests.containers.iter().filter_map(hit).collect()
}

fn cgroup_v1(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for container in facts.guests.containers.iter().filter(|one| one.has_nvidia) {
        for setting in container.settings.iter().filter(|setting| setting.key == V1_ALLOW) {
            let place = format!("{}:{}", container.path, setting.line);
            let what = format!("container {}: {V1_ALLOW}: {}", container.id, setting.value);
            let remedy = format!(
                "in that line write lxc.cgroup2.devices.allow: {}; then: pct reboot {}",
                setting.value, container.id
            );
            found.push(Hit::at(place, what, remedy).of(container.id));
        }
    }
    found
}

fn dri_without_owner(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for container in facts.guests.containers.iter().filter(|one| one.config.unprivileged) {
        let is_mapped = container.settings.iter().any(|setting| setting.key == "lxc.idmap");
        let is_dri = |path: &str| is_at_or_below(path, "/dev/dri");
        let given = container.given.iter().filter(|given| is_dri(&given.host) && given.way == Way::Entry);
        for given in given.filter(|_| !is_mapped) {
            let place = container.place_of(|setting| setting.key == "lxc.mount.entry" && setting.value == given.value);
            let what = format!("container {} is unprivileged and has {} by a mount", container.id, given.host);
            let free = (0..).find(|number| !container.config.dev.contains_key(&number.to_string())).unwrap_or_default();
            let node = if given.host == "/dev/dri" { "/dev/dri/renderD128" } else { &given.host };
            let remedy = format!(
                "take that line out and: pct set {} --dev{free} {node},mode=0666; then: pct reboot {}",
                container.id, container.id
            );
            found.push(Hit::at(place, what, remedy).of(container.id));
        }
    }
    found
}

fn unreadable(facts: &Facts) -> Vec<Hit> {
    let hit = |container: &Container| {
        let why = container.facts.as_ref().err()?;
        Some(Hit::at(&container.path, why, format!("gpu-handoff container check {}", container.id)).of(container.id))
    };
    facts.guests.containers.iter().filter_map(hit).collect()
}
