//! Which functions a list of ids is about, and which drivers only keep them.

use super::facts::Function;
use crate::address::list;
use crate::modprobe::module;

/// What a list of ids has left without those that are a function's here, and the functions.
pub fn split_ids<'a>(list: &str, functions: &'a [Function]) -> (Vec<&'a Function>, String) {
    let (mut taken, mut rest) = (Vec::new(), Vec::new());
    for entry in list.trim_matches('"').split(',') {
        let fitting: Vec<&Function> = functions.iter().filter(|function| is_of(entry, function)).collect();
        if fitting.is_empty() {
            rest.push(entry);
        }
        taken.extend(fitting);
    }
    taken.dedup();
    (taken, rest.join(","))
}

/// `vendor:device[:subvendor[:subdevice[:class[:mask]]]]`, each of which may be ffffffff for any (vfio_pci_fill_ids and
/// pci_match_one_device in the kernel).
fn is_of(entry: &str, function: &Function) -> bool {
    const ANY: u32 = u32::MAX;
    let parts: Option<Vec<u32>> =
        entry.split(':').map(|part| u32::from_str_radix(part.trim().trim_start_matches("0x"), 16).ok()).collect();
    let Some(parts) = parts.filter(|parts| parts.len() >= 2) else { return false };
    let part = |at: usize, default: u32| parts.get(at).copied().unwrap_or(default);
    let fits = |at: usize, value: u32| part(at, ANY) == ANY || part(at, ANY) == value;
    let is_class = (function.class ^ part(4, 0)) & part(5, 0) == 0;
    fits(0, function.vendor)
        && fits(1, function.device)
        && fits(2, function.subvendor)
        && fits(3, function.subdevice)
        && is_class
}

/// The addresses of functions, as one text.
pub fn addresses(functions: &[&Function]) -> String {
    list(functions.iter().filter_map(|function| function.address))
}

/// A driver that has no other purpose than to keep a card for somebody else.
pub fn is_keeper(name: &str) -> bool {
    matches!(module(name).as_str(), "vfio_pci" | "pci_stub" | "xen_pciback")
}
