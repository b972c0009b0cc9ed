//! Carries a plan out, step by step, within its time box.

use super::plan::{Phase, Plan};
use super::step::Step;
use crate::report::Story;
use crate::sys::{ActError, Kernel};
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
    /// The step whose kernel call never came back, and the process that is stuck in it.
    pub stuck: Option<(Step, i32)>,
    /// The time box ended before the plan did.
    pub out_of_time: bool,
}

impl Outcome {
    pub fn is_complete(&self) -> bool {
        self.failures.is_empty() && self.stuck.is_none() && !self.out_of_time
    }

    /// The first thing that went wrong, in words.
    pub fn problem(&self) -> String {
        if let Some((step, pid)) = &self.stuck {
            return format!("{step} never came back (PID {pid} is stuck in the kernel)");
        }
        match self.failures.first() {
            Some((step, reason)) => format!("{step}: {reason}"),
            None if self.out_of_time => "the time box ended".to_string(),
            None => "nothing".to_string(),
        }
    }
}

/// What to do after a step that did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// Towards a VM: stop, so that what was done can be undone.
    Stop,
    /// Towards home: go as far as possible.
    GoOn,
}

/// `end` is a time of [`Kernel::now`].
pub fn run(kernel: &dyn Kernel, story: &Story, plan: &Plan, on_failure: OnFailure, end: Duration) -> Outcome {
    let mut outcome = Outcome::default();
    let mut rest = plan.as_slice();
    while let Some((phase, _)) = rest.first() {
        let (now, later) = rest.split_at(rest.iter().take_while(|(p, _)| p == phase).count());
        rest = later;
        let go_on = run_phase(kernel, story, *phase, now, on_failure, end, &mut outcome);
        if !go_on {
            break;
        }
    }
    outcome
}

/// False when the plan must not go on.
fn run_phase(
    kernel: &dyn Kernel,
    story: &Story,
    phase: Phase,
    steps: &[(Phase, Step)],
    on_failure: OnFailure,
    end: Duration,
    outcome: &mut Outcome,
) -> bool {
    let begin = kernel.now();
    let mut done: Vec<&Step> = Vec::new();
    let mut go_on = true;
    for (_, step) in steps {
        let left = end.saturating_sub(kernel.now());
        if left.is_zero() {
            outcome.out_of_time = true;
            go_on = false;
            break;
        }
        match run_step(kernel, step, left) {
            Ok(Effect::Changed) => done.push(step),
            Ok(Effect::NothingToDo) => {}
            Err(ActError::Stuck { pid }) => {
                outcome.stuck = Some((step.clone(), pid));
                go_on = false;
                break;
            }
            Err(error) => {
                outcome.out_of_time |= matches!(error, ActError::TimedOut);
                outcome.failures.push((step.clone(), error.to_string()));
                if on_failure == OnFailure::Stop {
                    go_on = false;
                    break;
                }
            }
        }
    }
    let took = kernel.now().saturating_sub(begin);
    if !done.is_empty() || !go_on {
        story.phase(phase.name(), took, &tell(&done));
    }
    outcome.phases.push((phase.name(), took));
    go_on
}

enum Effect {
    Changed,
    NothingToDo,
}

fn run_step(kernel: &dyn Kernel, step: &Step, limit: Duration) -> Result<Effect, ActError> {
    if step.holds(kernel) {
        return Ok(Effect::NothingToDo);
    }
    if let Step::RemoveId { .. } = step {
        return remove_id(kernel, step, limit);
    }
    for action in step.actions(kernel) {
        match kernel.act(&action, limit) {
            Ok(()) => {}
            // Somebody else was faster: what counts is how things are.
            Err(ActError::Os(_)) if step.holds(kernel) => return Ok(Effect::NothingToDo),
            Err(error) => return Err(error),
        }
    }
    if step.holds(kernel) {
        return Ok(Effect::Changed);
    }
    // drivers_probe, for one, reports success when no driver took the device.
    Err(ActError::Program("the kernel reported success, but nothing changed".to_string()))
}

fn remove_id(kernel: &dyn Kernel, step: &Step, limit: Duration) -> Result<Effect, ActError> {
    let mut effect = Effect::NothingToDo;
    for _ in 0..REMOVE_ID_LIMIT {
        for action in step.actions(kernel) {
            match kernel.act(&action, limit) {
                Ok(()) => effect = Effect::Changed,
                Err(error) if error.errno() == Some(libc::ENODEV) => return Ok(effect),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(effect)
}

/// `unload nvidia_uvm nvidia, unbind from snd_hda_intel 0000:01:00.1`
fn tell(steps: &[&Step]) -> String {
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
