//! Whether a container's driver, nodes and rules fit those of the host.

use super::Who;
use crate::App;
use crate::stop::{Result, Stop};

/// The report, and whether all is well.
///
/// # Errors
/// When there is nothing to report on.
pub fn check(_app: &App, _who: Who) -> Result<(String, Result<()>)> {
    Err(Stop::failed("not built yet"))
}
