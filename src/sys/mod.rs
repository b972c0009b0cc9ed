//! The only place that changes the machine or holds `unsafe`.
//!
//! Everything else sees the machine through [`Kernel`]: it reads what it likes and changes something only by
//! handing over an [`Action`] with a time limit. Tests put a simulated kernel in its place.

mod expendable;
pub mod failpoints;
mod file;
mod held;
mod inside;
mod kcmp;
mod linux;
mod lock;
mod look;
mod maps;
mod program;
mod progress;
mod scan;
mod tables;
mod terminate;
mod tree;
mod wait;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

pub use expendable::{Request, decode, encode};
pub use file::{is_writable, replace_file};
pub use held::{flock_is_held, posix_lock_is_held};
pub use linux::Linux;
pub use lock::{Lock, Share};
pub use maps::Mapped;
pub use program::{Running, Talking};
pub use terminate::{forget_callers_signals, heed as heed_termination};

/// One change to the machine. Each may block in the kernel, so each is carried out under a time limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// One `write(2)` to an attribute that exists.
    Write { path: String, data: String },
    /// `modprobe`, so that the administrator's options, softdeps and install rules count; one call for all of them,
    /// because most of its time goes into starting it.
    Load { modules: Vec<String> },
    /// `delete_module(2)` with `O_NONBLOCK`: it never waits, a module in use is `EWOULDBLOCK`.
    Unload { module: String },
    /// A character device node with this number, mode and owner, in the place of whatever was there.
    MakeNode(Node),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub path: String,
    pub number: DeviceNumber,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Node {
    fn to_text(&self) -> String {
        let Node { path, number, mode, uid, gid } = self;
        format!("{number} {mode} {uid} {gid} {path}")
    }

    fn from_text(text: &str) -> Option<Node> {
        let mut parts = text.splitn(5, ' ');
        let number = parts.next()?.parse().ok()?;
        let mut next = || parts.next()?.parse().ok();
        let (mode, uid, gid) = (next()?, next()?, next()?);
        Some(Node { path: parts.next()?.to_string(), number, mode, uid, gid })
    }
}

/// Major and minor of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    pub major: u64,
    pub minor: u64,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl std::str::FromStr for DeviceNumber {
    type Err = ();

    /// As sysfs writes it in `dev` attributes: `226:0`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(DeviceNumber { major: major.parse().map_err(|_| ())?, minor: minor.parse().map_err(|_| ())? })
    }
}

/// Why an [`Action`] was not done.
#[derive(Debug)]
pub enum ActError {
    /// The kernel said no.
    Os(io::Error),
    /// A helper program said no, in these words.
    Program(String),
    /// It took too long: this process is still at it and was left behind.
    Stuck { pid: i32 },
    /// The process that was to do it was killed; how far it got is not known.
    Died { pid: i32 },
}

impl fmt::Display for ActError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            ActError::Os(error) => write!(f, "{error}"),
            ActError::Program(text) => f.write_str(text),
            ActError::Died { pid } => write!(f, "PID {pid}, which did it, was killed"),
            ActError::Stuck { pid } => write!(f, "never came back (PID {pid} is stuck in it)"),
        }
    }
}

impl ActError {
    pub fn errno(&self) -> Option<i32> {
        match self {
            ActError::Os(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// A process, told apart from a later one with the same PID by when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks since boot, as in `/proc/PID/stat`.
    pub start: u64,
}

impl Process {
    /// `812 (a name) that may contain anything) S 1 …`: the state is the third field, the start the 22nd.
    fn parse(pid: i32, stat: &str) -> Option<Process> {
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        Some(Process { pid, start: fields.nth(18)?.parse().ok()? })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Ask,
    Kill,
}

/// How a process has a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Open,
    /// It is seen in the process's memory: the descriptor may be closed by now, the device is not.
    Mapped,
    /// A ring of io_uring has it.
    Ring,
    /// A buffer (dma-buf) that the NVIDIA driver gave out, of whichever GPU: it has no device number.
    Buffer,
}

/// One device that a process has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenDevice {
    pub number: DeviceNumber,
    pub how: How,
}

/// A process that has something open that was sought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub process: Process,
    pub command: String,
    /// Its `/proc/PID/cgroup`.
    pub cgroup: String,
    /// The first process of a PID namespace below the host's.
    pub is_init: bool,
    /// Descriptors before mappings.
    pub open: Vec<OpenDevice>,
}

/// A process that did not let itself be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hidden {
    pub pid: i32,
    pub command: String,
    pub why: String,
}

/// What a look at all processes is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sought {
    /// Of character devices.
    pub majors: Vec<u64>,
    /// Only these processes, unless there are none.
    pub among: Vec<i32>,
}

/// What it found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sight {
    /// By PID.
    pub users: Vec<User>,
    /// So many open files there are of each device, however many descriptors and processes share one.
    pub files: BTreeMap<DeviceNumber, u64>,
    pub hidden: Vec<Hidden>,
}

/// The machine. Paths are absolute, as in `/sys/bus/pci/devices`; [`Linux`] puts `GPU_HANDOFF_ROOT` before them.
pub trait Kernel {
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;
    /// The last component of a symbolic link's target: how sysfs names a device's driver, group or module.
    fn link_name(&self, path: &str) -> io::Result<String>;
    /// The names in a directory, sorted; none when there is no such directory.
    fn list(&self, path: &str) -> Vec<String>;
    fn exists(&self, path: &str) -> bool;
    /// The device number of a node, or an error when there is no device node at that path.
    fn device_number(&self, path: &str) -> io::Result<DeviceNumber>;
    /// As [`Kernel::device_number`], as a process sees that path: in its own root and mounts, which none of its symbolic
    /// links lead out of. None when there is no device node.
    ///
    /// # Errors
    /// When that cannot be seen: the process has ended, or what is mounted there does not answer within `limit`.
    fn device_number_inside(&self, pid: i32, path: &str, _limit: Duration) -> Result<Option<DeviceNumber>, ActError> {
        let root = format!("/proc/{pid}/root");
        if !self.exists(&root) {
            return Err(ActError::Os(io::ErrorKind::NotFound.into()));
        }
        Ok(self.device_number(&format!("{root}{path}")).ok())
    }
    /// Device and inode number of a file, without opening it: how `/proc/locks` names it.
    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)>;
    /// As [`Kernel::read`], for attributes whose reading takes the device's lock: behind a hung unbind it never returns.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when it took longer than `limit`.
    fn read_slowly(&self, path: &str, _limit: Duration) -> Result<Vec<u8>, ActError> {
        self.read(path).map_err(ActError::Os)
    }
    /// As [`Kernel::read_slowly`], but no more than the first bytes: the rest of a device's configuration space may have
    /// side effects.
    ///
    /// # Errors
    /// As [`Kernel::read_slowly`].
    fn read_head(&self, path: &str, length: usize, limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut bytes = self.read_slowly(path, limit)?;
        bytes.truncate(length);
        Ok(bytes)
    }
    /// Whether opening this vfio group says that somebody has it (`EBUSY`). The kernel lets nobody open it while it
    /// takes apart what a VM had mapped.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when it took longer than `limit`.
    fn vfio_group_busy(&self, group: u32, limit: Duration) -> Result<bool, ActError>;
    /// As [`Kernel::read_head`], of what is none of a card's: behind another process's memory or the consoles' lock. What is
    /// not read in time is not waited for again.
    ///
    /// # Errors
    /// As [`Kernel::read_slowly`].
    fn peek(&self, path: &str, length: usize, _limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut bytes = self.read(path).map_err(ActError::Os)?;
        bytes.truncate(length);
        Ok(bytes)
    }
    /// Who has what is sought open, in all namespaces. Needs root to see all of them.
    ///
    /// # Errors
    /// Why that is not known: a look that saw less than everything is none.
    fn look(&self, sought: &Sought, limit: Duration) -> Result<Sight, String>;
    /// Until one of these processes ends, or somebody closes one of these nodes, or `limit` is over, or for no reason.
    fn await_any(&self, _processes: &[Process], _nodes: &[String], limit: Duration) {
        self.sleep(limit.min(Duration::from_millis(20)));
    }
    /// By how much a counter is higher while this process has a node open. None when that is not known, as in a tree of
    /// files.
    fn weigh_open(&self, _node: &str, _counter: &str, _limit: Duration) -> Option<u64> {
        None
    }
    /// Has a block device to itself, and lets go at once: `EBUSY` when somebody else has it to himself.
    ///
    /// # Errors
    /// What the kernel said; [`ActError::Stuck`] when it took longer than `limit`.
    fn try_claim(&self, _path: &str, _limit: Duration) -> Result<(), ActError> {
        Err(ActError::Os(io::ErrorKind::NotFound.into()))
    }
    /// The names of the directories in a directory that are no links, sorted.
    fn folders(&self, _path: &str) -> Vec<String> {
        Vec::new()
    }
    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError>;
    /// Runs a program of the host, by its absolute path, and gives back its standard output. One that takes longer than
    /// `limit` is ended.
    ///
    /// # Errors
    /// [`ActError::Program`] with its own words, or that it is not installed.
    fn program(&self, path: &str, arguments: &[&str], limit: Duration) -> Result<String, ActError>;
    /// As [`Kernel::program`], but only starts it: it goes on beside this run, and after it.
    ///
    /// # Errors
    /// [`ActError::Program`] when it could not be started.
    fn start_program(&self, path: &str, _arguments: &[&str]) -> Result<Running, ActError> {
        Err(ActError::Program(format!("{path} is not installed")))
    }
    /// As [`Kernel::start_program`], of one that takes long: the caller asks how it gets on, and ends it.
    ///
    /// # Errors
    /// As [`Kernel::start_program`].
    fn start_talking(&self, path: &str, _arguments: &[&str]) -> Result<Talking, ActError> {
        Err(ActError::Program(format!("{path} is not installed")))
    }
    /// The process that will carry out the next action.
    fn worker(&self) -> Option<Process>;
    /// Asks a process to end (SIGTERM) or ends it (SIGKILL); nothing when it has gone.
    ///
    /// # Errors
    /// What the kernel said.
    fn end(&self, process: Process, how: End) -> io::Result<()>;
    /// The process that called this program: Proxmox's task, or somebody's shell.
    fn caller(&self) -> Option<Process> {
        None
    }
    /// Whether somebody asked this run to end (SIGTERM).
    fn is_asked_to_end(&self) -> bool;
    /// Time that passes and is never set back.
    fn now(&self) -> Duration;
    /// Waits until a process has ended, and with it closed all that it had open. True when it has; false after `limit`, or
    /// when somebody asks this run to end.
    fn wait_for_end(&self, process: Process, limit: Duration) -> bool {
        let end = self.now() + limit;
        loop {
            if self.process(process.pid) != Some(process) {
                return true;
            }
            if self.now() >= end || self.is_asked_to_end() {
                return false;
            }
            self.sleep(Duration::from_millis(20));
        }
    }
    /// Seconds since 1970, UTC.
    fn unix_time(&self) -> u64;
    fn sleep(&self, time: Duration);

    /// The attribute's text without the newline at its end; none when it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        let bytes = self.read(path).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim_end().to_string())
    }

    /// None when there is no such process, or when it has ended and only waits to be reaped.
    fn process(&self, pid: i32) -> Option<Process> {
        Process::parse(pid, &self.text(&format!("/proc/{pid}/stat"))?)
    }
}
