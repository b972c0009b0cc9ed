//! A look at every process: which character devices it has open, and which it has mapped.
//!
//! Files are identified by what they are, not by their names: those are of the process's own namespaces, and a node can
//! have any name, be anywhere or be deleted.

use super::expendable::{LastAct, Request, Work, Worker};
use super::{ActError, DeviceNumber, Mapped, OpenDevice};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{Mode, fstatat};
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

/// What is not done with one process after this time is stuck there. On its own, each takes a few milliseconds.
const STUCK: Duration = Duration::from_secs(1);

/// So many processes may be stuck.
const TRIES: usize = 5;

/// Every process's descriptors. Nothing here waits for another process.
pub fn open(proc: &Path) -> Vec<OpenDevice> {
    let mut found = Vec::new();
    each_process(proc, &[], |pid, process| {
        let Some(mut descriptors) = folder(process, c"fd") else { return false };
        let at = descriptors.as_raw_fd();
        let before = found.len();
        let mut any = false;
        for entry in descriptors.iter().flatten().filter(|entry| !entry.file_name().to_bytes().starts_with(b".")) {
            any = true;
            // Asking for the link's text first, to pass over sockets and the like, takes as long as following it.
            add(&mut found, before, pid, device(at, entry.file_name()).flatten(), false);
        }
        any
    });
    found
}

/// Every process's mappings, but for these processes. Waits while one is stuck in the kernel with its memory map locked.
pub fn mapped(proc: &Path, except: &[i32]) -> Vec<OpenDevice> {
    let mut found = Vec::new();
    // Most mappings are of a few files that everybody has: each is looked at once.
    let mut known: HashMap<Vec<u8>, Option<DeviceNumber>> = HashMap::new();
    let mut line = Vec::new();
    each_process(proc, except, |pid, process| {
        let Ok(maps) = openat(process, c"maps", OFlag::O_CLOEXEC, Mode::empty()) else { return false };
        let mut maps = BufReader::new(File::from(maps));
        let before = found.len();
        let mut any = false;
        line.clear();
        while maps.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            any = true;
            if let Some(mapped) = Mapped::parse(line.trim_ascii_end()) {
                let number = known.get(mapped.file).copied().or_else(|| {
                    let name = CString::new(format!("map_files/{}", mapped.name())).ok()?;
                    let number = device(process.as_raw_fd(), &name)?;
                    known.insert(mapped.file.to_vec(), number);
                    Some(number)
                });
                add(&mut found, before, pid, number.flatten(), true);
            }
            line.clear();
        }
        any
    });
    found
}

fn add(found: &mut Vec<OpenDevice>, before: usize, pid: i32, number: Option<DeviceNumber>, mapped: bool) {
    let Some(number) = number else { return };
    let device = OpenDevice { pid, number, mapped };
    if !found[before..].contains(&device) {
        found.push(device);
    }
}

/// Calls `look` with each process's directory. When the first thread has ended before others, that has nothing: then
/// with theirs, until it says that there is something.
fn each_process(proc: &Path, except: &[i32], mut look: impl FnMut(i32, &OwnedFd) -> bool) {
    let Ok(mut proc) = Dir::open(proc, FOLDER, Mode::empty()) else { return };
    for pid in numbers(&mut proc) {
        // Threads of the kernel, which may be most, and zombies have no program; if they have no other thread either,
        // their list of threads has three links.
        let has_program = readlinkat(&proc, format!("{pid}/exe").as_str()).is_ok();
        let task = format!("{pid}/task");
        let is_alone = || fstatat(&proc, task.as_str(), AtFlags::empty()).is_ok_and(|task| task.st_nlink == 3);
        if !has_program && is_alone() {
            continue;
        }
        let mut look = |thread: &i32| {
            let allowed = !except.contains(thread);
            let process = || openat(&proc, thread.to_string().as_str(), FOLDER | OFlag::O_PATH, Mode::empty()).ok();
            // A process that ended meanwhile, or that we may not look into, has nothing.
            allowed && process().is_some_and(|process| look(pid, &process))
        };
        if look(&pid) || has_program {
            continue;
        }
        let threads = Dir::openat(&proc, task.as_str(), FOLDER, Mode::empty());
        let threads = threads.map(|mut threads| numbers(&mut threads)).unwrap_or_default();
        threads.iter().filter(|thread| **thread != pid).any(&mut look);
    }
}

const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_CLOEXEC);

fn folder(parent: &OwnedFd, name: &CStr) -> Option<Dir> {
    Dir::openat(parent, name, FOLDER, Mode::empty()).ok()
}

/// The processes or threads that a directory is about.
fn numbers(folder: &mut Dir) -> Vec<i32> {
    let number = |name: &CStr| name.to_str().ok()?.parse().ok();
    folder.iter().flatten().filter_map(|entry| number(entry.file_name())).collect()
}

/// The device that a link in `/proc/PID/fd` or `map_files` leads to; the inner none for what is no character device, the
/// outer when it cannot be told. No file system is asked for news of the file: one of a server that is away would not
/// answer.
#[allow(clippy::option_option)]
fn device(folder: RawFd, name: &CStr) -> Option<Option<DeviceNumber>> {
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the name ends with a NUL, and the kernel writes no more than one statx.
    let done = unsafe { libc::statx(folder, name.as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr()) };
    if done != 0 {
        return None;
    }
    // SAFETY: zeroed memory is a valid statx, whatever of it was written.
    let found = unsafe { found.assume_init() };
    let is_device = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    Some(is_device.then(|| DeviceNumber { major: found.stx_rdev_major.into(), minor: found.stx_rdev_minor.into() }))
}

/// The child that looks at mappings.
#[derive(Default)]
pub struct Mappings {
    child: Option<Worker>,
    /// Processes that are stuck were waited for once, and are passed over. What they have open is seen all the same.
    stuck: Vec<i32>,
}

impl Mappings {
    /// What [`mapped`] finds, whatever it meets.
    pub fn look(&mut self, root: &Path, work: Work) -> Vec<OpenDevice> {
        for _ in 0..TRIES {
            let child = self.child.take().map_or_else(|| Worker::start(root, work, LastAct::Nothing), Ok);
            let Ok(mut child) = child else { return Vec::new() };
            if child.tell(&Request::Mapped { except: self.stuck.clone() }).is_err() {
                continue; // somebody ended it
            }
            let mut before = None;
            let stuck = loop {
                match child.answer(STUCK) {
                    Ok(bytes) => {
                        self.child = Some(child);
                        return from_bytes(&bytes);
                    }
                    Err(ActError::Stuck { .. }) => {}
                    Err(_) => break None,
                }
                let at = at(&child);
                if before == Some(at) {
                    break at;
                }
                before = Some(at);
            };
            child.kill();
            self.stuck.extend(stuck);
        }
        Vec::new()
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            child.dismiss();
        }
    }
}

/// The process that a child is looking at: it has that one's directory open.
fn at(child: &Worker) -> Option<i32> {
    let links = fs::read_dir(format!("/proc/{}/fd", child.pid())).ok()?;
    let names = links.flatten().filter_map(|link| fs::read_link(link.path()).ok());
    names.filter_map(|path| path.file_name()?.to_str()?.parse().ok()).next()
}

/// As a child tells it: `PID MAJOR:MINOR`, a line each.
pub fn to_bytes(devices: &[OpenDevice]) -> Vec<u8> {
    let lines: String = devices.iter().map(|device| format!("{} {}\n", device.pid, device.number)).collect();
    lines.into_bytes()
}

fn from_bytes(bytes: &[u8]) -> Vec<OpenDevice> {
    let device = |line: &str| {
        let (pid, number) = line.split_once(' ')?;
        Some(OpenDevice { pid: pid.parse().ok()?, number: number.parse().ok()?, mapped: true })
    };
    String::from_utf8_lossy(bytes).lines().filter_map(device).collect()
}

pub fn pids_to_text(pids: &[i32]) -> String {
    let words: Vec<String> = pids.iter().map(ToString::to_string).collect();
    words.join(" ")
}

pub fn pids_from_text(text: &str) -> Option<Vec<i32>> {
    text.split_whitespace().map(|word| word.parse().ok()).collect()
}
