//! The files that are not one slot's, each changed under the books' lock.

use super::counters::Counters;
use super::record::Stopped;
use super::store::{BOOKS, DRI, Locked, Store, TO_START};
use super::to_start::ToStart;
use crate::gpu::dri;
use crate::sys::{Lock, files};
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// Reading and writing a file takes microseconds.
const BOOKKEEPING: Duration = Duration::from_secs(5);

/// For what nobody acts on, after a handoff that may have used all of its time.
const SHORTLY: Duration = Duration::from_millis(500);

impl Locked<'_> {
    /// None of the cards is forgotten that are kept already; of nothing the file goes.
    ///
    /// # Errors
    /// As [`Locked::save`].
    pub fn keep_dri(&self, names: &dri::Names) -> Result<()> {
        self.store.write_dri(&mut |kept| {
            names.iter().for_each(|(card, names)| {
                kept.entry(*card).or_insert_with(|| names.clone());
            })
        })
    }

    /// # Errors
    /// As [`Locked::remove`].
    pub fn forget_dri(&self) -> Result<()> {
        self.store.write_dri(&mut dri::Names::clear)
    }

    /// What waits to be started for these slots is this record's from now on, which has been saved.
    ///
    /// # Errors
    /// As [`Locked::save`]; then it is in both places.
    pub fn take_over(&self, stopped: &[Stopped]) -> Result<()> {
        if stopped.is_empty() {
            return Ok(());
        }
        self.store.change_to_start(|entries| entries.retain(|entry| !stopped.contains(&entry.what)))
    }
}

impl Store {
    fn open_books(&self, patience: Duration) -> Result<Lock> {
        let path = self.directory.join(BOOKS);
        self.books(patience)?.with_context(|| format!("{}: locked by somebody all the time", path.display()))
    }

    fn write_dri(&self, change: &mut dyn FnMut(&mut dri::Names)) -> Result<()> {
        let _books = self.open_books(BOOKKEEPING)?;
        let before = self.dri();
        let mut names = before.clone();
        change(&mut names);
        match names {
            names if names == before => Ok(()),
            names if names.is_empty() => self.unlink(DRI),
            names => self.write(DRI, &dri::to_json(&names).to_string()),
        }
    }

    /// What cannot be understood is put aside.
    ///
    /// # Errors
    /// When what waits to be started cannot be read or written.
    pub fn change_to_start(&self, change: impl FnOnce(&mut Vec<ToStart>)) -> Result<()> {
        let _books = self.open_books(BOOKKEEPING)?;
        let before = match self.to_start() {
            Ok(entries) => entries,
            // Nobody can act on it; an administrator may still read it.
            Err(_) => {
                let path = self.directory.join(TO_START);
                files::rename(&path, &path.with_extension("unreadable")).with_context(|| path.display().to_string())?;
                Vec::new()
            }
        };
        let mut entries = before.clone();
        change(&mut entries);
        match entries.as_slice() {
            same if same == before => Ok(()),
            [] => self.unlink(TO_START),
            entries => self.write(TO_START, &ToStart::to_json(entries)),
        }
    }

    /// A line more in the history, and one handoff more in what is counted. Nobody acts on either, so whatever cannot be
    /// written is for a warning, and no disk is waited for.
    pub fn remember(&self, entry: &Value) -> Vec<anyhow::Error> {
        self.set_changed();
        let Some(history) = self.history() else { return Vec::new() };
        let books = self.open_books(SHORTLY);
        let written = history.append(entry, books.is_ok());
        let counted = books.and_then(|_books| {
            let path = history.counters();
            let mut counters = self.counters();
            counters.add(entry);
            files::write_lightly(&path, counters.to_json().as_bytes(), 0o644)
                .with_context(|| path.display().to_string())
        });
        [written, counted].into_iter().filter_map(Result::err).collect()
    }

    /// Nothing, where they cannot be read.
    pub fn counters(&self) -> Counters {
        let bytes = self.history().and_then(|history| fs::read(history.counters()).ok());
        Counters::parse(&bytes.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::SlotId;
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    /// A directory of its own, gone with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("gpu-handoff-books-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Scratch(path)
        }

        fn store(&self) -> Store {
            Store::at(self.0.clone())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn names(cards: &[(&str, &str)]) -> dri::Names {
        cards.iter().map(|(address, name)| (address.parse().unwrap(), vec![(*name).to_string()])).collect()
    }

    #[test]
    fn names_of_nodes_stay_as_they_were_first_until_they_are_forgotten() {
        let scratch = Scratch::new("dri");
        let store = scratch.store();
        let locked = store.lock(&BTreeSet::new(), Duration::ZERO).unwrap().unwrap();
        locked.keep_dri(&names(&[("0000:01:00.0", "card0")])).unwrap();
        locked.keep_dri(&names(&[("0000:01:00.0", "card1"), ("0000:02:00.0", "card2")])).unwrap();
        let kept = names(&[("0000:01:00.0", "card0"), ("0000:02:00.0", "card2")]);
        assert_eq!(store.dri(), kept);
        // What is known already is not written again.
        let again = scratch.store();
        again.lock(&BTreeSet::new(), Duration::ZERO).unwrap().unwrap().keep_dri(&kept).unwrap();
        assert!(!again.is_changed());
        locked.forget_dri().unwrap();
        assert!(store.dri().is_empty() && !scratch.0.join(DRI).exists());
    }

    #[test]
    fn what_a_record_takes_over_waits_no_more() {
        let scratch = Scratch::new("to-start");
        let store = scratch.store();
        let slots: [SlotId; 1] = ["0000:01:00".parse().unwrap()];
        let entry = |ctid| ToStart::new(Stopped::Container(ctid), &slots);
        store.change_to_start(|entries| entries.extend([entry(101), entry(102)])).unwrap();
        let again = scratch.store();
        again.change_to_start(|_| ()).unwrap();
        assert!(!again.is_changed());
        let locked = store.lock(&BTreeSet::new(), Duration::ZERO).unwrap().unwrap();
        locked.take_over(&[]).unwrap();
        assert_eq!(store.to_start().unwrap(), [entry(101), entry(102)]);
        locked.take_over(&[Stopped::Container(101)]).unwrap();
        assert_eq!(store.to_start().unwrap(), [entry(102)]);
        locked.take_over(&[Stopped::Container(102)]).unwrap();
        assert!(!scratch.0.join(TO_START).exists());
    }
}
