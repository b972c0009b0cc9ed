//! Whether a file of a tree that stands for a machine is a file, or the real kernel's after all.

use nix::libc;
use std::ffi::CString;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// sysfs, proc, both hierarchies of control groups, debugfs, configfs: what is written there changes the machine.
const KERNELS: [i64; 6] = [0x6265_6572, 0x9fa0, 0x6367_7270, 0x0027_e0eb, 0x6462_6720, 0x6265_6570];

pub fn is_of_the_kernel(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let mut status = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path ends with a NUL, and the kernel fills the structure in or says that it did not.
    let done = unsafe { libc::statfs(path.as_ptr(), status.as_mut_ptr()) };
    // SAFETY: as above.
    done == 0 && KERNELS.contains(&unsafe { status.assume_init() }.f_type)
}

pub fn is_open_in_the_kernel(file: &File) -> bool {
    let mut status = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: as above, with a descriptor that is open.
    let done = unsafe { libc::fstatfs(file.as_raw_fd(), status.as_mut_ptr()) };
    // SAFETY: as above.
    done == 0 && KERNELS.contains(&unsafe { status.assume_init() }.f_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_file_systems_and_others() {
        for (path, is) in [("/proc", true), ("/proc/self/stat", true), ("/", false), ("/nowhere", false)] {
            assert_eq!(is_of_the_kernel(Path::new(path)), is, "{path}");
        }
        assert!(is_open_in_the_kernel(&File::open("/proc/self/stat").unwrap()));
        assert!(!is_open_in_the_kernel(&File::open("/etc/passwd").unwrap()));
    }
}
