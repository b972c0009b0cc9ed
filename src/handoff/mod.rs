//! A handoff: slots go to a VM, or to vfio-pci by hand, and come home again.

pub mod check;
pub mod facts;
mod home;
mod leave;
pub mod plan;
pub mod record;
pub mod run;
pub mod step;
pub mod store;

use crate::config::Config;
use crate::proxmox::running;
use crate::report::Story;
use crate::stop::{Result, Stop};
use crate::sys::Kernel;
use record::Owner;
use run::Outcome;
use serde_json::{Value, json};
use std::time::Duration;
use store::{About, Locked, Store};

/// What a handoff works with.
pub struct Handoff<'a> {
    pub kernel: &'a dyn Kernel,
    pub store: &'a Store,
    pub config: &'a Config,
    pub story: &'a Story,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Vfio,
    Home,
}

impl Handoff<'_> {
    fn lock(&self) -> Result<Locked<'_>> {
        let lock = self.store.lock(self.config.lock)?;
        lock.ok_or_else(|| {
            Stop::locked(format!(
                "another handoff is under way and did not end within {} s; see gpu-handoff --status, then try again",
                self.config.lock.as_secs_f64()
            ))
        })
    }

    /// A slot with a kernel call that never came back is left alone until that call ends.
    fn refuse_wedged(&self, locked: &Locked, slots: &[&str]) -> Result<()> {
        for slot in slots {
            let Some(wedged) = self.store.about(About::Wedged, slot) else { continue };
            if let Some(problem) = wedge_problem(self.kernel, &wedged) {
                return Err(Stop::overrun(format!(
                    "{slot} is wedged: {problem}; nothing was touched; end what uses the GPU, or reboot the host"
                )));
            }
            locked.clear_about(About::Wedged, slot)?;
        }
        Ok(())
    }

    /// Notes how it went; for `--status` alone, so that failing to is no failure.
    fn note_last(&self, locked: &Locked, slots: &[&str], last: &Last) {
        let phases: Vec<Value> = last
            .outcomes
            .iter()
            .flat_map(|outcome| &outcome.phases)
            .map(|(name, took)| json!({"name": name, "ms": took.as_millis() as u64}))
            .collect();
        let document = json!({
            "direction": match last.direction { Direction::Vfio => "vfio", Direction::Home => "home" },
            "vmid": last.vmid,
            "exit": last.exit,
            "ms": last.took.as_millis() as u64,
            "phases": phases,
        });
        for slot in slots {
            if let Err(error) = locked.set_about(About::Last, slot, &document) {
                self.story.warn(&format!("{error:#}"));
            }
        }
    }

    /// Keeps which call is stuck; until it ends nobody may go near the slot.
    fn note_wedged(&self, locked: &Locked, slots: &[&str], outcome: &Outcome) {
        let Some((step, pid)) = &outcome.stuck else { return };
        let since = utc(self.kernel.unix_time());
        let document = json!({"step": step.to_string(), "pid": pid, "since": since});
        for slot in slots {
            if let Err(error) = locked.set_about(About::Wedged, slot, &document) {
                self.story.warn(&format!("{error:#}"));
            }
        }
    }
}

struct Last<'a> {
    direction: Direction,
    vmid: Option<u32>,
    exit: u8,
    took: Duration,
    outcomes: &'a [&'a Outcome],
}

/// Whether a VM runs, or Proxmox is in the middle of starting or stopping it.
pub fn is_alive(kernel: &dyn Kernel, vmid: u32) -> bool {
    running::qemu_pid(kernel, vmid).is_some() || running::is_locked(kernel, vmid)
}

/// What is wedged, in words; none when the stuck process has ended meanwhile.
pub fn wedge_problem(kernel: &dyn Kernel, wedged: &Value) -> Option<String> {
    let pid = wedged.get("pid")?.as_i64()?;
    let text = |name: &str| wedged.get(name).and_then(Value::as_str).unwrap_or("?").to_string();
    kernel
        .exists(&format!("/proc/{pid}"))
        .then(|| format!("{} never came back since {} (PID {pid})", text("step"), text("since")))
}

/// What to type to try a handoff to this owner again.
fn again(owner: &Owner) -> String {
    match owner {
        Owner::Vm(id) => format!("start VM {id} again: qm start {id}"),
        Owner::Manual(slot) => format!("try again: gpu-handoff to-vfio {slot}"),
    }
}

/// `2026-11-20T12:00:00Z` (days to civil date, proleptic Gregorian calendar).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_795_176_000), "2026-11-20T12:00:00Z");
    }
}
