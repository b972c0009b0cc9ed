//! What installing a driver on the host takes, or why it is refused. Pure.

use super::facts::{Facts, Free};
use super::packages;
use crate::config::Module;
use crate::driver::builds;
use crate::driver::flags;
use crate::driver::flavour::{self, Flavour};
use crate::driver::supported::List;
use crate::story::row;
use std::fmt;

/// MiB that an installer needs at least where it unpacks itself and builds, and where it installs to.
const ROOM: (u64, u64) = (2048, 1024);

/// Of what is packed, so much is unpacked (610.57.04: 463 MB, 1.81 GB) and installed, in tenths; and MiB to build in.
const UNPACKED: u64 = 40;
const INSTALLED: u64 = 25;
const BUILT: u64 = 600;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    pub install_deps: bool,
    pub purge: bool,
    pub undo: bool,
    /// Only what can be done while dpkg runs: nothing is downloaded or loaded; the rest is left pending.
    pub defer: bool,
    /// Nothing is downloaded: guests wait for it.
    pub offline: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Packages and trees of dkms that hold another driver.
    Purge {
        packages: Vec<String>,
        dkms: Vec<String>,
    },
    /// What the installer needs.
    Packages(Vec<String>),
    /// To be started again in the end.
    StopServices(Vec<String>),
    Install(Install),
    Load,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Install {
    pub version: String,
    pub instead_of: Option<String>,
    pub flavour: Option<Flavour>,
    pub dkms: bool,
    /// A GPU is there to try it with.
    pub load: bool,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Step::Purge { packages, dkms } => {
                let all: Vec<&str> = packages.iter().chain(dkms).map(String::as_str).collect();
                f.write_str(&row("purge", &all.join(" ")))
            }
            Step::Packages(packages) => f.write_str(&row("install", &packages.join(" "))),
            Step::StopServices(units) => f.write_str(&row("stop", &format_args!("{} meanwhile", units.join(" ")))),
            Step::Install(Install { version, instead_of, flavour, dkms, load }) => {
                let flavour = flavour.map_or_else(String::new, |flavour| format!(", {} modules", flavour.name()));
                let old = instead_of.as_ref().map_or_else(String::new, |old| format!(" in place of {old}"));
                let dkms = if *dkms { ", with dkms" } else { "" };
                let load = if *load { "; load it and ask nvidia-smi" } else { "" };
                f.write_str(&row("install", &format_args!("driver {version}{old}{flavour}{dkms}{load}")))
            }
            Step::Load => f.write_str(&row("load", &"nvidia nvidia_uvm, and ask nvidia-smi")),
        }
    }
}

/// Which driver it is to be.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub version: &'a str,
    /// The configuration's.
    pub module: Module,
    pub dkms: bool,
    /// NVIDIA's own list of GPUs, where the installer carries one.
    pub list: Option<&'a List>,
    /// The installer's size in MiB, when it is here.
    pub packed: Option<u64>,
}

/// # Errors
/// Why nothing is done, with what to type next.
pub fn plan(facts: &Facts, wish: &Wish, wanted: &Wanted) -> Result<Vec<Step>, String> {
    let Wanted { version, module, dkms, .. } = *wanted;
    let is_there = facts.has(version);
    let can_load = facts.has_gpu_at_home && facts.rivals.is_empty();
    let mut steps = Vec::new();
    if is_there && (facts.loaded.is_some() || !can_load || wish.defer) {
        return match &facts.loaded {
            Some(loaded) if loaded != version && !wish.defer => Err(format!(
                "driver {version} is installed, but {loaded} is loaded still: reboot the host, or stop what uses it and: \
                 modprobe -r nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia"
            )),
            _ => Ok(steps),
        };
    }
    if wish.defer && facts.is_loaded {
        let who = facts.rivals.first().map_or_else(|| "nvidia is loaded".to_string(), ToString::to_string);
        return Err(format!(
            "the driver is not installed yet, because {who}: it is after this, at the next boot, or with: gpu-handoff setup \
             driver"
        ));
    }
    if facts.is_handoff_under_way {
        return Err("a GPU is changing hands right now: try again when that is over".to_string());
    }
    if is_there {
        return Ok(vec![Step::Load]);
    }
    let flavour = flavour::choose(&facts.gpus, version, module, wanted.list)?;
    unfit(facts, version)?;
    in_the_way(facts, wish, wanted)?;
    // Purging comes after all else that may fail: from then on there is no driver.
    if !facts.needs.is_empty() {
        steps.push(Step::Packages(facts.needs.clone()));
    }
    if !facts.services.is_empty() {
        steps.push(Step::StopServices(facts.services.clone()));
    }
    if wish.purge && (is_packaged(facts) || !facts.leftovers.is_empty()) {
        let packages = facts.packages.iter().chain(&facts.leftovers).cloned().collect();
        steps.push(Step::Purge { packages, dkms: facts.dkms.clone() });
    }
    let old = facts.record.as_ref().and_then(|record| record.installed.as_ref()).map(|one| one.version.clone());
    let instead_of = old.or_else(|| facts.libraries.first().cloned()).filter(|old| old != version);
    let install = Install { version: version.to_string(), instead_of, flavour, dkms, load: can_load && !wish.defer };
    steps.push(Step::Install(install));
    Ok(steps)
}

/// What of this machine keeps any driver of this version from working.
fn unfit(facts: &Facts, version: &str) -> Result<(), String> {
    if let Some(rival) = facts.rivals.first() {
        return Err(match rival.module {
            Some(_) => {
                format!("{rival}: gpu-handoff setup vfio keeps it away from the next boot on; reboot, then try again")
            }
            None => format!("{rival} and is built into this kernel: boot a kernel without it, then try again"),
        });
    }
    if facts.is_secure && !facts.has_key {
        return Err("Secure Boot is on and there is no key that the firmware knows to sign the driver's modules with, so the kernel would not take \
                    them: turn Secure Boot off in the firmware, or make a key that the firmware knows: apt-get install dkms \
                    mokutil && dkms generate_mok && mokutil --import /var/lib/dkms/mok.pub, reboot and confirm it there"
            .to_string());
    }
    if !facts.has_gpu_at_home && !flags::has(version, flags::SKIP_LOAD) {
        return Err(format!(
            "installer {version} tries its modules on a GPU, and no GPU is at home: stop the VM that has it first \
             (installers from {} on need none)",
            flags::since(flags::SKIP_LOAD)
        ));
    }
    Ok(())
}

/// Packages of another driver, or trees of dkms.
fn is_packaged(facts: &Facts) -> bool {
    !facts.packages.is_empty() || !facts.dkms.is_empty()
}

/// What a person must see to first, or ask for.
fn in_the_way(facts: &Facts, wish: &Wish, wanted: &Wanted) -> Result<(), String> {
    if let Some(debians) = facts.debians.as_ref().filter(|_| facts.packages.is_empty()) {
        return Err(format!(
            "another NVIDIA driver is there, {debians}, by the names that Debian's packages give it, and dpkg does not tell \
             which package it is of: take it out first (dpkg -S nvidia-current; dkms status)"
        ));
    }
    if is_packaged(facts) && !wish.purge {
        let all: Vec<&str> = facts.packages.iter().chain(&facts.dkms).map(String::as_str).collect();
        let name = facts.debians.as_ref().map_or_else(String::new, |debians| format!(", {debians}"));
        return Err(format!(
            "another NVIDIA driver is there{name}, from packages: {}; to have them purged before the new one is installed: \
             gpu-handoff setup driver --purge",
            all.join(" ")
        ));
    }
    if !facts.holders.is_empty() {
        let all: Vec<String> = facts.holders.iter().map(|one| format!("{one}: {}", one.remedy())).collect();
        return Err(format!("the driver that is loaded is in use: {}", all.join("; ")));
    }
    if !facts.needs.is_empty() && !wish.install_deps {
        let all = facts.needs.join(" ");
        return Err(format!(
            "to build modules for kernel {} and to install the rest, this is missing: apt-get install {all} (or: gpu-handoff \
             setup driver --install-deps)",
            facts.release
        ));
    }
    lacks_room(facts, wanted.packed).map_or(Ok(()), Err)
}

/// What is worth knowing before the steps are carried out.
pub fn notes(facts: &Facts, wanted: &Wanted, steps: &[Step]) -> Vec<String> {
    if !steps.iter().any(|step| matches!(step, Step::Install(_))) {
        return Vec::new();
    }
    let mut notes = Vec::new();
    let troubles =
        [builds::doubt(wanted.version, &facts.release), packages::other_series(&facts.release, &facts.headers)];
    notes.extend(troubles.iter().flatten().map(ToString::to_string));
    let is_purge = steps.iter().any(|step| matches!(step, Step::Purge { .. }));
    if is_purge && !facts.packages.is_empty() {
        notes.push(format!(
            "between purging and the end of the installation there is no driver; should it fail, {}",
            way_back(&facts.packages)
        ));
    }
    notes
}

/// How packages that were purged come back.
pub fn way_back(packages: &[String]) -> String {
    format!("what was purged comes back with: apt-get install {}", packages.join(" "))
}

/// Where there is not enough for an installer of this size.
fn lacks_room(facts: &Facts, packed: Option<u64>) -> Option<String> {
    let packed = packed.unwrap_or(0);
    let needs = [ROOM.0.max(packed * UNPACKED / 10 + BUILT), ROOM.1.max(packed * INSTALLED / 10)];
    let rooms: Vec<(&Free, u64)> = facts.free.iter().zip(needs).collect();
    for (room, need) in &rooms {
        // Both may lie on one disk.
        let same = |other: &&(&Free, u64)| other.0.mount == room.mount;
        let all: u64 = rooms.iter().filter(same).map(|(_, need)| need).sum();
        let what = match rooms.iter().filter(same).count() {
            1 => format!("{need} MiB in {}", room.directory),
            _ => format!(
                "{all} MiB on {}, for {}",
                room.mount,
                facts.free.iter().map(|one| one.directory).collect::<Vec<_>>().join(" and ")
            ),
        };
        if room.mib < all {
            return Some(format!("an installer of this size needs {what}, where {} MiB are free", room.mib));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::rival::Rival;
    use crate::gpu::holders::Holder;

    const NEW: &str = "580.95.05";

    fn bare() -> Facts {
        Facts {
            release: "6.8.12-4-pve".to_string(),
            record: None,
            loaded: None,
            on_disk: None,
            libraries: Vec::new(),
            rivals: Vec::new(),
            debians: None,
            holders: Vec::<Holder>::new(),
            services: Vec::new(),
            is_handoff_under_way: false,
            is_busy: false,
            is_loaded: false,
            has_gpu_at_home: true,
            gpus: vec![0x2684],
            packages: Vec::new(),
            leftovers: Vec::new(),
            dkms: Vec::new(),
            needs: Vec::new(),
            is_secure: false,
            has_key: false,
            free: room(10_000),
            headers: Vec::new(),
        }
    }

    fn room(mib: u64) -> Vec<Free> {
        let free = |directory, mount: &str, mib| Free { directory, mount: mount.to_string(), mib };
        vec![free("/var/tmp", "/var", mib), free("/usr", "/", 100_000)]
    }

    fn wanted(version: &str) -> Wanted<'_> {
        Wanted { version, module: Module::Auto, dkms: false, list: None, packed: None }
    }

    fn rival(module: Option<&str>) -> Rival {
        let module = module.map(str::to_string);
        Rival { slot: Some("0000:01:00".parse().unwrap()), driver: "NovaCore".to_string(), module }
    }

    fn told(facts: &Facts, wish: &Wish) -> Vec<String> {
        let steps = plan(facts, wish, &wanted(NEW)).unwrap();
        steps.iter().map(Step::to_string).collect()
    }

    fn refused(facts: &Facts) -> String {
        plan(facts, &Wish::default(), &wanted(NEW)).unwrap_err()
    }

    #[test]
    fn a_first_driver_and_a_newer_one() {
        let first = ["install   driver 580.95.05, open modules; load it and ask nvidia-smi"];
        assert_eq!(told(&bare(), &Wish::default()), first);
        let old = || Facts {
            on_disk: Some("570.86.16".to_string()),
            libraries: vec!["570.86.16".to_string()],
            loaded: Some("570.86.16".to_string()),
            services: vec!["nvidia-persistenced.service".to_string()],
            ..bare()
        };
        let newer = [
            "stop      nvidia-persistenced.service meanwhile",
            "install   driver 580.95.05 in place of 570.86.16, open modules; load it and ask nvidia-smi",
        ];
        assert_eq!(told(&old(), &Wish::default()), newer);
        let away = Facts { has_gpu_at_home: false, ..bare() };
        assert_eq!(told(&away, &Wish::default()), ["install   driver 580.95.05, open modules"]);
    }

    #[test]
    fn nothing_is_done_twice() {
        let there = || Facts { on_disk: Some(NEW.to_string()), libraries: vec![NEW.to_string()], ..bare() };
        let loaded = Facts { loaded: Some(NEW.to_string()), ..there() };
        assert!(told(&loaded, &Wish::default()).is_empty());
        assert_eq!(told(&there(), &Wish::default()).len(), 1);
        assert!(told(&Facts { has_gpu_at_home: false, ..there() }, &Wish::default()).is_empty());
        let other = Facts { loaded: Some("570.86.16".to_string()), ..there() };
        assert!(refused(&other).contains("570.86.16 is loaded still"));
        let began = crate::setup::driver::record::Installation { began: Some(NEW.to_string()), ..Default::default() };
        assert_eq!(
            told(&Facts { record: Some(began), loaded: Some(NEW.to_string()), ..there() }, &Wish::default()).len(),
            1
        );
    }

    #[test]
    fn each_reason_to_refuse_is_told() {
        let list = |text: &str| vec![text.to_string()];
        for (facts, why) in [
            (Facts { rivals: vec![rival(Some("nova_core"))], ..bare() }, "NovaCore (nova_core) has 0000:01:00: "),
            (Facts { rivals: vec![rival(None)], ..bare() }, "is built into this kernel"),
            (
                Facts { debians: Some("nvidia-current 550".to_string()), ..bare() },
                "is there, nvidia-current 550, by the names",
            ),
            (
                Facts { debians: Some("nvidia-current 550".to_string()), packages: list("nvidia-driver"), ..bare() },
                "is there, nvidia-current 550, from packages: nvidia-driver; ",
            ),
            (Facts { is_handoff_under_way: true, ..bare() }, "changing hands"),
            (Facts { is_secure: true, ..bare() }, "Secure Boot is on"),
            (Facts { packages: list("nvidia-driver"), ..bare() }, "from packages: nvidia-driver; "),
            (Facts { dkms: list("nvidia/550.90.07"), ..bare() }, "from packages: nvidia/550.90.07; "),
            (
                Facts { needs: list("proxmox-headers-6.8.12-4-pve"), ..bare() },
                "apt-get install proxmox-headers-6.8.12-4-pve ",
            ),
            (Facts { free: room(100), ..bare() }, "needs 2048 MiB in /var/tmp, where 100 MiB are free"),
            (Facts { gpus: vec![0x0a20], ..bare() }, "no longer has the GPU with id 10de:0a20"),
        ] {
            assert!(refused(&facts).contains(why), "{}", refused(&facts));
        }
        assert!(plan(&Facts { is_secure: true, has_key: true, ..bare() }, &Wish::default(), &wanted(NEW)).is_ok());
        let old = plan(&Facts { has_gpu_at_home: false, ..bare() }, &Wish::default(), &wanted("535.1")).unwrap_err();
        assert!(old.contains("no GPU is at home") && old.contains("(installers from 550.40.07 on need none)"), "{old}");
    }

    #[test]
    fn the_room_that_an_installer_of_some_size_needs() {
        let plan = |facts: &Facts, packed| {
            let wanted = Wanted { packed: Some(packed), ..wanted(NEW) };
            plan(facts, &Wish::default(), &wanted).map(|_| ())
        };
        let needs = |mib| Facts { free: room(mib), ..bare() };
        // 610.57.04, as it was measured.
        assert!(plan(&needs(2360), 442).unwrap_err().contains("needs 2368 MiB in /var/tmp"));
        assert_eq!(plan(&needs(2368), 442), Ok(()));
        let one = Free { directory: "/var/tmp", mount: "/".to_string(), mib: 3400 };
        let both = vec![one.clone(), Free { directory: "/usr", ..one }];
        let told = plan(&Facts { free: both, ..bare() }, 442).unwrap_err();
        assert!(told.contains("needs 3473 MiB on /, for /var/tmp and /usr, where 3400 MiB are free"), "{told}");
        assert_eq!(plan(&Facts { free: Vec::new(), ..bare() }, 442), Ok(()));
    }

    #[test]
    fn what_is_said_before() {
        let facts = Facts {
            release: "6.17.1-1-pve".to_string(),
            packages: vec!["nvidia-driver".to_string()],
            headers: vec!["6.14".to_string()],
            ..bare()
        };
        let wish = Wish { purge: true, ..Wish::default() };
        let wanted = wanted("570.144");
        let steps = plan(&facts, &wish, &wanted).unwrap();
        let notes = notes(&facts, &wanted, &steps);
        assert_eq!(notes.len(), 3, "{notes:#?}");
        assert!(notes[0].contains("take 570.195.03 or newer") && notes[1].contains("proxmox-headers-6.17"));
        assert!(notes[2].ends_with("comes back with: apt-get install nvidia-driver"), "{}", notes[2]);
        assert!(super::notes(&facts, &wanted, &[Step::Load]).is_empty());
    }

    #[test]
    fn what_is_asked_for_comes_first() {
        let list = |text: &str| vec![text.to_string()];
        let facts = Facts {
            packages: list("nvidia-driver"),
            leftovers: list("libcuda1"),
            dkms: list("nvidia/550.90.07"),
            needs: list("make"),
            ..bare()
        };
        let wish = Wish { purge: true, install_deps: true, ..Wish::default() };
        let steps = told(&facts, &wish);
        assert_eq!(steps[..2], ["install   make", "purge     nvidia-driver libcuda1 nvidia/550.90.07"]);
        assert_eq!(steps.len(), 3);
    }
}
