//! What stands after a verb, taken out piece by piece.

use super::call::Call;
use crate::address::SlotId;
use crate::containers::{Style, Who, Wish};
use crate::doctor::{self, How};
use crate::exit::{Exit, Result};
use crate::setup::{self, driver, vfio};
use std::collections::BTreeMap;

/// Each flag that was given, with its values.
pub(super) type Flags = BTreeMap<&'static str, Vec<String>>;

/// What stood after the verb.
pub(super) struct Given<'a> {
    pub verb: &'a str,
    pub words: &'a [&'a str],
    pub flags: &'a Flags,
}

impl Given<'_> {
    pub fn has(&self, flag: &str) -> bool {
        self.flags.contains_key(flag)
    }

    fn next(&mut self) -> Option<&str> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        Some(first)
    }

    /// The one that was named, with `--gpu` or without.
    pub fn slot(&mut self) -> Result<Option<SlotId>> {
        let mut slots = self.values("gpu");
        // What begins with a dash is left where it is, for who knows all flags.
        if self.words.first().is_some_and(|word| !word.starts_with('-')) {
            slots.extend(self.next().map(str::to_string));
        }
        match slots.as_slice() {
            [] => Ok(None),
            [slot] if slot.starts_with('-') => Err(usage(&format!("{slot} is no slot"))),
            [slot] => slot_from(slot).map(Some),
            [_, more, ..] => Err(usage(&format!("{more} is too much"))),
        }
    }

    pub fn id(&mut self, kind: &str) -> Result<u32> {
        let verb = self.verb;
        let word = self.next().ok_or_else(|| usage(&format!("{verb} needs the id of a {kind}")))?;
        guest_id(word)
    }

    fn values(&self, flag: &str) -> Vec<String> {
        self.flags.get(flag).cloned().unwrap_or_default()
    }

    pub fn value(&self, flag: &str) -> Option<String> {
        self.values(flag).pop()
    }

    pub fn number(&self) -> Result<Option<usize>> {
        let number = |word: String| word.parse().map_err(|_| usage(&format!("-n {word} is no number")));
        self.value("n").map(number).transpose()
    }

    /// As `--json`, or in the words of Proxmox's own tools.
    pub fn json(&self) -> Result<bool> {
        match self.value("output-format").as_deref() {
            None => Ok(self.has("json")),
            Some("json") => Ok(true),
            Some("text") => Ok(false),
            Some(other) => Err(usage(&format!("--output-format {other} is unknown: text or json"))),
        }
    }

    pub fn vfio(&self) -> vfio::Wish {
        vfio::Wish { cmdline: self.has("cmdline"), undo: self.has("undo"), defer: self.has("defer") }
    }

    pub fn driver(&self) -> driver::Wish {
        let (install_deps, purge) = (self.has("install-deps"), self.has("purge"));
        driver::Wish { install_deps, purge, undo: self.has("undo"), defer: self.has("defer"), offline: false }
    }

    pub fn set_up(&self, what: setup::What) -> Result<Call> {
        match ["cmdline", "install-deps", "purge", "defer"].into_iter().find(|flag| self.has("undo") && self.has(flag))
        {
            Some(flag) => Err(usage(&format!("--undo takes all of it back: leave out --{flag}"))),
            None => Ok(Call::HostSetup { what }),
        }
    }

    pub fn doctor(&mut self) -> Result<doctor::Wish> {
        let guest = if self.words.is_empty() { None } else { Some(self.id("guest")?) };
        let json = self.json()?;
        let asked: Vec<&str> = ["explain", "fix", "report"].into_iter().filter(|flag| self.has(flag)).collect();
        let others = [("--json", json), ("an ID", guest.is_some())].into_iter().filter(|(_, is)| *is);
        let others: Vec<&str> = others.map(|(name, _)| name).collect();
        let how = match asked.as_slice() {
            [first, second, ..] => return Err(usage(&format!("--{first} and --{second} exclude each other"))),
            ["explain"] if !others.is_empty() => return Err(usage("--explain stands alone")),
            [flag @ ("fix" | "report")] if json => {
                return Err(usage(&format!("--{flag} and --json exclude each other")));
            }
            ["explain"] => How::Explain(self.value("explain").unwrap_or_default()),
            ["fix"] => How::Fix,
            ["report"] => How::Report { to: self.value("to") },
            _ => How::Tell { json },
        };
        for (flag, with) in [("dry-run", "fix"), ("to", "report")] {
            if self.has(flag) && asked != [with] {
                return Err(usage(&format!("--{flag} of doctor goes with --{with}")));
            }
        }
        Ok(doctor::Wish { guest, how })
    }

    pub fn who(&mut self) -> Result<Who> {
        match (self.has("all"), self.words.first()) {
            (true, None) => Ok(Who::All),
            (true, Some(word)) => Err(usage(&format!("{word} and --all exclude each other"))),
            (false, None) => Err(usage(&format!("{} needs the id of a container, or --all", self.verb))),
            (false, Some(_)) => Ok(Who::One(self.id("container")?)),
        }
    }

    pub fn wish(&mut self) -> Result<Wish> {
        let mut gpus = self.values("gpu");
        // Only what may be one: a second id is a mistake that must be named.
        while let Some(slot) = self.words.first().filter(|word| word.contains(':')) {
            gpus.push((*slot).to_string());
            self.next();
        }
        let style = match self.value("style").as_deref() {
            None => None,
            Some("mount") => Some(Style::Mount),
            Some("dev") => Some(Style::Dev),
            Some(other) => return Err(usage(&format!("--style {other} is unknown: mount or dev"))),
        };
        let gpus = gpus.iter().map(|gpu| slot_from(gpu)).collect::<Result<_>>()?;
        Ok(Wish { gpus, style, dri: self.has("dri") })
    }
}

fn slot_from(word: &str) -> Result<SlotId> {
    SlotId::from_named(word).ok_or_else(|| Exit::usage(format!("{word} is no slot; a slot is written like 0000:01:00")))
}

pub(super) fn guest_id(word: &str) -> Result<u32> {
    word.parse().map_err(|_| usage(&format!("{word} is no guest id")))
}

pub(super) fn usage(problem: &str) -> Exit {
    Exit::usage(format!("{problem}; see gpu-handoff --help"))
}
