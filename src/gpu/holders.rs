//! Who has a GPU open: a look by device number over every descriptor of every process, in all namespaces.

use super::inventory::{Slot, VFIO_PCI};
use super::nodes::{CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use super::nvidia;
use crate::sys::{DeviceNumber, Kernel, OpenDevice};
use std::collections::BTreeMap;
use std::fmt;

/// A process that has a device of the slot open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    pub command: String,
    /// The usual path of the device that it has open; its own path to it may be another.
    pub via: String,
    pub place: Place,
}

/// Where a process runs, read from its cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Container(u32),
    Vm(u32),
    Unit(String),
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "PID {} ({}", self.pid, self.command)?;
        match &self.place {
            Place::Container(id) => write!(f, ", container {id}")?,
            Place::Vm(id) => write!(f, ", VM {id}")?,
            Place::Unit(name) => write!(f, ", {name}")?,
            Place::Unknown => {}
        }
        write!(f, ") has {} open", self.via)
    }
}

impl Holder {
    /// What to type to make it let go.
    pub fn remedy(&self) -> String {
        match &self.place {
            Place::Container(id) => format!("pct stop {id}"),
            Place::Vm(id) => format!("qm stop {id}"),
            Place::Unit(name) if is_service(name) => format!("systemctl stop {name}"),
            _ => format!("kill {}", self.pid),
        }
    }
}

/// How far a look for holders reaches beyond the slots' own nodes, to the devices that all NVIDIA GPUs share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Who uses these slots, as far as anybody can tell: shared devices count in a process that has no other GPU open.
    Slots,
    /// Who could make unbinding these slots wait: the control device counts always, since a descriptor of it can have
    /// GPUs attached and nothing tells which.
    Unbinding,
    /// Who could make unloading the driver fail: every GPU's node and every shared device.
    Unloading,
}

/// The device numbers whose being open means that a slot is in use.
#[derive(Debug, Default)]
pub struct Watched {
    /// Open: the slot is in use.
    held: BTreeMap<DeviceNumber, String>,
    /// Open in a process that has no GPU's own node open: nobody can tell which GPU it uses, so the slot is in use.
    shared: BTreeMap<DeviceNumber, String>,
    /// Nodes of GPUs that stay where they are.
    elsewhere: Vec<DeviceNumber>,
}

impl Watched {
    pub fn of_slots(kernel: &dyn Kernel, slots: &[Slot], reach: Reach) -> Watched {
        let mut watched = Watched::default();
        let mut on_nvidia = false;
        for function in slots.iter().flat_map(|slot| &slot.functions) {
            watched.add_function(kernel, &function.address);
            if let Some(group) = function.iommu_group {
                watched.add_attribute(kernel, &format!("/sys/class/vfio/{group}/dev"), &format!("/dev/vfio/{group}"));
            }
            // While unbinding hangs the driver link is gone, but the driver still has the GPU.
            let known = kernel.exists(&format!("/proc/driver/nvidia/gpus/{}", function.address));
            on_nvidia |= known || function.is_on("nvidia");
        }
        if !on_nvidia {
            return watched;
        }
        for address in kernel.list("/proc/driver/nvidia/gpus") {
            let Some(minor) = nvidia::minor(kernel, &address) else { continue };
            let number = DeviceNumber { major: NVIDIA_MAJOR, minor };
            let moves = slots.iter().flat_map(|slot| &slot.functions).any(|f| f.address == address);
            if moves || reach == Reach::Unloading {
                watched.held.insert(number, format!("/dev/nvidia{minor}"));
            } else {
                watched.elsewhere.push(number);
            }
        }
        let into = if reach == Reach::Slots { &mut watched.shared } else { &mut watched.held };
        for (minor, path) in [(CONTROL_MINOR, "/dev/nvidiactl"), (MODESET_MINOR, "/dev/nvidia-modeset")] {
            into.insert(DeviceNumber { major: NVIDIA_MAJOR, minor }, path.to_string());
        }
        if let Some(major) = nvidia::major(kernel, "nvidia-uvm") {
            let into = if reach == Reach::Unloading { &mut watched.held } else { &mut watched.shared };
            into.insert(DeviceNumber { major, minor: 0 }, "/dev/nvidia-uvm".to_string());
            into.insert(DeviceNumber { major, minor: 1 }, "/dev/nvidia-uvm-tools".to_string());
        }
        watched
    }

    /// Only the vfio devices of these slots: what a VM that has them holds.
    pub fn vfio_of_slots(kernel: &dyn Kernel, slots: &[Slot]) -> Watched {
        let mut watched = Watched::default();
        for function in slots.iter().flat_map(|slot| &slot.functions).filter(|f| f.is_on(VFIO_PCI)) {
            watched.add_vfio_device(kernel, &function.address);
            if let Some(group) = function.iommu_group {
                watched.add_attribute(kernel, &format!("/sys/class/vfio/{group}/dev"), &format!("/dev/vfio/{group}"));
            }
        }
        watched
    }

    /// The DRM nodes of every GPU that the NVIDIA driver has: unloading nvidia_drm needs them closed.
    pub fn add_all_drm(&mut self, kernel: &dyn Kernel, addresses: &[String]) {
        for address in addresses {
            self.add_drm(kernel, address);
        }
    }

    fn add_function(&mut self, kernel: &dyn Kernel, address: &str) {
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
    }

    fn add_drm(&mut self, kernel: &dyn Kernel, address: &str) {
        let drm = format!("/sys/bus/pci/devices/{address}/drm");
        for name in kernel.list(&drm) {
            self.add_attribute(kernel, &format!("{drm}/{name}/dev"), &format!("/dev/dri/{name}"));
        }
    }

    fn add_vfio_device(&mut self, kernel: &dyn Kernel, address: &str) {
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

    /// Who has any of them open, this process excepted; by PID, one entry each.
    pub fn holders(&self, kernel: &dyn Kernel) -> Vec<Holder> {
        self.holders_among(kernel, &kernel.open_devices())
    }

    /// As [`Watched::holders`], for who asks more than once about the same moment.
    pub fn holders_among(&self, kernel: &dyn Kernel, open: &[OpenDevice]) -> Vec<Holder> {
        let mut by_pid: BTreeMap<i32, Vec<DeviceNumber>> = BTreeMap::new();
        for open in open {
            by_pid.entry(open.pid).or_default().push(open.number);
        }
        by_pid.remove(&(std::process::id() as i32));
        by_pid
            .iter()
            .filter_map(|(pid, numbers)| {
                let held = numbers.iter().find_map(|number| self.held.get(number));
                let uses_another = numbers.iter().any(|number| self.elsewhere.contains(number));
                let shared = numbers.iter().find_map(|number| self.shared.get(number)).filter(|_| !uses_another);
                let via = held.or(shared)?;
                Some(describe(kernel, *pid, via))
            })
            .collect()
    }
}

fn describe(kernel: &dyn Kernel, pid: i32, via: &str) -> Holder {
    Holder {
        pid,
        command: kernel.text(&format!("/proc/{pid}/comm")).map_or_else(|| "?".to_string(), |name| printable(&name)),
        via: via.to_string(),
        place: place(&kernel.text(&format!("/proc/{pid}/cgroup")).unwrap_or_default()),
    }
}

/// A process chooses its own name; it must not write to the task log with it.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Reads the unified hierarchy's line of `/proc/PID/cgroup`: `0::/qemu.slice/111.scope`, `0::/lxc/101/ns/…`.
fn place(cgroup: &str) -> Place {
    let Some(path) = cgroup.lines().find_map(|line| line.strip_prefix("0::")) else { return Place::Unknown };
    let parts: Vec<&str> = path.split('/').collect();
    // Only where Proxmox puts them: below, whoever was given a cgroup of his own names what he likes.
    if let ["", first, second, ..] = parts[..] {
        if let ("lxc", Ok(id)) = (first, second.parse()) {
            return Place::Container(id);
        }
        if let ("qemu.slice", Some(Ok(id))) = (first, second.strip_suffix(".scope").map(str::parse)) {
            return Place::Vm(id);
        }
    }
    // Plain lxc-start, without Proxmox's lxc.cgroup.dir, names the payload itself.
    if let Some(Ok(id)) = parts.iter().find_map(|part| part.strip_prefix("lxc.payload.")).map(str::parse) {
        return Place::Container(id);
    }
    // The outermost is systemd's; below it is what that unit makes of its cgroup.
    match parts.iter().find(|part| is_unit(part)) {
        Some(unit) => Place::Unit((*unit).to_string()),
        None => Place::Unknown,
    }
}

/// Units in which others' processes run: stopping one would end far more than what uses the GPU, down to the very task
/// that starts the VM. What uses the GPU there counts as a mere process.
const MACHINERY: [&str; 9] =
    ["pve", "qmeventd", "spiceproxy", "ssh", "user@", "systemd-", "dbus", "getty@", "serial-getty@"];

/// One that systemd can stop and start again: a scope, such as a login session, is gone for good when it is stopped.
pub fn is_service(unit: &str) -> bool {
    unit.ends_with(".service") && !MACHINERY.iter().any(|begin| unit.starts_with(begin))
}

/// Somebody who was given a cgroup may name those below it as he likes: what systemd could not have named is no unit
/// that systemd could stop.
fn is_unit(name: &str) -> bool {
    (name.ends_with(".service") || name.ends_with(".scope"))
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_process() {
        assert_eq!(place("0::/lxc/101/ns/system.slice/jellyfin.service"), Place::Container(101));
        assert_eq!(place("0::/lxc.payload.101/init.scope"), Place::Container(101));
        assert_eq!(place("0::/qemu.slice/111.scope"), Place::Vm(111));
        let unit = Place::Unit("nvidia-persistenced.service".to_string());
        assert_eq!(place("1:name=x:/\n0::/system.slice/nvidia-persistenced.service"), unit);
        assert_eq!(place("0::/user.slice/user-0.slice/session-3.scope"), Place::Unit("session-3.scope".to_string()));
        let docker = "0::/system.slice/docker.service/x/inner.service";
        assert_eq!(place(docker), Place::Unit("docker.service".to_string()));
        let unit = Place::Unit("user@1000.service".to_string());
        assert_eq!(place("0::/user.slice/user@1000.service/x; reboot.service"), unit);
        assert_eq!(place("0::/user.slice/u/qemu.slice/111.scope"), Place::Unit("111.scope".to_string()));
        assert_eq!(place("0::/"), Place::Unknown);
        assert_eq!(place(""), Place::Unknown);
    }

    #[test]
    fn the_name_of_a_process_stays_on_one_line() {
        assert_eq!(printable("a\x1b[1m\nb ü"), "a?[1m?b ü");
    }
}
