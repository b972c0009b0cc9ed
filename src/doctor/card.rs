//! The cards themselves: who is in their IOMMU group, what of the host hangs on them, what the kernel's log says.

use super::facts::Facts;
use super::finding::{Area, Check, Hit, Severity};
use crate::handoff::plan::check;
use crate::sorted;

pub const AREA: Area = Area {
    title: "The cards",
    checks: &[
        Check {
            id: "group-shared",
            severity: Severity::Error,
            title: "a device that the host uses is in the card's IOMMU group",
            why: "A group goes to a VM as a whole, so a start is refused.",
            more: "Bridges do not count, and what the VM lists itself. Which slots share a group is the board's doing; ACS in \
                   the firmware, where there is such a thing, makes groups smaller.",
            find: group_shared,
        },
        Check {
            id: "card-divided",
            severity: Severity::Error,
            title: "the card has SR-IOV virtual functions or mediated devices",
            why: "They would vanish with the card, so a start is refused.",
            more: "Virtual functions and mediated devices are Proxmox's own business, and no GPU of ours.",
            find: divided,
        },
        Check {
            id: "card-gone",
            severity: Severity::Error,
            title: "the card does not answer",
            why: "It has fallen off the bus, and no driver can use it.",
            more: "Its configuration space reads ff. A card that sleeps is not woken to ask.",
            find: gone,
        },
        Check {
            id: "behind-the-card",
            severity: Severity::Warning,
            title: "the host uses a disk or a network interface that is behind the card",
            why: "All functions of a card go to the VM together, so a start is refused as long as it is used.",
            more: "Cards with a USB controller of their own have such things behind them.",
            find: behind,
        },
        Check {
            id: "screen-on-card",
            severity: Severity::Note,
            title: "the firmware's framebuffer is on the card",
            why: "The host's screen goes dark when a VM takes the card, and only nvidia_drm can bring it back.",
            more: "efifb, simpledrm, efidrm or vesafb: their memory lies in the card's. From kernel 6.1 on vfio-pci takes it from \
                   them by itself; older ones cannot, which is an error. Put the host's screen on another card in the firmware, \
                   or do without it.",
            find: screen,
        },
        Check {
            id: "fallen-off",
            severity: Severity::Error,
            title: "the driver's log says that a card has fallen off the bus",
            why: "It does not work until the host is powered off and on, and often means power, a riser or heat.",
            more: "Xid 79, or the driver's words for it, in this boot's kernel log.",
            find: fallen_off,
        },
        Check {
            id: "xid",
            severity: Severity::Warning,
            title: "the driver reported errors of the card (Xid)",
            why: "They tell a program's fault from the card's, the memory's or the bus's.",
            more: "In this boot's kernel log. Of each number the last one is told. 13, 31 and 43 are mostly a program's fault; 48, \
                   63, 64 and 94 are about memory; 62, 74, 119 and 120 about the card or its firmware. NVIDIA's list is at \
                   docs.nvidia.com/deploy/xid-errors.",
            find: xid,
        },
        Check {
            id: "bar-taken",
            severity: Severity::Error,
            title: "a part of the card's memory could not be reserved",
            why: "Something else has it, such as the firmware's framebuffer, and the VM gets a card that does not work.",
            more: "BAR 1: can't reserve, in this boot's kernel log.",
            find: bar_taken,
        },
        Check {
            id: "bar-unassigned",
            severity: Severity::Warning,
            title: "the firmware had no room for the card's memory",
            why: "A driver does not start a card whose memory has no address.",
            more: "no space for, or can't assign, a BAR, in this boot's kernel log. Above 4G Decoding in the firmware is what large \
                   BARs (Resizable BAR) need.",
            find: bar_unassigned,
        },
        Check {
            id: "d3cold",
            severity: Severity::Warning,
            title: "a card did not wake up from D3cold",
            why: "A VM that is given it finds a device that does not answer.",
            more: "Unable to change power state from D3cold, in this boot's kernel log. While a card changes hands this program keeps \
                   it awake; disable_idle_d3=1 of vfio-pci keeps it awake with vfio-pci as well.",
            find: d3cold,
        },
        Check {
            id: "no-interrupt-remapping",
            severity: Severity::Error,
            title: "vfio says that there is no interrupt remapping",
            why: "vfio gives no device to a VM then.",
            more: "In this boot's kernel log. Turn it on in the firmware (x2APIC, VT-d, AMD-Vi), and look for interrupts-unsafe.",
            find: no_interrupt_remapping,
        },
        Check {
            id: "driver-refuses-card",
            severity: Severity::Error,
            title: "the driver says that it does not have this card",
            why: "It is of another generation than the driver, or than this kind of its modules.",
            more: "is not supported by, or requires use of the NVIDIA open kernel modules, in this boot's kernel log.",
            find: refuses,
        },
        Check {
            id: "firmware-not-found",
            severity: Severity::Error,
            title: "the driver did not find its firmware",
            why: "A card that runs on GSP firmware, as all do with the open modules, is not started without it.",
            more: "Direct firmware load for nvidia/… failed, in this boot's kernel log.",
            find: firmware,
        },
        Check {
            id: "module-rejected",
            severity: Severity::Error,
            title: "the kernel did not take a module for want of a signature",
            why: "With Secure Boot only modules load that are signed with a key that the firmware knows.",
            more: "module verification, Key was rejected by service or Lockdown: unsigned module loading, in this boot's kernel \
                   log. See secure-boot-unsigned.",
            find: rejected,
        },
    ],
};

fn group_shared(facts: &Facts) -> Vec<Hit> {
    let told = facts.in_groups().into_iter();
    told.map(|(one, trouble)| Hit::told(one.address.attribute("iommu_group"), &trouble)).collect()
}

fn divided(facts: &Facts) -> Vec<Hit> {
    let divided = facts.functions().filter(|one| one.iommu_group.is_some());
    divided
        .filter_map(|one| Some(Hit::told(one.address.attribute("sriov_numvfs"), &check::of_function(one)?)))
        .collect()
}

fn gone(facts: &Facts) -> Vec<Hit> {
    let told = facts
        .functions()
        .filter_map(|one| Some(Hit::told(one.address.attribute("config"), &check::gone_function(one)?)));
    told.take(1).collect()
}

fn behind(facts: &Facts) -> Vec<Hit> {
    facts.behind.iter().map(|(address, trouble)| Hit::told(address.attribute("driver"), trouble)).collect()
}

fn screen(facts: &Facts) -> Vec<Hit> {
    let Some(address) = &facts.host.screen else { return Vec::new() };
    let mut numbers = facts.host.release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let found = format!("the firmware's framebuffer lies in the memory of {address}");
    if (numbers.next(), numbers.next()) < (Some(6), Some(1)) {
        let remedy = "put initcall_blacklist=sysfb_init on the kernel's command line, or the screen on another card in the firmware";
        return vec![Hit::at("/proc/iomem", found, remedy).only_a(Severity::Error)];
    }
    vec![Hit::at("/proc/iomem", found, "put the host's screen on another card in the firmware, or do without it")]
}

const LOG: &str = "kernel log of this boot";

/// The last line that is such, with how many there are.
fn last(facts: &Facts, is_it: &dyn Fn(&str) -> bool, remedy: &str) -> Vec<Hit> {
    let lines: Vec<&String> = facts.host.log.iter().filter(|line| is_it(line)).collect();
    let Some(last) = lines.last() else { return Vec::new() };
    let more = if lines.len() > 1 { format!(" ({} such lines)", lines.len()) } else { String::new() };
    vec![Hit::at(LOG, format!("{last}{more}"), remedy)]
}

/// Lines about one of the cards.
fn names_card(facts: &Facts, line: &str) -> bool {
    facts.slots.iter().any(|slot| line.contains(&slot.id.to_string()))
}

fn fallen_off(facts: &Facts) -> Vec<Hit> {
    let is_it = |line: &str| line.contains("NVRM") && (line.contains("fallen off the bus") || number(line) == Some(79));
    last(facts, &is_it, "power the host off and on; if it comes again, look at the card's power cables and its slot")
}

/// `NVRM: Xid (PCI:0000:01:00): 79, pid=…`
fn number(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once("NVRM: Xid (")?;
    let (_, rest) = rest.split_once("): ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn xid(facts: &Facts) -> Vec<Hit> {
    let mut numbers: Vec<u32> =
        facts.host.log.iter().filter_map(|line| number(line)).filter(|one| *one != 79).collect();
    sorted::sort(&mut numbers);
    numbers.dedup();
    let remedy = |number| match number {
        13 | 31 | 43 | 45 => {
            "look at the program that is named, or what its container runs: gpu-handoff container check --all"
        }
        48 | 63 | 64 | 94 | 95 => {
            "nvidia-smi -q -d ECC,ROW_REMAPPER shows what the card's memory has; it may be failing"
        }
        _ => "see docs.nvidia.com/deploy/xid-errors for that number; another version of the driver may help",
    };
    let hit = |number: u32| last(facts, &|line| self::number(line) == Some(number), remedy(number));
    numbers.into_iter().flat_map(hit).collect()
}

fn bar_taken(facts: &Facts) -> Vec<Hit> {
    let is_it = |line: &str| line.contains("BAR") && line.contains("can't reserve") && names_card(facts, line);
    last(
        facts,
        &is_it,
        "grep -A9 'PCI Bus' /proc/iomem shows who has it; put the host's screen on another card in the firmware",
    )
}

fn bar_unassigned(facts: &Facts) -> Vec<Hit> {
    let signs = ["can't assign", "failed to assign", "no space for"];
    let is_it =
        |line: &str| line.contains("BAR") && signs.iter().any(|sign| line.contains(sign)) && names_card(facts, line);
    let of_driver = |line: &str| line.contains("NVRM: BAR") && line.contains("is 0M @ 0x0");
    last(
        facts,
        &|line| is_it(line) || of_driver(line),
        "turn on Above 4G Decoding in the firmware, or Resizable BAR off",
    )
}

fn d3cold(facts: &Facts) -> Vec<Hit> {
    let is_it =
        |line: &str| line.contains("D3cold") && line.contains("nable to change power state") && names_card(facts, line);
    last(
        facts,
        &is_it,
        "power the host off and on; then: echo 'options vfio-pci disable_idle_d3=1' > /etc/modprobe.d/vfio-d3.conf && update-initramfs -u -k all",
    )
}

fn no_interrupt_remapping(facts: &Facts) -> Vec<Hit> {
    let is_it = |line: &str| line.contains("No interrupt remapping") && !line.contains("enabled");
    last(facts, &is_it, "turn interrupt remapping on in the firmware (x2APIC with VT-d or AMD-Vi)")
}

fn refuses(facts: &Facts) -> Vec<Hit> {
    let open = |line: &str| line.contains("requires use of the NVIDIA open kernel modules");
    let other = |line: &str| {
        (line.contains("NVRM") && line.contains("is not supported by the NVIDIA"))
            || line.contains("not supported by open nvidia.ko")
            || line.contains("NVRM: No NVIDIA GPU found")
    };
    let mut found = last(facts, &open, "install the driver with its open modules: gpu-handoff setup driver --dry-run");
    found.extend(last(
        facts,
        &other,
        "install a driver that has this card: gpu-handoff setup driver --dry-run tells which do",
    ));
    found
}

fn firmware(facts: &Facts) -> Vec<Hit> {
    let is_it = |line: &str| line.contains("irect firmware load for nvidia/") && line.contains("failed");
    last(facts, &is_it, &super::driver::again(facts))
}

fn rejected(facts: &Facts) -> Vec<Hit> {
    let signs = ["rejected", "unsigned module loading is restricted", "Loading of unsigned module"];
    let is_it = |line: &str| line.contains("odule") && signs.iter().any(|sign| line.contains(sign));
    let and_nvidia = |line: &str| is_it(line) && (line.contains("nvidia") || line.contains("unsigned module"));
    last(facts, &and_nvidia, super::driver::SIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_an_error() {
        for (line, is) in [
            ("NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', GPU has fallen off the bus.", Some(79)),
            ("NVRM: Xid (PCI:0000:01:00): 31, pid=4711, name=x, Ch 00000008", Some(31)),
            ("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05", None),
        ] {
            assert_eq!(number(line), is, "{line}");
        }
    }
}
