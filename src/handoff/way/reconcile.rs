//! What a record says is ours and nobody works on or uses any more comes home. What no record names is not touched: an
//! override there may be the administrator's, and nothing tells it from one of ours whose record is lost.

use super::{Handoff, LOOK_AGAIN, WORKER_GRACE};
use crate::address::SlotId;
use crate::exit::{Code, Exit, Result};
use crate::gpu::{containers, nodes, nvidia};
use crate::handoff::kept::owed;
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::kept::store::Locked;
use crate::handoff::kept::under_way;
use crate::handoff::plan::Plan;
use crate::handoff::plan::step::Step;
use crate::handoff::way::attempt::{Attempt, Direction};
use crate::handoff::way::free::TimeBox;
use crate::proxmox::running;
use crate::proxmox::running::is_alive;
use crate::story::Story;
use crate::sys::{Action, Kernel, Lock, Node};
use crate::systemd::{self, Shutdown};
use serde_json::{Value, json};
use std::time::Duration;

/// A QEMU that is just ending may take this long to let go.
const LETTING_GO: Duration = Duration::from_secs(5);

/// A module that brings no GPU to life is loaded in this time; at boot the guests wait for it.
const LOADING: Duration = Duration::from_secs(10);

/// Between the end of a VM's QEMU and what Proxmox does about it there is a moment in which nobody is at it.
const BETWEEN: Duration = Duration::from_secs(3);

/// What counts as left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Handoffs that were cut short.
    Unfinished,
    /// For the keeper, who comes again: those, slots whose VM ended without anybody being told, and what is to be started.
    Owed,
    /// Handoffs that were cut short, and slots whose VM does not run.
    All,
}

impl Handoff<'_> {
    /// Brings home what was left behind.
    ///
    /// # Errors
    /// The first of what could not be brought home; the others were tried all the same, and told of.
    pub fn reconcile(&self, scope: Scope) -> Result<()> {
        for problem in self.store.each_record().into_iter().filter_map(std::result::Result::err) {
            self.story.warn(&format!("{problem:#}"));
        }
        self.left_pinned().into_iter().for_each(|vmid| self.unpin(vmid));
        let mut exits = match scope {
            Scope::Owed => match self.store.keeper()? {
                Some(keeper) => self.keep(&keeper)?,
                // It does all there is to do.
                None => Vec::new(),
            },
            Scope::Unfinished | Scope::All => self.fetch_all(scope),
        };
        self.load_uvm(scope);
        let limit = Step::MakeNodes.share(self.config.time.handoff);
        exits.extend(make_nodes(self.kernel, self.story, &self.missing_nodes(scope), limit).err());
        let mut exits = exits.into_iter();
        let first = exits.next();
        exits.for_each(|exit| self.story.error(&exit.to_string()));
        first.map_or(Ok(()), Err)
    }

    /// What could not be brought home.
    fn fetch_all(&self, scope: Scope) -> Vec<Exit> {
        self.resume_what_was_forgotten();
        if scope == Scope::All && nvidia::Minors::read(self.kernel).is_busy {
            let busy = nvidia::busy(self.kernel);
            self.story.warn(&format!("{busy}: nobody has looked whether /dev/nvidia0 and the like are there; when that is over: gpu-handoff reconcile"));
        }
        if scope == Scope::Unfinished {
            self.let_workers_end();
        }
        let patience = match scope {
            // By itself: let the handoff that is under way end first.
            Scope::Unfinished => self.config.time.lock + 2 * self.config.time.handoff,
            Scope::Owed | Scope::All => self.config.time.lock,
        };
        let left = self.left_behind(scope);
        let exits = left.iter().filter_map(|record| self.fetch_left_behind(scope, record, patience).err());
        let exits = exits.collect();
        self.forget_ended_wedges();
        exits
    }

    /// Without waiting: those that are left are there for whoever comes next.
    fn forget_ended_wedges(&self) {
        for slot in self.store.wedged_slots() {
            if self.wedged_among(&[slot]).is_empty() {
                self.lock(Duration::ZERO, &[slot], "").map_or_else(|exit| self.tell_but_locked(&exit), drop);
            }
        }
    }

    fn tell_but_locked(&self, exit: &Exit) {
        if exit.code != Code::Locked {
            self.story.warn(&exit.to_string());
        }
    }

    /// One look of the keeper: whoever is at something is left to it, and what does not succeed is tried again later, each
    /// time after a longer while. When there is nothing left to come back for, the keeper rests.
    fn keep(&self, keeper: &Lock) -> Result<Vec<Exit>> {
        let mut left = self.left_behind(Scope::Owed);
        let shutdown = (!left.is_empty()).then(|| Shutdown::ask(self.kernel));
        if left.iter().any(|record| record.progress == Progress::Away) {
            self.kernel.sleep(BETWEEN);
        }
        // A reboot undoes every handoff.
        if shutdown.is_some_and(|shutdown| shutdown.has_begun()) {
            return Ok(Vec::new());
        }
        self.forget_who_goes_on();
        self.resume_what_is_due();
        self.forget_ended_wedges();
        let now = self.kernel.unix_time();
        let before = self.store.retries();
        let number = |retry: &Value, key: &str| retry.get(key).and_then(Value::as_u64);
        let mut retries = serde_json::Map::new();
        let mut exits = Vec::new();
        for record in left.drain(..) {
            let name = record.owner.file_name();
            let retry = before.get(&name).cloned().unwrap_or_default();
            if number(&retry, "after").is_some_and(|after| now < after) {
                retries.insert(name, retry);
                continue;
            }
            if let Err(exit) = self.fetch_left_behind(Scope::Owed, &record, self.config.time.lock) {
                let tries = 1 + number(&retry, "tries").unwrap_or(0);
                retries.insert(name, json!({"tries": tries, "after": now + owed::pause(tries).as_secs()}));
                exits.push(exit);
            }
        }
        let retries = Value::Object(retries);
        if retries != before && !(before.is_null() && retries == json!({})) {
            self.store.set_retries(keeper, &retries)?;
        }
        if !self.store.has_anything() {
            // If not, it looks once more, and there is nothing to do.
            let _ = systemd::stop(self.kernel, owed::TIMER);
        }
        Ok(exits)
    }

    /// Brings home what a record names, if it is still as it was when nobody had the lock.
    fn fetch_left_behind(&self, scope: Scope, record: &Record, patience: Duration) -> Result<()> {
        let owner = &record.owner;
        let locked = match self.lock(patience, &record.slots(), "try again: gpu-handoff reconcile") {
            // Somebody is at it.
            Err(Exit { code: Code::Locked, .. }) if scope == Scope::Owed => return Ok(()),
            locked => locked?,
        };
        let record = self.store.record(owner)?.filter(|record| self.is_left_behind(record, scope));
        let Some(mut record) = record else { return Ok(()) };
        if scope == Scope::Owed {
            self.thaw(&locked, &mut record);
            let slots = record.slots();
            // Nothing can be done about either yet, and both were told of.
            if self.wedged_among(&slots).len() == slots.len() {
                self.leave_wedged_to_itself(&locked, &mut record);
                return Ok(());
            }
            if self.is_in_use(&record, self.kernel.now() + LETTING_GO)? {
                return Ok(());
            }
        }
        self.fetch(&locked, &record, self.kernel.now() + self.config.time.handoff)
    }

    /// Whether a container has nvidia-uvm in its configuration, and the driver runs without: CUDA needs it, and nothing
    /// loads it at boot.
    pub fn lacks_uvm(&self, scope: Scope) -> bool {
        scope == Scope::All
            && self.kernel.exists("/sys/module/nvidia")
            && !self.kernel.exists("/sys/module/nvidia_uvm")
            && !self.kernel.list("/proc/driver/nvidia/gpus").is_empty()
            && containers::is_given_to_any(self.kernel, nodes::UVM)
    }

    fn load_uvm(&self, scope: Scope) {
        if !self.lacks_uvm(scope) {
            return;
        }
        let modules = vec![nvidia::UVM.to_string()];
        let load = Step::Load { modules: modules.clone() };
        match self.kernel.act(&Action::Load { modules }, LOADING) {
            Ok(()) => self.story.say(&load.to_string()),
            Err(error) => self.story.warn(&format!(
                "{} was not loaded, which containers need for CUDA: {error}; load it: modprobe {0}",
                nvidia::UVM
            )),
        }
    }

    /// Device nodes that the NVIDIA driver's loaded modules lack, as after a boot on which nothing has opened a GPU yet.
    pub fn missing_nodes(&self, scope: Scope) -> Vec<Node> {
        match scope {
            Scope::Unfinished | Scope::Owed => Vec::new(),
            Scope::All => containers::missing_nodes(self.kernel),
        }
    }

    /// A worker starts this as its last act and may not be gone yet: as long as it is there, its slot counts as wedged,
    /// and nobody would come back for it.
    fn let_workers_end(&self) {
        let is_stuck = |slot: &SlotId| {
            let wedge = self.store.wedge(*slot).ok().flatten();
            wedge.is_some_and(|wedge| wedge.is_still_stuck(self.kernel) && self.kernel.caller() != Some(wedge.process))
        };
        let end = self.kernel.now() + WORKER_GRACE;
        while self.store.wedged_slots().iter().any(is_stuck) && self.kernel.now() < end {
            self.kernel.sleep(LOOK_AGAIN);
        }
    }

    /// Every record that [`Handoff::reconcile`] would act on; not one that cannot be read.
    pub fn left_behind(&self, scope: Scope) -> Vec<Record> {
        let records = self.store.each_record().into_iter().flatten();
        records.filter(|record| self.is_left_behind(record, scope)).collect()
    }

    /// What [`Handoff::reconcile`] would do with a record now.
    ///
    /// # Errors
    /// Why it would leave it alone.
    pub fn plan_fetch(&self, record: &Record) -> Result<Plan> {
        self.refuse_wedged(&record.slots())?;
        self.plan_home(record)
    }

    /// A handoff that was killed is put right before another begins, or the other would plan around a half-moved card.
    /// One that somebody is at is left to him.
    pub(super) fn finish_others(&self, locked: &Locked, owner: &Owner) {
        for journal in self.store.journals().into_iter().filter_map(|(_, journal)| journal.ok()) {
            if !journal.slots.iter().any(|slot| locked.has(*slot)) {
                // Whoever gets these locks settles it; a handoff that is under way has them.
                self.lock(Duration::ZERO, &journal.slots, "").map_or_else(|exit| self.tell_but_locked(&exit), drop);
            }
        }
        let end = self.kernel.now() + self.config.time.handoff / 2;
        for record in self.left_behind(Scope::Unfinished).iter().filter(|record| record.owner != *owner) {
            // Who wants a wedged slot is told so; it is no business of the others.
            let slots = record.slots();
            if self.wedged_among(&slots).len() == slots.len() {
                continue;
            }
            let done = if slots.iter().all(|slot| locked.has(*slot)) {
                self.fetch(locked, record, end)
            } else {
                self.finish(record, end)
            };
            if let Err(exit) = done {
                self.story.warn(&exit.to_string());
            }
        }
    }

    fn finish(&self, record: &Record, end: Duration) -> Result<()> {
        let locked = match self.lock(Duration::ZERO, &record.slots(), "") {
            Err(Exit { code: Code::Locked, .. }) => return Ok(()),
            locked => locked?,
        };
        match self.store.record(&record.owner)?.filter(|record| self.is_left_behind(record, Scope::Unfinished)) {
            Some(record) => self.fetch(&locked, &record, end),
            None => Ok(()),
        }
    }

    /// Called with the locks held, or for show: whoever worked on an unfinished handoff is dead, or waits for its VM.
    fn is_left_behind(&self, record: &Record, scope: Scope) -> bool {
        match (&record.owner, record.progress) {
            (Owner::Vm(id), Progress::Away) => {
                let is_ours = match scope {
                    Scope::Unfinished => false,
                    // Whoever called the hook by hand sees to the rest, and a watcher to a start.
                    Scope::Owed => {
                        let is_awaited = self.store.next_after(self.kernel, *id).is_some();
                        !record.by_hand && !under_way::is_watched(self.kernel, *id) && !is_awaited
                    }
                    Scope::All => true,
                };
                is_ours && !is_alive(self.kernel, *id)
            }
            (Owner::Vm(id), _) => running::qemu_pid(self.kernel, *id).is_none(),
            (Owner::Manual(_), Progress::Away) => {
                scope != Scope::Unfinished && record.for_backup && !running::is_backing_up(self.kernel)
            }
            (Owner::Manual(_), _) => true,
        }
    }

    fn fetch(&self, locked: &Locked, record: &Record, end: Duration) -> Result<()> {
        let begin = self.kernel.now();
        let waited = self.wait_until_free(record, end.min(begin + LETTING_GO)).inspect_err(|exit| {
            let attempt = Attempt::new(Direction::Home, &record.owner, &record.slots(), begin);
            self.note(Some(locked), attempt, Some(exit));
        })?;
        self.bring_home(locked, record, TimeBox { waited, ..TimeBox::of(self, begin, end) })
    }
}

/// # Errors
/// The first that was not made.
pub fn make_nodes(kernel: &dyn Kernel, story: &Story, missing: &[Node], limit: Duration) -> Result<()> {
    for node in missing {
        let made = kernel.act(&Action::MakeNode(node.clone()), limit);
        made.map_err(|error| Exit::failed(format!("{} is missing and was not made: {error}", node.path)))?;
    }
    if !missing.is_empty() {
        story.say(&format!("device nodes {}", nodes_to_text(missing)));
    }
    Ok(())
}

/// `/dev/nvidia0 /dev/nvidiactl`
pub fn nodes_to_text(nodes: &[Node]) -> String {
    nodes.iter().map(|node| node.path.as_str()).collect::<Vec<_>>().join(" ")
}
