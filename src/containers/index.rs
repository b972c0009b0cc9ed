//! What is in a repository of packages, by its index (`Packages`). Pure; whoever has the repository wrote it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// By name, of each the newest.
pub struct Index<'a>(BTreeMap<&'a str, Package<'a>>);

#[derive(Default, Clone, Copy)]
struct Package<'a> {
    version: &'a str,
    depends: &'a str,
    /// Of the file, in bytes.
    size: u64,
    /// In KiB.
    installed: u64,
}

/// What a package needs with all that it brings along from there, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    pub download: u64,
    pub installed: u64,
}

impl<'a> Index<'a> {
    pub fn parse(text: &'a str) -> Index<'a> {
        let mut index = Index(BTreeMap::new());
        let (mut name, mut package) = ("", Package::default());
        for line in text.lines().chain([""]) {
            if line.is_empty() {
                index.add(std::mem::take(&mut name), std::mem::take(&mut package));
            }
            let Some((key, value)) = line.split_once(": ") else { continue };
            let number = || value.trim().parse().unwrap_or(0);
            match key {
                "Package" => name = value.trim(),
                "Version" => package.version = value.trim(),
                "Depends" => package.depends = value,
                "Size" => package.size = number(),
                "Installed-Size" => package.installed = number(),
                _ => {}
            }
        }
        index
    }

    fn add(&mut self, name: &'a str, package: Package<'a>) {
        let is_newer = |old: &Package| compare(package.version, old.version) == Ordering::Greater;
        if !name.is_empty() && self.0.get(name).is_none_or(is_newer) {
            self.0.insert(name, package);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().copied()
    }

    /// Of alternatives the first counts, as with apt.
    pub fn room(&self, name: &str) -> Room {
        let mut room = Room::default();
        let (mut seen, mut left) = (BTreeSet::new(), vec![name]);
        while let Some(name) = left.pop() {
            let Some(package) = self.0.get(name).filter(|_| seen.insert(name.to_string())) else { continue };
            room.download = room.download.saturating_add(package.size.div_ceil(1024));
            room.installed = room.installed.saturating_add(package.installed);
            let names =
                package.depends.split(',').filter_map(|group| group.split('|').next()?.split_whitespace().next());
            left.extend(names.map(|name| name.split(':').next().unwrap_or_default()));
        }
        room
    }
}

/// By numbers, which is all that NVIDIA's versions are made of.
fn compare(a: &str, b: &str) -> Ordering {
    let numbers = |text: &str| {
        text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0)).collect::<Vec<u64>>()
    };
    numbers(a).cmp(&numbers(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxmox::noise;

    const TEXT: &str = "Package: cuda-toolkit-13-0\nVersion: 13.0.2-1\nDepends: cuda-nvcc-13-0 (>= 13.0.88), libc6:any (>= 2), \
        a | b\nSize: 2048\nInstalled-Size: 10\n\nPackage: cuda-nvcc-13-0\nVersion: 13.0.9-1\nSize: 1\nInstalled-Size: 1\n\n\
        Package: cuda-nvcc-13-0\nVersion: 13.0.88-1\nDescription: x\n Depends: none\nSize: 1025\nInstalled-Size: 90\nDepends: \
        cuda-toolkit-13-0\n\nPackage: a\nSize: 1024\n";

    #[test]
    fn what_there_is_and_how_large() {
        let index = Index::parse(TEXT);
        assert!(index.has("cuda-toolkit-13-0") && !index.has("cuda-toolkit-12-8") && !index.has("libc6"));
        assert_eq!(index.names().count(), 3);
        assert_eq!(index.room("cuda-toolkit-13-0"), Room { download: 2 + 2 + 1, installed: 100 });
        assert_eq!(index.room("nothing"), Room::default());
        assert!(Index::parse("<html>no</html>\n").is_empty());
    }

    #[test]
    fn survives_any_text() {
        noise::mutations(TEXT.as_bytes(), |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let index = Index::parse(&text);
            assert!(index.names().all(|name| index.room(name).installed >= index.room("nothing").installed));
        });
    }
}
