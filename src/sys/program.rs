//! Programs of the host that do what is theirs to do: modprobe, systemctl, systemd-run.

use super::action::ActError;
use super::trace;
use crate::decimal::seconds;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;
use std::io::{self, PipeReader, Read, pipe};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// How often a program is asked whether it has ended, where the kernel does not tell.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// No program writes more than this that anybody here wants to know.
const KEPT: usize = 64 * 1024;

/// A program that was started and goes on by itself, also when this is dropped.
pub struct Running {
    path: PathBuf,
    child: Child,
    output: Output<ChildStdout>,
    complaint: Output<ChildStderr>,
}

/// Runs a program and waits for it, however long it takes or at most for `limit`; its standard output.
///
/// # Errors
/// What its standard error gives as the reason when it failed.
pub fn run(path: &Path, arguments: &[&str], limit: Option<Duration>) -> Result<String, ActError> {
    start(path, arguments)?.finish(limit)
}

fn command(path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .process_group(0);
    with_signals(&mut command);
    command
}

/// Why it did not take the place of this one.
pub fn make_way_for(path: &Path, arguments: &[String], mark: &str) -> io::Error {
    let mut command = Command::new(path);
    command.args(arguments).env(mark, "1");
    with_signals(&mut command);
    command.exec()
}

/// std hands the caller's signal mask on, and the worker has all blocked: modprobe could not be ended.
pub(super) fn with_signals(command: &mut Command) {
    // SAFETY: between fork and exec only one system call is made.
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
}

/// # Errors
/// When it could not be started.
pub fn start(path: &Path, arguments: &[&str]) -> Result<Running, ActError> {
    let mut command = command(path, arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = trace::timed(|| format!("start {} {}", path.display(), arguments.join(" ")), || command.spawn())
        .map_err(|error| ActError::Program(format!("{}: {error}", path.display())))?;
    let (output, complaint) = (Output::of(child.stdout.take()), Output::of(child.stderr.take()));
    Ok(Running { path: path.to_path_buf(), child, output, complaint })
}

impl Running {
    /// Its standard output once it has ended; None while it is still at it.
    ///
    /// # Errors
    /// As [`run`].
    pub fn outcome(&mut self) -> Result<Option<String>, ActError> {
        let path = self.path.display();
        let status = self.child.try_wait().map_err(|error| ActError::Program(format!("{path}: {error}")))?;
        // After asking, so that all it wrote is there once it has ended; and meanwhile, or a full pipe stops it.
        self.output.read();
        self.complaint.read();
        let Some(status) = status else { return Ok(None) };
        if status.success() {
            return Ok(Some(self.output.text()));
        }
        let reason = reason(&self.complaint.text());
        Err(ActError::Program(reason.unwrap_or_else(|| format!("{path} ended with {status}"))))
    }

    /// Waits for its end, however long it takes or at most for `limit`.
    ///
    /// # Errors
    /// As [`run`].
    pub fn finish(self, limit: Option<Duration>) -> Result<String, ActError> {
        let path = self.path.clone();
        trace::timed(|| format!("wait for {}", path.display()), || self.wait_for_end(limit))
    }

    fn wait_for_end(mut self, limit: Option<Duration>) -> Result<String, ActError> {
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            if let Some(output) = self.outcome()? {
                return Ok(output);
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                // It and what it started, without waiting for a call that may never come back.
                let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
                let limit = seconds(limit.unwrap_or_default());
                return Err(ActError::Program(format!("{} did not end within {limit} s", self.path.display())));
            }
            self.wait(end);
        }
    }

    /// Until it says something or ends, or the time is up.
    fn wait(&self, end: Option<Instant>) {
        let left = end.map_or(LONGEST_WAIT, |end| end.saturating_duration_since(Instant::now()).min(LONGEST_WAIT));
        let Ok(process) = pidfd(self.child.id() as i32) else { return std::thread::sleep(LOOK_AGAIN) };
        let pipes = [self.output.pipe.as_ref().map(AsFd::as_fd), self.complaint.pipe.as_ref().map(AsFd::as_fd)];
        let all = pipes.into_iter().flatten().chain([process.as_fd()]);
        let mut all: Vec<PollFd> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // Rounded up: a remainder below a millisecond would otherwise spin.
        let _ = poll(&mut all, PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX));
    }
}

/// The line that says why a program failed: the first, for what comes after it tends to follow from it. Not what announces
/// that it waits for something, nor how Proxmox's tools begin: with each try to reach the cluster's file system, or with
/// the number of an error whose text is in the next line.
fn reason(complaint: &str) -> Option<String> {
    let lines = complaint.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut telling = lines.clone().filter(|line| {
        let is_number_only = line.starts_with("400 ") && line.ends_with("failed.");
        !line.ends_with("...") && !line.starts_with("ipcc_send_rec[") && !is_number_only
    });
    telling.next().or_else(|| lines.clone().next()).map(str::to_string)
}

/// A descriptor of a process that stays the same should its number be given to another.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and gives a descriptor that nobody else has.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Waits until a process has ended: true when it has. A signal ends the waiting, too.
pub fn wait_for(pidfd: &OwnedFd, limit: Duration) -> bool {
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    // Rounded up, as above.
    let limit = PollTimeout::try_from(limit + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
    trace::timed(|| "wait for a process to end".to_string(), || matches!(poll(&mut ended, limit), Ok(1..)))
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    Well,
    Badly {
        /// None when a signal ended it.
        code: Option<i32>,
        how: String,
    },
}

/// A program that takes long and tells meanwhile how it gets on: whoever started it asks now and then.
pub struct Talking {
    child: Child,
    said: PipeReader,
}

impl Talking {
    /// Both of its streams go through one pipe, so that what it says stays in order.
    ///
    /// # Errors
    /// When it could not be started.
    pub(super) fn start(path: &Path, arguments: &[&str]) -> Result<Talking, ActError> {
        let problem = |error| ActError::Program(format!("{}: {error}", path.display()));
        let (said, output) = pipe().map_err(problem)?;
        fcntl(said.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| problem(errno.into()))?;
        let mut command = command(path, arguments);
        command.stdout(output.try_clone().map_err(problem)?).stderr(output);
        let child = command.spawn().map_err(problem)?;
        Ok(Talking { child, said })
    }

    /// How it ended; None while it is still at it. To be asked before [`Talking::said`], so that all it wrote is there once
    /// it has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) if status.success() => Some(Ended::Well),
            Ok(Some(status)) => Some(Ended::Badly { code: status.code(), how: format!("ended with {status}") }),
            Err(error) => Some(Ended::Badly { code: None, how: error.to_string() }),
        }
    }

    /// What it said since the last time.
    pub fn said(&mut self) -> Vec<u8> {
        let (mut said, mut block) = (Vec::new(), [0; 4096]);
        // Not for ever, should it write without end.
        while said.len() < KEPT {
            let Ok(length @ 1..) = self.said.read(&mut block) else { break };
            said.extend(block.iter().take(length));
        }
        said
    }

    /// Ends it and what it started: by asking first, and after `patience` by force.
    pub fn end(mut self, patience: Duration) {
        let group = Pid::from_raw(self.child.id() as i32);
        let _ = killpg(group, Signal::SIGTERM);
        let end = Instant::now() + patience;
        while self.ended().is_none() && Instant::now() < end {
            self.said();
            std::thread::sleep(LOOK_AGAIN);
        }
        // What it started may be there yet.
        let _ = killpg(group, Signal::SIGKILL);
    }
}

/// What has come through a pipe so far. Not to its end: something that the program started may keep it open.
struct Output<T> {
    pipe: Option<T>,
    said: Vec<u8>,
}

impl<T: Read + AsFd> Output<T> {
    fn of(pipe: Option<T>) -> Output<T> {
        if let Some(pipe) = &pipe {
            let _ = fcntl(pipe.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        }
        Output { pipe, said: Vec::new() }
    }

    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut block = [0; 4096];
        // Not for ever, should it write without end.
        for _ in 0..2 * KEPT / block.len() {
            let length = match pipe.read(&mut block) {
                Ok(0) => return self.pipe = None,
                Ok(length) => length,
                Err(_) => return,
            };
            let room = KEPT.saturating_sub(self.said.len());
            self.said.extend(block.iter().take(length.min(room)));
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Option<Duration>) -> Result<String, String> {
        run(Path::new("/bin/sh"), &["-c", script], limit).map_err(|error| error.to_string())
    }

    #[test]
    fn what_it_says_and_why_it_failed() {
        assert_eq!(sh("echo one; echo two", None).as_deref(), Ok("one\ntwo\n"));
        assert_eq!(sh("echo the reason >&2; echo what follows >&2; exit 3", None), Err("the reason".to_string()));
        assert_eq!(
            sh("echo waiting...; echo 'trying to acquire lock...' >&2; echo '' >&2; echo no >&2; exit 4", None),
            Err("no".to_string())
        );
        assert_eq!(sh("exit 3", None), Err("/bin/sh ended with exit status: 3".to_string()));
        assert!(run(Path::new("/nowhere"), &[], None).is_err());
    }

    #[test]
    fn the_line_that_matters() {
        for (complaint, line) in [
            ("trying to acquire lock...\ncan't lock file '/x' - got timeout\n", "can't lock file '/x' - got timeout"),
            (
                "400 Parameter verification failed.\nhookscript: script 'a' does not exist\nqm set <vmid> [OPTIONS]\n",
                "hookscript: script 'a' does not exist",
            ),
            (
                "ipcc_send_rec[1] failed: Connection refused\nUnable to load access control list: Connection refused\n",
                "Unable to load access control list: Connection refused",
            ),
            ("400 not enough arguments\n", "400 not enough arguments"),
            ("\ntrying to acquire lock...\n", "trying to acquire lock..."),
        ] {
            assert_eq!(reason(complaint).as_deref(), Some(line));
        }
        assert_eq!(reason(" \n"), None);
    }

    /// Nor does it listen to the caller's environment: what root has there is not for it.
    #[test]
    fn it_gets_an_environment_of_our_own() {
        let said = sh("env | sort", None).unwrap();
        let names: Vec<&str> = said.lines().filter_map(|line| line.split('=').next()).collect();
        assert!(names.iter().all(|name| ["LC_ALL", "PATH", "PWD", "SHLVL", "_"].contains(name)), "{said}");
        assert!(said.contains("PATH=/usr/sbin:/usr/bin:/sbin:/bin\n") && said.contains("LC_ALL=C\n"), "{said}");
    }

    /// More than a pipe holds.
    #[test]
    fn one_that_says_very_much_is_not_stopped_by_that() {
        for limit in [None, Some(Duration::from_secs(20))] {
            let said = sh("head -c 1000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero >&2", limit);
            assert_eq!(said.map(|text| text.len()), Ok(KEPT));
        }
        assert!(sh("exec yes", Some(Duration::from_millis(200))).is_err());
    }

    fn talking(script: &str) -> Talking {
        Talking::start(Path::new("/bin/sh"), &["-c", script]).unwrap()
    }

    #[test]
    fn one_that_talks_is_heard_in_order_and_to_its_end() {
        let mut program = talking("echo one; echo two >&2; echo three; head -c 300000 /dev/zero; exit 3");
        let mut said = Vec::new();
        let words = loop {
            let ended = program.ended();
            said.append(&mut program.said());
            if let Some(words) = ended {
                break words;
            }
        };
        loop {
            let mut more = program.said();
            if more.is_empty() {
                break;
            }
            said.append(&mut more);
        }
        assert_eq!(words, Ended::Badly { code: Some(3), how: "ended with exit status: 3".to_string() });
        assert!(said.starts_with(b"one\ntwo\nthree\n"));
        assert_eq!(said.len(), 14 + 300_000);
    }

    #[test]
    fn one_that_talks_is_asked_to_end_and_then_made_to() {
        let begin = Instant::now();
        let mut polite = talking("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done");
        while polite.said().is_empty() {}
        polite.end(Duration::from_secs(20));
        let mut deaf = talking("trap '' TERM; echo ready; while :; do sleep 0.05; done");
        while deaf.said().is_empty() {}
        deaf.end(Duration::from_millis(100));
        assert!(begin.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn one_that_takes_too_long_is_ended_with_what_it_started() {
        let begin = Instant::now();
        let limit = Some(Duration::from_millis(200));
        assert_eq!(sh("sleep 60 & wait", limit), Err("/bin/sh did not end within 0.2 s".to_string()));
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert_eq!(sh("sleep 60 & echo done", Some(Duration::from_secs(20))).as_deref(), Ok("done\n"));
    }
}
