//! After device events, outside of udev: what takes longer than an event may.

use crate::App;
use crate::stop::{Result, Stop};

pub const VERB: &str = "settle";

/// # Errors
/// When a device node could not be made.
pub fn run(_app: &App) -> Result<()> {
    Err(Stop::failed("not built yet"))
}
