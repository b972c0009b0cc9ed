//! modprobe's configuration, as kmod reads it (libkmod-config.c): directories in order, of files of one name the first one
//! alone, all of them sorted by name; a backslash joins lines, and a comment goes on with it.

use crate::sys::Kernel;
use std::collections::BTreeMap;
use std::fmt;

/// In modprobe's order of precedence.
pub const DIRECTORIES: [&str; 5] =
    ["/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"];

/// Where something stands: a file, and the lines of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: String,
    pub first: usize,
    pub last: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.path, self.first)
    }
}

/// One directive, such as `options vfio-pci ids=10de:2684`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub place: Place,
    pub words: Vec<String>,
}

impl Line {
    pub fn words(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }
}

/// Every line that counts, in the order in which they are read.
pub fn read(kernel: &dyn Kernel) -> Vec<Line> {
    files(kernel, &DIRECTORIES, &[".conf", ".alias"])
        .into_iter()
        .flat_map(|path| parse(&path, &kernel.text(&path).unwrap_or_default()))
        .collect()
}

/// The files that count of several directories, of which the earlier ones hide those of the same name in later ones:
/// modprobe, udev and systemd do it alike.
pub fn files(kernel: &dyn Kernel, directories: &[&str], endings: &[&str]) -> Vec<String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for directory in directories {
        for name in kernel.list(directory) {
            if !name.starts_with('.') && endings.iter().any(|ending| name.ends_with(ending)) {
                files.entry(name.clone()).or_insert_with(|| format!("{directory}/{name}"));
            }
        }
    }
    files.into_values().collect()
}

/// The lines of a file, joined where a backslash ends one, with the numbers of the first and the last. Without comments.
pub fn logical_lines(text: &str) -> Vec<(usize, usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    let mut number = 0;
    for line in text.lines() {
        number += 1;
        let (first, before) = open.take().unwrap_or((number, String::new()));
        match line.strip_suffix('\\') {
            Some(part) => open = Some((first, format!("{before}{part}"))),
            None => found.push((first, number, format!("{before}{line}"))),
        }
    }
    found.extend(open.map(|(first, text)| (first, number, text)));
    found.retain(|(_, _, text)| !text.trim().is_empty() && !text.trim_start().starts_with('#'));
    found
}

pub fn parse(path: &str, text: &str) -> Vec<Line> {
    let line = |(first, last, text): (usize, usize, String)| Line {
        place: Place { path: path.to_string(), first, last },
        words: text.split_whitespace().map(str::to_string).collect(),
    };
    logical_lines(text).into_iter().map(line).collect()
}

/// A module's name as the kernel has it: files and configurations may have dashes.
pub fn module(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;
    use std::fs;

    #[test]
    fn lines_that_a_backslash_joins_and_comments_that_go_on() {
        let text = "# a \\\nblacklist nvidia\n\noptions vfio-pci \\\n ids=10de:2684 \\\n disable_vga=1\n  install a b";
        let lines = parse("/etc/modprobe.d/x.conf", text);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].words(), ["options", "vfio-pci", "ids=10de:2684", "disable_vga=1"]);
        assert_eq!((lines[0].place.first, lines[0].place.last), (4, 6));
        assert_eq!(lines[1].place.to_string(), "/etc/modprobe.d/x.conf:7");
        assert_eq!(parse("x", "a \\"), parse("x", "a "));
    }

    #[test]
    fn an_earlier_directory_hides_a_later_ones_file() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-modprobe-{}", std::process::id()));
        let kernel = Linux::at(root.clone());
        for (path, text) in [
            ("usr/lib/modprobe.d/a.conf", "blacklist hidden"),
            ("etc/modprobe.d/a.conf", ""),
            ("lib/modprobe.d/c.conf", "blacklist last"),
            ("run/modprobe.d/b.alias", "alias b off"),
            ("etc/modprobe.d/d.conf.bak", "blacklist no"),
            ("etc/modprobe.d/.e.conf", "blacklist no"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let said: Vec<String> = read(&kernel).iter().map(|line| line.words[1].clone()).collect();
        fs::remove_dir_all(root).unwrap();
        assert_eq!(said, ["b", "last"]);
    }
}
