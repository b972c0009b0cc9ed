//! udev's rules: those that give a card to vfio-pci, or remove it, when it appears.
//!
//! The rules are followed for each function as udev does, as far as the keys go that can be known beforehand; of the
//! others it is assumed that they fit.

use super::cause::{Cause, Effect, take_out};
use super::facts::{Facts, Function, RuleFile as File};
use super::{glob, ids, scripts};
use crate::modprobe::{files, logical_lines};
use crate::sys::Kernel;
use std::collections::BTreeMap;

const DIRECTORIES: [&str; 5] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
];

/// Where a program is that a rule names without a path.
const PROGRAMS: [&str; 2] = ["/usr/lib/udev", "/lib/udev"];

pub fn read(kernel: &dyn Kernel) -> Vec<File> {
    let paths = files(kernel, &DIRECTORIES, &[".rules"]);
    // Most are about something else. driverctl's own act on its overrides, which are told of one by one.
    let is_about = |text: &str| {
        ["vfio", "driver_override", "remove}", "10de", "10DE", "pci"].iter().any(|word| text.contains(word))
    };
    let read = |path: String| {
        let text = kernel.text(&path).filter(|text| is_about(text) && !path.contains("driverctl"))?;
        let mut programs = BTreeMap::new();
        let parsed: Vec<Item> = logical_lines(&text).iter().flat_map(|(_, _, line)| items(line)).collect();
        for item in parsed
            .iter()
            .filter(|item| item.key.starts_with("RUN") || item.key.starts_with("IMPORT") || item.key == "PROGRAM")
        {
            let Some(word) = item.value.split_whitespace().next() else { continue };
            let places = PROGRAMS.iter().map(|folder| format!("{folder}/{word}"));
            let mut places = places.chain(word.starts_with('/').then(|| word.to_string()));
            if let Some(script) = places.find_map(|path| kernel.text(&path).filter(|text| text.starts_with("#!"))) {
                programs.insert(word.to_string(), script);
            }
        }
        Some(File { path, text, programs })
    };
    paths.into_iter().filter_map(read).collect()
}

/// `ATTR{vendor}=="0x10de"`
#[derive(Debug, PartialEq, Eq)]
struct Item {
    key: String,
    operator: &'static str,
    value: String,
}

fn items(line: &str) -> Vec<Item> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((key, after)) = rest.split_once('"') {
        let Some((value, after)) = after.split_once('"') else { break };
        rest = after;
        let key = key.trim_start_matches([',', ' ', '\t']).trim_end();
        let operator = ["==", "!=", "+=", "-=", ":=", "="].into_iter().find(|operator| key.ends_with(operator));
        let Some(operator) = operator else { continue };
        // `e"…"` has escapes, `i"…"` minds no case; neither matters here.
        let key = key[..key.len() - operator.len()].trim_end();
        found.push(Item { key: key.to_string(), operator, value: value.to_string() });
    }
    found
}

pub fn find(facts: &Facts) -> Vec<Cause> {
    let mut found: Vec<Cause> = Vec::new();
    let mut add = |causes: Vec<Cause>| {
        for cause in causes {
            if !found.iter().any(|other| other.place == cause.place) {
                found.push(cause);
            }
        }
    };
    for function in &facts.functions {
        add(follow(&facts.rules, function, facts));
    }
    if !facts.has_card {
        // It may be that there is one that a rule removes: any that NVIDIA makes.
        for class in [0x03_0000, 0x03_0200] {
            let mut causes = follow(&facts.rules, &unseen(class), facts);
            causes.retain(|cause| cause.effect == Effect::Removes);
            add(causes);
        }
    }
    found
}

fn unseen(class: u32) -> Function {
    let ids = (0x10de, 0, 0, 0);
    let modalias = String::new();
    Function { address: None, vendor: ids.0, device: ids.1, subvendor: ids.2, subdevice: ids.3, class, modalias }
}

/// Goes through all rules for one function that appears.
fn follow(files: &[File], function: &Function, facts: &Facts) -> Vec<Cause> {
    let mut found = Vec::new();
    // What rules have set so far.
    let (mut tags, mut environment): (Vec<String>, BTreeMap<String, String>) = (Vec::new(), BTreeMap::new());
    for file in files {
        let mut label: Option<String> = None;
        for (first, last, line) in logical_lines(&file.text) {
            let items = items(&line);
            if let Some(wanted) = &label {
                if !items.iter().any(|item| item.key == "LABEL" && item.value == *wanted) {
                    continue;
                }
                label = None;
            }
            if !items.iter().all(|item| fits(item, function, &tags, &environment)) {
                continue;
            }
            for item in items.iter().filter(|item| !matches!(item.operator, "==" | "!=")) {
                match (item.key.as_str(), item.operator) {
                    ("TAG", "+=" | "=") => tags.push(item.value.clone()),
                    ("GOTO", _) => label = Some(item.value.clone()),
                    (key, _) if key.starts_with("ENV{") => {
                        environment.insert(inner(key).to_string(), item.value.clone());
                    }
                    _ => {}
                }
                if let Some((effect, does)) = effect(item, function, file, facts) {
                    found.push(Cause {
                        id: "udev-rule",
                        effect,
                        place: format!("{}:{first}", file.path),
                        text: format!("{}{}\"{}\"", item.key, item.operator, item.value),
                        does,
                        remedy: take_out(&file.path, first, last),
                    });
                }
            }
        }
    }
    found
}

/// `vendor` of `ATTR{vendor}`.
fn inner(key: &str) -> &str {
    key.split_once('{').map_or("", |(_, rest)| rest.trim_end_matches('}'))
}

/// Whether a condition holds; what is none does.
fn fits(item: &Item, function: &Function, tags: &[String], environment: &BTreeMap<String, String>) -> bool {
    let is_equal = match item.operator {
        "==" => true,
        "!=" => false,
        _ => return true,
    };
    let hexadecimal = |value: u32, digits: usize| Some(format!("0x{value:0digits$x}"));
    let (unseen, address) = (function.address.is_none(), function.address.map(|address| address.to_string()));
    let known = match item.key.as_str() {
        "ACTION" => Some("add".to_string()),
        "SUBSYSTEM" | "SUBSYSTEMS" => Some("pci".to_string()),
        "KERNEL" => address,
        // One of its parents may have it: a bridge.
        "KERNELS" => address.filter(|address| item.value.contains(address)),
        "DRIVER" | "DRIVERS" => None,
        "TAG" | "TAGS" => return tags.iter().any(|tag| glob::any(&item.value, tag)) == is_equal,
        "ATTR{vendor}" | "ATTRS{vendor}" | "SYSFS{vendor}" => hexadecimal(function.vendor, 4),
        "ATTR{device}" | "ATTRS{device}" | "SYSFS{device}" => {
            if unseen {
                None
            } else {
                hexadecimal(function.device, 4)
            }
        }
        "ATTR{subsystem_vendor}" | "ATTRS{subsystem_vendor}" if !unseen => hexadecimal(function.subvendor, 4),
        "ATTR{subsystem_device}" | "ATTRS{subsystem_device}" if !unseen => hexadecimal(function.subdevice, 4),
        "ATTR{class}" | "ATTRS{class}" => hexadecimal(function.class, 6),
        "ENV{PCI_CLASS}" => Some(format!("{:X}", function.class)),
        "ENV{PCI_ID}" if !unseen => Some(format!("{:04X}:{:04X}", function.vendor, function.device)),
        "ENV{PCI_SLOT_NAME}" if !unseen => address,
        "ENV{MODALIAS}" if !unseen => Some(function.modalias.clone()),
        key if key.starts_with("ENV{") && !key.starts_with("ENV{PCI_") && !key.starts_with("ENV{MODALIAS") => {
            // What no rule has set so far is unset.
            Some(environment.get(inner(key)).cloned().unwrap_or_default())
        }
        _ => None,
    };
    known.is_none_or(|known| glob::any(&item.value.to_ascii_lowercase(), &known.to_ascii_lowercase()) == is_equal)
}

/// What an assignment does to the card.
fn effect(item: &Item, function: &Function, file: &File, facts: &Facts) -> Option<(Effect, String)> {
    let name = function.address.map_or_else(|| "an NVIDIA card".to_string(), |address| address.to_string());
    let value = item.value.trim();
    match item.key.as_str() {
        "ATTR{driver_override}" if !value.is_empty() && !facts.needs(value) => {
            let is_gpus = function.is_gpu() || ids::is_keeper(value);
            is_gpus.then(|| (Effect::Takes, format!("gives {name} to {value} when it appears")))
        }
        "ATTR{remove}" if value == "1" => Some((Effect::Removes, format!("has the kernel forget {name} at once"))),
        key if key.starts_with("RUN") || key == "PROGRAM" || key.starts_with("IMPORT{program}") => {
            let word = value.split_whitespace().next().unwrap_or_default();
            if word.ends_with("/gpu-handoff") {
                return None;
            }
            // The rule has named the device already.
            let is_bound = |text: &str| {
                text.contains("vfio")
                    && ["driver_override", "new_id", "vfio-pci/bind", "driverctl"].iter().any(|one| text.contains(one))
            };
            let by_script = file.programs.get(word).is_some_and(|text| {
                text.lines().any(|line| is_bound(line) && !line.trim_start().starts_with('#'))
                    || scripts::binds(text, std::slice::from_ref(function)).is_some()
            });
            if is_bound(value) || by_script {
                return Some((Effect::Takes, format!("gives {name} to vfio-pci when it appears")));
            }
            let removes = value.contains("/remove") && value.contains("echo");
            removes.then(|| (Effect::Removes, format!("has the kernel forget {name} at once")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    fn places(rules: &str, facts: Facts) -> Vec<(Effect, String)> {
        let file = File { path: "/etc/udev/rules.d/x.rules".into(), text: rules.into(), programs: BTreeMap::new() };
        let causes = find(&Facts { rules: vec![file], ..facts });
        causes.into_iter().map(|one| (one.effect, one.place.rsplit(':').next().unwrap().to_string())).collect()
    }

    #[test]
    fn rules_that_take_the_card_or_remove_it() {
        for (rules, effect, line) in [
            ("SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", ATTR{driver_override}=\"vfio-pci\"\n", Effect::Takes, "1"),
            (
                "# x\nACTION==\"add|change\", KERNEL==\"0000:01:00.*\", \\\n ATTR{driver_override}:=\"vfio-pci\"",
                Effect::Takes,
                "2",
            ),
            (
                "ACTION==\"add\", SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x03[0-9]*\", ATTR{remove}=\"1\"",
                Effect::Removes,
                "1",
            ),
            (
                "ACTION!=\"add\", GOTO=\"end\"\nATTR{vendor}==\"0x10DE\", ATTR{device}==\"0x2684\", TAG=\"mine\"\n\
                 TAG==\"mine\", RUN+=\"/bin/sh -c 'echo vfio-pci >/sys$devpath/driver_override'\"\nLABEL=\"end\"\n",
                Effect::Takes,
                "3",
            ),
            (
                "ENV{PCI_ID}==\"10DE:2684\", RUN+=\"/usr/sbin/driverctl set-override $kernel vfio-pci\"",
                Effect::Takes,
                "1",
            ),
        ] {
            assert_eq!(places(rules, facts()), [(effect, line.to_string())], "{rules}");
        }
        for rules in [
            "SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", ATTR{driver_override}=\"vfio-pci\"",
            "SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x8086\", ATTR{remove}=\"1\"",
            "ACTION==\"remove\", ATTR{vendor}==\"0x10de\", ATTR{driver_override}=\"vfio-pci\"",
            "SUBSYSTEM!=\"pci\", GOTO=\"in\"\nGOTO=\"out\"\nLABEL=\"in\"\nATTR{driver_override}=\"vfio-pci\"\nLABEL=\"out\"\n",
            "TAG==\"never-set\", ATTR{driver_override}=\"vfio-pci\"",
            "ENV{mine}==\"1\", ATTR{driver_override}=\"vfio-pci\"",
            "# SUBSYSTEM==\"pci\", ATTR{driver_override}=\"vfio-pci\"",
            "ATTR{vendor}==\"0x10de\", ATTR{power/control}=\"auto\"",
            "SUBSYSTEM==\"vfio\", OWNER=\"root\", GROUP=\"kvm\"",
            include_str!("../../udev/60-gpu-handoff.rules"),
        ] {
            assert!(places(rules, facts()).is_empty(), "{rules}");
        }
    }

    #[test]
    fn a_card_that_a_rule_removed_is_not_there_to_be_seen() {
        let none = || Facts { functions: Vec::new(), has_card: false, ..facts() };
        let remove = "SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x03[0-9]*\", ATTR{remove}=\"1\"";
        assert_eq!(places(remove, none()), [(Effect::Removes, "1".to_string())]);
        let audio = "SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x0c0330\", ATTR{remove}=\"1\"";
        assert!(places(audio, none()).is_empty());
        assert!(places("SUBSYSTEM==\"pci\", ATTR{driver_override}=\"vfio-pci\"", none()).is_empty());
    }

    #[test]
    fn keys_operators_and_values() {
        let parsed = items("ACTION!=\"add\",  ATTR{a}==\"b, c\", RUN{builtin}+=\"kmod load\"");
        let told: Vec<_> = parsed.iter().map(|one| (one.key.as_str(), one.operator, one.value.as_str())).collect();
        assert_eq!(told, [("ACTION", "!=", "add"), ("ATTR{a}", "==", "b, c"), ("RUN{builtin}", "+=", "kmod load")]);
    }
}
