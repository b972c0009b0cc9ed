//! modprobe's files: what contradicts, hides or is not read at all.

use super::facts::Facts;
use super::finding::{Area, Check, Hit, Severity};
use crate::causes::take_out;
use crate::modprobe::{Line, module};
use std::collections::BTreeSet;

pub const AREA: Area = Area {
    title: "What modprobe is told",
    checks: &[
        Check {
            id: "options-contradict",
            severity: Severity::Warning,
            title: "two places give one option of a module different values",
            why: "Only the last one counts, which may not be the one that was meant.",
            more: "modprobe reads the files of all its directories in the order of their names, and the kernel's command line \
                   after them. Modules of NVIDIA's, nouveau and vfio are looked at.",
            find: options_contradict,
        },
        Check {
            id: "modprobe-not-read",
            severity: Severity::Warning,
            title: "a file in /etc/modprobe.d whose name modprobe does not look at",
            why: "What it says has no effect: only names that end in .conf count.",
            more: "Files that name NVIDIA's modules, nouveau or vfio are told; it may well be that nothing of them is wanted any \
                   more.",
            find: not_read,
        },
        Check {
            id: "modprobe-hidden",
            severity: Severity::Note,
            title: "a file in /etc/modprobe.d hides a package's of the same name",
            why: "Of files with one name only the first counts, so nothing that the package's says is in force.",
            more: "Also where the one in /etc is empty or a link to /dev/null, which may be just what was wanted.",
            find: hidden,
        },
        Check {
            id: "modprobe-renamed",
            severity: Severity::Warning,
            title: "Proxmox's blacklist was given another name",
            why: "The next upgrade of pve-manager puts its own beside it, and what was changed in one is undone by the other.",
            more: "pve-blacklist.conf belongs to pve-manager. What you want beside it goes into a file of your own.",
            find: renamed,
        },
    ],
};

/// `options nvidia_drm modeset=1`, or `nvidia-drm.modeset=1` on the command line.
struct Option {
    module: String,
    name: String,
    value: String,
    place: String,
    remedy: String,
}

fn is_about(module: &str) -> bool {
    ["nvidia", "nouveau", "nova", "vfio"].iter().any(|start| module.starts_with(start))
}

fn options_contradict(facts: &Facts) -> Vec<Hit> {
    let mut all: Vec<Option> = facts.host.directives.iter().flat_map(options_of).collect();
    all.extend(super::boot::words(&facts.host, &|word| word.contains('.') && word.contains('=')).iter().filter_map(
        |word| {
            let (key, value) = word.word.split_once('=')?;
            let (name, parameter) = key.split_once('.')?;
            let is_it = word.is_booted && is_about(&module(name));
            is_it.then(|| Option {
                module: module(name),
                name: parameter.to_string(),
                value: value.to_string(),
                place: word.place.clone(),
                remedy: word.without(""),
            })
        },
    ));
    let mut found: Vec<Hit> = Vec::new();
    for (at, one) in all.iter().enumerate() {
        let last = all.iter().rfind(|other| other.module == one.module && other.name == one.name);
        let Some(last) = last.filter(|last| !is_same(&last.value, &one.value)) else { continue };
        // One of several alike is enough.
        if all.iter().take(at).any(|other| other.place == one.place && other.name == one.name) {
            continue;
        }
        let what = format!(
            "{} has {}={} here and {}={} in {}, which counts",
            one.module, one.name, one.value, last.name, last.value, last.place
        );
        found.push(Hit::at(&one.place, what, format!("if that is right: {}; else take out the other", one.remedy)));
    }
    found
}

/// As the kernel reads what is a number or a yes.
fn is_same(one: &str, other: &str) -> bool {
    let plain = |value: &str| match value.trim_matches('"') {
        "Y" | "y" | "1" => "1".to_string(),
        "N" | "n" | "0" => "0".to_string(),
        value => value.to_string(),
    };
    plain(one) == plain(other)
}

fn options_of(line: &Line) -> Vec<Option> {
    let ["options", name, options @ ..] = &line.words()[..] else { return Vec::new() };
    let name = module(name);
    if !is_about(&name) {
        return Vec::new();
    }
    let place = &line.place;
    let option = |text: &&str| {
        let (parameter, value) = text.split_once('=')?;
        Some(Option {
            module: name.clone(),
            name: parameter.to_string(),
            value: value.to_string(),
            place: place.to_string(),
            remedy: take_out(&place.path, place.first, place.last),
        })
    };
    options.iter().filter_map(option).collect()
}

fn not_read(facts: &Facts) -> Vec<Hit> {
    let mut found: Vec<Hit> = Vec::new();
    let mut told = BTreeSet::new();
    for line in &facts.host.unread {
        let path = &line.place.path;
        // One for each file, at its first line.
        if !told.insert(path) {
            continue;
        }
        let plain = path.split('.').next().unwrap_or(path);
        let remedy =
            format!("if it is to count: mv {path} {plain}.conf && update-initramfs -u -k all; else: rm {path}");
        found.push(Hit::at(
            line.place.to_string(),
            format!("{} is in a file that is not read", line.words.join(" ")),
            remedy,
        ));
    }
    found
}

fn hidden(facts: &Facts) -> Vec<Hit> {
    let hit = |(ours, theirs): &(String, String)| {
        Hit::at(
            ours,
            format!("it hides {theirs}"),
            format!("if that is not meant: mv {ours} {}-local.conf", ours.trim_end_matches(".conf")),
        )
    };
    facts.host.hidden.iter().map(hit).collect()
}

fn renamed(facts: &Facts) -> Vec<Hit> {
    facts.host.renamed.iter().map(|(path, trouble)| Hit::told(path, trouble)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yes_is_yes_however_it_is_written() {
        for (one, other, same) in
            [("1", "Y", true), ("0", "N", true), ("1", "0", false), ("\"1\"", "1", true), ("2", "1", false)]
        {
            assert_eq!(is_same(one, other), same, "{one} {other}");
        }
    }
}
