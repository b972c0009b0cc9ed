//! Text consoles on a card's screen. Reads only.
//!
//! The kernel has one framebuffer console driver (fbcon) for the screens of all cards. It comes with the first framebuffer
//! and goes with the last. When only the one that it is on goes, the text goes nowhere until that one comes back, or until
//! somebody attaches it again: then it goes to a framebuffer that is left.

use crate::address::Address;
use crate::sorted;
use crate::sys::{ActError, Kernel};
use std::ops::RangeInclusive;
use std::time::Duration;

const CONSOLES: &str = "/sys/class/vtconsole";
const FRAMEBUFFERS: &str = "/sys/class/graphics";

/// How `/proc/iomem` names a framebuffer that the firmware set up: the kernel's name for it, and its drivers' names.
const FIRMWARE: [&str; 8] =
    ["BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer.0", "simpledrm", "efidrm", "vesadrm"];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console {
    /// The framebuffer console is on, whichever screen it is on.
    pub is_attached: bool,
    /// Somebody else has all consoles locked, so that nothing of this is known.
    pub is_busy: bool,
    /// It can be attached by hand.
    pub can_attach: bool,
    /// Of the functions that were asked about, the one whose screen it is on, or would be.
    pub screen: Option<Address>,
    /// Other devices have a framebuffer, too.
    pub has_other: bool,
    /// Of the functions that were asked about, the one with the firmware's framebuffer in its memory.
    pub firmware: Option<Address>,
}

impl Console {
    /// When something else holds the kernel's lock on all consoles, nothing is known of them: they are left alone.
    pub fn read(kernel: &dyn Kernel, addresses: &[Address], limit: Duration) -> Console {
        let firmware = firmware(kernel, addresses);
        let Ok(attached) = is_attached(kernel, limit) else {
            return Console { is_busy: true, firmware, ..Console::default() };
        };
        let of = |address: &Address| kernel.list(&address.attribute("graphics"));
        let own: Vec<String> = addresses.iter().flat_map(of).collect();
        let mut all: Vec<(u32, String)> =
            kernel.list(FRAMEBUFFERS).into_iter().filter_map(|name| Some((number(&name)?, name))).collect();
        sorted::sort(&mut all);
        // fbcon prefers the screen that the firmware began on, and takes the first one otherwise.
        let is_primary =
            |name: &str| kernel.text(&format!("{FRAMEBUFFERS}/{name}/device/boot_vga")).as_deref() == Some("1");
        let chosen = all.iter().find(|(_, name)| is_primary(name)).or(all.first());
        let has_console = |address: &&Address| chosen.is_some_and(|(_, name)| of(address).contains(name));
        Console {
            is_attached: attached == Some(true),
            is_busy: false,
            can_attach: can_attach(kernel),
            screen: addresses.iter().find(has_console).copied(),
            has_other: all.iter().any(|(_, name)| !own.contains(name)),
            firmware,
        }
    }
}

/// `/sys/class/vtconsole/vtcon1/bind` of the framebuffer console. Numbers change as drivers come and go: looked up by
/// name each time.
pub fn bind_attribute(kernel: &dyn Kernel) -> Option<String> {
    let is_fbcon = |name: &String| {
        kernel.text(&format!("{CONSOLES}/{name}/name")).is_some_and(|text| text.contains("frame buffer device"))
    };
    kernel.list(CONSOLES).into_iter().find(is_fbcon).map(|name| format!("{CONSOLES}/{name}/bind"))
}

/// None when there is no framebuffer console: its last framebuffer is gone.
///
/// # Errors
/// [`ActError::Stuck`] when something else holds the kernel's lock on all consoles.
pub fn is_attached(kernel: &dyn Kernel, limit: Duration) -> Result<Option<bool>, ActError> {
    let Some(path) = bind_attribute(kernel) else { return Ok(None) };
    match kernel.peek(&path, 1, limit) {
        Ok(bytes) => Ok(Some(bytes.first() == Some(&b'1'))),
        Err(error @ ActError::Stuck { .. }) => Err(error),
        // It went in between.
        Err(_) => Ok(None),
    }
}

/// By hand, the kernel attaches it only in the place of a console driver that it was booted with: `(S) dummy device`. On a
/// host that was booted by a BIOS that is the VGA console, which the first graphics driver ends.
pub fn can_attach(kernel: &dyn Kernel) -> bool {
    let is_first =
        |name: &String| kernel.text(&format!("{CONSOLES}/{name}/name")).is_some_and(|text| text.starts_with("(S)"));
    kernel.list(CONSOLES).iter().any(is_first)
}

/// Of a framebuffer; `fbcon` is in the same directory.
fn number(name: &str) -> Option<u32> {
    name.strip_prefix("fb")?.parse().ok()
}

fn firmware(kernel: &dyn Kernel, addresses: &[Address]) -> Option<Address> {
    let framebuffers = firmware_framebuffers(&kernel.text("/proc/iomem")?);
    if framebuffers.is_empty() {
        return None;
    }
    let holds_one = |address: &&Address| {
        let memory = memory(&kernel.text(&address.attribute("resource")).unwrap_or_default());
        framebuffers.iter().any(|fb| memory.iter().any(|bar| bar.contains(fb.start()) && bar.contains(fb.end())))
    };
    addresses.iter().find(holds_one).copied()
}

/// `    c0000000-c03e7fff : efifb`. Who is not root sees zeros, which lie in no card's memory.
fn firmware_framebuffers(iomem: &str) -> Vec<RangeInclusive<u64>> {
    let framebuffer = |line: &str| {
        let (range, name) = line.trim().split_once(" : ")?;
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        FIRMWARE.contains(&name).then_some(number(start)?..=number(end)?)
    };
    iomem.lines().filter_map(framebuffer).collect()
}

/// A line for each region: its first and last address, and flags; zeros when there is none.
fn memory(resource: &str) -> Vec<RangeInclusive<u64>> {
    let region = |line: &str| {
        let mut numbers = line.split_whitespace().map(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok());
        let (start, end) = (numbers.next()??, numbers.next()??);
        (end > start).then_some(start..=end)
    };
    resource.lines().filter_map(region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firmwares_framebuffer_lies_in_a_cards_memory() {
        let iomem = "00000000-00000fff : Reserved\nc0000000-c10fffff : PCI Bus 0000:01\n  \
                     c0000000-c0ffffff : 0000:01:00.0\n    c0000000-c03e7fff : BOOTFB\n";
        assert_eq!(firmware_framebuffers(iomem), [0xc000_0000..=0xc03e_7fff]);
        assert_eq!(firmware_framebuffers("00000000-00000000 : efifb\nx : efifb\n"), [0..=0]);
        let resource = "0x00000000c0000000 0x00000000c0ffffff 0x0000000000042208\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\nnonsense\n";
        assert_eq!(memory(resource), [0xc000_0000..=0xc0ff_ffff]);
    }

    #[test]
    fn framebuffers_are_numbered() {
        assert_eq!([number("fb0"), number("fb12")], [Some(0), Some(12)]);
        assert_eq!([number("fbcon"), number("fb"), number("card0")], [None; 3]);
    }
}
