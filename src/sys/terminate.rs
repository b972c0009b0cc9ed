//! SIGTERM asks a run to end. "Stop task" in Proxmox sends it to the hook, and SIGKILL five seconds later.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};

const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on SIGTERM, SIGINT and SIGHUP only ask; a handoff looks between its steps.
pub fn heed() {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: the handler only stores to an atomic.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

/// What a caller may have set for itself and this program inherits: with SIGCHLD ignored the kernel forgets how a
/// program ended before it can be asked, and a signal that is blocked never asks anybody to end.
pub fn forget_callers_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action is no handler at all.
    let _ = unsafe { sigaction(Signal::SIGCHLD, &default) };
    let _ = SigSet::all().thread_unblock();
}

/// In the worker: whoever ends the host's processes ends it too, unless it is stuck.
pub fn ignore_no_more() {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: the default action is no handler at all.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

pub fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

extern "C" fn note(_: nix::libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}
