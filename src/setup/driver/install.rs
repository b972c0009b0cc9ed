//! Running NVIDIA's installer on the host, back to the version before should it fail too late, and taking a driver out.

use super::facts::{self, Facts};
use super::load::{LOAD, load};
use super::plan::Install;
use super::record::{self, Installation, Installed, LOCK};
use super::{services, why};
use crate::App;
use crate::config::{Config, Driver};
use crate::driver::flags;
use crate::driver::flavour::Flavour;
use crate::driver::{self, CACHE, Installer, Source, file_name};
use crate::exit::{Exit, Result};
use crate::gpu::nvidia;
use crate::setup::kept::pending::{self, Task};
use crate::story::row;
use crate::sys::{Action, Kernel};
use crate::teller::{Apart, Teller};
use std::time::Duration;

/// Compiling the modules on a small machine. Beyond that only what has not begun to uninstall is ended.
const LIMIT: Duration = Duration::from_secs(30 * 60);

const SH: &str = "/bin/sh";
const DEPMOD: &str = "/usr/sbin/depmod";

/// Where the installer tells of itself, and what it says when there is no way back: it uninstalls (nvidia-installer's
/// run_existing_uninstaller), or has begun to copy files (do_install).
const LOG: &str = "/var/log/nvidia-installer.log";
const POINTS_OF_NO_RETURN: [&str; 2] = ["-> Uninstalling ", "Installing '"];
const UNINSTALLER: &str = "/usr/bin/nvidia-uninstall";

/// What installing works with.
pub struct Host<'a> {
    pub app: &'a App<'a>,
    pub config: &'a Config,
    pub teller: &'a Teller<'a>,
    pub may_load: bool,
}

/// # Errors
/// What went wrong, and which driver is there now.
pub fn install(on: &Host, installer: &Installer, is_copy: bool, wanted: &Install) -> Result<()> {
    let app = on.app;
    let Install { version, flavour, dkms, .. } = wanted;
    let mut before = record::read(app.kernel)?.unwrap_or_default();
    if is_copy && !before.copies.contains(version) {
        before.copies.push(version.clone());
    }
    let loaded = loaded(app.kernel);
    // Whoever is killed in between leaves word.
    record::write(app.kernel, &Installation { began: Some(version.clone()), ..before.clone() })?;
    // What the installer said is no matter when all of it is there.
    let failed = run_installer(on, installer, *flavour, *dkms).err();
    let has_begun = has_uninstalled(app);
    if facts::whole(app.kernel).as_ref() == Some(version) && (failed.is_none() || has_begun) {
        failed.iter().for_each(|exit| app.story.warn(&exit.to_string()));
        finish(app, &before, installer, *flavour, *dkms)?;
        return load_new(on, &before, &loaded, version);
    }
    let failed = failed.unwrap_or_else(|| {
        Exit::failed(format!("driver: the installer succeeded, but not all of {version} is there (log: {LOG})"))
    });
    if !has_begun {
        put_back(app, &before)?;
        // It takes out the modules before it builds.
        let again = reload(on, &loaded);
        let there = facts::whole(app.kernel).map(|old| format!("driver {old} is there as before"));
        return Err(there.into_iter().chain(again).fold(failed, |failed, more| failed.and(&more)));
    }
    app.story.warn(&failed.to_string());
    let old = go_back(on, &before, &loaded, version)?;
    Err(failed.of(&format!("driver {version} could not be installed, {old} is there again")))
}

/// With the record from before, if there was any.
fn put_back(app: &App, before: &Installation) -> Result<()> {
    if *before == Installation::default() {
        Ok(record::remove(app.kernel)?)
    } else {
        Ok(record::write(app.kernel, before)?)
    }
}

/// It is whole, so it stays unless it cannot be loaded and the one before could.
fn load_new(on: &Host, before: &Installation, loaded: &[String], version: &str) -> Result<()> {
    if !on.may_load {
        return Ok(());
    }
    let Err(exit) = load(on.app, on.config, loaded, Some(version)) else { return Ok(()) };
    let stays = |why: String| Exit::failed(format!("driver {version} is installed, but {why}"));
    if let Some(other) = nvidia::version_as_written(on.app.kernel) {
        return Err(stays(if other == version {
            exit.to_string()
        } else {
            format!("{other} was loaded meanwhile: reboot the host, or stop what uses it and unload nvidia")
        }));
    }
    if before.installed.as_ref().is_none_or(|old| old.version == version) {
        return Err(stays(exit.to_string()));
    }
    on.app.story.warn(&exit.to_string());
    let old = go_back(on, before, loaded, version)?;
    Err(Exit::failed(exit.trouble.of(&format!("driver {version} cannot be loaded, {old} is there again"))))
}

/// Back to the driver on record, after the other took its place; which that is.
fn go_back(on: &Host, before: &Installation, loaded: &[String], version: &str) -> Result<String> {
    let app = on.app;
    // It stays on record as begun: the next run installs it anew.
    let began = Installation { began: Some(version.to_string()), ..before.clone() };
    record::write(app.kernel, &began)?;
    let Some(back) = before.installed.as_ref().filter(|back| back.version != version) else {
        return Err(Exit::failed(format!(
            "driver {version} is not installed whole, and there is none to go back to: fix what the log tells ({LOG}), \
             then: gpu-handoff setup driver"
        )));
    };
    let again = kept(app, on.teller, back)
        .and_then(|installer| run_installer(on, &installer, back.flavour, back.dkms))
        .map_err(|exit| exit.to_string());
    if facts::whole(app.kernel).as_ref() != Some(&back.version) {
        let why = again.err().unwrap_or_else(|| "it is not whole".to_string());
        return Err(Exit::failed(format!(
            "driver {version} could not be installed, nor {} again: {why}; there is no driver now: fix that, then: \
             gpu-handoff setup driver",
            back.version
        )));
    }
    record::write(app.kernel, before)?;
    reload(on, loaded).iter().for_each(|trouble| app.story.warn(trouble));
    Ok(back.version.clone())
}

/// What was loaded before an installer took it out; what went wrong.
fn reload(on: &Host, loaded: &[String]) -> Option<String> {
    if loaded.is_empty() || !on.may_load {
        return None;
    }
    load(on.app, on.config, loaded, None).err().map(|exit| exit.to_string())
}

/// Modules of the driver that are loaded, in the order in which they can be.
fn loaded(kernel: &dyn Kernel) -> Vec<String> {
    let mut loaded = nvidia::unload_order(kernel, "nvidia").unwrap_or_default();
    loaded.reverse();
    loaded.retain(|module| kernel.exists(&format!("/sys/module/{module}")));
    loaded
}

/// The installer of a driver that was set up: the very file, nothing else is run.
///
/// # Errors
/// When it is gone or has changed.
pub fn kept(app: &App, teller: &Teller, installed: &Installed) -> Result<Installer> {
    let path = format!("{CACHE}/{}", file_name(&installed.version));
    if !app.kernel.exists(&path) {
        return Err(Exit::refused(format!("the installer {path} is gone: put it there again")));
    }
    let source = Source::File(path.clone());
    let installer = driver::fetch(app, &source, &Driver::default(), &installed.version, teller)?;
    match installer.sha256 == installed.sha256 {
        true => Ok(installer),
        false => {
            Err(Exit::refused(format!("the installer {path} is not the one that was installed: put that there again")))
        }
    }
}

fn run_installer(on: &Host, installer: &Installer, flavour: Option<Flavour>, dkms: bool) -> Result<()> {
    let version = &installer.version;
    let flags = flags::host(version, flavour, dkms, facts::key(on.app.kernel).as_ref());
    execute(on.app, on.teller, &format!("installing {version}"), installer, &flags, LIMIT)
}

/// Whether the installer that ran last took the old driver out.
fn has_uninstalled(app: &App) -> bool {
    app.kernel.text(LOG).is_some_and(|log| POINTS_OF_NO_RETURN.iter().any(|words| log.contains(words)))
}

/// # Errors
/// What went wrong, in the words of the compiler or whoever else said so.
pub fn execute(
    app: &App,
    teller: &Teller,
    what: &str,
    installer: &Installer,
    flags: &[String],
    limit: Duration,
) -> Result<()> {
    // What an earlier one told must not be taken for what this one does.
    let _ = app.kernel.remove_file(LOG);
    let log = || app.kernel.text(LOG).unwrap_or_default();
    let about = Apart {
        may_end: &|| !has_uninstalled(app),
        so_far: &|| why::progress(&log()).unwrap_or_default(),
        why: &|| Some(why::causes(&log())).filter(|causes| !causes.is_empty()).map(|causes| causes.join(" | ")),
    };
    let path = app.kernel.path(&installer.path);
    let path = path.to_string_lossy();
    let mut line: Vec<&str> = vec![&path];
    line.extend(flags.iter().map(String::as_str));
    teller.run_apart(what, LOCK, SH, &line, limit, &about).map_err(|exit| {
        let is_there = app.kernel.exists(LOG) && !app.kernel.is_asked_to_end();
        if is_there { exit.and(&format!("all of it: {LOG}")) } else { exit }
    })
}

/// It is there: what is on record from now on, and which installers need not be kept any longer.
fn finish(app: &App, before: &Installation, installer: &Installer, flavour: Option<Flavour>, dkms: bool) -> Result<()> {
    let version = installer.version.clone();
    let previous = before.installed.as_ref().map(|one| &one.version).filter(|previous| **previous != version);
    let (copies, old): (Vec<String>, Vec<String>) =
        before.copies.iter().cloned().partition(|copy| *copy == version || previous == Some(copy));
    for version in old {
        let _ = app.kernel.remove_file(&format!("{CACHE}/{}", file_name(&version)));
    }
    let release = facts::running(app.kernel);
    let installed =
        Installed { version, sha256: installer.sha256.clone(), flavour, dkms, kernels: vec![release.clone()] };
    record::write(app.kernel, &Installation { installed: Some(installed), began: None, copies })?;
    pending::note(app, &Task::Kernel(release), &Ok(()))
}

/// What [`undo`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_undo(app: &App, config: &Config) -> Result<String> {
    Ok(match undoable(app, config)? {
        None => format!("{NOTHING}\n"),
        Some((_, _, version)) => row("remove", &format_args!("driver {version}\n")),
    })
}

const NOTHING: &str = "nothing to do: gpu-handoff has installed no driver that is still there";

/// What is there because of this program, and which version it is.
fn undoable(app: &App, config: &Config) -> Result<Option<(Installation, Facts, String)>> {
    let Some(record) = record::read(app.kernel)? else { return Ok(None) };
    let facts = Facts::read(app, config)?;
    let ours = record.installed.iter().map(|one| &one.version).chain(&record.began);
    // Whatever else is there, somebody else put it there.
    let is_there = |version: &&String| facts.libraries.contains(version) || record.began.as_ref() == Some(*version);
    let Some(version) = ours.clone().find(is_there).cloned() else { return Ok(None) };
    let nothing = "nothing was touched";
    if facts.is_busy {
        return Err(Exit::locked("an installer that an earlier run started is still at work: try again after it"));
    }
    if let Some(holder) = facts.holders.first() {
        return Err(Exit::refused(format!("the driver is in use: {holder}: {}; {nothing}", holder.remedy())));
    }
    if let Some(owner) = app.store.each_record().into_iter().flatten().map(|record| record.owner).next() {
        return Err(Exit::refused(format!("the GPU is with {owner}, and would have no driver at home; {nothing}")));
    }
    if facts.is_handoff_under_way {
        return Err(Exit::refused(format!(
            "a GPU is changing hands right now: try again when that is over; {nothing}"
        )));
    }
    Ok(Some((record, facts, version)))
}

/// # Errors
/// Who is in the way, or what could not be removed; the next call goes on from there.
pub fn undo(app: &App, config: &Config) -> Result<()> {
    let undoable = undoable(app, config)?;
    // What was left for later is not wanted any more.
    pending::change(app, |pending| pending.0.retain(|task, _| *task == Task::Vfio))?;
    let Some((mut record, facts, version)) = undoable else {
        record::remove(app.kernel)?;
        app.story.say(NOTHING);
        return Ok(());
    };
    let teller = Teller::new(app, "driver", "driver")?;
    if !facts.services.is_empty() {
        services::stop(app, &facts.services)?;
    }
    let unloaded = unload(app);
    if unloaded.is_err() {
        services::start_again(app);
        return unloaded;
    }
    // They go with the driver.
    services::forget(app)?;
    record.began = Some(version.clone());
    record::write(app.kernel, &record)?;
    if app.kernel.exists(UNINSTALLER) {
        teller.run_apart("uninstalling", LOCK, UNINSTALLER, &["--silent"], LIMIT, &Apart::PLAIN)?;
    }
    // Those for other kernels may not be in the uninstaller's list.
    for release in record.installed.iter().flat_map(|one| &one.kernels) {
        remove_modules(app, release)?;
    }
    // It says nothing when it fails.
    if facts::libraries(app.kernel).contains(&version) {
        return Err(Exit::failed(format!("driver {version} is still there, see /var/log/nvidia-uninstall.log")));
    }
    for version in &record.copies {
        let _ = app.kernel.remove_file(&format!("{CACHE}/{}", file_name(version)));
    }
    record::remove(app.kernel)?;
    teller.say(&format!("{version} is removed"));
    Ok(())
}

fn unload(app: &App) -> Result<()> {
    if !app.kernel.exists("/sys/module/nvidia") {
        return Ok(());
    }
    let order = nvidia::unload_order(app.kernel, "nvidia")
        .map_err(|holder| Exit::refused(format!("module {holder} uses the driver: modprobe -r {holder}")))?;
    let before = loaded(app.kernel);
    for module in order {
        if let Err(error) = app.kernel.act(&Action::Unload { module: module.clone() }, LOAD) {
            let _ = app.kernel.act(&Action::Load { modules: before }, LOAD);
            return Err(Exit::failed(format!("module {module} cannot be unloaded: {error}")));
        }
    }
    Ok(())
}

/// From where nvidia-installer puts them.
///
/// # Errors
/// What could not be removed.
pub fn remove_modules(app: &App, release: &str) -> Result<()> {
    let folder = format!("/lib/modules/{release}/kernel/drivers/video");
    let modules = ["nvidia.ko", "nvidia-uvm.ko", "nvidia-modeset.ko", "nvidia-drm.ko", "nvidia-peermem.ko"];
    let mut removed = false;
    for name in app.kernel.list(&folder) {
        if modules.iter().any(|module| name.starts_with(module)) {
            let path = format!("{folder}/{name}");
            app.kernel.remove_file(&path).map_err(|error| Exit::failed(format!("{path}: {error}")))?;
            removed = true;
        }
    }
    if removed {
        let _ = app.kernel.remove_folder(&folder);
        app.kernel
            .program(DEPMOD, &[release], LOAD)
            .map_err(|error| Exit::failed(format!("{DEPMOD} {release}: {error}")))?;
    }
    Ok(())
}
