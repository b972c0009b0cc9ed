//! What set-up keeps on disk.

pub mod document;
pub mod pending;
