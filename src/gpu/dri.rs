//! The names of the GPUs' nodes in /dev/dri.
//!
//! Before 580.105.08 nvidia_drm makes DRM devices only when it is loaded: one for each GPU that nvidia has by then, in the
//! order in which nvidia got them (seen on 550.163.01). So a card may come home without its nodes, and those of the cards
//! that stayed may get other names. Loading nvidia_drm anew makes what is missing; only loading nvidia anew as well, which
//! takes the cards by address, gives all of them the names they had after the boot.

use super::inventory::{functions_of_driver, unbound_gpus};
use super::{nodes, nvidia, usage};
use crate::address::Address;
use crate::sorted;
use crate::sys::Kernel;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const MODULE: &str = "nvidia_drm";

/// By GPU that nvidia has, the names of its nodes: `card0`, `renderD128`.
pub type Names = BTreeMap<Address, Vec<String>>;

/// As a file of ours has them.
pub fn to_json(names: &Names) -> Value {
    let mut all = Map::new();
    for (card, names) in names {
        all.insert(card.to_string(), json!(names));
    }
    Value::Object(all)
}

/// What is not understood is left out.
pub fn from_json(value: &Value) -> Names {
    let names = |names: &Value| Some(names.as_array()?.iter().filter_map(|n| Some(n.as_str()?.to_string())).collect());
    let cards = value.as_object().into_iter().flatten();
    sorted::map(cards.filter_map(|(address, value)| Some((address.parse().ok()?, names(value)?))))
}

/// None while no nvidia_drm is loaded that makes DRM devices only then.
pub fn names(kernel: &dyn Kernel) -> Option<Names> {
    let looks_once = nvidia::version(kernel).is_some_and(nvidia::Version::drm_looks_once);
    if !looks_once || !kernel.exists(&format!("/sys/module/{MODULE}")) {
        return None;
    }
    let named = |address: Address| {
        let paths = nodes::drm_of(kernel, address).into_iter().map(|(path, _)| path);
        let names = paths.filter_map(|path| Some(path.rsplit_once('/')?.1.to_string())).collect();
        (address, names)
    };
    Some(sorted::map(functions_of_driver(kernel, "nvidia").into_iter().map(named)))
}

/// What must be loaded anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anew {
    /// nvidia_drm.
    Drm,
    /// The driver's whole stack.
    Stack,
}

/// Who uses what would have to be loaded anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    pub drm: bool,
    pub stack: bool,
}

/// What has to be loaded anew, and may be, so that the cards have the nodes that they had.
pub fn anew(before: &Names, now: &Names, idle: Idle) -> Option<Anew> {
    if differences(before, now).is_empty() {
        return None;
    }
    // As long as one is away the others cannot have their names.
    if idle.stack && are_all_here(before, now) {
        return Some(Anew::Stack);
    }
    let lacks = |(address, names): (&Address, &Vec<String>)| !names.is_empty() && now.get(address) == Some(&Vec::new());
    (idle.drm && before.iter().any(lacks)).then_some(Anew::Drm)
}

/// The GPUs that have other nodes than they had, or none; not those that are away.
pub fn differences(before: &Names, now: &Names) -> Vec<Address> {
    let differs = |(address, names): &(&Address, &Vec<String>)| now.get(*address).is_some_and(|is| is != *names);
    before.iter().filter(differs).map(|(address, _)| *address).collect()
}

pub fn are_all_here(before: &Names, now: &Names) -> bool {
    before.keys().all(|address| now.contains_key(address))
}

/// The modules that are to be unloaded for that, in their order.
pub fn modules(kernel: &dyn Kernel, anew: Anew) -> Vec<String> {
    match anew {
        Anew::Drm => vec![MODULE.to_string()],
        Anew::Stack => nvidia::unload_order(kernel, "nvidia").unwrap_or_default(),
    }
}

/// Of the stack not when that would wait for somebody, or take a card that has no driver.
pub fn idle(kernel: &dyn Kernel, now: &Names) -> Idle {
    let order = nvidia::unload_order(kernel, "nvidia").ok();
    // A card that the driver lists and that is not bound to it is stuck on its way out.
    let has_stuck =
        kernel.list(nvidia::GPUS).iter().any(|name| name.parse().map_or(true, |card| !now.contains_key(&card)));
    Idle {
        drm: !has_stuck && usage::references(kernel, MODULE) == Some(0),
        stack: !has_stuck
            && order.is_some_and(|modules| usage::are_idle(kernel, &modules))
            && unbound_gpus(kernel).is_empty(),
    }
}

/// For a message: what it has, what it had.
pub fn in_words(before: &Names, now: &Names, address: Address) -> String {
    let names = |of: &Names| of.get(&address).filter(|names| !names.is_empty()).map(|names| names.join(" "));
    let had = names(before).unwrap_or_else(|| "nothing".to_string());
    match names(now) {
        Some(has) => format!("{address} has {has} in /dev/dri, where it had {had}"),
        None => format!("{address} has no nodes in /dev/dri, where it had {had}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYBODY: Idle = Idle { drm: true, stack: true };

    const A: &str = "0000:01:00.0";
    const B: &str = "0000:02:00.0";
    const C: &str = "0000:03:00.0";

    fn of(cards: &[(&str, &str)]) -> Names {
        let names = |text: &str| text.split_whitespace().map(str::to_string).collect();
        cards.iter().map(|(address, text)| (address.parse().unwrap(), names(text))).collect()
    }

    #[test]
    fn what_is_loaded_anew() {
        let before = of(&[(A, "card0 renderD128"), (B, "card1 renderD129"), (C, "")]);
        let lost = of(&[(A, ""), (B, "card1 renderD129"), (C, "")]);
        let swapped = of(&[(A, "card1 renderD129"), (B, "card0 renderD128"), (C, "")]);
        let alone = of(&[(B, "card0 renderD128"), (C, "")]);
        let lost_alone = of(&[(B, ""), (C, "")]);
        assert_eq!(anew(&before, &before, EVERYBODY), None);
        assert_eq!(anew(&before, &lost, EVERYBODY), Some(Anew::Stack));
        assert_eq!(anew(&before, &lost, Idle { stack: false, ..EVERYBODY }), Some(Anew::Drm));
        assert_eq!(anew(&before, &lost, Idle { stack: false, drm: false }), None);
        assert_eq!(anew(&before, &swapped, EVERYBODY), Some(Anew::Stack));
        assert_eq!(anew(&before, &swapped, Idle { stack: false, ..EVERYBODY }), None, "it would not help");
        assert_eq!(anew(&before, &alone, EVERYBODY), None, "the other is away");
        assert_eq!(anew(&before, &lost_alone, EVERYBODY), Some(Anew::Drm));
    }

    #[test]
    fn in_words_for_people() {
        let before = of(&[(A, "card0 renderD128")]);
        assert_eq!(
            in_words(&before, &of(&[(A, "")]), A.parse().unwrap()),
            "0000:01:00.0 has no nodes in /dev/dri, where it had card0 renderD128"
        );
        let moved = of(&[(A, "card1 renderD129")]);
        assert_eq!(
            in_words(&before, &moved, A.parse().unwrap()),
            "0000:01:00.0 has card1 renderD129 in /dev/dri, where it had card0 renderD128"
        );
    }
}
