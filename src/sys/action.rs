//! What can be changed in the machine, and why a change was not made.

use super::device::DeviceNumber;
use std::fmt;
use std::io;

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
    /// `sched_setaffinity(2)`: a process's thread runs on these CPUs only. The kernel may wait until it has left the others.
    Pin { pid: i32, thread: i32, cpus: Vec<u32> },
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
    pub(super) fn to_text(&self) -> String {
        let Node { path, number, mode, uid, gid } = self;
        format!("{number} {mode} {uid} {gid} {path}")
    }

    pub(super) fn from_text(text: &str) -> Option<Node> {
        let mut parts = text.splitn(5, ' ');
        let number = parts.next()?.parse().ok()?;
        let mut next = || parts.next()?.parse().ok();
        let (mode, uid, gid) = (next()?, next()?, next()?);
        Some(Node { path: parts.next()?.to_string(), number, mode, uid, gid })
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
