//! `/run/gpu-handoff`: records, journals, what is wedged and what happened last. Written only by the holder of a lock.
//!
//! The locks, in the order in which they are taken; nobody waits for one that comes before one it has:
//!
//! 1. `lock-SLOT`, sorted by slot: the card, its records, its wedge. Whoever changes a record has the locks of all the
//!    slots that it names. Held for all of a handoff.
//! 2. `lock`: the driver's module stack. Alone by whoever loads or unloads modules, together by those who only bind and
//!    unbind their card beside a driver that stays. Held while steps are planned and carried out, and never while
//!    something is being stopped or QEMU lets go.
//! 3. `lock-books`: the files that are not one slot's, for the moment in which they are read and written.

use super::history::History;
use super::journal::Journal;
use super::record::{MANUAL, Owner, Record};
use super::to_start::ToStart;
use super::wedge::Wedge;
use crate::address::SlotId;
use crate::gpu::dri;
use crate::sys::{Kernel, Lock, Share, files};
use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub const DIRECTORY: &str = "/run/gpu-handoff";
/// Of the driver's module stack; the others' names begin with this.
pub(super) const LOCK: &str = "lock";
pub(super) const BOOKS: &str = "lock-books";
pub(super) const KEEPER: &str = "lock-keeper";
pub(super) const WATCH: &str = "lock-watch-";
const JOURNAL: &str = "journal";
const WEDGED: &str = "wedged-";
pub(super) const TO_START: &str = "to-start";
pub(super) const PINNED: &str = "pin-";
const RETRIES: &str = "retries";
pub(super) const DRI: &str = "dri";
/// What a set-up of the driver has stopped: written there, and read there.
pub const SET_UP: &str = "setup-stopped";

/// Reads by anybody.
#[derive(Debug, Clone)]
pub struct Store {
    pub(super) directory: PathBuf,
    /// Not below `directory`: it outlives a reboot.
    history: Option<History>,
    is_changed: Cell<bool>,
}

/// Writes by the holder of slots' locks.
pub struct Locked<'a> {
    pub(super) store: &'a Store,
    slots: BTreeSet<SlotId>,
    _locks: Vec<Lock>,
}

/// The lock of the driver's module stack.
pub struct Stack {
    share: Share,
    _lock: Lock,
}

impl Stack {
    /// Whether what needs it like that may be done under it.
    pub fn is_enough_for(&self, share: Share) -> bool {
        self.share == Share::Alone || share == Share::Together
    }
}

impl Store {
    /// `directory` is [`DIRECTORY`], below whatever root there is.
    pub fn at(directory: PathBuf) -> Store {
        Store { directory, history: None, is_changed: Cell::default() }
    }

    #[must_use]
    pub fn with_history(self, history: History) -> Store {
        Store { history: Some(history), ..self }
    }

    /// Whether this run has written anything of what is kept.
    pub fn is_changed(&self) -> bool {
        self.is_changed.get()
    }

    pub(super) fn set_changed(&self) {
        self.is_changed.set(true);
    }

    /// None when none is kept.
    pub fn history(&self) -> Option<&History> {
        self.history.as_ref()
    }

    /// # Errors
    /// When a lock file cannot be made. None when somebody else held the lock of one of the slots for all of `limit`.
    pub fn lock(&self, slots: &BTreeSet<SlotId>, limit: Duration) -> Result<Option<Locked<'_>>> {
        let end = Instant::now() + limit;
        let mut locks = Vec::new();
        // A set is sorted.
        for slot in slots {
            let left = end.saturating_duration_since(Instant::now());
            let Some(lock) = self.take(&format!("{LOCK}-{slot}"), Share::Alone, left)? else { return Ok(None) };
            locks.push(lock);
        }
        Ok(Some(Locked { store: self, slots: slots.clone(), _locks: locks }))
    }

    /// # Errors
    /// As [`Store::lock`].
    pub fn stack(&self, share: Share, limit: Duration) -> Result<Option<Stack>> {
        let lock = self.take(LOCK, share, limit)?;
        Ok(lock.map(|lock| Stack { share, _lock: lock }))
    }

    /// Of the files that are not one slot's.
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn books(&self, limit: Duration) -> Result<Option<Lock>> {
        self.take(BOOKS, Share::Alone, limit)
    }

    /// There is one keeper at a time; none when there is another.
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn keeper(&self) -> Result<Option<Lock>> {
        self.take(KEEPER, Share::Alone, Duration::ZERO)
    }

    /// Held by whoever watches over a start of this VM.
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn watcher(&self, vmid: u32) -> Result<Option<Lock>> {
        // Several may watch: each has a start of its own.
        self.take(&watch_file(vmid), Share::Together, Duration::ZERO)
    }

    pub(super) fn take(&self, name: &str, share: Share, limit: Duration) -> Result<Option<Lock>> {
        files::make_folder(&self.directory).with_context(|| self.directory.display().to_string())?;
        let path = self.directory.join(name);
        Lock::take_as(&path, share, limit).with_context(|| path.display().to_string())
    }

    pub fn has_record(&self, owner: &Owner) -> bool {
        files::exists(&self.directory.join(owner.file_name()))
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
        let read = |name: String| match Owner::from_file_name(&name) {
            Some(owner) => self.record(&owner).transpose(),
            None if name.starts_with(MANUAL) => {
                Some(Err(anyhow!("named after no slot").context(self.directory.join(name).display().to_string())))
            }
            None => None,
        };
        self.names().into_iter().filter_map(read).collect()
    }

    /// The journals of handoffs that are under way, or that were killed, each with its file's name.
    pub fn journals(&self) -> Vec<(String, Result<Journal>)> {
        let names = self.names().into_iter().filter(|name| name.starts_with(JOURNAL));
        names.filter_map(|name| Some((name.clone(), self.journal(&name).transpose()?))).collect()
    }

    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn journal(&self, name: &str) -> Result<Option<Journal>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let path = self.directory.join(name);
        Journal::parse(&bytes).map(Some).with_context(|| path.display().to_string())
    }

    /// The kernel call that never came back to a slot.
    ///
    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn wedge(&self, slot: SlotId) -> Result<Option<Wedge>> {
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
    pub fn has_call(&self, kernel: &dyn Kernel, slot: SlotId) -> bool {
        let is_wedged = self.wedge(slot).map_or(true, |wedge| wedge.is_some_and(|wedge| wedge.is_still_stuck(kernel)));
        let is_at_it = |journal: Journal| {
            journal.slots.contains(&slot) && kernel.process(journal.worker.pid) == Some(journal.worker)
        };
        is_wedged || self.journals().into_iter().any(|(_, journal)| journal.map_or(true, is_at_it))
    }

    /// Every slot with a wedge, sorted.
    pub fn wedged_slots(&self) -> Vec<SlotId> {
        self.names().iter().filter_map(|name| name.strip_prefix(WEDGED)?.parse().ok()).collect()
    }

    /// The names that the cards' nodes in /dev/dri had before one of them left; kept until they have them again. What
    /// cannot be read is forgotten.
    pub fn dri(&self) -> dri::Names {
        let bytes = self.read(DRI).ok().flatten().unwrap_or_default();
        dri::from_json(&serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// What happened to a slot last; none when there is nothing that can be read.
    pub fn last(&self, slot: SlotId) -> Option<Value> {
        serde_json::from_slice(&self.read(&last_file(slot)).ok()??).ok()
    }

    /// Whether anything is kept that somebody must come back for, read or not.
    pub fn has_anything(&self) -> bool {
        let is_owed = |name: &str| {
            let is_record = name.starts_with(MANUAL) || Owner::from_file_name(name).is_some();
            is_record || [TO_START, SET_UP].contains(&name) || [WEDGED, PINNED].iter().any(|of| name.starts_with(of))
        };
        self.names().iter().any(|name| is_owed(name))
    }

    /// When each record that could not be brought home is tried again. What cannot be read counts for nothing.
    pub fn retries(&self) -> Value {
        let bytes = self.read(RETRIES).ok().flatten().unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// By the keeper alone.
    ///
    /// # Errors
    /// Names the file that could not be written.
    pub fn set_retries(&self, _keeper: &Lock, retries: &Value) -> Result<()> {
        match retries.as_object().is_none_or(Map::is_empty) {
            true => self.unlink(RETRIES),
            false => self.write(RETRIES, &retries.to_string()),
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names = match fs::read_dir(&self.directory) {
            Ok(entries) => entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect::<Vec<_>>(),
            Err(_) => Vec::new(),
        };
        names.sort_unstable();
        names
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.directory.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Root acts on what stands in these files: nobody else writes them.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        self.set_changed();
        let path = self.directory.join(name);
        files::write(&path, text.as_bytes(), 0o644).with_context(|| path.display().to_string())
    }

    pub(super) fn unlink(&self, name: &str) -> Result<()> {
        self.set_changed();
        let path = self.directory.join(name);
        files::remove(&path).with_context(|| path.display().to_string())
    }
}

pub(super) fn watch_file(vmid: u32) -> String {
    format!("{WATCH}{vmid}")
}

fn last_file(slot: SlotId) -> String {
    format!("last-{slot}")
}

fn wedge_file(slot: SlotId) -> String {
    format!("{WEDGED}{slot}")
}

impl Locked<'_> {
    pub fn has(&self, slot: SlotId) -> bool {
        self.slots.contains(&slot)
    }

    /// # Errors
    /// Names the file that could not be written; the old one is still whole.
    pub fn save(&self, record: &Record) -> Result<()> {
        self.store.write(&record.owner.file_name(), &record.to_json())
    }

    /// # Errors
    /// Names the file that could not be removed.
    pub fn remove(&self, owner: &Owner) -> Result<()> {
        self.store.unlink(&owner.file_name())
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn write_journal(&self, journal: &Journal) -> Result<()> {
        self.store.write(&journal_file(&journal.owner), &journal.to_json())
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn end_journal(&self, owner: &Owner) -> Result<()> {
        self.store.unlink(&journal_file(owner))
    }

    /// By its file's name.
    ///
    /// # Errors
    /// As [`Locked::remove`].
    pub fn forget_journal(&self, name: &str) -> Result<()> {
        self.store.unlink(name)
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn set_wedge(&self, slot: SlotId, wedge: &Wedge) -> Result<()> {
        self.store.write(&wedge_file(slot), &wedge.to_json().to_string())
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn clear_wedge(&self, slot: SlotId) -> Result<()> {
        self.store.unlink(&wedge_file(slot))
    }

    /// # Errors
    /// As [`Locked::save`].
    pub fn set_last(&self, slot: SlotId, last: &Value) -> Result<()> {
        self.store.write(&last_file(slot), &last.to_string())
    }
}

fn journal_file(owner: &Owner) -> String {
    format!("{JOURNAL}-{}", owner.file_name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// For all that the keeper comes back for systemd starts it, and for nothing else.
    #[test]
    fn the_keeper_is_started_for_what_it_keeps() {
        let unit = include_str!("../../../packaging/debian/gpu-handoff.gpu-handoff-keeper.path");
        let paths = unit.lines().filter_map(|line| line.strip_prefix("PathExists")?.split_once('='));
        let is_named = |name: &str| {
            let path = format!("{DIRECTORY}/{name}");
            paths.clone().any(|(_, pattern)| match pattern.strip_suffix('*') {
                Some(beginning) => path.starts_with(beginning),
                None => path == pattern,
            })
        };
        let directory = std::env::temp_dir().join(format!("gpu-handoff-kept-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        let store = Store::at(directory.clone());
        for name in [
            "vm-111",
            "manual-0000:01:00",
            "wedged-0000:01:00",
            "pin-111",
            "pinning",
            TO_START,
            SET_UP,
            DRI,
            RETRIES,
            LOCK,
            BOOKS,
        ] {
            fs::write(directory.join(name), "").unwrap();
            assert_eq!(store.has_anything(), is_named(name), "{name}");
            fs::remove_file(directory.join(name)).unwrap();
        }
        assert!(is_named("vm-111") && is_named(SET_UP) && !is_named(DRI));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn together_with_others_is_not_enough_for_one_who_must_be_alone() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-stack-{}", std::process::id()));
        let store = Store::at(directory.clone());
        for (had, needed, is_enough) in [
            (Share::Alone, Share::Alone, true),
            (Share::Alone, Share::Together, true),
            (Share::Together, Share::Together, true),
            (Share::Together, Share::Alone, false),
        ] {
            let stack = store.stack(had, Duration::ZERO).unwrap().unwrap();
            assert_eq!(stack.is_enough_for(needed), is_enough, "{had:?} {needed:?}");
        }
        fs::remove_dir_all(directory).unwrap();
    }

    /// Whoever reads a record while it is written anew reads all of the old one or all of the new one.
    #[test]
    fn a_record_is_never_half_written() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-store-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let store = Store::at(directory.clone());
        let locked = store.lock(&BTreeSet::new(), Duration::ZERO).unwrap().unwrap();
        let mut record = Record::new(Owner::Vm(111));
        fs::create_dir_all(&directory).unwrap();
        locked.save(&record).unwrap();
        let path = directory.join("vm-111");
        let (inode, text) = (fs::metadata(&path).unwrap().ino(), fs::read(&path).unwrap());
        let old = fs::File::open(&path).unwrap();
        record.console = true;
        locked.save(&record).unwrap();
        assert_ne!(fs::metadata(&path).unwrap().ino(), inode);
        let mut still = vec![0; text.len()];
        std::os::unix::fs::FileExt::read_exact_at(&old, &mut still, 0).unwrap();
        assert_eq!(still, text);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        // What cannot be written leaves the old one.
        fs::create_dir(directory.join(".vm-111.new")).unwrap();
        record.console = false;
        assert!(locked.save(&record).is_err());
        assert!(store.record(&Owner::Vm(111)).unwrap().unwrap().console);
        fs::remove_dir_all(directory).unwrap();
    }
}
