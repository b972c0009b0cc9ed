//! Waiting for what the kernel tells of by itself: a process that ends, a node that somebody closes.

use super::process::Process;
use super::{program, trace};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

/// Until one of these ends or is closed, or `limit` is over. A node that has another inode elsewhere, as in a container, is
/// closed unnoticed.
pub fn any(processes: &[Process], nodes: &[PathBuf], limit: Duration) {
    let mut events: Vec<OwnedFd> = Vec::new();
    for process in processes {
        // One that has gone already is what was waited for.
        let Ok(pidfd) = program::pidfd(process.pid) else { return };
        events.push(pidfd);
    }
    events.extend(closings(nodes));
    let mut events: Vec<PollFd> = events.iter().map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN)).collect();
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    // A signal ends the wait as well.
    let _ = trace::timed(|| "wait for processes to end or nodes to be closed".to_string(), || poll(&mut events, limit));
}

/// Whether anybody still reads what this run writes to standard output.
pub fn has_reader() -> bool {
    let stdout = io::stdout();
    let mut ends = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let is_over = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    poll(&mut ends, PollTimeout::ZERO).is_err()
        || ends.iter().all(|end| !end.revents().is_some_and(|is| is.intersects(is_over)))
}

fn closings(nodes: &[PathBuf]) -> Option<OwnedFd> {
    // SAFETY: inotify_init1 takes a number and gives a descriptor that nobody else has.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    if inotify < 0 {
        return None;
    }
    // SAFETY: it is open, and this is its only owner.
    let inotify = unsafe { OwnedFd::from_raw_fd(inotify) };
    for node in nodes {
        let Ok(path) = CString::new(node.as_os_str().as_bytes()) else { continue };
        // SAFETY: the path ends with a NUL. One that is not there is not waited for.
        unsafe {
            libc::inotify_add_watch(std::os::fd::AsRawFd::as_raw_fd(&inotify), path.as_ptr(), libc::IN_CLOSE);
        }
    }
    Some(inotify)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::process::Command;
    use std::time::Instant;

    fn process(pid: u32) -> Process {
        Process { pid: i32::try_from(pid).unwrap(), start: 0 }
    }

    #[test]
    fn an_end_and_a_closing_are_noticed_at_once() {
        let long = Duration::from_secs(60);
        let begin = Instant::now();
        let mut child = Command::new("/bin/sleep").arg("0.1").spawn().unwrap();
        any(&[process(child.id())], &[], long);
        child.wait().unwrap();
        let path = std::env::temp_dir().join(format!("gpu-handoff-wait-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let closer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(file);
        });
        any(&[process(std::process::id())], std::slice::from_ref(&path), long);
        closer.join().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(begin.elapsed() < long / 2);
        any(&[process(std::process::id())], &[], Duration::from_millis(10));
    }
}
