//! Files that are replaced whole or not at all, and what else is done to files: the only writers of this program.
//!
//! What is replaced or removed is reached through its folder's descriptor, and its name is not followed if it is a symbolic
//! link.

use super::trace;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{AccessFlags, UnlinkatFlags, access, fsync, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::SystemTime;

/// A file's folder, and its name there.
fn open_folder(path: &Path) -> io::Result<(Dir, &OsStr)> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok((Dir::open(folder, flags, Mode::empty())?, name))
}

/// Whether there is something, all links followed. std's asks for more than that, and once more where there is nothing.
pub fn exists(path: &Path) -> bool {
    access(path, AccessFlags::F_OK).is_ok()
}

/// Writes a file beside it and renames that. Beside it, because nothing is renamed from one file system to another; by
/// a name of its own that stays the same, so that what a killed run left is gone with the next. One at a time. A name
/// that begins with a dot is nothing to whoever reads the folder: pmxcfs, modprobe, those who seek records.
///
/// # Errors
/// When it could not be written: the old one is whole, and nothing is left beside it.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    trace::timed(|| format!("write {}", path.display()), || replace(path, bytes, mode, true))
}

/// As [`write`], but waits for no disk: after a power loss the file may be empty. For what nobody acts on.
///
/// # Errors
/// As [`write`].
pub fn write_lightly(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    trace::timed(|| format!("write {}", path.display()), || replace(path, bytes, mode, false))
}

fn replace(path: &Path, bytes: &[u8], mode: u32, lasts: bool) -> io::Result<()> {
    let (folder, name) = open_folder(path)?;
    let mut beside = OsString::from(".");
    beside.push(name);
    beside.push(".new");
    unlink(&folder, &beside)?;
    let done = write_in(&folder, &beside, bytes, mode, lasts)
        .and_then(|()| renameat(&folder, &*beside, &folder, name).map_err(io::Error::from));
    if done.is_err() {
        let _ = unlink(&folder, &beside);
        return done;
    }
    // So that the rename outlives a power loss; by now the file is as it should be, whatever this says.
    if lasts {
        let _ = fsync(&folder);
    }
    Ok(())
}

fn write_in(folder: &Dir, name: &OsStr, bytes: &[u8], mode: u32, lasts: bool) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(mode);
    let mut file = File::from(openat(folder, name, flags, mode)?);
    file.write_all(bytes)?;
    // Whatever the umask is.
    fchmod(&file, mode)?;
    if lasts { file.sync_all() } else { Ok(()) }
}

fn unlink(folder: &Dir, name: &OsStr) -> io::Result<()> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// # Errors
/// What the kernel said; nothing when there is no such file.
pub fn remove(path: &Path) -> io::Result<()> {
    match open_folder(path) {
        Ok((folder, name)) => unlink(&folder, name),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// # Errors
/// What the kernel said.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let ((here, name), (there, new)) = (open_folder(from)?, open_folder(to)?);
    Ok(renameat(&here, name, &there, new)?)
}

/// The folder and all above it.
///
/// # Errors
/// What the kernel said.
pub fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// A folder with nothing in it.
///
/// # Errors
/// What the kernel said.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    fs::remove_dir(path)
}

/// A symbolic link that is not there yet, and the folder that it is in.
///
/// # Errors
/// What the kernel said.
pub fn link(path: &Path, target: &str) -> io::Result<()> {
    path.parent().map_or(Ok(()), make_folder)?;
    std::os::unix::fs::symlink(target, path)
}

/// A file of ours to add to, and the folder that it is in. The administrator may have put a link there, to another disk.
///
/// # Errors
/// What the kernel said.
pub fn append_to(path: &Path, mode: u32) -> io::Result<File> {
    path.parent().map_or(Ok(()), make_folder)?;
    OpenOptions::new().read(true).append(true).create(true).mode(mode).open(path)
}

/// A file that is not there yet, and the folder that it is in.
///
/// # Errors
/// What the kernel said; [`ErrorKind::AlreadyExists`] when it is there.
pub fn create(path: &Path, mode: u32) -> io::Result<File> {
    path.parent().map_or(Ok(()), make_folder)?;
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path)
}

/// As if it had just been written.
///
/// # Errors
/// What the kernel said.
pub fn touch(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path)?.set_modified(SystemTime::now())
}

/// A copy that is on the disk when this returns.
///
/// # Errors
/// What the kernel said.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

/// Whether the owner of a directory may write to it by its mode. Asking for access says yes to root in any case, also
/// where the file system says no, as Proxmox's does without quorum.
///
/// # Errors
/// When there is no such file.
pub fn is_writable(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o200 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;

    #[test]
    fn a_file_is_replaced_or_as_it_was() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-file-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (path, beside) = (directory.join("a"), directory.join(".a.new"));
        fs::write(&path, "old").unwrap();
        fs::write(&beside, "what a killed run left").unwrap();
        write(&path, b"new", 0o640).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(!beside.exists());
        // A directory cannot be replaced by a file.
        fs::create_dir(directory.join("b")).unwrap();
        assert!(write(&directory.join("b"), b"new", 0o640).is_err());
        assert!(!directory.join(".b.new").exists());
        assert!(write(&directory.join("none/c"), b"new", 0o640).is_err());
        assert!(is_writable(&directory).unwrap());
        fs::set_permissions(&directory, Permissions::from_mode(0o555)).unwrap();
        assert!(!is_writable(&directory).unwrap());
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        fs::remove_dir_all(directory).unwrap();
    }

    /// Who may write in the folder may have put a link there: it goes, and what it leads to stays as it is.
    #[test]
    fn nobodys_link_is_followed() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-link-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (theirs, path) = (directory.join("theirs"), directory.join("a"));
        fs::write(&theirs, "theirs").unwrap();
        for name in ["a", ".a.new"] {
            std::os::unix::fs::symlink(&theirs, directory.join(name)).unwrap();
        }
        write(&path, b"ours", 0o600).unwrap();
        assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
        std::os::unix::fs::symlink(&theirs, directory.join("b")).unwrap();
        remove(&directory.join("b")).unwrap();
        remove(&directory.join("b")).unwrap();
        remove(&directory.join("none/b")).unwrap();
        assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
        fs::remove_dir_all(directory).unwrap();
    }
}
