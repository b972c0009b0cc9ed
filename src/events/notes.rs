//! What events leave for each other in `/run/gpu-handoff` without the lock, for which none of them may wait: that there
//! was a device event, and what was last told of a container.

use crate::handoff::kept::store;
use crate::handoff::kept::under_way;
use crate::sys::{Kernel, Lock, Share};
use std::fs;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// There while somebody has been asked to see to device events and has not begun to.
const EVENT: &str = "device-event";

/// Held by whoever sees to device events.
const TURN: &str = "settle-lock";

/// Whoever was asked so long ago may have been killed before it began.
const FORGOTTEN: Duration = Duration::from_secs(60);

pub struct Notes<'a> {
    files: &'a dyn Kernel,
}

impl Notes<'_> {
    pub fn of(kernel: &dyn Kernel) -> Notes<'_> {
        Notes { files: kernel }
    }

    /// Notes that there was a device event. True when it falls to this run to have it seen to.
    ///
    /// # Errors
    /// When the note cannot be made.
    pub fn event(&self) -> io::Result<bool> {
        let path = note(EVENT);
        match self.files.create_file(&path, 0o644) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let made = fs::metadata(self.files.path(&path)).and_then(|meta| meta.modified());
                let is_forgotten = made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > FORGOTTEN));
                if is_forgotten {
                    self.files.touch_file(&path)?;
                }
                Ok(is_forgotten)
            }
            Err(error) => Err(error),
        }
    }

    /// From here on another event is for another run.
    pub fn heed_event(&self) {
        let _ = self.files.remove_file(&note(EVENT));
    }

    /// Who sees to device events takes turns; none when it did not come within `limit`.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn turn(&self, limit: Duration) -> io::Result<Option<Lock>> {
        self.files.lock(&note(TURN), Share::Alone, limit)
    }

    /// What was last told of a container that runs.
    pub fn told(&self, ctid: u32) -> Option<String> {
        String::from_utf8(self.files.read(&container(ctid)).ok()?).ok()
    }

    /// # Errors
    /// When the note cannot be made.
    pub fn tell(&self, ctid: u32, text: &str) -> io::Result<()> {
        self.files.write_file(&container(ctid), text.as_bytes(), 0o644)
    }

    pub fn forget(&self, ctid: u32) {
        let _ = self.files.remove_file(&container(ctid));
    }
}

fn note(name: &str) -> String {
    format!("{}/{name}", store::DIRECTORY)
}

fn container(ctid: u32) -> String {
    note(&format!("ct-{ctid}"))
}

/// Whether anybody has a handoff's lock; they are only looked at.
pub fn handoff_is_under_way(kernel: &dyn Kernel) -> bool {
    under_way::is_under_way(kernel, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Files, Linux};
    use std::fs::File;
    use std::time::SystemTime;

    #[test]
    fn of_many_events_one_asks() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-notes-{}", std::process::id()));
        let kernel = Linux::at(directory.clone());
        let notes = Notes::of(&kernel);
        assert!(notes.event().unwrap());
        assert!(!notes.event().unwrap());
        notes.heed_event();
        assert!(notes.event().unwrap());
        let long_ago = SystemTime::now() - FORGOTTEN - Duration::from_secs(1);
        File::options().write(true).open(kernel.path(&note(EVENT))).unwrap().set_modified(long_ago).unwrap();
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
