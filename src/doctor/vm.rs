//! VMs: whether they take the card that they name, and give it back.

use super::facts::Facts;
use super::facts::guests::Vm;
use super::finding::{Area, Check, Hit, Severity};
use crate::address::SlotId;
use crate::events::hookscript::{self, DroppedLine};
use crate::events::mapped::Unusable;
use crate::events::stray::Remark;
use crate::proxmox::pci_id::PciId;
use crate::proxmox::vm::{Driver, fitting};
use crate::setup::hookscript as registration;

pub const AREA: Area = Area {
    title: "VMs and their card",
    checks: &[
        Check {
            id: "vm-no-hook",
            severity: Severity::Warning,
            title: "a VM takes a card without the hookscript",
            why: "Proxmox takes the card from the host whoever uses it, and it does not come home when the VM stops.",
            more: "Not where the card's home is vfio-pci by configuration. A guest has one hookscript; two can be chained.",
            find: no_hook,
        },
        Check {
            id: "vm-hook-no-card",
            severity: Severity::Warning,
            title: "a VM has the hookscript and names no device",
            why: "It gets no GPU.",
            more: "hostpci is what names one.",
            find: hook_no_card,
        },
        Check {
            id: "vm-other-device",
            severity: Severity::Error,
            title: "a VM with the hookscript names a device that is no NVIDIA GPU any more",
            why: "Addresses shift with what is in the host, and Proxmox takes whatever is there now from the host.",
            more: "A warning where nothing says that a GPU was there before.",
            find: other_device,
        },
        Check {
            id: "vm-device-absent",
            severity: Severity::Error,
            title: "a VM names a device that is not there",
            why: "Its start is refused.",
            more: "After a card was moved to another slot, or fell off the bus.",
            find: device_absent,
        },
        Check {
            id: "vm-mapping",
            severity: Severity::Error,
            title: "a VM names its card by a mapping that is of no use here",
            why: "Its start is refused: Proxmox would not start it either.",
            more: "The mapping does not have this node, or what it says of the device is no longer so: every alternative counts.",
            find: mapping,
        },
        Check {
            id: "vm-line-not-understood",
            severity: Severity::Warning,
            title: "a hostpci line that Proxmox drops, or may understand otherwise",
            why: "The VM starts without what the line was to give it, or with a card that nobody made ready.",
            more: "Addresses are in lower case, with two digits for bus and device; options are those of qm's manual.",
            find: line_not_understood,
        },
        Check {
            id: "vm-args",
            severity: Severity::Warning,
            title: "a VM is given a card by args",
            why: "Proxmox does not know of it, so it keeps no other VM from the same card.",
            more: "args: -device vfio-pci,host=…. hostpci is Proxmox's own way.",
            find: args,
        },
        Check {
            id: "vm-one-function",
            severity: Severity::Warning,
            title: "a VM is given one function of several",
            why: "All functions of a card leave the host together, and the VM gets only this one.",
            more: "Without a function in the address the VM gets all of them, such as the card's audio.",
            find: one_function,
        },
        Check {
            id: "vm-keep",
            severity: Severity::Warning,
            title: "a VM's card has driver=keep",
            why: "Neither Proxmox nor this program then makes it ready, so the VM starts only while vfio-pci has the card already.",
            more: "An option of Proxmox VE 9.",
            find: keep,
        },
        Check {
            id: "vm-same-card-at-boot",
            severity: Severity::Warning,
            title: "two VMs that start at boot take the same card",
            why: "Only the first of them starts.",
            more: "onboot of all but one must be off.",
            find: same_card,
        },
        Check {
            id: "vm-would-not-start",
            severity: Severity::Warning,
            title: "as things are a VM would not start",
            why: "Its start is refused before anything is touched.",
            more: "Mostly because the card is in use, which a policy may change. What has a finding of its own is not told twice, \
                   and only the first of several VMs with the same cards is asked about; with VMID that VM.",
            find: would_not_start,
        },
    ],
};

/// Those that are asked about and take a card.
pub(super) fn takers(facts: &Facts) -> impl Iterator<Item = &Vm> {
    facts.guests.vms.iter().filter(|vm| vm.takes_gpu())
}

fn first_hostpci(vm: &Vm) -> String {
    let setting = vm.settings.iter().find(|setting| setting.key.starts_with("hostpci"));
    super::facts::guests::place(&vm.path, setting)
}

/// Where it names its card.
fn named_in(vm: &Vm) -> String {
    if vm.config.hostpci.is_empty() && vm.config.doubtful.is_empty() { vm.place("args") } else { first_hostpci(vm) }
}

fn no_hook(facts: &Facts) -> Vec<Hit> {
    let stays = |vm: &&Vm| {
        let home =
            |slot: &SlotId| facts.config.homes.get(slot) == Some(&crate::config::Home::Driver("vfio-pci".to_string()));
        vm.slots.iter().all(home)
    };
    let hit = |vm: &Vm| {
        let found = format!("VM {} takes {} and has no hookscript of gpu-handoff", vm.id, vm.slots_in_words());
        match &vm.other_hook {
            Some(other) => {
                let found = format!("{found}: it has {other}, and a guest has only one");
                Hit::at(vm.place("hookscript"), found, registration::CHAIN)
            }
            None => Hit::at(named_in(vm), found, format!("gpu-handoff enable {}", vm.id)),
        }
        .of(vm.id)
    };
    takers(facts).filter(|vm| !vm.has_hook && !stays(vm)).map(hit).collect()
}

fn hook_no_card(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| Some(Hit::told(vm.place("hookscript"), vm.nothing_named.as_ref()?).of(vm.id));
    facts.guests.vms.iter().filter_map(hit).collect()
}

fn other_device(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let hit = match vm.remark.as_ref()? {
            Remark::Refused(why) => {
                Hit::told(first_hostpci(vm), &why.clone().of(&format!("VM {} would not be started", vm.id)))
            }
            Remark::Told(what) => Hit::told(first_hostpci(vm), what).only_a(Severity::Warning),
        };
        Some(hit.of(vm.id))
    };
    facts.guests.vms.iter().filter_map(hit).collect()
}

/// A start that its own configuration forbids; by a line that has a mapping, or by another.
fn unusable(facts: &Facts, is_mapping: bool) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let Unusable { index, trouble } = vm.unusable.as_ref()?;
        let key = index.map_or_else(|| "args".to_string(), |index| format!("hostpci{index}"));
        let line = index.and_then(|index| vm.config.hostpci.get(&index));
        if line.is_some_and(|line| line.mapping.is_some()) != is_mapping {
            return None;
        }
        Some(Hit::told(vm.place(&key), trouble).of(vm.id))
    };
    facts.guests.vms.iter().filter_map(hit).collect()
}

fn device_absent(facts: &Facts) -> Vec<Hit> {
    unusable(facts, false)
}

fn mapping(facts: &Facts) -> Vec<Hit> {
    unusable(facts, true)
}

fn line_not_understood(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in &facts.guests.vms {
        for DroppedLine { number, trouble } in &vm.dropped {
            let hit = Hit::told(format!("{}:{number}", vm.path), trouble);
            found.push(hit.or_else(spelt_right(vm, *number)).of(vm.id));
        }
    }
    found
}

/// The same line as Proxmox would take it, if there is such a thing.
fn spelt_right(vm: &Vm, line: usize) -> String {
    let setting = vm.settings.iter().find(|setting| setting.line == line);
    let right = setting.and_then(|setting| {
        let (address, rest) = setting.value.split_once(',').map_or((setting.value.as_str(), ""), |(a, b)| (a, b));
        let address = address.to_ascii_lowercase();
        let parts: Vec<String> = address
            .split(':')
            .map(|part| {
                let (digits, function) = part.split_once('.').map_or((part, ""), |(a, b)| (a, b));
                let dot = if function.is_empty() { "" } else { "." };
                format!("{digits:0>2}{dot}{function}")
            })
            .collect();
        let address = parts.join(":");
        let comma = if rest.is_empty() { "" } else { "," };
        PciId::parse(&address)?;
        let key = setting.key.to_ascii_lowercase();
        let line = format!("{key}: {address}{comma}{rest}\n");
        let is_read = !crate::proxmox::vm::parse(line.as_bytes()).hostpci.is_empty();
        is_read.then(|| format!("qm set {} --{key} {address}{comma}{rest}", vm.id))
    });
    right.unwrap_or_else(|| format!("see that line: qm config {}; and how it is written: man qm", vm.id))
}

fn args(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in &facts.guests.vms {
        if let Some(trouble) = &vm.by_args {
            found.push(Hit::told(vm.place("args"), trouble).of(vm.id));
        }
        for unread in &vm.config.args.unread {
            let slot = facts.slots.first().map_or_else(|| "SLOT".to_string(), |slot| slot.id.to_string());
            let trouble = hookscript::unread_args(vm.id, &vm.config, unread, &slot);
            found.push(Hit::told(vm.place("args"), &trouble).of(vm.id));
        }
    }
    found
}

fn one_function(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in takers(facts) {
        for slot in facts.slots.iter().filter(|slot| vm.slots.contains(&slot.id)) {
            let missing: Vec<String> = slot
                .functions
                .iter()
                .filter(|one| !one.is_virtual && !vm.listed.iter().any(|id| id.covers(one.address)))
                .map(|one| one.address.to_string())
                .collect();
            let named = vm.config.hostpci.iter().find_map(|(index, line)| {
                let id = line.ids.iter().find(|written| written.id.slot() == Some(slot.id))?;
                Some((index, line, id))
            });
            let Some((index, line, id)) = named.filter(|_| !missing.is_empty()) else { continue };
            let what = format!(
                "hostpci{index} gives VM {} only {} of {}, without {}",
                vm.id,
                id.text,
                slot.id,
                missing.join(" ")
            );
            let whole = fitting(vm.config.is_q35, &line.raw.replacen(&id.text, &slot.id.to_string(), 1));
            let remedy = format!("qm set {} --hostpci{index} {whole}", vm.id);
            found.push(Hit::at(vm.place(&format!("hostpci{index}")), what, remedy).of(vm.id));
        }
    }
    found
}

fn keep(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in &facts.guests.vms {
        for (index, line) in vm.config.hostpci.iter().filter(|(_, line)| line.driver == Driver::Keep) {
            let is_gpus = line.addresses().any(|id| facts.slots.iter().any(|slot| id.slot() == Some(slot.id)));
            if !is_gpus {
                continue;
            }
            let raw: Vec<&str> = line.raw.split(',').filter(|part| *part != "driver=keep").collect();
            let what = format!("hostpci{index} of VM {} has driver=keep", vm.id);
            let remedy = format!("qm set {} --hostpci{index} {}", vm.id, fitting(vm.config.is_q35, &raw.join(",")));
            found.push(Hit::at(vm.place(&format!("hostpci{index}")), what, remedy).of(vm.id));
        }
    }
    found
}

fn same_card(facts: &Facts) -> Vec<Hit> {
    let starts = |vm: &&Vm| vm.value("onboot").is_some_and(|value| matches!(value, "1" | "yes" | "on" | "true"));
    let all: Vec<&Vm> = takers(facts).filter(starts).collect();
    let mut found = Vec::new();
    for (at, vm) in all.iter().enumerate() {
        let other = all.iter().take(at).find(|other| other.slots.iter().any(|slot| vm.slots.contains(slot)));
        if let Some(other) = other {
            let what = format!("VM {} and VM {} both take {} and start at boot", other.id, vm.id, vm.slots_in_words());
            found.push(Hit::at(vm.place("onboot"), what, format!("qm set {} --onboot 0", vm.id)).of(vm.id));
        }
    }
    found
}

fn would_not_start(facts: &Facts) -> Vec<Hit> {
    let known = facts.known_refusals();
    let hit = |vm: &Vm| {
        let why = vm.refusal.as_ref()?;
        let is_told = facts.only.is_none() && why.about.is_some_and(|about| known.contains(&about));
        let when = if vm.has_hook { "as things are it" } else { "with the hookscript it" };
        let why = why.clone().of(&format!("VM {}: {when} would not start now", vm.id));
        (!is_told).then(|| Hit::told(named_in(vm), &why).of(vm.id))
    };
    facts.guests.vms.iter().filter_map(hit).collect()
}
