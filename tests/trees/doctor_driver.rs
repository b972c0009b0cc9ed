use super::doctor::{fires, silent, well};
use super::setup_driver::executable;
use super::*;

// doctor: NVIDIA's driver

const RELEASE: &str = "6.12.48-1-pve";
const NEXT: &str = "6.14.0-1-pve";

/// Kernels with these modules.
fn kernel(host: Host, release: &str, modules: &str) -> Host {
    host.file(&format!("lib/modules/{release}/modules.dep"), &format!("{modules}\n"))
}

/// The driver is on the disk in this version, and loaded unless that is another.
fn driver(disk: &str, loaded: &str) -> Host {
    let host = kernel(well(), RELEASE, "updates/dkms/nvidia.ko: x");
    let host = executable(host, "usr/sbin/modinfo", &format!("#!/bin/sh\necho {disk}\n"));
    let line = format!("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {loaded}  Release Build\n");
    if loaded.is_empty() { host } else { host.file("proc/driver/nvidia/version", &line) }
}

fn library(host: Host, name: &str, version: &str) -> Host {
    host.file(&format!("usr/lib/x86_64-linux-gnu/{name}.so.{version}"), "")
}

#[test]
fn no_driver_for_the_running_kernel() {
    let bare = || Host::new().card("0000:01:00", "", "snd_hda_intel");
    let place = format!("/lib/modules/{RELEASE}");
    fires("driver-missing", &bare(), &place, &["warning", "has no nvidia module", "/var/cache/gpu-handoff"]);
    let next = kernel(bare(), NEXT, "updates/nvidia.ko:");
    fires("driver-missing", &next, &place, &[&format!("kernel {NEXT} has it: reboot the host")]);
    silent("driver-missing", &kernel(bare(), RELEASE, "updates/nvidia.ko:"));
    silent("driver-missing", &Host::new().card("0000:01:00", "nouveau", "snd_hda_intel"));
    silent("driver-missing", &bare().config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#));
    silent("driver-missing", &Host::new());
}

#[test]
fn no_driver_for_the_next_kernel() {
    let host = || kernel(driver("580.95.05", "580.95.05"), NEXT, "kernel/x.ko:");
    let place = format!("/lib/modules/{NEXT}");
    fires("driver-not-for-next-kernel", &host(), &place, &["warning", NEXT]);
    // Whoever built it for this one.
    let dkms = host().file("var/lib/dkms/nvidia/580.95.05/x", "");
    fires(
        "driver-not-for-next-kernel",
        &dkms,
        &place,
        &[&format!("dkms autoinstall -k {NEXT}"), "proxmox-headers-6.14.0-1-pve"],
    );
    silent("driver-not-for-next-kernel", &kernel(driver("580.95.05", ""), NEXT, "updates/nvidia.ko:"));
    // An older one is no matter.
    silent("driver-not-for-next-kernel", &kernel(driver("580.95.05", ""), "6.8.12-4-pve", "kernel/x.ko:"));
}

#[test]
fn a_driver_that_does_not_build() {
    let on = |release: &str| kernel(driver("550.163.01", "550.163.01"), release, "kernel/x.ko:");
    let words = ["warning", "driver 550.163.01 is known not to build for kernel 6.17.1-1-pve", "take a newer branch"];
    fires("driver-does-not-build", &on("6.17.1-1-pve"), "/lib/modules/6.17.1-1-pve", &words);
    silent("driver-does-not-build", &on(NEXT));
}

#[test]
fn headers_of_another_series() {
    let status = "Package: proxmox-headers-6.14\nStatus: install ok installed\nVersion: 1\n\nPackage: proxmox-headers-6.12\nStatus: deinstall ok config-files\n";
    let host = || well().file("var/lib/dpkg/status", status).file("var/lib/dkms/nvidia/580.95.05/x", "");
    let words = ["warning", "follow 6.14, and kernel 6.12.48-1-pve runs", "apt-get install proxmox-headers-6.12"];
    fires("headers-other-series", &host(), "/var/lib/dpkg/status", &words);
    silent("headers-other-series", &host().file("proc/sys/kernel/osrelease", "6.14.0-1-pve\n"));
    // Who builds nothing needs none.
    silent("headers-other-series", &host().without("var/lib/dkms"));
}

#[test]
fn versions_that_do_not_fit() {
    let host = driver("580.95.05", "570.86.16");
    let words = ["error", "570.86.16 is loaded, and the module on the disk is 580.95.05", "reboot the host"];
    fires("driver-versions", &host, "/proc/driver/nvidia/version", &words);
    let old = library(driver("580.95.05", "580.95.05"), "libcuda", "570.86.16");
    fires(
        "driver-versions",
        &old,
        "/usr/lib/x86_64-linux-gnu/libcuda.so.570.86.16",
        &["libcuda is 570.86.16, the module 580.95.05"],
    );
    let two = library(library(driver("580.95.05", ""), "libnvidia-ml", "580.95.05"), "libnvidia-ml", "570.86.16");
    fires("driver-versions", &two, "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.570.86.16", &["570.86.16 and 580.95.05"]);
    let firmware = driver("580.95.05", "580.95.05").file("lib/firmware/nvidia/570.86.16/gsp_ga10x.bin", "");
    fires("driver-versions", &firmware, "/lib/firmware/nvidia/580.95.05", &["there is 570.86.16"]);
    let fits = library(library(driver("580.95.05", "580.95.05"), "libcuda", "580.95.05"), "libnvidia-ml", "580.95.05");
    silent(
        "driver-versions",
        &fits.file("lib/firmware/nvidia/580.95.05/gsp_ga10x.bin", "").file("usr/lib/x86_64-linux-gnu/libcuda.so.1", ""),
    );
}

#[test]
fn a_driver_that_does_not_have_the_card() {
    // A card that no driver has; its id, and the driver that is there.
    let with = |id: &str, version: &str| {
        let host = Host::new().function("0000:01:00.0", "030000", &format!("10de:{id}"), "", 1);
        let host = kernel(host, RELEASE, "updates/dkms/nvidia.ko: x");
        executable(host, "usr/sbin/modinfo", &format!("#!/bin/sh\necho {version}\n"))
    };
    let place = "/sys/bus/pci/devices/0000:01:00.0/device";
    fires(
        "driver-not-for-card",
        &with("1b80", "590.44.01"),
        place,
        &["error", "no longer has the GPU with id 10de:1b80", "580"],
    );
    fires("driver-not-for-card", &with("2684", "470.256.02"), place, &["take 520 or newer"]);
    silent("driver-not-for-card", &with("2684", "580.95.05"));
    silent("driver-not-for-card", &with("1b80", "580.95.05"));
    // Loaded, it tells which modules it has: the open ones do not have Pascal.
    let loaded =
        with("1b80", "580.95.05").file("proc/driver/nvidia/version", "x Open Kernel Module x86_64  580.95.05  x\n");
    fires("driver-not-for-card", &loaded, place, &["has no open modules"]);
    silent("driver-not-for-card", &with("1b80", "590.44.01").config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#));
}

#[test]
fn secure_boot_and_a_module_without_a_signature() {
    const SECURE_BOOT: &str = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
    let module = format!("lib/modules/{RELEASE}/updates/dkms/nvidia.ko");
    let host = |secure: &str, end: &str| {
        driver("580.95.05", "").file(SECURE_BOOT, &format!("\x06\0\0\0{secure}")).file(&module, &format!("ELF{end}"))
    };
    fires(
        "secure-boot-unsigned",
        &host("\x01", ""),
        &format!("/{module}"),
        &["error", "mokutil --import /var/lib/dkms/mok.pub"],
    );
    silent("secure-boot-unsigned", &host("\x01", "~Module signature appended~\n"));
    silent("secure-boot-unsigned", &host("\0", ""));
}

#[test]
fn nvidia_drm_holds_every_card() {
    let host = |version: &str, modeset: &str| {
        driver(version, version).file("sys/module/nvidia_drm/parameters/modeset", &format!("{modeset}\n"))
    };
    let place = "/sys/module/nvidia_drm/parameters/modeset";
    fires("drm-holds-card", &host("570.86.16", "Y"), place, &["note", "take 580.105.08 or newer"]);
    fires("drm-holds-card", &host("590.10", "Y"), place, &["take 590.44.01 or newer"]);
    silent("drm-holds-card", &host("570.86.16", "N"));
    silent("drm-holds-card", &host("580.105.08", "Y"));
}

#[test]
fn services_that_hold_the_card() {
    let runs = |unit: &str| {
        well().file(&format!("sys/fs/cgroup/system.slice/{unit}/cgroup.events"), "populated 1\nfrozen 0\n")
    };
    let refuse = r#"{"policy":{"nvidia_services":"refuse"}}"#;
    let host = runs("nvidia-persistenced.service").config(refuse);
    let place = "/sys/fs/cgroup/system.slice/nvidia-persistenced.service";
    let finding = fires("services-hold-card", &host, place, &["warning", "policy.nvidia_services is refuse"]);
    // What it says to write is understood.
    let json = finding["remedy"].as_str().unwrap().split(" in /").next().unwrap().to_string();
    let told = runs("nvidia-persistenced.service").config(&json);
    assert_eq!(told.run("config check").code, Some(0));
    silent("services-hold-card", &told);
    let screen = runs("gdm3.service");
    fires("services-hold-card", &screen, "/sys/fs/cgroup/system.slice/gdm3.service", &["policy.unit is refuse"]);
    silent("services-hold-card", &screen.config(r#"{"policy":{"unit":"stop"}}"#));
}
