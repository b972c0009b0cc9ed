//! The kernel this program runs on, or a tree of files that stands for one (`GPU_HANDOFF_ROOT`).

use super::action::{ActError, Action};
use super::device::DeviceNumber;
use super::expendable::{LastAct, Request, Worker};
use super::kernel::{Act, Clock, Files, Kernel, Programs, Read};
use super::process::{End, Process, Sight, Sought};
use super::program::{Running, Talking};
use super::work::carry_out;
use super::{failpoints, files, look, program, terminate, trace, tree, wait};
use nix::libc;
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// No attribute is larger.
const PAGE: usize = 4096;

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
        if std::env::var_os("GPU_HANDOFF_TRACE").is_some_and(|value| value == "1") {
            trace::begin(Duration::ZERO);
        }
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
}

impl Linux {
    fn ask(&self, request: &Request, limit: Duration) -> Result<Vec<u8>, ActError> {
        // Nothing of the machine's own: the file system of a container that does not answer.
        self.ask_of(request, limit, !matches!(request, Request::Inside(..) | Request::LinkInside(..)))
    }

    /// `matters`: a worker that is stuck is left behind, because there is something to put right once it comes back.
    fn ask_of(&self, request: &Request, limit: Duration, matters: bool) -> Result<Vec<u8>, ActError> {
        let mut slot = self.worker.borrow_mut();
        let mut worker = match slot.take() {
            Some(worker) => worker,
            None => Worker::start(&self.root, carry_out, self.last_act.get()).map_err(ActError::Os)?,
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

impl Read for Linux {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        // Without asking for its size: what attributes say of that is wrong, and it is one call more for each.
        let mut bytes = Vec::with_capacity(PAGE);
        fs::File::open(self.path(path))?.take(u64::MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
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
        files::exists(&self.path(path))
    }

    fn device_number(&self, path: &str) -> io::Result<DeviceNumber> {
        let meta = fs::metadata(self.path(path))?;
        if !meta.file_type().is_char_device() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(DeviceNumber::of(meta.rdev()))
    }

    fn device_number_inside(&self, pid: i32, path: &str, limit: Duration) -> Result<Option<DeviceNumber>, ActError> {
        let answer = self.ask(&Request::Inside(pid, path.to_string()), limit)?;
        Ok(String::from_utf8_lossy(&answer).parse().ok())
    }

    fn link_name_inside(&self, pid: i32, path: &str, limit: Duration) -> Result<Option<String>, ActError> {
        let answer = self.ask(&Request::LinkInside(pid, path.to_string()), limit)?;
        Ok((!answer.is_empty()).then(|| String::from_utf8_lossy(&answer).into_owned()))
    }

    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)> {
        let meta = fs::metadata(self.path(path))?;
        Ok((DeviceNumber::of(meta.dev()), meta.ino()))
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
        trace::timed(|| "look at every process".to_string(), || look::look(&self.root, sought, limit))
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

    fn caller(&self) -> Option<Process> {
        self.process(nix::unistd::getppid().as_raw())
    }
}

impl Files for Linux {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }
}

impl Act for Linux {
    fn end_with_this_run(&self) {
        self.last_act.set(LastAct::Nothing);
    }

    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError> {
        self.ask(&Request::Act(action.clone()), limit).map(|_| ())
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
        let worker = Worker::start(&self.root, carry_out, self.last_act.get()).ok()?;
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
}

impl Programs for Linux {
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

    fn make_way_for(&self, path: &str, arguments: &[String], mark: &str) -> io::Error {
        if let Some(worker) = self.worker.borrow_mut().take() {
            worker.dismiss();
        }
        program::make_way_for(&self.path(path), arguments, mark)
    }
}

impl Clock for Linux {
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
        trace::timed(|| "sleep".to_string(), || std::thread::sleep(time));
    }
}

impl Kernel for Linux {
    fn await_any(&self, processes: &[Process], nodes: &[String], limit: Duration) {
        let nodes: Vec<PathBuf> = nodes.iter().map(|node| self.path(node)).collect();
        wait::any(processes, &nodes, limit);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A child that the shell starts, which says when it is ready.
    fn child(script: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        let mut child = command.args(["-c", script]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        child
    }

    fn here() -> Linux {
        Linux::at(PathBuf::from("/"))
    }

    const STAYS: &str = "echo; exec sleep 60";
    const DEAF: &str = "trap '' TERM; echo; while :; do sleep 0.05; done";
    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_process_is_asked_to_end_or_ended() {
        use std::os::unix::process::ExitStatusExt;
        for (script, how, signal) in
            [(STAYS, End::Ask, libc::SIGTERM), (STAYS, End::Kill, libc::SIGKILL), (DEAF, End::Kill, libc::SIGKILL)]
        {
            let mut child = child(script);
            let process = process_here(child.id() as i32).unwrap();
            here().end(process, how).unwrap();
            assert_eq!(child.wait().unwrap().signal(), Some(signal), "{how:?}");
            // It is gone, which is all that was wanted.
            here().end(process, how).unwrap();
        }
    }

    #[test]
    fn whoever_has_the_number_of_an_earlier_process_is_left_alone_and_so_are_all_for_a_tree() {
        let mut child = child(STAYS);
        let process = process_here(child.id() as i32).unwrap();
        let earlier = Process { start: process.start - 1, ..process };
        here().end(earlier, End::Kill).unwrap();
        assert!(here().wait_for_end(earlier, LONG));
        assert!(Linux::at(PathBuf::from("/nowhere")).end(process, End::Kill).is_err());
        assert_eq!(process_here(process.pid), Some(process));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_end_of_a_process_is_waited_for_but_not_for_ever() {
        let mut child = child("echo; sleep 0.5");
        let process = process_here(child.id() as i32).unwrap();
        assert!(!here().wait_for_end(process, Duration::from_millis(50)));
        let begin = Instant::now();
        assert!(here().wait_for_end(process, LONG) && begin.elapsed() < LONG);
        child.wait().unwrap();
        // In a tree of files nobody ends.
        let root = std::env::temp_dir().join(format!("gpu-handoff-ends-{}", std::process::id()));
        let kernel = Linux::at(root.clone());
        fs::create_dir_all(root.join("proc/7")).unwrap();
        let stat = format!("7 (x) S {} 4711 0 0", vec!["1"; 18].join(" "));
        fs::write(root.join("proc/7/stat"), stat).unwrap();
        let waits = |start| kernel.wait_for_end(Process { pid: 7, start }, Duration::from_millis(1));
        let found = [waits(4711), waits(4712)];
        fs::remove_dir_all(root).unwrap();
        assert_eq!(found, [false, true]);
    }

    /// Trees of files are not weighed: there nothing counts.
    #[test]
    fn what_did_not_answer_is_not_asked_again() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-peek-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let fifo = root.join("silent");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(root.join("other"), "abcdef").unwrap();
        let kernel = Linux::at(root.clone());
        let limit = Duration::from_millis(100);
        let is_stuck = |path: &str, limit| matches!(kernel.peek(path, 4, limit), Err(ActError::Stuck { .. }));
        let first = is_stuck("/silent", limit);
        let begin = Instant::now();
        let second = is_stuck("/silent", LONG);
        let took = begin.elapsed();
        let other = kernel.peek("/other", 4, LONG);
        let weight = kernel.weigh_open("/other", "/other", LONG);
        fs::remove_dir_all(root).unwrap();
        assert!(first && second && took < LONG / 2, "{took:?}");
        assert_eq!((other.unwrap(), weight), (b"abcd".to_vec(), None));
    }
}
