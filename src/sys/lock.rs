//! The one lock: handoffs take turns, whatever slot they are about.

use super::terminate;
use fs2::FileExt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a taken lock is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Holds the lock until it is dropped, or until its process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    // Dropping the file closes it, and closing it releases the flock.
    _file: File,
}

impl Lock {
    /// Waits for the lock for at most `limit`; none when it was held by somebody else all that time.
    ///
    /// # Errors
    /// When the lock file cannot be opened.
    pub fn take(path: &Path, limit: Duration) -> io::Result<Option<Lock>> {
        // Only for root: whoever can open it could lock it, and so keep every handoff waiting.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let end = Instant::now() + limit;
        loop {
            // Named in full: the standard library has methods of the same names.
            match FileExt::try_lock_exclusive(&file) {
                Ok(()) => return Ok(Some(Lock { _file: file })),
                Err(error) if error.raw_os_error() == fs2::lock_contended_error().raw_os_error() => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= end || terminate::is_asked() {
                return Ok(None);
            }
            std::thread::sleep(RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_and_gets_it_when_the_first_is_done() {
        let path = std::env::temp_dir().join(format!("gpu-handoff-lock-{}", std::process::id()));
        let first = Lock::take(&path, Duration::ZERO).unwrap().unwrap();
        assert!(Lock::take(&path, Duration::from_millis(50)).unwrap().is_none());
        drop(first);
        assert!(Lock::take(&path, Duration::ZERO).unwrap().is_some());
        std::fs::remove_file(path).unwrap();
    }
}
