//! Words of the kernel's command line: each told where it can be taken out.

use super::facts::host::Host;
use super::finding::Hit;
use crate::causes::{self, cmdline};
use crate::setup::bootloader::Loader;

/// A word that was found.
pub struct Word {
    pub place: String,
    pub word: String,
    pub is_booted: bool,
    /// The file and line that it comes from, and what carries a change to where the host boots from.
    from: Option<(String, usize, &'static str)>,
}

/// Those words that are sought: in the files that they come from, else as the kernel was booted with.
pub fn words(host: &Host, is_sought: &dyn Fn(&str) -> bool) -> Vec<Word> {
    let counts = |path: &str| match host.loader {
        Loader::SystemdBoot => !path.starts_with("/etc/default/grub"),
        Loader::Grub => path != "/etc/kernel/cmdline",
        Loader::Unknown => true,
    };
    let mut found: Vec<Word> = Vec::new();
    for line in host.command_files().iter().filter(|line| counts(&line.path)) {
        for word in line.words.iter().filter(|word| is_sought(word)) {
            found.push(Word {
                place: format!("{}:{}", line.path, line.line),
                is_booted: host.booted().contains(word),
                word: word.clone(),
                from: Some((line.path.clone(), line.line, line.then.unwrap_or_default())),
            });
        }
    }
    for word in host.booted().iter().filter(|word| is_sought(word)) {
        if !found.iter().any(|one| one.word == *word) {
            found.push(Word { place: cmdline::BOOTED.to_string(), word: word.clone(), is_booted: true, from: None });
        }
    }
    found
}

impl Word {
    pub fn hit(&self, found: &str, remedy: &str) -> Hit {
        Hit::at(&self.place, found, remedy)
    }

    pub fn when(&self) -> &'static str {
        if self.is_booted { "" } else { " from the next boot on" }
    }

    /// What to type so that only this is left of it, which may be nothing.
    pub fn without(&self, rest: &str) -> String {
        match &self.from {
            Some((path, line, then)) => {
                let then = if matches!(*then, "" | "true") { String::new() } else { format!(" && {then}") };
                format!("{}{then}; then reboot the host", causes::replace(path, *line, &self.word, rest))
            }
            None => cmdline::by_hand(rest),
        }
    }
}
