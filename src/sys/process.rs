//! Processes, and what is seen of them.

use super::device::DeviceNumber;
use std::collections::BTreeMap;

/// A process, told apart from a later one with the same PID by when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks since boot, as in `/proc/PID/stat`.
    pub start: u64,
}

impl Process {
    /// `812 (a name) that may contain anything) S 1 …`: the state is the third field, the start the 22nd.
    pub(super) fn parse(pid: i32, stat: &str) -> Option<Process> {
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
