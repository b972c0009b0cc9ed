//! What keeps the driver away from the card, gives the card to another, or removes it: found by [`crate::causes`], told here.

use super::facts::Facts;
use super::finding::{Area, Check, Hit, Severity};
use crate::causes::{self, Cause, Effect};
use crate::driver::rival::Rival;

const WHY_AWAY: &str = "The host and its containers do not have the card, or not all of its driver.";
const WHY_TAKEN: &str = "vfio-pci has the card from the beginning, so the host and its containers never do.";

pub const AREA: Area = Area {
    title: "What keeps the card from its driver",
    checks: &[
        Check {
            id: "blacklist",
            severity: Severity::Error,
            title: "a module of the driver is blacklisted",
            why: WHY_AWAY,
            more: "blacklist in modprobe's directories; modprobe.blacklist=, module_blacklist= and rd.driver.blacklist= on the \
                   kernel's command line. Of nvidia_drm and nvidia_modeset alone it is a warning: only screens need those.",
            find: |facts| by_cause(facts, "blacklist"),
        },
        Check {
            id: "install",
            severity: Severity::Error,
            title: "modprobe runs something else instead of loading a module of the driver",
            why: WHY_AWAY,
            more: "install nvidia /bin/false and the like.",
            find: |facts| by_cause(facts, "install"),
        },
        Check {
            id: "alias",
            severity: Severity::Error,
            title: "an alias has another module, or none, loaded instead of the driver",
            why: WHY_AWAY,
            more: "alias nvidia off, or an alias of the card's own ids.",
            find: |facts| by_cause(facts, "alias"),
        },
        Check {
            id: "static-ids",
            severity: Severity::Error,
            title: "the card is given to vfio-pci by its ids",
            why: WHY_TAKEN,
            more: "ids= of vfio-pci, pci-stub or xen-pciback in modprobe's directories, on the kernel's command line or in the \
                   initramfs. It is what guides to static passthrough have you do. Ids of other devices stay where they are. \
                   Where the card shall stay with VMs, say so: gpus.SLOT.home is vfio-pci in the configuration.",
            find: |facts| by_cause(facts, "static-ids"),
        },
        Check {
            id: "softdep",
            severity: Severity::Warning,
            title: "vfio-pci comes before the driver, with the card's ids",
            why: "It makes sure that the ids win.",
            more: "Without those ids the line does no harm.",
            find: |facts| by_cause(facts, "softdep"),
        },
        Check {
            id: "driverctl",
            severity: Severity::Error,
            title: "driverctl gives the card to another driver at each boot",
            why: WHY_TAKEN,
            more: "Overrides of driverctl are files in /etc/driverctl.d.",
            find: |facts| by_cause(facts, "driverctl"),
        },
        Check {
            id: "bound-at-boot",
            severity: Severity::Error,
            title: "a script gives the card to vfio-pci at each boot",
            why: WHY_TAKEN,
            more: "In the initramfs, by a unit of the administrator's, rc.local or a job of cron's.",
            find: |facts| by_cause(facts, "bound-at-boot"),
        },
        Check {
            id: "bound-by-install",
            severity: Severity::Error,
            title: "modprobe runs a script that gives the card to vfio-pci",
            why: WHY_TAKEN,
            more: "An install line of vfio-pci in modprobe's directories: it runs whenever vfio-pci is loaded.",
            find: |facts| by_cause(facts, "bound-by-install"),
        },
        Check {
            id: "udev-rule",
            severity: Severity::Error,
            title: "a rule of udev's takes the card or removes it",
            why: "It acts each time that the card appears, before any driver has it.",
            more: "Rules that set driver_override, run something that binds, or write to remove. A card that is removed shows \
                   nowhere any more, not even in lspci.",
            find: |facts| by_cause(facts, "udev-rule"),
        },
        Check {
            id: "card-elsewhere",
            severity: Severity::Warning,
            title: "a card is not with the host, and no handoff took it",
            why: "The host and its containers cannot use it.",
            more: "Either something that acts at boot is behind it, which is told beside, or a VM ran without the hookscript: \
                   Proxmox leaves its card on vfio-pci.",
            find: elsewhere,
        },
        Check {
            id: "rival-driver",
            severity: Severity::Error,
            title: "nouveau, nova_core or another driver has the card, or is loaded",
            why: "NVIDIA's driver does not get a card that another driver has.",
            more: "Told where NVIDIA's driver is there, or about to be. A driver that is only loaded, or that nothing keeps from being \
                   loaded at the next boot, is a warning. Where nouveau is meant to have it, say so: gpus.SLOT.home.",
            find: rival,
        },
    ],
};

fn by_cause(facts: &Facts, id: &str) -> Vec<Hit> {
    let hit = |cause: &Cause| {
        let found = format!("{} {}", cause.text, cause.does);
        let hit = Hit::at(&cause.place, found, format!("{}; then {}", cause.remedy, causes::THEN));
        if cause.effect == Effect::KeepsScreenAway { hit.only_a(Severity::Warning) } else { hit }
    };
    facts.host.causes.iter().filter(|cause| cause.id == id).map(hit).collect()
}

fn elsewhere(facts: &Facts) -> Vec<Hit> {
    let mut found = Vec::new();
    for card in &facts.host.elsewhere {
        let gpu = facts.slots.iter().find(|slot| slot.id == card.slot).and_then(|slot| slot.gpu());
        let Some(gpu) = gpu else { continue };
        let place = format!("/sys/bus/pci/devices/{}/driver", gpu.address);
        let vms = || facts.guests.vms.iter().filter(|vm| vm.slots.contains(&card.slot));
        let without = vms().find(|vm| !vm.has_hook && vm.other_hook.is_none());
        let remedy = match without {
            _ if !facts.host.causes.is_empty() => {
                let mut ids: Vec<&str> = facts.host.causes.iter().map(|cause| cause.id).collect();
                ids.dedup();
                format!("put right what acts at boot: {}", ids.join(", "))
            }
            Some(vm) => format!("gpu-handoff enable {}", vm.id),
            None if gpu.driver.is_none() => format!("echo {} > /sys/bus/pci/drivers_probe", gpu.address),
            None => format!(
                "reboot the host; or, where it shall stay with VMs: {{\"gpus\":{{\"{}\":{{\"home\":\"{}\"}}}}}} in {}",
                card.slot,
                gpu.driver.as_deref().unwrap_or_default(),
                crate::config::PATH
            ),
        };
        let why = if facts.host.causes.is_empty() && gpu.driver.is_some() {
            format!("; {}", causes::NO_CAUSE)
        } else {
            String::new()
        };
        found.push(Hit::at(place, format!("{}{why}", card.text), remedy));
    }
    found
}

/// Whether NVIDIA's driver is meant to have cards here.
fn is_wanted(facts: &Facts) -> bool {
    facts.driver.is_there || facts.driver.loaded.is_some() || facts.config.driver.is_configured()
}

fn rival(facts: &Facts) -> Vec<Hit> {
    if !is_wanted(facts) || facts.slots.is_empty() {
        return Vec::new();
    }
    const KEEP_AWAY: &str = "gpu-handoff setup vfio";
    let hit = |rival: &Rival| {
        let name = rival.module.as_ref().unwrap_or(&rival.driver);
        let place = format!("/sys/module/{name}");
        let remedy = match rival.module {
            Some(_) => format!("{KEEP_AWAY}; then reboot the host"),
            None => "boot a kernel without it: it is built into this one".to_string(),
        };
        let hit = Hit::at(place, rival.to_string(), remedy);
        if rival.slot.is_none() { hit.only_a(Severity::Warning) } else { hit }
    };
    let mut found: Vec<Hit> = facts.driver.rivals.iter().map(hit).collect();
    // Its own driver is there, so that at each boot the two race for the card.
    for name in &facts.driver.possible {
        let is_told = facts.driver.rivals.iter().any(|rival| rival.module.as_ref() == Some(name));
        let is_home = facts.config.homes.values().any(|home| *home == crate::config::Home::Driver(name.clone()));
        if !is_told && !is_home && !is_kept_away(facts, name) {
            let place = format!("/lib/modules/{}/modules.dep", facts.host.release);
            let what =
                format!("{name} is among this kernel's modules, and nothing keeps it from taking the card at boot");
            found.push(Hit::at(place, what, KEEP_AWAY).only_a(Severity::Warning));
        }
    }
    found
}

fn is_kept_away(facts: &Facts, name: &str) -> bool {
    let is_it = |word: &str| crate::modprobe::module(word) == name;
    let in_files = facts.host.directives.iter().any(|line| match line.words().as_slice() {
        ["blacklist", module] => is_it(module),
        ["install", module, command, ..] => {
            is_it(module) && command.ends_with("/false") || is_it(module) && command.ends_with("/true")
        }
        ["alias", module, "off"] => is_it(module),
        ["options", module, options @ ..] => is_it(module) && options.contains(&"modeset=0"),
        _ => false,
    });
    in_files
        || facts.host.booted().iter().any(|word| {
            let Some((key, value)) = word.split_once('=') else { return false };
            match key {
                "modprobe.blacklist" | "module_blacklist" => value.split(',').any(is_it),
                _ => key.strip_suffix(".modeset").is_some_and(is_it) && value == "0",
            }
        })
}
