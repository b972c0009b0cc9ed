//! The kernel this program runs on, or a tree of files that stands for one (`GPU_HANDOFF_ROOT`).

use super::expendable::{LastAct, Request, Worker};
use super::{
    ActError, Action, DeviceNumber, End, Kernel, Node, Process, Running, Sight, Sought, Talking, failpoints, inside,
    look, program, terminate, tree, wait,
};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use std::cell::{Cell, RefCell};
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often a counter is looked at that others change meanwhile.
const WEIGHINGS: usize = 20;

pub struct Linux {
    root: PathBuf,
    begin: Instant,
    /// Started by the first change.
    worker: RefCell<Option<Worker>>,
    /// What could not be read in time.
    unreadable: RefCell<Vec<String>>,
    last_act: Cell<LastAct>,
    /// What was read slowly and did not answer, and who still waits for it.
    unanswered: RefCell<Vec<(String, Process)>>,
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

    /// A tree of files stands for a machine: one that has a part of the real machine inside is neither.
    ///
    /// # Errors
    /// What is mounted there.
    pub fn refuse_mixture(&self) -> Result<(), String> {
        if self.is_real() {
            return Ok(());
        }
        let root = fs::canonicalize(&self.root).unwrap_or_else(|_| self.root.clone());
        let inside = ["sys", "proc", "sys/bus/pci", "sys/module", "sys/fs/cgroup"].map(|name| root.join(name));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounts = mounts.lines().filter_map(mount_point).filter(|path| path.starts_with(&root) && *path != root);
        match inside.into_iter().chain(mounts).find(|path| tree::is_of_the_kernel(path)) {
            Some(path) => Err(format!(
                "GPU_HANDOFF_ROOT={}: {} is the real machine's, and a tree must be made of files; unset the variable, \
                 or unmount that",
                self.root.display(),
                path.display()
            )),
            None => Ok(()),
        }
    }

    pub fn at(root: PathBuf) -> Linux {
        Linux {
            root,
            begin: Instant::now(),
            worker: RefCell::new(None),
            unreadable: RefCell::default(),
            last_act: Cell::new(LastAct::Reconcile),
            unanswered: RefCell::default(),
        }
    }

    /// False for a tree of files: then no system call that changes the machine is made.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    /// A symbolic link that is not there yet, and the folder that it is in.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn link(&self, path: &str, target: &str) -> io::Result<()> {
        let path = self.path(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        std::os::unix::fs::symlink(target, path)
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
        // Nothing of the machine's own: the file system of a container that does not answer.
        self.ask_of(request, limit, !matches!(request, Request::Inside(..)))
    }

    /// `matters`: a worker that is stuck is left behind, because there is something to put right once it comes back.
    fn ask_of(&self, request: &Request, limit: Duration, matters: bool) -> Result<Vec<u8>, ActError> {
        let mut slot = self.worker.borrow_mut();
        let mut worker = match slot.take() {
            Some(worker) => worker,
            None => Worker::start(&self.root, work, self.last_act.get()).map_err(ActError::Os)?,
        };
        let answer = worker.ask(request, limit);
        match answer {
            Err(ActError::Stuck { .. }) if !matters => worker.kill(),
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

    fn device_number_inside(&self, pid: i32, path: &str, limit: Duration) -> Result<Option<DeviceNumber>, ActError> {
        let answer = self.ask(&Request::Inside(pid, path.to_string()), limit)?;
        Ok(String::from_utf8_lossy(&answer).parse().ok())
    }

    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)> {
        let meta = fs::metadata(self.path(path))?;
        Ok((number(meta.dev()), meta.ino()))
    }

    fn read_slowly(&self, path: &str, limit: Duration) -> Result<Vec<u8>, ActError> {
        let mut unanswered = self.unanswered.borrow_mut();
        // Nobody need wait for it once more.
        unanswered.retain(|(_, reader)| process_here(reader.pid) == Some(*reader));
        if let Some((_, reader)) = unanswered.iter().find(|(other, _)| other == path) {
            return Err(ActError::Stuck { pid: reader.pid });
        }
        let answer = self.ask(&Request::Read(path.to_string()), limit);
        if let Err(ActError::Stuck { pid }) = &answer {
            unanswered.extend(process_here(*pid).map(|reader| (path.to_string(), reader)));
        }
        answer
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

    fn peek(&self, path: &str, length: usize, limit: Duration) -> Result<Vec<u8>, ActError> {
        if self.unreadable.borrow().iter().any(|known| known == path) {
            return Err(ActError::Stuck { pid: 0 });
        }
        let answer = self.ask_of(&Request::ReadHead(path.to_string(), length), limit, false);
        if matches!(answer, Err(ActError::Stuck { .. })) {
            self.unreadable.borrow_mut().push(path.to_string());
        }
        answer
    }

    fn look(&self, sought: &Sought, limit: Duration) -> Result<Sight, String> {
        if failpoints::is_blind() {
            return Ok(Sight::default());
        }
        look::look(&self.root, sought, limit)
    }

    fn await_any(&self, processes: &[Process], nodes: &[String], limit: Duration) {
        let nodes: Vec<PathBuf> = nodes.iter().map(|node| self.path(node)).collect();
        wait::any(processes, &nodes, limit);
    }

    fn weigh_open(&self, node: &str, counter: &str, limit: Duration) -> Option<u64> {
        if !self.is_real() {
            return None;
        }
        let answer = self.ask_of(&Request::Weigh(node.to_string(), counter.to_string()), limit, false).ok()?;
        String::from_utf8_lossy(&answer).parse().ok()
    }

    fn try_claim(&self, path: &str, limit: Duration) -> Result<(), ActError> {
        self.ask_of(&Request::TryClaim(path.to_string()), limit, false).map(|_| ())
    }

    fn folders(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut names: Vec<String> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_unstable();
        names
    }

    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError> {
        self.ask(&Request::Act(action.clone()), limit).map(|_| ())
    }

    fn program(&self, path: &str, arguments: &[&str], limit: Duration) -> Result<String, ActError> {
        self.start_program(path, arguments)?.finish(Some(limit))
    }

    fn start_program(&self, path: &str, arguments: &[&str]) -> Result<Running, ActError> {
        if !self.exists(path) {
            return Err(ActError::Program(format!("{path} is not installed")));
        }
        program::start(&self.path(path), arguments)
    }

    fn start_talking(&self, path: &str, arguments: &[&str]) -> Result<Talking, ActError> {
        if !self.exists(path) {
            return Err(ActError::Program(format!("{path} is not installed")));
        }
        Talking::start(&self.path(path), arguments)
    }

    fn worker(&self) -> Option<Process> {
        let alive = |worker: &Worker| process_here(worker.pid());
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

    fn end(&self, process: Process, how: End) -> io::Result<()> {
        if !self.is_real() {
            return Err(io::Error::other("not done under GPU_HANDOFF_ROOT"));
        }
        let signal = match how {
            End::Ask => libc::SIGTERM,
            End::Kill => libc::SIGKILL,
        };
        let pidfd = match program::pidfd(process.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Whoever has that PID now has kept it since the descriptor was made.
        if self.process(process.pid) != Some(process) {
            return Ok(());
        }
        // SAFETY: without a siginfo nothing is read from memory.
        let sent = unsafe {
            let none = std::ptr::null::<libc::siginfo_t>();
            libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0)
        };
        match io::Error::last_os_error() {
            error if sent < 0 && error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(()),
        }
    }

    fn wait_for_end(&self, process: Process, limit: Duration) -> bool {
        if self.is_real()
            && let Ok(pidfd) = program::pidfd(process.pid)
            // Whoever has that PID now has kept it since the descriptor was made.
            && self.process(process.pid) == Some(process)
        {
            return program::wait_for(&pidfd, limit);
        }
        self.sleep(limit.min(Duration::from_millis(20)));
        self.process(process.pid) != Some(process)
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

/// Not below the root: the worker is a process of this machine.
fn process_here(pid: i32) -> Option<Process> {
    Process::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The fifth field, with `\\040` for a blank.
fn mount_point(line: &str) -> Option<PathBuf> {
    let path = line.split(' ').nth(4)?;
    let path = path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    Some(PathBuf::from(path))
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
        Request::Weigh(node, counter) => {
            let weight = weigh(&below(root, node), &below(root, counter)).map_err(ActError::Os)?;
            Ok(weight.to_string().into_bytes())
        }
        Request::TryClaim(path) => {
            let open = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(below(root, path));
            open.map(|_| Vec::new()).map_err(ActError::Os)
        }
        Request::Inside(pid, path) => {
            let found = inside::device(root, *pid, path).map_err(ActError::Os)?;
            Ok(found.map_or_else(Vec::new, |device| number(device).to_string().into_bytes()))
        }
    }
}

fn act(root: &Path, action: &Action) -> Result<(), ActError> {
    match action {
        Action::Write { path, data } => write_attribute(root, path, data).map_err(ActError::Os),
        Action::Load { modules } => {
            let mut programs = ["/usr/sbin/modprobe", "/sbin/modprobe"].iter().map(|path| below(root, path));
            let Some(program) = programs.find(|path| path.exists()) else {
                return Err(ActError::Program("modprobe is not installed".to_string()));
            };
            let arguments: Vec<&str> = ["-a", "--"].into_iter().chain(modules.iter().map(String::as_str)).collect();
            program::run(&program, &arguments, None).map(|_| ())
        }
        Action::Unload { .. } | Action::MakeNode(_) if root != Path::new("/") => {
            Err(ActError::Program("not done under GPU_HANDOFF_ROOT".to_string()))
        }
        Action::Unload { module } => unload(module).map_err(ActError::Os),
        Action::MakeNode(node) => make_node(&below(root, &node.path), node).map_err(ActError::Os),
    }
}

/// Others open and close it as well: what is seen twice in a row counts.
fn weigh(node: &Path, counter: &Path) -> io::Result<u64> {
    let count = || -> io::Result<u64> {
        let text = fs::read_to_string(counter)?;
        text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
    };
    let mut before = None;
    for _ in 0..WEIGHINGS {
        let without = count()?;
        let open = fs::OpenOptions::new().read(true).write(true).open(node)?;
        let weight = count()?.checked_sub(without).filter(|weight| *weight > 0);
        drop(open);
        if let Some(weight) = weight.filter(|_| weight == before) {
            return Ok(weight);
        }
        before = weight;
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// One read(2) of no more than that, as the kernel reads no further then either.
fn read_head(path: &Path, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = fs::File::open(path)?.read(&mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Never creates: a missing attribute must stay an error, also in a tree of files.
fn write_attribute(root: &Path, path: &str, data: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(below(root, path))?;
    // However it got into the tree: a write there is a change to the machine.
    if root != Path::new("/") && tree::is_open_in_the_kernel(&file) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // One write(2): sysfs takes each as a whole value.
    let written = file.write(data.as_bytes())?;
    if written == data.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
}

fn unload(module: &str) -> io::Result<()> {
    let name = CString::new(module)?;
    nix::kmod::delete_module(&name, nix::kmod::DeleteModuleFlags::O_NONBLOCK)?;
    Ok(())
}

/// Made beside the final name and renamed, so that nobody finds the path without a node or with a wrong mode. A handoff
/// and device events may make the same node at the same time: each has a name of its own for it.
fn make_node(path: &Path, node: &Node) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.gpu-handoff-{}", std::process::id()));
    let _ = fs::remove_file(&beside);
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    mknod(&beside, SFlag::S_IFCHR, Mode::empty(), makedev(node.number.major, node.number.minor))?;
    std::os::unix::fs::chown(&beside, Some(node.uid), Some(node.gid))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(node.mode))?;
    fs::rename(&beside, path)
}

pub(super) fn number(device: u64) -> DeviceNumber {
    DeviceNumber { major: major(device), minor: minor(device) }
}
