//! What Proxmox VE wrote down: guest configurations and resource mappings. Pure parsers, as lenient as Proxmox's own.
//!
//! They work on bytes, because Proxmox does: a file need not be UTF-8, and what Perl's `\s` or `.`
//! matches in one decides which lines count. Where a rule comes from is named by its Perl function.

pub mod cluster;
pub mod cpu;
pub mod ct;
pub mod ha;
pub mod mapping;
pub mod pci_id;
pub mod property;
pub mod reservations;
pub mod running;
pub mod storage;
pub mod vm;

pub mod guest;
mod perl;

#[cfg(test)]
pub(crate) mod noise;
