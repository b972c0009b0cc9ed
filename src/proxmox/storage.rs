//! Storages that have folders (`/etc/pve/storage.cfg`): `dir: local`, then indented keys (PVE::Storage).

use crate::sys::Kernel;

pub const PATH: &str = "/etc/pve/storage.cfg";

/// Those that are mounted, each at `/mnt/pve/NAME`, and the same on every node.
const MOUNTED: [&str; 4] = ["nfs", "cifs", "cephfs", "glusterfs"];

/// Every Proxmox host has it, whether the file says so or not.
const LOCAL: &str = "local";

/// A section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    pub name: String,
    pub line: usize,
    path: Option<String>,
    /// Below its path, where that is not the usual folder.
    snippets: Option<String>,
    pub content: Option<Vec<String>>,
    /// Every node sees the same files there.
    pub is_shared: bool,
}

impl Storage {
    /// Where its snippets are; none of one that keeps no files.
    pub fn folder(&self) -> Option<String> {
        let snippets = self.snippets.as_deref().unwrap_or("snippets");
        self.path.as_ref().map(|path| format!("{path}/{snippets}"))
    }

    pub fn has_snippets(&self) -> bool {
        self.content.as_ref().is_some_and(|content| content.iter().any(|one| one == "snippets"))
    }
}

pub fn all(kernel: &dyn Kernel) -> Vec<Storage> {
    parse(&kernel.text(PATH).unwrap_or_default())
}

/// Of a volume: `nas` of `nas:snippets/x`.
pub fn of_volume<'a>(storages: &'a [Storage], volume: &str) -> Option<&'a Storage> {
    let (name, _) = volume.split_once(':')?;
    storages.iter().find(|storage| storage.name == name)
}

fn parse(text: &str) -> Vec<Storage> {
    let mut found: Vec<Storage> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        if text.starts_with(char::is_whitespace) {
            if let (Some(storage), Some((key, value))) = (found.last_mut(), text.trim().split_once(char::is_whitespace))
            {
                storage.set(key, value.trim());
            }
        } else if let Some((kind, name)) = text.split_once(':').filter(|(kind, _)| !kind.starts_with('#')) {
            let is_mounted = MOUNTED.contains(&kind);
            let path = is_mounted.then(|| format!("/mnt/pve/{}", name.trim()));
            found.push(Storage { is_shared: is_mounted, path, ..Storage::new(name.trim(), line) });
        }
    }
    if !found.iter().any(|storage| storage.name == LOCAL) {
        found.push(Storage { path: Some("/var/lib/vz".to_string()), ..Storage::new(LOCAL, 0) });
    }
    found
}

impl Storage {
    fn new(name: &str, line: usize) -> Storage {
        Storage { name: name.to_string(), line, path: None, snippets: None, content: None, is_shared: false }
    }

    fn set(&mut self, key: &str, value: &str) {
        match key {
            "path" => self.path = Some(value.to_string()),
            "content" => self.content = Some(value.split(',').map(str::to_string).collect()),
            "shared" => self.is_shared |= value == "1",
            "content-dirs" => {
                let folder = value.split(',').find_map(|one| one.strip_prefix("snippets="));
                self.snippets = folder.map(str::to_string);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_storage_has() {
        let text = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,vztmpl\n\n#dir: x\nnfs: nas\n\tserver a\n\tcontent \
                    images,snippets\n\ndir: gluster\n\tpath /gluster\n\tcontent-dirs iso=a,snippets=hooks\n\tshared 1\n\n\
                    lvmthin: local-lvm\n\tcontent images\n";
        let found = parse(text);
        let told: Vec<_> = found.iter().map(|one| (one.name.as_str(), one.line, one.folder(), one.is_shared)).collect();
        let folder = |path: &str| Some(path.to_string());
        let expected = [
            ("local", 1, folder("/var/lib/vz/snippets"), false),
            ("nas", 6, folder("/mnt/pve/nas/snippets"), true),
            ("gluster", 10, folder("/gluster/hooks"), true),
            ("local-lvm", 15, None, false),
        ];
        assert_eq!(told, expected);
        assert_eq!(found.iter().map(Storage::has_snippets).collect::<Vec<_>>(), [false, true, false, false]);
        assert_eq!(of_volume(&found, "nas:snippets/x").map(|storage| storage.line), Some(6));
        assert_eq!(of_volume(&found, "nothing:snippets/x"), None);
    }

    #[test]
    fn local_is_there_without_being_written() {
        let found = parse("");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].folder().as_deref(), Some("/var/lib/vz/snippets"));
    }
}
