//! What each fuzz target does with its bytes. They are here, not in the targets, so that `growth` can use them all.
//!
//! A target that needs several texts takes them from one input, apart by NUL bytes; the last may contain more of them.

mod containers;
mod growth;
mod kernel;
mod machine;
mod ours;
mod proxmox;
mod whole;

pub use containers::{attach, attachment};
pub use growth::growth;
pub use kernel::{command_line, device_number, driver, holders, locks, maps, message, modules, process, static_ids};
pub use ours::{config, journal, record, setup, wedge};
pub use proxmox::{ct, mapping, pci_id, property, vm};
pub use whole::{machine, store};

/// `N` texts; those that the input lacks are empty.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| rest.next().unwrap_or_default())
}

/// A message for people is one line that moves no cursor, whatever it quotes.
fn assert_one_line(message: &str) {
    assert!(!message.bytes().any(|b| b < b' '), "{message:?}");
}

/// Whether something was not UTF-8 and so cannot be written as it was read.
fn is_lossy(text: &str) -> bool {
    text.contains(char::REPLACEMENT_CHARACTER)
}
