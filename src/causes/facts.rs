//! All of the host that may decide who has a card.

use crate::address::Address;
use crate::modprobe::{self, Line};
use crate::sys::Kernel;
use std::collections::BTreeMap;

/// One function of an NVIDIA card, by what such things are matched with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// None of a card that has not been seen.
    pub address: Option<Address>,
    pub vendor: u32,
    pub device: u32,
    pub subvendor: u32,
    pub subdevice: u32,
    pub class: u32,
    pub modalias: String,
}

impl Function {
    pub fn read(kernel: &dyn Kernel, address: Address, vendor: u32, device: u32, class: u32) -> Function {
        let text = |name: &str| kernel.text(&address.attribute(name));
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
        Function { address: Some(address), vendor, device, subvendor, subdevice, class, modalias }
    }

    /// Without a domain where that is the first, as people write it.
    pub fn short(&self) -> Option<String> {
        let address = self.address?.to_string();
        Some(address.strip_prefix("0000:").map_or(address.clone(), str::to_string))
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
    pub kind: ScriptKind,
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
    pub rules: Vec<RuleFile>,
    pub scripts: Vec<Script>,
    /// Driverctl's: the file, the address, the driver.
    pub overrides: Vec<(String, String, String)>,
    pub has_driverctl: bool,
}

impl Facts {
    pub fn gpu(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| function.is_gpu())
    }

    /// Whether this module, by any of its names, is one that a card at home needs.
    pub fn needs(&self, module: &str) -> bool {
        let module = modprobe::module(module);
        let is_nvidia = self.modules.iter().any(|needed| needed == "nvidia");
        let flavour = ["nvidia_current", "nvidia_tesla", "nvidia_legacy"].iter().any(|name| module.starts_with(name));
        self.modules.contains(&module) || (is_nvidia && flavour)
    }
}

/// What runs a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptKind {
    Initramfs,
    /// The list of modules that initramfs-tools loads, with their parameters.
    InitramfsModules,
    /// A unit, a job at boot: what it runs itself is a script of its own.
    Boot,
    /// A program that something else names, and that is told of there.
    Named,
}

/// A file of udev's rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleFile {
    pub path: String,
    pub text: String,
    /// What it runs, by the word that stands there, as far as those are scripts.
    pub programs: BTreeMap<String, String>,
}
