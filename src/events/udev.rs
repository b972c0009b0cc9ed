//! udev tells of NVIDIA's modules and GPUs coming and going.

use crate::App;
use crate::stop::{Result, Stop};

/// # Errors
/// When a device node could not be made.
pub fn run(_app: &App) -> Result<()> {
    Err(Stop::failed("not built yet"))
}
