//! VMs: settings that do not go together with a card.

use super::facts::Facts;
use super::facts::guests::Vm;
use super::finding::{Area, Check, Hit, Severity};
use crate::proxmox::vm::{Hostpci, fitting};

pub const AREA: Area = Area {
    title: "Settings of VMs with a card",
    checks: &[
        Check {
            id: "vm-pcie-needs-q35",
            severity: Severity::Error,
            title: "pcie=1 on a machine without PCI Express",
            why: "Proxmox does not start the VM: q35 machine model is not enabled.",
            more: "Another machine type is new hardware to the guest; without pcie=1 the card is a PCI device to it, which mostly \
                   works as well.",
            find: pcie,
        },
        Check {
            id: "vm-vga-ignored",
            severity: Severity::Note,
            title: "x-vga makes Proxmox ignore the VM's display",
            why: "With x-vga=1 the card is the only display, whatever vga says.",
            more: "vga: none says the same thing openly. To have both, leave x-vga out.",
            find: vga,
        },
        Check {
            id: "vm-bios",
            severity: Severity::Note,
            title: "the card is the VM's display and its firmware is SeaBIOS",
            why: "Cards without an old VGA BIOS show nothing until the guest's driver runs.",
            more: "OVMF (bios: ovmf, with an EFI disk) is what current cards are made for. A guest that was installed with \
                   SeaBIOS does not boot with it.",
            find: bios,
        },
        Check {
            id: "vm-efi-without-disk",
            severity: Severity::Note,
            title: "a VM with OVMF has no EFI disk",
            why: "It forgets its boot entries and Secure Boot keys each time that it stops.",
            more: "Proxmox uses a temporary one then, and warns at each start.",
            find: efidisk,
        },
        Check {
            id: "vm-romfile-missing",
            severity: Severity::Error,
            title: "the ROM file of a VM's card is not there",
            why: "QEMU does not start without it.",
            more: "romfile is a name in /usr/share/kvm. An upgrade of pve-qemu-kvm leaves files of your own there alone.",
            find: romfile,
        },
        Check {
            id: "vm-memory",
            severity: Severity::Error,
            title: "a VM has more memory than the host can pin",
            why: "All memory of a VM with a card is taken from the host at once, and cannot be swapped out.",
            more: "An error where it is more than the host has; a warning where less than 1 GiB would be left, or where VMs with \
                   cards that start at boot want more than there is together.",
            find: memory,
        },
        Check {
            id: "vm-balloon",
            severity: Severity::Warning,
            title: "a VM with a card is to give memory back",
            why: "Memory of a VM with a card is pinned: what the balloon takes from the guest the host does not get.",
            more: "balloon below memory. balloon 0 turns it off.",
            find: balloon,
        },
        Check {
            id: "vm-cpu",
            severity: Severity::Note,
            title: "a VM with a card has an emulated processor type",
            why: "The guest lacks instructions that CUDA programs and games look for.",
            more: "cpu: host hands on what the host's processor has. In a cluster of unlike processors such a VM cannot move while it \
                   runs, which one with a card cannot anyway.",
            find: cpu,
        },
    ],
};

fn takers(facts: &Facts) -> impl Iterator<Item = &Vm> {
    facts.guests.vms.iter().filter(|vm| vm.takes_gpu())
}

/// The lines that give a card, by their numbers.
fn card_lines<'a>(vm: &'a Vm, option: &'a str) -> impl Iterator<Item = (u32, &'a str)> {
    let gives = |line: &Hostpci| line.addresses().filter_map(|id| id.slot()).any(|slot| vm.slots.contains(&slot));
    let lines = vm.config.hostpci.iter().filter(move |(_, line)| gives(line));
    let has = move |raw: &str| {
        let mut parts = raw.split(',').filter_map(|part| part.split_once('='));
        parts.any(|(key, value)| key == option && matches!(value, "1" | "on" | "yes" | "true"))
    };
    lines.map(|(index, line)| (*index, line.raw.as_str())).filter(move |(_, raw)| has(raw))
}

fn pcie(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in takers(facts).filter(|vm| !vm.is_q35()) {
        for (index, raw) in card_lines(vm, "pcie") {
            let key = format!("hostpci{index}");
            let machine = vm.value("machine").unwrap_or("i440fx, the default");
            let without: Vec<&str> = raw.split(',').filter(|part| !part.starts_with("pcie=")).collect();
            let what = format!("{key} of VM {} has pcie=1, and its machine is {machine}", vm.id);
            let remedy = format!("qm set {0} --machine q35; or: qm set {0} --{key} {1}", vm.id, without.join(","));
            found.push(Hit::at(vm.place(&key), what, remedy).of(vm.id));
        }
    }
    found
}

fn vga(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let vga = vm.value("vga").filter(|vga| !vga.starts_with("none") && !vga.starts_with("type=none"))?;
        let (index, _) = card_lines(vm, "x-vga").next()?;
        let what = format!("VM {} has vga: {vga}, and hostpci{index} has x-vga=1", vm.id);
        Some(Hit::at(vm.place("vga"), what, format!("qm set {} --vga none", vm.id)).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

fn bios(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let (index, _) = card_lines(vm, "x-vga").next().filter(|_| vm.value("bios") != Some("ovmf"))?;
        let what = format!("VM {} boots with SeaBIOS, and hostpci{index} has x-vga=1", vm.id);
        let remedy = "choose OVMF (UEFI) with an EFI disk when the guest is set up; without x-vga=1 it has a display beside the card";
        Some(Hit::at(vm.place(&format!("hostpci{index}")), what, remedy).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

fn efidisk(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        if vm.value("bios") != Some("ovmf") || vm.setting("efidisk0").is_some() {
            return None;
        }
        // On the storage of its first disk.
        let disks = ["scsi0", "virtio0", "sata0", "ide0", "nvme0"];
        let storage =
            disks.iter().find_map(|disk| vm.value(disk)?.split_once(':')).map_or("local-lvm", |(name, _)| name);
        let remedy = format!("qm set {} --efidisk0 {storage}:1,efitype=4m", vm.id);
        Some(Hit::at(vm.place("bios"), format!("VM {} has bios: ovmf and no efidisk0", vm.id), remedy).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

fn romfile(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for vm in takers(facts) {
        for (index, line) in &vm.config.hostpci {
            let Some(rom) = line.raw.split(',').find_map(|part| part.strip_prefix("romfile=")) else { continue };
            if facts.guests.roms.iter().any(|name| name == rom) {
                continue;
            }
            let key = format!("hostpci{index}");
            let without: Vec<&str> = line.raw.split(',').filter(|part| !part.starts_with("romfile=")).collect();
            let what = format!("{key} of VM {} has romfile={rom}, and there is no /usr/share/kvm/{rom}", vm.id);
            let without = fitting(vm.config.is_q35, &without.join(","));
            let remedy = format!("qm set {} --{key} {without}; or put the file there", vm.id);
            found.push(Hit::at(vm.place(&key), what, remedy).of(vm.id));
        }
    }
    found
}

/// In MiB; Proxmox's default is 512.
fn wants(vm: &Vm) -> u64 {
    number(vm.value("memory")).unwrap_or(512)
}

/// `4096`, or `current=4096`
fn number(value: Option<&str>) -> Option<u64> {
    let value = value?;
    value.split(',').find_map(|part| part.strip_prefix("current=").unwrap_or(part).parse().ok())
}

/// What the host itself cannot do without.
const LEFT: u64 = 1024;

fn memory(facts: &Facts) -> Vec<Hit> {
    let Some(has) = facts.guests.memory.map(|kib| kib / 1024) else { return Vec::new() };
    let mut found = Vec::new();
    let mut at_boot = 0;
    for vm in takers(facts) {
        let wants = wants(vm);
        let starts = vm.value("onboot") == Some("1");
        at_boot += if starts { wants } else { 0 };
        let fits = has.saturating_sub(2 * LEFT);
        let remedy = format!("qm set {} --memory {fits}", vm.id);
        let hit = |what: String| Hit::at(vm.place("memory"), what, remedy.clone()).of(vm.id);
        if wants > has {
            found.push(hit(format!("VM {} has {wants} MiB, and the host {has}", vm.id)));
        } else if wants + LEFT > has {
            let what = format!("VM {} has {wants} MiB of the host's {has}, which leaves it less than {LEFT}", vm.id);
            found.push(hit(what).only_a(Severity::Warning));
        } else if starts && at_boot > has {
            let what = format!(
                "with VM {} those that have cards and start at boot want {at_boot} MiB, and the host has {has}",
                vm.id
            );
            let remedy = format!("qm set {} --onboot 0", vm.id);
            found.push(Hit::at(vm.place("memory"), what, remedy).of(vm.id).only_a(Severity::Warning));
        }
    }
    found
}

fn balloon(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let least = number(vm.value("balloon")).filter(|least| *least > 0 && *least < wants(vm))?;
        let what = format!("VM {} has {} MiB and is to go down to {least}", vm.id, wants(vm));
        Some(Hit::at(vm.place("balloon"), what, format!("qm set {} --balloon 0", vm.id)).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

fn cpu(facts: &Facts) -> Vec<Hit> {
    let hit = |vm: &Vm| {
        let cpu = vm.value("cpu").unwrap_or("kvm64");
        let kind = cpu.split(',').next().unwrap_or_default().trim_start_matches("cputype=");
        let is_real = matches!(kind, "host" | "max") || kind.starts_with("custom-");
        let what = format!("VM {} has the processor type {kind}", vm.id);
        (!is_real).then(|| Hit::at(vm.place("cpu"), what, format!("qm set {} --cpu host", vm.id)).of(vm.id))
    };
    takers(facts).filter_map(hit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_either_form() {
        for (value, is) in [("4096", Some(4096)), ("current=2048", Some(2048)), ("x", None)] {
            assert_eq!(number(Some(value)), is, "{value}");
        }
    }
}
