//! `/run/gpu-handoff`: records, the journal, what is wedged and what happened last. Written only by the holder of the lock.

use super::history::History;
use super::journal::Journal;
use super::record::{Owner, Record};
use super::resume::ToStart;
use super::wedge::Wedge;
use crate::sys::{Kernel, Lock};
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub const DIRECTORY: &str = "/run/gpu-handoff";
pub const LOCK: &str = "lock";
const JOURNAL: &str = "journal";
const TO_START: &str = "to-start";

/// Reads by anybody.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
    /// Not below `directory`: it outlives a reboot.
    history: Option<History>,
}

/// Writes by the holder of the lock.
pub struct Locked<'a> {
    store: &'a Store,
    _lock: Lock,
}

impl Store {
    /// `directory` is [`DIRECTORY`], below whatever root there is.
    pub fn at(directory: PathBuf) -> Store {
        Store { directory, history: None }
    }

    #[must_use]
    pub fn with_history(self, history: History) -> Store {
        Store { history: Some(history), ..self }
    }

    /// None when none is kept.
    pub fn history(&self) -> Option<&History> {
        self.history.as_ref()
    }

    /// # Errors
    /// When the lock file cannot be made. None when somebody else held the lock for all of `limit`.
    pub fn lock(&self, limit: Duration) -> Result<Option<Locked<'_>>> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.directory)
            .with_context(|| self.directory.display().to_string())?;
        let path = self.directory.join(LOCK);
        let lock = Lock::take(&path, limit).with_context(|| path.display().to_string())?;
        Ok(lock.map(|lock| Locked { store: self, _lock: lock }))
    }

    pub fn has_record(&self, owner: &Owner) -> bool {
        self.directory.join(owner.file_name()).exists()
    }

    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn record(&self, owner: &Owner) -> Result<Option<Record>> {
        let name = owner.file_name();
        match self.read(&name)? {
            Some(bytes) => {
                let path = self.directory.join(&name);
                Ok(Some(Record::parse(owner.clone(), &bytes).with_context(|| path.display().to_string())?))
            }
            None => Ok(None),
        }
    }

    /// Every record, by file name.
    ///
    /// # Errors
    /// Names the file that cannot be read or understood.
    pub fn records(&self) -> Result<Vec<Record>> {
        self.each_record().into_iter().collect()
    }

    /// Every record, or why it cannot be read; for who can go on without one.
    pub fn each_record(&self) -> Vec<Result<Record>> {
        let names = self.names();
        let owners = names.iter().filter_map(|name| Owner::from_file_name(name));
        owners.filter_map(|owner| self.record(&owner).transpose()).collect()
    }

    /// The journal of a handoff that is under way, or that was killed.
    ///
    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn journal(&self) -> Result<Option<Journal>> {
        let Some(bytes) = self.read(JOURNAL)? else { return Ok(None) };
        let path = self.directory.join(JOURNAL);
        Journal::parse(&bytes).map(Some).with_context(|| path.display().to_string())
    }

    /// The kernel call that never came back to a slot.
    ///
    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn wedge(&self, slot: &str) -> Result<Option<Wedge>> {
        let name = wedge_file(slot);
        let Some(bytes) = self.read(&name)? else { return Ok(None) };
        let path = self.directory.join(&name);
        Wedge::parse(&bytes).map(Some).with_context(|| path.display().to_string())
    }

    /// What was stopped for a handoff that is over, and does not run again yet.
    ///
    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn to_start(&self) -> Result<Vec<ToStart>> {
        let Some(bytes) = self.read(TO_START)? else { return Ok(Vec::new()) };
        let path = self.directory.join(TO_START);
        ToStart::parse_all(&bytes).with_context(|| path.display().to_string())
    }

    /// Whether a call may be under way in this slot, so that what waits for its devices' locks must not even be read.
    /// A file that cannot be read tells nothing to the contrary.
    pub fn has_call(&self, kernel: &dyn Kernel, slot: &str) -> bool {
        let is_wedged = self.wedge(slot).map_or(true, |wedge| wedge.is_some_and(|wedge| wedge.is_still_stuck(kernel)));
        let is_at_it = |journal: Journal| {
            journal.slots.iter().any(|s| s == slot) && kernel.process(journal.worker.pid) == Some(journal.worker)
        };
        is_wedged || self.journal().map_or(true, |journal| journal.is_some_and(is_at_it))
    }

    /// Every slot with a wedge, sorted.
    pub fn wedged_slots(&self) -> Vec<String> {
        self.names().iter().filter_map(|name| name.strip_prefix("wedged-").map(str::to_string)).collect()
    }

    /// What happened to a slot last; none when there is nothing that can be read.
    pub fn last(&self, slot: &str) -> Option<Value> {
        serde_json::from_slice(&self.read(&last_file(slot)).ok()??).ok()
    }

    fn names(&self) -> Vec<String> {
        let mut names = match fs::read_dir(&self.directory) {
            Ok(entries) => entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect::<Vec<_>>(),
            Err(_) => Vec::new(),
        };
        names.sort_unstable();
        names
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.directory.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }
}

/// Root acts on what stands in these files: whatever the umask is, nobody else writes them.
fn write_file(path: &Path, text: &str) -> std::io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.write_all(text.as_bytes())
}

fn last_file(slot: &str) -> String {
    format!("last-{slot}")
}

fn wedge_file(slot: &str) -> String {
    format!("wedged-{slot}")
}

impl Locked<'_> {
    /// # Errors
    /// Names the file that could not be written; the old one is still whole.
    pub fn save(&self, record: &Record) -> Result<()> {
        self.write(&record.owner.file_name(), &record.to_json())
    }

    /// # Errors
    /// Names the file that could not be removed.
    pub fn remove(&self, owner: &Owner) -> Result<()> {
        self.unlink(&owner.file_name())
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn write_journal(&self, journal: &Journal) -> Result<()> {
        self.write(JOURNAL, &journal.to_json())
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn end_journal(&self) -> Result<()> {
        self.unlink(JOURNAL)
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn set_to_start(&self, entries: &[ToStart]) -> Result<()> {
        if entries.is_empty() { self.unlink(TO_START) } else { self.write(TO_START, &ToStart::to_json(entries)) }
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn set_wedge(&self, slot: &str, wedge: &Wedge) -> Result<()> {
        self.write(&wedge_file(slot), &wedge.to_json().to_string())
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn clear_wedge(&self, slot: &str) -> Result<()> {
        self.unlink(&wedge_file(slot))
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn set_last(&self, slot: &str, last: &Value) -> Result<()> {
        self.write(&last_file(slot), &last.to_string())
    }

    /// Whole or not at all: to a name that nobody reads, then renamed.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.store.directory.join(name);
        let new = self.store.directory.join(format!(".{name}.new"));
        write_file(&new, text).with_context(|| new.display().to_string())?;
        fs::rename(&new, &path).with_context(|| path.display().to_string())
    }

    fn unlink(&self, name: &str) -> Result<()> {
        let path = self.store.directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| path.display().to_string()),
            _ => Ok(()),
        }
    }
}
