//! What, beside a handoff, decides who has a card when the host has booted: whatever keeps the home driver away from it,
//! gives it to vfio-pci, or removes it. Everything that matters is read once; finding is pure.
//!
//! Of each the place is told, what it does, and what to type. None of it is ours to change.

mod cmdline;
mod directives;
mod glob;
mod scripts;
mod udev;

use crate::config::{Config, Home};
use crate::gpu::inventory::{VFIO_PCI, attribute, nvidia_slots};
use crate::modprobe::{self, Line};
use crate::sys::Kernel;
use std::fmt;

pub use directives::is_keeper;

/// Our own file with what modprobe is told.
pub(super) const OURS: &str = "/etc/modprobe.d/gpu-handoff.conf";

/// After any of it was changed: the initramfs has copies.
pub const THEN: &str = "when that is mended: update-initramfs -u -k all, then reboot the host";

/// When none was found: Proxmox itself leaves a card so.
pub const NO_CAUSE: &str = "nothing that acts at boot explains that: a VM that ran without the hookscript leaves its card so, until the next boot";

/// What a cause does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The card is another driver's from the beginning.
    Takes,
    /// A module of the home driver is not loaded.
    KeepsAway,
    /// The kernel forgets the card.
    Removes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Stays the same from version to version.
    pub id: &'static str,
    pub effect: Effect,
    /// `/etc/modprobe.d/x.conf:3`
    pub place: String,
    /// What stands there.
    pub text: String,
    /// What it does, as the rest of a sentence that begins with it.
    pub does: String,
    /// What to type.
    pub mend: String,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // Nobody's file commands a terminal.
        let text: String = self.text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        write!(f, "{}: {text} {}; to take it out: {}", self.place, self.does, self.mend)
    }
}

/// One function of an NVIDIA card, by what such things are matched with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    pub address: String,
    pub vendor: u32,
    pub device: u32,
    pub subvendor: u32,
    pub subdevice: u32,
    pub class: u32,
    pub modalias: String,
}

impl Function {
    fn read(kernel: &dyn Kernel, address: &str, vendor: u32, device: u32, class: u32) -> Function {
        let text = |name: &str| kernel.text(&attribute(address, name));
        let hexadecimal = |name: &str| {
            text(name).and_then(|text| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()).unwrap_or(0)
        };
        let (subvendor, subdevice) = (hexadecimal("subsystem_vendor"), hexadecimal("subsystem_device"));
        let made = || {
            let (class, sub, interface) = (class >> 16, class >> 8 & 0xff, class & 0xff);
            format!(
                "pci:v{vendor:08X}d{device:08X}sv{subvendor:08X}sd{subdevice:08X}bc{class:02X}sc{sub:02X}i{interface:02x}"
            )
        };
        let modalias = text("modalias").filter(|text| !text.is_empty()).unwrap_or_else(made);
        Function { address: address.to_string(), vendor, device, subvendor, subdevice, class, modalias }
    }

    pub fn is_gpu(&self) -> bool {
        matches!(self.class >> 8, 0x0300 | 0x0302)
    }
}

/// A file of commands that runs at boot, or may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    pub path: String,
    pub text: String,
    pub kind: scripts::Kind,
}

/// A kernel command line, or a piece of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// `/etc/default/grub:6`; for what the kernel runs with `/proc/cmdline`.
    pub path: String,
    pub line: usize,
    pub words: Vec<String>,
    /// What carries a change of the file to where the host boots from.
    pub then: Option<&'static str>,
}

pub struct Facts {
    /// Every function beside an NVIDIA GPU; those of cards whose home is vfio-pci, or none, are left out.
    pub functions: Vec<Function>,
    /// The host has an NVIDIA GPU, whatever its home.
    pub has_card: bool,
    /// Modules that a card at home needs, with underscores.
    pub modules: Vec<String>,
    pub directives: Vec<Line>,
    /// What the kernel was booted with comes first.
    pub command_lines: Vec<Words>,
    pub rules: Vec<udev::File>,
    pub scripts: Vec<Script>,
    /// Driverctl's: the file, the address, the driver.
    pub overrides: Vec<(String, String, String)>,
    pub has_driverctl: bool,
}

const NVIDIA: [&str; 4] = ["nvidia", "nvidia_drm", "nvidia_modeset", "nvidia_uvm"];

impl Facts {
    pub fn read(kernel: &dyn Kernel, config: &Config) -> Facts {
        let slots = nvidia_slots(kernel);
        let home = |slot: &str| config.homes.get(slot).cloned();
        let (mut functions, mut modules) = (Vec::new(), Vec::new());
        let mut needs = |names: &[&str]| {
            for name in names {
                if !modules.iter().any(|other| other == name) {
                    modules.push((*name).to_string());
                }
            }
        };
        for slot in &slots {
            match home(&slot.address) {
                None => needs(&NVIDIA),
                Some(Home::Driver(driver)) if driver == "nvidia" => needs(&NVIDIA),
                Some(Home::Driver(driver)) if driver == VFIO_PCI => continue,
                Some(Home::Driver(driver)) => needs(&[&modprobe::module(&driver)]),
                Some(Home::None) => continue,
            }
            functions.extend(slot.functions.iter().map(|function| {
                let ids = (u32::from(function.vendor), u32::from(function.device));
                Function::read(kernel, &function.address, ids.0, ids.1, function.class)
            }));
        }
        if slots.is_empty() {
            needs(&NVIDIA);
        }
        Facts {
            functions,
            has_card: !slots.is_empty(),
            modules,
            directives: modprobe::read(kernel).into_iter().filter(|line| line.place.path != OURS).collect(),
            command_lines: cmdline::read(kernel),
            rules: udev::read(kernel),
            scripts: scripts::read(kernel),
            overrides: scripts::overrides(kernel),
            has_driverctl: kernel.exists("/usr/sbin/driverctl"),
        }
    }

    fn gpu(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| function.is_gpu())
    }

    /// Whether this module, by any of its names, is one that a card at home needs.
    fn needs(&self, module: &str) -> bool {
        let module = modprobe::module(module);
        let is_nvidia = self.modules.iter().any(|needed| needed == "nvidia");
        let flavour = ["nvidia_current", "nvidia_tesla", "nvidia_legacy"].iter().any(|name| module.starts_with(name));
        self.modules.contains(&module) || (is_nvidia && flavour)
    }

    /// Every cause that was found. Pure.
    pub fn causes(&self) -> Vec<Cause> {
        if self.has_card && self.functions.is_empty() {
            return Vec::new();
        }
        let mut causes = cmdline::find(self);
        causes.extend(directives::find(self));
        causes.extend(scripts::find(self));
        causes.extend(udev::find(self));
        causes
    }
}

/// What not having a module means.
fn without(module: &str, when: &str) -> String {
    let module = modprobe::module(module);
    let what = match module.as_str() {
        name if name.ends_with("_uvm") => ", which CUDA in containers needs",
        name if name.ends_with("_drm") => ", which a screen on the card needs",
        name if name.ends_with("_modeset") => ", which nvidia_drm needs",
        _ => ", so that the card has no driver at home",
    };
    format!("keeps {module} from being loaded{when}{what}")
}

/// How a line is taken out of a file: the administrator's are commented out, a package's file is hidden by one in /etc.
fn take_out(path: &str, first: usize, last: usize) -> String {
    let is_packages = ["/usr/lib/", "/lib/", "/usr/share/"].iter().any(|folder| path.starts_with(folder));
    let folder = ["modprobe.d", "udev/rules.d"].into_iter().find(|folder| path.contains(&format!("/{folder}/")));
    match folder {
        Some(folder) if is_packages => {
            format!("ln -s /dev/null /etc/{folder}/{}", path.rsplit('/').next().unwrap_or_default())
        }
        _ if first == last => format!("sed -i '{first}s/^/# /' {path}"),
        _ => format!("sed -i '{first},{last}s/^/# /' {path}"),
    }
}

/// How a word of a line is replaced by what is to stay of it, which may be nothing.
fn replace(path: &str, line: usize, old: &str, new: &str) -> String {
    let escaped = |text: &str| text.replace('.', "\\.").replace('*', "\\*").replace('|', "\\|");
    match new {
        "" => format!("sed -i '{line}s|{}||' {path}", escaped(old)),
        _ => format!("sed -i '{line}s|{}|{new}|' {path}", escaped(old)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with one card whose home is nvidia, and nothing in its way.
    pub fn facts() -> Facts {
        let function = |number: u8, device: u32, class: u32| Function {
            address: format!("0000:01:00.{number}"),
            vendor: 0x10de,
            device,
            subvendor: 0x1043,
            subdevice: 0x88e2,
            class,
            modalias: format!(
                "pci:v000010DEd{device:08X}sv00001043sd000088E2bc{:02X}sc{:02X}i00",
                class >> 16,
                class >> 8 & 0xff
            ),
        };
        Facts {
            functions: vec![function(0, 0x2684, 0x03_0000), function(1, 0x22ba, 0x04_0300)],
            has_card: true,
            modules: NVIDIA.map(str::to_string).to_vec(),
            directives: Vec::new(),
            command_lines: Vec::new(),
            rules: Vec::new(),
            scripts: Vec::new(),
            overrides: Vec::new(),
            has_driverctl: false,
        }
    }

    #[test]
    fn nothing_is_in_the_way_of_cards_that_are_not_to_have_a_driver() {
        let directives = || modprobe::parse("/etc/modprobe.d/x.conf", "blacklist nvidia\nblacklist nouveau\n");
        let count = |facts: Facts| facts.causes().len();
        assert_eq!(count(Facts { directives: directives(), ..facts() }), 1);
        let on_vfio = Facts { functions: Vec::new(), modules: Vec::new(), directives: directives(), ..facts() };
        assert_eq!(count(on_vfio), 0);
        let on_nouveau = Facts { modules: vec!["nouveau".to_string()], directives: directives(), ..facts() };
        assert_eq!(on_nouveau.causes()[0].text, "blacklist nouveau");
    }

    #[test]
    fn a_cause_is_one_line_with_what_to_type() {
        let directives = modprobe::parse("/etc/modprobe.d/x.conf", "\nblacklist nvidia_uvm\n");
        assert_eq!(
            Facts { directives, ..facts() }.causes()[0].to_string(),
            "/etc/modprobe.d/x.conf:2: blacklist nvidia_uvm keeps nvidia_uvm from being loaded at boot, which CUDA in \
             containers needs; to take it out: sed -i '2s/^/# /' /etc/modprobe.d/x.conf"
        );
    }
}
