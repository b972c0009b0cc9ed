//! After device events, outside of udev: what takes longer than an event may. Containers that run and whose device nodes
//! are no longer the host's are restarted or told of.
//!
//! Whoever asks for this leaves a note and starts a unit of its own; the units take turns, and each takes the note away
//! before it looks. So however many events there are, one more look follows the last of them, and hardly more than one.

use super::notes::{Notes, handoff_is_under_way};
use crate::App;
use crate::config::{Config, ForContainer};
use crate::containers::attach;
use crate::containers::stale::{Stale, stale};
use crate::exit::{Exit, Result};
use crate::gpu::{containers, nodes};
use crate::handoff::kept::record::Stopped;
use crate::handoff::kept::to_start::ToStart;
use crate::handoff::way::halt::PCT;
use crate::handoff::way::reconcile::make_nodes;
use crate::proxmox::running;
use crate::sys::{Kernel, heed_termination};
use crate::systemd::{self, Shutdown};
use std::time::Duration;

pub const VERB: &str = "settle";

const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Events come in bursts: four modules and a GPU.
const BURST: Duration = Duration::from_millis(500);

/// For whoever sees to earlier events: it may be restarting containers.
const TURN: Duration = Duration::from_secs(600);

/// A module's event comes before the module has found its GPUs.
const MODULES: Duration = Duration::from_secs(10);

const NODE: Duration = Duration::from_secs(5);

/// Of the time to restart a container, what is left when it is stopped hard.
const FORCE: Duration = Duration::from_secs(10);

/// What is done about a container with stale nodes. Mending them where they are would be another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    Restart,
    Tell,
}

fn remedy(policy: ForContainer, is_locked: bool) -> Remedy {
    match policy {
        ForContainer::Stop if !is_locked => Remedy::Restart,
        ForContainer::Stop | ForContainer::Refuse | ForContainer::Leave => Remedy::Tell,
    }
}

/// # Errors
/// When a device node could not be made, or containers could not be looked at.
pub fn run(app: &App) -> Result<()> {
    heed_termination();
    app.kernel.end_with_this_run();
    let notes = Notes::of(app.kernel);
    let turn = notes.turn(TURN).map_err(|error| Exit::failed(format!("/run/gpu-handoff: {error}")))?;
    app.kernel.sleep(BURST);
    notes.heed_event();
    if turn.is_none() {
        return Err(not_looked_at(app.kernel, "another gpu-handoff settle", TURN));
    }
    let config = app.config_for_hook();
    let patience = config.time.lock + 2 * config.time.handoff + config.time.stop;
    // On its way it makes what is missing by itself.
    let is_over = wait_until(app.kernel, patience, &|| !handoff_is_under_way(app.kernel));
    wait_until(app.kernel, MODULES, &|| !is_a_module_coming(app.kernel));
    let made = make_nodes(app.kernel, &app.story, &containers::missing_nodes(app.kernel), NODE);
    for ctid in attach::attached(app) {
        wait_until_let_go(app.kernel, &config, ctid);
    }
    let changed = attach::refresh_all(app);
    if !is_over {
        return made.and(Err(not_looked_at(app.kernel, "a handoff", patience)));
    }
    for ctid in containers::with_nvidia(app.kernel) {
        if app.kernel.is_asked_to_end() {
            break;
        }
        Container { app, notes: &notes, config: &config, ctid, has_old_rules: changed.contains(&ctid) }.see_to();
    }
    made
}

fn not_looked_at(kernel: &dyn Kernel, what: &str, waited: Duration) -> Exit {
    let why = match kernel.is_asked_to_end() {
        true => "asked to end".to_string(),
        false => format!("{what} did not end within {} s", waited.as_secs()),
    };
    Exit::overrun(format!("containers were not looked at after a device event: {why}; type: gpu-handoff settle"))
}

fn is_a_module_coming(kernel: &dyn Kernel) -> bool {
    let state = |module: &str| kernel.text(&format!("/sys/module/{module}/initstate"));
    nodes::MODULES.iter().any(|module| state(module).as_deref() == Some("coming"))
}

/// Whether Proxmox is at work on a container no more.
fn wait_until_let_go(kernel: &dyn Kernel, config: &Config, ctid: u32) -> bool {
    wait_until(kernel, config.time.stop, &|| !running::is_ct_locked(kernel, ctid))
}

fn wait_until(kernel: &dyn Kernel, limit: Duration, is_so: &dyn Fn() -> bool) -> bool {
    let end = kernel.now() + limit;
    loop {
        if is_so() {
            return true;
        }
        if kernel.now() >= end || kernel.is_asked_to_end() {
            return false;
        }
        kernel.sleep(LOOK_AGAIN);
    }
}

struct Container<'a> {
    app: &'a App<'a>,
    notes: &'a Notes<'a>,
    config: &'a Config,
    ctid: u32,
    /// Its configuration has other device rules than those that it was started with.
    has_old_rules: bool,
}

impl Container<'_> {
    fn see_to(&self) {
        let (kernel, ctid) = (self.app.kernel, self.ctid);
        // What is being started may still lack its nodes, what is being stopped needs none.
        if !wait_until_let_go(kernel, self.config, ctid) {
            return;
        }
        let config = containers::config(kernel, ctid);
        let mut what = to_text(&stale(kernel, ctid));
        // Only privileged ones are held to their rules.
        if what.is_empty() && self.has_old_rules && config.as_ref().is_some_and(|config| !config.unprivileged) {
            what = "its device rules are those of an earlier load of the driver".to_string();
        }
        if what.is_empty() {
            self.notes.forget(ctid);
            return;
        }
        let lock = config.and_then(|config| config.lock);
        // Once, however many events there are; and what a restart did not help against is not restarted again. Without
        // its lock it is another matter.
        let told = lock.as_ref().map_or_else(|| what.clone(), |lock| format!("{what} ({lock})"));
        if self.notes.told(ctid).as_deref() == Some(&*told) || Shutdown::ask(kernel).has_begun() {
            return;
        }
        // Which may want it stopped; it brings events of its own.
        if handoff_is_under_way(kernel) {
            return;
        }
        let done = match remedy(self.config.policy.for_container(ctid), lock.is_some()) {
            Remedy::Restart => self.restart(&what),
            Remedy::Tell => {
                let lock = lock.map_or_else(String::new, |lock| format!("it is locked ({lock}); "));
                self.tell(
                    &told,
                    &format!("container {ctid} has stale nodes: {what}; {lock}restart it: pct reboot {ctid}"),
                )
            }
        };
        if let Err(problem) = done {
            self.app.story.error(&problem);
        }
    }

    fn tell(&self, what: &str, text: &str) -> std::result::Result<(), String> {
        self.app.story.warn(text);
        self.notes.tell(self.ctid, what).map_err(|error| format!("/run/gpu-handoff/ct-{}: {error}", self.ctid))
    }

    /// Then it starts again when that is over, by itself.
    fn is_stopped_for_a_handoff(&self) -> bool {
        let what = Stopped::Container(self.ctid);
        let store = &self.app.store;
        let is_waiting = |entry: &ToStart| entry.what == what && entry.since == 0;
        let waits = store.to_start().is_ok_and(|entries| entries.iter().any(is_waiting));
        waits || store.each_record().into_iter().flatten().any(|record| record.stopped.contains(&what))
    }

    fn restart(&self, what: &str) -> std::result::Result<(), String> {
        let (kernel, ctid) = (self.app.kernel, self.ctid);
        let init = || containers::init(kernel, ctid).and_then(|pid| kernel.process(pid));
        let before = init();
        let timeout = self.config.time.stop.saturating_sub(FORCE).as_secs().max(1).to_string();
        let id = ctid.to_string();
        // It goes on by itself: should this run be ended meanwhile, the container still comes up again.
        let line = [PCT, "reboot", &id, "--timeout", &timeout];
        let asked = systemd::run_transient(kernel, &format!("gpu-handoff-restart-{ctid}"), &line);
        asked.map_err(|error| {
            format!("container {ctid} has stale nodes: {what}; it was not restarted ({error}); type: pct reboot {ctid}")
        })?;
        // What counts is how things are. Starting it is given as long as stopping it.
        let is_back = || {
            let runs_anew = init().is_some_and(|now| Some(now) != before) && !running::is_ct_locked(kernel, ctid);
            runs_anew || self.is_stopped_for_a_handoff()
        };
        if !wait_until(kernel, 2 * self.config.time.stop, &is_back) {
            if kernel.is_asked_to_end() {
                return Ok(());
            }
            return Err(format!(
                "container {ctid} was to be restarted, for its nodes are stale: {what}; {}",
                match init() {
                    Some(_) => format!("it did not stop; type: pct reboot {ctid}"),
                    None => format!("it does not run again; start it: pct start {ctid}"),
                }
            ));
        }
        if self.is_stopped_for_a_handoff() {
            return Ok(());
        }
        let still = stale(kernel, ctid);
        if still.is_empty() {
            self.app.story.say(&format!("container {ctid} was restarted, its nodes were stale: {what}"));
            return Ok(());
        }
        let still = to_text(&still);
        self.tell(
            &still,
            &format!(
                "container {ctid} was restarted and has stale nodes: {still}; see: gpu-handoff container check {ctid}"
            ),
        )
    }
}

fn to_text(stale: &[Stale]) -> String {
    stale.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_by_policy_and_never_one_that_is_locked() {
        assert_eq!(remedy(ForContainer::Stop, false), Remedy::Restart);
        assert_eq!(remedy(ForContainer::Stop, true), Remedy::Tell);
        for policy in [ForContainer::Refuse, ForContainer::Leave] {
            assert_eq!(remedy(policy, false), Remedy::Tell);
        }
    }
}
