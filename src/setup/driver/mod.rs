//! NVIDIA's driver on the host itself, from its own installer.
//!
//! What there is to do is found by looking, each time. The installer stays in the cache: it builds the same version for
//! kernels that come later, and brings it back when a newer one fails half-way.

pub mod kernels;
pub mod record;

pub mod facts;
mod install;
mod load;
pub mod packages;
mod plan;
pub mod services;
mod why;

use crate::App;
use crate::config::Config;
use crate::containers::attach;
use crate::driver::{self, Installer, Source, supported};
use crate::exit::{Exit, Result};
use crate::setup::kept::pending::{self, Task};
use crate::story::row;
use crate::sys::heed_termination;
use crate::teller::{Apart, Teller};
use facts::Facts;
use install::Host;
use load::load;
use plan::{Step, Wanted};

pub use plan::Wish;
use std::fs;
use std::time::Duration;

const APT: &str = "/usr/bin/apt-get";

const PACKAGES: Duration = Duration::from_secs(3600);

/// Where nobody knows which driver is meant.
pub const NONE: &str =
    "no driver is named in driver.runfile or driver.runfile_url, and no NVIDIA-Linux-x86_64-VERSION.run is in";

/// As [`setup`], and keeps in mind what was not done, if that is wished or was so before.
///
/// # Errors
/// As [`setup`].
pub fn setup_and_note(app: &App, wish: &Wish) -> Result<()> {
    if wish.undo {
        return undo(app);
    }
    if wish.defer && driver::found(app, &app.config_for_hook().driver).is_ok_and(|found| found.is_none()) {
        return Ok(());
    }
    pending::noted(app, Task::Driver, wish.defer, setup(app, wish))?;
    // Each may take minutes, and nobody waits for these.
    if wish.defer { Ok(()) } else { kernels::build_pending(app) }
}

/// # Errors
/// Why nothing was touched, or what went wrong and what there is now.
pub fn setup(app: &App, wish: &Wish) -> Result<()> {
    heed_termination();
    let config = app.config_for_verb()?;
    let _turn = services::take_turn(app)?;
    let (source, version) = found(app, &config)?;
    // Somebody was cut off before, and what that owed would look as if it had not been there.
    services::start_again(app);
    let facts = Facts::read(app, &config)?;
    let (steps, notes) = steps(app, &facts, &config, wish, &version, &source)?;
    notes.iter().for_each(|note| app.story.warn(note));
    let teller = Teller::new(app, "driver", "driver")?;
    if steps.is_empty() {
        teller.say(&format!("{version} is there: nothing to do"));
        return Ok(());
    }
    // All that can go wrong without anything being changed comes first.
    let installer = match steps.iter().any(|step| matches!(step, Step::Install(_))) {
        true => Some(fetch(app, &config, &teller, &source, &version)?),
        false => None,
    };
    if let Some(installed) = facts.record.as_ref().and_then(|record| record.installed.as_ref())
        && installer.is_some()
        && let Err(exit) = install::kept(app, &teller, installed)
    {
        app.story.warn(&format!("should this fail, there is no way back to {}: {exit}", installed.version));
    }
    let on = Host { app, config: &config, teller: &teller, may_load: !wish.defer };
    let run = Run { on, installer };
    let mut purged: &[String] = &[];
    let outcome = steps.iter().try_for_each(|step| {
        if let Step::Purge { .. } = step {
            purged = &facts.packages;
        }
        run.carry_out(step)
    });
    services::start_again(app);
    if let Err(exit) = outcome {
        // Whoever is without a driver now wants one first of all.
        let is_bare = !purged.is_empty() && facts::whole(app.kernel).is_none();
        return Err(if is_bare { exit.and(&plan::way_back(purged)) } else { exit });
    }
    let attached = attach::attached(app);
    if !attached.is_empty() {
        teller.say("containers that were given the GPU: gpu-handoff container sync --all brings them to this version");
    }
    kernels::owe(app)
}

/// The installer, in the cache from now on, and whether it is there because of this.
fn fetch(app: &App, config: &Config, teller: &Teller, source: &Source, version: &str) -> Result<(Installer, bool)> {
    let fetched = driver::fetch(app, source, &config.driver, version, teller)?;
    let is_copy = fetched.path != format!("{}/{}", driver::CACHE, fetched.name) || matches!(source, Source::Url(_));
    Ok((driver::keep(app, fetched)?, is_copy))
}

/// What [`setup`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, wish: &Wish) -> Result<String> {
    if wish.undo {
        return install::plan_undo(app, &app.config_for_hook());
    }
    let config = app.config_for_verb()?;
    let (source, version) = found(app, &config)?;
    let (steps, notes) = steps(app, &Facts::read(app, &config)?, &config, wish, &version, &source)?;
    if steps.is_empty() {
        return Ok(format!("nothing to do: driver {version} is there\n"));
    }
    let mut lines = Vec::new();
    if let Source::Url(url) = source {
        lines.push(row("download", &url));
    }
    lines.extend(steps.iter().map(Step::to_string));
    lines.extend(notes.iter().map(|note| row("note", note)));
    Ok(lines.iter().map(|line| format!("{line}\n")).collect())
}

fn found(app: &App, config: &Config) -> Result<(Source, String)> {
    driver::found(app, &config.driver)?
        .ok_or_else(|| Exit::refused(format!("{NONE} {}; nothing was touched", driver::CACHE)))
}

/// And what is worth knowing before.
fn steps(
    app: &App,
    facts: &Facts,
    config: &Config,
    wish: &Wish,
    version: &str,
    source: &Source,
) -> Result<(Vec<Step>, Vec<String>)> {
    if facts.is_busy {
        return Err(Exit::locked(
            "an installer that an earlier run started is still at work, see /var/log/gpu-handoff/driver.log: try again after \
             it",
        ));
    }
    let file = match source {
        Source::File(path) if !facts.has(version) => Some(path),
        _ => None,
    };
    let list = file.and_then(|path| supported::read(app.kernel, path, &facts.gpus));
    let wanted = Wanted {
        version,
        module: config.driver.module,
        dkms: config.driver.dkms,
        list: list.as_ref(),
        packed: file.and_then(|path| Some(fs::metadata(app.kernel.path(path)).ok()?.len() / (1024 * 1024))),
    };
    let steps = plan::plan(facts, wish, &wanted).map_err(|why| Exit::refused(format!("{why}; nothing was touched")))?;
    let notes = plan::notes(facts, &wanted, &steps);
    let is_install = steps.iter().any(|step| matches!(step, Step::Install(_)));
    match source {
        Source::Url(_) if is_install && (wish.defer || wish.offline) => {
            Err(Exit::refused(format!("driver {version} is not downloaded yet: gpu-handoff setup driver does that")))
        }
        _ => Ok((steps, notes)),
    }
}

struct Run<'a> {
    on: Host<'a>,
    /// And whether this program put it into the cache.
    installer: Option<(Installer, bool)>,
}

impl Run<'_> {
    fn carry_out(&self, step: &Step) -> Result<()> {
        match step {
            Step::Purge { packages, dkms } => {
                for module in dkms {
                    let what = format!("taking {module} out of dkms");
                    self.apart(&what, facts::DKMS, &["remove", module, "--all"])?;
                }
                let names: Vec<&str> = packages.iter().map(String::as_str).collect();
                if names.is_empty() { Ok(()) } else { self.apt("purge", &names) }
            }
            Step::Packages(packages) => {
                let names: Vec<&str> = packages.iter().map(String::as_str).collect();
                self.apt("install", &names)
            }
            Step::StopServices(units) => services::stop(self.on.app, units),
            Step::Install(install) => match &self.installer {
                Some((installer, is_copy)) => install::install(&self.on, installer, *is_copy, install),
                None => Ok(()),
            },
            Step::Load => load(self.on.app, self.on.config, &[], None),
        }
    }

    fn apt(&self, verb: &str, packages: &[&str]) -> Result<()> {
        let mut line = vec!["-q", "-y", "-o", "DPkg::Lock::Timeout=300"];
        line.extend(["-o", "Dpkg::Use-Pty=0", "--no-install-recommends", verb]);
        line.extend(packages);
        self.apart(&format!("apt-get {verb} {}", packages.join(" ")), APT, &line)
    }

    /// Not cut off: a package half installed is nobody's wish.
    fn apart(&self, what: &str, program: &str, arguments: &[&str]) -> Result<()> {
        self.on.teller.run_apart(what, record::LOCK, program, arguments, PACKAGES, &Apart::PLAIN)
    }
}

/// Takes back what was set up, and nothing else.
fn undo(app: &App) -> Result<()> {
    heed_termination();
    let _turn = services::take_turn(app)?;
    install::undo(app, &app.config_for_hook())
}
