//! Makes way for a handoff: units and containers are stopped, processes ended, until nobody uses the GPU any more.
//!
//! What is stopped is on record before it is stopped. Whether it has stopped is judged by how things are: under HA a
//! container's stop is only queued, whatever the command says.

use super::{Handoff, LOOK_AGAIN};
use crate::decimal::whole_seconds;
use crate::gpu::containers;
use crate::gpu::holders::{Devices, Holder};
use crate::handoff::kept::record::{Record, Stopped};
use crate::handoff::kept::store::Locked;
use crate::handoff::plan::policy::Halt;
use crate::sys::{End, Process};
use crate::systemd;
use std::time::Duration;

/// Who is stopped may have been watched by something that starts another: so often it is tried.
const ROUNDS: usize = 4;

/// A process that is asked to end has this long before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// What takes longer is told of while it lasts.
const PATIENCE: Duration = Duration::from_secs(3);

/// A container that does not shut down by itself is stopped hard when this much of the time is left.
const FORCE: Duration = Duration::from_secs(10);

/// The phase's name in the log.
pub(super) const PHASE: &str = "stop";

pub const PCT: &str = "/usr/sbin/pct";

pub const QM: &str = "/usr/sbin/qm";

/// The transient unit that stops a container.
pub fn stop_unit(ctid: u32) -> String {
    format!("gpu-handoff-stop-{ctid}")
}

/// Who must go, given who uses the GPU at that moment; the error is who keeps it.
type Decide<'a> = &'a dyn Fn(&[Holder]) -> Result<Vec<Halt>, Vec<Holder>>;

/// How making way went.
#[derive(Debug, Default)]
pub(super) struct Way {
    /// None when nobody had to go.
    pub took: Option<Duration>,
    /// Why somebody still uses the GPU.
    pub problem: Option<String>,
}

impl Handoff<'_> {
    /// Until two looks one after the other find nobody. What was stopped is on record, whatever comes of it.
    pub(super) fn make_way(
        &self,
        locked: &Locked,
        record: &mut Record,
        mut halts: Vec<Halt>,
        devices: &Devices,
        decide: Decide,
    ) -> Way {
        if halts.is_empty() {
            return Way::default();
        }
        let begin = self.kernel.now();
        let end = begin + self.config.time.stop;
        let mut done = Vec::new();
        let mut rounds = || -> Result<(), String> {
            for _ in 0..ROUNDS {
                self.halt_all(locked, record, &halts, end, &mut done)?;
                halts = self.who_is_left(devices, end, decide)?;
                if halts.is_empty() {
                    return Ok(());
                }
            }
            Err("others take the place of who was stopped".to_string())
        };
        let problem = rounds().err();
        // Why, the error says.
        done.extend(problem.as_ref().map(|_| "FAILED".to_string()));
        let took = self.kernel.now().saturating_sub(begin);
        self.story.phase(PHASE, took, &done.join(", "));
        Way { took: Some(took), problem }
    }

    fn who_is_left(&self, devices: &Devices, end: Duration, decide: Decide) -> Result<Vec<Halt>, String> {
        let limit = end.saturating_sub(self.kernel.now());
        decide(&devices.lasting_holders(self.kernel, limit)?).map_err(|keepers| {
            let who: Vec<String> = keepers.iter().map(ToString::to_string).collect();
            format!("meanwhile {}", who.join(", "))
        })
    }

    fn halt_all(
        &self,
        locked: &Locked,
        record: &mut Record,
        halts: &[Halt],
        end: Duration,
        done: &mut Vec<String>,
    ) -> Result<(), String> {
        for halt in halts {
            match halt {
                Halt::Stop(what) => {
                    let along = match what {
                        Stopped::Unit(unit) => systemd::stopped_along(self.kernel, unit),
                        Stopped::Container(_) | Stopped::Vm(_) => Vec::new(),
                    };
                    done.extend(along.iter().map(|unit| format!("stop {unit}")));
                    for what in along.into_iter().map(Stopped::Unit).chain([what.clone()]) {
                        if !record.stopped.contains(&what) {
                            record.stopped.push(what);
                        }
                    }
                    locked.save(record).map_err(|error| format!("{error:#}"))?;
                    self.stop(what, end)?;
                    done.push(halt.to_string());
                }
                Halt::Kill { process, command } => {
                    self.kill(*process, command, end)?;
                    done.push(halt.to_string());
                }
            }
        }
        Ok(())
    }

    fn stop(&self, what: &Stopped, end: Duration) -> Result<(), String> {
        let left = end.saturating_sub(self.kernel.now());
        // Both go on by themselves: a run that is killed meanwhile leaves nothing half asked for.
        let asked = match what {
            Stopped::Unit(unit) => systemd::stop(self.kernel, unit),
            Stopped::Container(ctid) => {
                let timeout = left.saturating_sub(FORCE).as_secs().max(1).to_string();
                let id = ctid.to_string();
                let line = [PCT, "shutdown", &id, "--forceStop", "1", "--timeout", &timeout];
                systemd::run_transient(self.kernel, &stop_unit(*ctid), &line)
            }
            // Before anything is locked: see takeover.
            Stopped::Vm(_) => return Err(format!("{what} is not stopped here")),
        };
        asked.map_err(|error| format!("{what} does not stop: {error}"))?;
        let begin = self.kernel.now();
        let mut told = false;
        self.wait_until(end, || {
            // Whoever reads the task's log meanwhile.
            if !told && self.kernel.now() >= begin + PATIENCE {
                told = true;
                let up_to = whole_seconds(left);
                self.story.say(&format!("  waits for {what} to stop, for up to {up_to} s"));
            }
            match what {
                Stopped::Unit(unit) => {
                    matches!(systemd::state(self.kernel, unit).as_deref(), Some("inactive" | "failed"))
                }
                Stopped::Container(ctid) => !containers::runs(self.kernel, *ctid),
                Stopped::Vm(_) => true,
            }
        })
        .map_err(|why| format!("{what} does not stop ({why})"))
    }

    /// Asked first; killed when that does not help.
    fn kill(&self, process: Process, command: &str, end: Duration) -> Result<(), String> {
        let pid = process.pid;
        for how in [End::Ask, End::Kill] {
            self.kernel.end(process, how).map_err(|error| format!("PID {pid} ({command}) does not end: {error}"))?;
            let enough = end.min(self.kernel.now() + GRACE);
            let gone = self.wait_until(enough, || self.kernel.process(pid) != Some(process));
            if gone.is_ok() {
                return Ok(());
            }
        }
        Err(format!("PID {pid} ({command}) does not end"))
    }

    fn wait_until(&self, end: Duration, mut is_so: impl FnMut() -> bool) -> Result<(), String> {
        let begin = self.kernel.now();
        loop {
            if is_so() {
                return Ok(());
            }
            if self.kernel.is_asked_to_end() {
                return Err("asked to end".to_string());
            }
            if self.kernel.now() >= end {
                return Err(format!("after {} s", self.kernel.now().saturating_sub(begin).as_secs()));
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
    }
}
