//! Who has a GPU open: a look by device number over every descriptor and every mapping of every process, in all
//! namespaces.

use super::inventory::{Slot, VFIO_PCI};
use super::nodes::{self, CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use super::nvidia::{self, Minors};
use crate::report::story::printable;
use crate::sys::{DeviceNumber, Kernel, OpenDevice};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// How long to wait before looking once more whether anything changes.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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

/// A process that has a device of the slot open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    pub command: String,
    /// The usual path of the device that it has open; its own path to it may be another.
    pub via: String,
    /// It has the device in its memory and may have closed the descriptor.
    pub mapped: bool,
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
        write!(f, ") has {} {}", self.via, if self.mapped { "mapped" } else { "open" })
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
    /// Majors with many minors, what their paths begin with, and whether they are held or shared.
    families: Vec<(u64, &'static str, bool)>,
    /// The driver is busy and did not say which nodes are the slots': who holds them is not known.
    pub is_blind: bool,
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
        let minors = Minors::read(kernel);
        watched.is_blind = minors.is_busy;
        for (address, minor) in minors.each() {
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
        let into = if reach == Reach::Unloading { &mut watched.held } else { &mut watched.shared };
        for (name, minor, path) in SHARED {
            if let Some(major) = nvidia::major(kernel, name) {
                into.insert(DeviceNumber { major, minor }, path.to_string());
            }
        }
        for (name, path) in FAMILIES {
            let major = nvidia::major(kernel, name);
            watched.families.extend(major.map(|major| (major, path, reach == Reach::Unloading)));
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
        for (path, number) in nodes::drm_of(kernel, address) {
            self.held.insert(number, path);
        }
        // The framebuffer that a DRM driver makes of it, for the console and for whoever opens it.
        let graphics = format!("/sys/bus/pci/devices/{address}/graphics");
        for name in kernel.list(&graphics) {
            self.add_attribute(kernel, &format!("{graphics}/{name}/dev"), &format!("/dev/{name}"));
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
        let mut by_pid: BTreeMap<i32, Vec<&OpenDevice>> = BTreeMap::new();
        for open in open {
            by_pid.entry(open.pid).or_default().push(open);
        }
        by_pid.remove(&(std::process::id() as i32));
        by_pid
            .iter()
            .filter_map(|(pid, open)| {
                let held = open.iter().find_map(|device| Some((self.held(device.number)?, device.mapped)));
                let uses_another = open.iter().any(|device| self.elsewhere.contains(&device.number));
                let shared = || open.iter().find_map(|device| Some((self.shared(device.number)?, device.mapped)));
                let (via, mapped) = held.or_else(|| if uses_another { None } else { shared() })?;
                Some(describe(kernel, *pid, via, mapped))
            })
            .collect()
    }

    fn held(&self, number: DeviceNumber) -> Option<String> {
        self.held.get(&number).cloned().or_else(|| self.family(number, true))
    }

    fn shared(&self, number: DeviceNumber) -> Option<String> {
        self.shared.get(&number).cloned().or_else(|| self.family(number, false))
    }

    fn family(&self, DeviceNumber { major, minor }: DeviceNumber, held: bool) -> Option<String> {
        let (_, path, _) = self.families.iter().find(|family| (family.0, family.2) == (major, held))?;
        Some(format!("{path}{minor}"))
    }

    /// As [`Watched::holders`], once nobody comes or goes any more: two looks in a row saw the same, or `limit` is over.
    /// For when somebody was stopped: what ends has its children and helpers end after it, or start anew.
    pub fn holders_settled(&self, kernel: &dyn Kernel, limit: Duration) -> Vec<Holder> {
        let end = kernel.now() + limit;
        let mut before = self.holders(kernel);
        while kernel.now() < end {
            kernel.sleep(LOOK_AGAIN);
            let now = self.holders(kernel);
            if now == before {
                break;
            }
            before = now;
        }
        before
    }
}

fn describe(kernel: &dyn Kernel, pid: i32, via: String, mapped: bool) -> Holder {
    Holder {
        pid,
        command: kernel.text(&format!("/proc/{pid}/comm")).map_or_else(|| "?".to_string(), |name| printable(&name)),
        via,
        mapped,
        place: place(&kernel.text(&format!("/proc/{pid}/cgroup")).unwrap_or_default()),
    }
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
    use crate::sys::{ActError, Action, End, Process};
    use std::cell::Cell;
    use std::io;

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

    /// A machine on which each look sees another number of processes, until they are the same.
    struct Restless {
        looks: Cell<usize>,
        users: Vec<i32>,
    }

    impl Kernel for Restless {
        fn open_devices(&self) -> Vec<OpenDevice> {
            let look = self.looks.replace(self.looks.get() + 1);
            let users = *self.users.get(look).or(self.users.last()).unwrap();
            (1..=users).map(|pid| OpenDevice { pid, number: NODE, mapped: pid % 2 == 0 }).collect()
        }

        fn now(&self) -> Duration {
            LOOK_AGAIN * u32::try_from(self.looks.get()).unwrap()
        }

        fn sleep(&self, _: Duration) {}

        fn read(&self, _: &str) -> io::Result<Vec<u8>> {
            Err(io::ErrorKind::NotFound.into())
        }

        fn link_name(&self, _: &str) -> io::Result<String> {
            Err(io::ErrorKind::NotFound.into())
        }

        fn list(&self, _: &str) -> Vec<String> {
            Vec::new()
        }

        fn exists(&self, _: &str) -> bool {
            false
        }

        fn device_number(&self, _: &str) -> io::Result<DeviceNumber> {
            unreachable!()
        }

        fn file_id(&self, _: &str) -> io::Result<(DeviceNumber, u64)> {
            unreachable!()
        }

        fn vfio_group_busy(&self, _: u32, _: Duration) -> Result<bool, ActError> {
            unreachable!()
        }

        fn program(&self, _: &str, _: &[&str], _: Duration) -> Result<String, ActError> {
            unreachable!()
        }
        fn end(&self, _: Process, _: End) -> io::Result<()> {
            unreachable!()
        }
        fn act(&self, _: &Action, _: Duration) -> Result<(), ActError> {
            unreachable!()
        }

        fn worker(&self) -> Option<Process> {
            unreachable!()
        }

        fn is_asked_to_end(&self) -> bool {
            false
        }

        fn unix_time(&self) -> u64 {
            0
        }
    }

    const NODE: DeviceNumber = DeviceNumber { major: 195, minor: 0 };

    #[test]
    fn who_comes_and_goes_is_waited_for() {
        let settled = |users: &[i32], limit: u32| {
            let kernel = Restless { looks: Cell::new(0), users: users.to_vec() };
            let watched = Watched { held: BTreeMap::from([(NODE, "/dev/nvidia0".to_string())]), ..Watched::default() };
            let found = watched.holders_settled(&kernel, LOOK_AGAIN * limit);
            (found.iter().map(|holder| holder.mapped).collect::<Vec<_>>(), kernel.looks.get())
        };
        assert_eq!(settled(&[0], 100), (vec![], 2));
        assert_eq!(settled(&[3, 1, 0, 2, 2, 0], 100), (vec![false, true], 5));
        assert_eq!(settled(&[2, 1, 2, 1, 2, 1, 2], 4), (vec![false], 4), "the time is up");
        assert_eq!(settled(&[1, 0], 0), (vec![false], 1), "no time at all");
    }

    #[test]
    fn the_name_of_a_process_stays_on_one_line() {
        assert_eq!(printable("a\x1b[1m\nb ü"), "a?[1m?b ü");
    }
}
