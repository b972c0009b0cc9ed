//! The kernel this program runs on, or a tree of files that stands for one (`GPU_HANDOFF_ROOT`).

use super::expendable::{self, LastAct, Request, Worker};
use super::{ActError, Action, DeviceNumber, Kernel, Node, OpenDevice, Process, failpoints, terminate};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use std::cell::{Cell, RefCell};
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub struct Linux {
    root: PathBuf,
    begin: Instant,
    /// Started by the first change.
    worker: RefCell<Option<Worker>>,
    last_act: Cell<LastAct>,
}

impl Linux {
    /// `/`, or the tree that `GPU_HANDOFF_ROOT` names.
    pub fn from_environment() -> Linux {
        match std::env::var_os("GPU_HANDOFF_ROOT") {
            // The worker has another working directory, so a relative path would be another place to it.
            Some(root) if !root.is_empty() => {
                Linux::at(std::path::absolute(&root).unwrap_or_else(|_| PathBuf::from(root)))
            }
            _ => Linux::at(PathBuf::from("/")),
        }
    }

    pub fn at(root: PathBuf) -> Linux {
        Linux { root, begin: Instant::now(), worker: RefCell::new(None), last_act: Cell::new(LastAct::Reconcile) }
    }

    /// False for a tree of files: then no system call that changes the machine is made.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    /// From now on a worker that outlives this run lets things be.
    pub fn end_with_this_run(&self) {
        self.last_act.set(LastAct::Nothing);
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

impl Linux {
    fn ask(&self, request: &Request, limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut slot = self.worker.borrow_mut();
        let mut worker = match slot.take() {
            Some(worker) => worker,
            None => Worker::start(&self.root, work, self.last_act.get()).map_err(ActError::Os)?,
        };
        let answer = worker.ask(request, limit);
        match answer {
            Err(ActError::Stuck { .. }) => worker.abandon(),
            Err(ActError::Died { .. }) => worker.dismiss(),
            _ => *slot = Some(worker),
        }
        answer
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.borrow_mut().take() {
            worker.dismiss();
        }
    }
}

impl Kernel for Linux {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(path))
    }

    fn link_name(&self, path: &str) -> io::Result<String> {
        let target = fs::read_link(self.path(path))?;
        let name = target.file_name().ok_or(io::ErrorKind::InvalidData)?;
        Ok(name.to_string_lossy().into_owned())
    }

    fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned())).collect();
        names.sort_unstable();
        names
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    fn device_number(&self, path: &str) -> io::Result<DeviceNumber> {
        let meta = fs::metadata(self.path(path))?;
        if !meta.file_type().is_char_device() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(number(meta.rdev()))
    }

    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)> {
        let meta = fs::metadata(self.path(path))?;
        Ok((number(meta.dev()), meta.ino()))
    }

    fn read_slowly(&self, path: &str, limit: Duration) -> Result<Vec<u8>, ActError> {
        self.ask(&Request::Read(path.to_string()), limit)
    }

    fn read_head(&self, path: &str, length: usize, limit: Duration) -> Result<Vec<u8>, ActError> {
        self.ask(&Request::ReadHead(path.to_string(), length), limit)
    }

    fn vfio_group_busy(&self, group: u32, limit: Duration) -> Result<bool, ActError> {
        match self.ask(&Request::TryOpen(format!("/dev/vfio/{group}")), limit) {
            Err(ActError::Os(error)) => Ok(error.raw_os_error() == Some(libc::EBUSY)),
            other => other.map(|_| false),
        }
    }

    fn open_devices(&self) -> Vec<OpenDevice> {
        let mut found = Vec::new();
        if failpoints::is_blind() {
            return found;
        }
        for name in self.list("/proc") {
            let Ok(pid) = name.parse::<i32>() else { continue };
            // A process that ended meanwhile, or that we may not look into, has nothing to list.
            let Ok(descriptors) = fs::read_dir(self.path(&format!("/proc/{pid}/fd"))) else { continue };
            let before = found.len();
            for entry in descriptors.flatten() {
                let Some(number) = open_device(&entry.path()) else { continue };
                let device = OpenDevice { pid, number };
                if !found[before..].contains(&device) {
                    found.push(device);
                }
            }
        }
        found
    }

    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError> {
        self.ask(&Request::Act(action.clone()), limit).map(|_| ())
    }

    fn worker(&self) -> Option<Process> {
        // Not below the root: the worker is a process of this machine.
        let alive = |worker: &Worker| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", worker.pid())).ok()?;
            Process::parse(worker.pid(), &stat)
        };
        let mut slot = self.worker.borrow_mut();
        if let Some(process) = slot.as_ref().and_then(alive) {
            return Some(process);
        }
        if let Some(dead) = slot.take() {
            dead.dismiss();
        }
        let worker = Worker::start(&self.root, work, self.last_act.get()).ok()?;
        let process = alive(&worker);
        *slot = Some(worker);
        process
    }

    fn caller(&self) -> Option<Process> {
        self.process(nix::unistd::getppid().as_raw())
    }

    fn is_asked_to_end(&self) -> bool {
        terminate::is_asked()
    }

    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    fn unix_time(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// In the worker: may block for as long as the kernel likes.
fn work(root: &Path, request: &Request) -> Result<Vec<u8>, ActError> {
    match request {
        Request::Act(action) => act(root, action).map(|()| Vec::new()),
        Request::Read(path) => fs::read(below(root, path)).map_err(ActError::Os),
        Request::ReadHead(path, length) => read_head(&below(root, path), *length).map_err(ActError::Os),
        Request::TryOpen(path) => {
            let open = fs::OpenOptions::new().read(true).write(true).open(below(root, path));
            open.map(|_| Vec::new()).map_err(ActError::Os)
        }
    }
}

fn act(root: &Path, action: &Action) -> Result<(), ActError> {
    match action {
        Action::Write { path, data } => write_attribute(&below(root, path), data).map_err(ActError::Os),
        Action::Load { modules } => {
            let mut programs = ["/usr/sbin/modprobe", "/sbin/modprobe"].iter().map(|path| below(root, path));
            let Some(program) = programs.find(|path| path.exists()) else {
                return Err(ActError::Program("modprobe is not installed".to_string()));
            };
            let arguments: Vec<&str> = ["-a", "--"].into_iter().chain(modules.iter().map(String::as_str)).collect();
            expendable::program(&program, &arguments)
        }
        Action::Unload { .. } | Action::MakeNode(_) if root != Path::new("/") => {
            Err(ActError::Program("not done under GPU_HANDOFF_ROOT".to_string()))
        }
        Action::Unload { module } => unload(module).map_err(ActError::Os),
        Action::MakeNode(node) => make_node(&below(root, &node.path), node).map_err(ActError::Os),
    }
}

/// One read(2) of no more than that, as the kernel reads no further then either.
fn read_head(path: &Path, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = fs::File::open(path)?.read(&mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Never creates: a missing attribute must stay an error, also in a tree of files.
fn write_attribute(path: &Path, data: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
    // One write(2): sysfs takes each as a whole value.
    let written = file.write(data.as_bytes())?;
    if written == data.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
}

fn unload(module: &str) -> io::Result<()> {
    let name = CString::new(module)?;
    nix::kmod::delete_module(&name, nix::kmod::DeleteModuleFlags::O_NONBLOCK)?;
    Ok(())
}

/// Made beside the final name and renamed, so that nobody finds the path without a node or with a wrong mode.
fn make_node(path: &Path, node: &Node) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".gpu-handoff");
    let beside = PathBuf::from(beside);
    let _ = fs::remove_file(&beside);
    mknod(&beside, SFlag::S_IFCHR, Mode::empty(), makedev(node.number.major, node.number.minor))?;
    std::os::unix::fs::chown(&beside, Some(node.uid), Some(node.gid))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(node.mode))?;
    fs::rename(&beside, path)
}

/// The device that a descriptor in `/proc/PID/fd` is open on. The link is followed, because its text is that of the
/// process's own namespaces; but no file system is asked for news of the file, because one of a server that is away
/// would not answer.
fn open_device(descriptor: &Path) -> Option<DeviceNumber> {
    let path = CString::new(descriptor.as_os_str().as_bytes()).ok()?;
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with a NUL, and the kernel writes no more than one statx.
    let done = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr()) };
    // SAFETY: zeroed memory is a valid statx, whatever of it was written.
    let found = unsafe { found.assume_init() };
    let is_device = done == 0 && u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    is_device.then(|| DeviceNumber { major: found.stx_rdev_major.into(), minor: found.stx_rdev_minor.into() })
}

fn number(device: u64) -> DeviceNumber {
    DeviceNumber { major: major(device), minor: minor(device) }
}
