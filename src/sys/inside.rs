//! What a process sees at a path: a container may have put symbolic links there that would lead out of it.

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// How often a look is repeated that something in the container was renamed under.
const TRIES: usize = 10;

/// The number of the character device at a path as this process sees it; none when there is no such thing there.
///
/// # Errors
/// When its root cannot be looked into.
pub fn device(host: &Path, pid: i32, path: &str) -> io::Result<Option<u64>> {
    let root = host.join(format!("proc/{pid}/root"));
    if host != Path::new("/") {
        // In a tree of files a link stands for the node.
        root.metadata()?;
        return Ok(number(root.join(path.trim_start_matches('/')).metadata()));
    }
    below(&root, path)
}

/// As [`device`], below any directory.
pub(super) fn below(root: &Path, path: &str) -> io::Result<Option<u64>> {
    let found = find(root, path, OFlag::empty())?;
    Ok(found.and_then(|found| number(File::from(found).metadata())))
}

/// The last component of what a symbolic link leads to, as this process sees the link; none when there is none.
///
/// # Errors
/// When its root cannot be looked into.
pub fn link(host: &Path, pid: i32, path: &str) -> io::Result<Option<OsString>> {
    let root = host.join(format!("proc/{pid}/root"));
    if host != Path::new("/") {
        root.metadata()?;
        return Ok(fs::read_link(root.join(path.trim_start_matches('/'))).ok().and_then(last));
    }
    link_below(&root, path)
}

fn link_below(root: &Path, path: &str) -> io::Result<Option<OsString>> {
    let found = find(root, path, OFlag::O_NOFOLLOW)?;
    Ok(found.and_then(|found| readlinkat(&found, "").ok()).and_then(last))
}

fn last(target: impl AsRef<Path>) -> Option<OsString> {
    target.as_ref().file_name().map(OsString::from)
}

/// What is at a path below a directory, which no link leads out of.
fn find(root: &Path, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
    let root = OpenOptions::new().read(true).custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits()).open(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    for _ in 0..TRIES {
        match openat2(&root, path, how) {
            Ok(found) => return Ok(Some(found)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EAGAIN.into())
}

fn number(meta: io::Result<std::fs::Metadata>) -> Option<u64> {
    meta.ok().filter(|meta| meta.file_type().is_char_device()).map(|meta| meta.rdev())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_does_not_lead_out_of_the_root() {
        let null = makedev(1, 3);
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(device(Path::new("/"), own, "/dev/null").unwrap(), Some(null));
        let root = std::env::temp_dir().join(format!("gpu-handoff-inside-{}", std::process::id()));
        std::fs::create_dir_all(root.join("dev")).unwrap();
        std::fs::write(root.join("dev/file"), "").unwrap();
        for (name, target) in [("null", "/dev/null"), ("up", "../../../../../../dev/null"), ("file2", "/dev/file")] {
            symlink(target, root.join("dev").join(name)).unwrap();
        }
        assert_eq!(number(root.join("dev/null").metadata()), Some(null), "outside it leads to a device");
        for path in ["/dev/null", "/dev/up", "/dev/file", "/dev/file2", "/dev/nothing", "/nothing/null"] {
            assert_eq!(below(&root, path).unwrap(), None, "{path}");
        }
        for (path, name) in
            [("/dev/null", Some("null")), ("/dev/file2", Some("file")), ("/dev/file", None), ("/no", None)]
        {
            assert_eq!(link_below(&root, path).unwrap(), name.map(OsString::from), "{path}");
        }
        // On the way there a link does not lead out either.
        symlink("/proc/self", root.join("out")).unwrap();
        assert_eq!(link_below(&root, "/out/exe").unwrap(), None);
        std::fs::remove_dir_all(&root).unwrap();
        assert!(below(&root, "/dev/null").is_err(), "there is no root");
    }
}
