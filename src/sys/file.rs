//! Files that are replaced whole or not at all, as Proxmox replaces its own.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Writes a file beside it and renames that. Beside it, because nothing is renamed from one file system to another; by
/// a name of its own that stays the same, so that what a killed run left is gone with the next. One at a time.
///
/// # Errors
/// When it could not be written: the old one is whole, and nothing is left beside it.
pub fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".gpu-handoff");
    let beside = Path::new(&beside);
    let done = remove(beside).and_then(|()| write(beside, bytes, mode)).and_then(|()| fs::rename(beside, path));
    if done.is_err() {
        let _ = remove(beside);
        return done;
    }
    // So that the rename outlives a power loss; by now the file is as it should be, whatever this says.
    if let Some(directory) = path.parent() {
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    // Whatever the umask is.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
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

    #[test]
    fn a_file_is_replaced_or_as_it_was() {
        let directory = std::env::temp_dir().join(format!("gpu-handoff-file-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (path, beside) = (directory.join("a"), directory.join("a.gpu-handoff"));
        fs::write(&path, "old").unwrap();
        fs::write(&beside, "what a killed run left").unwrap();
        replace_file(&path, b"new", 0o640).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(!beside.exists());
        // A directory cannot be replaced by a file.
        fs::create_dir(directory.join("b")).unwrap();
        assert!(replace_file(&directory.join("b"), b"new", 0o640).is_err());
        assert!(!directory.join("b.gpu-handoff").exists());
        assert!(replace_file(&directory.join("none/c"), b"new", 0o640).is_err());
        assert!(is_writable(&directory).unwrap());
        fs::set_permissions(&directory, Permissions::from_mode(0o555)).unwrap();
        assert!(!is_writable(&directory).unwrap());
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        fs::remove_dir_all(directory).unwrap();
    }
}
