//! `/run/gpu-handoff/pin-ID`: what was changed outside a VM for its pinning, and how it was before. Its threads end with it.

use super::store::{PINNED, Store};
use crate::cpus::Cpus;
use crate::sys::{Lock, Share, files};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;

const SCHEMA: u64 = 1;
/// Held by whoever pins or puts back, of whatever VM.
const PINNING: &str = "pinning";

/// An attribute of the kernel that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub path: String,
    pub was: String,
    pub set: String,
    /// What handled this interrupt, since its number may be another's later; empty where it is none.
    pub handler: String,
}

impl Kept {
    /// Whether an attribute still says what was set, however the kernel writes that.
    pub fn is_set(&self, now: &str) -> bool {
        let cpus = |text: &str| Cpus::of_set(text.trim());
        now.trim() == self.set || cpus(now).zip(cpus(&self.set)).is_some_and(|(now, set)| now.is_same_as(&set))
    }

    /// One after the other.
    fn to_json(&self) -> Value {
        json!([self.path, self.was, self.set, self.handler])
    }

    fn parse(value: &Value) -> Option<Kept> {
        let text = |index: usize| Some(value.get(index)?.as_str()?.to_string());
        Some(Kept { path: text(0)?, was: text(1)?, set: text(2)?, handler: text(3)? })
    }
}

/// One change more. What was before the first counts, whoever made it.
pub fn remember(kept: &mut Vec<Kept>, of_others: &[Kept], new: &Kept) {
    let is_same = |one: &&Kept| one.path == new.path && one.handler == new.handler;
    let first = kept.iter().chain(of_others).find(is_same).unwrap_or(new);
    let entry = Kept { was: first.was.clone(), ..new.clone() };
    match kept.iter_mut().find(|one| one.path == new.path) {
        Some(one) => *one = entry,
        None => kept.push(entry),
    }
}

impl Store {
    /// # Errors
    /// When the file cannot be made. None when somebody else had it for all of `limit`.
    pub fn pinning(&self, limit: Duration) -> Result<Option<Lock>> {
        self.take(PINNING, Share::Alone, limit)
    }

    pub fn has_pinned(&self, vmid: u32) -> bool {
        files::exists(&self.directory.join(file(vmid)))
    }

    /// # Errors
    /// Names the file when it cannot be read or understood.
    pub fn pinned(&self, vmid: u32) -> Result<Vec<Kept>> {
        let name = file(vmid);
        let Some(bytes) = self.read(&name)? else { return Ok(Vec::new()) };
        parse(&bytes).with_context(|| self.directory.join(&name).display().to_string())
    }

    /// Of all VMs but one. What cannot be read is nobody's.
    pub fn pinned_but(&self, vmid: u32) -> Vec<Kept> {
        let others = self.pinned_vms().into_iter().filter(|other| *other != vmid);
        others.flat_map(|other| self.pinned(other).unwrap_or_default()).collect()
    }

    pub fn pinned_vms(&self) -> Vec<u32> {
        self.names().iter().filter_map(|name| name.strip_prefix(PINNED)?.parse().ok()).collect()
    }

    /// # Errors
    /// Names the file that could not be written.
    pub fn set_pinned(&self, _pinning: &Lock, vmid: u32, kept: &[Kept]) -> Result<()> {
        if kept.is_empty() {
            return self.unlink(&file(vmid));
        }
        let changes: Vec<Value> = kept.iter().map(Kept::to_json).collect();
        self.write(&file(vmid), &json!({"schema": SCHEMA, "changes": changes}).to_string())
    }
}

fn file(vmid: u32) -> String {
    format!("{PINNED}{vmid}")
}

fn parse(bytes: &[u8]) -> Result<Vec<Kept>> {
    let value: Value = serde_json::from_slice(bytes)?;
    ensure!(value.get("schema").and_then(Value::as_u64) == Some(SCHEMA), "schema: expected {SCHEMA}");
    let changes = value.get("changes").and_then(Value::as_array).context("changes: no list")?;
    changes.iter().map(|one| Kept::parse(one).with_context(|| format!("{one} is not understood"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(path: &str, was: &str, set: &str, handler: &str) -> Kept {
        let [path, was, set, handler] = [path, was, set, handler].map(str::to_string);
        Kept { path, was, set, handler }
    }

    #[test]
    fn what_was_before_the_first_change_is_remembered() {
        let mut mine = Vec::new();
        remember(&mut mine, &[], &kept("/a", "0-7", "2", ""));
        remember(&mut mine, &[], &kept("/a", "2", "3", ""));
        assert_eq!(mine, [kept("/a", "0-7", "3", "")]);
        // Another VM was the first.
        remember(&mut mine, &[kept("/b", "powersave", "performance", "")], &kept("/b", "performance", "schedutil", ""));
        assert_eq!(mine[1], kept("/b", "powersave", "schedutil", ""));
        // The number has come to be that of another interrupt, which was never elsewhere.
        remember(&mut mine, &[], &kept("/c", "0-7", "1", "vfio-msix[0](0000:01:00.0)"));
        remember(&mut mine, &[], &kept("/c", "4-7", "1", "vfio-msix[9](0000:01:00.0)"));
        assert_eq!(mine[2], kept("/c", "4-7", "1", "vfio-msix[9](0000:01:00.0)"));
        assert_eq!(mine.len(), 3);
    }

    #[test]
    fn what_somebody_else_has_changed_is_seen() {
        let irq = kept("/a", "0-7", "3,0-1", "");
        assert!(irq.is_set("0-1,3\n") && !irq.is_set("0-3\n") && !irq.is_set("0-7") && !irq.is_set(""));
        let governor = kept("/p", "powersave", "performance", "");
        assert!(governor.is_set("performance\n") && !governor.is_set("powersave\n"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-pinned-{}", std::process::id()));
        let store = Store::at(directory.clone());
        let lock = store.pinning(Duration::ZERO).unwrap().unwrap();
        assert!(store.pinning(Duration::ZERO).unwrap().is_none());
        let all = [kept("/a", "0-7", "2", ""), kept("/c", "0-7", "1", "vfio-intx(0000:01:00.0)")];
        store.set_pinned(&lock, 111, &all).unwrap();
        store.set_pinned(&lock, 112, &all[..1]).unwrap();
        assert_eq!((store.pinned(111).unwrap(), store.pinned_but(111)), (all.to_vec(), all[..1].to_vec()));
        assert!(store.has_anything());
        store.set_pinned(&lock, 111, &[]).unwrap();
        store.set_pinned(&lock, 112, &[]).unwrap();
        assert!(!store.has_pinned(111) && store.pinned_vms().is_empty() && !store.has_anything());
        std::fs::write(directory.join("pin-111"), "{}").unwrap();
        assert!(store.pinned(111).is_err());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
