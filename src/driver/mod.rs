//! NVIDIA's driver: where its installer comes from, and what that is told. The same file for the host and for its
//! containers.

pub mod builds;
pub mod flags;
pub mod flavour;
pub mod installed;
pub mod rival;
mod source;
pub mod supported;

pub use source::{CACHE, Installer, Source, download, fetch, file_name, found, keep, source};
