//! NVIDIA's driver: versions that do not fit each other, kernels that lack it, what keeps it busy.

use super::facts::Facts;
use super::finding::{Area, Check, Hit, Severity};
use crate::config::{self, Home};
use crate::driver::flavour::{self, Flavour};
use crate::driver::{self, builds};
use crate::gpu::nvidia::Version;
use crate::setup::driver::packages;

pub const AREA: Area = Area {
    title: "NVIDIA's driver",
    checks: &[
        Check {
            id: "driver-missing",
            severity: Severity::Warning,
            title: "the running kernel has no NVIDIA driver",
            why: "VMs can have the card all the same, but the host and its containers cannot use it.",
            more: "Not told where the card's home is another driver by configuration, or nouveau has it. Where the newest kernel has \
                   the driver, a reboot into that is all it takes.",
            find: missing,
        },
        Check {
            id: "driver-not-for-next-kernel",
            severity: Severity::Warning,
            title: "the newest kernel that is installed has no NVIDIA driver",
            why: "With the next reboot the host and its containers are without the card.",
            more: "Told where the running kernel has it. What built it for the running kernel is what has to build it for the next: \
                   dkms, or this program's kernel hook.",
            find: not_for_next_kernel,
        },
        Check {
            id: "driver-does-not-build",
            severity: Severity::Warning,
            title: "the driver is known not to build for the newest kernel",
            why: "The kernel is going to be without the card's driver whoever builds it.",
            more: "From reports to NVIDIA and distributions; what is not told here may fail as well.",
            find: does_not_build,
        },
        Check {
            id: "headers-other-series",
            severity: Severity::Warning,
            title: "the kernel's headers come from packages of another series than the kernel",
            why: "The next update of the kernel comes without headers, so nothing can build the driver for it.",
            more: "proxmox-headers-X.Y follows the kernels of that series only.",
            find: headers_other_series,
        },
        Check {
            id: "driver-versions",
            severity: Severity::Error,
            title: "module, libraries and firmware of the driver are of different versions",
            why: "Programs end with Driver/library version mismatch, or the card is not started.",
            more: "The loaded module by /proc/driver/nvidia/version, the one on the disk by modinfo, libcuda.so and libnvidia-ml.so \
                   (which nvidia-smi uses) by their names, the firmware (which the open modules cannot do without) by its folder.",
            find: versions,
        },
        Check {
            id: "driver-not-for-card",
            severity: Severity::Error,
            title: "the driver does not have this generation of cards, or not with this kind of modules",
            why: "A card that its driver does not know has none.",
            more: "Open modules are for Turing and newer, and the only ones from Blackwell on; 580 is the last branch with Maxwell to \
                   Volta, 470 with Kepler, 390 with Fermi.",
            find: not_for_card,
        },
        Check {
            id: "secure-boot-unsigned",
            severity: Severity::Error,
            title: "Secure Boot is on and the driver's module is not signed",
            why: "The kernel does not load it.",
            more: "Only of a module that is not packed can be told whether it is signed.",
            find: unsigned,
        },
        Check {
            id: "drm-holds-card",
            severity: Severity::Note,
            title: "nvidia_drm keeps every card in use with this version and modeset=1",
            why: "A handoff has to unload nvidia_drm, which needs everybody who draws to let go of it.",
            more: "Before 580.105.08, and of 590 before 590.44.01. With two cards the other one's nodes in /dev/dri may get other \
                   names.",
            find: drm_holds,
        },
        Check {
            id: "services-hold-card",
            severity: Severity::Warning,
            title: "a service holds the card, and the policy is not to stop it",
            why: "A VM's start is refused as long as it runs.",
            more: "NVIDIA's services are stopped for the moment by default (policy.nvidia_services); a display manager is with \
                   policy.unit set to stop.",
            find: services,
        },
    ],
};

/// How modules come to be signed.
pub const SIGN: &str = "turn Secure Boot off in the firmware, or: apt-get install dkms mokutil && dkms generate_mok && mokutil \
                        --import /var/lib/dkms/mok.pub, reboot and confirm it there; then have the driver built again";

fn modules(facts: &Facts) -> String {
    format!("/lib/modules/{}", facts.driver.release)
}

fn missing(facts: &Facts) -> Vec<Hit> {
    let driver = &facts.driver;
    let has_it = facts.slots.iter().filter_map(|slot| slot.gpu()).any(|gpu| gpu.is_on("nvidia"));
    if !driver::is_wanted(&facts.config, &facts.slots) || driver.is_there || driver.loaded.is_some() || has_it {
        return Vec::new();
    }
    let found = format!("kernel {} has no nvidia module", driver.release);
    let remedy = match &driver.newest {
        Some((newest, true)) => format!("kernel {newest} has it: reboot the host"),
        _ => build(facts, &driver.release),
    };
    vec![Hit::at(modules(facts), found, remedy)]
}

/// Whoever built it for another kernel; else whoever can install it.
fn build(facts: &Facts, release: &str) -> String {
    let driver = &facts.driver;
    let is_ours = |tree: &&String| driver.ours.as_ref().is_some_and(|ours| tree.ends_with(&format!("/{ours}")));
    let needs = match driver.newest.as_ref().is_some_and(|(newest, _)| newest == release) && !driver.needs.is_empty() {
        true => format!("apt-get install {}, then: ", driver.needs.join(" ")),
        false => String::new(),
    };
    if driver.dkms.iter().any(|tree| !is_ours(&tree)) {
        return format!("{needs}dkms autoinstall -k {release}");
    }
    match &driver.ours {
        Some(_) => format!("{needs}gpu-handoff setup driver --kernel {release}"),
        None => "put NVIDIA-Linux-x86_64-VERSION.run (nvidia.com/drivers) into /var/cache/gpu-handoff, then: gpu-handoff setup \
                 driver --dry-run"
            .to_string(),
    }
}

fn not_for_next_kernel(facts: &Facts) -> Vec<Hit> {
    let Some((newest, false)) = &facts.driver.newest else { return Vec::new() };
    if !driver::is_wanted(&facts.config, &facts.slots) || !facts.driver.is_there {
        return Vec::new();
    }
    let found = format!("kernel {newest} is installed and has no nvidia module");
    vec![Hit::at(format!("/lib/modules/{newest}"), found, build(facts, newest))]
}

fn does_not_build(facts: &Facts) -> Vec<Hit> {
    let driver = &facts.driver;
    let version = driver.on_disk.as_ref().or(driver.loaded.as_ref());
    let (Some(version), Some((newest, false))) = (version, &driver.newest) else { return Vec::new() };
    let Some(doubt) = builds::doubt(version, newest) else { return Vec::new() };
    vec![Hit::told(format!("/lib/modules/{newest}"), &doubt)]
}

fn headers_other_series(facts: &Facts) -> Vec<Hit> {
    // Who has nothing to build needs no headers.
    if facts.driver.dkms.is_empty() && facts.driver.ours.is_none() {
        return Vec::new();
    }
    let trouble = packages::other_series(&facts.driver.release, &facts.driver.headers);
    trouble.iter().map(|trouble| Hit::told("/var/lib/dpkg/status", trouble)).collect()
}

fn versions(facts: &Facts) -> Vec<Hit> {
    let driver = &facts.driver;
    let Some(module) = driver.loaded.as_ref().or(driver.on_disk.as_ref()) else { return Vec::new() };
    let mut found = Vec::new();
    if let (Some(loaded), Some(disk)) = (&driver.loaded, &driver.on_disk)
        && loaded != disk
    {
        let what = format!("{loaded} is loaded, and the module on the disk is {disk}");
        found.push(Hit::at("/proc/driver/nvidia/version", what, "reboot the host"));
    }
    let target = driver.on_disk.as_ref().unwrap_or(module);
    for library in ["libcuda", "libnvidia-ml"] {
        let of: Vec<&str> =
            driver.libraries.iter().filter(|(name, _)| name == library).map(|(_, version)| version.as_str()).collect();
        let Some(first) = of.first().filter(|_| of != [target.as_str()]) else { continue };
        let place = format!("/usr/lib/x86_64-linux-gnu/{library}.so.{first}");
        let what = format!("{library} is {}, the module {target}", of.join(" and "));
        found.push(Hit::at(place, what, again(facts)));
    }
    // Firmware of another branch is not taken; a driver that never had any needs none.
    let needs_firmware = driver.is_open && driver.loaded.is_some();
    if needs_firmware && !driver.firmware.is_empty() && !driver.firmware.contains(module) {
        let have = driver.firmware.join(" and ");
        let what = format!("the open modules {module} need the firmware of that version, and there is {have}");
        found.push(Hit::at(format!("/lib/firmware/nvidia/{module}"), what, again(facts)));
    }
    found
}

/// Installing the one driver anew puts all its parts right.
pub fn again(facts: &Facts) -> String {
    match &facts.driver.ours {
        Some(_) => "gpu-handoff setup driver".to_string(),
        None => "install one version of the driver whole: from packages: apt-get install --reinstall, of the package that dpkg -S \
                 libcuda.so.1 names; with NVIDIA's installer: gpu-handoff setup driver --dry-run"
            .to_string(),
    }
}

fn not_for_card(facts: &Facts) -> Vec<Hit> {
    let driver = &facts.driver;
    let Some(version) = driver.loaded.as_ref().or(driver.on_disk.as_ref()) else { return Vec::new() };
    // Of modules that are not loaded nobody tells the flavour.
    let flavour = if driver.loaded.is_some() && driver.is_open { Flavour::Open } else { Flavour::Proprietary };
    let mut found = Vec::new();
    for slot in &facts.slots {
        let is_home = match facts.config.homes.get(&slot.id) {
            Some(Home::Driver(name)) => name == "nvidia",
            Some(Home::None) => false,
            None => true,
        };
        let Some(gpu) = slot.gpu().filter(|gpu| is_home && !gpu.is_on("nvidia")) else { continue };
        let flavours = if driver.loaded.is_some() { &[flavour][..] } else { &[Flavour::Open, Flavour::Proprietary] };
        let objections: Vec<_> =
            flavours.iter().filter_map(|flavour| flavour::objection(gpu.device, version, *flavour, None)).collect();
        if objections.len() == flavours.len()
            && let Some(objection) = objections.into_iter().next()
        {
            let place = gpu.address.attribute("device");
            let hit = Hit::told(place, &objection.of(&gpu.address.to_string()));
            found.push(hit.or_else("take its other modules: gpu-handoff setup driver --dry-run"));
        }
    }
    found
}

fn unsigned(facts: &Facts) -> Vec<Hit> {
    let path = facts.driver.unsigned.as_ref().filter(|_| facts.driver.is_secure);
    path.map(|path| Hit::at(path, "Secure Boot is on, and this module has no signature", SIGN)).into_iter().collect()
}

fn drm_holds(facts: &Facts) -> Vec<Hit> {
    let version = facts.driver.loaded.as_ref().and_then(|text| text.parse::<Version>().ok());
    let Some(version) = version.filter(|version| facts.driver.drm_modeset && version.drm_looks_once()) else {
        return Vec::new();
    };
    let loaded = facts.driver.loaded.as_deref().unwrap_or_default();
    let found = format!("driver {loaded} with nvidia_drm's modeset=1 holds every card");
    let newer = if version >= Version::of(590, 0, 0) { "590.44.01" } else { "580.105.08" };
    let remedy = format!(
        "take {newer} or newer; or, where nobody needs a screen on the card: echo 'options nvidia_drm modeset=0 fbdev=0' > /etc/modprobe.d/nvidia-drm-modeset.conf && update-initramfs -u -k all"
    );
    vec![Hit::at("/sys/module/nvidia_drm/parameters/modeset", found, remedy)]
}

fn services(facts: &Facts) -> Vec<Hit> {
    let policy = &facts.config.policy;
    if facts.slots.is_empty() {
        return Vec::new();
    }
    let hit = |unit: &String, key: &str| {
        let found = format!("{unit} runs, and policy.{key} is refuse");
        let remedy =
            format!("{{\"policy\":{{\"{key}\":\"stop\"}}}} in {}; or: systemctl disable --now {unit}", config::PATH);
        Hit::at(format!("/sys/fs/cgroup/system.slice/{unit}"), found, remedy)
    };
    let nvidias = facts.driver.services.iter().filter(|_| !policy.stop_nvidia_services);
    let displays = facts.driver.displays.iter().filter(|_| !policy.stop_units);
    nvidias.map(|unit| hit(unit, "nvidia_services")).chain(displays.map(|unit| hit(unit, "unit"))).collect()
}
