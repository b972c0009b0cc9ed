//! What is left over, owed or broken of this program's own, and of Proxmox's means that it relies on.

use super::facts::Facts;
use super::facts::guests::Vm;
use super::facts::ours::Link;
use super::finding::{Area, Check, Hit, REMOVE_ID, Repair, Severity};
use crate::address::Address;
use crate::config;
use crate::gpu::nodes;
use crate::proxmox::guest;
use crate::proxmox::storage::{self, Storage};
use crate::report::status::FaultKind;
use crate::setup::hookscript::{LINK, PROGRAM};
use crate::setup::kept::pending;
use crate::trouble::Trouble;

pub const AREA: Area = Area {
    title: "gpu-handoff itself, and what is left over",
    checks: &[
        Check {
            id: "pve-down",
            severity: Severity::Error,
            title: "Proxmox's cluster file system is down",
            why: "Nothing is known of any guest, and none starts.",
            more: "There is nothing in /etc/pve.",
            find: pve_down,
        },
        Check {
            id: "no-quorum",
            severity: Severity::Warning,
            title: "/etc/pve is read-only",
            why: "No guest starts at boot or can be changed, by enable and attach neither.",
            more: "The cluster has no quorum.",
            find: no_quorum,
        },
        Check {
            id: "guest-unreadable",
            severity: Severity::Error,
            title: "the configuration of a guest cannot be read",
            why: "Its start fails, and what it takes is not known.",
            more: "Mostly Proxmox's cluster file system has died. Only root may read those files.",
            find: unreadable,
        },
        Check {
            id: "rule-masked",
            severity: Severity::Error,
            title: "the rules of udev's that gpu-handoff brings are hidden",
            why: "Device nodes are not made when the driver is loaded, and containers whose nodes went stale are not seen to.",
            more: "A file in /etc/udev/rules.d of the same name, or a link to /dev/null, hides a package's.",
            find: rule_masked,
        },
        Check {
            id: "config-mistake",
            severity: Severity::Error,
            title: "a mistake in the configuration",
            why: "A hook goes on without that key, as if it were not there.",
            more: "The same as config check tells.",
            find: mistakes,
        },
        Check {
            id: "config-slot",
            severity: Severity::Warning,
            title: "the configuration names a slot that has no NVIDIA GPU",
            why: "What it says of that slot has no effect, and the card that was meant has no home by configuration.",
            more: "Addresses shift with what is in the host.",
            find: slots,
        },
        Check {
            id: "wedged",
            severity: Severity::Error,
            title: "a call of the kernel's does not come back",
            why: "Nobody can do anything with that card until it does.",
            more: "Mostly somebody uses the card that was to be taken from its driver.",
            find: |facts| by_fault(facts, FaultKind::Wedged),
        },
        Check {
            id: "stranded",
            severity: Severity::Error,
            title: "a card is neither at home nor with a VM that runs",
            why: "Nobody can use it, and nobody is working on it.",
            more: "After a start that failed, or a run that was killed.",
            find: |facts| by_fault(facts, FaultKind::Stranded),
        },
        Check {
            id: "owed",
            severity: Severity::Warning,
            title: "something is still to be started again, or looked at",
            why: "What was stopped for a VM is still down.",
            more: "The keeper tries again by itself, less and less often.",
            find: |facts| by_fault(facts, FaultKind::Owed),
        },
        Check {
            id: "dri-names",
            severity: Severity::Warning,
            title: "a card has other nodes in /dev/dri than before",
            why: "What was set to use them by name finds another card, or none.",
            more: "With two cards and a driver that looks for cards only when it is loaded.",
            find: |facts| by_fault(facts, FaultKind::Dri),
        },
        Check {
            id: "reboot-required",
            severity: Severity::Note,
            title: "what was set up takes effect with the next boot",
            why: "Until then the host runs with what it booted with.",
            more: "Told after setup vfio.",
            find: |facts| by_fault(facts, FaultKind::Reboot),
        },
        Check {
            id: "setup-pending",
            severity: Severity::Error,
            title: "set-up is not done",
            why: "The host is not prepared, or its driver is not installed.",
            more: "What could not be done when it was due; the boot unit tries it twice.",
            find: |facts| by_fault(facts, FaultKind::SetUp),
        },
        Check {
            id: "not-seen",
            severity: Severity::Warning,
            title: "something could not be read",
            why: "What is behind it is not known.",
            more: "A record that another version wrote, a process that does not let itself be looked at.",
            find: |facts| by_fault(facts, FaultKind::Problem),
        },
        Check {
            id: "unit-masked",
            severity: Severity::Error,
            title: "a unit of gpu-handoff is masked",
            why: "What it does at boot, or for what is owed, is not done.",
            more: "gpu-handoff-reconcile, -setup and -keeper.",
            find: masked,
        },
        Check {
            id: "unit-failed",
            severity: Severity::Warning,
            title: "a unit of gpu-handoff has failed",
            why: "What it was to do is not done.",
            more: "Its journal says why.",
            find: failed,
        },
        Check {
            id: "hook-link",
            severity: Severity::Error,
            title: "the hookscript that guests name is not there",
            why: "A guest whose hookscript is missing does not start.",
            more: "local:snippets/gpu-handoff is a link to the program. --fix makes one that is missing. Only told where a guest names it.",
            find: link,
        },
        Check {
            id: "hook-file-missing",
            severity: Severity::Error,
            title: "a guest with a card names a hookscript that is not there",
            why: "It does not start.",
            more: "Of storages whose folder is known by /etc/pve/storage.cfg.",
            find: hook_file,
        },
        Check {
            id: "storage-without-snippets",
            severity: Severity::Note,
            title: "the storage of a hookscript has no content type snippets",
            why: "The hookscript works, but Proxmox does not list or offer it there.",
            more: "content in /etc/pve/storage.cfg.",
            find: storage,
        },
        Check {
            id: "nodes-missing",
            severity: Severity::Warning,
            title: "device nodes of the driver are missing or have the wrong number",
            why: "Programs and containers that need them fail.",
            more: "No rule of the kernel's makes them. --fix does.",
            find: missing,
        },
        Check {
            id: "uvm-not-loaded",
            severity: Severity::Warning,
            title: "nvidia_uvm is not loaded, and a container is given its node",
            why: "CUDA needs it.",
            more: "reconcile loads it; it runs at boot.",
            find: uvm,
        },
        Check {
            id: "override-left",
            severity: Severity::Warning,
            title: "a function's driver_override is left over",
            why: "No other driver can have it, and Proxmox cannot bind it to vfio-pci.",
            more: "No record, nothing that acts at boot and no VM has to do with it. --fix clears it.",
            find: overrides,
        },
        Check {
            id: "new-id-left",
            severity: Severity::Note,
            title: "a dynamic id of vfio-pci has taken a card",
            why: "As long as vfio-pci has that id it takes the card, and any other of its kind, as soon as no driver has it.",
            more: "Proxmox adds one for a VM without the hookscript. The kernel does not show them; that the card is on vfio-pci \
                   without an override and without a static id shows that there was one. --fix removes it.",
            find: ids,
        },
    ],
};

fn pve_down(facts: &Facts) -> Vec<Hit> {
    let hit = || Hit::told("/etc/pve", &guest::down());
    facts.is_down.then(hit).into_iter().collect()
}

fn no_quorum(facts: &Facts) -> Vec<Hit> {
    let hit =
        || Hit::at("/etc/pve/local", "the cluster file system takes no changes: there is no quorum", "pvecm status");
    facts.guests.is_read_only.then(hit).into_iter().collect()
}

fn unreadable(facts: &Facts) -> Vec<Hit> {
    let hit = |(path, why): &(String, Trouble)| {
        Hit::told(path, why).or_else("look at it as root; ls -l /etc/pve shows who may")
    };
    facts.guests.unreadable.iter().take(1).map(hit).collect()
}

fn rule_masked(facts: &Facts) -> Vec<Hit> {
    let hit = || {
        let found = format!("it hides the package's {}", super::facts::ours::RULES);
        Hit::at(
            super::facts::ours::OWN_RULES,
            found,
            format!("mv {} /root/; then: udevadm control --reload", super::facts::ours::OWN_RULES),
        )
    };
    facts.ours.are_rules_hidden.then(hit).into_iter().collect()
}

fn mistakes(facts: &Facts) -> Vec<Hit> {
    let remedy = || "edit that key (man gpu-handoff.json has all); then: gpu-handoff config check";
    facts.ours.mistakes.iter().map(|(file, text)| Hit::at(*file, text, remedy())).collect()
}

fn slots(facts: &Facts) -> Vec<Hit> {
    let hit = |slot: &Trouble| Hit::at(config::PATH, &slot.what, format!("name one of {}", slot.remedy));
    facts.ours.slots.iter().map(hit).collect()
}

fn by_fault(facts: &Facts, kind: FaultKind) -> Vec<Hit> {
    let faults = facts.ours.faults.iter().filter(|fault| fault.kind == kind);
    let hit = |fault: &crate::report::status::Fault| {
        let slot = fault.slot.map(|slot| slot.to_string()).unwrap_or_default();
        let (place, remedy) = match kind {
            FaultKind::Wedged => (
                format!("/run/gpu-handoff/wedged-{slot}"),
                "gpu-handoff --status names the process; end what uses the card".to_string(),
            ),
            FaultKind::Stranded => (format!("/sys/bus/pci/devices/{slot}.0"), format!("gpu-handoff to-home {slot}")),
            FaultKind::Owed => ("/run/gpu-handoff".to_string(), "gpu-handoff reconcile".to_string()),
            FaultKind::Dri => ("/dev/dri".to_string(), AGAIN.to_string()),
            FaultKind::Reboot => ("/run/reboot-required".to_string(), "reboot the host".to_string()),
            FaultKind::SetUp => (pending::PATH.to_string(), "gpu-handoff setup pending".to_string()),
            FaultKind::Problem => {
                let file = fault.file.clone().unwrap_or_else(|| "/run/gpu-handoff".to_string());
                (file, "gpu-handoff --status".to_string())
            }
            // Those have a finding of their own.
            FaultKind::Mistake => (config::PATH.to_string(), String::new()),
        };
        Hit::at(place, &fault.text, remedy)
    };
    faults.map(hit).collect()
}

const AGAIN: &str = "the next handoff puts that right while nobody uses a card; or: reboot the host";

fn masked(facts: &Facts) -> Vec<Hit> {
    let hit = |unit: &String| {
        Hit::at(format!("/etc/systemd/system/{unit}"), format!("{unit} is masked"), format!("systemctl unmask {unit}"))
    };
    facts.ours.masked.iter().map(hit).collect()
}

fn failed(facts: &Facts) -> Vec<Hit> {
    let hit = |unit: &String| {
        Hit::at(
            unit,
            format!("{unit} has failed"),
            format!("journalctl -b -u {unit} says why; then: systemctl restart {unit}"),
        )
    };
    facts.ours.failed.iter().map(hit).collect()
}

/// Hookscripts that guests name, each with the guest.
fn hooks(facts: &Facts) -> Vec<(u32, String, String)> {
    let of_vm = |vm: &Vm| Some((vm.id, vm.config.hookscript.clone()?, vm.place("hookscript"), vm.takes_gpu()));
    let mut all: Vec<_> = facts.guests.vms.iter().filter_map(of_vm).collect();
    all.extend(facts.guests.containers.iter().filter_map(|one| {
        let place = one.place_of(|setting| setting.key == "hookscript");
        Some((one.id, one.config.hookscript.clone()?, place, one.has_nvidia))
    }));
    let is_meant = |volume: &str, has_card: bool| has_card || volume.ends_with(":snippets/gpu-handoff");
    let all = all.into_iter().filter(|(_, volume, _, has_card)| is_meant(volume, *has_card));
    all.map(|(id, volume, place, _)| (id, volume, place)).collect()
}

const OURS: &str = "local:snippets/gpu-handoff";

fn link(facts: &Facts) -> Vec<Hit> {
    let named: Vec<String> =
        hooks(facts).iter().filter(|(_, volume, _)| volume == OURS).map(|(id, ..)| id.to_string()).collect();
    let what = match &facts.ours.link {
        Link::Fine => return Vec::new(),
        Link::Missing => format!("{LINK} is not there"),
        Link::Another(trouble) => trouble.what.clone(),
        Link::Dead => format!("{LINK} leads to {PROGRAM}, which is not there"),
    };
    let Some(first) = named.first().cloned() else { return Vec::new() };
    let more = if named.len() > 5 { format!(" and {} more", named.len() - 5) } else { String::new() };
    let named: Vec<String> = named.into_iter().take(5).collect();
    let what = format!("{what}, and it is the hookscript of {}{more}", named.join(" "));
    let hit = match &facts.ours.link {
        Link::Missing => Hit::at(LINK, what, format!("gpu-handoff enable {first}")).repaired([Repair::Link]),
        Link::Another(_) => Hit::at(LINK, what, format!("mv {LINK} /root/ && gpu-handoff enable {first}")),
        _ => Hit::at(LINK, what, "apt install --reinstall gpu-handoff, or put the program there"),
    };
    vec![hit]
}

fn hook_file(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for (id, volume, place) in hooks(facts).into_iter().filter(|(_, volume, _)| volume != OURS) {
        let folder = storage::of_volume(&facts.guests.storages, &volume).and_then(Storage::folder);
        let Some((folder, (_, file))) = folder.zip(volume.split_once(":snippets/")) else { continue };
        if facts.guests.snippets.contains(&volume) {
            continue;
        }
        let tool = if facts.guests.vms.iter().any(|vm| vm.id == id) { "qm" } else { "pct" };
        let what = format!("guest {id} has the hookscript {volume}, and {folder}/{file} is not there");
        let remedy = format!("put it there; or: {tool} set {id} --delete hookscript, then gpu-handoff enable {id}");
        found.push(Hit::at(place, what, remedy).of(id));
    }
    found
}

fn storage(facts: &Facts) -> Vec<Hit> {
    let mut found: Vec<Hit> = Vec::new();
    for (_, volume, _) in hooks(facts) {
        let Some(storage) = storage::of_volume(&facts.guests.storages, &volume) else { continue };
        let Some(content) = storage.content.as_ref().filter(|_| !storage.has_snippets()) else { continue };
        let place = format!("{}:{}", storage::PATH, storage.line);
        if found.iter().any(|hit| hit.place == place) {
            continue;
        }
        let what = format!("storage {} has {}, and {volume} is on it", storage.name, content.join(","));
        found.push(Hit::at(
            place,
            what,
            format!("pvesm set {} --content {},snippets", storage.name, content.join(",")),
        ));
    }
    found
}

fn missing(facts: &Facts) -> Vec<Hit> {
    let Some(first) = facts.ours.missing.first() else { return Vec::new() };
    let each: Vec<String> = facts.ours.missing.iter().map(|node| format!("{} {}", node.path, node.number)).collect();
    let found = format!("not there, or not with these numbers: {}", each.join(", "));
    let repairs = facts.ours.missing.iter().cloned().map(Repair::Node);
    vec![Hit::at(&first.path, found, "gpu-handoff reconcile").repaired(repairs)]
}

fn uvm(facts: &Facts) -> Vec<Hit> {
    let hit = || {
        Hit::at(
            "/sys/module/nvidia_uvm",
            format!("a container is given {}, and nvidia_uvm is not loaded", nodes::UVM),
            "gpu-handoff reconcile",
        )
    };
    facts.ours.lacks_uvm.then(hit).into_iter().collect()
}

fn overrides(facts: &Facts) -> Vec<Hit> {
    let hit = |(address, text): &(Address, String)| {
        let path = address.attribute("driver_override");
        let remedy = format!("gpu-handoff doctor --fix, or: echo > {path}");
        Hit::at(&path, format!("driver_override is {text}, and nothing is under way"), remedy)
            .repaired([Repair::Override(*address)])
    };
    facts.ours.overrides.iter().map(hit).collect()
}

fn ids(facts: &Facts) -> Vec<Hit> {
    let hit = |(address, id): &(Address, String)| {
        let what = format!("vfio-pci has {address} by an id that was added while the host ran ({id})");
        Hit::at(address.attribute("driver"), what, format!("gpu-handoff doctor --fix, or: echo {id} > {REMOVE_ID}"))
            .repaired([Repair::Id { address: *address, id: id.clone() }])
    };
    facts.ours.ids.iter().map(hit).collect()
}
