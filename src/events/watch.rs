//! A start that is given up after pre-start fires no further phase, and the GPU would stay with a VM that does not run.
//! So a watcher, in a transient unit of its own, sees each start through. It is through when Proxmox says so, in its own
//! file for that guest; a QEMU of which Proxmox never says so is watched until it is gone. Then the GPU comes home.
//!
//! Starts end without a word when they take too long, when "Stop" is pressed on their task, and when that task dies: what
//! is killed is a QEMU in the foreground, and the one behind it goes on, for a moment or for good
//! (PVE::QemuServer::vm_start_nolock, PVE::QemuServer::RunState).
//!
//! Where Proxmox has chosen the card, by a mapping, it also looks whether that is the one that was made ready.
//!
//! Where the VM is to be pinned it also sees to what comes within a minute.
//!
//! As long as Proxmox has the lock it only looks. Starting it goes on beside the start, which does not wait for it.

use super::mapped;
use crate::App;
use crate::exit::{Code, Exit, Result};
use crate::handoff::Handoff;
use crate::handoff::kept::record::Owner;
use crate::handoff::kept::store::Store;
use crate::handoff::way::home::Asker;
use crate::proxmox::running;
use crate::sys::{ActError, Kernel, Process, Running};
use crate::systemd::{self, Shutdown};
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How often to look while a QEMU runs of which Proxmox says nothing; its end is told by the kernel at once.
const LOOK_AT_QEMU: Duration = Duration::from_secs(10);

/// No start takes longer; Proxmox gives up before.
const LIMIT: Duration = Duration::from_secs(3600);

/// Between the end of a VM that reboots and its start Proxmox has let go of the lock for a moment.
const RESTART: Duration = Duration::from_secs(30);

/// Where Proxmox has no such file yet, it fires post-stop so soon after the end of any QEMU.
const POST_STOP: Duration = Duration::from_secs(3);

/// Proxmox's daemon that fires post-stop when a guest ends by itself: whoever restarts it kills a hook that it runs.
const QMEVENTD: &str = "/qmeventd.service";

/// What has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Start,
    /// The VM has stopped and is to start again.
    Reboot,
    /// The VM has stopped, and post-stop may not live to its end.
    Stop,
}

impl After {
    /// The option that stands for it on the command line.
    fn option(self) -> Option<&'static str> {
        match self {
            After::Start => None,
            After::Reboot => Some("--reboot"),
            After::Stop => Some("--stop"),
        }
    }
}

/// What can be seen of a VM, without touching anything of Proxmox's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sight {
    has_record: bool,
    is_locked: bool,
    runs: bool,
    /// Proxmox has said that its start is through, and fires post-stop when it ends.
    is_noted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Look,
    /// As [`Next::Look`], but only QEMU's end matters.
    AwaitQemu,
    Done,
    BringHome,
    GiveUp,
}

/// `quiet`: since when neither Proxmox works on the VM nor its QEMU runs; `locked`: how long Proxmox has been at work on it
/// without a break; `ran`: its QEMU was seen.
fn next(after: After, sight: Sight, ran: bool, quiet: Duration, locked: Duration) -> Next {
    let patience = match after {
        After::Reboot => RESTART,
        After::Start | After::Stop if ran => POST_STOP,
        After::Start | After::Stop => Duration::ZERO,
    };
    match sight {
        // A QEMU that is there already may still fail to get what it needs.
        Sight { is_locked: true, .. } => {
            if locked < LIMIT {
                Next::Look
            } else {
                Next::GiveUp
            }
        }
        Sight { has_record: false, .. } | Sight { runs: true, is_noted: true, .. } => Next::Done,
        Sight { runs: true, .. } => Next::AwaitQemu,
        _ if quiet < patience => Next::Look,
        _ => Next::BringHome,
    }
}

impl Sight {
    /// `qemu` is the one that was seen last: what is left of a process that ends no longer says whose it is.
    fn of(kernel: &dyn Kernel, store: &Store, vmid: u32, qemu: &mut Option<Process>) -> Sight {
        // The lock first: whoever lets go of it has started QEMU and noted it before. QEMU before the note, which goes
        // after it.
        let is_locked = running::is_locked(kernel, vmid);
        let named = running::qemu_pid(kernel, vmid);
        *qemu =
            named.and_then(|pid| kernel.process(pid)).or(qemu.filter(|qemu| kernel.process(qemu.pid) == Some(*qemu)));
        Sight {
            is_locked,
            runs: named.is_some() || qemu.is_some(),
            // A note of a QEMU that is ending is no reason to leave: who acts on it may be gone.
            is_noted: named.is_some() && running::is_noted(kernel, vmid),
            has_record: store.has_record(&Owner::Vm(vmid)),
        }
    }
}

/// A watcher that is on its way. Should starting it have failed by the end of the run, that is said; nobody waits for it.
pub struct Watcher<'a> {
    app: &'a App<'a>,
    vmid: u32,
    start: Option<Running>,
}

/// Starts a watcher, if Proxmox is at work on this VM: then nobody else brings its GPU home should it give up. Whoever
/// calls a hook by hand sees to that alone.
pub fn begin<'a>(app: &'a App<'a>, vmid: u32, after: After) -> Watcher<'a> {
    let mut watcher = Watcher { app, vmid, start: None };
    if !running::is_locked(app.kernel, vmid) {
        return watcher;
    }
    // One for each start: an earlier one may be about to end.
    let unit = format!("gpu-handoff-watch-{vmid}-{}", std::process::id());
    let id = vmid.to_string();
    let arguments: Vec<&str> = ["watch", &id].into_iter().chain(after.option()).collect();
    match systemd::begin_later(app.kernel, &unit, &arguments) {
        Ok(start) => watcher.start = Some(start),
        Err(error) => watcher.warn(&error),
    }
    watcher
}

/// A post-stop that Proxmox's daemon runs goes on in a unit of its own should it be killed in the middle.
pub fn outlive_qmeventd<'a>(app: &'a App<'a>, vmid: u32) -> Option<Watcher<'a>> {
    let own = app.kernel.text("/proc/self/cgroup").unwrap_or_default();
    own.contains(QMEVENTD).then(|| begin(app, vmid, After::Stop))
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
            "nobody watches over VM {}: {error}; if its start is given up: gpu-handoff reconcile",
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
    let config = app.config_for_hook();
    // As long as it is held, the keeper leaves this VM to us.
    let _watching = app.store.watcher(vmid);
    watch(&app.handoff(&config), vmid, after)
}

/// # Errors
/// As [`run`].
pub fn watch(handoff: &Handoff, vmid: u32, mut after: After) -> Result<()> {
    let kernel = handoff.kernel;
    let mut qemu = None;
    let mut ran = false;
    let begin = kernel.now();
    let (mut was_busy, mut was_unlocked) = (begin, begin);
    let mut is_to_be_pinned = handoff.config.pin_of(vmid).is_some();
    loop {
        let now = kernel.now();
        let sight = Sight::of(kernel, handoff.store, vmid, &mut qemu);
        ran |= sight.runs;
        // Who takes over comes for it soon.
        if sight.is_locked || sight.runs || handoff.store.next_after(kernel, vmid).is_some() {
            was_busy = now;
        }
        if !sight.is_locked {
            was_unlocked = now;
        }
        if running::is_rebooting(kernel, vmid) {
            after = After::Reboot;
        }
        match next(after, sight, ran, now - was_busy, now - was_unlocked) {
            Next::Done if sight.runs && sight.has_record => {
                let looked = mapped::look_again(handoff, vmid);
                if is_to_be_pinned {
                    handoff.pin_for_a_while(vmid);
                }
                return looked;
            }
            Next::Done => return Ok(()),
            Next::Look => kernel.sleep(LOOK_AGAIN),
            Next::AwaitQemu if is_to_be_pinned => {
                is_to_be_pinned = false;
                // With QEMU that ends as well.
                handoff.pin_for_a_while(vmid);
            }
            Next::AwaitQemu => match qemu {
                Some(qemu) => drop(kernel.wait_for_end(qemu, LOOK_AT_QEMU)),
                None => kernel.sleep(LOOK_AGAIN),
            },
            Next::BringHome => {
                // With the host everything ends.
                if Shutdown::ask(kernel).has_begun() {
                    return Ok(());
                }
                match handoff.come_home(&Owner::Vm(vmid), Asker::Watcher) {
                    // The other card's turn: there is nobody else to come back for this one.
                    Err(Exit { code: Code::Locked, .. }) if !kernel.is_asked_to_end() => {}
                    done => done?,
                }
                kernel.sleep(LOOK_AGAIN);
            }
            Next::GiveUp => {
                return Err(Exit::overrun(format!(
                    "Proxmox has been at work on VM {vmid} for {} s, nobody watches over that any longer; if it is given \
                     up: gpu-handoff reconcile",
                    LIMIT.as_secs()
                )));
            }
        }
        if kernel.is_asked_to_end() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [After; 3] = [After::Start, After::Reboot, After::Stop];
    const NONE: Duration = Duration::ZERO;
    const A_MOMENT: Duration = Duration::from_millis(1);

    /// Whether there is a record, a lock, QEMU, Proxmox's note.
    fn sight([has_record, is_locked, runs, is_noted]: [bool; 4]) -> Sight {
        Sight { has_record, is_locked, runs, is_noted }
    }

    fn every_sight() -> impl Iterator<Item = Sight> {
        (0..16).map(|bits| sight([0, 1, 2, 3].map(|bit| bits >> bit & 1 == 1)))
    }

    #[test]
    fn while_proxmox_has_the_lock_it_only_looks_and_not_for_ever() {
        for sight in every_sight().filter(|sight| sight.is_locked) {
            for after in ALL {
                for ran in [false, true] {
                    assert_eq!(next(after, sight, ran, NONE, LIMIT - A_MOMENT), Next::Look, "{sight:?}");
                    assert_eq!(next(after, sight, ran, NONE, LIMIT), Next::GiveUp, "{sight:?}");
                }
            }
        }
    }

    #[test]
    fn without_a_lock_proxmox_s_own_word_counts() {
        let all = every_sight().filter(|sight| !sight.is_locked);
        for (sight, after) in all.flat_map(|sight| ALL.map(|after| (sight, after))) {
            let expected = match (sight.has_record, sight.runs, sight.is_noted) {
                (false, ..) | (true, true, true) => Next::Done,
                (true, true, false) => Next::AwaitQemu,
                (true, false, _) => Next::BringHome,
            };
            for ran in [false, true] {
                assert_eq!(next(after, sight, ran, RESTART, NONE), expected, "{sight:?} {after:?}");
            }
        }
    }

    #[test]
    fn how_long_the_gpu_stays_with_nobody() {
        // Proxmox's note of an earlier start says nothing of this one.
        for is_noted in [false, true] {
            let alone = sight([true, false, false, is_noted]);
            for after in [After::Start, After::Stop] {
                assert_eq!(next(after, alone, false, NONE, NONE), Next::BringHome);
                assert_eq!(next(after, alone, true, POST_STOP - A_MOMENT, NONE), Next::Look);
                assert_eq!(next(after, alone, true, POST_STOP, NONE), Next::BringHome);
            }
            for ran in [false, true] {
                assert_eq!(next(After::Reboot, alone, ran, RESTART - A_MOMENT, NONE), Next::Look);
                assert_eq!(next(After::Reboot, alone, ran, RESTART, NONE), Next::BringHome);
            }
        }
    }
}
