//! NVIDIA's driver: where its installer comes from, and what that is told. The same file for the host and for its
//! containers.

pub mod builds;
pub mod flags;
pub mod flavour;
pub mod installed;
pub mod rival;
mod source;
pub mod supported;

use crate::config::{Config, Home};
use crate::gpu::Slot;

pub use source::{CACHE, Installer, Source, download, fetch, file_name, found, keep, source};

/// Whether NVIDIA's driver is to be the home of one of these cards.
pub fn is_wanted(config: &Config, slots: &[Slot]) -> bool {
    slots.iter().any(|slot| match config.homes.get(&slot.id) {
        Some(Home::Driver(driver)) => driver == "nvidia",
        Some(Home::None) => false,
        None => !slot.gpu().is_some_and(|gpu| gpu.is_on("nouveau")),
    })
}
