//! How functions and slots are named. What comes as text is parsed once, here.

use serde_json::Value;
use std::fmt::{self, Display};
use std::str::FromStr;

pub const DEVICES: &str = "/sys/bus/pci/devices";

/// One card: domain, bus and device, `0000:01:00`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    domain: u32,
    bus: u8,
    device: u8,
}

/// One function of a card: `0000:01:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub slot: SlotId,
    pub function: u8,
}

/// It is no slot, or no function, in the kernel's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoAddress;

impl SlotId {
    pub fn function(self, function: u8) -> Address {
        Address { slot: self, function }
    }

    /// As people write it: the domain may be missing, capitals are as good.
    pub fn from_written(text: &str) -> Option<SlotId> {
        long_form(text).parse().ok()
    }

    /// As people write it, with a function or without.
    pub fn from_named(text: &str) -> Option<SlotId> {
        match text.contains('.') {
            true => long_form(text).parse().ok().map(|address: Address| address.slot),
            false => SlotId::from_written(text),
        }
    }
}

impl Address {
    /// `.0` below a title that names this slot and no other.
    pub fn below(self, only: Option<SlotId>) -> String {
        if only == Some(self.slot) { format!(".{:x}", self.function) } else { self.to_string() }
    }

    /// Where sysfs has this of the function.
    pub fn attribute(self, name: &str) -> String {
        format!("{DEVICES}/{self}/{name}")
    }
}

/// What people write, in the kernel's spelling: `0000:0a:00` for `0A:00`.
fn long_form(text: &str) -> String {
    let domain = if text.matches(':').count() == 1 { "0000:" } else { "" };
    format!("{domain}{text}").to_ascii_lowercase()
}

/// A number in exactly the kernel's spelling: small letters, and no more zeros before it than `digits` need.
fn number(text: &str, digits: usize) -> Option<u32> {
    let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_long = text.len() > digits && !text.starts_with('0');
    (is_hex && (is_long || text.len() == digits)).then(|| u32::from_str_radix(text, 16).ok())?
}

fn byte(text: &str, digits: usize) -> Option<u8> {
    number(text, digits)?.try_into().ok()
}

impl FromStr for SlotId {
    type Err = NoAddress;

    /// Only the kernel's own spelling: a domain of four digits, or of more where it must be.
    fn from_str(text: &str) -> Result<SlotId, NoAddress> {
        let mut parts = text.split(':');
        let mut next = || parts.next().unwrap_or_default();
        let slot = (number(next(), 4), byte(next(), 2), byte(next(), 2));
        match (slot, parts.next()) {
            ((Some(domain), Some(bus), Some(device)), None) => Ok(SlotId { domain, bus, device }),
            _ => Err(NoAddress),
        }
    }
}

impl FromStr for Address {
    type Err = NoAddress;

    /// Only the kernel's own spelling, as of a slot.
    fn from_str(text: &str) -> Result<Address, NoAddress> {
        let (slot, function) = text.split_once('.').ok_or(NoAddress)?;
        Ok(Address { slot: slot.parse()?, function: byte(function, 1).filter(|f| *f < 16).ok_or(NoAddress)? })
    }
}

impl Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}", self.domain, self.bus, self.device)
    }
}

impl Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{:x}", self.slot, self.function)
    }
}

impl Display for NoAddress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a slot is written like 0000:01:00, a function like 0000:01:00.0")
    }
}

impl std::error::Error for NoAddress {}

/// The slot of a title that names only one.
pub fn only(slots: &[SlotId]) -> Option<SlotId> {
    if let [slot] = slots { Some(*slot) } else { None }
}

/// `0000:01:00 0000:02:00`
pub fn list<T: Display>(all: impl IntoIterator<Item = T>) -> String {
    let all: Vec<String> = all.into_iter().map(|one| one.to_string()).collect();
    all.join(" ")
}

/// As a file of ours has them.
pub fn to_json(slots: &[SlotId]) -> Value {
    slots.iter().map(ToString::to_string).collect()
}

/// None when it is no list, or something in it no slot.
pub fn from_json(slots: &Value) -> Option<Vec<SlotId>> {
    slots.as_array()?.iter().map(|slot| slot.as_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot_of(address: &str) -> Option<String> {
        address.parse().ok().map(|address: Address| address.slot.to_string())
    }

    #[test]
    fn the_slot_of_an_address() {
        assert_eq!(slot_of("0000:01:00.0").as_deref(), Some("0000:01:00"));
        assert_eq!(slot_of("10000:e1:00.7").as_deref(), Some("10000:e1:00"));
        for odd in [
            "0000:01:00",
            "bind",
            "new_id",
            "01:00.0",
            "0000:01:00.",
            "0000:01:00:00.0",
            "0000:xx:00.0",
            "0000:01:00.00",
            "0000:001:00.0",
            "00000:01:00.0",
            "0000:0A:00.0",
            "0000:+1:00.0",
            "123456789:01:00.0",
            "0000:100:00.0",
            "0000:01:00.10",
        ] {
            assert_eq!(slot_of(odd), None, "{odd}");
        }
    }

    #[test]
    fn what_people_write() {
        for (written, long) in [
            ("0000:01:00", Some("0000:01:00")),
            ("0A:00", Some("0000:0a:00")),
            ("01:00.1", Some("0000:01:00")),
            ("10000:E1:00", Some("10000:e1:00")),
            ("00000:01:00", None),
            ("01:00.", None),
            ("gpu", None),
            ("", None),
        ] {
            assert_eq!(SlotId::from_named(written).map(|slot| slot.to_string()).as_deref(), long, "{written}");
        }
        assert_eq!(SlotId::from_written("01:00.1"), None);
    }

    #[test]
    fn slots_are_sorted_by_number() {
        let mut slots: Vec<SlotId> =
            ["10000:01:00", "0000:0a:00", "0001:01:00", "0000:01:1f"].iter().filter_map(|s| s.parse().ok()).collect();
        slots.sort_unstable();
        assert_eq!(list(&slots), "0000:01:1f 0000:0a:00 0001:01:00 10000:01:00");
        assert_eq!(from_json(&to_json(&slots)), Some(slots));
        assert_eq!(from_json(&serde_json::json!(["0000:01:00", "x"])), None);
    }
}
