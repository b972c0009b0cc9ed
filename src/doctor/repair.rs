//! `--fix`: what is the program's own, missing nodes, and overrides and ids that are left over; nothing else.

use super::finding::{Finding, Repair};
use crate::App;
use crate::exit::{Exit, Result};
use crate::setup::hookscript::{LINK, PROGRAM};
use crate::sorted;
use crate::sys::ActError;
use std::time::Duration;

/// Each is one write, which is quick unless something hangs there.
const LIMIT: Duration = Duration::from_secs(5);

/// For whoever is just done with a card.
const TURN: Duration = Duration::from_secs(2);

/// What there is to do, a line each.
pub fn plan(findings: Vec<Finding>) -> String {
    let list = list(findings);
    match list.is_empty() {
        true => NOTHING.to_string(),
        false => list.iter().map(|repair| format!("{repair}\n")).collect(),
    }
}

const NOTHING: &str = "nothing to do: what is left is not for --fix, see gpu-handoff doctor\n";

/// The list, and whether all of it was done. `look` finds anew.
///
/// # Errors
/// When a card is changing hands.
pub fn run(app: &App, look: &dyn Fn() -> Vec<Finding>) -> Result<(String, Result<()>)> {
    let before = list(look());
    if before.is_empty() {
        return Ok((NOTHING.to_string(), Ok(())));
    }
    let slots = sorted::set(before.iter().filter_map(Repair::slot));
    let Some(_locked) = app.store.lock(&slots, TURN)? else {
        let slots: Vec<String> = slots.iter().map(ToString::to_string).collect();
        let again = "see gpu-handoff --status, then again";
        return Err(Exit::locked(format!("{} is changing hands: nothing was put right; {again}", slots.join(" "))));
    };
    // Only now nobody can begin what these would disturb.
    let mut text = String::new();
    let mut first = Ok(());
    for repair in list(look()).iter().filter(|repair| before.contains(repair)) {
        match carry_out(app, repair) {
            Ok(how) => text.push_str(&format!("{repair}{how}\n")),
            // The others are tried all the same.
            Err(why) => {
                text.push_str(&format!("{repair}: {why}\n"));
                first = first.and(Err(Exit::failed(format!("not all was put right: {repair}: {why}"))));
            }
        }
    }
    Ok((text, first))
}

/// Without what is the same for several: one id may have taken several functions.
fn list(findings: Vec<Finding>) -> Vec<Repair> {
    let mut repairs: Vec<Repair> = Vec::new();
    for repair in findings.into_iter().flat_map(|finding| finding.hit.repairs) {
        if !repairs.iter().any(|other| other.to_string() == repair.to_string()) {
            repairs.push(repair);
        }
    }
    repairs
}

fn carry_out(app: &App, repair: &Repair) -> std::result::Result<&'static str, String> {
    let Some(action) = repair.action() else {
        return app.kernel.link(LINK, PROGRAM).map(|()| "").map_err(|error| format!("{LINK}: {error}"));
    };
    match (app.kernel.act(&action, LIMIT), repair) {
        (Ok(()), _) => Ok(""),
        // Whoever gave it may have taken it away; nobody can see that before.
        (Err(ActError::Os(error)), Repair::Id { .. }) if error.raw_os_error() == Some(nix::libc::ENODEV) => {
            Ok(": it was gone already")
        }
        (Err(error), _) => Err(error.to_string()),
    }
}
