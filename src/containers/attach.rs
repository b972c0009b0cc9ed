//! Lets a container use the GPU, and takes that back.

use super::Wish;
use crate::App;
use crate::stop::{Result, Stop};

/// # Errors
/// Why the container is left as it is.
pub fn attach(_app: &App, _ctid: u32, _wish: &Wish) -> Result<()> {
    Err(Stop::failed("not built yet"))
}

/// What [`attach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(_app: &App, _ctid: u32, _wish: &Wish) -> Result<String> {
    Err(Stop::failed("not built yet"))
}

/// # Errors
/// Why the container is left as it is.
pub fn detach(_app: &App, _ctid: u32) -> Result<()> {
    Err(Stop::failed("not built yet"))
}

/// What [`detach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_detach(_app: &App, _ctid: u32) -> Result<String> {
    Err(Stop::failed("not built yet"))
}

/// The containers that were attached on this host, by CTID.
pub fn attached(_app: &App) -> Vec<u32> {
    Vec::new()
}

/// Brings what [`attach`] wrote up to the numbers of now: majors, minors. Whether anything had to be changed; nothing to
/// do for a container that was not attached.
///
/// # Errors
/// Why the container is left as it is.
pub fn refresh(_app: &App, _ctid: u32) -> Result<bool> {
    Err(Stop::failed("not built yet"))
}
