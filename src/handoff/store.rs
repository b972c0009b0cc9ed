//! `/run/gpu-handoff`: records, what is wedged and what happened last. Written only by the holder of the lock.

use super::record::{Owner, Record};
use crate::sys::Lock;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

pub const DIRECTORY: &str = "/run/gpu-handoff";
pub const LOCK: &str = "lock";

/// Reads by anybody.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

/// Writes by the holder of the lock.
pub struct Locked<'a> {
    store: &'a Store,
    _lock: Lock,
}

impl Store {
    /// `directory` is [`DIRECTORY`], below whatever root there is.
    pub fn at(directory: PathBuf) -> Store {
        Store { directory }
    }

    /// # Errors
    /// When the lock file cannot be made. None when somebody else held the lock for all of `limit`.
    pub fn lock(&self, limit: Duration) -> Result<Option<Locked<'_>>> {
        fs::create_dir_all(&self.directory).with_context(|| self.directory.display().to_string())?;
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
        let mut names = match fs::read_dir(&self.directory) {
            Ok(entries) => entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect::<Vec<_>>(),
            Err(_) => Vec::new(),
        };
        names.sort_unstable();
        let owners = names.iter().filter_map(|name| Owner::from_file_name(name));
        owners.filter_map(|owner| self.record(&owner).transpose()).collect()
    }

    /// The record that names a slot.
    ///
    /// # Errors
    /// As [`Store::records`].
    pub fn record_of_slot(&self, slot: &str) -> Result<Option<Record>> {
        Ok(self.records()?.into_iter().find(|record| record.slots().contains(&slot)))
    }

    /// A JSON document about a slot, such as what happened to it last; none when there is none that can be read.
    pub fn about(&self, what: About, slot: &str) -> Option<Value> {
        let bytes = self.read(&what.file_name(slot)).ok()??;
        serde_json::from_slice(&bytes).ok()
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

/// The documents that are kept about a slot.
#[derive(Debug, Clone, Copy)]
pub enum About {
    /// The last handoff with its time per phase.
    Last,
    /// The kernel call that never came back.
    Wedged,
}

impl About {
    fn file_name(self, slot: &str) -> String {
        match self {
            About::Last => format!("last-{slot}"),
            About::Wedged => format!("wedged-{slot}"),
        }
    }
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
    pub fn set_about(&self, what: About, slot: &str, document: &Value) -> Result<()> {
        self.write(&what.file_name(slot), &document.to_string())
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn clear_about(&self, what: About, slot: &str) -> Result<()> {
        self.unlink(&what.file_name(slot))
    }

    /// Whole or not at all: to a name that nobody reads, then renamed.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.store.directory.join(name);
        let new = self.store.directory.join(format!(".{name}.new"));
        fs::write(&new, text).with_context(|| new.display().to_string())?;
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
