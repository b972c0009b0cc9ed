//! The IOMMU, vfio, and whether what was edited is what the host boots with.

use super::boot::{Word, words};
use super::facts::Facts;
use super::finding::{Area, Check, Hit, Severity};
use crate::handoff::plan::check;
use crate::handoff::plan::facts::Availability;
use crate::setup::bootloader::Loader;

pub const AREA: Area = Area {
    title: "The IOMMU and what the host boots with",
    checks: &[
        Check {
            id: "iommu-off",
            severity: Severity::Error,
            title: "the IOMMU is off",
            why: "Without it no VM can be given a device.",
            more: "Seen by no device being in an IOMMU group. It is off in the firmware (VT-d or AMD-Vi), or the kernel does \
                   not use it: on Intel that takes intel_iommu=on before kernel 6.8. A word that turns it off is told by \
                   iommu-word-off.",
            find: iommu_off,
        },
        Check {
            id: "iommu-word-off",
            severity: Severity::Error,
            title: "a word on the kernel's command line turns the IOMMU off",
            why: "It counts whatever the firmware says, and also beside a word that turns the IOMMU on.",
            more: "intel_iommu=off, amd_iommu=off, iommu=off and iommu=soft, on the command line that the kernel runs with or \
                   in the file of the boot loader that it comes from.",
            find: iommu_word_off,
        },
        Check {
            id: "iommu-no-such-word",
            severity: Severity::Note,
            title: "a word about the IOMMU that the kernel does not know",
            why: "It does nothing, so whoever counts on it has not what he thinks.",
            more: "amd_iommu=on, iommu=on and iommu=1 stand in many guides and in no kernel: AMD's IOMMU is on by default, and \
                   Intel's is turned on by intel_iommu=on.",
            find: iommu_no_such_word,
        },
        Check {
            id: "interrupts-unsafe",
            severity: Severity::Warning,
            title: "interrupt remapping is off, or its lack is allowed",
            why: "A VM with a device could then send the host any interrupt, and vfio refuses such a host by default.",
            more: "intremap=off and nointremap turn it off; allow_unsafe_interrupts=1 of vfio_iommu_type1 has vfio do without.",
            find: interrupts_unsafe,
        },
        Check {
            id: "acs-override",
            severity: Severity::Warning,
            title: "IOMMU groups are split against what the hardware says",
            why: "Devices that are shown in groups of their own can still reach each other's memory past the IOMMU.",
            more: "pcie_acs_override= of Proxmox's kernels. Leave it out where the groups are fine without, such as in another \
                   slot of the board.",
            find: acs_override,
        },
        Check {
            id: "other-boot-loader",
            severity: Severity::Warning,
            title: "a word was put into the file of a boot loader that does not boot this host",
            why: "The kernel never sees it.",
            more: "With Proxmox's systemd-boot the command line is the first line of /etc/kernel/cmdline; with GRUB it is in \
                   /etc/default/grub. Only words about the IOMMU, vfio, the framebuffer and NVIDIA's and nouveau's modules \
                   are looked at.",
            find: other_boot_loader,
        },
        Check {
            id: "not-booted-with",
            severity: Severity::Note,
            title: "a word stands in the boot loader's file and the kernel runs without it",
            why: "What was edited counts from the next boot on, and only once the boot loader was told.",
            more: "Only words about the IOMMU, vfio, the framebuffer and NVIDIA's and nouveau's modules are looked at.",
            find: not_booted_with,
        },
        Check {
            id: "vfio-missing",
            severity: Severity::Error,
            title: "vfio-pci is not among the running kernel's modules",
            why: "It is the driver that gives a device to a VM.",
            more: "Mostly the modules of the running kernel were removed by an upgrade: a reboot ends that.",
            find: vfio_missing,
        },
        Check {
            id: "kernel-removed",
            severity: Severity::Error,
            title: "the modules of the running kernel are gone",
            why: "Nothing that is not loaded can be loaded until the host is booted again.",
            more: "After an upgrade that removed the package of the running kernel.",
            find: kernel_removed,
        },
        Check {
            id: "vfio-virqfd",
            severity: Severity::Note,
            title: "vfio_virqfd is to be loaded at boot, and kernels from 6.2 on do not have it",
            why: "It is part of vfio since then; loading it fails at each boot, and systemd-modules-load with it.",
            more: "Proxmox VE 8 and newer need vfio, vfio_iommu_type1 and vfio_pci.",
            find: vfio_virqfd,
        },
        Check {
            id: "initramfs-old",
            severity: Severity::Warning,
            title: "the initramfs is older than what it has a copy of",
            why: "At boot the copy counts, so that what was changed since has no effect.",
            more: "/etc/modprobe.d with what was taken out of it, /lib/modprobe.d, and the scripts, hooks and the list of modules \
                   in /etc/initramfs-tools, against /boot/initrd.img of the running kernel.",
            find: initramfs_old,
        },
    ],
};

fn iommu_off(facts: &Facts) -> Vec<Hit> {
    let Some(off) = &facts.host.iommu else {
        let without = facts.functions().filter(|one| one.iommu_group.is_none());
        let told = without.filter_map(|one| {
            let path = one.address.attribute("iommu_group");
            Some(Hit::told(path, &check::of_function(one)?))
        });
        return told.take(1).collect();
    };
    vec![Hit::told("/sys/kernel/iommu_groups", &off.clone().of("no device is in an IOMMU group"))]
}

fn is_off(word: &str) -> bool {
    let Some((key, value)) = word.split_once('=') else { return false };
    let is_iommu = matches!(key.replace('-', "_").as_str(), "intel_iommu" | "amd_iommu" | "iommu");
    is_iommu && value.split(',').any(|one| one == "off" || (one == "soft" && key == "iommu"))
}

fn iommu_word_off(facts: &Facts) -> Vec<Hit> {
    let on = facts
        .host
        .booted()
        .iter()
        .find(|word| ["intel_iommu=on", "iommu=pt"].iter().any(|wanted| word.starts_with(wanted)));
    let against = on.map_or_else(String::new, |on| format!(", although there is {on} as well"));
    let hit =
        |one: &Word| one.hit(&format!("{} turns the IOMMU off{}{against}", one.word, one.when()), &one.without(""));
    let is_relevant = !facts.slots.is_empty();
    words(&facts.host, &is_off).iter().filter(|_| is_relevant).map(hit).collect()
}

fn iommu_no_such_word(facts: &Facts) -> Vec<Hit> {
    let is_it = |word: &str| matches!(word, "amd_iommu=on" | "iommu=on" | "iommu=1" | "amd_iommu=pt");
    let hit = |one: &Word| one.hit(&format!("{} is no option of the kernel's", one.word), &one.without(""));
    words(&facts.host, &is_it).iter().map(hit).collect()
}

fn interrupts_unsafe(facts: &Facts) -> Vec<Hit> {
    let is_it = |word: &str| {
        matches!(word, "intremap=off" | "nointremap")
            || matches!(
                word.replace('-', "_").as_str(),
                "vfio_iommu_type1.allow_unsafe_interrupts=1" | "vfio_iommu_type1.allow_unsafe_interrupts=Y"
            )
    };
    let does = |word: &str| match word.contains("unsafe") {
        true => "has vfio do without interrupt remapping",
        false => "turns interrupt remapping off",
    };
    let on_line = words(&facts.host, &is_it);
    let mut found: Vec<Hit> =
        on_line.iter().map(|one| one.hit(&format!("{} {}", one.word, does(&one.word)), &one.without(""))).collect();
    for line in &facts.host.directives {
        if let ["options", "vfio_iommu_type1" | "vfio-iommu-type1", options @ ..] = line.words().as_slice()
            && options.iter().any(|one| matches!(*one, "allow_unsafe_interrupts=1" | "allow_unsafe_interrupts=Y"))
        {
            let remedy = crate::causes::take_out(&line.place.path, line.place.first, line.place.last);
            let what = format!("{} has vfio do without interrupt remapping", line.words.join(" "));
            found.push(Hit::at(line.place.to_string(), what, remedy));
        }
    }
    found
}

fn acs_override(facts: &Facts) -> Vec<Hit> {
    let booted = words(&facts.host, &|word| word.starts_with("pcie_acs_override="));
    let hit = |one: &Word| one.hit(&format!("{} splits IOMMU groups{}", one.word, one.when()), &one.without(""));
    booted.iter().map(hit).collect()
}

/// What people put on the command line for the sake of a GPU.
fn is_ours_to_know(word: &str) -> bool {
    let key = word.split('=').next().unwrap_or_default().replace('-', "_");
    let starts = [
        "intel_iommu",
        "amd_iommu",
        "iommu",
        "vfio",
        "pcie_acs_override",
        "nvidia",
        "nouveau",
        "initcall_blacklist",
        "module_blacklist",
        "modprobe.blacklist",
    ];
    word.contains('=') && (starts.iter().any(|start| key.starts_with(start)) || word.starts_with("video="))
}

fn other_boot_loader(facts: &Facts) -> Vec<Hit> {
    let host = &facts.host;
    let is_others = |path: &str| match host.loader {
        Loader::SystemdBoot => path.starts_with("/etc/default/grub"),
        Loader::Grub => path == "/etc/kernel/cmdline",
        Loader::Unknown => false,
    };
    let boots = match host.loader {
        Loader::SystemdBoot => "systemd-boot, from /etc/kernel/cmdline",
        _ => "GRUB, from /etc/default/grub",
    };
    let add = |word: &str| match host.loader {
        Loader::SystemdBoot => {
            format!("sed -i '1s|$| {word}|' /etc/kernel/cmdline && proxmox-boot-tool refresh")
        }
        _ => format!("sed -i 's|^GRUB_CMDLINE_LINUX_DEFAULT=\"|&{word} |' /etc/default/grub && update-grub"),
    };
    let mut found = Vec::new();
    for line in host.command_files().iter().filter(|line| is_others(&line.path)) {
        for word in line.words.iter().filter(|word| is_ours_to_know(word) && !host.booted().contains(word)) {
            let place = format!("{}:{}", line.path, line.line);
            let what = format!("{word} stands there, and this host boots by {boots}");
            found.push(Hit::at(place, what, format!("{}; then reboot the host", add(word))));
        }
    }
    found
}

fn not_booted_with(facts: &Facts) -> Vec<Hit> {
    let host = &facts.host;
    let counts = |path: &str| match host.loader {
        Loader::SystemdBoot => path == "/etc/kernel/cmdline",
        Loader::Grub => path.starts_with("/etc/default/grub"),
        Loader::Unknown => false,
    };
    let mut found = Vec::new();
    for line in host.command_files().iter().filter(|line| counts(&line.path)) {
        for word in line.words.iter().filter(|word| is_ours_to_know(word) && !host.booted().contains(word)) {
            let then = line.then.unwrap_or_default();
            let what = format!("{word} stands there, and the kernel was booted without it");
            found.push(Hit::at(format!("{}:{}", line.path, line.line), what, format!("{then}; then reboot the host")));
        }
    }
    found
}

fn vfio_missing(facts: &Facts) -> Vec<Hit> {
    let is_missing = facts.host.vfio == Availability::Missing && !facts.slots.is_empty();
    let place = format!("/lib/modules/{}/modules.dep", facts.host.release);
    is_missing.then(|| Hit::told(place, &check::no_vfio_pci())).into_iter().collect()
}

fn kernel_removed(facts: &Facts) -> Vec<Hit> {
    let host = &facts.host;
    // A tree of files need not have any.
    if host.kernels.is_empty() || host.kernels.contains(&host.release) {
        return Vec::new();
    }
    let found = format!("there is no {}, and there are modules of {}", host.release, host.kernels.join(" and "));
    vec![Hit::at(format!("/lib/modules/{}", host.release), found, "reboot the host")]
}

fn vfio_virqfd(facts: &Facts) -> Vec<Hit> {
    let mut numbers = facts.host.release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    if (numbers.next(), numbers.next()) < (Some(6), Some(2)) {
        return Vec::new();
    }
    let lines = facts.host.modules.iter().filter(|(.., name)| name == "vfio_virqfd");
    lines
        .map(|(path, line, name)| {
            let what = format!("{name} is loaded at boot, and kernel {} has no such module", facts.host.release);
            Hit::at(format!("{path}:{line}"), what, crate::causes::take_out(path, *line, *line))
        })
        .collect()
}

fn initramfs_old(facts: &Facts) -> Vec<Hit> {
    let host = &facts.host;
    let again = format!("update-initramfs -u -k {}", host.release);
    let old = host
        .initramfs
        .iter()
        .map(|(initrd, newer)| Hit::at(initrd, format!("it is older than {newer}, of which it has a copy"), &again));
    let pending = host.initramfs_pending.then(|| {
        let what = "a run of setup vfio ended before the initramfs was made anew";
        Hit::at(crate::setup::vfio::PENDING, what, "gpu-handoff setup vfio")
    });
    old.chain(pending).collect()
}
