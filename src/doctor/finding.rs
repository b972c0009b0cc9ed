//! What a check finds, and how it is told: with an id that stays the same, where it stands, and what puts it right.

use super::facts::Facts;
use crate::address::{Address, SlotId};
use crate::story::printable;
use crate::sys::{Action, Node};
use crate::trouble::Trouble;
use serde_json::{Value, json};
use std::fmt;

/// How bad it is. An error is what fails, or what nobody can have meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Error,
    Warning,
    Note,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        })
    }
}

/// One row of the table that help, manual and docs/findings.md are made of.
pub struct Check {
    /// Stays the same from version to version.
    pub id: &'static str,
    /// At most: where it matters less the finding says so.
    pub severity: Severity,
    /// What is found, in a few words.
    pub title: &'static str,
    /// Why it matters, in one sentence.
    pub why: &'static str,
    /// What there is to know beside that.
    pub more: &'static str,
    /// Pure.
    pub find: fn(&Facts) -> Vec<Hit>,
}

/// A group of checks, under one heading.
pub struct Area {
    pub title: &'static str,
    pub checks: &'static [Check],
}

/// One time that a check fires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// Less than its check's.
    pub severity: Option<Severity>,
    /// The guest that it is about.
    pub guest: Option<u32>,
    /// `/etc/modprobe.d/x.conf:3`, or a path in sysfs.
    pub place: String,
    pub found: String,
    /// What to type or to edit.
    pub remedy: String,
    /// How `--fix` puts it right, where that is ours to do.
    pub repairs: Vec<Repair>,
}

impl Hit {
    pub fn at(place: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Hit {
        let (place, found, remedy) = (place.into(), found.into(), remedy.into());
        Hit { severity: None, guest: None, place, found, remedy, repairs: Vec::new() }
    }

    pub fn told(place: impl Into<String>, trouble: &Trouble) -> Hit {
        Hit::at(place, trouble.found(), &trouble.remedy)
    }

    /// Where the trouble itself says nothing of what to do.
    #[must_use]
    pub fn or_else(self, remedy: impl Into<String>) -> Hit {
        if self.remedy.is_empty() { Hit { remedy: remedy.into(), ..self } } else { self }
    }

    #[must_use]
    pub fn of(self, guest: u32) -> Hit {
        Hit { guest: Some(guest), ..self }
    }

    #[must_use]
    pub fn only_a(self, severity: Severity) -> Hit {
        Hit { severity: Some(severity), ..self }
    }

    #[must_use]
    pub fn repaired(self, by: impl IntoIterator<Item = Repair>) -> Hit {
        Hit { repairs: by.into_iter().collect(), ..self }
    }
}

/// What `--fix` may do: nothing but what is the program's own, and what nobody else can have meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    Node(Node),
    /// Of a function whose `driver_override` nobody needs any more.
    Override(Address),
    /// A dynamic id of vfio-pci, `10de 2684`, and a function that it took.
    Id {
        address: Address,
        id: String,
    },
    /// The link that guests name as their hookscript.
    Link,
}

impl Repair {
    /// The card whose lock it takes: a handoff may be about to need just that.
    pub fn slot(&self) -> Option<SlotId> {
        match self {
            Repair::Override(address) | Repair::Id { address, .. } => Some(address.slot),
            Repair::Node(_) | Repair::Link => None,
        }
    }

    /// The change to the kernel or to /dev; none for a file of ours.
    pub fn action(&self) -> Option<Action> {
        match self {
            Repair::Node(node) => Some(Action::MakeNode(node.clone())),
            Repair::Override(address) => {
                let path = address.attribute("driver_override");
                // The kernel takes an empty line for none.
                Some(Action::Write { path, data: "\n".to_string() })
            }
            Repair::Id { id, .. } => Some(Action::Write { path: REMOVE_ID.to_string(), data: id.clone() }),
            Repair::Link => None,
        }
    }
}

pub const REMOVE_ID: &str = "/sys/bus/pci/drivers/vfio-pci/remove_id";

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Repair::Node(node) => write!(f, "make      {} {}", node.path, node.number),
            Repair::Override(address) => write!(f, "clear     driver_override {address}"),
            Repair::Id { id, .. } => write!(f, "remove    the id {id} from vfio-pci"),
            Repair::Link => {
                write!(f, "link      {} -> {}", crate::setup::hookscript::LINK, crate::setup::hookscript::PROGRAM)
            }
        }
    }
}

/// What somebody's file has may be long.
fn shortened(text: &str) -> String {
    const ENOUGH: usize = 600;
    match text.char_indices().nth(ENOUGH) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}

/// A hit with what its check says of it.
pub struct Finding {
    pub check: &'static Check,
    pub severity: Severity,
    pub hit: Hit,
}

impl Finding {
    pub fn new(check: &'static Check, hit: Hit) -> Finding {
        Finding { check, severity: hit.severity.unwrap_or(check.severity), hit }
    }

    pub fn to_json(&self) -> Value {
        json!({
            "id": self.check.id,
            "severity": self.severity.to_string(),
            "guest": self.hit.guest,
            "place": self.hit.place,
            "found": self.hit.found,
            "why": self.check.why,
            "remedy": self.hit.remedy,
            "fix": !self.hit.repairs.is_empty(),
        })
    }

    /// Nobody's file commands a terminal.
    pub fn to_text(&self) -> String {
        let Hit { place, found, remedy, .. } = &self.hit;
        let head = format!("{:<7}  {}  {}\n", self.severity, self.check.id, printable(place));
        let line = |name: &str, text: &str| format!("  {name:<5}  {}\n", shortened(&printable(text)));
        let remedy = if remedy.is_empty() { String::new() } else { line("do", remedy) };
        [head, line("found", found), line("why", self.check.why), remedy].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_in_its_two_halves() {
        let trouble = Trouble::new("it is in use; by two", "type: kill 7").of("0000:01:00 was not touched");
        let hit = Hit::told("/x", &trouble).or_else("look");
        assert_eq!(hit, Hit::at("/x", "0000:01:00 was not touched: it is in use; by two", "type: kill 7"));
        assert_eq!(Hit::told("/x", &"odd".into()).or_else("look"), Hit::at("/x", "odd", "look"));
    }
}
