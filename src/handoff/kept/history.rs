//! What became of past handoffs: one line of JSON each, in a file that a reboot leaves alone.
//!
//! Nobody acts on it. So writing it fails no handoff and waits for no disk: after a power loss the last lines may be
//! missing or cut short.

use crate::sys::files;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

pub const PATH: &str = "/var/lib/gpu-handoff/history.jsonl";

/// Of the lines.
pub const SCHEMA: u64 = 1;

/// In one word each; see [`result`].
pub const RESULTS: [&str; 5] = ["done", "failed", "refused", "overrun", "locked"];

/// A file that has grown to this takes the place of the older one: together they stay below twice as much.
const ENOUGH: u64 = 128 * 1024;

#[derive(Debug, Clone)]
pub struct History {
    path: PathBuf,
}

/// What could be read.
#[derive(Debug, Default)]
pub struct Past {
    /// The newest last.
    pub entries: Vec<Value>,
    /// Lines that are not understood, each with its file and number.
    pub problems: Vec<String>,
}

impl History {
    /// `path` is [`PATH`], below whatever root there is.
    pub fn at(path: PathBuf) -> History {
        History { path }
    }

    /// What the entries add up to, those that are no longer there as well.
    pub fn counters(&self) -> PathBuf {
        self.path.with_file_name("counters.json")
    }

    fn older(&self) -> PathBuf {
        self.path.with_extension("jsonl.1")
    }

    /// Without the books' lock nobody may make room, and the file only grows: two who do at once could throw away what is
    /// new.
    ///
    /// # Errors
    /// Names the file that could not be written.
    pub fn append(&self, entry: &Value, may_make_room: bool) -> Result<()> {
        self.write(entry, may_make_room).with_context(|| self.path.display().to_string())
    }

    fn write(&self, entry: &Value, may_make_room: bool) -> io::Result<()> {
        let mut file = files::append_to(&self.path, 0o644)?;
        if may_make_room && file.metadata()?.len() >= ENOUGH {
            files::rename(&self.path, &self.older())?;
            file = files::append_to(&self.path, 0o644)?;
        }
        let apart = if ends_within_a_line(&file)? { "\n" } else { "" };
        let line = format!("{apart}{entry}\n");
        // One write(2), so that no two lines mix.
        let written = file.write(line.as_bytes())?;
        if written == line.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)) }
    }

    /// # Errors
    /// Names the file that cannot be read; that there is none is no error.
    pub fn read(&self) -> Result<Past> {
        let mut past = Past::default();
        for path in [self.older(), self.path.clone()] {
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            };
            for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
                match parse(line) {
                    Ok(entry) => past.entries.push(entry),
                    Err(problem) => past.problems.push(format!("{}: line {}: {problem}", path.display(), index + 1)),
                }
            }
        }
        Ok(past)
    }
}

/// How a handoff ended, in one of [`RESULTS`].
pub fn result(entry: &Value) -> &'static str {
    match entry.get("exit").and_then(Value::as_u64) {
        Some(0) => "done",
        Some(1) => "failed",
        Some(2 | 3) => "refused",
        Some(4) => "overrun",
        Some(5) => "locked",
        _ => "?",
    }
}

/// The end of what was written when the power failed or the disk was full.
fn ends_within_a_line(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else { return Ok(false) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte != [b'\n'])
}

fn parse(line: &[u8]) -> Result<Value, String> {
    let entry: Value = serde_json::from_slice(line).map_err(|_| "cut short or damaged, left out".to_string())?;
    match entry.get("schema").and_then(Value::as_u64) {
        Some(SCHEMA) => Ok(entry),
        Some(schema) => Err(format!("schema {schema}: written by a newer gpu-handoff, left out")),
        None => Err("schema: not a number, left out".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::kept::store::Store;
    use serde_json::json;
    use std::time::Duration;

    /// A directory of its own, gone with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("gpu-handoff-history-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Scratch(path)
        }

        fn history(&self) -> History {
            History::at(self.0.join("lib/history.jsonl"))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn entry(number: usize) -> Value {
        json!({"schema": SCHEMA, "ms": number, "reason": "x".repeat(500)})
    }

    fn numbers(past: &Past) -> Vec<u64> {
        past.entries.iter().filter_map(|entry| entry["ms"].as_u64()).collect()
    }

    #[test]
    fn what_is_written_is_read_back_in_order() {
        let scratch = Scratch::new("order");
        let history = scratch.history();
        assert!(history.read().unwrap().entries.is_empty());
        for number in 0..3 {
            history.append(&entry(number), false).unwrap();
        }
        let past = history.read().unwrap();
        assert_eq!(past.entries, [entry(0), entry(1), entry(2)]);
        assert!(past.problems.is_empty());
    }

    #[test]
    fn it_stays_small_and_keeps_the_newest() {
        let scratch = Scratch::new("small");
        let history = scratch.history();
        let store = Store::at(scratch.0.join("run"));
        let books = store.books(Duration::ZERO).unwrap();
        let size = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
        for number in 0..1000 {
            history.append(&entry(number), books.is_some()).unwrap();
            assert!(size(history.older()) + size(history.path.clone()) < 2 * ENOUGH + 2000);
        }
        let numbers = numbers(&history.read().unwrap());
        // One of the two files is full, and nothing is missing from its beginning on.
        assert!(size(history.older()) >= ENOUGH);
        assert_eq!(numbers, (1000 - numbers.len() as u64..1000).collect::<Vec<_>>());
    }

    #[test]
    fn who_has_no_lock_makes_no_room() {
        let scratch = Scratch::new("room");
        let history = scratch.history();
        for number in 0..300 {
            history.append(&entry(number), false).unwrap();
        }
        assert!(!history.older().exists());
        assert_eq!(numbers(&history.read().unwrap()).len(), 300);
    }

    #[test]
    fn a_line_that_was_cut_short_takes_no_other_with_it() {
        let scratch = Scratch::new("torn");
        let history = scratch.history();
        history.append(&entry(0), false).unwrap();
        for end in [r#"{"schema":1,"ms"#, "\0\0\0\0", "{\"schema\":2}\n", "{}\n"] {
            files::append_to(&history.path, 0o644).unwrap().write_all(end.as_bytes()).unwrap();
        }
        history.append(&entry(1), false).unwrap();
        let past = history.read().unwrap();
        assert_eq!(numbers(&past), [0, 1]);
        let file = history.path.display();
        assert_eq!(
            past.problems,
            [
                format!("{file}: line 2: cut short or damaged, left out"),
                format!("{file}: line 3: schema: not a number, left out"),
            ]
        );
    }

    #[test]
    fn a_schema_of_the_future_is_named() {
        assert!(parse(br#"{"schema":2}"#).unwrap_err().starts_with("schema 2: written by a newer"));
        assert!(parse(b"{}").unwrap_err().starts_with("schema: not a number"));
    }

    #[test]
    fn every_exit_code_has_its_word() {
        let words: Vec<&str> = (0..7).map(|exit| result(&json!({"exit": exit}))).collect();
        assert_eq!(words, ["done", "failed", "refused", "refused", "overrun", "locked", "?"]);
        assert_eq!(result(&json!({})), "?");
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let problem = History::at("/dev/full".into()).append(&entry(0), false).unwrap_err();
        assert_eq!(format!("{problem:#}"), "/dev/full: No space left on device (os error 28)");
    }
}
