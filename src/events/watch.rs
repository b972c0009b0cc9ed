//! A start that is given up after pre-start fires no further phase, and the GPU would stay with a VM that does not run.
//! So a watcher, in a transient unit of its own, sees each start through: until QEMU runs, or until Proxmox has let go of
//! the guest's lock without one. Then the GPU comes home.
//!
//! As long as Proxmox has the lock it only looks. Starting it goes on beside the start, which does not wait for it.

use crate::App;
use crate::handoff::home::Asker;
use crate::handoff::record::Owner;
use crate::handoff::store::Store;
use crate::proxmox::running;
use crate::stop::{Code, Result, Stop};
use crate::sys::{ActError, Kernel, Running};
use crate::systemd;
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// No start takes longer; Proxmox gives up before.
const LIMIT: Duration = Duration::from_secs(3600);

/// Between the end of a VM that reboots and its start Proxmox has let go of the lock for a moment.
const RESTART: Duration = Duration::from_secs(30);

/// What has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Start,
    /// The VM has stopped and is to start again.
    Reboot,
}

/// What can be seen of a VM, without touching anything of Proxmox's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sight {
    has_record: bool,
    is_locked: bool,
    runs: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Look,
    Done,
    BringHome,
    GiveUp,
}

/// `idle`: since when nobody works on the VM; `watched`: how long this has been going on.
fn next(after: After, sight: Sight, idle: Duration, watched: Duration) -> Next {
    let patience = match after {
        After::Start => Duration::ZERO,
        After::Reboot => RESTART,
    };
    match sight {
        _ if watched >= LIMIT => Next::GiveUp,
        // A QEMU that is there already may still fail to get what it needs.
        Sight { is_locked: true, .. } => Next::Look,
        Sight { has_record: false, .. } | Sight { runs: true, .. } => Next::Done,
        _ if idle < patience => Next::Look,
        _ => Next::BringHome,
    }
}

impl Sight {
    fn of(kernel: &dyn Kernel, store: &Store, vmid: u32) -> Sight {
        // The lock first: whoever lets go of it has started QEMU before.
        Sight {
            is_locked: running::is_locked(kernel, vmid),
            runs: running::qemu_pid(kernel, vmid).is_some(),
            has_record: store.has_record(&Owner::Vm(vmid)),
        }
    }
}

/// A watcher that is on its way. Should starting it have failed by the end of the run, that is said; nobody waits for it.
pub struct Watcher<'a> {
    app: &'a App,
    vmid: u32,
    start: Option<Running>,
}

/// Starts a watcher, if Proxmox is at work on this VM: then nobody else brings its GPU home should it give up. Whoever
/// calls a hook by hand sees to that alone.
pub fn begin(app: &App, vmid: u32, after: After) -> Watcher<'_> {
    let mut watcher = Watcher { app, vmid, start: None };
    if !running::is_locked(&app.kernel, vmid) {
        return watcher;
    }
    // One for each start: an earlier one may be about to end.
    let unit = format!("gpu-handoff-watch-{vmid}-{}", std::process::id());
    let id = vmid.to_string();
    let mut arguments = vec!["watch", &id];
    if after == After::Reboot {
        arguments.push("--reboot");
    }
    match systemd::begin_later(&app.kernel, &unit, &arguments) {
        Ok(start) => watcher.start = Some(start),
        Err(error) => watcher.warn(&error),
    }
    watcher
}

impl Watcher<'_> {
    /// Waits until it has begun. False when there is none.
    pub fn has_begun(mut self) -> bool {
        match self.start.take().map(|start| start.finish(Some(systemd::ANSWER))) {
            Some(Err(error)) => {
                self.warn(&error);
                false
            }
            start => start.is_some(),
        }
    }

    fn warn(&self, error: &ActError) {
        self.app.story.warn(&format!(
            "nobody watches over the start of VM {}: {error}; if it is given up: gpu-handoff reconcile",
            self.vmid
        ));
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.start.as_mut().map(Running::outcome) {
            self.warn(&error);
        }
    }
}

/// # Errors
/// When the GPU could not be brought home.
pub fn run(app: &App, vmid: u32, after: After) -> Result<()> {
    let owner = Owner::Vm(vmid);
    let config = app.config_for_hook();
    let handoff = app.handoff(&config);
    let begin = app.kernel.now();
    let mut at_work = begin;
    loop {
        let now = app.kernel.now();
        let sight = Sight::of(&app.kernel, &app.store, vmid);
        if sight.is_locked {
            at_work = now;
        }
        match next(after, sight, now - at_work, now - begin) {
            Next::Done => return Ok(()),
            Next::Look => {}
            Next::BringHome => match handoff.come_home(&owner, Asker::Watcher) {
                // The other card's turn: there is nobody else to come back for this one.
                Err(Stop { code: Code::Locked, .. }) if !app.kernel.is_asked_to_end() => {}
                Err(stop) => return Err(stop),
                Ok(()) => {}
            },
            Next::GiveUp => {
                return Err(Stop::overrun(format!(
                    "VM {vmid} has been starting for {} s, nobody watches over that any longer; if it is given up: \
                     gpu-handoff reconcile",
                    LIMIT.as_secs()
                )));
            }
        }
        if app.kernel.is_asked_to_end() {
            return Ok(());
        }
        app.kernel.sleep(LOOK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn after(what: After, [has_record, is_locked, runs]: [bool; 3], idle: Duration) -> Next {
        next(what, Sight { has_record, is_locked, runs }, idle, SOON)
    }

    #[test]
    fn while_proxmox_has_the_lock_it_only_looks() {
        for what in [After::Start, After::Reboot] {
            for [has_record, runs] in [[false, false], [false, true], [true, false], [true, true]] {
                assert_eq!(after(what, [has_record, true, runs], Duration::ZERO), Next::Look);
            }
        }
    }

    #[test]
    fn a_start_that_was_given_up_comes_home_at_once() {
        assert_eq!(after(After::Start, [true, false, false], Duration::ZERO), Next::BringHome);
        assert_eq!(after(After::Start, [true, false, true], Duration::ZERO), Next::Done);
        assert_eq!(after(After::Start, [false, false, false], Duration::ZERO), Next::Done);
    }

    #[test]
    fn a_reboot_is_given_time_to_start_again() {
        assert_eq!(after(After::Reboot, [true, false, false], Duration::ZERO), Next::Look);
        assert_eq!(after(After::Reboot, [true, false, false], RESTART - LOOK_AGAIN), Next::Look);
        assert_eq!(after(After::Reboot, [true, false, false], RESTART), Next::BringHome);
        assert_eq!(after(After::Reboot, [true, false, true], RESTART), Next::Done);
        assert_eq!(after(After::Reboot, [false, false, false], RESTART), Next::Done);
    }

    #[test]
    fn nobody_watches_for_ever() {
        let sight = Sight { has_record: true, is_locked: true, runs: true };
        assert_eq!(next(After::Start, sight, Duration::ZERO, LIMIT), Next::GiveUp);
    }
}
