//! A lock that one process has alone, or several have together.

use super::{terminate, trace};
use fs2::FileExt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a taken lock is tried again.
const RETRY: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    Alone,
    /// With whoever wants it together, too.
    Together,
}

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
        Lock::take_as(path, Share::Alone, limit)
    }

    /// As [`Lock::take`].
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub fn take_as(path: &Path, share: Share, limit: Duration) -> io::Result<Option<Lock>> {
        trace::timed(|| format!("lock {}", path.display()), || Lock::wait_for(path, share, limit))
    }

    fn wait_for(path: &Path, share: Share, limit: Duration) -> io::Result<Option<Lock>> {
        // Only for root: whoever can open it could lock it, and so keep every handoff waiting.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let end = Instant::now() + limit;
        loop {
            // Named in full: the standard library has methods of the same names.
            let taken = match share {
                Share::Alone => FileExt::try_lock_exclusive(&file),
                Share::Together => FileExt::try_lock_shared(&file),
            };
            match taken {
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
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    /// A lock file of its own, gone with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            Scratch(std::env::temp_dir().join(format!("gpu-handoff-lock-{name}-{}", std::process::id())))
        }

        fn try_as(&self, share: Share) -> Option<Lock> {
            Lock::take_as(&self.0, share, Duration::ZERO).unwrap()
        }

        /// Of one that was let go of. A child that another test has just started may have it for a moment still: what is
        /// open goes along until it runs its program.
        fn soon_as(&self, share: Share) -> Option<Lock> {
            Lock::take_as(&self.0, share, Duration::from_secs(10)).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn the_second_waits_and_gets_it_when_the_first_is_done() {
        let scratch = Scratch::new("turns");
        let first = Lock::take(&scratch.0, Duration::ZERO).unwrap().unwrap();
        let begin = Instant::now();
        assert!(Lock::take(&scratch.0, Duration::from_millis(50)).unwrap().is_none());
        assert!(begin.elapsed() >= Duration::from_millis(50));
        drop(first);
        assert!(scratch.soon_as(Share::Alone).is_some());
    }

    #[test]
    fn many_have_it_together_or_one_alone() {
        let scratch = Scratch::new("share");
        let first = scratch.try_as(Share::Together).unwrap();
        let second = scratch.try_as(Share::Together).unwrap();
        assert!(scratch.try_as(Share::Alone).is_none());
        drop(first);
        assert!(scratch.try_as(Share::Alone).is_none());
        drop(second);
        let alone = scratch.soon_as(Share::Alone).unwrap();
        assert!(scratch.try_as(Share::Together).is_none());
        drop(alone);
        assert!(scratch.soon_as(Share::Together).is_some());
    }

    #[test]
    fn nobody_else_may_open_it() {
        let scratch = Scratch::new("mode");
        let _lock = scratch.try_as(Share::Alone).unwrap();
        assert_eq!(std::fs::metadata(&scratch.0).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
