//! What events leave for each other in `/run/gpu-handoff` without the lock, for which none of them may wait: that there
//! was a device event, and what was last told of a container.

use crate::handoff::store;
use crate::sys::{Kernel, Linux, Lock};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// There while somebody has been asked to see to device events and has not begun to.
const EVENT: &str = "device-event";

/// Held by whoever sees to device events.
const TURN: &str = "settle-lock";

/// Whoever was asked so long ago may have been killed before it began.
const FORGOTTEN: Duration = Duration::from_secs(60);

pub struct Notes {
    directory: PathBuf,
}

impl Notes {
    pub fn of(kernel: &Linux) -> Notes {
        Notes { directory: kernel.path(store::DIRECTORY) }
    }

    /// Notes that there was a device event. True when it falls to this run to have it seen to.
    ///
    /// # Errors
    /// When the note cannot be made.
    pub fn event(&self) -> io::Result<bool> {
        self.make_directory()?;
        let path = self.directory.join(EVENT);
        match OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let made = fs::metadata(&path).and_then(|meta| meta.modified());
                let is_forgotten = made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > FORGOTTEN));
                if is_forgotten {
                    File::options().write(true).open(&path)?.set_modified(SystemTime::now())?;
                }
                Ok(is_forgotten)
            }
            Err(error) => Err(error),
        }
    }

    /// From here on another event is for another run.
    pub fn heed_event(&self) {
        let _ = fs::remove_file(self.directory.join(EVENT));
    }

    /// Who sees to device events takes turns; none when it did not come within `limit`.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn turn(&self, limit: Duration) -> io::Result<Option<Lock>> {
        self.make_directory()?;
        Lock::take(&self.directory.join(TURN), limit)
    }

    /// What was last told of a container that runs.
    pub fn told(&self, ctid: u32) -> Option<String> {
        fs::read_to_string(self.container(ctid)).ok()
    }

    /// # Errors
    /// When the note cannot be made.
    pub fn tell(&self, ctid: u32, text: &str) -> io::Result<()> {
        self.make_directory()?;
        let new = self.directory.join(format!(".ct-{ctid}.new"));
        let _ = fs::remove_file(&new);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(new, self.container(ctid))
    }

    pub fn forget(&self, ctid: u32) {
        let _ = fs::remove_file(self.container(ctid));
    }

    fn container(&self, ctid: u32) -> PathBuf {
        self.directory.join(format!("ct-{ctid}"))
    }

    fn make_directory(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(&self.directory)
    }
}

/// Whether anybody has a handoff's lock; they are only looked at.
pub fn handoff_is_under_way(kernel: &dyn Kernel) -> bool {
    store::is_under_way(kernel, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_events_one_asks() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-notes-{}", std::process::id()));
        let notes = Notes { directory: directory.clone() };
        assert!(notes.event().unwrap());
        assert!(!notes.event().unwrap());
        notes.heed_event();
        assert!(notes.event().unwrap());
        let long_ago = SystemTime::now() - FORGOTTEN - Duration::from_secs(1);
        File::options().write(true).open(directory.join(EVENT)).unwrap().set_modified(long_ago).unwrap();
        assert!(notes.event().unwrap(), "whoever was to do it was killed");
        assert!(!notes.event().unwrap());
        notes.tell(101, "a").unwrap();
        notes.tell(101, "b").unwrap();
        assert_eq!(notes.told(101).as_deref(), Some("b"));
        notes.forget(101);
        assert_eq!(notes.told(101), None);
        fs::remove_dir_all(directory).unwrap();
    }
}
