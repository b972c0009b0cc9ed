//! The device nodes of the NVIDIA driver, which no udev rule of the kernel's makes.
//!
//! Names, numbers and modes are those of nvidia-modprobe: major 195 with minor N for a GPU, 254 for modeset, 255 for
//! the control device; nvidia-uvm's major is dynamic.

use super::inventory::functions_of_driver;
use super::nvidia;
use crate::sys::{DeviceNumber, Kernel, Node};

/// The modules that device nodes belong to.
pub const MODULES: [&str; 4] = ["nvidia", nvidia::UVM, "nvidia_modeset", "nvidia_drm"];

/// What CUDA needs.
pub const UVM: &str = "/dev/nvidia-uvm";

/// The major of everything but nvidia-uvm and nvidia-caps.
pub const NVIDIA_MAJOR: u64 = 195;
pub const MODESET_MINOR: u64 = 254;
pub const CONTROL_MINOR: u64 = 255;

const PARAMS: &str = "/proc/driver/nvidia/params";

/// The driver's own default.
const ANYBODY: u32 = 0o666;

/// The nodes that belong to the loaded modules and are missing or wrong.
pub fn missing(kernel: &dyn Kernel) -> Vec<Node> {
    let Some(permission) = Permission::read(kernel) else { return Vec::new() };
    wanted(kernel)
        .into_iter()
        .filter(|(path, number)| kernel.device_number(path).ok() != Some(*number))
        .map(|(path, number)| Node { path, number, mode: permission.mode, uid: permission.uid, gid: permission.gid })
        .collect()
}

/// Those that belong to the loaded modules, with the numbers that the driver has now.
pub fn wanted(kernel: &dyn Kernel) -> Vec<(String, DeviceNumber)> {
    let mut nodes = Vec::new();
    let mut add = |path: String, major: u64, minor: u64| nodes.push((path, DeviceNumber { major, minor }));
    for address in kernel.list("/proc/driver/nvidia/gpus") {
        if let Some(minor) = nvidia::minor(kernel, &address) {
            add(format!("/dev/nvidia{minor}"), NVIDIA_MAJOR, minor);
        }
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
        let directory = format!("/sys/bus/pci/devices/{address}/drm");
        for name in kernel.list(&directory) {
            if let Some(number) = kernel.text(&format!("{directory}/{name}/dev")).and_then(|text| text.parse().ok()) {
                nodes.push((format!("/dev/dri/{name}"), number));
            }
        }
    }
    nodes
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
