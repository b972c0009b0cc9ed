//! The device nodes of the NVIDIA driver, which no udev rule of the kernel's makes.
//!
//! Names, numbers and modes are those of nvidia-modprobe: major 195 with minor N for a GPU, 254 for modeset, 255 for
//! the control device; nvidia-uvm's major is dynamic.

use super::inventory::{Function, VFIO_PCI, functions_of_driver, nvidia_slots};
use super::nvidia::{self, Minors};
use crate::address::Address;
use crate::sorted;
use crate::sys::{DeviceNumber, Kernel, Node};

/// The modules that device nodes belong to.
pub const MODULES: [&str; 4] = ["nvidia", nvidia::UVM, "nvidia_modeset", "nvidia_drm"];

/// What CUDA needs.
pub const UVM: &str = "/dev/nvidia-uvm";

/// The major of everything but nvidia-uvm and nvidia-caps.
pub const NVIDIA_MAJOR: u64 = 195;
pub const MODESET_MINOR: u64 = 254;
pub const CONTROL_MINOR: u64 = 255;
pub const CONTROL: DeviceNumber = DeviceNumber { major: NVIDIA_MAJOR, minor: CONTROL_MINOR };

/// The directory of the nodes that stand for what a process may do, with MIG for instance.
pub const CAPS: &str = "/dev/nvidia-caps";
const CAPABILITIES: &str = "/proc/driver/nvidia/capabilities";
/// `gpu0/mig/gi1/ci0/access`
const CAPABILITIES_DEPTH: usize = 8;

const PARAMS: &str = "/proc/driver/nvidia/params";

/// The driver's own default.
const ANYBODY: u32 = 0o666;

/// The nodes that belong to the loaded modules and are missing or wrong; of GPUs not while the driver is busy.
pub fn missing(kernel: &dyn Kernel) -> Vec<Node> {
    let Some(permission) = Permission::read(kernel) else { return Vec::new() };
    wanted(kernel)
        .into_iter()
        .filter(|(path, number)| kernel.device_number(path).ok() != Some(*number))
        .map(|(path, number)| Node { path, number, mode: permission.mode, uid: permission.uid, gid: permission.gid })
        .collect()
}

/// As [`missing`], of the driver's capabilities: nobody makes these before somebody asks for one.
pub fn missing_capabilities(kernel: &dyn Kernel) -> Vec<Node> {
    let Some(permission) = Permission::read(kernel) else { return Vec::new() };
    let caps = capabilities(kernel).into_iter().filter(|cap| kernel.device_number(&cap.path).ok() != Some(cap.number));
    caps.map(|cap| Node { uid: permission.uid, gid: permission.gid, ..cap }).collect()
}

/// The nodes in `/dev/nvidia-caps` as the driver has them, by the files that name their minors.
pub fn capabilities(kernel: &dyn Kernel) -> Vec<Node> {
    let Some(major) = nvidia::major(kernel, "nvidia-caps") else { return Vec::new() };
    let mut found = Vec::new();
    let mut paths = vec![(CAPABILITIES.to_string(), 0)];
    while let Some((path, depth)) = paths.pop() {
        let names = kernel.list(&path);
        if !names.is_empty() && depth < CAPABILITIES_DEPTH {
            paths.extend(names.iter().map(|name| (format!("{path}/{name}"), depth + 1)));
            continue;
        }
        let text = kernel.text(&path).unwrap_or_default();
        let value = |name: &str| parameter(&text, name);
        let Some(minor) = value("DeviceFileMinor").filter(|_| value("DeviceFileModify") != Some(0)) else { continue };
        found.push(Node {
            path: format!("{CAPS}/nvidia-cap{minor}"),
            number: DeviceNumber { major, minor: u64::from(minor) },
            mode: value("DeviceFileMode").unwrap_or(0o400),
            uid: 0,
            gid: 0,
        });
    }
    sorted::sort_by_key(&mut found, |node| node.number);
    found
}

/// Those that belong to the loaded modules, with the numbers that the driver has now; of GPUs not while it is busy.
pub fn wanted(kernel: &dyn Kernel) -> Vec<(String, DeviceNumber)> {
    let mut nodes = Vec::new();
    let mut add = |path: String, major: u64, minor: u64| nodes.push((path, DeviceNumber { major, minor }));
    for (_, minor) in Minors::read(kernel).each() {
        add(format!("/dev/nvidia{minor}"), NVIDIA_MAJOR, minor);
    }
    if kernel.exists("/sys/module/nvidia") {
        add("/dev/nvidiactl".to_string(), NVIDIA_MAJOR, CONTROL_MINOR);
    }
    if kernel.exists("/sys/module/nvidia_modeset") {
        add("/dev/nvidia-modeset".to_string(), NVIDIA_MAJOR, MODESET_MINOR);
    }
    if let Some(major) = nvidia::major(kernel, "nvidia-uvm") {
        add(UVM.to_string(), major, 0);
        add("/dev/nvidia-uvm-tools".to_string(), major, 1);
    }
    nodes
}

/// The DRM nodes of the GPUs that the NVIDIA driver has. The kernel makes them itself.
pub fn drm(kernel: &dyn Kernel) -> Vec<(String, DeviceNumber)> {
    let mut nodes = Vec::new();
    for address in functions_of_driver(kernel, "nvidia") {
        nodes.extend(drm_of(kernel, address));
    }
    nodes
}

/// The GPUs that nvidia_drm may have DRM devices of: one that is with a VM may have left its own behind.
pub fn gpus_of_nvidia_drm(kernel: &dyn Kernel) -> Vec<Address> {
    let gpus = nvidia_slots(kernel).into_iter().filter_map(|slot| slot.gpu().cloned());
    let may_be =
        |gpu: &Function| gpu.driver.as_deref().is_none_or(|driver| matches!(driver, "nvidia" | VFIO_PCI | "pci-stub"));
    gpus.filter(may_be).map(|gpu| gpu.address).collect()
}

/// The DRM nodes of a function, whichever driver has it now.
pub fn drm_of(kernel: &dyn Kernel, address: Address) -> Vec<(String, DeviceNumber)> {
    let directory = address.attribute("drm");
    // controlD64 is the card by an old name, which has no node.
    let names =
        kernel.list(&directory).into_iter().filter(|name| kernel.link_name(&format!("{directory}/{name}")).is_err());
    names
        .filter_map(|name| {
            let number = kernel.text(&format!("{directory}/{name}/dev"))?.parse().ok()?;
            Some((format!("/dev/dri/{name}"), number))
        })
        .collect()
}

/// The mode of the nodes, as the administrator gave it to the driver.
pub fn mode(kernel: &dyn Kernel) -> u32 {
    let text = kernel.text(PARAMS).unwrap_or_default();
    parameter(&text, "DeviceFileMode").unwrap_or(ANYBODY)
}

fn parameter(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

/// `/dev/nvidia0`, as against those that belong to no single GPU.
pub fn is_gpu(path: &str) -> bool {
    path.strip_prefix("/dev/nvidia").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// `/proc/driver/nvidia/params`; none when the driver is not loaded or `ModifyDeviceFiles` is 0.
struct Permission {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Permission {
    fn read(kernel: &dyn Kernel) -> Option<Permission> {
        let text = kernel.text(PARAMS)?;
        let value = |name: &str| parameter(&text, name);
        if value("ModifyDeviceFiles") == Some(0) {
            return None;
        }
        Some(Permission {
            mode: value("DeviceFileMode").unwrap_or(ANYBODY),
            uid: value("DeviceFileUID").unwrap_or(0),
            gid: value("DeviceFileGID").unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn capabilities_are_found_at_any_depth() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-caps-{}", std::process::id()));
        let file = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        file("proc/devices", "Character devices:\n236 nvidia-caps\n237 nvidia-caps-imex-channels\n\nBlock devices:\n");
        let cap = |minor: u32, mode: u32, modify: u32| {
            format!("DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: {modify}\n")
        };
        file("proc/driver/nvidia/capabilities/mig/config", &cap(1, 256, 1));
        file("proc/driver/nvidia/capabilities/mig/monitor", &cap(2, 292, 1));
        file("proc/driver/nvidia/capabilities/gpu0/mig/gi1/access", &cap(12, 292, 1));
        file("proc/driver/nvidia/capabilities/fabric-imex-mgmt", &cap(1, 256, 0));
        let found = capabilities(&Linux::at(root.clone()));
        std::fs::remove_dir_all(&root).unwrap();
        let found: Vec<String> =
            found.iter().map(|node| format!("{} {} {:o}", node.path, node.number, node.mode)).collect();
        assert_eq!(
            found,
            [
                "/dev/nvidia-caps/nvidia-cap1 236:1 400",
                "/dev/nvidia-caps/nvidia-cap2 236:2 444",
                "/dev/nvidia-caps/nvidia-cap12 236:12 444"
            ]
        );
    }
}
