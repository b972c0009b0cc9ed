//! What guests name as their hookscript: the link that the package makes, or a script on a storage which every node has,
//! that calls this program where it is installed and does nothing elsewhere.

use crate::exit::{Exit, Result};
use crate::proxmox::storage::{self, Storage};
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::io::ErrorKind;

/// Storage `local` is /var/lib/vz on every Proxmox host (PVE::Storage::Plugin).
pub const VOLUME: &str = "local:snippets/gpu-handoff";
pub const LINK: &str = "/var/lib/vz/snippets/gpu-handoff";
pub const PROGRAM: &str = "/usr/sbin/gpu-handoff";

/// Whoever asks whether a guest has this program goes by this.
const NAME: &str = "gpu-handoff";

const SCRIPT: &str = include_str!("../../hooks/shared-hookscript");

const MOVE_AWAY: &str = "move it away, then try again";

/// An earlier version of the script says so as well.
const MARK: &str = "\n# Put here by: gpu-handoff enable ";

/// Where the hookscript is.
pub enum Place {
    /// The link that the package makes.
    Link,
    Shared(Snippet),
}

impl Place {
    /// # Errors
    /// As [`Snippet::on`].
    pub fn of(kernel: &dyn Kernel, storage: Option<&str>) -> Result<Place> {
        storage.map_or(Ok(Place::Link), |name| Snippet::on(kernel, name).map(Place::Shared))
    }

    pub fn volume(&self) -> &str {
        self.asked().unwrap_or(VOLUME)
    }

    /// None where any place will do.
    pub fn asked(&self) -> Option<&str> {
        match self {
            Place::Link => None,
            Place::Shared(snippet) => Some(&snippet.volume),
        }
    }

    /// # Errors
    /// When something else is there, or it cannot be written.
    pub fn fill(&self, kernel: &dyn Kernel) -> Result<()> {
        match self {
            Place::Link if link_is_missing(kernel)? => {
                kernel.link(LINK, PROGRAM).map_err(|error| Exit::failed(format!("{LINK}: {error}")))
            }
            Place::Link => Ok(()),
            Place::Shared(snippet) => snippet.write(kernel),
        }
    }

    /// What there is to do, a line or none.
    ///
    /// # Errors
    /// When something else is there.
    pub fn plan(&self, kernel: &dyn Kernel) -> Result<String> {
        Ok(match self {
            Place::Link if link_is_missing(kernel)? => format!("ln -s {PROGRAM} {LINK}\n"),
            Place::Shared(snippet) if !snippet.is_there => format!("write {}\n", snippet.path),
            Place::Link | Place::Shared(_) => String::new(),
        })
    }
}

/// Where the script is, or will be.
#[derive(Debug, PartialEq, Eq)]
pub struct Snippet {
    pub volume: String,
    pub path: String,
    pub is_there: bool,
}

impl Snippet {
    /// On this storage.
    ///
    /// # Errors
    /// Why it cannot be there, and what to type.
    pub fn on(kernel: &dyn Kernel, name: &str) -> Result<Snippet> {
        let storages = storage::all(kernel);
        let volume = format!("{name}:snippets/{NAME}");
        let Some(storage) = storage::of_volume(&storages, &volume) else {
            return Err(Exit::usage(Trouble::new(format!("there is no storage {name}"), those(&storages))));
        };
        let folder = usable(storage)
            .map_err(|why| Exit::refused(Trouble::new(format!("storage {name} {why}"), those(&storages))))?;
        if !kernel.exists(&folder) {
            return Err(Exit::refused(Trouble::new(
                format!("{folder} is not there: storage {name} is not mounted, or was never used for snippets"),
                format!("see: pvesm status --storage {name}"),
            )));
        }
        let path = format!("{folder}/{NAME}");
        match kernel.read(&path) {
            Ok(bytes) if bytes == SCRIPT.as_bytes() => Ok(Snippet { volume, path, is_there: true }),
            Ok(bytes) if String::from_utf8_lossy(&bytes).contains(MARK) => {
                Ok(Snippet { volume, path, is_there: false })
            }
            Err(error) if error.kind() == ErrorKind::NotFound && kernel.link_name(&path).is_err() => {
                Ok(Snippet { volume, path, is_there: false })
            }
            _ => {
                let what = format!("{path} is there and is not gpu-handoff's script");
                Err(Exit::refused(Trouble::new(what, MOVE_AWAY)))
            }
        }
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, kernel: &dyn Kernel) -> Result<()> {
        if self.is_there {
            return Ok(());
        }
        let written = kernel.write_file(&self.path, SCRIPT.as_bytes(), 0o755);
        written.map_err(|error| Exit::failed(format!("{}: {error}", self.path)))
    }
}

/// The folder for its snippets, or why it has none that would do.
fn usable(storage: &Storage) -> std::result::Result<String, String> {
    let folder = storage.folder().ok_or("keeps no files")?;
    if !storage.is_shared {
        return Err("is not shared, so that other nodes have no such file on it".to_string());
    }
    if storage.has_snippets() {
        return Ok(folder);
    }
    let content = storage.content.as_deref().unwrap_or_default();
    let content: Vec<&str> = content.iter().map(String::as_str).chain(["snippets"]).collect();
    Err(format!("has no snippets: pvesm set {} --content {}", storage.name, content.join(",")))
}

/// The first storage that would do, or what stands for one.
pub fn candidate(storages: &[Storage]) -> String {
    storages.iter().find(|storage| usable(storage).is_ok()).map_or("STORAGE", |storage| &storage.name).to_string()
}

fn those(storages: &[Storage]) -> String {
    let names: Vec<&str> =
        storages.iter().filter(|storage| usable(storage).is_ok()).map(|storage| storage.name.as_str()).collect();
    match names.as_slice() {
        [] => "no storage is shared and has snippets".to_string(),
        names => format!("those that are shared and have snippets: {}", names.join(" ")),
    }
}

/// The package makes the link; without the package, whoever enables the first guest.
///
/// # Errors
/// When something else is there.
pub fn link_is_missing(kernel: &dyn Kernel) -> Result<bool> {
    match kernel.link_name(LINK) {
        Ok(name) if name == "gpu-handoff" => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        _ => Err(Exit::refused(Trouble::new(format!("{LINK} is no link to {PROGRAM}"), MOVE_AWAY))),
    }
}
