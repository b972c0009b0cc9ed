//! The device numbers whose being open means that a slot is in use.

use super::inventory::{Function, Slot, VFIO_PCI};
use super::nodes::{self, CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use super::nvidia::{self, Minors};
use super::{started, usage};
use crate::address::Address;
use crate::sys::{DeviceNumber, How, Kernel, OpenDevice, Sought, User};
use std::collections::{BTreeMap, BTreeSet};

/// Devices that all NVIDIA GPUs share, by the name of their major in `/proc/devices` and their minor. As long as one is
/// open, the module that has it cannot be unloaded.
const SHARED: [(&str, u64, &str); 4] = [
    ("nvidia-uvm", 0, "/dev/nvidia-uvm"),
    ("nvidia-uvm", 1, "/dev/nvidia-uvm-tools"),
    ("nvidia-nvlink", 0, "/dev/nvidia-nvlink"),
    ("nvidia-nvswitch", 255, "/dev/nvidia-nvswitchctl"),
];

/// The same with many minors, with which their paths end.
const FAMILIES: [(&str, &str); 3] = [
    ("nvidia-caps", "/dev/nvidia-caps/nvidia-cap"),
    ("nvidia-caps-imex-channels", "/dev/nvidia-caps-imex-channels/channel"),
    ("nvidia-nvswitch", "/dev/nvidia-nvswitch"),
];

/// How far a look for holders reaches beyond the slots' own nodes, to the devices that all NVIDIA GPUs share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Who uses these slots, as far as anybody can tell: shared devices count in a process that has no other GPU open.
    Slots,
    /// Who could make unbinding these slots wait: the control device counts, since a descriptor of it can have GPUs
    /// attached and nothing tells which. Not when the driver has none of the slots' started, so that nobody has one
    /// attached; but always where a wait for whoever attaches one in the last moment would never end.
    Unbinding,
    /// Who could make unloading the driver fail: every GPU's node and every shared device.
    Unloading,
}

/// The device numbers whose being open means that a slot is in use.
#[derive(Debug, Default)]
pub struct Devices {
    /// Open: the slot is in use.
    pub(super) held: BTreeMap<DeviceNumber, String>,
    /// Open in a process that has no GPU's own node open: nobody can tell which GPU it uses, so the slot is in use.
    shared: BTreeMap<DeviceNumber, String>,
    /// Nodes of GPUs that stay where they are.
    elsewhere: Vec<DeviceNumber>,
    /// Majors with many minors, what their paths begin with, and whether they are held or shared.
    families: Vec<(u64, &'static str, bool)>,
    /// The driver is busy and did not say which nodes are the slots': who holds them is not known.
    pub is_blind: bool,
    /// Buffers of the NVIDIA driver count, and whether as held or as shared.
    buffers: Option<bool>,
    /// The modules that all of it belongs to; none when that is not known, or says too little.
    modules: Option<Vec<String>>,
}

/// Whether somebody may have one of the slots' GPUs attached, or might in the last moment, and never let go of it.
fn may_be_attached(kernel: &dyn Kernel, slots: &[Slot]) -> bool {
    let gpus = slots.iter().flat_map(|slot| &slot.functions).filter(|function| function.is_nvidia_gpu());
    nvidia::version(kernel).is_none_or(nvidia::Version::forgets_attached)
        || gpus.into_iter().any(|gpu| started::may_be(kernel, gpu.address))
}

impl Devices {
    pub fn of_slots(kernel: &dyn Kernel, slots: &[Slot], reach: Reach) -> Devices {
        let mut devices = Devices { modules: Some(Vec::new()), ..Devices::default() };
        let mut on_nvidia = false;
        for function in slots.iter().flat_map(|slot| &slot.functions) {
            devices.add_function(kernel, function);
            if let Some(group) = function.iommu_group {
                devices.add_attribute(kernel, &format!("/sys/class/vfio/{group}/dev"), &format!("/dev/vfio/{group}"));
            }
            // While unbinding hangs the driver link is gone, but the driver still has the GPU.
            let known = kernel.exists(&format!("/proc/driver/nvidia/gpus/{}", function.address));
            on_nvidia |= known || function.is_on("nvidia");
        }
        if !on_nvidia {
            return devices;
        }
        // Before an unbinding, which could wait for ever, the processes are looked at whatever the counts say.
        let stack = nvidia::unload_order(kernel, "nvidia").ok().filter(|_| reach != Reach::Unbinding);
        devices.modules = devices.modules.zip(stack).map(|(known, stack)| [known, stack].concat());
        devices.buffers = Some(reach != Reach::Slots);
        let minors = Minors::read(kernel);
        devices.is_blind = minors.is_busy;
        for (address, minor) in minors.each() {
            let number = DeviceNumber { major: NVIDIA_MAJOR, minor };
            let moves = slots.iter().flat_map(|slot| &slot.functions).any(|f| f.address == address);
            if moves || reach == Reach::Unloading {
                devices.held.insert(number, format!("/dev/nvidia{minor}"));
            } else {
                devices.elsewhere.push(number);
            }
        }
        let mut unused = BTreeMap::new();
        let into = match reach {
            Reach::Slots => &mut devices.shared,
            Reach::Unbinding if !may_be_attached(kernel, slots) => &mut unused,
            Reach::Unbinding | Reach::Unloading => &mut devices.held,
        };
        for (minor, path) in [(CONTROL_MINOR, "/dev/nvidiactl"), (MODESET_MINOR, "/dev/nvidia-modeset")] {
            into.insert(DeviceNumber { major: NVIDIA_MAJOR, minor }, path.to_string());
        }
        let into = if reach == Reach::Unloading { &mut devices.held } else { &mut devices.shared };
        for (name, minor, path) in SHARED {
            if let Some(major) = nvidia::major(kernel, name) {
                into.insert(DeviceNumber { major, minor }, path.to_string());
            }
        }
        for (name, path) in FAMILIES {
            let major = nvidia::major(kernel, name);
            devices.families.extend(major.map(|major| (major, path, reach == Reach::Unloading)));
        }
        devices
    }

    /// Only the vfio devices of these slots: what a VM that has them holds.
    pub fn vfio_of_slots(kernel: &dyn Kernel, slots: &[Slot]) -> Devices {
        let mut devices = Devices { modules: Some(Vec::new()), ..Devices::default() };
        for function in slots.iter().flat_map(|slot| &slot.functions).filter(|f| f.is_on(VFIO_PCI)) {
            devices.add_modules(function);
            devices.add_vfio_device(kernel, function.address);
            if let Some(group) = function.iommu_group {
                devices.add_attribute(kernel, &format!("/sys/class/vfio/{group}/dev"), &format!("/dev/vfio/{group}"));
            }
        }
        devices
    }

    /// The DRM nodes of every GPU that the NVIDIA driver has: unloading nvidia_drm needs them closed.
    pub fn add_all_drm(&mut self, kernel: &dyn Kernel, addresses: &[Address]) {
        for address in addresses {
            self.add_drm(kernel, *address);
        }
    }

    /// What a function that is unbound alone would wait for: its own nodes, but for a GPU's on nvidia.
    pub fn of_function(kernel: &dyn Kernel, function: &Function) -> Devices {
        let mut devices = Devices { modules: Some(Vec::new()), ..Devices::default() };
        devices.add_function(kernel, function);
        devices
    }

    fn add_modules(&mut self, function: &Function) {
        let of_driver = match (function.driver.as_deref(), &function.module) {
            (None, _) => Some(Vec::new()),
            // Groups and containers of vfio are another module's files than devices.
            (Some(VFIO_PCI), _) => Some(vec!["vfio_pci".to_string(), "vfio".to_string()]),
            (Some(_), module) => module.clone().map(|module| vec![module]),
        };
        self.modules = self.modules.take().zip(of_driver).map(|(known, more)| [known, more].concat());
    }

    /// By the kernel's own count nobody has any of it open: there is nobody to look for.
    pub fn is_idle(&self, kernel: &dyn Kernel) -> bool {
        self.modules.as_ref().is_some_and(|modules| usage::are_idle(kernel, modules))
    }

    /// What to look for.
    pub fn sought<'a>(all: impl IntoIterator<Item = &'a Devices>) -> Sought {
        let mut majors = BTreeSet::new();
        for devices in all {
            let numbers = devices.held.keys().chain(devices.shared.keys()).chain(&devices.elsewhere);
            majors.extend(numbers.map(|number| number.major));
            majors.extend(devices.families.iter().map(|(major, ..)| *major));
        }
        Sought { majors: majors.into_iter().collect(), among: Vec::new() }
    }

    /// The nodes at these paths are worth watching.
    pub fn paths(&self) -> Vec<String> {
        self.held.values().cloned().collect()
    }

    /// What is in use while it is open.
    pub fn numbers(&self) -> Vec<DeviceNumber> {
        self.held.keys().copied().collect()
    }

    /// Why the slot is in use by this process: the device, its usual path, and how it has it.
    pub fn reason(&self, user: &User) -> Option<(DeviceNumber, String, How)> {
        let find = |path: &dyn Fn(&OpenDevice) -> Option<String>| {
            user.open.iter().find_map(|device| Some((device.number, path(device)?, device.how)))
        };
        let uses_another = || user.open.iter().any(|device| self.elsewhere.contains(&device.number));
        find(&|device| self.path(device, true))
            .or_else(|| if uses_another() { None } else { find(&|device| self.path(device, false)) })
    }

    fn path(&self, device: &OpenDevice, held: bool) -> Option<String> {
        if device.how == How::Buffer {
            return (self.buffers == Some(held)).then(|| "a buffer of the NVIDIA driver".to_string());
        }
        let known = if held { &self.held } else { &self.shared };
        known.get(&device.number).cloned().or_else(|| self.family(device.number, held))
    }

    fn family(&self, DeviceNumber { major, minor }: DeviceNumber, held: bool) -> Option<String> {
        let (_, path, _) = self.families.iter().find(|family| (family.0, family.2) == (major, held))?;
        Some(format!("{path}{minor}"))
    }

    fn add_function(&mut self, kernel: &dyn Kernel, function: &Function) {
        let (address, before) = (function.address, self.held.len());
        self.add_drm(kernel, address);
        let sound = format!("/sys/bus/pci/devices/{address}/sound");
        for card in kernel.list(&sound) {
            for name in kernel.list(&format!("{sound}/{card}")) {
                self.add_attribute(kernel, &format!("{sound}/{card}/{name}/dev"), &format!("/dev/snd/{name}"));
            }
        }
        // An adapter with an open node is not let go by the kernel either.
        let device = format!("/sys/bus/pci/devices/{address}");
        for adapter in kernel.list(&device).iter().filter(|name| name.starts_with("i2c-")) {
            for name in kernel.list(&format!("{device}/{adapter}/i2c-dev")) {
                let attribute = format!("{device}/{adapter}/i2c-dev/{name}/dev");
                self.add_attribute(kernel, &attribute, &format!("/dev/{name}"));
            }
        }
        self.add_vfio_device(kernel, address);
        // Without a node there is nothing to have open; what NVIDIA's driver has besides is added for all of its cards.
        if self.held.len() > before || function.is_on(VFIO_PCI) {
            self.add_modules(function);
        }
    }

    fn add_drm(&mut self, kernel: &dyn Kernel, address: Address) {
        for (path, number) in nodes::drm_of(kernel, address) {
            self.held.insert(number, path);
        }
        // The framebuffer that a DRM driver makes of it, for the console and for whoever opens it.
        let graphics = format!("/sys/bus/pci/devices/{address}/graphics");
        for name in kernel.list(&graphics) {
            self.add_attribute(kernel, &format!("{graphics}/{name}/dev"), &format!("/dev/{name}"));
        }
    }

    fn add_vfio_device(&mut self, kernel: &dyn Kernel, address: Address) {
        let vfio = format!("/sys/bus/pci/devices/{address}/vfio-dev");
        for name in kernel.list(&vfio) {
            self.add_attribute(kernel, &format!("{vfio}/{name}/dev"), &format!("/dev/vfio/devices/{name}"));
        }
    }

    fn add_attribute(&mut self, kernel: &dyn Kernel, attribute: &str, path: &str) {
        if let Some(number) = kernel.text(attribute).and_then(|text| text.parse().ok()) {
            self.held.insert(number, path.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_counts_as_what_the_drivers_buffers_count_as() {
        let number = DeviceNumber { major: 0, minor: 0 };
        let counts = |buffers, held| {
            let devices = Devices { buffers, ..Devices::default() };
            devices.path(&OpenDevice { number, how: How::Buffer }, held).is_some()
        };
        assert!(counts(Some(true), true) && counts(Some(false), false));
        assert!(!counts(Some(true), false) && !counts(Some(false), true));
        assert!(!counts(None, true) && !counts(None, false));
    }
}
