//! The machine as everything else sees it.

use super::action::{ActError, Action};
use super::device::DeviceNumber;
use super::files;
use super::lock::{Lock, Share};
use super::process::{End, Process, Sight, Sought};
use super::program::{Running, Talking};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What is seen of the machine. Paths are absolute, as in `/sys/bus/pci/devices`; [`Linux`](super::Linux) puts
/// `GPU_HANDOFF_ROOT` before them.
pub trait Read {
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;
    /// The last component of a symbolic link's target: how sysfs names a device's driver, group or module.
    fn link_name(&self, path: &str) -> io::Result<String>;
    /// The names in a directory, sorted; none when there is no such directory.
    fn list(&self, path: &str) -> Vec<String>;
    /// The names of the directories in a directory that are no links, sorted.
    fn folders(&self, _path: &str) -> Vec<String> {
        Vec::new()
    }
    fn exists(&self, path: &str) -> bool;
    /// The attribute's text without the newline at its end; none when it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        let bytes = self.read(path).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim_end().to_string())
    }
    /// The device number of a node, or an error when there is no device node at that path.
    fn device_number(&self, path: &str) -> io::Result<DeviceNumber>;
    /// As [`Read::device_number`], as a process sees that path: in its own root and mounts, which none of its symbolic
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
    /// What a symbolic link leads to as a process sees that path, its last component; as [`Read::device_number_inside`].
    /// None when there is no link.
    ///
    /// # Errors
    /// As [`Read::device_number_inside`].
    fn link_name_inside(&self, pid: i32, path: &str, _limit: Duration) -> Result<Option<String>, ActError> {
        Ok(self.link_name(&format!("/proc/{pid}/root{path}")).ok())
    }
    /// Device and inode number of a file, without opening it: how `/proc/locks` names it.
    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)>;
    /// As [`Read::read`], for attributes whose reading takes the device's lock: behind a hung unbind it never returns.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when it took longer than `limit`.
    fn read_slowly(&self, path: &str, _limit: Duration) -> Result<Vec<u8>, ActError> {
        self.read(path).map_err(ActError::Os)
    }
    /// As [`Read::read_slowly`], but no more than the first bytes: the rest of a device's configuration space may have
    /// side effects.
    ///
    /// # Errors
    /// As [`Read::read_slowly`].
    fn read_head(&self, path: &str, length: usize, limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut bytes = self.read_slowly(path, limit)?;
        bytes.truncate(length);
        Ok(bytes)
    }
    /// As [`Read::read_head`], of what is none of a card's: behind another process's memory or the consoles' lock. What is
    /// not read in time is not waited for again.
    ///
    /// # Errors
    /// As [`Read::read_slowly`].
    fn peek(&self, path: &str, length: usize, _limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut bytes = self.read(path).map_err(ActError::Os)?;
        bytes.truncate(length);
        Ok(bytes)
    }
    /// Whether opening this vfio group says that somebody has it (`EBUSY`). The kernel lets nobody open it while it
    /// takes apart what a VM had mapped.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when it took longer than `limit`.
    fn vfio_group_busy(&self, group: u32, limit: Duration) -> Result<bool, ActError>;
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
    /// Who has what is sought open, in all namespaces. Needs root to see all of them.
    ///
    /// # Errors
    /// Why that is not known: a look that saw less than everything is none.
    fn look(&self, sought: &Sought, limit: Duration) -> Result<Sight, String>;
    /// None when there is no such process, or when it has ended and only waits to be reaped.
    fn process(&self, pid: i32) -> Option<Process> {
        Process::parse(pid, &self.text(&format!("/proc/{pid}/stat"))?)
    }
    /// The process that called this program: Proxmox's task, or somebody's shell.
    fn caller(&self) -> Option<Process> {
        None
    }
}

/// Files that are written, moved and removed: our own, and those that configure the host. Paths as in [`Read`].
pub trait Files {
    /// Where a path is on this machine: for programs that are told of it.
    fn path(&self, path: &str) -> PathBuf;
    /// False for a tree of files: then no system call that changes the machine is made.
    fn is_real(&self) -> bool;

    /// The file has these bytes and this mode, and a folder that it is in, or is as it was.
    ///
    /// # Errors
    /// What the kernel said; then the old one is whole, and nothing is left beside it.
    fn write_file(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        let path = self.path(path);
        path.parent().map_or(Ok(()), files::make_folder)?;
        files::write(&path, bytes, mode)
    }

    /// As [`Files::write_file`], in a folder that is there, and without waiting for a disk: after a power loss the file may
    /// be empty.
    ///
    /// # Errors
    /// As [`Files::write_file`].
    fn write_lightly(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        files::write_lightly(&self.path(path), bytes, mode)
    }

    /// # Errors
    /// What the kernel said; nothing when there is no such file.
    fn remove_file(&self, path: &str) -> io::Result<()> {
        files::remove(&self.path(path))
    }

    /// A file's new name, in a folder that is there.
    ///
    /// # Errors
    /// What the kernel said.
    fn rename_file(&self, from: &str, to: &str) -> io::Result<()> {
        files::rename(&self.path(from), &self.path(to))
    }

    /// The folder and all above it.
    ///
    /// # Errors
    /// What the kernel said.
    fn make_folder(&self, path: &str) -> io::Result<()> {
        files::make_folder(&self.path(path))
    }

    /// A folder with nothing in it.
    ///
    /// # Errors
    /// What the kernel said.
    fn remove_folder(&self, path: &str) -> io::Result<()> {
        files::remove_folder(&self.path(path))
    }

    /// A file of ours to add to, and the folder that it is in.
    ///
    /// # Errors
    /// What the kernel said.
    fn append_to(&self, path: &str, mode: u32) -> io::Result<File> {
        files::append_to(&self.path(path), mode)
    }

    /// A file that is not there yet, and the folder that it is in.
    ///
    /// # Errors
    /// What the kernel said; [`io::ErrorKind::AlreadyExists`] when it is there.
    fn create_file(&self, path: &str, mode: u32) -> io::Result<File> {
        files::create(&self.path(path), mode)
    }

    /// A file that is there, as if it had just been written.
    ///
    /// # Errors
    /// What the kernel said.
    fn touch_file(&self, path: &str) -> io::Result<()> {
        files::touch(&self.path(path))
    }

    /// # Errors
    /// What the kernel said.
    fn copy_file(&self, from: &str, to: &str) -> io::Result<()> {
        files::copy(&self.path(from), &self.path(to))
    }

    /// Whether the owner of a directory may write to it by its mode. Asking for access says yes to root in any case, also
    /// where the file system says no, as Proxmox's does without quorum.
    ///
    /// # Errors
    /// When there is no such file.
    fn is_writable(&self, path: &str) -> io::Result<bool> {
        files::is_writable(&self.path(path))
    }

    /// A symbolic link that is not there yet, and the folder that it is in.
    ///
    /// # Errors
    /// What the kernel said.
    fn link(&self, path: &str, target: &str) -> io::Result<()> {
        files::link(&self.path(path), target)
    }

    /// A lock file, and the folder that it is in; None when it was somebody else's for all of `limit`.
    ///
    /// # Errors
    /// When it cannot be made.
    fn lock(&self, path: &str, share: Share, limit: Duration) -> io::Result<Option<Lock>> {
        let path = self.path(path);
        path.parent().map_or(Ok(()), files::make_folder)?;
        Lock::take_as(&path, share, limit)
    }
}

/// What changes it.
pub trait Act {
    /// From now on a worker that outlives this run lets things be.
    fn end_with_this_run(&self) {}
    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError>;
    /// The process that will carry out the next action.
    fn worker(&self) -> Option<Process>;
    /// Asks a process to end (SIGTERM) or ends it (SIGKILL); nothing when it has gone.
    ///
    /// # Errors
    /// What the kernel said.
    fn end(&self, process: Process, how: End) -> io::Result<()>;
}

/// The host's own programs.
pub trait Programs {
    /// Runs a program of the host, by its absolute path, and gives back its standard output. One that takes longer than
    /// `limit` is ended.
    ///
    /// # Errors
    /// [`ActError::Program`] with its own words, or that it is not installed.
    fn program(&self, path: &str, arguments: &[&str], limit: Duration) -> Result<String, ActError>;
    /// As [`Programs::program`], but only starts it: it goes on beside this run, and after it.
    ///
    /// # Errors
    /// [`ActError::Program`] when it could not be started.
    fn start_program(&self, path: &str, _arguments: &[&str]) -> Result<Running, ActError> {
        Err(ActError::Program(format!("{path} is not installed")))
    }
    /// As [`Programs::start_program`], of one that takes long: the caller asks how it gets on, and ends it.
    ///
    /// # Errors
    /// As [`Programs::start_program`].
    fn start_talking(&self, path: &str, _arguments: &[&str]) -> Result<Talking, ActError> {
        Err(ActError::Program(format!("{path} is not installed")))
    }
    /// A program takes the place of this one, with its environment, in which `mark` is set, and what it has open; why it
    /// does not.
    fn make_way_for(&self, _path: &str, _arguments: &[String], _mark: &str) -> io::Error {
        io::ErrorKind::NotFound.into()
    }
}

pub trait Clock {
    /// Time that passes and is never set back.
    fn now(&self) -> Duration;
    /// Seconds since 1970, UTC.
    fn unix_time(&self) -> u64;
    fn sleep(&self, time: Duration);
    /// Whether somebody asked this run to end (SIGTERM).
    fn is_asked_to_end(&self) -> bool;
}

/// All of the machine, and waiting for what others do in it.
pub trait Kernel: Read + Files + Act + Programs + Clock {
    /// Until one of these processes ends, or somebody closes one of these nodes, or `limit` is over, or for no reason.
    fn await_any(&self, _processes: &[Process], _nodes: &[String], limit: Duration) {
        self.sleep(limit.min(Duration::from_millis(20)));
    }
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
}
