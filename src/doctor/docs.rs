//! docs/findings.md and the manual's section are what the table of checks says. `UPDATE=1 cargo test --lib doctor` writes
//! both anew.

use super::AREAS;
use super::finding::Check;
use std::{env, fs};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/findings.md");
const MANUAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/man/gpu-handoff.8");
const BEGIN: &str = ".\\\" Findings begin: written by cargo test, see src/doctor/docs.rs.\n";
const END: &str = ".\\\" Findings end.\n";

const HEAD: &str = "# What gpu-handoff doctor finds

<!-- Written by cargo test from the table in src/doctor: change it there. -->

    gpu-handoff doctor                        # all of the host
    gpu-handoff doctor 111                    # one VM or container
    gpu-handoff doctor --explain iommu-off    # this page, one finding at a time
    gpu-handoff doctor --fix --dry-run        # what of it would be put right by itself
    gpu-handoff doctor --report               # all that a helper would ask for, without addresses and names of the network

It changes nothing but with `--fix`, and writes a file only where `--to` names one that is not there yet. It ends with 1 when there is an error; warnings and notes are success. An id stays the
same from version to version. An **error** is what fails, or what nobody can have meant; a **warning** is what will fail, or
does under some circumstances; a **note** is worth knowing. Where something matters less than its kind does it is told as less.

Containers that run and have a GPU are looked into, which takes about a second each; all else takes milliseconds. Ask as root:
others may not read the guests' configurations.

With `--json` there is one object: `schema` (1), `version`, `proxmox` (whether this is a Proxmox host), `gpus` (the slots of the
host's NVIDIA GPUs), `guest` (the one that was asked about, or null), `findings`, and how many `errors`, `warnings` and `notes`
there are. A finding has `id`, `severity`, `guest` (or null), `place` (a file with the line, or a path in sysfs), `found`,
`why`, `remedy` (what to type or to edit) and `fix` (whether `--fix` does it). Fields may be added, never changed.
";

/// In lines of at most 125 columns, as the other pages.
fn wrapped(text: &str) -> String {
    let (mut lines, mut line) = (String::new(), String::new());
    for word in text.split(' ') {
        if !line.is_empty() && line.len() + 1 + word.len() > 125 {
            lines.push_str(&line);
            lines.push('\n');
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines + &line
}

fn page() -> String {
    let check = |check: &Check| {
        let mut title = check.title.to_string();
        title[..1].make_ascii_uppercase();
        let text = wrapped(&format!("**{}**: {title}. {} {}", check.severity, check.why, check.more));
        format!("\n### {}\n\n{text}\n", check.id)
    };
    let area = |area: &&super::Area| {
        let checks: String = area.checks.iter().map(check).collect();
        format!("\n## {}\n{checks}", area.title)
    };
    HEAD.to_string() + &AREAS.iter().map(area).collect::<String>()
}

fn section() -> String {
    let check = |check: &Check| format!(".It Li {}\n{}\n({}).\n", check.id, check.title, check.severity);
    let area = |area: &&super::Area| {
        let checks: String = area.checks.iter().map(check).collect();
        format!(".Ss {}\n.Bl -tag -width Ds -compact\n{checks}.El\n", area.title)
    };
    AREAS.iter().map(area).collect()
}

/// The file as it is to be.
fn compared(path: &str, wanted: &str) {
    if env::var_os("UPDATE").is_some() {
        fs::write(path, wanted).unwrap();
    }
    let is = fs::read_to_string(path).unwrap_or_default();
    assert!(is == wanted, "{path} is not what the table of checks says: UPDATE=1 cargo test --lib doctor");
}

#[test]
fn the_page_says_what_the_table_says() {
    compared(PAGE, &page());
}

#[test]
fn the_manual_says_what_the_table_says() {
    let manual = fs::read_to_string(MANUAL).unwrap();
    let (before, rest) = manual.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    compared(MANUAL, &[before, BEGIN, &section(), END, after].concat());
}
