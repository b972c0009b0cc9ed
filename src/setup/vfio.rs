//! `setup vfio`: vfio-pci is loaded at boot, before the NVIDIA driver, and no framebuffer driver takes the card first.
//!
//! Two files of ours, and the initramfs, which has copies of one of them. With `--cmdline` the kernel's command line as
//! well, see [`super::bootloader`]. Whatever is killed half-way is finished by the next run.

use super::bootloader::{self, Bootloader};
use super::conflicts;
use super::ours::{LIMIT, MARK, own};
use crate::App;
use crate::config::{Config, Home};
use crate::driver;
use crate::driver::rival::{self, RIVALS};
use crate::exit::{Exit, Result};
use crate::modprobe;
use crate::story::titled;
use crate::sys::Kernel;
use crate::trouble::Trouble;

pub use super::ours::Wish;

const LOAD: &str = "/etc/modules-load.d/gpu-handoff.conf";
const MODPROBE: &str = "/etc/modprobe.d/gpu-handoff.conf";

const NVIDIAFB: &str = "nvidiafb";

const UPDATE_INITRAMFS: &str = "/usr/sbin/update-initramfs";

/// While the initramfs may not have what the files say.
pub const PENDING: &str = "/var/lib/gpu-handoff/initramfs-pending";

const REBOOT: &str = "/run/reboot-required";
const REBOOT_BY: &str = "/run/reboot-required.pkgs";
const NAME: &str = "gpu-handoff";

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Write { path: &'static str, text: String },
    Remove { path: &'static str },
    Initramfs,
}

const TITLE: &str = "setup vfio";
const NOTHING: &str = "nothing to do: the host is prepared as it should be";

/// How the host is.
struct Facts {
    load: Option<String>,
    modprobe: Option<String>,
    /// NVIDIA's driver is there or about to be.
    has_nvidia: bool,
    /// Modules that would take a card before NVIDIA's driver does.
    rivals: Vec<String>,
    has_initramfs_tools: bool,
    is_pending: bool,
}

impl Facts {
    fn read(app: &App, config: &Config) -> Result<Facts> {
        let kernel = app.kernel;
        let modprobe = own(kernel, MODPROBE)?;
        Ok(Facts {
            load: own(kernel, LOAD)?,
            rivals: rivals(kernel, config, modprobe.as_deref()),
            modprobe,
            has_nvidia: has_nvidia(kernel) || is_wanted(app, config),
            has_initramfs_tools: kernel.exists(UPDATE_INITRAMFS),
            is_pending: kernel.exists(PENDING),
        })
    }

    /// What the two files shall say.
    fn wanted(&self) -> (String, String) {
        let load = format!("{MARK}vfio\nvfio_iommu_type1\nvfio_pci\n");
        let mut modprobe = format!(
            "{MARK}# It would take the card's screen, and nobody could take that back.\nblacklist {NVIDIAFB}\n\
             # First, so that the numbers of NVIDIA's devices are the same at each boot.\nsoftdep nvidia pre: vfio-pci\n"
        );
        if self.has_nvidia && !self.rivals.is_empty() {
            modprobe.push_str("# They would take the card before the NVIDIA driver does.\n");
            modprobe.extend(self.rivals.iter().map(|module| format!("blacklist {module}\n")));
        }
        (load, modprobe)
    }

    /// Pure.
    fn plan(&self, undo: bool) -> Vec<Step> {
        let (load, modprobe) = self.wanted();
        let mut steps = Vec::new();
        let mut settle = |path, now: &Option<String>, wanted: String| match (now, undo) {
            (Some(_), true) => steps.push(Step::Remove { path }),
            (None, true) => {}
            (Some(text), false) if *text == wanted => {}
            (_, false) => steps.push(Step::Write { path, text: wanted }),
        };
        settle(LOAD, &self.load, load);
        settle(MODPROBE, &self.modprobe, modprobe);
        // The initramfs has copies of what is in modprobe.d, not of what is loaded later.
        let is_old = steps
            .iter()
            .any(|step| matches!(step, Step::Write { path, .. } | Step::Remove { path } if *path == MODPROBE));
        if (is_old || self.is_pending) && self.has_initramfs_tools {
            steps.push(Step::Initramfs);
        }
        steps
    }
}

impl Step {
    fn to_text(&self) -> String {
        match self {
            Step::Write { path, .. } => format!("write     {path}"),
            Step::Remove { path } => format!("remove    {path}"),
            Step::Initramfs => format!("run       {UPDATE_INITRAMFS} -u -k all"),
        }
    }
}

/// # Errors
/// What could not be done; what was done stays, and the next run goes on from there.
pub fn setup(app: &App, wish: Wish) -> Result<()> {
    let config = config(app, wish)?;
    let steps = Facts::read(app, &config)?.plan(wish.undo);
    let bootloader = Bootloader::read(app.kernel)?;
    let edit = bootloader.plan(wish)?;
    app.story.say(TITLE);
    for step in &steps {
        carry_out(app, step)?;
        app.story.say_below(&step.to_text());
    }
    if let Some(edit) = &edit {
        bootloader::carry_out(app, edit)?;
        app.story.say_below(&edit.to_text());
    }
    if steps.is_empty() && edit.is_none() {
        app.story.say_below(NOTHING);
    }
    if !wish.undo {
        for warning in conflicts::find(app, &config) {
            app.story.warn(&warning);
        }
        let off = iommu(app.kernel, &bootloader, wish).map(|trouble| trouble.to_string());
        app.story.say(off.as_deref().unwrap_or("the IOMMU is on"));
    }
    if !steps.is_empty() || edit.is_some() {
        app.story.say("reboot the host when you can: until then it runs with what it booted with");
        require_reboot(app)?;
    }
    Ok(())
}

/// A mistake in it is no reason to leave what was set up.
fn config(app: &App, wish: Wish) -> Result<Config> {
    if wish.undo { Ok(Config::default()) } else { app.config_for_verb() }
}

/// What [`setup`] would do now, as its log has it: a title, and a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, wish: Wish) -> Result<String> {
    let config = config(app, wish)?;
    let mut lines: Vec<String> = Facts::read(app, &config)?.plan(wish.undo).iter().map(Step::to_text).collect();
    let bootloader = Bootloader::read(app.kernel)?;
    lines.extend(bootloader.plan(wish)?.map(|edit| edit.to_text()));
    if lines.is_empty() {
        lines.push(NOTHING.to_string());
    }
    if !wish.undo {
        lines.extend(conflicts::find(app, &config).into_iter().map(|line| format!("found     {line}")));
    }
    Ok(titled(TITLE, &lines.join("\n")))
}

fn carry_out(app: &App, step: &Step) -> Result<()> {
    let kernel = app.kernel;
    let failed = |path: &str, error: std::io::Error| Exit::failed(format!("{path}: {error}"));
    match step {
        Step::Write { path, text } => {
            remember(app, path)?;
            kernel.write_file(path, text.as_bytes(), 0o644).map_err(|error| failed(path, error))
        }
        Step::Remove { path } => {
            remember(app, path)?;
            kernel.remove_file(path).map_err(|error| failed(path, error))
        }
        Step::Initramfs => {
            kernel.program(UPDATE_INITRAMFS, &["-u", "-k", "all"], LIMIT).map_err(|error| {
                Exit::failed(format!("{UPDATE_INITRAMFS} -u -k all: {error}; try again when that is fixed"))
            })?;
            forget(app)
        }
    }
}

/// Before the file is changed: whoever is killed in between leaves word.
fn remember(app: &App, path: &str) -> Result<()> {
    if path != MODPROBE {
        return Ok(());
    }
    app.kernel.write_file(PENDING, b"", 0o644).map_err(|error| Exit::failed(format!("{PENDING}: {error}")))
}

fn forget(app: &App) -> Result<()> {
    app.kernel.remove_file(PENDING).map_err(|error| Exit::failed(format!("{PENDING}: {error}")))
}

/// Those that are known; whoever else has a card now; and whom we kept away before, who shows no longer. Not the driver
/// that a card is to be at home on.
fn rivals(kernel: &dyn Kernel, config: &Config, ours: Option<&str>) -> Vec<String> {
    let mut rivals: Vec<String> = RIVALS.map(str::to_string).to_vec();
    rivals.extend(rival::on_cards(kernel, config).into_iter().filter_map(|rival| rival.module));
    let kept = ours.unwrap_or_default().lines().filter_map(|line| line.strip_prefix("blacklist "));
    rivals.extend(kept.filter(|module| *module != NVIDIAFB).map(str::to_string));
    let is_home = |module: &String| {
        config.homes.values().any(|home| matches!(home, Home::Driver(driver) if modprobe::module(driver) == *module))
    };
    let mut seen = Vec::new();
    for rival in rivals {
        if !is_home(&rival) && !seen.contains(&rival) {
            seen.push(rival);
        }
    }
    seen
}

/// There is an installer, or one is configured.
fn is_wanted(app: &App, config: &Config) -> bool {
    config.driver.is_configured() || driver::found(app, &config.driver).is_ok_and(|found| found.is_some())
}

/// Loaded, or among the running kernel's modules.
fn has_nvidia(kernel: &dyn Kernel) -> bool {
    let release = kernel.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    kernel.exists("/sys/module/nvidia") || driver::installed::find(kernel, &release).is_some()
}

/// That the IOMMU is off, and what to do then; none where it is on.
pub fn iommu(kernel: &dyn Kernel, bootloader: &Bootloader, wish: Wish) -> Option<Trouble> {
    if !kernel.list("/sys/kernel/iommu_groups").is_empty() {
        return None;
    }
    let firmware = "turn on VT-d (Intel) or AMD-Vi (AMD) in the firmware";
    let remedy = match wish.cmdline || bootloader.has_all() {
        true => format!("if it still is after a reboot, {firmware}"),
        false => format!("{firmware}, and let the kernel use it: gpu-handoff setup vfio --cmdline"),
    };
    Some(Trouble::new("the IOMMU is off", remedy).joined(": "))
}

/// As Debian's packages ask for a reboot.
fn require_reboot(app: &App) -> Result<()> {
    let failed = |error: std::io::Error| Exit::failed(format!("{REBOOT}: {error}"));
    let mut by = app.kernel.text(REBOOT_BY).unwrap_or_default();
    if !by.lines().any(|line| line == NAME) {
        if !by.is_empty() {
            by.push('\n');
        }
        by.push_str(NAME);
        by.push('\n');
        app.kernel.write_file(REBOOT_BY, by.as_bytes(), 0o644).map_err(failed)?;
    }
    app.kernel.write_file(REBOOT, b"*** System restart required ***\n", 0o644).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare() -> Facts {
        Facts {
            load: None,
            modprobe: None,
            has_nvidia: true,
            rivals: RIVALS.map(str::to_string).to_vec(),
            has_initramfs_tools: true,
            is_pending: false,
        }
    }

    fn done(facts: &Facts) -> Facts {
        let (load, modprobe) = facts.wanted();
        Facts { load: Some(load), modprobe: Some(modprobe), ..bare() }
    }

    fn told(steps: &[Step]) -> Vec<String> {
        steps.iter().map(Step::to_text).collect()
    }

    #[test]
    fn there_again_and_back() {
        let all = [
            "write     /etc/modules-load.d/gpu-handoff.conf",
            "write     /etc/modprobe.d/gpu-handoff.conf",
            "run       /usr/sbin/update-initramfs -u -k all",
        ];
        assert_eq!(told(&bare().plan(false)), all);
        assert!(done(&bare()).plan(false).is_empty());
        let back: Vec<String> = all.iter().map(|line| line.replace("write ", "remove")).collect();
        assert_eq!(told(&done(&bare()).plan(true)), back);
        assert!(bare().plan(true).is_empty());
    }

    #[test]
    fn only_what_the_initramfs_has_a_copy_of_renews_it() {
        let facts = Facts { load: None, ..done(&bare()) };
        assert_eq!(told(&facts.plan(false)), ["write     /etc/modules-load.d/gpu-handoff.conf"]);
        let killed = Facts { is_pending: true, ..done(&bare()) };
        assert_eq!(told(&killed.plan(false)), ["run       /usr/sbin/update-initramfs -u -k all"]);
        let undone = Facts { is_pending: true, ..bare() };
        assert_eq!(told(&undone.plan(true)), ["run       /usr/sbin/update-initramfs -u -k all"]);
        let without = Facts { has_initramfs_tools: false, ..bare() };
        assert_eq!(without.plan(false).len(), 2);
    }

    #[test]
    fn nouveau_goes_only_for_nvidia() {
        let blocks = |facts: Facts| facts.wanted().1.contains("blacklist nouveau\n");
        assert!(blocks(bare()));
        assert!(!blocks(Facts { has_nvidia: false, ..bare() }));
        assert!(!blocks(Facts { rivals: Vec::new(), ..bare() }));
        assert!(bare().wanted().1.ends_with("\nblacklist nouveau\nblacklist nova_core\nblacklist nova_drm\n"));
        assert!(bare().wanted().1.contains("blacklist nvidiafb\n"));
    }
}
