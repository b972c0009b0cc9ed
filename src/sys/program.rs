//! Programs of the host that do what is theirs to do: modprobe, systemctl, systemd-run.

use super::ActError;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often a program is asked whether it has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// No program writes more than this that anybody here wants to know.
const OUTPUT: usize = 64 * 1024;

/// Runs a program and waits for it, however long it takes or at most for `limit`; its standard output.
///
/// # Errors
/// The first line of its standard error when it failed: what comes after it tends to follow from it.
pub fn run(path: &Path, arguments: &[&str], limit: Option<Duration>) -> Result<String, ActError> {
    let failed = |error: io::Error| ActError::Program(format!("{}: {error}", path.display()));
    let mut child = Command::new(path)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let status = match limit {
        None => child.wait().map_err(failed)?,
        Some(limit) => wait(&mut child, limit).map_err(failed)?.ok_or_else(|| {
            ActError::Program(format!("{} did not end within {} s", path.display(), limit.as_secs_f32()))
        })?,
    };
    if status.success() {
        return Ok(child.stdout.take().map(what_is_there).unwrap_or_default());
    }
    let said = child.stderr.take().map(what_is_there).unwrap_or_default();
    Err(ActError::Program(match said.lines().find(|line| !line.trim().is_empty()) {
        Some(line) => line.trim().to_string(),
        None => format!("{} ended with {status}", path.display()),
    }))
}

/// None when it had to be ended: it and what it started, without waiting for a call that may never come back.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            return Ok(None);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Not to its end: something that the program started may keep its output open.
fn what_is_there(mut output: impl Read + AsFd) -> String {
    let mut said = vec![0; OUTPUT];
    let _ = fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
    let mut length = 0;
    while let Ok(more @ 1..) = output.read(&mut said[length..]) {
        length += more;
    }
    String::from_utf8_lossy(&said[..length]).into_owned()
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
        assert_eq!(sh("exit 3", None), Err("/bin/sh ended with exit status: 3".to_string()));
        assert!(run(Path::new("/nowhere"), &[], None).is_err());
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
