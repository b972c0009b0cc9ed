//! PCI addresses as people write them in guest configurations and mappings.

use crate::address::{Address, SlotId};
use std::fmt;

/// A device (slot), or one function of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciId {
    /// What is written instead where it is the slot of no device that could be: `00000:01:00`.
    slot: Result<SlotId, String>,
    /// `None` means every function of the device.
    pub function: Option<u8>,
}

impl PciId {
    /// Reads an id the way Proxmox does (`$PCIRE` in `PVE::QemuServer::PCI`): lowercase, the domain
    /// may be left out and may be longer than four digits (`10000:e1:00.0`), so may the function.
    ///
    /// A missing domain is `0000` (`PVE::SysFSTools::normalize_pci_id`); otherwise nothing is
    /// normalised, so an id that no device can have, such as `00000:01:00`, simply matches none.
    pub fn parse(id: &str) -> Option<PciId> {
        let function = match id.as_bytes().get(slot_len(id.as_bytes())?..)? {
            [] => None,
            [b'.', digit] if is_hex(digit) => char::from(*digit).to_digit(16),
            _ => return None,
        };
        let slot = id.split('.').next()?;
        let domain = if slot.len() == "01:00".len() { "0000:" } else { "" };
        let slot = format!("{domain}{slot}");
        let slot = slot.parse().map_err(|_| slot);
        Some(PciId { slot, function: function.and_then(|digit| u8::try_from(digit).ok()) })
    }

    /// None when no device could be there.
    pub fn slot(&self) -> Option<SlotId> {
        self.slot.as_ref().ok().copied()
    }

    /// Its slot as it is told.
    pub fn slot_name(&self) -> String {
        self.slot.as_ref().map_or_else(Clone::clone, SlotId::to_string)
    }

    /// Whether it names this function: without a function of its own it names the whole slot.
    pub fn covers(&self, address: Address) -> bool {
        self.slot() == Some(address.slot) && self.function.is_none_or(|function| function == address.function)
    }
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.slot_name())?;
        self.function.map_or(Ok(()), |function| write!(f, ".{function:x}"))
    }
}

/// An id as it is written, and what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub text: String,
    pub id: PciId,
}

impl Written {
    /// As [`PciId::parse`].
    pub fn parse(text: &str) -> Option<Written> {
        Some(Written { text: text.to_string(), id: PciId::parse(text)? })
    }
}

/// The length of the `[DOMAIN:]BUS:DEVICE` that the text begins with.
pub(super) fn slot_len(text: &[u8]) -> Option<usize> {
    let domain = match text.iter().take_while(|byte| is_hex(byte)).count() {
        n @ 4.. if text.get(n) == Some(&b':') => n + 1,
        _ => 0,
    };
    match text.get(domain..)? {
        [a, b, b':', c, d, ..] if [a, b, c, d].into_iter().all(is_hex) => Some(domain + 5),
        _ => None,
    }
}

pub(super) fn is_hex(byte: &u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(slot: &str, function: Option<u8>) -> Option<PciId> {
        Some(PciId { slot: Ok(slot.parse().unwrap()), function })
    }

    #[test]
    fn reads_every_form() {
        assert_eq!(PciId::parse("01:00"), id("0000:01:00", None));
        assert_eq!(PciId::parse("01:00.1"), id("0000:01:00", Some(1)));
        assert_eq!(PciId::parse("000a:b1:1f.f"), id("000a:b1:1f", Some(15)));
        assert_eq!(PciId::parse("10000:e1:00.0"), id("10000:e1:00", Some(0)));
    }

    #[test]
    fn what_no_device_can_have_is_read_and_matches_none() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        let covers = |id: &str, text: &str| PciId::parse(id).unwrap().covers(address(text));
        assert!(covers("01:00", "0000:01:00.1") && covers("01:00.1", "0000:01:00.1"));
        assert!(!covers("01:00.0", "0000:01:00.1") && !covers("10000:01:00", "0000:01:00.1"));
        for odd in ["00000:01:00", "00000:01:00.1", "123456789:01:00.1"] {
            let id = PciId::parse(odd).unwrap();
            assert_eq!((id.slot(), id.to_string().as_str()), (None, odd));
            assert!(!covers(odd, "0000:01:00.1"), "{odd}");
        }
    }

    #[test]
    fn refuses_what_proxmox_refuses() {
        for bad in [
            "",
            "01",
            "01:00.",
            "01:00.00",
            "01:00:0",
            "1:00.0",
            "001:01:00.0",
            ":01:00.0",
            "0000:01:0",
            "0000:0A:00.0",
            "01:00.A",
            " 01:00",
            "01:00 ",
            "01:00\n",
            "0000:0000:01:00",
            "01:00é",
        ] {
            assert_eq!(PciId::parse(bad), None, "{bad:?}");
        }
    }
}
