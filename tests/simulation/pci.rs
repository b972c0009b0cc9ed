//! The driver core's rules: which driver a device gets, what binding and unbinding do, and when they block.

use super::files::VTCONSOLE_BIND;
use super::state::{Pci, State, Until, nvidia_number};
use nix::libc;

/// How a call ends, or that it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    Errno(i32),
    Words(String),
    Blocks(Block),
}

/// What a call that hangs waits for and holds meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub until: Until,
    pub locks: Vec<String>,
    pub modules: Vec<String>,
}

impl Block {
    pub fn waiting(until: Until) -> Reply {
        Reply::Blocks(Block { until, locks: Vec::new(), modules: Vec::new() })
    }
}

impl State {
    /// pci_match_device: with an override nothing else counts; else ids that were written, else the driver's table.
    pub fn matches(&self, driver: &str, address: &str) -> bool {
        let Some(function) = self.functions.get(address) else { return false };
        if let Some(wanted) = &function.driver_override {
            return wanted == driver;
        }
        let kind = function.class >> 8;
        match driver {
            "nvidia" | "nouveau" => function.vendor == 0x10de && matches!(kind, 0x0300 | 0x0302),
            "snd_hda_intel" => kind == 0x0403,
            "xhci_hcd" => kind == 0x0c03,
            "nvidia-gpu" => function.vendor == 0x10de && kind == 0x0c80,
            "vfio-pci" => self.vfio_ids.contains(&(function.vendor, function.device)),
            _ => false,
        }
    }

    pub fn bind(&mut self, address: &str, driver: &'static str) {
        let minors: Vec<u64> = self.functions.values().filter_map(|f| f.minor).collect();
        let turn = 1 + self.functions.values().map(|f| f.turn).max().unwrap_or(0);
        let Some(function) = self.functions.get_mut(address) else { return };
        function.driver = Some(driver);
        // Their probe functions call pm_runtime_allow.
        if matches!(driver, "vfio-pci" | "snd_hda_intel" | "nvidia-gpu") {
            function.set_control("auto");
        }
        if driver == "nvidia" {
            function.minor = (0..).find(|minor| !minors.contains(minor));
            function.turn = turn;
        }
        if driver == "nouveau" || (driver == "nvidia" && self.is_loaded("nvidia_drm") && !self.drm_looks_once()) {
            self.make_drm(address, driver);
        }
    }

    pub fn complete_unbind(&mut self, address: &str) {
        let keeps_drm = self.drm_looks_once();
        if let Some(function) = self.functions.get_mut(address) {
            // Their remove functions call pm_runtime_forbid.
            if matches!(function.driver, Some("vfio-pci" | "snd_hda_intel" | "nvidia-gpu")) {
                function.set_control("on");
            }
            // nvidia_drm that looks once is not told.
            if function.drm.is_some_and(|(of, _)| function.driver == Some(of) && (of != "nvidia" || !keeps_drm)) {
                function.drm = None;
            }
            function.driver = None;
            function.minor = None;
            function.link_is_gone = false;
        }
    }

    /// driver_attach: a new driver, or a new id, takes every unbound device that matches.
    pub fn attach(&mut self, driver: &'static str) -> Reply {
        let matching: Vec<String> = self.functions.keys().filter(|a| self.matches(driver, a)).cloned().collect();
        if let Some(locked) = matching.iter().find(|address| self.functions[*address].locked) {
            return Block::waiting(Until::Unlocked(locked.clone()));
        }
        for address in matching {
            if self.functions[&address].driver.is_none() && self.may_bind(&address, driver) {
                self.bind(&address, driver);
            }
        }
        Reply::Done
    }

    /// A group that somebody has taken through vfio admits no other driver.
    fn may_bind(&self, address: &str, driver: &str) -> bool {
        driver == "vfio-pci" || !self.is_group_taken(self.functions[address].group)
    }

    /// What keeps nvidia's remove callback waiting: descriptors of the GPU, those of the control device that have it
    /// attached, and nvidia_drm. The control device alone does not.
    pub fn usage(&self, address: &str) -> usize {
        let minor = self.functions.get(address).and_then(|f| f.minor);
        let of_gpu = minor.map_or(0, |minor| self.is_open(nvidia_number(minor)));
        let is_first =
            self.functions.iter().find(|(_, f)| f.minor.is_some()).is_some_and(|(first, _)| first == address);
        let opening = usize::from(is_first && self.is_opening());
        of_gpu + self.attached(address) + usize::from(self.drm_holds_gpus()) + opening
    }

    fn attached(&self, address: &str) -> usize {
        self.living().flat_map(|(_, process)| &process.attached).filter(|attached| *attached == address).count()
    }

    /// nvidia_drm looks for GPUs when it is loaded and never again.
    pub fn drm_looks_once(&self) -> bool {
        !self.version_from([580, 105, 8])
    }

    pub fn drm_holds_gpus(&self) -> bool {
        self.is_loaded("nvidia_drm") && self.modeset && self.drm_looks_once()
    }

    pub fn write(&mut self, path: &str, data: &str) -> Reply {
        if let Some(rest) = path.strip_prefix("/sys/bus/pci/devices/") {
            return match rest.split_once('/') {
                Some((address, "driver_override")) => self.write_override(address, data),
                Some((address, attribute)) => self.write_power(address, attribute, data),
                None => Reply::Errno(libc::ENOENT),
            };
        }
        if path == VTCONSOLE_BIND {
            return self.bind_console(data);
        }
        if let Some(ctid) =
            path.strip_prefix("/sys/fs/cgroup/lxc/").and_then(|rest| rest.strip_suffix("/cgroup.freeze"))
        {
            return if self.freeze(ctid, data) { Reply::Done } else { Reply::Errno(libc::ENOENT) };
        }
        match path.strip_prefix("/sys/bus/pci/") {
            Some("drivers_probe") => self.probe(data),
            Some("drivers/vfio-pci/remove_id") if self.drivers.contains(&"vfio-pci") => self.remove_id(data),
            Some(other) => match other.strip_prefix("drivers/").and_then(|rest| rest.strip_suffix("/unbind")) {
                Some(driver) if self.drivers.contains(&driver) => self.unbind(driver, data),
                _ => Reply::Errno(libc::ENOENT),
            },
            None => Reply::Errno(libc::ENOENT),
        }
    }

    fn write_override(&mut self, address: &str, data: &str) -> Reply {
        let Some(function) = self.functions.get_mut(address) else { return Reply::Errno(libc::ENOENT) };
        // A write(2) of nothing never reaches the kernel.
        if data.is_empty() {
            return Reply::Done;
        }
        if function.locked {
            return Block::waiting(Until::Unlocked(address.to_string()));
        }
        let text = data.split('\n').next().unwrap_or_default();
        function.driver_override = if text.is_empty() { None } else { Some(text.to_string()) };
        Reply::Done
    }

    /// control_store takes the device's lock; d3cold_allowed_store wakes the device.
    fn write_power(&mut self, address: &str, attribute: &str, data: &str) -> Reply {
        let Some(function) = self.functions.get_mut(address) else { return Reply::Errno(libc::ENOENT) };
        let (value, allowed) = match attribute {
            "power/control" => (&mut function.power.control, ["on", "auto"]),
            "d3cold_allowed" => (&mut function.power.d3cold_allowed, ["0", "1"]),
            _ => return Reply::Errno(libc::ENOENT),
        };
        if value.is_none() {
            return Reply::Errno(libc::ENOENT);
        }
        if !allowed.contains(&data) {
            return Reply::Errno(libc::EINVAL);
        }
        if function.locked {
            return Block::waiting(Until::Unlocked(address.to_string()));
        }
        *value = Some(data.to_string());
        Reply::Done
    }

    /// store_bind in vt.c: success, whatever comes of it.
    fn bind_console(&mut self, data: &str) -> Reply {
        let can_attach = self.can_attach();
        match &mut self.console {
            Some(is_attached) => {
                *is_attached = data.starts_with('1') && (can_attach || *is_attached);
                Reply::Done
            }
            None => Reply::Errno(libc::ENOENT),
        }
    }

    /// drivers_probe_store: success also when no driver took the device.
    fn probe(&mut self, address: &str) -> Reply {
        let Some(function) = self.functions.get(address) else { return Reply::Errno(libc::ENODEV) };
        // Also while the remove callback runs: the pointer to the driver is cleared after it.
        if function.driver.is_some() {
            return Reply::Done;
        }
        if function.locked {
            return Block::waiting(Until::Unlocked(address.to_string()));
        }
        match self.drivers.iter().copied().find(|driver| self.matches(driver, address)) {
            Some(driver) if !self.may_bind(address, driver) => Reply::Errno(libc::EINVAL),
            Some(driver) => {
                self.bind(address, driver);
                Reply::Done
            }
            None => Reply::Done,
        }
    }

    /// unbind_store, and each driver's remove callback.
    fn unbind(&mut self, driver: &str, address: &str) -> Reply {
        let Some(function) = self.functions.get(address).filter(|f| f.driver == Some(driver_name(driver))) else {
            return Reply::Errno(libc::ENODEV);
        };
        if function.locked {
            return Block::waiting(Until::Unlocked(address.to_string()));
        }
        let own = address.to_string();
        let waits_for = match driver {
            // From 595.45 on the GPU is unlinked before the wait, so that nvidiactl's close finds it no more.
            "nvidia" if self.attached(address) > 0 && self.version_from([595, 45, 0]) => Some(Until::Never),
            "nvidia" if self.usage(address) > 0 => Some(Until::Unused(own.clone())),
            "vfio-pci" if self.is_group_taken(function.group) => Some(Until::GroupFree(own.clone())),
            "snd_hda_intel" if self.sound_number(address).is_some_and(|n| self.is_open(n) > 0) => {
                Some(Until::Silent(own.clone()))
            }
            _ => None,
        };
        match waits_for {
            Some(until) => {
                self.hide_link(address);
                Reply::Blocks(Block { until, locks: vec![own], modules: Vec::new() })
            }
            None => {
                self.complete_unbind(address);
                Reply::Done
            }
        }
    }

    pub fn hide_link(&mut self, address: &str) {
        if let Some(function) = self.functions.get_mut(address) {
            function.link_is_gone = true;
        }
    }

    /// Takes the administrator's ids as well.
    fn remove_id(&mut self, data: &str) -> Reply {
        let mut numbers = data.split_whitespace().map(|n| u16::from_str_radix(n, 16));
        let (Some(Ok(vendor)), Some(Ok(device))) = (numbers.next(), numbers.next()) else {
            return Reply::Errno(libc::EINVAL);
        };
        match self.vfio_ids.iter().position(|id| *id == (vendor, device)) {
            Some(index) => {
                self.vfio_ids.remove(index);
                Reply::Done
            }
            None => Reply::Errno(libc::ENODEV),
        }
    }

    /// As Proxmox does: an id is there once, and every unbound device that matches is taken at once.
    pub fn new_id(&mut self, vendor: u16, device: u16) {
        if !self.vfio_ids.contains(&(vendor, device)) {
            self.vfio_ids.push((vendor, device));
            let _ = self.attach("vfio-pci");
        }
    }
}

impl Pci {
    fn set_control(&mut self, value: &str) {
        if let Some(control) = &mut self.power.control {
            *control = value.to_string();
        }
    }
}

/// The driver's name as the tables here have it.
fn driver_name(name: &str) -> &'static str {
    ALL.into_iter().find(|known| *known == name).unwrap_or("")
}

const ALL: [&str; 6] = ["nvidia", "nouveau", "snd_hda_intel", "xhci_hcd", "nvidia-gpu", "vfio-pci"];
