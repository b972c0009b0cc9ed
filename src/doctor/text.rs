//! Findings as they are told: to a person, and to programs.

use super::facts::Facts;
use super::finding::{Finding, Severity};
use serde_json::json;

const SCHEMA: u64 = 1;

fn count(findings: &[Finding], severity: Severity) -> usize {
    findings.iter().filter(|finding| finding.severity == severity).count()
}

/// What kind of host it is, where that explains that there is little to find.
fn about(facts: &Facts) -> String {
    let mut text = String::new();
    if !facts.is_proxmox {
        text.push_str("this is no Proxmox host: there is nothing in /etc/pve\n");
    }
    if !facts.is_root {
        text.push_str(
            "ask as root: others may not read the guests' configurations, the kernel's log and who uses a card\n",
        );
    }
    if facts.slots.is_empty() {
        text.push_str("no NVIDIA GPU in this host\n");
    }
    text
}

pub fn to_text(facts: &Facts, findings: &[Finding]) -> String {
    let mut text = if facts.only.is_none() { about(facts) } else { String::new() };
    for finding in findings {
        text.push_str(&finding.to_text());
    }
    let number = |severity: Severity, name: &str| match count(findings, severity) {
        0 => None,
        1 => Some(format!("1 {name}")),
        several => Some(format!("{several} {name}s")),
    };
    let numbers: Vec<String> = [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Note, "note")]
        .into_iter()
        .filter_map(|(severity, name)| number(severity, name))
        .collect();
    match findings.first() {
        None => text.push_str("nothing found\n"),
        Some(first) => {
            let id = first.check.id;
            text.push_str(&format!("{}; more of one: gpu-handoff doctor --explain {id}\n", numbers.join(", ")));
        }
    }
    if findings.iter().any(|finding| !finding.hit.repairs.is_empty()) {
        text.push_str("some of it can be put right by itself: gpu-handoff doctor --fix --dry-run\n");
    }
    text
}

pub fn to_json(facts: &Facts, findings: &[Finding]) -> serde_json::Value {
    json!({
        "schema": SCHEMA,
        "version": env!("CARGO_PKG_VERSION"),
        "proxmox": facts.is_proxmox,
        "gpus": facts.slots.iter().map(|slot| slot.id.to_string()).collect::<Vec<_>>(),
        "guest": facts.only,
        "findings": findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
        "errors": count(findings, Severity::Error),
        "warnings": count(findings, Severity::Warning),
        "notes": count(findings, Severity::Note),
    })
}
