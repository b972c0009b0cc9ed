//! Whether two processes share what each sees as its own: a table of descriptors, or an open file.

use nix::libc;
use std::cmp::Ordering;

const FILE: libc::c_int = 0;
const FILES: libc::c_int = 2;

/// How the kernel orders the tables of descriptors of two processes or threads; equal are those that share one. None when
/// it does not tell: one has ended, or it was built without kcmp.
pub fn tables(one: i32, other: i32) -> Option<Ordering> {
    compare(one, other, FILES, 0, 0)
}

/// The same of two open files: a descriptor that was inherited, duplicated or sent is the same file.
pub fn files(one: (i32, i32), other: (i32, i32)) -> Option<Ordering> {
    compare(one.0, other.0, FILE, one.1, other.1)
}

fn compare(one: i32, other: i32, what: libc::c_int, first: i32, second: i32) -> Option<Ordering> {
    let index = |number: i32| libc::c_ulong::try_from(number).unwrap_or(0);
    // SAFETY: kcmp takes five numbers and changes nothing.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, what, index(first), index(second)) } {
        0 => Some(Ordering::Equal),
        1 => Some(Ordering::Less),
        2 => Some(Ordering::Greater),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_shared() {
        let own = i32::try_from(std::process::id()).unwrap();
        if tables(own, own).is_none() {
            return; // a kernel without it
        }
        assert_eq!(tables(own, own), Some(Ordering::Equal));
        assert_ne!(tables(own, 1), Some(Ordering::Equal));
        let (one, other) = (File::open("/dev/null").unwrap(), File::open("/dev/null").unwrap());
        let copy = one.try_clone().unwrap();
        let of = |file: &File| (own, file.as_raw_fd());
        assert_eq!(files(of(&one), of(&copy)), Some(Ordering::Equal));
        assert_ne!(files(of(&one), of(&other)), Some(Ordering::Equal));
    }
}
