//! What of our lines is in a configuration, and what of a container's needs is met there. Pure.

use super::line::Line;
use super::rules::{LineKind, Need};
use crate::gpu::containers::all_given;
use crate::proxmox::ct::{self, CtConfig};
use std::collections::BTreeSet;

/// Proxmox knows `dev0` to `dev255`.
const DEVICES: u64 = 256;

/// The same `devN`, the same target, or a rule for the same major.
pub(super) fn is_like(config: &CtConfig, line: &Line) -> bool {
    let word = |value: &str, at| value.split_whitespace().nth(at).map(str::to_string);
    match line.kind() {
        Some(LineKind::Dev) => config.dev.keys().any(|digits| line.key == format!("dev{digits}")),
        Some(LineKind::Mount) => config.mount_entries().any(|entry| word(entry, 1) == word(&line.value, 1)),
        Some(LineKind::Rule) => {
            let major = |rule: &str| word(rule, 1).and_then(|number| Some(number.split_once(':')?.0.to_string()));
            config.devices_allow().any(|rule| major(rule) == major(&line.value))
        }
        None => false,
    }
}

/// `devN` lines that Proxmox cannot read: it starts no container with one of them.
pub fn unreadable_devs(bytes: &[u8]) -> Vec<String> {
    let config = ct::parse(bytes);
    let odd = config.dev.iter().filter(|(_, dev)| dev.device.is_none());
    odd.map(|(digits, _)| format!("dev{digits}")).collect()
}

/// Needs that no line meets.
pub(super) fn missing<'a>(bytes: &[u8], needs: &'a [Need]) -> Vec<&'a Need> {
    let config = ct::parse_next(bytes);
    needs.iter().filter(|need| !is_met(&config, need)).collect()
}

pub(super) fn is_met(config: &CtConfig, need: &Need) -> bool {
    let Some(path) = need.path() else {
        let words = |text: &str| text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let wanted = words(&need.value);
        // They take effect in their order: what denies may take back what came before it.
        let after = config.raw_lxc.iter().rposition(|(key, _)| key == "lxc.cgroup2.devices.deny");
        let rules = config.raw_lxc.iter().skip(after.map_or(0, |at| at + 1));
        return rules.filter(|(key, _)| key == "lxc.cgroup2.devices.allow").any(|(_, rule)| words(rule) == wanted);
    };
    // In whatever way, and whatever the options are: a node that is given twice helps nobody.
    all_given(config)
        .any(|given| given.below(&path).is_some_and(|rest| rest.is_empty() || format!("{}{rest}", given.host) == path))
}

/// For each need the line that is to meet it: one that does so as it is, else one that is for the same.
pub(super) fn matches(lines: &[&Line], needs: &[&Need]) -> Vec<Option<usize>> {
    let mut matched: Vec<Option<usize>> = vec![None; needs.len()];
    for only_equal in [true, false] {
        for (at, need) in needs.iter().enumerate() {
            let fits = |line: &Line| line.is_for(need) && (!only_equal || line.value == need.value);
            let is_free = |index: usize| !matched.contains(&Some(index));
            let found = (0..).zip(lines).find(|(index, line)| is_free(*index) && fits(line)).map(|(index, _)| index);
            if let Some(place) = matched.get_mut(at).filter(|place| place.is_none()) {
                *place = found;
            }
        }
    }
    matched
}

/// Numbers for further devices: above the highest that is taken, and only then the gaps.
pub(super) struct Numbers {
    free: std::vec::IntoIter<u64>,
}

impl Numbers {
    pub(super) fn of(others: &[u8], ours: &[&Line]) -> Numbers {
        let mut taken: BTreeSet<u64> = ct::taken_dev(others);
        taken.extend(ours.iter().filter_map(|line| line.key.strip_prefix("dev")?.parse::<u64>().ok()));
        let above = taken.range(..DEVICES).next_back().map_or(0, |highest| highest + 1);
        let gaps = (0..above).filter(|number| !taken.contains(number));
        Numbers { free: (above..DEVICES).chain(gaps).collect::<Vec<_>>().into_iter() }
    }

    pub(super) fn next(&mut self) -> Option<u64> {
        self.free.next()
    }
}
