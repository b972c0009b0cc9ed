//! What an administrator is told of: what is not as it should be and does not pass by itself, once while it lasts, and once
//! more for each day that it does. What was told is kept beside the history: a reboot is no news.

use super::status::{FaultKind, Has, Status};
use crate::address::SlotId;
use crate::config::{Config, Home};
use crate::driver::{self, installed};
use crate::setup::driver::{facts, record};
use crate::sys::Kernel;
use serde_json::{Value, json};

const FILE: &str = "/var/lib/gpu-handoff/news.json";
const SCHEMA: u64 = 1;

const DAY: u64 = 24 * 3600;

/// Between the end of a VM and what Proxmox does about it, or between two tries, a card is nobody's for a moment.
const STRANDED: u64 = 20;

/// What is owed is mostly done with the keeper's next look.
const OWED: u64 = 600;

/// What could not be sent is tried again after this.
const PAUSE: u64 = 600;

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// A slot; none for the host.
    pub slot: Option<SlotId>,
    /// As in `notify.about`.
    pub reason: &'static str,
    /// On one line.
    pub title: String,
    /// What else there is to say, and what to type.
    pub more: String,
}

impl Item {
    /// The same thing and reason is the same news.
    fn key(&self) -> String {
        self.slot.map_or_else(|| self.reason.to_string(), |slot| format!("{} {slot}", self.reason))
    }

    pub fn severity(&self) -> &'static str {
        if matches!(self.reason, "stranded" | "wedged") { "error" } else { "warning" }
    }
}

/// What is wrong now, of what the configuration wants told.
pub fn now(kernel: &dyn Kernel, config: &Config, status: &Status) -> Vec<Item> {
    let mut items: Vec<Item> = status
        .each_fault()
        .into_iter()
        .filter_map(|fault| {
            let reason = match fault.kind {
                FaultKind::Stranded => "stranded",
                FaultKind::Wedged => "wedged",
                FaultKind::Owed => "owed",
                _ => return None,
            };
            let last = status.gpus.iter().find(|gpu| Some(gpu.slot.id) == fault.slot).and_then(|gpu| gpu.last.as_ref());
            let error = last.and_then(|last| last.get("error")?.as_str()).map(|error| format!("{error}\n"));
            let more = format!("{}gpu-handoff --status says what to type.", error.unwrap_or_default());
            Some(Item { slot: fault.slot, reason, title: fault.text, more })
        })
        .collect();
    if let Some(title) = lacks_driver(kernel, config, status) {
        let more = "The host and its containers cannot use the card. gpu-handoff doctor says what to type.".to_string();
        items.push(Item { slot: None, reason: "driver", title, more });
    }
    items.retain(|item| config.notify.iter().any(|about| about == item.reason));
    items
}

/// A kernel without the driver that another had, or that this program or the configuration wants on the host.
fn lacks_driver(kernel: &dyn Kernel, config: &Config, status: &Status) -> Option<String> {
    let slots: Vec<_> = status.gpus.iter().map(|gpu| gpu.slot.clone()).collect();
    let release = facts::running(kernel);
    let has_it = status.driver.is_some()
        || slots.iter().filter_map(|slot| slot.gpu()).any(|gpu| gpu.is_on("nvidia"))
        || installed::find(kernel, &release).is_some();
    if has_it || !driver::is_wanted(config, &slots) {
        return None;
    }
    let was_there = || kernel.list("/lib/modules").iter().any(|other| installed::find(kernel, other).is_some());
    let is_ours = || record::read(kernel).ok().flatten().is_some_and(|record| record.installed.is_some());
    let is_said = || config.homes.values().any(|home| matches!(home, Home::Driver(driver) if driver == "nvidia"));
    (is_said() || is_ours() || was_there()).then(|| format!("kernel {release} has no nvidia module"))
}

/// What was told, or is about to be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    key: String,
    /// Not to be told before: seconds since 1970, UTC.
    again: u64,
}

/// All that was told and lasts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Book(Vec<Told>);

impl Book {
    /// What cannot be understood counts for nothing: then it is told once more.
    pub fn read(kernel: &dyn Kernel) -> Book {
        Book::parse(&kernel.read(FILE).unwrap_or_default()).unwrap_or_default()
    }

    fn parse(bytes: &[u8]) -> Option<Book> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let one = |told: &Value| {
            Some(Told { key: told.get("what")?.as_str()?.to_string(), again: told.get("again")?.as_u64()? })
        };
        Some(Book(value.get("told")?.as_array()?.iter().filter_map(one).collect()))
    }

    /// Only where that is another than before.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn write(&self, kernel: &dyn Kernel) -> std::io::Result<()> {
        if *self == Book::read(kernel) {
            return Ok(());
        }
        if self.0.is_empty() {
            return kernel.remove_file(FILE);
        }
        let told: Vec<Value> = self.0.iter().map(|told| json!({"what": told.key, "again": told.again})).collect();
        kernel.write_file(FILE, json!({"schema": SCHEMA, "told": told}).to_string().as_bytes(), 0o644)
    }

    /// Whether somebody has to look, since something may have ended or is to be told by now.
    pub fn is_due(&self, now: u64) -> bool {
        self.0.iter().any(|told| told.is_due(now))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets what is over, takes in what is new; what of it is to be told now. `moving`: the slots of which nobody can say
    /// how they are.
    pub fn take_in(&mut self, items: &[Item], moving: &[SlotId], now: u64) -> Vec<Item> {
        let is_moving = |key: &str| moving.iter().any(|slot| key.ends_with(&format!(" {slot}")));
        self.0.retain(|told| is_moving(&told.key) || items.iter().any(|item| item.key() == told.key));
        for item in items {
            let key = item.key();
            if !self.0.iter().any(|told| told.key == key) {
                let patience = match item.reason {
                    "stranded" => STRANDED,
                    "owed" => OWED,
                    _ => 0,
                };
                self.0.push(Told { key, again: now + patience });
            }
        }
        let is_due = |item: &&Item| self.0.iter().any(|told| told.key == item.key() && told.is_due(now));
        items.iter().filter(is_due).cloned().collect()
    }

    /// It was told, or that failed.
    pub fn note(&mut self, item: &Item, is_told: bool, now: u64) {
        let key = item.key();
        if let Some(told) = self.0.iter_mut().find(|told| told.key == key) {
            told.again = now + if is_told { DAY } else { PAUSE };
        }
    }
}

impl Told {
    /// A clock that was set back keeps nothing quiet for longer than it would have been.
    fn is_due(&self, now: u64) -> bool {
        self.again <= now || self.again > now + DAY
    }
}

/// Slots on their way.
pub fn moving(status: &Status) -> Vec<SlotId> {
    status.gpus.iter().filter(|gpu| matches!(gpu.has, Has::Moving(_))).map(|gpu| gpu.slot.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_795_176_000;

    fn item(slot: &str, reason: &'static str) -> Item {
        Item { slot: slot.parse().ok(), reason, title: format!("{slot} is {reason}"), more: String::new() }
    }

    fn told(book: &mut Book, items: &[Item], now: u64) -> Vec<&'static str> {
        let due = book.take_in(items, &[], now);
        due.iter().for_each(|item| book.note(item, true, now));
        due.iter().map(|item| item.reason).collect()
    }

    #[test]
    fn each_is_told_once_and_once_more_for_each_day() {
        for (reason, patience) in [("wedged", 0), ("driver", 0), ("stranded", STRANDED), ("owed", OWED)] {
            let mut book = Book::default();
            let items = [item("0000:01:00", reason)];
            let none: [&str; 0] = [];
            if patience > 0 {
                assert_eq!(told(&mut book, &items, NOW), none, "{reason}");
                assert_eq!(told(&mut book, &items, NOW + patience - 1), none, "{reason}");
            }
            let first = NOW + patience;
            assert_eq!(told(&mut book, &items, first), [reason]);
            for later in [0, 1, PAUSE, DAY - 1] {
                assert_eq!(told(&mut book, &items, first + later), none, "{reason} {later}");
            }
            assert_eq!(told(&mut book, &items, first + DAY), [reason]);
            assert_eq!(told(&mut book, &items, first + DAY + 1), none, "{reason}");
        }
    }

    #[test]
    fn what_came_back_is_news_and_what_another_has_as_well() {
        let mut book = Book::default();
        let (first, second) = (item("0000:01:00", "wedged"), item("0000:02:00", "wedged"));
        assert_eq!(told(&mut book, std::slice::from_ref(&first), NOW), ["wedged"]);
        assert_eq!(book.take_in(&[first.clone(), second.clone()], &[], NOW + 1), [second]);
        assert!(told(&mut book, &[], NOW + 2).is_empty() && book.is_empty());
        assert_eq!(told(&mut book, &[first], NOW + 3), ["wedged"]);
    }

    #[test]
    fn a_card_on_its_way_is_no_end_of_anything() {
        let mut book = Book::default();
        let stranded = [item("0000:01:00", "stranded")];
        told(&mut book, &stranded, NOW);
        assert_eq!(told(&mut book, &stranded, NOW + STRANDED), ["stranded"]);
        let moving = stranded[0].slot.unwrap();
        assert_eq!(book.take_in(&[], &["0000:02:00".parse().unwrap(), moving], NOW + STRANDED + 1), []);
        assert!(told(&mut book, &stranded, NOW + STRANDED + 2).is_empty());
        // It is of another slot.
        book.take_in(&[], &["0000:02:00".parse().unwrap()], NOW + STRANDED + 3);
        assert!(book.is_empty());
    }

    #[test]
    fn what_was_not_sent_is_tried_again_and_not_at_once() {
        let mut book = Book::default();
        let items = [item("0000:01:00", "wedged")];
        book.take_in(&items, &[], NOW);
        book.note(&items[0], false, NOW);
        assert!(book.take_in(&items, &[], NOW + PAUSE - 1).is_empty() && !book.is_due(NOW + PAUSE - 1));
        assert!(book.is_due(NOW + PAUSE));
        assert_eq!(book.take_in(&items, &[], NOW + PAUSE), items);
    }

    #[test]
    fn a_clock_that_was_wrong_keeps_nothing_quiet() {
        let mut book = Book::default();
        let items = [item("0000:01:00", "wedged")];
        told(&mut book, &items, NOW + 9 * DAY);
        assert_eq!(told(&mut book, &items, NOW), ["wedged"]);
    }

    #[test]
    fn what_is_written_is_read_back_and_what_is_broken_counts_for_nothing() {
        let text =
            r#"{"schema":1,"told":[{"what":"wedged 0000:01:00","again":7},{"what":"driver","again":8},{"what":7}]}"#;
        let of = |key: &str, again| Told { key: key.to_string(), again };
        assert_eq!(Book::parse(text.as_bytes()), Some(Book(vec![of("wedged 0000:01:00", 7), of("driver", 8)])));
        for broken in ["", "{", "[]", "\0\0", r#"{"told":{}}"#] {
            assert_eq!(Book::parse(broken.as_bytes()).unwrap_or_default(), Book::default(), "{broken}");
        }
    }
}
