//! What hangs on a function that is no GPU: the disks behind a card's USB function, or a network interface that the host is
//! reached by. Unbinding the function takes them away without a word.

use super::inventory::{Function, VFIO_PCI};
use crate::story::printable;
use crate::sys::{ActError, Kernel};
use crate::trouble::{About, Trouble};
use nix::libc;
use std::time::Duration;

/// Hubs behind hubs, and what a disk is made of.
const DEPTH: usize = 24;

/// Opening a disk that was asleep takes its time.
const OPEN: Duration = Duration::from_secs(5);

/// What a function has behind it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Behind {
    /// Disks and partitions: name and directory.
    blocks: Vec<(String, String)>,
    interfaces: Vec<(String, String)>,
}

/// Why the host cannot do without this function now, and what to do about it; none when it can.
pub fn in_use(kernel: &dyn Kernel, function: &Function) -> Option<Trouble> {
    let driver = function.driver.as_deref().filter(|driver| *driver != VFIO_PCI)?;
    if function.is_nvidia_gpu() || driver == "snd_hda_intel" {
        return None;
    }
    let mut behind = Behind::default();
    collect(kernel, function.address.attribute("").trim_end_matches('/'), DEPTH, &mut behind);
    let told = |name: &str, (what, then): (String, String)| {
        Trouble::new(format!("the disk {name} is on {} and {what}", function.address), then)
    };
    let mut blocks = behind.blocks.iter();
    let disk = blocks.find_map(|(name, folder)| Some(told(name, use_of_block(kernel, name, folder, DEPTH)?)));
    // Only then: a disk is claimed by whatever its partitions are used for.
    let disk = disk.or_else(|| behind.blocks.iter().find_map(|(name, _)| Some(told(name, claimed(kernel, name)?))));
    let trouble = disk.or_else(|| {
        let mut interfaces = behind.interfaces.iter();
        interfaces.find_map(|(name, folder)| {
            let what = use_of_interface(kernel, name, folder)?;
            Some(Trouble::new(
                format!("the network interface {name} is on {} and {what}", function.address),
                "take it out of the host's network configuration, or move that device to another card",
            ))
        })
    })?;
    Some(trouble.about(About::Behind(function.address)))
}

/// Everything below a directory that is a disk, a partition or an interface.
fn collect(kernel: &dyn Kernel, folder: &str, depth: usize, behind: &mut Behind) {
    if depth == 0 {
        return;
    }
    for name in kernel.folders(folder) {
        let path = format!("{folder}/{name}");
        match name.as_str() {
            "block" => add_blocks(kernel, &path, behind),
            "net" => {
                let interfaces = kernel.folders(&path);
                behind.interfaces.extend(interfaces.into_iter().map(|name| (name.clone(), format!("{path}/{name}"))));
            }
            "power" | "msi_irqs" | "driver" | "iommu" => {}
            // NVMe has its disks right below the controller.
            _ if is_nvme_disk(&name) => add_block(kernel, &name, &path, behind),
            _ => collect(kernel, &path, depth - 1, behind),
        }
    }
}

/// `nvme0n1`
fn is_nvme_disk(name: &str) -> bool {
    let numbers = name.strip_prefix("nvme").and_then(|rest| rest.split_once('n'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.is_some_and(|(controller, disk)| is_number(controller) && is_number(disk))
}

fn add_blocks(kernel: &dyn Kernel, folder: &str, behind: &mut Behind) {
    for disk in kernel.folders(folder) {
        add_block(kernel, &disk, &format!("{folder}/{disk}"), behind);
    }
}

fn add_block(kernel: &dyn Kernel, disk: &str, folder: &str, behind: &mut Behind) {
    behind.blocks.push((disk.to_string(), folder.to_string()));
    for name in kernel.folders(folder).into_iter().filter(|name| name.starts_with(disk)) {
        let path = format!("{folder}/{name}");
        behind.blocks.push((name, path));
    }
}

/// What a disk or partition is used for, and how to end that.
fn use_of_block(kernel: &dyn Kernel, name: &str, folder: &str, depth: usize) -> Option<(String, String)> {
    let number = kernel.text(&format!("{folder}/dev"));
    // The name in /dev/mapper of one that others are made of.
    let mapped = kernel.text(&format!("{folder}/dm/name"));
    let mut names = vec![format!("/dev/{name}")];
    names.extend(mapped.iter().map(|mapped| format!("/dev/mapper/{mapped}")));
    let mounts =
        kernel.text("/proc/self/mountinfo").map(|text| mounted_by_number(&text, number.as_deref()?)).unwrap_or(None);
    let mounts = mounts.or_else(|| mounted_by_name(&kernel.text("/proc/mounts")?, &names));
    if let Some(place) = mounts {
        let place = unescaped(&place);
        let quoted = if is_plain(&place) { place.clone() } else { format!("'{}'", place.replace('\'', "'\\''")) };
        return Some((
            format!("is mounted at {}", printable(&place)),
            format!("unmount it: umount {}", printable(&quoted)),
        ));
    }
    if let Some(swap) = kernel.text("/proc/swaps").and_then(|text| first_of(&text, &names)) {
        return Some(("is swapped to".to_string(), format!("end that: swapoff {swap}")));
    }
    let holder = kernel.list(&format!("{folder}/holders")).into_iter().next().filter(|_| depth > 0)?;
    let above = format!("{folder}/holders/{holder}");
    let title = kernel.text(&format!("{above}/dm/name")).unwrap_or_else(|| holder.clone());
    if let Some((what, then)) = use_of_block(kernel, &holder, &above, depth - 1) {
        return Some((format!("is part of {title}, which {what}"), then));
    }
    let then = match holder.as_str() {
        md if md.starts_with("md") => format!("stop it: mdadm --stop /dev/{md}"),
        dm if dm.starts_with("dm-") => format!(
            "take it down: vgchange -an for a volume group, cryptsetup close for an encrypted disk, or dmsetup remove \
             {title}"
        ),
        other => format!("take {other} down"),
    };
    Some((format!("is in use as {title}"), then))
}

/// The kernel lets nobody else have a disk to himself that is part of a pool, an array or a file system, also where nothing
/// else tells so.
fn claimed(kernel: &dyn Kernel, name: &str) -> Option<(String, String)> {
    let node = format!("/dev/{name}");
    let answer = kernel.try_claim(&node, OPEN);
    let is_busy = matches!(answer, Err(ActError::Os(error)) if error.raw_os_error() == Some(libc::EBUSY));
    is_busy.then(|| {
        (
            "somebody has it to himself (a ZFS pool, a file system of several disks, a RAID)".to_string(),
            format!("end that first: zpool status -P and lsblk {node} tell what it is"),
        )
    })
}

/// `36 25 8:17 / /mnt/backup rw,relatime shared:1 - ext4 /dev/sdb1 rw`
fn mounted_by_number(mountinfo: &str, number: &str) -> Option<String> {
    let place = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(2) == Some(&number)).then(|| words.get(4).map(ToString::to_string))?
    };
    mountinfo.lines().find_map(place)
}

/// The kernel writes blanks, tabs, newlines and backslashes as `\040` and the like.
fn unescaped(place: &str) -> String {
    let octal = |rest: &str| rest.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
    let mut text = String::new();
    let mut rest = place;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        rest = match octal(after) {
            Some(byte) => {
                text.push(char::from(byte));
                &after[3..]
            }
            None => {
                text.push('\\');
                after
            }
        };
    }
    text + rest
}

fn is_plain(place: &str) -> bool {
    place.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+:@".contains(&b))
}

/// `/dev/sdb1 /mnt/backup ext4 rw 0 0`
fn mounted_by_name(mounts: &str, names: &[String]) -> Option<String> {
    let place = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        names.iter().any(|name| name == device).then(|| rest.split(' ').next().map(str::to_string))?
    };
    mounts.lines().find_map(place)
}

fn first_of(swaps: &str, names: &[String]) -> Option<String> {
    let first = swaps.lines().filter_map(|line| line.split_whitespace().next());
    first.into_iter().find(|word| names.iter().any(|name| name == word)).map(str::to_string)
}

/// What a network interface is used for.
fn use_of_interface(kernel: &dyn Kernel, name: &str, folder: &str) -> Option<String> {
    let above = |entry: &String| entry.strip_prefix("upper_").map(str::to_string);
    if let Some(upper) = kernel.list(folder).iter().find_map(above) {
        return Some(format!("is part of {upper}"));
    }
    if kernel.exists(&format!("{folder}/brport")) {
        return Some("is a port of a bridge".to_string());
    }
    let by_v4 = kernel.text("/proc/net/route").and_then(|text| route(&text, name));
    by_v4.or_else(|| kernel.text("/proc/net/ipv6_route").and_then(|text| route_v6(&text, name)))
}

/// `eth0 00000000 0101A8C0 0003 …`: interface, destination and gateway.
fn route(text: &str, name: &str) -> Option<String> {
    let mut routes = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == name).then(|| words.next().map(|destination| destination == "00000000"))?
    });
    let first = routes.next()?;
    let has_default = first || routes.any(|is_default| is_default);
    Some(if has_default { "carries the default route" } else { "carries a route" }.to_string())
}

/// Destination, its length, …, and the interface last. What every interface has by itself counts for nothing.
fn route_v6(text: &str, name: &str) -> Option<String> {
    let mut found = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [destination, length, ..] = words[..] else { continue };
        if words.last() != Some(&name) || destination.starts_with("fe8") || destination.starts_with("ff") {
            continue;
        }
        if length == "00" {
            return Some("carries the default route".to_string());
        }
        found = Some("carries a route".to_string());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_swap() {
        let mounts = "/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 /mnt/my\\040backup ext4 rw 0 0\n";
        let names = |name: &str| vec![name.to_string()];
        assert_eq!(unescaped("/mnt/my\\040backup\\134x\\"), "/mnt/my backup\\x\\");
        assert!(is_plain("/mnt/backup-1") && !is_plain("/mnt/my backup"));
        assert_eq!(mounted_by_name(mounts, &names("/dev/sdb1")).as_deref(), Some("/mnt/my\\040backup"));
        assert_eq!(mounted_by_name(mounts, &names("/dev/sdb")), None);
        let info = "36 25 8:17 / /mnt/backup rw,relatime shared:1 - ext4 /dev/root rw\n";
        assert_eq!(mounted_by_number(info, "8:17").as_deref(), Some("/mnt/backup"));
        assert_eq!(mounted_by_number(info, "8:1"), None);
        let swaps = "Filename\t\t\t\tType\t\tSize\n/dev/sdb2                               partition\t1\n";
        assert_eq!(first_of(swaps, &names("/dev/sdb2")).as_deref(), Some("/dev/sdb2"));
        assert_eq!(first_of(swaps, &names("/dev/sdb")), None);
    }

    #[test]
    fn routes() {
        let v4 = "Iface\tDestination\tGateway\neth1\t0001A8C0\t00000000\neth1\t00000000\t0101A8C0\neth2\t0002A8C0\t0\n";
        assert_eq!(route(v4, "eth1").as_deref(), Some("carries the default route"));
        assert_eq!(route(v4, "eth2").as_deref(), Some("carries a route"));
        assert_eq!(route(v4, "eth0"), None);
        let zeros = "0".repeat(32);
        let line = |destination: &str, length: &str| {
            format!("{destination} {length} {zeros} 00 {zeros} 00000400 00000001 00000000 00000001     eth1\n")
        };
        let linked = format!("fe80{} 40", "0".repeat(28));
        let own = line(&linked[..32], "40") + &line(&format!("ff{}", "0".repeat(30)), "08");
        assert_eq!(route_v6(&own, "eth1"), None);
        assert_eq!(
            route_v6(&(own.clone() + &line(&zeros, "00")), "eth1").as_deref(),
            Some("carries the default route")
        );
        let global = line(&format!("2001{}", "0".repeat(28)), "40");
        assert_eq!(route_v6(&(own + &global), "eth1").as_deref(), Some("carries a route"));
        assert_eq!(route_v6(&global, "eth0"), None);
    }

    #[test]
    fn names_of_disks() {
        for (name, is) in
            [("nvme0n1", true), ("nvme12n3", true), ("nvme0", false), ("nvme0n1p1", false), ("nvmexn1", false)]
        {
            assert_eq!(is_nvme_disk(name), is, "{name}");
        }
    }
}
