//! What the simulated machine is made of: PCI functions, drivers, modules, processes, nodes and calls that hang.
//!
//! Time is virtual. Everything can be cloned, so that a case begins from exactly the machine that another began from.

use super::hosted::Hosted;
use gpu_handoff::address::SlotId;
use gpu_handoff::gpu::power::Power;
use gpu_handoff::sys::{Action, DeviceNumber, How, OpenDevice, Process, Sight, Sought, User};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub const NVIDIA_MAJOR: u64 = 195;
pub const CONTROL_MINOR: u64 = 255;
pub const MODESET_MINOR: u64 = 254;
const DRM_MAJOR: u64 = 226;
const SOUND_MAJOR: u64 = 116;
const VFIO_GROUP_MAJOR: u64 = 243;
const VFIO_DEVICE_MAJOR: u64 = 242;
/// The first major that a character device without a number of its own is given; each load takes another one.
pub const FIRST_UVM_MAJOR: u64 = 511;
/// Above every PID of the machine that the test runs on, whose own PID the program leaves out.
const FIRST_PID: i32 = 6_000_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub now: Duration,
    pub functions: BTreeMap<String, Pci>,
    /// Registered drivers, in the order in which they registered: the first that matches gets a device.
    pub drivers: Vec<&'static str>,
    /// Loaded modules, in the order of loading.
    pub modules: Vec<String>,
    /// Modules that a call which hangs is loading or unloading: they are listed, but nothing can be done with them.
    pub in_between: BTreeSet<String>,
    /// Ids of vfio-pci. The kernel does not tell the administrator's from those that were written to `new_id`.
    pub vfio_ids: Vec<(u16, u16)>,
    /// Those of the administrator, who wrote them to modprobe.d.
    pub static_ids: Vec<(u16, u16)>,
    pub version: &'static str,
    pub modeset: bool,
    pub uvm_major: u64,
    pub processes: BTreeMap<i32, Proc>,
    pub nodes: BTreeMap<String, NodeState>,
    /// Guests whose lock Proxmox holds.
    pub locked_guests: BTreeSet<u32>,
    /// VMs that have a PID file, and the process it names.
    pub pid_files: BTreeMap<u32, i32>,
    /// A process that is inside open() of the first GPU's node until then: it has no descriptor yet, counts for the
    /// module and for the GPU, and the driver's lock is taken.
    pub opening_until: Duration,
    /// Broken on purpose: modules' reference counts tell of no open file.
    pub counts_nothing: bool,
    /// VMs of which Proxmox has said that their start is through.
    pub noted: BTreeSet<u32>,
    pub hung: Vec<Hung>,
    /// Workers that outlived their run and came back from their last call: each starts reconcile and ends.
    pub outlived: Vec<Process>,
    /// Somebody looks at `/dev/nvidia0` all the time: a dead node makes the kernel load nvidia.
    pub poller: bool,
    pub hosted: Hosted,
    pub next_pid: i32,
    /// The framebuffer console is on a screen; none when there is no framebuffer.
    pub console: Option<bool>,
    /// Whose framebuffer fbcon is on, or would be: the first.
    pub screen: Option<String>,
    /// Another card, which no driver here drives, has a framebuffer of its own.
    pub other_screen: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pci {
    pub vendor: u16,
    pub device: u16,
    pub class: u32,
    pub group: u32,
    pub driver: Option<&'static str>,
    /// The `driver` link is gone before the driver's remove callback is called.
    pub link_is_gone: bool,
    pub driver_override: Option<String>,
    /// A call that hangs holds the device's lock.
    pub locked: bool,
    /// Of a GPU on nvidia.
    pub minor: Option<u64>,
    /// When nvidia got it, among its cards.
    pub turn: u64,
    /// Its DRM device: of which driver, and its number.
    pub drm: Option<(&'static str, u64)>,
    pub power: Power,
    /// Its configuration space reads ones.
    pub is_gone: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proc {
    pub start: u64,
    pub command: String,
    pub cgroup: String,
    pub command_line: String,
    pub open: Vec<DeviceNumber>,
    /// GPUs that it has attached to a descriptor of nvidiactl: nothing outside the driver shows them.
    pub attached: Vec<String>,
    /// IOMMU groups that it has taken through vfio.
    pub groups: Vec<u32>,
    /// Gone from this moment on.
    pub ends: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeState {
    pub number: DeviceNumber,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A call that has not come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hung {
    pub action: Action,
    pub process: Process,
    pub until: Until,
    /// Devices whose lock it holds.
    pub locks: Vec<String>,
    pub modules: Vec<String>,
}

impl Hung {
    /// Loading nothing stands for reading: there is nothing left to do once it comes back.
    pub fn reading() -> Action {
        Action::Load { modules: Vec::new() }
    }

    pub fn is_reading(&self) -> bool {
        self.action == Hung::reading()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Until {
    Never,
    /// A time of the virtual clock.
    Time(Duration),
    /// Nobody uses this GPU any more.
    Unused(String),
    /// Nobody has taken this function's group any more.
    GroupFree(String),
    /// Nobody has a sound device of this function open any more.
    Silent(String),
    /// The lock of this device is free.
    Unlocked(String),
    /// No other call is loading or unloading this module.
    Settled(String),
}

impl State {
    pub fn empty() -> State {
        State {
            now: Duration::from_secs(1000),
            functions: BTreeMap::new(),
            drivers: vec!["xhci_hcd"],
            modules: Vec::new(),
            in_between: BTreeSet::new(),
            vfio_ids: Vec::new(),
            static_ids: Vec::new(),
            version: "580.105.08",
            modeset: false,
            uvm_major: FIRST_UVM_MAJOR,
            processes: BTreeMap::new(),
            nodes: BTreeMap::new(),
            locked_guests: BTreeSet::new(),
            pid_files: BTreeMap::new(),
            opening_until: Duration::ZERO,
            counts_nothing: false,
            noted: BTreeSet::new(),
            hung: Vec::new(),
            outlived: Vec::new(),
            poller: false,
            hosted: Hosted::default(),
            next_pid: FIRST_PID,
            console: None,
            screen: None,
            other_screen: false,
        }
    }

    pub fn is_loaded(&self, module: &str) -> bool {
        self.modules.iter().any(|loaded| loaded == module)
    }

    /// Listed in /sys/module: also while it is being loaded or unloaded.
    pub fn is_listed(&self, module: &str) -> bool {
        self.is_loaded(module) || self.in_between.contains(module)
    }

    pub fn start_process(&mut self, command: &str, cgroup: &str, open: Vec<DeviceNumber>) -> i32 {
        let pid = self.next_pid;
        self.next_pid += 1;
        let start = u64::try_from(self.now.as_millis() / 10).unwrap_or(0);
        let process = Proc {
            start,
            command: command.to_string(),
            cgroup: cgroup.to_string(),
            command_line: command.to_string(),
            open,
            attached: Vec::new(),
            groups: Vec::new(),
            ends: None,
        };
        self.processes.insert(pid, process);
        pid
    }

    /// Somebody opens the first GPU that nvidia has, by its node or attached to nvidiactl.
    pub fn open_unseen(&mut self, attached: bool) {
        let gpu = self.functions.iter().find_map(|(address, f)| Some((address.clone(), f.minor?)));
        let Some((address, minor)) = gpu else { return };
        let minor = if attached { CONTROL_MINOR } else { minor };
        let pid = self.start_process("opener", "0::/\n", vec![nvidia_number(minor)]);
        if let Some(process) = self.processes.get_mut(&pid).filter(|_| attached) {
            process.attached.push(address);
        }
    }

    pub fn is_opening(&self) -> bool {
        self.now < self.opening_until && self.is_loaded("nvidia")
    }

    pub fn living(&self) -> impl Iterator<Item = (&i32, &Proc)> {
        self.processes.iter().filter(|(_, process)| process.ends.is_none_or(|end| self.now < end))
    }

    pub fn is_open(&self, number: DeviceNumber) -> usize {
        self.living().flat_map(|(_, process)| &process.open).filter(|open| **open == number).count()
    }

    /// What a look at all processes sees.
    pub fn sight(&self, sought: &Sought) -> Sight {
        let is_sought = |pid: i32| sought.among.is_empty() || sought.among.contains(&pid);
        let mut sight = Sight::default();
        for (pid, process) in self.living().filter(|(pid, _)| is_sought(**pid)) {
            let open = process.open.iter().filter(|number| sought.majors.contains(&number.major));
            let open: Vec<OpenDevice> = open.map(|number| OpenDevice { number: *number, how: How::Open }).collect();
            for device in &open {
                *sight.files.entry(device.number).or_default() += 1;
            }
            if !open.is_empty() {
                sight.users.push(User {
                    process: Process { pid: *pid, start: process.start },
                    command: process.command.clone(),
                    cgroup: process.cgroup.clone(),
                    is_init: false,
                    open,
                });
            }
        }
        sight
    }

    pub fn is_group_taken(&self, group: u32) -> bool {
        self.living().any(|(_, process)| process.groups.contains(&group))
    }

    pub fn taken_groups(&self) -> BTreeSet<u32> {
        self.living().flat_map(|(_, process)| process.groups.iter().copied()).collect()
    }

    /// QEMU begins and takes the groups of these slots, as Proxmox starts it.
    pub fn start_qemu(&mut self, vmid: u32, slots: &[SlotId]) {
        let groups: BTreeSet<u32> = self
            .functions
            .iter()
            .filter(|(a, _)| slots.iter().any(|s| a.starts_with(&s.to_string())))
            .map(|(_, f)| f.group)
            .collect();
        let open = groups.iter().map(|group| group_number(*group)).collect();
        let pid = self.start_process("kvm", &format!("0::/qemu.slice/{vmid}.scope\n"), open);
        if let Some(process) = self.processes.get_mut(&pid) {
            process.command_line = format!("/usr/bin/kvm\0-id\0{vmid}\0-pidfile\0/var/run/qemu-server/{vmid}.pid\0");
            process.groups = groups.into_iter().collect();
        }
        self.pid_files.insert(vmid, pid);
    }

    /// QEMU ends; what it had open is closed `closing` later.
    pub fn stop_qemu(&mut self, vmid: u32, closing: Duration) {
        let end = self.now + closing;
        if let Some(process) = self.pid_files.remove(&vmid).and_then(|pid| self.processes.get_mut(&pid)) {
            // What is left of a process that is ending has no command line.
            process.command_line.clear();
            process.ends = Some(end);
        }
    }

    /// The driver of a function as sysfs shows it.
    pub fn shown_driver(&self, address: &str) -> Option<&'static str> {
        self.functions.get(address).filter(|f| !f.link_is_gone)?.driver
    }

    fn index(&self, address: &str) -> u64 {
        self.functions.keys().position(|a| a == address).unwrap_or(0) as u64
    }

    /// The DRM node of a GPU.
    pub fn drm_number(&self, address: &str) -> Option<DeviceNumber> {
        let (_, minor) = self.functions.get(address)?.drm?;
        Some(DeviceNumber { major: DRM_MAJOR, minor })
    }

    /// drm_minor_alloc: the lowest number that is free.
    pub fn make_drm(&mut self, address: &str, driver: &'static str) {
        let taken: Vec<u64> = self.functions.values().filter_map(|f| Some(f.drm?.1)).collect();
        if let Some(function) = self.functions.get_mut(address).filter(|f| f.drm.is_none()) {
            function.drm = (0..).find(|minor| !taken.contains(minor)).map(|minor| (driver, minor));
        }
    }

    /// Functions with a framebuffer, by address.
    pub fn framebuffers(&self) -> Vec<String> {
        let has_screen = |address: &&String| match self.shown_driver(address) {
            Some("nvidia") => self.modeset && self.drm_number(address).is_some(),
            Some("nouveau") => true,
            _ => false,
        };
        self.functions.keys().filter(has_screen).cloned().collect()
    }

    /// fbcon comes with the first framebuffer and goes with the last. It takes the console to one that comes before the
    /// one it is on, and lets go of it when that one goes.
    pub fn settle_console(&mut self) {
        let screens = self.framebuffers();
        let screen = if self.other_screen { Some("other".to_string()) } else { screens.first().cloned() };
        self.console = match (&self.screen, &screen) {
            (_, None) => None,
            (None, Some(_)) => Some(true),
            (Some(old), Some(new)) if old == new => self.console,
            (Some(old), Some(_)) => Some(screens.contains(old)),
        };
        self.screen = screen;
    }

    /// The first console driver of this host is still there.
    pub fn can_attach(&self) -> bool {
        self.version != "565.77"
    }

    /// The name of a function's framebuffer.
    pub fn framebuffer_name(&self, address: &str) -> String {
        format!("fb{}", 1 + self.index(address))
    }

    pub fn sound_number(&self, address: &str) -> Option<DeviceNumber> {
        (self.shown_driver(address)? == "snd_hda_intel")
            .then(|| DeviceNumber { major: SOUND_MAJOR, minor: self.index(address) })
    }

    pub fn vfio_device_number(&self, address: &str) -> Option<DeviceNumber> {
        (self.shown_driver(address)? == "vfio-pci")
            .then(|| DeviceNumber { major: VFIO_DEVICE_MAJOR, minor: self.index(address) })
    }

    pub fn uvm_number(&self) -> DeviceNumber {
        DeviceNumber { major: self.uvm_major, minor: 0 }
    }

    /// As `580.95.05`, by number.
    pub fn version_from(&self, least: [u32; 3]) -> bool {
        let mut numbers = self.version.split('.').map(|n| n.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        [next(), next(), next()] >= least
    }
}

pub fn group_number(group: u32) -> DeviceNumber {
    DeviceNumber { major: VFIO_GROUP_MAJOR, minor: u64::from(group) }
}

pub fn nvidia_number(minor: u64) -> DeviceNumber {
    DeviceNumber { major: NVIDIA_MAJOR, minor }
}
