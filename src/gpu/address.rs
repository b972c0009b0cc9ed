//! How functions and slots are named.

pub const DEVICES: &str = "/sys/bus/pci/devices";

pub fn attribute(address: &str, name: &str) -> String {
    format!("{DEVICES}/{address}/{name}")
}

/// The slot of an address with a function: `0000:01:00` of `0000:01:00.0`.
pub fn slot_of(address: &str) -> Option<&str> {
    let (slot, function) = address.split_once('.')?;
    let mut parts = slot.split(':');
    let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
    let hexadecimal = [domain, bus, device, function].iter().all(|part| part.bytes().all(|b| b.is_ascii_hexdigit()));
    let long_enough = domain.len() >= 4 && (bus.len(), device.len(), function.len()) == (2, 2, 1);
    (hexadecimal && long_enough && parts.next().is_none()).then_some(slot)
}

/// An address, with a function or without, as people write it, in the kernel's spelling: `0000:0a:00` for `0A:00`.
pub fn long_form(address: &str) -> String {
    let domain = if address.matches(':').count() == 1 { "0000:" } else { "" };
    format!("{domain}{address}").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slot_of_an_address() {
        assert_eq!(slot_of("0000:01:00.0"), Some("0000:01:00"));
        assert_eq!(slot_of("10000:e1:00.7"), Some("10000:e1:00"));
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
        ] {
            assert_eq!(slot_of(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_long_form_of_an_address() {
        for (written, long) in [
            ("0000:01:00", "0000:01:00"),
            ("0A:00", "0000:0a:00"),
            ("01:00.1", "0000:01:00.1"),
            ("10000:E1:00", "10000:e1:00"),
            ("gpu", "gpu"),
        ] {
            assert_eq!(long_form(written), long);
        }
    }
}
