//! What a process sees to before anything else, as Rust's own start does.

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use std::os::fd::IntoRawFd;

/// Descriptors 0 to 2 are open from now on, or the next file that is opened would be written to as standard error. And a pipe
/// that nobody reads any more is an error like others.
pub fn begin() {
    let mut three = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: it reads and writes these three, which are there until it returns.
    let polled = unsafe { libc::poll(three.as_mut_ptr(), 3, 0) };
    if polled > 0 {
        for _ in three.iter().filter(|one| one.revents & libc::POLLNVAL != 0) {
            // The lowest that is free, which is the one that was missing.
            match open("/dev/null", OFlag::O_RDWR, Mode::empty()) {
                Ok(null) => drop(null.into_raw_fd()),
                Err(_) => std::process::abort(),
            }
        }
    }
    // SAFETY: nothing runs on this signal.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}
