//! What a process sees at a path: a container may have put symbolic links there that would lead out of it.

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::fs::{File, OpenOptions};
use std::io;
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
    let root = OpenOptions::new().read(true).custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits()).open(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    for _ in 0..TRIES {
        match openat2(&root, path, how) {
            Ok(found) => return Ok(number(File::from(found).metadata())),
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
        std::fs::remove_dir_all(&root).unwrap();
        assert!(below(&root, "/dev/null").is_err(), "there is no root");
    }
}
