//! Modules: what they depend on, who holds them, what loading and unloading do to the devices.

use super::pci::{Block, Reply};
use super::state::{CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR, State, Until, nvidia_number};
use nix::libc;

/// A module, the modules it depends on, and the PCI driver in it.
const MODULES: &[(&str, &[&str], Option<&str>)] = &[
    ("nvidia", &[], Some("nvidia")),
    ("nvidia_modeset", &["nvidia"], None),
    ("nvidia_drm", &["nvidia_modeset"], None),
    ("nvidia_uvm", &["nvidia"], None),
    ("nouveau", &[], Some("nouveau")),
    ("snd_hda_intel", &[], Some("snd_hda_intel")),
    ("i2c_nvidia_gpu", &[], Some("nvidia-gpu")),
    ("vfio_pci", &[], Some("vfio-pci")),
];

pub fn driver_of_module(module: &str) -> Option<&'static str> {
    MODULES.iter().find(|(name, ..)| *name == module)?.2
}

/// None for a driver that is built into the kernel.
pub fn module_of_driver(driver: &str) -> Option<&'static str> {
    MODULES.iter().find(|(.., of)| *of == Some(driver)).map(|(name, ..)| *name)
}

fn dependencies(module: &str) -> &'static [&'static str] {
    MODULES.iter().find(|(name, ..)| *name == module).map_or(&[], |(_, dependencies, _)| dependencies)
}

impl State {
    /// The loaded modules that depend on this one.
    pub fn holders(&self, module: &str) -> Vec<String> {
        let mut holders: Vec<String> =
            self.modules.iter().filter(|m| dependencies(m).contains(&module)).cloned().collect();
        holders.sort_unstable();
        holders
    }

    /// Modules that depend on it, and descriptors of its devices.
    pub fn references(&self, module: &str) -> usize {
        let open = |minor: u64| self.is_open(nvidia_number(minor));
        let drm = |driver: &str| {
            // Also of a card that has left and whose device has stayed.
            let numbers = self.functions.iter().filter(|(_, f)| f.drm.is_some_and(|(of, _)| of == driver));
            numbers.filter_map(|(a, _)| self.drm_number(a)).map(|number| self.is_open(number)).sum::<usize>()
        };
        let on_vfio: Vec<_> = self.functions.values().filter(|f| f.driver == Some("vfio-pci")).collect();
        let descriptors = match module {
            "nvidia" => {
                self.living()
                    .flat_map(|(_, p)| &p.open)
                    .filter(|n| n.major == NVIDIA_MAJOR && n.minor != MODESET_MINOR)
                    .count()
                    + usize::from(self.is_opening())
            }
            "nvidia_modeset" => open(MODESET_MINOR),
            "nvidia_uvm" => self.is_open(self.uvm_number()),
            "nvidia_drm" => drm("nvidia"),
            "nouveau" => drm("nouveau"),
            "snd_hda_intel" => {
                let numbers = self.functions.keys().filter_map(|address| self.sound_number(address));
                numbers.map(|number| self.is_open(number)).sum()
            }
            // Seen on Linux 6.12: vfio_pci, a file system as long as there is any device, and two for each open group.
            "vfio" => 1 + usize::from(!on_vfio.is_empty()) + 2 * self.taken_groups().len(),
            "vfio_pci" => on_vfio.iter().filter(|function| self.taken_groups().contains(&function.group)).count(),
            _ => 0,
        };
        descriptors + self.holders(module).len()
    }

    /// `modprobe -a`: each in turn, also after one that failed; the first complaint is what is heard.
    pub fn load_all(&mut self, modules: &[String]) -> Reply {
        let mut complaint = None;
        for module in modules {
            match self.load(module) {
                Reply::Done => {}
                Reply::Words(words) => complaint = complaint.or(Some(words)),
                other => return other,
            }
        }
        complaint.map_or(Reply::Done, Reply::Words)
    }

    pub fn load(&mut self, module: &str) -> Reply {
        if self.in_between.contains(module) {
            return Block::waiting(Until::Settled(module.to_string()));
        }
        if self.is_loaded(module) {
            return Reply::Done;
        }
        if !MODULES.iter().any(|(name, ..)| *name == module) {
            return Reply::Words(format!(
                "modprobe: FATAL: Module {module} not found in directory /lib/modules/6.12.0"
            ));
        }
        for dependency in dependencies(module) {
            match self.load(dependency) {
                Reply::Done => {}
                other => return other,
            }
        }
        if let Some(driver) = driver_of_module(module) {
            self.drivers.push(driver);
            if module == "vfio_pci" {
                self.vfio_ids = self.static_ids.clone();
            }
            match self.attach(driver) {
                Reply::Done => {}
                Reply::Blocks(block) => {
                    self.drivers.retain(|d| *d != driver);
                    return Reply::Blocks(Block { modules: vec![module.to_string()], ..block });
                }
                other => return other,
            }
        }
        // It refuses to be there for nothing: "No NVIDIA devices probed".
        if module == "nvidia" && !self.functions.values().any(|f| f.driver == Some("nvidia")) {
            self.drivers.retain(|d| *d != "nvidia");
            return Reply::Words("modprobe: ERROR: could not insert 'nvidia': No such device".to_string());
        }
        if module == "nvidia_uvm" {
            self.uvm_major -= 1;
        }
        if module == "nvidia_drm" {
            let mut cards: Vec<(u64, String)> = self
                .functions
                .iter()
                .filter(|(_, f)| f.driver == Some("nvidia"))
                .map(|(address, f)| (f.turn, address.clone()))
                .collect();
            cards.sort_unstable();
            cards.iter().for_each(|(_, address)| self.make_drm(address, "nvidia"));
        }
        self.modules.push(module.to_string());
        Reply::Done
    }

    /// `delete_module` with O_NONBLOCK never waits for users; its exit function may wait for a device.
    pub fn unload(&mut self, module: &str) -> Reply {
        if self.in_between.contains(module) {
            return Reply::Errno(libc::EBUSY);
        }
        if !self.is_loaded(module) {
            return Reply::Errno(libc::ENOENT);
        }
        if self.references(module) > 0 {
            return Reply::Errno(libc::EWOULDBLOCK);
        }
        if let Some(driver) = driver_of_module(module) {
            let bound: Vec<String> =
                self.functions.iter().filter(|(_, f)| f.driver == Some(driver)).map(|(a, _)| a.clone()).collect();
            if let Some(locked) = bound.iter().find(|address| self.functions[*address].locked) {
                let until = Until::Unlocked(locked.clone());
                return Reply::Blocks(Block { until, locks: Vec::new(), modules: vec![module.to_string()] });
            }
            for address in bound {
                self.complete_unbind(&address);
            }
            self.drivers.retain(|d| *d != driver);
            if module == "vfio_pci" {
                self.vfio_ids.clear();
            }
        }
        if module == "nvidia_drm" {
            let of_module = self.functions.values_mut().filter(|f| f.drm.is_some_and(|(of, _)| of == "nvidia"));
            of_module.for_each(|f| f.drm = None);
        }
        self.modules.retain(|loaded| loaded != module);
        Reply::Done
    }

    /// Opening a dead node of a driver that is not loaded makes the kernel load it.
    pub fn poll_node(&mut self) {
        let is_there = self.nodes.contains_key("/dev/nvidia0") || self.nodes.contains_key("/dev/nvidiactl");
        if self.poller && is_there && !self.is_listed("nvidia") {
            let _ = self.load("nvidia");
        }
    }

    /// The nodes that nvidia-modprobe makes for what is loaded now.
    pub fn wanted_nodes(&self) -> Vec<(String, gpu_handoff::sys::DeviceNumber)> {
        let mut nodes = Vec::new();
        for minor in self.functions.values().filter_map(|f| f.minor) {
            nodes.push((format!("/dev/nvidia{minor}"), nvidia_number(minor)));
        }
        if self.is_loaded("nvidia") {
            nodes.push(("/dev/nvidiactl".to_string(), nvidia_number(CONTROL_MINOR)));
        }
        if self.is_loaded("nvidia_modeset") {
            nodes.push(("/dev/nvidia-modeset".to_string(), nvidia_number(MODESET_MINOR)));
        }
        if self.is_loaded("nvidia_uvm") {
            let mut number = self.uvm_number();
            nodes.push(("/dev/nvidia-uvm".to_string(), number));
            number.minor = 1;
            nodes.push(("/dev/nvidia-uvm-tools".to_string(), number));
        }
        nodes
    }
}
