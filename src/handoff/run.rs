//! Carries a plan out, step by step, within its time box.

use super::plan::{Phase, Plan};
use super::step::Step;
use crate::report::Story;
use crate::sys::failpoints::{self, Point};
use crate::sys::{ActError, Kernel, Process};
use nix::libc;
use std::time::Duration;

/// Proxmox writes the same id once at most; more often than this it is not an id that we are about to get rid of.
const REMOVE_ID_LIMIT: usize = 8;

/// What became of a plan.
#[derive(Debug, Default)]
pub struct Outcome {
    pub phases: Vec<(&'static str, Duration)>,
    /// Steps that did not work, each with the reason.
    pub failures: Vec<(Step, String)>,
    /// The step that never came back, and the process that was left behind in it.
    pub stuck: Option<(Step, Process)>,
    /// The time box ended before the plan did.
    pub out_of_time: bool,
    /// Somebody asked the run to end.
    pub interrupted: bool,
}

impl Outcome {
    pub fn is_complete(&self) -> bool {
        self.failures.is_empty() && self.stuck.is_none() && !self.out_of_time && !self.interrupted
    }

    /// The first thing that went wrong, in words.
    pub fn problem(&self) -> String {
        if let Some((step, process)) = &self.stuck {
            return format!("{step} does not come back (PID {} is stuck in it)", process.pid);
        }
        match self.failures.first() {
            Some((step, reason)) => format!("{step}: {reason}"),
            None if self.interrupted => "asked to end".to_string(),
            None if self.out_of_time => "out of time".to_string(),
            None => "nothing".to_string(),
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
}

/// How to carry a plan out.
pub struct Run<'a> {
    pub kernel: &'a dyn Kernel,
    pub story: &'a Story,
    pub on_failure: OnFailure,
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
        let mut rest = plan.as_slice();
        while let Some((phase, _)) = rest.first() {
            let (now, later) = rest.split_at(rest.iter().take_while(|(p, _)| p == phase).count());
            rest = later;
            if !self.phase(*phase, now, &mut outcome) {
                break;
            }
        }
        outcome
    }

    /// False when the plan must not go on.
    fn phase(&self, phase: Phase, steps: &[(Phase, Step)], outcome: &mut Outcome) -> bool {
        let begin = self.kernel.now();
        let mut done: Vec<&Step> = Vec::new();
        let go_on = steps.iter().all(|(_, step)| self.attempt(step, &mut done, outcome));
        let took = self.kernel.now().saturating_sub(begin);
        if !done.is_empty() || !go_on {
            let mut told = tell(&done);
            if !go_on {
                let gap = if told.is_empty() { "" } else { ", then " };
                told.push_str(&format!("{gap}{}", outcome.problem()));
            }
            self.story.phase(phase.name(), took, &told);
        }
        outcome.phases.push((phase.name(), took));
        go_on
    }

    /// False when the plan must not go on.
    fn attempt<'s>(&self, step: &'s Step, done: &mut Vec<&'s Step>, outcome: &mut Outcome) -> bool {
        let left = self.end.saturating_sub(self.kernel.now());
        outcome.out_of_time |= left.is_zero();
        outcome.interrupted |= self.on_failure == OnFailure::Stop && self.kernel.is_asked_to_end();
        if outcome.out_of_time || outcome.interrupted {
            return false;
        }
        match self.step(step, left.min(step.share(self.handoff))) {
            Ok(Effect::Changed) => done.push(step),
            Ok(Effect::NothingToDo) => {}
            Err(Failure::Stuck(process)) => {
                outcome.stuck = Some((step.clone(), process));
                return false;
            }
            Err(Failure::Reason(reason)) => {
                outcome.failures.push((step.clone(), reason));
                return self.on_failure == OnFailure::GoOn;
            }
        }
        true
    }

    fn step(&self, step: &Step, limit: Duration) -> Result<Effect, Failure> {
        if step.holds(self.kernel) {
            return Ok(Effect::NothingToDo);
        }
        let worker = self.kernel.worker().ok_or_else(|| Failure::Reason("no process to do it".to_string()))?;
        if let Err(error) = (self.journal)(step, worker) {
            let problem = format!("{error:#}");
            if self.on_failure == OnFailure::Stop {
                return Err(Failure::Reason(problem));
            }
            // Coming home matters more than being able to tell how far it got.
            self.story.warn(&problem);
        }
        failpoints::pass(Point::Before);
        let done = self.change(step, worker, limit);
        failpoints::pass(Point::After);
        done
    }

    fn change(&self, step: &Step, worker: Process, limit: Duration) -> Result<Effect, Failure> {
        if let Step::RemoveId { .. } = step {
            return self.remove_id(step, worker, limit);
        }
        for action in step.actions(self.kernel) {
            match self.kernel.act(&action, limit) {
                Ok(()) => {}
                Err(ActError::Stuck { .. }) => return Err(Failure::Stuck(worker)),
                // Somebody else was faster: what counts is how things are.
                Err(_) if step.holds(self.kernel) => return Ok(Effect::NothingToDo),
                Err(error) => return Err(Failure::Reason(self.explain(step, &error))),
            }
        }
        if step.holds(self.kernel) {
            return Ok(Effect::Changed);
        }
        // drivers_probe, for one, reports success when no driver took the device.
        Err(Failure::Reason("the kernel reported success, but nothing changed".to_string()))
    }

    fn remove_id(&self, step: &Step, worker: Process, limit: Duration) -> Result<Effect, Failure> {
        let mut effect = Effect::NothingToDo;
        for _ in 0..REMOVE_ID_LIMIT {
            for action in step.actions(self.kernel) {
                match self.kernel.act(&action, limit) {
                    Ok(()) => effect = Effect::Changed,
                    Err(ActError::Stuck { .. }) => return Err(Failure::Stuck(worker)),
                    Err(error) if error.errno() == Some(libc::ENODEV) => return Ok(effect),
                    Err(error) => return Err(Failure::Reason(error.to_string())),
                }
            }
        }
        Ok(effect)
    }

    fn explain(&self, step: &Step, error: &ActError) -> String {
        match (step, error.errno()) {
            (Step::Unload { module }, Some(libc::EWOULDBLOCK)) => {
                let references = self.kernel.text(&format!("/sys/module/{module}/refcnt"));
                format!("it is in use (refcnt {})", references.unwrap_or_else(|| "?".to_string()))
            }
            _ => error.to_string(),
        }
    }
}

enum Effect {
    Changed,
    NothingToDo,
}

enum Failure {
    Reason(String),
    Stuck(Process),
}

/// `unload nvidia_uvm nvidia, unbind from snd_hda_intel 0000:01:00.1`
pub fn tell(steps: &[&Step]) -> String {
    let mut text = String::new();
    let mut verb = String::new();
    for step in steps {
        if step.verb() != verb {
            verb = step.verb();
            if !text.is_empty() {
                text.push_str(", ");
            }
            text.push_str(&verb);
        }
        let object = step.object();
        if !object.is_empty() {
            text.push(' ');
            text.push_str(&object);
        }
    }
    text
}
