//! Work that may never come back is done by a child that can be given up: the worker.
//!
//! It is forked before the first change and does one action after the other. What it must not keep is left behind at
//! once: a `flock` and the write end of a pipe survive `fork`, so an abandoned worker that kept them would hold
//! Proxmox's task log and every later handoff.
//!
//! A worker whose parent goes without saying goodbye (killed, or it gave the worker up) starts `gpu-handoff reconcile`
//! as its last act, so that a handoff cut short and a call that came back late are put right by themselves.

use super::{ActError, Action, failpoints};
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The errno that stands for a program's own words.
const IN_WORDS: i32 = -1;

/// Carries out an action; in the worker, so that it may block.
pub type Work = fn(root: &Path, action: &Action) -> Result<(), ActError>;

pub struct Worker {
    pid: Pid,
    commands: File,
    answers: File,
}

impl Worker {
    /// # Errors
    /// When there is no process or no pipe to be had.
    pub fn start(root: &Path, work: Work) -> io::Result<Worker> {
        // Close-on-exec: a program that the worker runs must not keep the pipes open after it.
        let (commands_in, commands) = pipe2(OFlag::O_CLOEXEC)?;
        let (answers, answers_out) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: this program has one thread, so the child may do all that the parent could.
        match unsafe { fork() }? {
            ForkResult::Child => {
                leave_parent_behind(&[commands_in.as_raw_fd(), answers_out.as_raw_fd()]);
                let orderly = serve(commands_in.into(), answers_out.into(), |action| work(root, action));
                if !orderly && !failpoints::is_alone() {
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
    /// What the kernel or a program said, or [`ActError::Stuck`] when `limit` passed first: then this worker must be
    /// given up by [`Worker::abandon`].
    pub fn act(&mut self, action: &Action, limit: Duration) -> Result<(), ActError> {
        write_block(&mut self.commands, &encode(action)).map_err(ActError::Os)?;
        if !readable(&self.answers, limit) {
            return Err(ActError::Stuck { pid: self.pid() });
        }
        let died = |_| ActError::Program(format!("PID {}, which did it, died", self.pid));
        let answer = read_block(&mut self.answers).map_err(died)?;
        let (errno, words) = answer.split_at_checked(4).ok_or_else(|| died(io::ErrorKind::InvalidData.into()))?;
        match i32::from_ne_bytes([errno[0], errno[1], errno[2], errno[3]]) {
            0 => Ok(()),
            IN_WORDS => Err(ActError::Program(String::from_utf8_lossy(words).into_owned())),
            errno => Err(ActError::Os(io::Error::from_raw_os_error(errno))),
        }
    }

    /// The orderly end: there is nothing to put right.
    pub fn dismiss(mut self) {
        // An empty block says goodbye.
        if write_block(&mut self.commands, &[]).is_ok() {
            let _ = waitpid(self.pid, None);
        }
    }

    /// It is stuck: it stays behind with its call. Closing the pipes tells it so, once the call has come back.
    pub fn abandon(self) {}
}

/// True when the parent said goodbye.
fn serve(mut commands: File, mut answers: File, work: impl Fn(&Action) -> Result<(), ActError>) -> bool {
    loop {
        let Ok(block) = read_block(&mut commands) else { return false };
        if block.is_empty() {
            return true;
        }
        let Some(action) = decode(&block) else { return false };
        let (errno, words) = match work(&action) {
            Ok(()) => (0, String::new()),
            Err(ActError::Os(error)) => (error.raw_os_error().unwrap_or(libc::EIO), String::new()),
            Err(error) => (IN_WORDS, error.to_string()),
        };
        let mut answer = errno.to_ne_bytes().to_vec();
        answer.extend_from_slice(words.as_bytes());
        if write_block(&mut answers, &answer).is_err() {
            return false;
        }
    }
}

fn start_reconcile() {
    let _ = Command::new("/proc/self/exe")
        .arg("reconcile")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
}

/// Runs a program and waits for it, however long it takes.
///
/// # Errors
/// The first line of its standard error when it failed: what comes after it tends to follow from it.
pub fn program(path: &Path, arguments: &[&str]) -> Result<(), ActError> {
    let output = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| ActError::Program(format!("{}: {error}", path.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty());
    Err(ActError::Program(match first {
        Some(line) => line.trim().to_string(),
        None => format!("{} ended with {}", path.display(), output.status),
    }))
}

/// New session, nothing on 0 to 2, every other descriptor but those in `keep` closed.
fn leave_parent_behind(keep: &[i32]) {
    let _ = setsid();
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    let mut from = 3;
    let mut kept: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.sort_unstable();
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
pub fn encode(action: &Action) -> Vec<u8> {
    let (kind, first, second) = match action {
        Action::Write { path, data } => (b'W', path.as_str(), data.as_str()),
        Action::Load { modules } => (b'L', "", &*modules.join("\0")),
        Action::Unload { module } => (b'U', "", module.as_str()),
        Action::MakeNode(node) => (b'N', "", &*node.to_text()),
    };
    [&[kind], first.as_bytes(), &[0], second.as_bytes()].concat()
}

/// None for what [`encode`] never writes.
pub fn decode(block: &[u8]) -> Option<Action> {
    let (kind, texts) = block.split_first()?;
    let (first, second) = std::str::from_utf8(texts).ok()?.split_once('\0')?;
    Some(match kind {
        b'W' => Action::Write { path: first.to_string(), data: second.to_string() },
        b'L' => Action::Load { modules: second.split('\0').map(str::to_string).collect() },
        b'U' => Action::Unload { module: second.to_string() },
        b'N' => Action::MakeNode(super::Node::from_text(second)?),
        _ => return None,
    })
}

fn write_block(to: &mut File, block: &[u8]) -> io::Result<()> {
    let length = u32::try_from(block.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    to.write_all(&[&length.to_ne_bytes(), block].concat())
}

fn read_block(from: &mut File) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut block = vec![0; u32::from_ne_bytes(length) as usize];
    from.read_exact(&mut block)?;
    Ok(block)
}

fn readable(file: &File, limit: Duration) -> bool {
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

    fn write(data: &str) -> Action {
        Action::Write { path: "/attribute".to_string(), data: data.to_string() }
    }

    /// Does what the action's data says.
    fn obey(_: &Path, action: &Action) -> Result<(), ActError> {
        let Action::Write { data, .. } = action else { return Ok(()) };
        match data.as_str() {
            "sleep" => std::thread::sleep(Duration::from_secs(2)),
            "descriptors" => {
                // Standard streams, two pipes and the directory being read.
                let open = std::fs::read_dir("/proc/self/fd").map_err(ActError::Os)?.count();
                return if open == 6 { Ok(()) } else { Err(ActError::Program(format!("{open} descriptors"))) };
            }
            "ENODEV" => return Err(ActError::Os(io::Error::from_raw_os_error(libc::ENODEV))),
            "words" => {
                return program(Path::new("/bin/sh"), &["-c", "echo the reason >&2; echo what follows >&2; exit 3"]);
            }
            "fine" => return program(Path::new("/bin/sh"), &["-c", "exit 0"]),
            _ => {}
        }
        Ok(())
    }

    fn worker() -> Worker {
        Worker::start(Path::new("/"), obey).unwrap()
    }

    #[test]
    fn one_worker_does_one_action_after_the_other_and_reports() {
        let mut worker = worker();
        let limit = Duration::from_secs(20);
        assert!(worker.act(&write(""), limit).is_ok());
        assert_eq!(worker.act(&write("ENODEV"), limit).unwrap_err().errno(), Some(libc::ENODEV));
        assert_eq!(worker.act(&write("words"), limit).unwrap_err().to_string(), "the reason");
        assert!(worker.act(&write("fine"), limit).is_ok());
        worker.dismiss();
    }

    #[test]
    fn a_worker_holds_none_of_the_parents_descriptors() {
        let (_reader, _writer) = pipe2(OFlag::empty()).unwrap();
        let mut worker = worker();
        let answer = worker.act(&write("descriptors"), Duration::from_secs(20));
        assert!(answer.is_ok(), "{answer:?}");
        worker.dismiss();
    }

    #[test]
    fn a_worker_that_takes_too_long_is_said_to_be_stuck() {
        let mut worker = worker();
        let begin = Instant::now();
        let answer = worker.act(&write("sleep"), Duration::from_millis(50));
        assert!(matches!(answer, Err(ActError::Stuck { pid }) if pid == worker.pid()), "{answer:?}");
        assert!(begin.elapsed() < Duration::from_secs(1));
        // Not abandoned here: what it would start as its last act is this test program.
        std::thread::sleep(Duration::from_secs(2));
        worker.dismiss();
    }

    #[test]
    fn actions_survive_the_pipe() {
        let node = super::super::Node {
            path: "/dev/nvidia0".to_string(),
            number: super::super::DeviceNumber { major: 195, minor: 0 },
            mode: 0o666,
            uid: 0,
            gid: 44,
        };
        for action in [
            write("\n"),
            Action::Load { modules: vec!["nvidia".to_string(), "nvidia_uvm".to_string()] },
            Action::Unload { module: "nvidia".to_string() },
            Action::MakeNode(node),
        ] {
            assert_eq!(decode(&encode(&action)), Some(action));
        }
        assert_eq!(decode(b"X\0"), None);
    }
}
