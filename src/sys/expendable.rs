//! Work that may never come back is done by a child that can be given up.
//!
//! Before its blocking call the child leaves everything behind that its parent's death or exit should release: a
//! `flock` and the write end of a pipe survive `fork`, so an abandoned child that kept them would hold Proxmox's task
//! log and every later handoff.

use super::ActError;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, setsid};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a child that was sent SIGKILL may take before it counts as stuck.
const KILL_GRACE: Duration = Duration::from_millis(200);

/// Runs `work` in a child, for at most `limit`.
///
/// # Errors
/// What `work` returned, or [`ActError::TimedOut`] or [`ActError::Stuck`] when `limit` passed first.
pub fn in_child(limit: Duration, work: impl FnOnce() -> io::Result<()>) -> Result<(), ActError> {
    let (result, report) = pipe().map_err(os)?;
    // SAFETY: this program has one thread, so the child may do all that the parent could.
    match unsafe { fork() }.map_err(os)? {
        ForkResult::Child => {
            leave_parent_behind(report.as_raw_fd());
            let errno = match work() {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            let _ = nix::unistd::write(&report, &errno.to_ne_bytes());
            // SAFETY: ends the child at once, without the parent's exit handlers and buffers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(report);
            let answer = wait_for_report(&result, limit);
            match answer {
                Some(errno) => {
                    let _ = waitpid(child, None);
                    match errno {
                        Some(0) => Ok(()),
                        Some(errno) => Err(ActError::Os(io::Error::from_raw_os_error(errno))),
                        None => Err(ActError::Program("the child that did it died".to_string())),
                    }
                }
                None => Err(give_up(child)),
            }
        }
    }
}

/// Runs a program with nothing of ours but its arguments, for at most `limit`.
///
/// # Errors
/// The last line of the program's standard error when it failed, or that it took too long.
pub fn program(path: &std::path::Path, arguments: &[&str], limit: Duration) -> Result<(), ActError> {
    use std::os::unix::process::CommandExt;
    let end = Instant::now() + limit;
    let mut command = Command::new(path);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C");
    // SAFETY: setsid is async-signal-safe.
    unsafe { command.pre_exec(|| setsid().map(|_| ()).map_err(io::Error::from)) };
    let mut child = command.spawn().map_err(|e| ActError::Program(format!("{}: {e}", path.display())))?;
    let Some(stderr) = child.stderr.take() else { return Err(ActError::Os(io::Error::other("no standard error"))) };
    let mut said = Vec::new();
    let mut open = true;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // A grandchild may keep the pipe open after the program ended, so its end alone is not waited for.
        let nap = left.min(Duration::from_millis(if open { 20 } else { 2 }));
        if open && readable(&stderr, nap) {
            let mut block = [0; 4096];
            match read(&stderr, &mut block) {
                Ok(0) | Err(_) => open = false,
                Ok(n) => {
                    said.extend_from_slice(&block[..n]);
                    continue;
                }
            }
        } else if !open {
            std::thread::sleep(nap);
        }
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                let said = String::from_utf8_lossy(&said);
                let last = said.lines().rev().find(|line| !line.trim().is_empty());
                return Err(ActError::Program(match last {
                    Some(line) => line.trim().to_string(),
                    None => format!("{} ended with {status}", path.display()),
                }));
            }
            Ok(None) if left.is_zero() => return Err(give_up(Pid::from_raw(child.id() as i32))),
            Ok(None) => {}
            Err(error) => return Err(ActError::Os(error)),
        }
    }
}

/// New session, nothing on 0 to 2, every other descriptor but `keep` closed.
fn leave_parent_behind(keep: i32) {
    let _ = setsid();
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    let keep = keep as libc::c_uint;
    // SAFETY: the descriptors closed here belong to values that the child never touches again.
    unsafe {
        if keep > 3 {
            libc::close_range(3, keep - 1, 0);
        }
        libc::close_range(keep + 1, libc::c_uint::MAX, 0);
    }
}

/// `None`: nothing came within `limit`. `Some(None)`: the child ended without a word.
fn wait_for_report(result: &OwnedFd, limit: Duration) -> Option<Option<i32>> {
    if !readable(result, limit) {
        return None;
    }
    let mut errno = [0; 4];
    Some(match read(result, &mut errno) {
        Ok(4) => Some(i32::from_ne_bytes(errno)),
        _ => None,
    })
}

fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        // Rounded up: a remainder below a millisecond would otherwise spin.
        let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= end => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

/// SIGKILL ends a child that waits where it can be interrupted; one that stays is stuck in the kernel.
fn give_up(child: Pid) -> ActError {
    let _ = kill(child, Signal::SIGKILL);
    let end = Instant::now() + KILL_GRACE;
    while Instant::now() < end {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
            _ => return ActError::TimedOut,
        }
    }
    ActError::Stuck { pid: child.as_raw() }
}

fn os(errno: nix::errno::Errno) -> ActError {
    ActError::Os(errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_reports_what_the_kernel_said() {
        assert!(in_child(Duration::from_secs(5), || Ok(())).is_ok());
        let error = in_child(Duration::from_secs(5), || Err(io::Error::from_raw_os_error(libc::ENODEV)));
        assert_eq!(error.unwrap_err().errno(), Some(libc::ENODEV));
    }

    #[test]
    fn a_child_that_takes_too_long_is_given_up() {
        let begin = Instant::now();
        let error = in_child(Duration::from_millis(50), || {
            std::thread::sleep(Duration::from_secs(30));
            Ok(())
        });
        assert!(matches!(error, Err(ActError::TimedOut)), "{error:?}");
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_child_holds_none_of_the_parents_descriptors() {
        let (reader, writer) = pipe().unwrap();
        let error = in_child(Duration::from_millis(50), move || {
            std::fs::read_dir("/proc/self/fd")?.count();
            // Standard streams, the report pipe and the directory being read: nothing else may be open.
            let open = std::fs::read_dir("/proc/self/fd")?.count();
            if open > 5 { Err(io::Error::from_raw_os_error(libc::EMFILE)) } else { Ok(()) }
        });
        assert!(error.is_ok(), "{error:?}");
        drop(reader);
        drop(writer);
    }

    #[test]
    fn a_program_is_quoted_when_it_fails_and_ended_when_it_stays() {
        let sh = std::path::Path::new("/bin/sh");
        assert!(program(sh, &["-c", "exit 0"], Duration::from_secs(5)).is_ok());
        let error = program(sh, &["-c", "echo first >&2; echo last words >&2; exit 3"], Duration::from_secs(5));
        assert_eq!(error.unwrap_err().to_string(), "last words");
        let error = program(sh, &["-c", "sleep 30"], Duration::from_millis(50));
        assert!(matches!(error, Err(ActError::TimedOut)), "{error:?}");
    }
}
