//! What a container's configuration must have so that it can use GPUs: a list made of facts. The numbers in it are those
//! of now, because majors are dynamic and minors may be another GPU's after a handoff.

use super::Style;
use crate::address::{Address, SlotId};
use crate::gpu::inventory::{Slot, nvidia_slots};
use crate::gpu::nodes::{self, CAPS, CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use crate::gpu::nvidia;
use crate::sys::{DeviceNumber, Kernel};

/// Of the driver's capability nodes the one that changes how a GPU is partitioned; the others only let look or use.
const CAP_OF_ADMINISTRATOR: &str = "nvidia-cap1";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Those that the container shall use.
    pub gpus: Vec<Gpu>,
    /// The host has no other NVIDIA GPU.
    pub are_all: bool,
    /// None while nvidia-uvm is not loaded.
    pub uvm: Option<u64>,
    pub has_modeset: bool,
    /// Major and nodes of `/dev/nvidia-caps`, where there is that directory.
    pub caps: Option<(u64, Vec<String>)>,
    /// Of the nodes in the host.
    pub mode: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    pub slot: SlotId,
    pub minor: u64,
    /// `card0` and `renderD128`.
    pub drm: Vec<(String, DeviceNumber)>,
}

/// The host's NVIDIA driver does not have this GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    pub slot: SlotId,
    pub driver: Option<String>,
}

impl Facts {
    /// # Errors
    /// The first GPU that is away: nothing is known of its nodes.
    pub fn read(kernel: &dyn Kernel, slots: &[SlotId]) -> Result<Facts, Away> {
        let gpus = slots.iter().map(|slot| Gpu::read(kernel, *slot)).collect::<Result<Vec<_>, _>>()?;
        let caps = nvidia::major(kernel, "nvidia-caps").filter(|_| kernel.exists(CAPS));
        Ok(Facts {
            are_all: nvidia_slots(kernel).iter().all(|slot| slots.contains(&slot.id)),
            uvm: nvidia::major(kernel, "nvidia-uvm"),
            has_modeset: kernel.exists("/sys/module/nvidia_modeset"),
            caps: caps.map(|major| (major, kernel.list(CAPS).into_iter().filter(|name| is_cap(name)).collect())),
            mode: nodes::mode(kernel),
            gpus,
        })
    }
}

/// And no node that is just being made.
fn is_cap(name: &str) -> bool {
    name.starts_with("nvidia-cap")
}

/// What the host's other GPUs would need, each by itself.
pub fn needs_of_others(kernel: &dyn Kernel, slots: &[SlotId], style: Style) -> Vec<Need> {
    let others = nvidia_slots(kernel).into_iter().map(|slot| slot.id).filter(|slot| !slots.contains(slot));
    let facts = others.filter_map(|slot| Facts::read(kernel, &[slot]).ok());
    facts.flat_map(|facts| needs(&Facts { are_all: false, ..facts }, style, true)).collect()
}

impl Gpu {
    fn read(kernel: &dyn Kernel, slot: SlotId) -> Result<Gpu, Away> {
        let gpu = Slot::read(kernel, slot).and_then(|slot| slot.gpu().cloned());
        let away = || Away { slot, driver: gpu.as_ref().and_then(|gpu| gpu.driver.clone()) };
        let gpu = gpu.as_ref().filter(|gpu| gpu.is_on("nvidia")).ok_or_else(away)?;
        let minor = nvidia::minor(kernel, gpu.address).ok_or_else(away)?;
        Ok(Gpu { slot, minor, drm: drm(kernel, gpu.address) })
    }
}

fn drm(kernel: &dyn Kernel, address: Address) -> Vec<(String, DeviceNumber)> {
    let directory = address.attribute("drm");
    let names = kernel.list(&directory).into_iter();
    let names = names.filter(|name| name.starts_with("card") || name.starts_with("renderD"));
    names
        .filter_map(|name| Some((kernel.text(&format!("{directory}/{name}/dev"))?.parse().ok()?, name)))
        .map(|(number, name)| (name, number))
        .collect()
}

/// One line that a container's configuration must have, but for the number of a `devN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// What it is for, in words that stay the same when its numbers change.
    pub what: String,
    pub kind: LineKind,
    pub value: String,
}

impl Need {
    /// The node or directory, which has the same path on the host and in the container; none for a rule.
    pub fn path(&self) -> Option<String> {
        match self.kind {
            LineKind::Rule => None,
            LineKind::Mount => self.value.split_whitespace().next().map(str::to_string),
            LineKind::Dev => self.value.split(',').next().map(str::to_string),
        }
    }

    /// A directory of nodes as the nodes that are in it.
    pub fn by_node(self, facts: &Facts) -> Vec<Need> {
        let names = facts.caps.iter().flat_map(|(_, names)| names);
        match self.path() {
            Some(path) if path == CAPS => names.map(|name| mount(name, &format!("{CAPS}/{name}"), "file")).collect(),
            _ => vec![self],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    /// `lxc.cgroup2.devices.allow`
    Rule,
    /// `lxc.mount.entry`
    Mount,
    /// `devN`, which needs no rule beside it.
    Dev,
}

impl LineKind {
    /// Of a key as it stands in a configuration; none when it is no line of ours.
    pub fn of(key: &str) -> Option<LineKind> {
        match key {
            "lxc.cgroup2.devices.allow" => Some(LineKind::Rule),
            "lxc.mount.entry" => Some(LineKind::Mount),
            _ => {
                let digits = key.strip_prefix("dev")?;
                (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then_some(LineKind::Dev)
            }
        }
    }
}

/// In the order in which they are written.
pub fn needs(facts: &Facts, style: Style, dri: bool) -> Vec<Need> {
    match style {
        Style::Mount => {
            let mut needs = rules(facts, dri);
            needs.extend(mounts(facts, dri));
            needs
        }
        Style::Dev => devs(facts, dri),
    }
}

fn need(what: impl Into<String>, kind: LineKind, value: String) -> Need {
    Need { what: what.into(), kind, value }
}

/// Where a container has some of the host's GPUs, the others stay out of its reach.
fn rules(facts: &Facts, dri: bool) -> Vec<Need> {
    let rule = |what: &str, number: String| need(what, LineKind::Rule, format!("c {number} rwm"));
    let mut rules = Vec::new();
    if facts.are_all {
        rules.push(rule("nvidia", format!("{NVIDIA_MAJOR}:*")));
    } else {
        rules.extend(facts.gpus.iter().map(|gpu| rule(&gpu.slot.to_string(), format!("{NVIDIA_MAJOR}:{}", gpu.minor))));
        rules.push(rule("nvidiactl", format!("{NVIDIA_MAJOR}:{CONTROL_MINOR}")));
        rules.push(rule("nvidia-modeset", format!("{NVIDIA_MAJOR}:{MODESET_MINOR}")));
    }
    rules.extend(facts.uvm.map(|major| rule("nvidia-uvm", format!("{major}:*"))));
    rules.extend(facts.caps.as_ref().map(|(major, _)| rule("nvidia-caps", format!("{major}:*"))));
    rules.extend(drm_nodes(facts, dri).map(|node| rule(&node.what, node.number.to_string())));
    rules
}

fn mount(what: &str, path: &str, kind: &str) -> Need {
    let target = path.trim_start_matches('/');
    need(what, LineKind::Mount, format!("{path} {target} none bind,optional,create={kind}"))
}

fn mounts(facts: &Facts, dri: bool) -> Vec<Need> {
    let mut mounts: Vec<Need> = facts
        .gpus
        .iter()
        .map(|gpu| mount(&gpu.slot.to_string(), &format!("/dev/nvidia{}", gpu.minor), "file"))
        .chain(SHARED.iter().map(|name| mount(name, &format!("/dev/{name}"), "file")))
        .collect();
    if facts.caps.is_some() {
        mounts.push(mount("nvidia-caps", CAPS, "dir"));
    }
    mounts.extend(drm_nodes(facts, dri).map(|node| mount(&node.what, &node.path, "file")));
    mounts
}

/// Nodes that all GPUs share.
const SHARED: [&str; 4] = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"];

/// Only what is there: Proxmox refuses to start a container while one of its devices is missing.
fn devs(facts: &Facts, dri: bool) -> Vec<Need> {
    let dev = |what: &str, path: &str, mode: u32| need(what, LineKind::Dev, format!("{path},mode={mode:04o}"));
    let mode = facts.mode & 0o777;
    let mut devs: Vec<Need> =
        facts.gpus.iter().map(|gpu| dev(&gpu.slot.to_string(), &format!("/dev/nvidia{}", gpu.minor), mode)).collect();
    let shared = SHARED.iter().filter(|name| **name != "nvidia-modeset" || facts.has_modeset);
    devs.extend(shared.map(|name| dev(name, &format!("/dev/{name}"), mode)));
    for name in facts.caps.iter().flat_map(|(_, names)| names) {
        let mode = if name == CAP_OF_ADMINISTRATOR { 0o400 } else { 0o444 };
        devs.push(dev(name, &format!("{CAPS}/{name}"), mode));
    }
    devs.extend(drm_nodes(facts, dri).map(|node| dev(&node.what, &node.path, mode)));
    devs
}

struct DrmNode {
    what: String,
    path: String,
    number: DeviceNumber,
}

fn drm_nodes(facts: &Facts, dri: bool) -> impl Iterator<Item = DrmNode> {
    let gpus = if dri { facts.gpus.as_slice() } else { &[] };
    gpus.iter().flat_map(|gpu| {
        gpu.drm.iter().map(|(name, number)| {
            let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
            DrmNode { what: format!("{} {kind}", gpu.slot), path: format!("/dev/dri/{name}"), number: *number }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let number = |minor| DeviceNumber { major: 226, minor };
        let drm = vec![("card1".to_string(), number(1)), ("renderD129".to_string(), number(129))];
        Facts {
            gpus: vec![Gpu { slot: "0000:01:00".parse().unwrap(), minor: 0, drm }],
            are_all: true,
            uvm: Some(511),
            has_modeset: true,
            caps: None,
            mode: 0o666,
        }
    }

    fn values(facts: &Facts, style: Style, dri: bool) -> Vec<String> {
        needs(facts, style, dri).into_iter().map(|need| need.value).collect()
    }

    fn entry(name: &str) -> String {
        format!("/dev/{name} dev/{name} none bind,optional,create=file")
    }

    #[test]
    fn the_only_gpu() {
        let mounts = ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"].map(entry);
        let rules = ["c 195:* rwm", "c 511:* rwm"].map(String::from);
        assert_eq!(values(&facts(), Style::Mount, false), [&rules[..], &mounts[..]].concat());
    }

    #[test]
    fn one_of_several_leaves_the_others_out_of_reach() {
        let mut facts = Facts { are_all: false, ..facts() };
        facts.gpus[0].minor = 1;
        let values = values(&facts, Style::Mount, false);
        assert_eq!(values[..4], ["c 195:1 rwm", "c 195:255 rwm", "c 195:254 rwm", "c 511:* rwm"]);
        assert_eq!(values[4], entry("nvidia1"));
        assert!(!values.contains(&entry("nvidia0")));
    }

    #[test]
    fn the_nodes_for_drawing() {
        let with = values(&facts(), Style::Mount, true);
        let without = values(&facts(), Style::Mount, false);
        let more: Vec<&String> = with.iter().filter(|value| !without.contains(value)).collect();
        assert_eq!(more, ["c 226:1 rwm", "c 226:129 rwm", &entry("dri/card1"), &entry("dri/renderD129")]);
        assert_eq!(
            values(&facts(), Style::Dev, true)[5..],
            ["/dev/dri/card1,mode=0666", "/dev/dri/renderD129,mode=0666"]
        );
    }

    #[test]
    fn capabilities_where_the_driver_has_them() {
        let nodes = vec!["nvidia-cap1".to_string(), "nvidia-cap2".to_string()];
        let facts = Facts { caps: Some((236, nodes)), ..facts() };
        let values = |style| values(&facts, style, false);
        assert_eq!(values(Style::Mount)[2], "c 236:* rwm");
        let directory = "/dev/nvidia-caps dev/nvidia-caps none bind,optional,create=dir";
        assert_eq!(values(Style::Mount).last().unwrap(), directory);
        assert_eq!(
            values(Style::Dev)[5..],
            ["/dev/nvidia-caps/nvidia-cap1,mode=0400", "/dev/nvidia-caps/nvidia-cap2,mode=0444"]
        );
    }

    #[test]
    fn devices_are_those_that_are_there() {
        let facts = Facts { has_modeset: false, mode: 0o100660, ..facts() };
        let paths = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"];
        assert_eq!(values(&facts, Style::Dev, false), paths.map(|path| format!("{path},mode=0660")));
    }

    #[test]
    fn what_a_line_is_for_does_not_depend_on_numbers() {
        let mut later = Facts { uvm: Some(509), ..facts() };
        later.gpus[0].minor = 3;
        later.gpus[0].drm[0] = ("card0".to_string(), DeviceNumber { major: 226, minor: 0 });
        for style in [Style::Mount, Style::Dev] {
            let what = |facts: &Facts| -> Vec<_> {
                needs(facts, style, true).into_iter().map(|need| (need.what, need.kind == LineKind::Rule)).collect()
            };
            assert_eq!(what(&facts()), what(&later));
        }
    }

    #[test]
    fn the_kind_of_a_line() {
        assert_eq!(LineKind::of("dev0"), Some(LineKind::Dev));
        assert_eq!(LineKind::of("lxc.mount.entry"), Some(LineKind::Mount));
        for other in ["dev", "dev0x", "lxc.mount.auto", "lxc.cgroup2.devices.deny", "rootfs"] {
            assert_eq!(LineKind::of(other), None, "{other}");
        }
    }
}
