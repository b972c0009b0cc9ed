//! Running NVIDIA's installer on the host, back to the version before should it fail too late, and taking a driver out.

use super::facts::{self, Facts};
use super::record::{self, Installed, Record};
use super::{LOAD, MODPROBE, load};
use crate::App;
use crate::config::{Config, Driver, Policy};
use crate::driver::flags;
use crate::driver::kind::Kind;
use crate::driver::{self, CACHE, Installer, Source, file_name};
use crate::setup::pending::{self, Task};
use crate::stop::{Result, Stop};
use crate::sys::Kernel;
use crate::teller::Teller;
use std::fs;
use std::time::Duration;

/// Held by an installer while it runs, also when the run that started it is gone.
pub const LOCK: &str = "/run/gpu-handoff/driver.lock";

/// Compiling the modules on a small machine. Beyond that only what has not begun to uninstall is ended.
const LIMIT: Duration = Duration::from_secs(3600);

const SH: &str = "/bin/sh";
const DEPMOD: &str = "/usr/sbin/depmod";

/// Where the installer tells of itself, and what it says (nvidia-installer's run_existing_uninstaller) when there is no
/// way back.
const LOG: &str = "/var/log/nvidia-installer.log";
const POINT_OF_NO_RETURN: &str = "Uninstalling the previous installation";
const UNINSTALLER: &str = "/usr/bin/nvidia-uninstall";

/// Lines of its log that are quoted when it failed.
const QUOTED: usize = 6;

/// # Errors
/// What went wrong, and which driver is there now.
pub fn install(
    app: &App,
    config: &Config,
    teller: &Teller,
    installer: &Installer,
    kind: Option<Kind>,
    dkms: bool,
    is_copy: bool,
) -> Result<()> {
    let mut before = record::read(&app.kernel)?.unwrap_or_default();
    let version = version_of(installer);
    if is_copy && !before.copies.contains(&version) {
        before.copies.push(version.clone());
    }
    // Whoever is killed in between leaves word.
    record::write(&app.kernel, &Record { began: Some(version.clone()), ..before.clone() })?;
    let old = whole(app);
    let failed = match run_and_load(app, config, teller, installer, kind, dkms) {
        Ok(()) => return finish(app, before, installer, kind, dkms),
        Err(stop) => stop,
    };
    let now = whole(app);
    if now == old && now.is_some() {
        record::write(&app.kernel, &before)?;
        let old = old.unwrap_or_default();
        return Err(Stop { message: format!("{}; driver {old} is there as before", failed.message), ..failed });
    }
    let Some(back) = before.installed.clone().filter(|back| back.version != version) else {
        // It stays on record as begun: the next run installs it anew.
        return Err(Stop { message: format!("{}; try again: gpu-handoff setup driver", failed.message), ..failed });
    };
    app.story.warn(&failed.message);
    let again = kept(app, teller, &back)
        .and_then(|installer| run_and_load(app, config, teller, &installer, back.kind, back.dkms));
    match again {
        Ok(()) => {
            record::write(&app.kernel, &before)?;
            Err(Stop::failed(format!("driver {version} could not be installed; {} is there again", back.version)))
        }
        Err(stop) => Err(Stop::failed(format!(
            "driver {version} could not be installed, nor {} again: {}; there is no driver now, mend that and: gpu-handoff \
             setup driver",
            back.version, stop.message
        ))),
    }
}

fn version_of(installer: &Installer) -> String {
    let name = installer.name.strip_prefix("NVIDIA-Linux-x86_64-").unwrap_or(&installer.name);
    name.strip_suffix(".run").unwrap_or(name).to_string()
}

/// The version that is there whole.
fn whole(app: &App) -> Option<String> {
    let version = facts::on_disk(&app.kernel, &facts::running(&app.kernel))?;
    (facts::libraries(&app.kernel) == [version.clone()]).then_some(version)
}

/// The installer of a driver that was set up: the very file, nothing else is run.
///
/// # Errors
/// When it is gone or has changed.
pub fn kept(app: &App, teller: &Teller, installed: &Installed) -> Result<Installer> {
    let path = format!("{CACHE}/{}", file_name(&installed.version));
    if !app.kernel.exists(&path) {
        return Err(Stop::refused(format!("the installer {path} is gone: put it there again")));
    }
    let config = Driver { sha256: Some(installed.sha256.clone()), ..Driver::default() };
    driver::fetch(app, &Source::File(path), &config, &installed.version, teller)
}

fn run_and_load(
    app: &App,
    config: &Config,
    teller: &Teller,
    installer: &Installer,
    kind: Option<Kind>,
    dkms: bool,
) -> Result<()> {
    let version = version_of(installer);
    let flags = flags::host(&version, kind, dkms, facts::key(&app.kernel).as_ref());
    run(app, teller, &format!("installing {version}"), installer, &flags, LIMIT)?;
    let release = facts::running(&app.kernel);
    if facts::on_disk(&app.kernel, &release).as_deref() != Some(version.as_str()) {
        return Err(Stop::failed(format!(
            "driver: the installer succeeded, but kernel {release} has no nvidia module of version {version} (log: {LOG})"
        )));
    }
    load(app, config, Some(&version))
}

/// # Errors
/// The installer's words; more of its log is quoted before.
pub fn run(
    app: &App,
    teller: &Teller,
    what: &str,
    installer: &Installer,
    flags: &[String],
    limit: Duration,
) -> Result<()> {
    let had_uninstaller = app.kernel.exists(UNINSTALLER);
    // What an earlier one told must not be taken for what this one does.
    let _ = fs::remove_file(app.kernel.path(LOG));
    let may_end = || {
        let is_gone = had_uninstaller && !app.kernel.exists(UNINSTALLER);
        !is_gone && !app.kernel.text(LOG).is_some_and(|log| log.contains(POINT_OF_NO_RETURN))
    };
    let path = app.kernel.path(&installer.path);
    let path = path.to_string_lossy();
    let mut line: Vec<&str> = vec![&path];
    line.extend(flags.iter().map(String::as_str));
    let done = teller.run_apart(what, LOCK, SH, &line, limit, &may_end);
    if done.is_err() && !app.kernel.is_asked_to_end() {
        quote(app);
    }
    done
}

/// The lines of the installer's log that say what is wrong, or else its last ones.
fn quote(app: &App) {
    let log = app.kernel.text(LOG).unwrap_or_default();
    let lines = || log.lines().map(str::trim_end).filter(|line| !line.trim().is_empty());
    let mut telling: Vec<&str> = lines().filter(|line| line.to_ascii_lowercase().contains("error")).collect();
    if telling.is_empty() {
        telling = lines().collect();
    }
    for line in &telling[telling.len().saturating_sub(QUOTED)..] {
        app.story.say(&format!("  {LOG}: {}", line.escape_debug()));
    }
}

/// It is there: what is on record from now on, and which installers need not be kept any longer.
fn finish(app: &App, before: Record, installer: &Installer, kind: Option<Kind>, dkms: bool) -> Result<()> {
    let version = version_of(installer);
    let previous = before.installed.map(|one| one.version).filter(|previous| *previous != version);
    let (copies, old): (Vec<String>, Vec<String>) =
        before.copies.into_iter().partition(|copy| *copy == version || previous.as_ref() == Some(copy));
    for version in old {
        let _ = fs::remove_file(app.kernel.path(&format!("{CACHE}/{}", file_name(&version))));
    }
    let release = facts::running(&app.kernel);
    let installed = Installed { version, sha256: installer.sha256.clone(), kind, dkms, kernels: vec![release.clone()] };
    record::write(&app.kernel, &Record { installed: Some(installed), began: None, copies })?;
    pending::note(app, Task::Kernel(release), &Ok(()))?;
    Ok(())
}

/// What [`undo`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_undo(app: &App) -> Result<String> {
    Ok(match undoable(app)? {
        None => "nothing to do: gpu-handoff has installed no driver\n".to_string(),
        Some((record, _)) => {
            let version = record.installed.map(|one| one.version).or(record.began).unwrap_or_default();
            format!("{:<9} driver {version}\n", "remove")
        }
    })
}

fn undoable(app: &App) -> Result<Option<(Record, Facts)>> {
    let Some(record) = record::read(&app.kernel)? else { return Ok(None) };
    let facts = Facts::read(app, &Policy::default(), false)?;
    let nothing = "nothing was touched";
    if let Some(holder) = facts.holders.first() {
        return Err(Stop::refused(format!("the driver is in use: {holder}: {}; {nothing}", holder.remedy())));
    }
    if let Some(owner) = app.store.each_record().into_iter().flatten().map(|record| record.owner).next() {
        return Err(Stop::refused(format!("the GPU is with {owner}, and would have no driver at home; {nothing}")));
    }
    if facts.is_handoff_under_way {
        return Err(Stop::refused(format!(
            "a GPU is changing hands right now: try again when that is over; {nothing}"
        )));
    }
    Ok(Some((record, facts)))
}

/// # Errors
/// Who is in the way, or what could not be removed; the next call goes on from there.
pub fn undo(app: &App) -> Result<()> {
    let Some((mut record, facts)) = undoable(app)? else {
        app.story.say("nothing to do: gpu-handoff has installed no driver");
        return Ok(());
    };
    let teller = Teller::new(app, "driver", "driver")?;
    if facts.loaded.is_some() {
        let modules = ["-r", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia"];
        app.kernel
            .program(MODPROBE, &modules, LOAD)
            .map_err(|error| Stop::failed(format!("driver: its modules cannot be unloaded: {error}")))?;
    }
    record.began = record.began.or_else(|| record.installed.as_ref().map(|one| one.version.clone()));
    record::write(&app.kernel, &record)?;
    if app.kernel.exists(UNINSTALLER) {
        teller.run_apart("uninstalling", LOCK, UNINSTALLER, &["--silent"], LIMIT, &|| false)?;
    }
    // Those for other kernels may not be in the uninstaller's list.
    for release in record.installed.iter().flat_map(|one| &one.kernels) {
        remove_modules(app, release)?;
    }
    for version in &record.copies {
        let _ = fs::remove_file(app.kernel.path(&format!("{CACHE}/{}", file_name(version))));
    }
    let pending = pending::Pending::read(&app.kernel)?;
    for task in pending.0.into_keys().filter(|task| *task != Task::Vfio) {
        pending::note(app, task, &Ok(()))?;
    }
    record::remove(&app.kernel)?;
    teller.say("removed");
    Ok(())
}

/// Where nvidia-installer puts them.
fn remove_modules(app: &App, release: &str) -> Result<()> {
    let folder = format!("/lib/modules/{release}/kernel/drivers/video");
    let modules = ["nvidia.ko", "nvidia-uvm.ko", "nvidia-modeset.ko", "nvidia-drm.ko", "nvidia-peermem.ko"];
    let mut removed = false;
    for name in app.kernel.list(&folder) {
        if modules.iter().any(|module| name.starts_with(module)) {
            let path = format!("{folder}/{name}");
            fs::remove_file(app.kernel.path(&path)).map_err(|error| Stop::failed(format!("{path}: {error}")))?;
            removed = true;
        }
    }
    if removed {
        let _ = fs::remove_dir(app.kernel.path(&folder));
        app.kernel
            .program(DEPMOD, &[release], LOAD)
            .map_err(|error| Stop::failed(format!("{DEPMOD} {release}: {error}")))?;
    }
    Ok(())
}
