//! A look at every process: which of the devices that are sought it has open, and which it has mapped. Done in a child,
//! because reading another process's mappings waits for that process, and because nobody knows how much there is to read.
//!
//! Files are identified by what they are, not by their names: those are of the process's own namespaces, and a node can
//! have any name, be anywhere or be deleted.

use super::device::DeviceNumber;
use super::maps::Mapped;
use super::process::{How, OpenDevice, Sought};
use super::progress::{Part, Progress};
use super::tables::{Files, Tables};
use super::{inside, kcmp, tables};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{Mode, fstatat};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_CLOEXEC);

/// The exporter of buffers whose process shows nothing else of the driver's.
const BUFFERS_OF: &str = "nvidia";

/// More than these bytes of a small file of the kernel's nobody needs.
const SMALL: u64 = 64 << 10;

/// What is told of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// It has these open.
    User(Identity, Vec<OpenDevice>),
    /// It does not let itself be looked at.
    Hidden(Identity, String),
    /// So many open files there are of each device, whoever shares them.
    Files(BTreeMap<DeviceNumber, u64>),
}

/// Who a process is, all read through one directory: of one that has ended it shows nothing more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub pid: i32,
    /// Zero when it does not say, as in a tree of files.
    pub start: u64,
    pub command: String,
    pub cgroup: String,
    /// The first process of a PID namespace below the host's.
    pub is_init: bool,
}

/// What a child is sent out for.
pub struct Errand<'a> {
    pub sought: &'a Sought,
    /// Whose descriptors, and whose mappings, were waited for in vain.
    pub skip_descriptors: &'a [i32],
    pub skip_mappings: &'a [i32],
    /// The descriptors are known already.
    pub only_mappings: bool,
    /// Mappings of processes up to this one are known already.
    pub mappings_after: i32,
}

pub type Tell<'a> = &'a mut dyn FnMut(Told) -> std::io::Result<()>;

/// # Errors
/// Why it is not known who has what open.
pub fn look(proc: &Path, errand: &Errand, progress: &Progress, tell: Tell) -> Result<(), String> {
    // Not at the same time: what is mapped and closed between the two is seen only in this order.
    if !errand.only_mappings {
        descriptors(proc, errand, progress, tell)?;
    }
    mappings(proc, errand, progress, tell)
}

fn descriptors(proc: &Path, errand: &Errand, progress: &Progress, tell: Tell) -> Result<(), String> {
    let mut scan = Scan::new(errand.sought, progress);
    each_process(proc, errand, &mut |process| {
        progress.begin(process.pid, Part::Descriptors);
        if errand.skip_descriptors.contains(&process.pid) {
            return told(tell, Told::Hidden(process.identity(), "its descriptors cannot be read".to_string()));
        }
        match scan.process(process)? {
            Seen::Devices(open) if open.is_empty() => Ok(()),
            Seen::Devices(open) => told(tell, Told::User(process.identity(), open)),
            Seen::Denied(error) => told(tell, Told::Hidden(process.identity(), format!("its descriptors: {error}"))),
        }
    })?;
    told(tell, Told::Files(scan.files.counts()))
}

fn mappings(proc: &Path, errand: &Errand, progress: &Progress, tell: Tell) -> Result<(), String> {
    // Most mappings are of a few files that everybody has: each is looked at once.
    let mut known: HashMap<Vec<u8>, Option<DeviceNumber>> = HashMap::new();
    each_process(proc, errand, &mut |process| {
        if process.pid <= errand.mappings_after {
            return Ok(());
        }
        progress.begin(process.pid, Part::Mappings);
        if errand.skip_mappings.contains(&process.pid) {
            return Ok(());
        }
        let mut open = Vec::new();
        // When the first thread has ended before others, that has nothing: then theirs are asked.
        let mut threads = if process.has_program { Vec::new() } else { process.threads() };
        threads.insert(0, process.pid);
        for thread in threads {
            let Ok(folder) = openat(process.proc, thread.to_string().as_str(), FOLDER | OFlag::O_PATH, Mode::empty())
            else {
                continue;
            };
            match mapped(&folder, errand.sought, progress, &mut known, &mut open) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return told(tell, Told::Hidden(process.identity(), format!("its mappings: {error}"))),
            }
        }
        if open.is_empty() { Ok(()) } else { told(tell, Told::User(process.identity(), open)) }
    })
}

fn told(tell: Tell, what: Told) -> Result<(), String> {
    tell(what).map_err(|error| error.to_string())
}

/// One process, held by its directory.
struct Process<'a> {
    proc: &'a Dir,
    pid: i32,
    folder: OwnedFd,
    /// Not one whose first thread has ended before the others.
    has_program: bool,
}

impl Process<'_> {
    fn identity(&self) -> Identity {
        let text = |name: &CStr| small_text(&self.folder, name).unwrap_or_default();
        let stat = text(c"stat");
        let start = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
        let command = text(c"comm");
        let numbers = text(c"status");
        let numbers = numbers.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        Identity {
            pid: self.pid,
            start: start.unwrap_or(0),
            command: if command.is_empty() { "?".to_string() } else { command.trim_end_matches('\n').to_string() },
            cgroup: text(c"cgroup"),
            is_init: numbers.len() > 1 && numbers.last() == Some(&"1"),
        }
    }

    fn threads(&self) -> Vec<i32> {
        let folder = Dir::openat(&self.folder, c"task", FOLDER, Mode::empty());
        let mut threads = folder.map(|mut folder| numbers(&mut folder)).unwrap_or_default();
        threads.retain(|thread| *thread != self.pid);
        threads
    }

    /// Two links of every directory, and one for each thread; other file systems may count otherwise.
    fn is_alone(&self) -> bool {
        fstatat(&self.folder, c"task", AtFlags::empty()).is_ok_and(|task| task.st_nlink == 3)
    }
}

/// Calls `look` with each process that may have anything, by PID. One that ended meanwhile has nothing.
fn each_process(
    proc: &Path,
    errand: &Errand,
    look: &mut dyn FnMut(&Process) -> Result<(), String>,
) -> Result<(), String> {
    let problem = |error: Errno| format!("{}: {error}", proc.display());
    let mut proc = Dir::open(proc, FOLDER, Mode::empty()).map_err(problem)?;
    let mut pids = numbers(&mut proc);
    pids.sort_unstable();
    pids.retain(|pid| errand.sought.among.is_empty() || errand.sought.among.contains(pid));
    for pid in pids {
        let folder = match openat(&proc, pid.to_string().as_str(), FOLDER | OFlag::O_PATH, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::ENOENT | Errno::ESRCH | Errno::ENOTDIR) => continue,
            Err(error) => return Err(format!("process {pid}: {error}")),
        };
        // Threads of the kernel, which may be most, and zombies have no program.
        let has_program = !matches!(readlinkat(&folder, c"exe"), Err(Errno::ENOENT | Errno::ESRCH));
        let process = Process { proc: &proc, pid, folder, has_program };
        if has_program || !process.is_alone() {
            look(&process)?;
        }
    }
    Ok(())
}

/// What a look at descriptors comes to, but for the processes it could not look into.
enum Seen {
    Devices(Vec<OpenDevice>),
    Denied(Errno),
}

/// A look at descriptors.
struct Scan<'a> {
    sought: &'a Sought,
    progress: &'a Progress,
    tables: Tables,
    files: Files,
    /// What file systems without a device hold, by their number: the kernel's own files are on two of them.
    kinds: HashMap<u32, Contents>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// Files without a name: rings of io_uring among them.
    Anonymous,
    Buffers,
    Others,
}

impl<'a> Scan<'a> {
    fn new(sought: &'a Sought, progress: &'a Progress) -> Scan<'a> {
        Scan { sought, progress, tables: Tables::default(), files: Files::default(), kinds: HashMap::new() }
    }

    fn process(&mut self, process: &Process) -> Result<Seen, String> {
        let is_real = is_of_the_kernel(&process.folder);
        let mut open = match self.table(&process.folder, process.pid, is_real)? {
            Seen::Devices(open) => open,
            denied @ Seen::Denied(_) => return Ok(denied),
        };
        if process.is_alone() {
            return Ok(Seen::Devices(open));
        }
        // A thread may have a table of its own.
        let mut known = vec![process.pid];
        for thread in process.threads() {
            self.progress.step();
            let order = |other: &i32| kcmp::tables(*other, thread).unwrap_or(Ordering::Less);
            match known.binary_search_by(order) {
                Ok(_) if is_real => continue,
                Ok(place) | Err(place) => known.insert(place, thread),
            }
            let path = CString::new(format!("task/{thread}")).unwrap_or_default();
            let Ok(folder) = openat(&process.folder, path.as_c_str(), FOLDER | OFlag::O_PATH, Mode::empty()) else {
                continue;
            };
            match self.table(&folder, thread, is_real)? {
                Seen::Devices(more) => add_all(&mut open, &more),
                denied @ Seen::Denied(_) => return Ok(denied),
            }
        }
        Ok(Seen::Devices(open))
    }

    /// One table of descriptors. A large one that several processes share is read once.
    fn table(&mut self, folder: &OwnedFd, owner: i32, is_real: bool) -> Result<Seen, String> {
        let mut descriptors = match Dir::openat(folder, c"fd", FOLDER, Mode::empty()) {
            Ok(descriptors) => descriptors,
            Err(Errno::ENOENT | Errno::ESRCH | Errno::ENOTDIR) => return Ok(Seen::Devices(Vec::new())),
            Err(error @ (Errno::EACCES | Errno::EPERM)) => return Ok(Seen::Denied(error)),
            Err(error) => return Err(format!("descriptors of process {owner}: {error}")),
        };
        let at = descriptors.as_raw_fd();
        let mut open = Vec::new();
        let mut number = 0;
        for entry in descriptors.iter() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(Errno::ENOENT | Errno::ESRCH) => break,
                Err(error) => return Err(format!("descriptors of process {owner}: {error}")),
            };
            let name = entry.file_name();
            if name.to_bytes().starts_with(b".") {
                continue;
            }
            self.progress.step();
            number += 1;
            if number == tables::LARGE
                && is_real
                && let Some(known) = self.tables.same_as(owner)
            {
                return Ok(Seen::Devices(known));
            }
            self.descriptor(folder, at, name, (owner, is_real), &mut open);
        }
        if number >= tables::LARGE && is_real {
            self.tables.add(owner, &open);
        }
        Ok(Seen::Devices(open))
    }

    fn descriptor(
        &mut self,
        folder: &OwnedFd,
        at: RawFd,
        name: &CStr,
        (owner, is_real): (i32, bool),
        open: &mut Vec<OpenDevice>,
    ) {
        // Asking for the link's text first, to pass over sockets and the like, takes as long as following it.
        let Some(file) = look_at(at, name) else { return };
        let mut found = |number: DeviceNumber, how: How| {
            if self.sought.majors.contains(&number.major) || how == How::Buffer {
                let device = OpenDevice { number, how };
                let descriptor = name.to_str().ok().and_then(|name| name.parse().ok()).unwrap_or(-1);
                self.files.add(number, (owner, descriptor), is_real && how != How::Ring);
                add_all(open, &[device]);
            }
        };
        if let Some(number) = file.device {
            return found(number, How::Open);
        }
        let Some(system) = file.system else { return };
        let text =
            || readlinkat(folder, CString::new([b"fd/", name.to_bytes()].concat()).unwrap_or_default().as_c_str());
        let kind = *self.kinds.entry(system).or_insert_with(|| match text() {
            Ok(text) if text.as_encoded_bytes().starts_with(b"anon_inode:") => Contents::Anonymous,
            Ok(text) if text.as_encoded_bytes().starts_with(b"/dmabuf:") => Contents::Buffers,
            _ => Contents::Others,
        });
        let info = || small_text(folder, &CString::new([b"fdinfo/", name.to_bytes()].concat()).unwrap_or_default());
        match kind {
            Contents::Anonymous if text().is_ok_and(|text| text == "anon_inode:[io_uring]") => {
                for path in registered(&info().unwrap_or_default()) {
                    if let Some(number) = named(folder, path) {
                        found(number, How::Ring);
                    }
                }
            }
            Contents::Buffers if exporter(&info().unwrap_or_default()) == Some(BUFFERS_OF) => {
                found(DeviceNumber { major: 0, minor: 0 }, How::Buffer);
            }
            _ => {}
        }
    }
}

fn add_all(open: &mut Vec<OpenDevice>, more: &[OpenDevice]) {
    for device in more {
        if !open.contains(device) {
            open.push(device.clone());
        }
    }
}

/// True when anything at all is mapped there.
fn mapped(
    process: &OwnedFd,
    sought: &Sought,
    progress: &Progress,
    known: &mut HashMap<Vec<u8>, Option<DeviceNumber>>,
    open: &mut Vec<OpenDevice>,
) -> Result<bool, Errno> {
    let maps = match openat(process, c"maps", OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(maps) => maps,
        Err(Errno::ENOENT | Errno::ESRCH) => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut maps = BufReader::new(File::from(maps));
    let mut line = Vec::new();
    let mut any = false;
    loop {
        line.clear();
        match maps.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(any),
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(any),
            Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        }
        any = true;
        progress.step();
        let Some(mapped) = Mapped::parse(line.trim_ascii_end()) else { continue };
        let number = known.get(mapped.file).copied().or_else(|| {
            let name = CString::new(format!("map_files/{}", mapped.name())).ok()?;
            let number = look_at(process.as_raw_fd(), &name)?.device;
            known.insert(mapped.file.to_vec(), number);
            Some(number)
        });
        if let Some(number) = number.flatten().filter(|number| sought.majors.contains(&number.major)) {
            add_all(open, &[OpenDevice { number, how: How::Mapped }]);
        }
    }
}

/// The processes or threads that a directory is about.
fn numbers(folder: &mut Dir) -> Vec<i32> {
    let number = |name: &CStr| name.to_str().ok()?.parse().ok();
    folder.iter().flatten().filter_map(|entry| number(entry.file_name())).collect()
}

/// What a link in `/proc/PID/fd` or `map_files` leads to.
struct Linked {
    /// It is this character device.
    device: Option<DeviceNumber>,
    /// It is no device, on the file system of this number that has no device either.
    system: Option<u32>,
}

/// None when it cannot be told. No file system is asked for news of the file: one of a server that is away would not
/// answer.
fn look_at(folder: RawFd, name: &CStr) -> Option<Linked> {
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the name ends with a NUL, and the kernel writes no more than one statx.
    let done = unsafe { libc::statx(folder, name.as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr()) };
    if done != 0 {
        return None;
    }
    // SAFETY: zeroed memory is a valid statx, whatever of it was written.
    let found = unsafe { found.assume_init() };
    if u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR {
        let number = DeviceNumber { major: found.stx_rdev_major.into(), minor: found.stx_rdev_minor.into() };
        return Some(Linked { device: Some(number), system: None });
    }
    Some(Linked { device: None, system: (found.stx_dev_major == 0).then_some(found.stx_dev_minor) })
}

/// Whether a directory is of the kernel's own /proc, not of a tree of files, whose PIDs are nobody's.
fn is_of_the_kernel(folder: &OwnedFd) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the descriptor is open, and the kernel writes no more than one statfs; zeroed memory is a valid one.
    let found = unsafe {
        if libc::fstatfs(folder.as_raw_fd(), found.as_mut_ptr()) != 0 {
            return false;
        }
        found.assume_init()
    };
    found.f_type == libc::PROC_SUPER_MAGIC
}

/// None when there is no such file; the beginning of one that is larger than any of the kernel's.
fn small_text(folder: &OwnedFd, name: &CStr) -> Option<String> {
    let file = File::from(openat(folder, name, OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty()).ok()?);
    let mut bytes = Vec::new();
    // What was read before an error counts.
    let _ = file.take(SMALL).read_to_end(&mut bytes);
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The files that a ring of io_uring has taken, as its fdinfo shows them: `    0: /dev/nvidia0` below `UserFiles: 1`.
fn registered(info: &str) -> impl Iterator<Item = &str> {
    let listed = info.lines().skip_while(|line| !line.starts_with("UserFiles:")).skip(1);
    listed.map_while(|line| {
        let (index, path) = line.split_once(": ")?;
        index.trim().parse::<u32>().ok()?;
        Some(path.trim_end())
    })
}

/// `exp_name: nvidia`
fn exporter(info: &str) -> Option<&str> {
    info.lines().find_map(|line| line.strip_prefix("exp_name:")).map(str::trim)
}

/// The device at a path as a process sees it: here the kernel tells no more than a name.
fn named(process: &OwnedFd, path: &str) -> Option<DeviceNumber> {
    let root = format!("/proc/self/fd/{}/root", process.as_raw_fd());
    inside::below(Path::new(&root), path).ok().flatten().map(DeviceNumber::of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_ring_has_taken() {
        let info = "pos:\t0\nflags:\t02000002\nSqMask:\t0x7\nUserFiles:\t2\n    0: /dev/nvidia0\n    1: <none>\nUserBufs:\t0\n";
        assert_eq!(registered(info).collect::<Vec<_>>(), ["/dev/nvidia0", "<none>"]);
        assert_eq!(registered("pos:\t0\n").count(), 0);
    }

    #[test]
    fn who_exported_a_buffer() {
        assert_eq!(exporter("pos:\t0\nsize:\t4096\ncount:\t2\nexp_name:\tnvidia\nname:\tx\n"), Some("nvidia"));
        assert_eq!(exporter("pos:\t0\n"), None);
    }
}
