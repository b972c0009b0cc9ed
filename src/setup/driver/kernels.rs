//! The driver's modules for kernels other than the one that it was installed with.

use super::facts;
use super::install;
use super::load::load;
use super::record::{self, Installed, LOCK};
use super::services::take_turn;
use crate::App;
use crate::driver::{builds, flags};
use crate::exit::{Exit, Result};
use crate::setup::kept::pending::{self, Pending, Task};
use crate::story::row;
use crate::sys::{flock_is_held, heed_termination};
use crate::teller::Teller;
use std::time::Duration;

/// A kernel's installation waits for it, and a boot may.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// For the kernel hook: builds for a kernel, or keeps in mind why not.
///
/// # Errors
/// As [`build`].
pub fn build_and_note(app: &App, release: &str) -> Result<()> {
    facts::check_release(app.kernel, release)?;
    if missing(app, release)?.is_none() {
        return pending::note(app, &Task::Kernel(release.to_string()), &Ok(()));
    }
    heed_termination();
    let outcome = take_turn(app).and_then(|_turn| build(app, release));
    pending::note(app, &Task::Kernel(release.to_string()), &outcome)?;
    outcome
}

/// What [`build_and_note`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, release: &str) -> Result<String> {
    facts::check_release(app.kernel, release)?;
    Ok(match missing(app, release)? {
        None => format!("nothing to do for kernel {release}\n"),
        Some(installed) => {
            row("install", &format_args!("the modules of driver {} for kernel {release}\n", installed.version))
        }
    })
}

/// At boot: for the running kernel, and loads what it built.
///
/// # Errors
/// As [`build`]; that is kept in mind.
pub fn build_for_running(app: &App) -> Result<()> {
    let release = facts::running(app.kernel);
    if missing(app, &release)?.is_none() {
        return pending::note(app, &Task::Kernel(release), &Ok(()));
    }
    build_and_note(app, &release)?;
    load(app, &app.config_for_hook(), &[], None)
}

pub fn running(app: &App) -> Task {
    Task::Kernel(facts::running(app.kernel))
}

/// After a driver was installed for the running kernel: those others that can have it too shall.
///
/// # Errors
/// When that cannot be kept in mind.
pub fn owe(app: &App) -> Result<()> {
    for release in app.kernel.list("/lib/modules") {
        let can_have = facts::check_release(app.kernel, &release).is_ok() && facts::has_headers(app.kernel, &release);
        if can_have && let Some(installed) = missing(app, &release)? {
            let again = format!("gpu-handoff setup driver --kernel {release}");
            let why = Exit::failed(format!("kernel {release} has no driver {} yet: {again}", installed.version));
            pending::note(app, &Task::Kernel(release), &Err(why))?;
        }
    }
    Ok(())
}

/// For kernels that have been owed it, as far as they are there still.
///
/// # Errors
/// When it is not possible for one of them; it stays pending.
pub fn build_pending(app: &App) -> Result<()> {
    let mut first = Ok(());
    for task in Pending::read(app.kernel)?.0.into_keys() {
        let Task::Kernel(release) = task else { continue };
        let is_there = facts::check_release(app.kernel, &release).is_ok();
        let outcome =
            if is_there { build_and_note(app, &release) } else { pending::note(app, &Task::Kernel(release), &Ok(())) };
        if let Err(exit) = &outcome
            && first.is_err()
        {
            app.story.warn(&exit.to_string());
        }
        first = first.and(outcome);
    }
    first
}

/// The driver on record, if this kernel does not have it and it is for us to build.
fn missing(app: &App, release: &str) -> Result<Option<Installed>> {
    // The installer builds for another kernel only what is installed; what was begun is to be ended first.
    let is_there = |one: &Installed| facts::libraries(app.kernel) == [one.version.clone()];
    let record = record::read(app.kernel)?.filter(|record| record.began.is_none());
    let installed = record.and_then(|record| record.installed).filter(|one| !one.dkms && is_there(one));
    Ok(installed.filter(|one| facts::on_disk(app.kernel, release).as_deref() != Some(one.version.as_str())))
}

fn build(app: &App, release: &str) -> Result<()> {
    let Some(installed) = missing(app, release)? else { return Ok(()) };
    let Installed { version, flavour, .. } = &installed;
    let later = |why: String| {
        let again = format!("gpu-handoff setup driver --kernel {release}");
        Exit::refused(format!("kernel {release} has no driver {version} yet: {why}, then: {again}"))
    };
    let needs = facts::needs(app.kernel, release, false);
    if !needs.is_empty() {
        return Err(later(format!("to build it, apt-get install {}", needs.join(" "))));
    }
    // Older installers would try them.
    let is_running = release == facts::running(app.kernel);
    if is_running && app.kernel.exists("/sys/module/nvidia") && !flags::has(version, flags::SKIP_LOAD) {
        return Err(later("nvidia is loaded in another version; reboot".to_string()));
    }
    if flock_is_held(app.kernel, LOCK) {
        return Err(Exit::locked("an installer that an earlier run started is still at work: try again after it"));
    }
    if let Some(doubt) = builds::doubt(version, release) {
        app.story.warn(&doubt.to_string());
    }
    let teller = Teller::new(app, "driver", "driver")?;
    let installer = install::kept(app, &teller, &installed).map_err(|exit| later(exit.to_string()))?;
    let flags = flags::kernel(version, release, *flavour, facts::key(app.kernel).as_ref());
    // What a build that was cut off left would be in the way of this one.
    install::remove_modules(app, release)?;
    install::execute(app, &teller, &format!("building {version} for kernel {release}"), &installer, &flags, LIMIT)?;
    if facts::on_disk(app.kernel, release).as_deref() != Some(version.as_str()) {
        return Err(Exit::failed(format!(
            "driver: the installer succeeded, but kernel {release} has no nvidia module of version {version}"
        )));
    }
    let mut record = record::read(app.kernel)?.unwrap_or_default();
    if let Some(installed) = &mut record.installed
        && !installed.kernels.iter().any(|one| one == release)
    {
        installed.kernels.push(release.to_string());
        record::write(app.kernel, &record)?;
    }
    teller.say(&format!("kernel {release} has {version}"));
    Ok(())
}
