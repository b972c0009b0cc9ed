//! Whether somebody holds a lock, without touching it: opening or trying a lock of Proxmox's could delay Proxmox.

use super::kernel::Kernel;

/// Reads `/proc/locks`. False when there is no such file.
pub fn flock_is_held(kernel: &dyn Kernel, path: &str) -> bool {
    is_held(kernel, "FLOCK", path)
}

/// As [`flock_is_held`], of the locks that dpkg uses.
pub fn posix_lock_is_held(kernel: &dyn Kernel, path: &str) -> bool {
    is_held(kernel, "POSIX", path)
}

fn is_held(kernel: &dyn Kernel, kind: &str, path: &str) -> bool {
    let Ok((device, inode)) = kernel.file_id(path) else { return false };
    let wanted = format!("{:02x}:{:02x}:{inode}", device.major, device.minor);
    let Some(locks) = kernel.text("/proc/locks") else { return false };
    // `1: FLOCK  ADVISORY  WRITE 812 00:1a:1234 0 EOF`; `->` marks one that only waits.
    locks.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1) == Some(&kind) && words.get(5) == Some(&wanted.as_str())
    })
}
