//! Installs the host's version of the driver, and CUDA, in a container.

use super::{Who, Wish};
use crate::App;
use crate::stop::{Result, Stop};

/// # Errors
/// What did not work; the next call goes on from there.
pub fn setup(_app: &App, _ctid: u32, _wish: &Wish) -> Result<()> {
    Err(Stop::failed("not built yet"))
}

/// What [`setup`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(_app: &App, _ctid: u32, _wish: &Wish) -> Result<String> {
    Err(Stop::failed("not built yet"))
}

/// # Errors
/// When a container could not be brought to the host's version; the others are, all the same.
pub fn sync(_app: &App, _who: Who) -> Result<()> {
    Err(Stop::failed("not built yet"))
}

/// What [`sync`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_sync(_app: &App, _who: Who) -> Result<String> {
    Err(Stop::failed("not built yet"))
}
