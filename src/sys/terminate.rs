//! SIGTERM asks a run to end. "Stop task" in Proxmox sends it to the hook, and SIGKILL five seconds later.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on SIGTERM, SIGINT and SIGHUP only ask; a handoff looks between its steps.
pub fn heed() {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

pub fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

extern "C" fn note(_: nix::libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}
