//! Carries a plan out, step by step, within its time box.

use super::Handoff;
use crate::address::{self, SlotId};
use crate::gpu::containers;
use crate::handoff::kept::journal::Journal;
use crate::handoff::kept::record::{Owner, Record};
use crate::handoff::kept::store::{Locked, Stack};
use crate::handoff::kept::wedge;
use crate::handoff::plan::step::Step;
use crate::handoff::plan::{self, Phase, Plan};
use crate::handoff::way::in_the_way;
use crate::story::Story;
use crate::sys::failpoints::{self, Point};
use crate::sys::{ActError, Action, Kernel, Process};
use nix::libc;
use std::time::Duration;

/// Proxmox writes the same id once at most; more often than this it is not an id that we are about to get rid of.
const REMOVE_ID_LIMIT: usize = 8;

/// How long a container is given to come to a halt.
const FREEZING: Duration = Duration::from_secs(5);

const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What became of a plan.
#[derive(Debug, Default)]
pub struct Outcome {
    pub phases: Vec<(&'static str, Duration)>,
    /// Steps that did not work, each with the reason.
    pub failures: Vec<(Step, String)>,
    /// Steps that never came back, each with the process that was left behind in it.
    pub stuck: Vec<(Step, Process)>,
    /// The time box ended before the plan did.
    pub out_of_time: bool,
    /// Somebody asked the run to end.
    pub interrupted: bool,
    /// Why the plan was not begun.
    pub prevented: Option<String>,
}

impl Outcome {
    pub fn prevented(problem: String) -> Outcome {
        Outcome { prevented: Some(problem), ..Outcome::default() }
    }

    pub fn is_complete(&self) -> bool {
        self.prevented.is_none()
            && self.failures.is_empty()
            && self.stuck.is_empty()
            && !self.out_of_time
            && !self.interrupted
    }

    /// All went well but for what is stuck.
    pub fn only_stuck(&self) -> bool {
        !self.stuck.is_empty() && self.failures.is_empty() && !self.out_of_time && !self.interrupted
    }

    /// The first thing that went wrong, in words: the log's lines say where that was, this says why.
    pub fn problem(&self) -> String {
        if let Some(problem) = &self.prevented {
            return problem.clone();
        }
        let stuck = self.stuck.first();
        let stuck = stuck.map(|(step, who)| format!("{step} does not come back (PID {} is stuck in it)", who.pid));
        let failure = self.failures.first().map(|(step, reason)| format!("{step}: {reason}"));
        match [stuck, failure].into_iter().flatten().collect::<Vec<_>>().as_slice() {
            [] if self.interrupted => "asked to end".to_string(),
            [] if self.out_of_time => "out of time".to_string(),
            [] => "nothing".to_string(),
            problems => problems.join(", "),
        }
    }
}

/// What to do after a step that did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// Towards a VM: stop, so that what was done can be undone. So does being asked to end.
    Stop,
    /// Towards home: go as far as possible.
    GoOn,
    /// At home, where each step needs the one before: stop, but not for being asked to end.
    Break,
}

/// How to carry a plan out.
pub struct Run<'a> {
    pub kernel: &'a dyn Kernel,
    pub story: &'a Story,
    pub on_failure: OnFailure,
    /// The slot that the title above the lines names, if there is but one.
    pub only: Option<SlotId>,
    /// The end of the time box, a time of [`Kernel::now`].
    pub end: Duration,
    /// What the whole handoff may take: each step gets its share of it.
    pub handoff: Duration,
    /// Told before each step who is going to do what.
    pub journal: &'a dyn Fn(&Step, Process) -> anyhow::Result<()>,
}

impl Run<'_> {
    pub fn carry_out(&self, plan: &Plan) -> Outcome {
        let mut outcome = Outcome::default();
        for (phase, steps) in plan::by_phase(plan) {
            if !self.phase(phase, steps, plan, &mut outcome) {
                break;
            }
        }
        outcome
    }

    /// False when the plan must not go on.
    fn phase(&self, phase: Phase, steps: &[(Phase, Step)], plan: &Plan, outcome: &mut Outcome) -> bool {
        let begin = self.kernel.now();
        let mut done: Vec<&Step> = Vec::new();
        let failed_before = outcome.failures.len();
        let go_on = steps.iter().all(|(_, step)| self.attempt(step, plan, &mut done, outcome));
        let took = self.kernel.now().saturating_sub(begin);
        let mut told: Vec<String> = Vec::new();
        if !done.is_empty() {
            told.push(plan::in_one_go(done, self.only));
        }
        let failed = |step: &Step| format!("FAILED {}", plan::in_one_go([step], self.only));
        // Why the first failed is what the error says at the end, see Outcome::problem; of the others nobody else does.
        let failures = outcome.failures.iter().enumerate().skip(failed_before);
        told.extend(failures.map(|(n, (step, reason))| match n {
            0 => failed(step),
            _ => format!("{}: {reason}", failed(step)),
        }));
        if !go_on && outcome.failures.len() == failed_before {
            told.push(outcome.stuck.last().map_or_else(|| "FAILED".to_string(), |(step, _)| failed(step)));
        }
        if !told.is_empty() {
            self.story.phase(phase.name(), took, &told.join(", "));
        }
        outcome.phases.push((phase.name(), took));
        go_on
    }

    /// False when the plan must not go on.
    fn attempt<'s>(&self, step: &'s Step, plan: &Plan, done: &mut Vec<&'s Step>, outcome: &mut Outcome) -> bool {
        // Its slot waits for the call that is stuck; others need not, and nobody stays frozen for it.
        let waits = !matches!(step, Step::Thaw { .. });
        if waits && outcome.stuck.iter().any(|(stuck, _)| stuck.slot().is_none() || stuck.slot() == step.slot()) {
            return true;
        }
        let left = self.end.saturating_sub(self.kernel.now());
        let share = step.share(self.handoff);
        // With little time left a step that is merely slow would look stuck.
        outcome.out_of_time |= left < share / 4;
        outcome.interrupted |= self.on_failure == OnFailure::Stop && self.kernel.is_asked_to_end();
        if outcome.out_of_time || outcome.interrupted {
            return false;
        }
        match self.step(step, plan, left.min(share)) {
            Ok(Effect::Changed) => done.push(step),
            Ok(Effect::NothingToDo) => {}
            Err(Failure::Stuck(process)) => {
                outcome.stuck.push((step.clone(), process));
                return self.on_failure == OnFailure::GoOn;
            }
            Err(Failure::Reason(reason)) => {
                outcome.failures.push((step.clone(), reason));
                return self.on_failure == OnFailure::GoOn;
            }
        }
        true
    }

    fn step(&self, step: &Step, plan: &Plan, limit: Duration) -> Result<Effect, Failure> {
        let worker = self.kernel.worker().ok_or_else(|| Failure::Reason("no process to do it".to_string()))?;
        let holds = || step.holds(self.kernel, limit).map_err(|_| Failure::Stuck(worker));
        if holds()? {
            return Ok(Effect::NothingToDo);
        }
        if let Err(error) = (self.journal)(step, worker) {
            let problem = format!("{error:#}");
            if self.on_failure == OnFailure::Stop {
                return Err(Failure::Reason(problem));
            }
            // Coming home matters more than being able to tell how far it got.
            self.story.warn(&problem);
        }
        if let Some(reason) = self.came_in_between(step, plan, limit) {
            return Err(Failure::Reason(reason));
        }
        failpoints::pass(Point::Before);
        let done = self.change(step, worker, limit);
        failpoints::pass(Point::After);
        match done {
            Ok(Effect::Changed) if !matches!(step, Step::RemoveId { .. } | Step::Freeze { .. }) && !holds()? => {
                // drivers_probe, for one, reports success when no driver took the device.
                Err(Failure::Reason("the kernel reported success, but nothing changed".to_string()))
            }
            // Somebody else was faster: what counts is how things are.
            Err(Failure::Reason(_)) if holds()? => Ok(Effect::NothingToDo),
            done => done,
        }
    }

    /// Unbinding a function while somebody has it open does not come back, so look once more just before. Also before
    /// modules are unloaded: an open that was under way when its container was frozen is done by now.
    fn came_in_between(&self, step: &Step, plan: &Plan, limit: Duration) -> Option<String> {
        match step {
            Step::Unbind { address, driver } => in_the_way::of_unbinding(self.kernel, *address, driver, limit),
            Step::Unload { .. } => {
                // While the first of them is there still: afterwards there would be something to go back from.
                let all: Vec<&str> = plan.iter().filter_map(|(_, step)| unloaded(step)).collect();
                let is_first = all.first().copied() == unloaded(step);
                let holder = is_first.then(|| in_the_way::of_unloading(self.kernel, &all, limit)).flatten();
                holder.map(|holder| format!("meanwhile {holder}"))
            }
            _ => None,
        }
    }

    fn change(&self, step: &Step, worker: Process, limit: Duration) -> Result<Effect, Failure> {
        let end = self.kernel.now() + limit;
        let ask = |action: &Action| match self.kernel.act(action, end.saturating_sub(self.kernel.now())) {
            Err(ActError::Stuck { .. }) => Err(Failure::Stuck(worker)),
            other => Ok(other),
        };
        if let Step::RemoveId { .. } = step {
            let mut effect = Effect::NothingToDo;
            for action in std::iter::repeat_n(step.actions(self.kernel), REMOVE_ID_LIMIT).flatten() {
                match ask(&action)? {
                    Ok(()) => effect = Effect::Changed,
                    Err(error) if error.errno() == Some(libc::ENODEV) => break,
                    Err(error) => return Err(Failure::Reason(error.to_string())),
                }
            }
            return Ok(effect);
        }
        for action in step.actions(self.kernel) {
            ask(&action)?.map_err(|error| Failure::Reason(self.explain(step, &error)))?;
        }
        if let Step::Freeze { ctid } = step {
            self.wait_until_frozen(*ctid, end);
        }
        Ok(Effect::Changed)
    }

    /// Until then whoever was in the middle of opening the GPU may still do so. A process that waits for a disk that is
    /// away is never frozen, and opens nothing either: what it may have begun is looked for before each step that it
    /// would make hang.
    fn wait_until_frozen(&self, ctid: u32, end: Duration) {
        let end = end.min(self.kernel.now() + FREEZING);
        while !containers::is_frozen(self.kernel, ctid) {
            if self.kernel.now() >= end {
                return self
                    .story
                    .warn(&format!("container {ctid} is not frozen yet: one of its processes is busy in the kernel"));
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
    }

    fn explain(&self, step: &Step, error: &ActError) -> String {
        match (step, error.errno()) {
            (Step::Unload { module }, Some(libc::EWOULDBLOCK)) => {
                let references = self.kernel.text(&format!("/sys/module/{module}/refcnt"));
                let who = in_the_way::of_unloading(self.kernel, &[module], self.handoff / 10);
                let who = who.map(|holder| format!(": {holder}")).unwrap_or_default();
                format!("it is in use (refcnt {}){who}", references.unwrap_or_else(|| "?".to_string()))
            }
            _ => error.to_string(),
        }
    }
}

fn unloaded(step: &Step) -> Option<&str> {
    if let Step::Unload { module } = step { Some(module) } else { None }
}

enum Effect {
    Changed,
    NothingToDo,
}

enum Failure {
    Reason(String),
    Stuck(Process),
}

impl Handoff<'_> {
    pub(super) fn run(
        &self,
        locked: &Locked,
        _stack: &Stack,
        record: &Record,
        plan: &Plan,
        on_failure: OnFailure,
        end: Duration,
    ) -> Outcome {
        let slots = record.slots();
        let journal =
            |step: &Step, worker: Process| locked.write_journal(&journal_of(&record.owner, &slots, step, worker));
        let run = Run {
            kernel: self.kernel,
            story: self.story,
            on_failure,
            only: address::only(&slots),
            end,
            handoff: self.config.time.handoff,
            journal: &journal,
        };
        let outcome = run.carry_out(plan);
        let mut noted = Ok(());
        for (step, process) in &outcome.stuck {
            let mut at = journal_of(&record.owner, &slots, step, *process);
            at.worker = wedge::who_is_at_it(self.kernel, at.call.as_ref(), *process).unwrap_or(*process);
            noted = noted.and(self.note_wedge(locked, &at));
        }
        // Without a wedge the journal stays: it says the same to whoever comes next.
        if let Err(error) = noted.and_then(|()| Ok(locked.end_journal(&record.owner)?)) {
            self.story.warn(&error.to_string());
        }
        outcome
    }
}

/// A step that names a slot leaves none of the others in an unknown state.
fn journal_of(owner: &Owner, slots: &[SlotId], step: &Step, worker: Process) -> Journal {
    let of_step = slots.iter().filter(|slot| step.slot().is_none_or(|own| own == **slot));
    let (slots, call) = (of_step.copied().collect(), Some(step.call()));
    Journal { owner: owner.clone(), slots, step: step.to_string(), call, worker }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_first() {
        let step = |module: &str| Step::Unload { module: module.to_string() };
        let failures = vec![(step("a"), "busy".to_string()), (step("b"), "too".to_string())];
        let stuck = vec![(step("c"), Process { pid: 7, start: 99 })];
        let hangs = "unload c does not come back (PID 7 is stuck in it)";
        let of = |failures: &[(Step, String)], stuck: &[(Step, Process)], out_of_time| {
            let outcome = Outcome { failures: failures.to_vec(), stuck: stuck.to_vec(), ..Outcome::default() };
            Outcome { out_of_time, ..outcome }.problem()
        };
        assert_eq!(of(&failures, &[], true), "unload a: busy");
        assert_eq!(of(&[], &stuck, true), hangs);
        // The line of the log leaves it to this why the first one failed.
        assert_eq!(of(&failures, &stuck, false), format!("{hangs}, unload a: busy"));
        assert_eq!(of(&[], &[], true), "out of time");
        assert_eq!(Outcome { interrupted: true, ..Outcome::default() }.problem(), "asked to end");
        assert_eq!(Outcome::prevented("no".to_string()).problem(), "no");
    }

    #[test]
    fn the_journal_names_the_slots_that_the_step_is_about() {
        let worker = Process { pid: 7, start: 99 };
        let slots: [SlotId; 2] = ["0000:01:00", "0000:02:00"].map(|slot| slot.parse().unwrap());
        let slots_of = |step: &Step| journal_of(&Owner::Vm(111), &slots, step, worker).slots;
        let unbind = Step::Unbind { address: slots[1].function(0), driver: "nvidia".to_string() };
        assert_eq!(slots_of(&unbind), [slots[1]]);
        assert_eq!(slots_of(&Step::Unload { module: "nvidia".to_string() }).len(), 2);
    }

    #[test]
    fn what_is_only_stuck_did_not_fail_as_well() {
        let step = || Step::Unload { module: "c".to_string() };
        let stuck = || vec![(step(), Process { pid: 7, start: 99 })];
        assert!(Outcome { stuck: stuck(), ..Outcome::default() }.only_stuck());
        assert!(!Outcome::default().only_stuck());
        let failures = vec![(step(), "busy".to_string())];
        assert!(!Outcome { stuck: stuck(), failures, ..Outcome::default() }.only_stuck());
        assert!(!Outcome { stuck: stuck(), out_of_time: true, ..Outcome::default() }.only_stuck());
        assert!(!Outcome { stuck: stuck(), interrupted: true, ..Outcome::default() }.only_stuck());
    }
}
