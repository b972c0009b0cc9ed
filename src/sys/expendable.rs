//! Work that may never come back is done by a child that can be given up: the worker.
//!
//! It is forked before the first change and does one action after the other. What it must not keep is left behind at
//! once: a `flock` and the write end of a pipe survive `fork`, so an abandoned worker that kept them would hold
//! Proxmox's task log and every later handoff.
//!
//! A worker whose parent goes without saying goodbye (killed, or it gave the worker up) starts
//! `gpu-handoff reconcile --unfinished` as its last act, so that a handoff cut short and a call that came back late are put right by themselves.

use super::action::{ActError, Action, Node};
use super::{failpoints, program, terminate, trace};
use crate::sorted;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// More than this of a file's beginning nobody asks for; what a pipe holds, and less.
const MOST_OF_HEAD: usize = 32 * 1024;

/// The errno that stands for a program's own words.
const IN_WORDS: i32 = -1;

/// What the worker can be asked for: all that may block in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Act(Action),
    /// The bytes of an attribute whose reading takes the device's lock.
    Read(String),
    /// As many bytes from its beginning.
    ReadHead(String, usize),
    /// Opens for reading and writing, and closes again.
    TryOpen(String),
    /// By how much a counter is higher while a node is open: the node, and the counter's attribute.
    Weigh(String, String),
    /// Opens a block device for reading that nobody else has to himself, and closes it again.
    TryClaim(String),
    /// The number of the device node that a process finds at a path.
    Inside(i32, String),
    /// What the symbolic link leads to that a process finds at a path, its last component.
    LinkInside(i32, String),
}

/// For the trace.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Request::Act(Action::Write { path, data }) => write!(f, "write {} to {path}", data.trim_end()),
            Request::Act(Action::Load { modules }) => write!(f, "modprobe -a {}", modules.join(" ")),
            Request::Act(Action::Unload { module }) => write!(f, "unload {module}"),
            Request::Act(Action::MakeNode(node)) => write!(f, "make {}", node.path),
            Request::Act(Action::Pin { thread, cpus, .. }) => write!(f, "pin thread {thread} to {}", numbers(cpus)),
            Request::Read(path) | Request::ReadHead(path, _) => write!(f, "read {path}"),
            Request::TryOpen(path) | Request::TryClaim(path) => write!(f, "open {path}"),
            Request::Weigh(node, counter) => write!(f, "weigh {node} by {counter}"),
            Request::Inside(pid, path) | Request::LinkInside(pid, path) => write!(f, "look at {path} of process {pid}"),
        }
    }
}

/// What a worker does when its parent is gone without a goodbye.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastAct {
    Reconcile,
    /// Its parent was such a reconcile: one after the other would go on for ever.
    Nothing,
}

/// Carries out a request; in the worker, so that it may block.
pub type Work = fn(root: &Path, request: &Request) -> Result<Vec<u8>, ActError>;

pub struct Worker {
    pid: Pid,
    commands: File,
    answers: File,
}

impl Worker {
    /// # Errors
    /// When there is no process or no pipe to be had.
    pub fn start(root: &Path, work: Work, last_act: LastAct) -> io::Result<Worker> {
        // Close-on-exec: a program that the worker runs must not keep the pipes open after it.
        let (commands_in, commands) = pipe2(OFlag::O_CLOEXEC)?;
        let (answers, answers_out) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: this program has one thread, so the child may do all that the parent could.
        match unsafe { fork() }? {
            ForkResult::Child => {
                leave_parent_behind(&[commands_in.as_raw_fd(), answers_out.as_raw_fd()]);
                let orderly = serve(commands_in.into(), answers_out.into(), |request| work(root, request));
                if !orderly && last_act == LastAct::Reconcile && !failpoints::is_alone() {
                    start_reconcile();
                }
                // SAFETY: ends the child at once, without the parent's exit handlers and buffers.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                Ok(Worker { pid: child, commands: commands.into(), answers: answers.into() })
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// # Errors
    /// What the kernel or a program said; [`ActError::Stuck`] when `limit` passed first: then this worker must be given
    /// up by [`Worker::abandon`]; [`ActError::Died`]: then it must be taken away by [`Worker::dismiss`].
    pub fn ask(&mut self, request: &Request, limit: Duration) -> Result<Vec<u8>, ActError> {
        trace::timed(|| request.to_string(), || self.ask_and_wait(request, limit))
    }

    fn ask_and_wait(&mut self, request: &Request, limit: Duration) -> Result<Vec<u8>, ActError> {
        let died = |_| ActError::Died { pid: self.pid.as_raw() };
        write_block(&mut self.commands, &encode(request)).map_err(died)?;
        if !readable(&self.answers, limit) {
            return Err(ActError::Stuck { pid: self.pid() });
        }
        let answer = read_block(&mut self.answers).map_err(died)?;
        let (errno, words) = answer.split_first_chunk().ok_or(ActError::Died { pid: self.pid.as_raw() })?;
        match i32::from_ne_bytes(*errno) {
            0 => Ok(words.to_vec()),
            IN_WORDS => Err(ActError::Program(String::from_utf8_lossy(words).into_owned())),
            errno => Err(ActError::Os(io::Error::from_raw_os_error(errno))),
        }
    }

    /// The orderly end: there is nothing to put right.
    pub fn dismiss(mut self) {
        // An empty block says goodbye. It has ended already when nobody is there to read it.
        let _ = write_block(&mut self.commands, &[]);
        let _ = waitpid(self.pid, None);
    }

    /// It is stuck: it stays behind with its call. Closing the pipes tells it so, once the call has come back.
    pub fn abandon(self) {}

    /// Ends it wherever it is, unless not even that can be.
    pub fn kill(self) {
        let _ = signal::kill(self.pid, Signal::SIGKILL);
    }
}

/// True when the parent said goodbye.
fn serve(mut commands: File, mut answers: File, work: impl Fn(&Request) -> Result<Vec<u8>, ActError>) -> bool {
    loop {
        let Ok(block) = read_block(&mut commands) else { return false };
        if block.is_empty() {
            return true;
        }
        let Some(request) = decode(&block) else { return false };
        let (errno, words) = match work(&request) {
            Ok(bytes) => (0, bytes),
            Err(ActError::Os(error)) => (error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
            Err(error) => (IN_WORDS, error.to_string().into_bytes()),
        };
        let mut answer = errno.to_ne_bytes().to_vec();
        answer.extend_from_slice(&words);
        if write_block(&mut answers, &answer).is_err() {
            return false;
        }
    }
}

fn start_reconcile() {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["reconcile", "--unfinished"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    failpoints::forget(&mut command);
    program::with_signals(&mut command);
    let _ = command.spawn();
}

/// New session, nothing on 0 to 2, every other descriptor but those in `keep` closed. No signal interrupts it: the nvidia
/// driver's remove, which waits for the GPU's users, would end no sooner and spin meanwhile. It ends with its parent all
/// the same, and a program that it runs has signals again.
pub(super) fn leave_parent_behind(keep: &[i32]) {
    let _ = SigSet::all().thread_block();
    let _ = setsid();
    let _ = std::env::set_current_dir("/");
    terminate::ignore_no_more();
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    let mut from = 3;
    let mut kept: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    sorted::sort(&mut kept);
    // SAFETY: the descriptors closed here belong to values that the child never touches again.
    unsafe {
        for fd in kept {
            if fd > from {
                libc::close_range(from, fd - 1, 0);
            }
            from = from.max(fd + 1);
        }
        libc::close_range(from, libc::c_uint::MAX, 0);
    }
}

/// A kind and its two texts, apart by a NUL, which no path and no attribute's value contains.
pub fn encode(request: &Request) -> Vec<u8> {
    let (kind, first, second) = match request {
        Request::Act(Action::Write { path, data }) => (b'W', path.as_str(), data.as_str()),
        Request::Act(Action::Load { modules }) => (b'L', "", &*modules.join("\0")),
        Request::Act(Action::Unload { module }) => (b'U', "", module.as_str()),
        Request::Act(Action::MakeNode(node)) => (b'N', "", &*node.to_text()),
        Request::Act(Action::Pin { pid, thread, cpus }) => (b'P', &*format!("{pid} {thread}"), &*numbers(cpus)),
        Request::Read(path) => (b'R', path.as_str(), ""),
        Request::ReadHead(path, length) => (b'H', path.as_str(), &*length.to_string()),
        Request::TryOpen(path) => (b'O', path.as_str(), ""),
        Request::Weigh(node, counter) => (b'G', node.as_str(), counter.as_str()),
        Request::TryClaim(path) => (b'C', path.as_str(), ""),
        Request::Inside(pid, path) => (b'I', path.as_str(), &*pid.to_string()),
        Request::LinkInside(pid, path) => (b'J', path.as_str(), &*pid.to_string()),
    };
    [&[kind], first.as_bytes(), &[0], second.as_bytes()].concat()
}

/// None for what [`encode`] never writes.
pub fn decode(block: &[u8]) -> Option<Request> {
    let (kind, texts) = block.split_first()?;
    let (first, second) = std::str::from_utf8(texts).ok()?.split_once('\0')?;
    let (first, second) = (first.to_string(), second.to_string());
    Some(match kind {
        b'W' => Request::Act(Action::Write { path: first, data: second }),
        b'L' => Request::Act(Action::Load { modules: second.split('\0').map(str::to_string).collect() }),
        b'U' => Request::Act(Action::Unload { module: second }),
        b'N' => Request::Act(Action::MakeNode(Node::from_text(&second)?)),
        b'P' => {
            let (pid, thread) = first.split_once(' ')?;
            let cpus = second.split_whitespace().map(|cpu| cpu.parse().ok()).collect::<Option<_>>()?;
            Request::Act(Action::Pin { pid: pid.parse().ok()?, thread: thread.parse().ok()?, cpus })
        }
        b'R' => Request::Read(first),
        b'H' => Request::ReadHead(first, second.parse().ok().filter(|length| *length <= MOST_OF_HEAD)?),
        b'O' => Request::TryOpen(first),
        b'G' => Request::Weigh(first, second),
        b'C' => Request::TryClaim(first),
        b'I' => Request::Inside(second.parse().ok()?, first),
        b'J' => Request::LinkInside(second.parse().ok()?, first),
        _ => return None,
    })
}

fn numbers(cpus: &[u32]) -> String {
    cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

pub(super) fn write_block(to: &mut File, block: &[u8]) -> io::Result<()> {
    let length = u32::try_from(block.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    to.write_all(&[&length.to_ne_bytes(), block].concat())
}

pub(super) fn read_block(from: &mut File) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut block = vec![0; u32::from_ne_bytes(length) as usize];
    from.read_exact(&mut block)?;
    Ok(block)
}

pub(super) fn readable(file: &File, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        // Rounded up: a remainder below a millisecond would otherwise spin.
        let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= end => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(data: &str) -> Request {
        Request::Act(Action::Write { path: "/attribute".to_string(), data: data.to_string() })
    }

    /// Does what the action's data says.
    fn obey(_: &Path, request: &Request) -> Result<Vec<u8>, ActError> {
        let Request::Act(Action::Write { data, .. }) = request else { return Ok(b"read".to_vec()) };
        match data.as_str() {
            "sleep" => std::thread::sleep(Duration::from_secs(2)),
            "descriptors" => {
                // Standard streams, two pipes and the directory being read.
                let open = std::fs::read_dir("/proc/self/fd").map_err(ActError::Os)?.count();
                return if open == 6 { Ok(Vec::new()) } else { Err(ActError::Program(format!("{open} descriptors"))) };
            }
            "signals" => {
                // SIGHUP, SIGINT and SIGTERM are among them.
                let own = std::fs::read_to_string("/proc/self/status").map_err(ActError::Os)?;
                let program = program::run(Path::new("/bin/cat"), &["/proc/self/status"], None)?;
                let blocked = |status: &str| {
                    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap_or_default();
                    u64::from_str_radix(mask.trim(), 16).unwrap_or_default() & 0x4003
                };
                let (own, program) = (blocked(&own), blocked(&program));
                if (own, program) != (0x4003, 0) {
                    return Err(ActError::Program(format!("{own:x} blocked, in a program {program:x}")));
                }
            }
            "ENODEV" => return Err(ActError::Os(io::Error::from_raw_os_error(libc::ENODEV))),
            "words" => return Err(ActError::Program("the reason".to_string())),
            "die" => std::process::abort(),
            _ => {}
        }
        Ok(Vec::new())
    }

    fn worker() -> Worker {
        Worker::start(Path::new("/"), obey, LastAct::Nothing).unwrap()
    }

    #[test]
    fn one_worker_does_one_action_after_the_other_and_reports() {
        let mut worker = worker();
        let limit = Duration::from_secs(20);
        assert!(worker.ask(&write(""), limit).is_ok());
        assert_eq!(worker.ask(&write("ENODEV"), limit).unwrap_err().errno(), Some(libc::ENODEV));
        assert_eq!(worker.ask(&write("words"), limit).unwrap_err().to_string(), "the reason");
        assert_eq!(worker.ask(&Request::Read("/x".to_string()), limit).unwrap(), b"read");
        let pid = worker.pid();
        assert!(matches!(worker.ask(&write("die"), limit), Err(ActError::Died { pid: died }) if died == pid));
        worker.dismiss();
    }

    #[test]
    fn a_worker_holds_none_of_the_parents_descriptors() {
        let (_reader, _writer) = pipe2(OFlag::empty()).unwrap();
        let mut worker = worker();
        let answer = worker.ask(&write("descriptors"), Duration::from_secs(20));
        assert!(answer.is_ok(), "{answer:?}");
        worker.dismiss();
    }

    #[test]
    fn no_signal_interrupts_a_worker_and_its_programs_have_theirs() {
        let mut worker = worker();
        let answer = worker.ask(&write("signals"), Duration::from_secs(20));
        assert!(answer.is_ok(), "{answer:?}");
        worker.dismiss();
    }

    /// Whoever ends the caller's session or process group does not end the worker with it.
    #[test]
    fn a_worker_has_a_session_of_its_own() {
        let mut worker = worker();
        assert!(worker.ask(&write(""), Duration::from_secs(20)).is_ok());
        assert_eq!(nix::unistd::getsid(Some(worker.pid)).ok(), Some(worker.pid));
        assert_ne!(nix::unistd::getsid(None).ok(), Some(worker.pid));
        worker.dismiss();
    }

    #[test]
    fn a_worker_that_takes_too_long_is_said_to_be_stuck() {
        let mut worker = worker();
        let begin = Instant::now();
        let answer = worker.ask(&write("sleep"), Duration::from_millis(50));
        assert!(matches!(answer, Err(ActError::Stuck { pid }) if pid == worker.pid()), "{answer:?}");
        assert!(begin.elapsed() < Duration::from_secs(1));
        worker.abandon();
    }

    #[test]
    fn requests_survive_the_pipe() {
        let node = Node {
            path: "/dev/nvidia0".to_string(),
            number: crate::sys::DeviceNumber { major: 195, minor: 0 },
            mode: 0o666,
            uid: 0,
            gid: 44,
        };
        for request in [
            write("\n"),
            Request::Act(Action::Load { modules: vec!["nvidia".to_string(), "nvidia_uvm".to_string()] }),
            Request::Act(Action::Unload { module: "nvidia".to_string() }),
            Request::Act(Action::MakeNode(node)),
            Request::Act(Action::Pin { pid: 812, thread: 814, cpus: vec![2, 10] }),
            Request::Read("/sys/x".to_string()),
            Request::ReadHead("/sys/config".to_string(), 4),
            Request::TryOpen("/dev/vfio/5".to_string()),
            Request::TryClaim("/dev/sdb".to_string()),
            Request::Weigh("/dev/nvidiactl".to_string(), "/sys/module/nvidia/refcnt".to_string()),
            Request::Inside(812, "/dev/nvidia0".to_string()),
            Request::LinkInside(812, "/usr/lib/libcuda.so.1".to_string()),
        ] {
            assert_eq!(decode(&encode(&request)), Some(request));
        }
        assert_eq!(decode(b"X\0"), None);
    }
}
