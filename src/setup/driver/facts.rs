//! What must be known before a driver is installed on the host.

use super::packages;
use super::record::{self, Installation, LOCK};
use crate::App;
use crate::config::{Config, Home};
use crate::driver::flags::Key;
use crate::driver::installed::{self, Installed};
use crate::driver::rival::{self, Rival};
use crate::events::notes::handoff_is_under_way;
use crate::exit::{Exit, Result};
use crate::gpu::holders::{Devices, Holder, Place, Reach};
use crate::gpu::inventory::{Slot, nvidia_slots};
use crate::gpu::nvidia;
use crate::handoff::plan::policy::nvidia_services;
use crate::sys::{Kernel, flock_is_held};
use crate::systemd;
use std::time::Duration;

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const DPKG_QUERY: &str = "/usr/bin/dpkg-query";
pub const DKMS: &str = "/usr/sbin/dkms";
const DKMS_TREE: &str = "/var/lib/dkms";
const DF: &str = "/usr/bin/df";
const MOKUTIL: &str = "/usr/bin/mokutil";

/// The firmware's variable: four bytes of attributes, then whether it is on.
const SECURE_BOOT: &str = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// The key that dkms makes, and that administrators enrol.
pub const KEY: Key = Key { secret: "/var/lib/dkms/mok.key", public: "/var/lib/dkms/mok.pub" };

/// A question to a program of the host.
const ANSWER: Duration = Duration::from_secs(60);

/// Looking who uses the driver.
const LOOK: Duration = Duration::from_secs(60);

pub struct Facts {
    /// `uname -r`
    pub release: String,
    pub record: Option<Installation>,
    pub loaded: Option<String>,
    /// Of the modules for the running kernel.
    pub on_disk: Option<String>,
    /// Versions of `libcuda.so`.
    pub libraries: Vec<String>,
    /// Drivers that have a GPU which is to be this one's, or would take it.
    pub rivals: Vec<Rival>,
    /// A driver whose files have other names than NVIDIA's installer gives them: `nvidia-current-open 550.163.01`.
    pub debians: Option<String>,
    /// Who uses the driver, but for NVIDIA's services when those may be stopped.
    pub holders: Vec<Holder>,
    /// NVIDIA's services that run and may be stopped.
    pub services: Vec<String>,
    pub is_handoff_under_way: bool,
    /// An installer of ours is at work that no run waits for.
    pub is_busy: bool,
    /// nvidia, or a rival.
    pub is_loaded: bool,
    /// A GPU that the driver would find.
    pub has_gpu_at_home: bool,
    /// Device ids.
    pub gpus: Vec<u16>,
    pub packages: Vec<String>,
    /// Such as left only their configuration.
    pub leftovers: Vec<String>,
    /// `nvidia/550.90.07` in dkms, by somebody else.
    pub dkms: Vec<String>,
    /// Packages that are missing to build for the running kernel.
    pub needs: Vec<String>,
    pub is_secure: bool,
    pub has_key: bool,
    /// Where an installer unpacks itself, and where it installs to.
    pub free: Vec<Free>,
    /// Of packages with the headers of Proxmox's kernels, the series that they follow: `6.8`.
    pub headers: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Free {
    pub directory: &'static str,
    /// Where what it lies on is mounted.
    pub mount: String,
    pub mib: u64,
}

/// An installer unpacks itself in the first, and installs to the second.
const ROOMS: [&str; 2] = ["/var/tmp", "/usr"];

impl Facts {
    pub fn read(app: &App, config: &Config) -> Result<Facts> {
        let kernel = app.kernel;
        let with_dkms = config.driver.dkms;
        let record = record::read(kernel)?;
        let release = running(kernel);
        let slots = nvidia_slots(kernel);
        let loaded = nvidia::version_as_written(kernel);
        let holders = if kernel.exists("/sys/module/nvidia") { holders(kernel, &slots)? } else { Vec::new() };
        let services: Vec<String> = if config.policy.stop_nvidia_services && kernel.exists("/sys/module/nvidia") {
            nvidia_services().filter(|unit| systemd::has_processes(kernel, &format!("system.slice/{unit}"))).collect()
        } else {
            Vec::new()
        };
        let is_stopped = |holder: &Holder| matches!(&holder.place, Place::Unit(unit) if services.contains(unit));
        let installed = kernel.program(DPKG_QUERY, &["-W", "-f", "${Package} ${db:Status-Status}\\n"], ANSWER);
        let installed = installed.unwrap_or_default();
        let (packages, leftovers) = packages::drivers(&installed);
        let mut needs = needs(kernel, &release, with_dkms);
        needs.extend(packages::missing_libglvnd(&installed, &kernel.list(LIBRARIES)));
        let rivals = rival::all(kernel, config);
        let debians = installed::find(kernel, &release).filter(Installed::is_debians).map(|one| {
            let version = installed::version_of(kernel, &release, &one.name).unwrap_or_default();
            format!("{} {version}", one.name).trim_end().to_string()
        });
        let ours: Vec<&String> = record
            .iter()
            .flat_map(|record| record.installed.iter().map(|one| &one.version).chain(&record.began))
            .filter(|_| with_dkms)
            .collect();
        let is_ours = |tree: &String| ours.iter().any(|version| tree.ends_with(&format!("/{version}")));
        let gpus = slots.iter().filter_map(Slot::gpu);
        // One whose home is elsewhere is none for this driver.
        let is_meant = |slot: &&Slot| match config.homes.get(&slot.id) {
            None => true,
            Some(Home::Driver(driver)) => driver == "nvidia",
            Some(Home::None) => false,
        };
        Ok(Facts {
            on_disk: on_disk(kernel, &release),
            libraries: libraries(kernel),
            holders: holders.into_iter().filter(|holder| !is_stopped(holder)).collect(),
            services,
            is_handoff_under_way: handoff_is_under_way(kernel),
            is_busy: flock_is_held(kernel, LOCK),
            is_loaded: kernel.exists("/sys/module/nvidia") || !rivals.is_empty(),
            rivals,
            debians,
            has_gpu_at_home: gpus.clone().any(|gpu| gpu.driver.as_deref().is_none_or(|driver| driver == "nvidia")),
            gpus: slots.iter().filter(is_meant).filter_map(Slot::gpu).map(|gpu| gpu.device).collect(),
            packages,
            leftovers,
            dkms: dkms(kernel).into_iter().filter(|tree| !is_ours(tree)).collect(),
            needs,
            is_secure: is_secure(kernel),
            has_key: has_key(kernel) && !is_unknown_key(kernel),
            free: free(kernel),
            headers: packages::header_series(&installed),
            release,
            record,
            loaded,
        })
    }

    /// Modules for the running kernel and libraries are of this version, and nobody was cut off installing it.
    pub fn has(&self, version: &str) -> bool {
        self.on_disk.as_deref() == Some(version)
            && self.libraries == [version]
            && self.record.as_ref().is_none_or(|record| record.began.is_none())
    }
}

/// What the modules are signed with: nothing where the kernel takes any.
pub fn key(kernel: &dyn Kernel) -> Option<Key> {
    (is_secure(kernel) && has_key(kernel)).then_some(KEY)
}

/// Whether the firmware has Secure Boot on.
pub fn is_secure(kernel: &dyn Kernel) -> bool {
    kernel.read(SECURE_BOOT).is_ok_and(|bytes| bytes.get(4) == Some(&1))
}

fn has_key(kernel: &dyn Kernel) -> bool {
    kernel.exists(KEY.secret) && kernel.exists(KEY.public)
}

pub fn running(kernel: &dyn Kernel) -> String {
    kernel.text("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// The firmware does not know it yet, as far as anybody can tell.
fn is_unknown_key(kernel: &dyn Kernel) -> bool {
    let said = kernel.program(MOKUTIL, &["--test-key", KEY.public], ANSWER);
    said.is_ok_and(|text| text.contains("is not enrolled"))
}

/// The version of a kernel's nvidia module.
pub fn on_disk(kernel: &dyn Kernel, release: &str) -> Option<String> {
    installed::version(kernel, release)
}

/// The version of what was installed whole: modules and libraries.
pub fn whole(kernel: &dyn Kernel) -> Option<String> {
    let release = running(kernel);
    let version = on_disk(kernel, &release)?;
    let uvm = installed::find(kernel, &release).map_or_else(|| "nvidia-uvm".to_string(), |one| one.part("uvm"));
    let is_whole = libraries(kernel) == [version.clone()]
        && installed::version_of(kernel, &release, &uvm).as_ref() == Some(&version);
    is_whole.then_some(version)
}

pub fn libraries(kernel: &dyn Kernel) -> Vec<String> {
    let names = kernel.list(LIBRARIES);
    // libcuda.so.1 is the link to it.
    let versions = names.iter().filter_map(|name| name.strip_prefix("libcuda.so.")).filter(|rest| rest.contains('.'));
    versions.map(str::to_string).collect()
}

/// Whoever keeps the driver's modules from being unloaded.
fn holders(kernel: &dyn Kernel, slots: &[Slot]) -> Result<Vec<Holder>> {
    let at_home: Vec<Slot> =
        slots.iter().filter(|slot| slot.gpu().is_some_and(|gpu| gpu.is_on("nvidia"))).cloned().collect();
    if at_home.is_empty() {
        return Ok(Vec::new());
    }
    let holders = Devices::of_slots(kernel, &at_home, Reach::Unloading).holders(kernel, LOOK);
    holders.map_err(|problem| Exit::refused(format!("the driver was not touched: {problem}")))
}

/// The packages that are missing to build modules for a kernel.
pub fn needs(kernel: &dyn Kernel, release: &str, with_dkms: bool) -> Vec<String> {
    let mut needs = Vec::new();
    let mut need = |is_there: bool, package: String| {
        if !is_there {
            needs.push(package);
        }
    };
    need(has_headers(kernel, release), packages::headers(release));
    need(kernel.exists("/usr/bin/gcc") || kernel.exists("/usr/bin/cc"), "gcc".to_string());
    // The installer looks for the file; gcc does not bring it.
    need(kernel.exists("/usr/include/stdio.h"), "libc6-dev".to_string());
    need(kernel.exists("/usr/bin/make"), "make".to_string());
    need(!with_dkms || kernel.exists(DKMS), "dkms".to_string());
    needs
}

pub fn has_headers(kernel: &dyn Kernel, release: &str) -> bool {
    kernel.exists(&format!("/lib/modules/{release}/build/Makefile"))
}

/// NVIDIA's modules in dkms, such as `nvidia/550.90.07`.
pub fn dkms(kernel: &dyn Kernel) -> Vec<String> {
    let modules = kernel.list(DKMS_TREE);
    let nvidia = modules.iter().filter(|name| name.starts_with("nvidia"));
    let versions = nvidia.flat_map(|name| {
        let versions = kernel.list(&format!("{DKMS_TREE}/{name}"));
        versions
            .into_iter()
            .filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
            .map(move |version| format!("{name}/{version}"))
    });
    versions.collect()
}

/// Of each room; those that nobody can tell of are left out.
fn free(kernel: &dyn Kernel) -> Vec<Free> {
    let one = |directory: &'static str| {
        let said = kernel.program(DF, &["-Pk", directory], ANSWER).ok()?;
        let mut columns = said.lines().nth(1)?.split_whitespace().skip(3);
        let kib: u64 = columns.next()?.parse().ok()?;
        let mount = columns.nth(1).unwrap_or_default().to_string();
        Some(Free { directory, mount, mib: kib / 1024 })
    };
    ROOMS.into_iter().filter_map(one).collect()
}

/// # Errors
/// When it is not a kernel whose modules are there.
pub fn check_release(kernel: &dyn Kernel, release: &str) -> Result<()> {
    if record::is_release(release) && kernel.exists(&format!("/lib/modules/{release}")) {
        return Ok(());
    }
    Err(Exit::usage(format!("there is no kernel {}: /lib/modules has those that there are", release.escape_debug())))
}
