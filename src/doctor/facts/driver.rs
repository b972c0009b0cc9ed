//! NVIDIA's driver on this host: what is loaded, what is on the disk, and for which kernels.

use crate::App;
use crate::config::Config;
use crate::driver::installed;
use crate::driver::rival::{self, RIVALS, Rival};
use crate::gpu::{Slot, nvidia};
use crate::handoff::plan::policy::nvidia_services;
use crate::modprobe;
use crate::setup::driver::{facts, packages, record};
use crate::sys::Kernel;
use crate::systemd;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const FIRMWARE: [&str; 2] = ["/lib/firmware/nvidia", "/usr/lib/firmware/nvidia"];
const STATUS: &str = "/var/lib/dpkg/status";

/// Those that keep a GPU open for the host's screen.
const DISPLAYS: [&str; 6] = ["gdm", "gdm3", "lightdm", "sddm", "lxdm", "xdm"];

/// What the kernel writes at the end of a module that is signed.
const SIGNATURE: &[u8] = b"~Module signature appended~\n";

pub struct Driver {
    pub release: String,
    /// As `/proc/driver/nvidia/version` has it.
    pub loaded: Option<String>,
    /// Its modules are the open ones.
    pub is_open: bool,
    /// This kernel has the module.
    pub is_there: bool,
    /// The version of the module on the disk.
    pub on_disk: Option<String>,
    /// Versions of `libcuda.so` and `libnvidia-ml.so`.
    pub libraries: Vec<(String, String)>,
    pub firmware: Vec<String>,
    /// The newest kernel that is installed, where that is not the running one, and whether it has the module.
    pub newest: Option<(String, bool)>,
    /// What is missing to build for the newest kernel.
    pub needs: Vec<String>,
    /// The series that packages with headers follow.
    pub headers: Vec<String>,
    pub dkms: Vec<String>,
    /// The version that this program installed.
    pub ours: Option<String>,
    pub is_secure: bool,
    /// A module file without a signature.
    pub unsigned: Option<String>,
    pub drm_modeset: bool,
    pub services: Vec<String>,
    pub displays: Vec<String>,
    pub rivals: Vec<Rival>,
    /// Of the rivals those that this kernel has.
    pub possible: Vec<String>,
}

impl Driver {
    pub fn read(app: &App, config: &Config, slots: &[Slot]) -> Driver {
        let kernel = app.kernel;
        let release = facts::running(kernel);
        let list = kernel.text(&format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
        let installed = installed::find(kernel, &release).filter(|_| !slots.is_empty());
        let version = kernel.text("/proc/driver/nvidia/version").unwrap_or_default();
        let newest = newest(kernel).filter(|newest| *newest != release && !slots.is_empty());
        let status = if slots.is_empty() { String::new() } else { packages_of(kernel) };
        let is_active = |unit: &String| systemd::has_processes(kernel, &format!("system.slice/{unit}"));
        Driver {
            loaded: nvidia::version_as_written(kernel),
            is_open: version.contains("Open Kernel Module"),
            on_disk: installed.as_ref().and_then(|one| installed::version_of(kernel, &release, &one.name)),
            libraries: libraries(kernel),
            firmware: FIRMWARE.iter().flat_map(|folder| kernel.list(folder)).filter(|name| is_version(name)).collect(),
            needs: newest.as_ref().map(|newest| facts::needs(kernel, newest, false)).unwrap_or_default(),
            newest: newest.map(|newest| {
                let has = installed::find(kernel, &newest).is_some();
                (newest, has)
            }),
            headers: packages::header_series(&status),
            dkms: facts::dkms(kernel),
            ours: record::read(kernel).ok().flatten().and_then(|record| record.installed).map(|one| one.version),
            is_secure: facts::is_secure(kernel),
            unsigned: installed
                .as_ref()
                .map(|one| format!("/lib/modules/{release}/{}", one.path))
                .filter(|path| is_unsigned(app, path)),
            is_there: installed.is_some(),
            drm_modeset: kernel.exists("/sys/module/nvidia_drm") && nvidia::modeset_enabled(kernel),
            services: nvidia_services().filter(is_active).collect(),
            displays: DISPLAYS.iter().map(|name| format!("{name}.service")).filter(is_active).collect(),
            rivals: rival::all(kernel, config),
            possible: RIVALS.iter().filter(|name| has_module(&list, name)).map(ToString::to_string).collect(),
            release,
        }
    }
}

/// `kernel/drivers/gpu/drm/nouveau/nouveau.ko.zst: …`
fn has_module(list: &str, name: &str) -> bool {
    let files = list.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next()?.split('.').next());
    files.into_iter().any(|file| modprobe::module(file) == name)
}

/// Of the kernels that are installed, by the numbers in their names.
fn newest(kernel: &dyn Kernel) -> Option<String> {
    let is_whole = |release: &String| kernel.exists(&format!("/lib/modules/{release}/modules.dep"));
    let numbers = |release: &String| -> Vec<u32> {
        let words = release.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
        words.map(|word| word.parse().unwrap_or(0)).collect()
    };
    kernel.list("/lib/modules").into_iter().filter(is_whole).max_by_key(numbers)
}

/// `580.95.05`
fn is_version(name: &str) -> bool {
    name.contains('.') && name.parse::<nvidia::Version>().is_ok()
}

fn libraries(kernel: &dyn Kernel) -> Vec<(String, String)> {
    let names = kernel.list(LIBRARIES);
    let version = |library: &str, name: &str| name.strip_prefix(library)?.strip_prefix(".so.").map(str::to_string);
    let of = |library: &'static str| {
        let versions = names.iter().filter_map(move |name| version(library, name));
        versions.filter(|version| is_version(version)).map(move |version| (library.to_string(), version))
    };
    of("libcuda").chain(of("libnvidia-ml")).collect()
}

/// What dpkg-query would say, which takes longer to start than this to read.
fn packages_of(kernel: &dyn Kernel) -> String {
    let (mut said, mut name) = (String::new(), "");
    let status = kernel.text(STATUS).unwrap_or_default();
    for line in status.lines() {
        if let Some(package) = line.strip_prefix("Package: ") {
            name = package;
        } else if let Some(state) = line.strip_prefix("Status: ") {
            said.push_str(&format!("{name} {}\n", state.rsplit(' ').next().unwrap_or_default()));
        }
    }
    said
}

/// Only of a file that is not packed the end can be seen.
fn is_unsigned(app: &App, path: &str) -> bool {
    let end = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(app.kernel.path(path))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(SIGNATURE.len() as u64)))?;
        let mut end = Vec::new();
        file.read_to_end(&mut end)?;
        Ok(end)
    };
    path.ends_with(".ko") && end().is_ok_and(|end| end != SIGNATURE)
}
