//! `gpu-handoff doctor`: every known misconfiguration of the host, its guests and its containers, before a handoff fails of
//! it: where it stands, why it matters, and what puts it right.
//!
//! Facts are read once ([`facts`]); each check is a pure function of them, and a row of the one table ([`AREAS`]) that the
//! manual and docs/findings.md are made of.

mod away;
mod boot;
mod card;
mod cluster;
mod container;
#[cfg(test)]
mod docs;
mod driver;
mod facts;
mod files;
mod finding;
mod host;
mod ours;
mod redact;
mod repair;
mod report;
mod settings;
mod text;
mod vm;

use crate::App;
use crate::exit::{Exit, Result};
use crate::report::status::Status;
use crate::setup::hookscript;
use crate::sorted;
use facts::Facts;
use facts::guests::silent;
use finding::{Area, Check, Finding, Severity};
use serde_json::Value;

/// In the order in which they are told.
pub const AREAS: [&Area; 10] = [
    &host::AREA,
    &files::AREA,
    &away::AREA,
    &card::AREA,
    &driver::AREA,
    &vm::AREA,
    &settings::AREA,
    &container::AREA,
    &cluster::AREA,
    &ours::AREA,
];

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Of one guest alone.
    pub guest: Option<u32>,
    pub how: How,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    Tell {
        json: bool,
    },
    /// What there is to know of a finding, or `all`.
    Explain(String),
    Fix,
    /// All that a helper would ask for; into a file that is not there yet, or to standard output.
    Report {
        to: Option<String>,
    },
}

/// What is to be printed, and how the run ends.
///
/// # Errors
/// When there is no such guest or finding.
pub fn run(app: &App, wish: &Wish) -> Result<(String, Result<()>)> {
    if let How::Explain(id) = &wish.how {
        return Ok((explain(id)?, Ok(())));
    }
    let app = &silent(app);
    if let Some(id) = wish.guest {
        hookscript::find(app.kernel, id)?;
    }
    if wish.how == How::Fix {
        return repair::run(app, &|| find(&Facts::read(app, wish.guest)));
    }
    let facts = Facts::read(app, wish.guest);
    let findings = find(&facts);
    match &wish.how {
        How::Report { to } => report::run(app, &facts, &findings, to.as_deref()).map(|text| (text, Ok(()))),
        How::Tell { json: true } => Ok((format!("{}\n", text::to_json(&facts, &findings)), outcome(&findings))),
        How::Tell { json: false } | How::Explain(_) | How::Fix => {
            Ok((text::to_text(&facts, &findings), outcome(&findings)))
        }
    }
}

/// What `--fix` would do, a line each.
///
/// # Errors
/// When there is no such guest.
pub fn plan(app: &App, wish: &Wish) -> Result<String> {
    let app = &silent(app);
    if let Some(id) = wish.guest {
        hookscript::find(app.kernel, id)?;
    }
    Ok(repair::plan(find(&Facts::read(app, wish.guest))))
}

/// What files of this host show, as `--json` has it: quick, and nobody is asked anything.
pub fn in_files(app: &App, status: &Status) -> Vec<Value> {
    let app = &silent(app);
    find(&Facts::of(app, None, Some(status))).iter().map(Finding::to_json).collect()
}

fn checks() -> impl Iterator<Item = &'static Check> {
    AREAS.iter().flat_map(|area| area.checks)
}

/// Errors first; with a guest that was asked about, only what is about that one. Pure.
fn find(facts: &Facts) -> Vec<Finding> {
    let of = |check: &'static Check| (check.find)(facts).into_iter().map(move |hit| Finding::new(check, hit));
    let is_asked = |finding: &Finding| facts.only.is_none() || finding.hit.guest == facts.only;
    let mut findings: Vec<Finding> = checks().flat_map(of).filter(is_asked).collect();
    // Of those alike the order of the table stays.
    sorted::sort_by_key(&mut findings, |finding| finding.severity);
    findings
}

fn outcome(findings: &[Finding]) -> Result<()> {
    let mut ids: Vec<&str> =
        findings.iter().filter(|finding| finding.severity == Severity::Error).map(|finding| finding.check.id).collect();
    ids.dedup();
    if ids.is_empty() { Ok(()) } else { Err(Exit::failed(format!("not as it should be: {}", ids.join(", ")))) }
}

fn explain(id: &str) -> Result<String> {
    if id == "all" {
        let line = |check: &Check| format!("{:<28}{:<9}{}\n", check.id, check.severity.to_string(), check.title);
        let area = |area: &&Area| {
            let lines: String = area.checks.iter().map(line).collect();
            format!("{}\n{lines}", area.title)
        };
        return Ok(AREAS.iter().map(area).collect::<Vec<_>>().join("\n"));
    }
    let Some(check) = checks().find(|check| check.id == id) else {
        let id = id.escape_debug();
        return Err(Exit::usage(format!(
            "there is no finding {id}; those that there are: gpu-handoff doctor --explain all"
        )));
    };
    Ok(format!("{} ({}): {}\n\n{} {}\n", check.id, check.severity, check.title, check.why, check.more))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_check_has_an_id_of_its_own_and_says_something() {
        let mut seen = BTreeSet::new();
        for check in checks() {
            let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(check.id.chars().all(is_plain), "{}", check.id);
            assert!(check.id.len() < 28, "{}", check.id);
            assert!(seen.insert(check.id), "{} is there twice", check.id);
            assert!(check.why.ends_with('.') && check.more.ends_with('.'), "{}", check.id);
            assert!(!check.title.is_empty() && !check.title.ends_with('.'), "{}", check.id);
            assert!(explain(check.id).unwrap().contains(check.more));
        }
    }

    #[test]
    fn an_unknown_finding_is_answered_with_where_to_look() {
        let exit = explain("iommu").unwrap_err();
        assert_eq!(
            exit.to_string(),
            "there is no finding iommu; those that there are: gpu-handoff doctor --explain all"
        );
        assert!(explain("all").unwrap().contains("\niommu-off "));
    }
}
