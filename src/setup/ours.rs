//! What setting up vfio-pci writes, and how it is told from what others wrote.

use crate::exit::{Exit, Result};
use crate::sys::Kernel;
use std::io::ErrorKind;
use std::time::Duration;

/// The first line of each file of ours: what does not begin so is somebody else's.
pub const MARK: &str = "# Written by gpu-handoff setup vfio, which may write it anew; --undo takes it away.\n";

/// For all kernels, on a slow disk.
pub const LIMIT: Duration = Duration::from_secs(15 * 60);

/// What is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// The kernel's command line is edited as well.
    pub cmdline: bool,
    pub undo: bool,
    /// What cannot be done now is left pending.
    pub defer: bool,
}

/// A file of ours; none when there is none.
///
/// # Errors
/// When somebody else's has its name.
pub fn own(kernel: &dyn Kernel, path: &str) -> Result<Option<String>> {
    match kernel.read(path) {
        Ok(bytes) if bytes.starts_with(MARK.as_bytes()) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Ok(_) => Err(Exit::refused(format!(
            "nothing was changed: {path} is not ours, it has not the first line that ours begin with; give it another name"
        ))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Exit::failed(format!("{path}: {error}"))),
    }
}
