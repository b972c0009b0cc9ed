//! Does what set-up has yet to do: at boot, and when somebody asks.

use super::driver::{self, Wish, kernels};
use super::kept::pending::{At, Pending, Task, change, note};
use super::vfio;
use crate::App;
use crate::exit::{Exit, Result};
use crate::gpu::inventory::nvidia_slots;
use crate::sys::{heed_termination, posix_lock_is_held};
use crate::systemd;
use std::time::Duration;

const DPKG_LOCK: &str = "/var/lib/dpkg/lock-frontend";
/// A large upgrade on a slow disk.
const DPKG: Duration = Duration::from_secs(20 * 60);
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Works off what is pending, and builds for the running kernel what it lacks of the driver that was set up. Nothing on a
/// host without an NVIDIA GPU. While the guests wait for it at boot, only what they need is done, nothing is downloaded,
/// and what failed [`super::kept::pending::TRIES`] times is left to a person.
///
/// # Errors
/// What could not be done; it stays pending.
pub fn run(app: &App) -> Result<()> {
    driver::services::start_forgotten(app);
    let mut pending = Pending::read(app.kernel)?;
    let record = driver::record::read(app.kernel)?;
    if (pending.0.is_empty() && record.is_none()) || nvidia_slots(app.kernel).is_empty() {
        return Ok(());
    }
    heed_termination();
    let at = if systemd::is_booting(app.kernel) { At::Boot } else { At::AnyTime };
    if record.is_some_and(|record| record.began.is_some()) {
        pending.0.entry(Task::Driver).or_default();
    }
    if !pending.0.is_empty() {
        wait_for_dpkg(app)?;
    }
    let mut first = Ok(());
    let mut keep = |task: Task, outcome: Result<()>| {
        note(app, &task, &outcome)?;
        let Err(exit) = outcome else { return Ok(()) };
        change(app, |pending| pending.0.entry(task.clone()).or_default().tries += 1)?;
        if first.is_ok() {
            first = Err(exit);
        } else {
            app.story.warn(&exit.to_string());
        }
        Ok::<(), Exit>(())
    };
    if pending.is_due(&Task::Vfio, at) {
        keep(Task::Vfio, vfio::setup(app, vfio::Wish::default()))?;
    }
    if pending.is_due(&Task::Driver, at) {
        keep(Task::Driver, driver::setup(app, &Wish { offline: at == At::Boot, ..Wish::default() }))?;
    }
    let running = kernels::running(app);
    if !pending.0.contains_key(&running) || pending.is_due(&running, at) {
        keep(running, kernels::build_for_running(app))?;
    }
    if at == At::AnyTime && first.is_ok() {
        first = kernels::build_pending(app);
    }
    first
}

/// Whoever installed this package, or a kernel, may have more to install that this needs.
fn wait_for_dpkg(app: &App) -> Result<()> {
    let end = app.kernel.now() + DPKG;
    while posix_lock_is_held(app.kernel, DPKG_LOCK) {
        if app.kernel.is_asked_to_end() || app.kernel.now() >= end {
            return Err(Exit::failed("dpkg is at work still; once it is done: gpu-handoff setup pending"));
        }
        app.kernel.sleep(LOOK_AGAIN);
    }
    Ok(())
}
