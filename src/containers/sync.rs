//! Brings the driver in containers to the host's version.

use super::inside::Inside;
use super::seen::Seen;
use super::setup::{begin, fetch, hook, install, look, take_turn, verify, wanted};
use super::stages::{self, Stage, Wanted};
use super::{Who, attach, config, cuda};
use crate::App;
use crate::config::Config;
use crate::driver::{self, Source};
use crate::exit::{Exit, Result};
use crate::gpu::containers;

/// # Errors
/// When a container stands still, or could not be brought to the host's version; the others are, all the same.
pub fn sync(app: &App, who: Who) -> Result<()> {
    begin(app);
    let config = app.config_for_verb()?;
    let ctids = whom(app, who)?;
    let wanted = wanted(app, &config, false)?;
    let source = driver::source(app, &config.driver, &wanted.driver);
    let mut failed = Vec::new();
    for ctid in &ctids {
        match sync_one(app, *ctid, &config, &wanted, &source) {
            Ok(how) => app.story.say(&format!("container {ctid}: {how}")),
            Err(exit) if app.kernel.is_asked_to_end() || matches!(who, Who::One(_)) => return Err(exit),
            Err(exit) => {
                app.story.warn(&exit.to_string());
                failed.push(ctid.to_string());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Exit::failed(format!(
        "{} of {} containers are not in step with the host: {}",
        failed.len(),
        ctids.len(),
        failed.join(", ")
    )))
}

/// What [`sync`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_sync(app: &App, who: Who) -> Result<String> {
    let config = app.config_for_verb()?;
    let ctids = whom(app, who)?;
    let wanted = wanted(app, &config, false)?;
    let mut text = String::new();
    for ctid in ctids {
        let lines = match what_to_sync(app, ctid, &wanted) {
            Ok(ToSync::Leave(why)) => vec![why],
            Ok(ToSync::Install(todo)) => todo.iter().map(Stage::to_string).collect(),
            Err(exit) => vec![exit.to_string()],
        };
        for line in lines {
            text.push_str(&format!("container {ctid}: {line}\n"));
        }
    }
    Ok(text)
}

pub(super) enum ToSync {
    /// For this reason.
    Leave(String),
    Install(Vec<Stage>),
}

pub(super) fn what_to_sync(app: &App, ctid: u32, wanted: &Wanted) -> Result<ToSync> {
    if !containers::runs(app.kernel, ctid) {
        let later = format!("is stopped: gpu-handoff container sync {ctid} once it runs");
        return Ok(ToSync::Leave(later));
    }
    let seen = look(app, ctid, wanted)?;
    if let Some(hook) = hook(app, ctid) {
        let driver = seen.driver().unwrap_or_default();
        return Ok(ToSync::Leave(match driver == wanted.driver {
            true => format!("has driver {driver} of the host, by LXC's own hook"),
            false => {
                format!("gets the host's driver by LXC's own hook ({hook}) when it starts again: pct reboot {ctid}")
            }
        }));
    }
    if seen.libcuda.is_empty() && !seen.is_installing {
        return Ok(ToSync::Leave(format!("has no driver: gpu-handoff container setup {ctid} installs it")));
    }
    let todo = stages::stages(&seen, wanted);
    if todo.is_empty() {
        return Ok(ToSync::Leave(format!("has driver {} already", wanted.driver)));
    }
    stages::check(ctid, &seen, wanted, &todo).map_err(Exit::refused)?;
    stages::check_space(ctid, &seen, &todo, None).map_err(Exit::refused)?;
    warn_about_cuda(app, ctid, &seen, wanted);
    Ok(ToSync::Install(todo))
}

pub(super) fn sync_one(
    app: &App,
    ctid: u32,
    config: &Config,
    wanted: &Wanted,
    source: &Result<Source>,
) -> Result<String> {
    let _turn = take_turn(app, ctid)?;
    if attach::refresh(app, ctid)? {
        app.story.say(&format!("container {ctid}: its rules are up to date now; they count from its next start"));
    }
    let todo = match what_to_sync(app, ctid, wanted)? {
        ToSync::Leave(why) if !containers::runs(app.kernel, ctid) => {
            return Err(Exit::failed(format!("container {ctid} {why}")));
        }
        ToSync::Leave(why) => return Ok(why),
        ToSync::Install(todo) => todo,
    };
    if todo.iter().any(|stage| matches!(stage, Stage::Driver { .. })) {
        source.clone()?;
    }
    let inside = Inside::new(app, ctid)?;
    let fetched = fetch(&inside, config, wanted, source, &todo)?;
    todo.iter().try_for_each(|stage| install(&inside, wanted, &fetched, stage))?;
    fetched.forget(app);
    verify(app, ctid, wanted)?;
    Ok(format!("has driver {}", wanted.driver))
}

/// The toolkit that is there stays; but it may be too new for the driver.
pub(super) fn warn_about_cuda(app: &App, ctid: u32, seen: &Seen, wanted: &Wanted) {
    let release = seen.nvcc.iter().filter_map(|text| cuda::Release::parse(text)).min();
    if let (Some(release), Ok(driver)) = (release, wanted.driver.parse())
        && let cuda::Fit::No(first) | cuda::Fit::Partly(first) = cuda::fit(release, driver)
    {
        app.story.warn(&format!("container {ctid}: its CUDA {release} was made for drivers from {first} on"));
    }
}

pub(super) fn whom(app: &App, who: Who) -> Result<Vec<u32>> {
    let attached = attach::attached(app);
    match who {
        Who::All => Ok(attached),
        Who::One(ctid) if attached.contains(&ctid) => Ok(vec![ctid]),
        // By lines that are not ours: named, it is meant.
        Who::One(ctid) if containers::config(app.kernel, ctid).is_some_and(|ct| containers::has_nvidia(&ct)) => {
            Ok(vec![ctid])
        }
        Who::One(ctid) => {
            // A VM is set up in another way, and what does not exist in none.
            config::read(app.kernel, ctid)?;
            Err(Exit::refused(format!("container {ctid} was not given a GPU: gpu-handoff container setup {ctid}")))
        }
    }
}
