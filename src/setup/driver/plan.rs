//! What installing a driver on the host takes, or why it is refused. Pure.

use super::Wish;
use super::facts::Facts;
use crate::config::Module;
use crate::driver::flags::{self, is_from};
use crate::driver::kind::{self, Kind};
use std::fmt;

/// An installer unpacks about 1.5 GiB, and builds beside that.
const ROOM: u64 = 2048;

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
    pub kind: Option<Kind>,
    pub dkms: bool,
    /// A GPU is there to try it with.
    pub load: bool,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Step::Purge { packages, dkms } => {
                let all: Vec<&str> = packages.iter().chain(dkms).map(String::as_str).collect();
                write!(f, "{:<9} {}", "purge", all.join(" "))
            }
            Step::Packages(packages) => write!(f, "{:<9} {}", "install", packages.join(" ")),
            Step::StopServices(units) => write!(f, "{:<9} {} meanwhile", "stop", units.join(" ")),
            Step::Install(Install { version, instead_of, kind, dkms, load }) => {
                let kind = kind.map_or_else(String::new, |kind| format!(", {} modules", kind.name()));
                let old = instead_of.as_ref().map_or_else(String::new, |old| format!(" in place of {old}"));
                let dkms = if *dkms { ", with dkms" } else { "" };
                let load = if *load { "; load it and ask nvidia-smi" } else { "" };
                write!(f, "{:<9} driver {version}{old}{kind}{dkms}{load}", "install")
            }
            Step::Load => write!(f, "{:<9} nvidia nvidia_uvm, and ask nvidia-smi", "load"),
        }
    }
}

/// `module` and `dkms` are the configuration's.
///
/// # Errors
/// Why nothing is done, with what to type next.
pub fn plan(facts: &Facts, wish: &Wish, version: &str, module: Module, dkms: bool) -> Result<Vec<Step>, String> {
    let is_there = facts.has(version);
    let can_load = facts.has_gpu_at_home && !facts.has_nouveau;
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
        return Err("the driver is not installed yet, because nvidia or nouveau is loaded: it is after this, at the next boot, \
                    or with: gpu-handoff setup driver"
            .to_string());
    }
    if facts.is_handoff_under_way {
        return Err("a GPU is changing hands right now: try again when that is over".to_string());
    }
    if is_there {
        return Ok(vec![Step::Load]);
    }
    let kind = kind::choose(&facts.gpus, version, module)?;
    if facts.has_nouveau {
        return Err(
            "nouveau is loaded and has a GPU: gpu-handoff setup vfio keeps it away from the next boot on; reboot, \
                    then try again"
                .to_string(),
        );
    }
    if facts.is_secure && !facts.has_key {
        return Err("Secure Boot is on and there is no key that the firmware knows to sign the driver's modules with, so the kernel would not take \
                    them: turn Secure Boot off in the firmware, or make a key that the firmware knows: apt-get install dkms \
                    mokutil && dkms generate_mok && mokutil --import /var/lib/dkms/mok.pub, reboot and confirm it there"
            .to_string());
    }
    if !facts.has_gpu_at_home && !is_from(version, flags::SKIP_LOAD) {
        return Err(format!(
            "installer {version} tries its modules on a GPU, and no GPU is at home: stop the VM that has it first \
             (installers from {} on need none)",
            flags::SKIP_LOAD
        ));
    }
    let is_packaged = !facts.packages.is_empty() || !facts.dkms.is_empty();
    if is_packaged && !wish.purge {
        let all: Vec<&str> = facts.packages.iter().chain(&facts.dkms).map(String::as_str).collect();
        return Err(format!(
            "another NVIDIA driver is there, from packages: {}; to have them purged first: gpu-handoff setup driver --purge",
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
            "to build modules for kernel {}, this is missing: apt-get install {all} (or: gpu-handoff setup driver \
             --install-deps)",
            facts.release
        ));
    }
    if let Some(free) = facts.free.filter(|free| *free < ROOM) {
        return Err(format!("an installer needs {ROOM} MiB in /var/tmp, where {free} MiB are free"));
    }
    if wish.purge && (is_packaged || !facts.leftovers.is_empty()) {
        let packages = facts.packages.iter().chain(&facts.leftovers).cloned().collect();
        steps.push(Step::Purge { packages, dkms: facts.dkms.clone() });
    }
    if !facts.needs.is_empty() {
        steps.push(Step::Packages(facts.needs.clone()));
    }
    if !facts.services.is_empty() {
        steps.push(Step::StopServices(facts.services.clone()));
    }
    let old = facts.record.as_ref().and_then(|record| record.installed.as_ref()).map(|one| one.version.clone());
    let instead_of = old.or_else(|| facts.libraries.first().cloned()).filter(|old| old != version);
    let install = Install { version: version.to_string(), instead_of, kind, dkms, load: can_load && !wish.defer };
    steps.push(Step::Install(install));
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::holders::Holder;

    const NEW: &str = "580.95.05";

    fn bare() -> Facts {
        Facts {
            release: "6.8.12-4-pve".to_string(),
            record: None,
            loaded: None,
            on_disk: None,
            libraries: Vec::new(),
            has_nouveau: false,
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
            free: Some(10_000),
        }
    }

    fn told(facts: &Facts, wish: &Wish) -> Vec<String> {
        let steps = plan(facts, wish, NEW, Module::Auto, false).unwrap();
        steps.iter().map(Step::to_string).collect()
    }

    fn refused(facts: &Facts) -> String {
        plan(facts, &Wish::default(), NEW, Module::Auto, false).unwrap_err()
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
        let began = crate::setup::driver::record::Record { began: Some(NEW.to_string()), ..Default::default() };
        assert_eq!(
            told(&Facts { record: Some(began), loaded: Some(NEW.to_string()), ..there() }, &Wish::default()).len(),
            1
        );
    }

    #[test]
    fn each_reason_to_refuse_is_told() {
        let list = |text: &str| vec![text.to_string()];
        for (facts, why) in [
            (Facts { has_nouveau: true, ..bare() }, "nouveau is loaded"),
            (Facts { is_handoff_under_way: true, ..bare() }, "changing hands"),
            (Facts { is_secure: true, ..bare() }, "Secure Boot is on"),
            (Facts { packages: list("nvidia-driver"), ..bare() }, "from packages: nvidia-driver; "),
            (Facts { dkms: list("nvidia/550.90.07"), ..bare() }, "from packages: nvidia/550.90.07; "),
            (
                Facts { needs: list("proxmox-headers-6.8.12-4-pve"), ..bare() },
                "apt-get install proxmox-headers-6.8.12-4-pve ",
            ),
            (Facts { free: Some(100), ..bare() }, "where 100 MiB are free"),
            (Facts { gpus: vec![0x0a20], ..bare() }, "no longer has the GPU with id 10de:0a20"),
        ] {
            assert!(refused(&facts).contains(why), "{}", refused(&facts));
        }
        assert!(
            plan(&Facts { is_secure: true, has_key: true, ..bare() }, &Wish::default(), NEW, Module::Auto, false)
                .is_ok()
        );
        let old = plan(&Facts { has_gpu_at_home: false, ..bare() }, &Wish::default(), "535.1", Module::Auto, false);
        assert!(old.unwrap_err().contains("no GPU is at home"));
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
        assert_eq!(steps[..2], ["purge     nvidia-driver libcuda1 nvidia/550.90.07", "install   make"]);
        assert_eq!(steps.len(), 3);
    }
}
