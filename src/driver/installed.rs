//! Which NVIDIA driver a kernel has on the disk, whatever its files are called.
//!
//! NVIDIA's installer puts `nvidia.ko` there. Debian's packages have several drivers beside each other, by names of their
//! own (`nvidia-current-open.ko`, `nvidia-tesla-535.ko`), and an `install` line for modprobe that says which of them is
//! `nvidia`. Once loaded, all of them are called `nvidia`.

use crate::modprobe;
use crate::sys::Kernel;
use std::time::Duration;

const MODINFO: &str = "/usr/sbin/modinfo";
const ANSWER: Duration = Duration::from_secs(60);

/// What NVIDIA calls the module.
const NVIDIA: &str = "nvidia";

/// The parts of a driver beside the module itself.
const PARTS: [&str; 4] = ["uvm", "modeset", "drm", "peermem"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The file's name without its ending: `nvidia`, `nvidia-current-open`.
    pub name: String,
    /// Below `/lib/modules/RELEASE`.
    pub path: String,
}

impl Installed {
    /// The file name of a part: `nvidia-current-uvm`.
    pub fn part(&self, part: &str) -> String {
        format!("{}-{part}", self.name)
    }

    /// Debian's packages rename the files; NVIDIA's installer and its own packages do not.
    pub fn is_debians(&self) -> bool {
        self.name != NVIDIA
    }
}

/// The driver that `modprobe nvidia` loads for this kernel.
pub fn find(kernel: &dyn Kernel, release: &str) -> Option<Installed> {
    let all = all(&kernel.text(&format!("/lib/modules/{release}/modules.dep")).unwrap_or_default());
    // Usually there is one.
    let chosen = if all.len() > 1 { chosen(&modprobe::read(kernel)) } else { None };
    let by_name = |name: &str| all.iter().find(|one| one.name == name).cloned();
    chosen.and_then(|name| by_name(&name)).or_else(|| by_name(NVIDIA)).or_else(|| all.first().cloned())
}

/// Its version, as modinfo tells it.
pub fn version(kernel: &dyn Kernel, release: &str) -> Option<String> {
    let name = find(kernel, release).map_or_else(|| NVIDIA.to_string(), |one| one.name);
    version_of(kernel, release, &name)
}

/// The version of a module of that file name.
pub fn version_of(kernel: &dyn Kernel, release: &str, name: &str) -> Option<String> {
    let said = kernel.program(MODINFO, &["-k", release, "-F", "version", name], ANSWER).ok()?;
    said.lines().next().map(|line| line.trim().to_string()).filter(|version| !version.is_empty())
}

/// Every driver that modules.dep lists. Pure.
fn all(modules: &str) -> Vec<Installed> {
    let paths = modules.lines().filter_map(|line| line.split(':').next());
    let named = paths.filter_map(|path| {
        let file = path.rsplit('/').next()?;
        let (name, rest) = file.split_once(".ko")?;
        let name = name.replace('_', "-");
        ((rest.is_empty() || rest.starts_with('.')) && is_driver(&name))
            .then(|| Installed { name, path: path.to_string() })
    });
    named.collect()
}

fn is_driver(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(NVIDIA) else { return false };
    let Some(flavour) = rest.strip_prefix('-') else { return rest.is_empty() };
    let is_known = ["current", "tesla", "legacy", "open"].iter().any(|word| flavour.starts_with(word))
        || flavour.starts_with(|c: char| c.is_ascii_digit());
    is_known && !PARTS.iter().any(|part| flavour.ends_with(&format!("-{part}")))
}

/// What `install nvidia modprobe -i NAME …` says.
fn chosen(lines: &[modprobe::Line]) -> Option<String> {
    lines.iter().find_map(|line| match line.words().as_slice() {
        ["install", NVIDIA, command @ ..] => {
            let name = command.iter().skip(1).find(|word| word.starts_with(NVIDIA))?;
            Some(name.trim_end_matches(';').replace('_', "-"))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;
    use std::fs;

    fn names(modules: &str) -> Vec<String> {
        all(modules).into_iter().map(|one| one.name).collect()
    }

    #[test]
    fn a_driver_by_any_name_and_nothing_else() {
        for (file, name) in [
            ("kernel/drivers/video/nvidia.ko", "nvidia"),
            ("updates/dkms/nvidia.ko.zst", "nvidia"),
            ("updates/dkms/nvidia-current.ko.xz", "nvidia-current"),
            ("updates/dkms/nvidia-current-open.ko", "nvidia-current-open"),
            ("updates/dkms/nvidia-tesla-535.ko.xz", "nvidia-tesla-535"),
            ("updates/dkms/nvidia_legacy_390xx.ko", "nvidia-legacy-390xx"),
        ] {
            assert_eq!(names(&format!("{file}: x.ko\n")), [name], "{file}");
        }
        for file in [
            "updates/dkms/nvidia-current-uvm.ko",
            "updates/dkms/nvidia-uvm.ko",
            "updates/dkms/nvidia-current-open-drm.ko.xz",
            "updates/dkms/nvidia-tesla-535-peermem.ko",
            "kernel/drivers/video/fbdev/nvidia/nvidiafb.ko",
            "kernel/drivers/platform/x86/nvidia-wmi-ec-backlight.ko",
            "updates/dkms/nvidia-fs.ko",
            "updates/dkms/nvidia.kop",
        ] {
            assert!(names(&format!("{file}:\n")).is_empty(), "{file}");
        }
    }

    #[test]
    fn of_several_modprobes_own_choice() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-installed-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("lib/modules/6.12/modules.dep", "updates/dkms/nvidia-current.ko:\nupdates/dkms/nvidia-tesla-535.ko:\n");
        let kernel = Linux::at(root.clone());
        let found = |kernel: &Linux| find(kernel, "6.12").unwrap();
        let first = found(&kernel);
        write("etc/modprobe.d/nvidia.conf", "install nvidia modprobe -i nvidia-tesla-535 $CMDLINE_OPTS\n");
        let second = found(&kernel);
        let none = find(&kernel, "6.13");
        fs::remove_dir_all(&root).unwrap();
        assert_eq!((first.name.as_str(), second.name.as_str()), ("nvidia-current", "nvidia-tesla-535"));
        assert_eq!(second.part("uvm"), "nvidia-tesla-535-uvm");
        assert!(second.is_debians() && none.is_none());
    }
}
