//!
//! They work on bytes, because Proxmox does: a file need not be UTF-8, and what Perl's `\s` or `.`
//! matches in one decides which lines count. Where a rule comes from is named by its Perl function.

pub mod property;

mod perl;

