//! What a record says is ours and nobody works on or uses any more comes home. What no record names is not touched: an
//! override there may be the administrator's, and nothing tells it from one of ours whose record is lost.

use super::attempt::{Attempt, Direction};
use super::home::TimeBox;
use super::plan::Plan;
use super::record::{Owner, Progress, Record};
use super::step::Step;
use super::store::Locked;
use super::{Handoff, LOOK_AGAIN, WORKER_GRACE, is_alive};
use crate::gpu::{containers, nodes, nvidia};
use crate::proxmox::running;
use crate::report::Story;
use crate::stop::{Result, Stop};
use crate::sys::{Action, Kernel, Node};
use std::time::Duration;

/// A QEMU that is just ending may take this long to let go.
const LETTING_GO: Duration = Duration::from_secs(5);

/// A module that brings no GPU to life is loaded in this time; at boot the guests wait for it.
const LOADING: Duration = Duration::from_secs(10);

/// What counts as left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Handoffs that were cut short.
    Unfinished,
    /// Those, and slots whose VM does not run.
    All,
}

impl Handoff<'_> {
    /// Brings home what was left behind.
    ///
    /// # Errors
    /// The first that could not be brought home; the others were tried all the same.
    pub fn reconcile(&self, scope: Scope) -> Result<()> {
        for problem in self.store.each_record().into_iter().filter_map(std::result::Result::err) {
            self.story.warn(&format!("{problem:#}"));
        }
        self.resume_what_was_forgotten();
        if scope == Scope::All && nvidia::Minors::read(self.kernel).is_busy {
            let busy = nvidia::busy(self.kernel);
            self.story.warn(&format!("{busy}: nobody has looked whether /dev/nvidia0 and the like are there; when that is over: gpu-handoff reconcile"));
        }
        if self.left_behind(scope).is_empty() && self.missing_nodes(scope).is_empty() && !self.lacks_uvm(scope) {
            return Ok(());
        }
        if scope == Scope::Unfinished {
            self.let_workers_end();
        }
        let patience = match scope {
            // By itself, with nobody to try again: let the handoff that is under way end first.
            Scope::Unfinished => self.config.lock + 2 * self.config.handoff,
            Scope::All => self.config.lock,
        };
        let locked = self.lock(patience, &[], "try again: gpu-handoff reconcile")?;
        let mut first = None;
        for record in self.left_behind(scope) {
            let end = self.kernel.now() + self.config.handoff;
            first = first.or(self.fetch(&locked, &record, end).err());
        }
        self.load_uvm(scope);
        let limit = Step::MakeNodes.share(self.config.handoff);
        first = first.or(make_nodes(self.kernel, self.story, &self.missing_nodes(scope), limit).err());
        first.map_or(Ok(()), Err)
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
            Scope::Unfinished => Vec::new(),
            Scope::All => nodes::missing_for_containers(self.kernel),
        }
    }

    /// A worker starts this as its last act and may not be gone yet: as long as it is there, its slot counts as wedged,
    /// and nobody would come back for it.
    fn let_workers_end(&self) {
        let is_stuck = |slot: &String| {
            let wedge = self.store.wedge(slot).ok().flatten();
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
    pub(super) fn finish_others(&self, locked: &Locked, owner: &Owner) {
        let end = self.kernel.now() + self.config.handoff / 2;
        for record in self.left_behind(Scope::Unfinished).iter().filter(|record| record.owner != *owner) {
            // Who wants a wedged slot is told so; it is no business of the others.
            let slots = record.slots();
            if self.wedged_among(&slots).len() == slots.len() {
                continue;
            }
            if let Err(stop) = self.fetch(locked, record, end) {
                self.story.warn(&stop.message);
            }
        }
    }

    /// Called with the lock held, or for show: whoever worked on an unfinished handoff is dead, or waits for its VM.
    fn is_left_behind(&self, record: &Record, scope: Scope) -> bool {
        match (&record.owner, record.progress) {
            (Owner::Vm(id), Progress::Away) => scope == Scope::All && !is_alive(self.kernel, *id),
            (Owner::Vm(id), _) => running::qemu_pid(self.kernel, *id).is_none(),
            (Owner::Manual(_), Progress::Away) => false,
            (Owner::Manual(_), _) => true,
        }
    }

    fn fetch(&self, locked: &Locked, record: &Record, end: Duration) -> Result<()> {
        let begin = self.kernel.now();
        let waited = self.wait_until_free(record, end.min(begin + LETTING_GO)).inspect_err(|stop| {
            let attempt = Attempt::new(Direction::Home, &record.owner, &record.slots(), begin);
            self.note(Some(locked), attempt, Some(stop));
        })?;
        self.bring_home(locked, record, TimeBox { begin, end, waited })
    }
}

/// # Errors
/// The first that was not made.
pub fn make_nodes(kernel: &dyn Kernel, story: &Story, missing: &[Node], limit: Duration) -> Result<()> {
    for node in missing {
        let made = kernel.act(&Action::MakeNode(node.clone()), limit);
        made.map_err(|error| Stop::failed(format!("{} is missing and was not made: {error}", node.path)))?;
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
