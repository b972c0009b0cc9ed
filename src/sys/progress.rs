//! How far a child has got, in memory that it shares with its parent: the parent may ask at any moment, and it costs the
//! child nothing to tell.

use nix::libc;
use std::io;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

/// What a child is reading of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Descriptors,
    Mappings,
}

#[derive(Default)]
struct Numbers {
    pid: AtomicI32,
    part: AtomicU32,
    /// Changes with everything that is read.
    steps: AtomicU64,
    processes: AtomicU64,
    /// Of the process that is looked at.
    entries: AtomicU64,
    /// The process with the most of them so far.
    worst: AtomicI32,
    most: AtomicU64,
}

/// A page that both have.
pub struct Progress {
    page: *mut Numbers,
}

/// At one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    pub pid: i32,
    pub part: Part,
    pub steps: u64,
    pub processes: u64,
    /// The process that had the most to look at, and how much that was.
    pub worst: (i32, u64),
}

impl Progress {
    /// # Errors
    /// When there is no memory to be had.
    pub fn new() -> io::Result<Progress> {
        let (length, access) = (size_of::<Numbers>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: asks for memory that nothing else uses.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Progress { page: page.cast() })
    }

    fn numbers(&self) -> &Numbers {
        // SAFETY: the page is large enough, aligned, and of zeros at first, which are valid numbers; both processes use
        // them only as atomics, and it is there until `self` goes.
        unsafe { &*self.page }
    }

    pub fn begin(&self, pid: i32, part: Part) {
        let numbers = self.numbers();
        numbers.pid.store(pid, Relaxed);
        numbers.part.store(part as u32, Relaxed);
        numbers.entries.store(0, Relaxed);
        numbers.processes.fetch_add(1, Relaxed);
        numbers.steps.fetch_add(1, Relaxed);
    }

    /// One more descriptor, mapping or thread.
    pub fn step(&self) {
        let numbers = self.numbers();
        numbers.steps.fetch_add(1, Relaxed);
        let entries = numbers.entries.fetch_add(1, Relaxed) + 1;
        if entries > numbers.most.load(Relaxed) {
            numbers.most.store(entries, Relaxed);
            numbers.worst.store(numbers.pid.load(Relaxed), Relaxed);
        }
    }

    pub fn at(&self) -> At {
        let numbers = self.numbers();
        let mappings = numbers.part.load(Relaxed) == Part::Mappings as u32;
        At {
            pid: numbers.pid.load(Relaxed),
            part: if mappings { Part::Mappings } else { Part::Descriptors },
            steps: numbers.steps.load(Relaxed),
            processes: numbers.processes.load(Relaxed),
            worst: (numbers.worst.load(Relaxed), numbers.most.load(Relaxed)),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // SAFETY: the memory that `new` got, which nobody refers to any more.
        unsafe { libc::munmap(self.page.cast(), size_of::<Numbers>()) };
    }
}
