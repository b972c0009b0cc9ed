//! Which driver would take a function if nobody had given it to vfio-pci: by what is loaded, what the kernel's modules are
//! for (`modules.alias`), and what is kept away.

use super::inventory::{Function, driver_exists};
use crate::modprobe;
use crate::sys::Kernel;

/// A driver, and the module that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taker {
    pub driver: String,
    pub module: String,
}

/// Drivers of what is on an NVIDIA card, the preferred one first. Where both are there NVIDIA's own is meant.
fn candidates(function: &Function) -> &'static [(&'static str, &'static str)] {
    match function.class >> 8 {
        _ if function.is_nvidia_gpu() => &[("nvidia", "nvidia"), ("NovaCore", "nova_core"), ("nouveau", "nouveau")],
        _ if function.is_nvswitch() => &[("nvidia-nvswitch", "nvidia")],
        0x0403 => &[("snd_hda_intel", "snd_hda_intel")],
        0x0c03 => &[("xhci_hcd", "xhci_pci")],
        0x0c80 => &[("nvidia-gpu", "i2c_nvidia_gpu")],
        _ => &[],
    }
}

/// None when nothing on this host would.
pub fn would_take(kernel: &dyn Kernel, function: &Function) -> Option<Taker> {
    let candidates = candidates(function);
    let taker =
        |(driver, module): &(&str, &str)| Taker { driver: (*driver).to_string(), module: (*module).to_string() };
    if let Some(loaded) = candidates.iter().find(|(driver, _)| driver_exists(kernel, driver)) {
        return Some(taker(loaded));
    }
    let release = kernel.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let list = |name: &str| kernel.text(&format!("/lib/modules/{release}/{name}")).unwrap_or_default();
    let (aliases, files) = (list("modules.alias"), list("modules.dep"));
    let modalias = kernel.text(&function.address.attribute("modalias")).unwrap_or_else(|| made_modalias(function));
    let is_there = |module: &str| has_alias(&aliases, module, &modalias) || has_file(&files, module);
    let found = candidates.iter().find(|(_, module)| is_there(module) && !is_kept_away(kernel, module));
    found.map(taker)
}

/// As the kernel makes it, but for what says which board it is on.
fn made_modalias(function: &Function) -> String {
    let Function { vendor, device, class, .. } = function;
    let (class, sub, interface) = (class >> 16, class >> 8 & 0xff, class & 0xff);
    format!("pci:v{vendor:08X}d{device:08X}sv00000000sd00000000bc{class:02X}sc{sub:02X}i{interface:02X}")
}

/// `alias pci:v000010DEd*sv*sd*bc03sc00i00* nvidia`
fn has_alias(aliases: &str, module: &str, modalias: &str) -> bool {
    let mut lines = aliases.lines().filter_map(|line| line.strip_prefix("alias ")?.split_once(' '));
    lines
        .any(|(pattern, name)| modprobe::module(name.trim()) == module && fits(pattern.as_bytes(), modalias.as_bytes()))
}

/// `kernel/sound/pci/hda/snd-hda-intel.ko.zst: …`
fn has_file(files: &str, module: &str) -> bool {
    let name_of = |line: &str| {
        let file = line.split(':').next()?.rsplit('/').next()?;
        Some(modprobe::module(file.split('.').next()?))
    };
    files.lines().any(|line| name_of(line).as_deref() == Some(module))
}

/// `*` stands for anything, `?` for one character; the kernel's patterns have nothing else.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => (0..=text.len()).filter_map(|at| text.get(at..)).any(|text| fits(rest, text)),
        [c, rest @ ..] => {
            let is_it = |t: &u8| *c == b'?' || c.eq_ignore_ascii_case(t);
            text.split_first().is_some_and(|(first, text)| is_it(first) && fits(rest, text))
        }
    }
}

/// By the administrator, so that it takes nothing when the host boots.
fn is_kept_away(kernel: &dyn Kernel, module: &str) -> bool {
    let named = |name: &str| modprobe::module(name) == module;
    let by_file = modprobe::read(kernel).iter().any(|line| match line.words()[..] {
        ["blacklist", name] | ["alias", name, "off"] => named(name),
        ["install", name, program, ..] => {
            named(name) && matches!(program.rsplit('/').next(), Some("false" | "true" | ":"))
        }
        _ => false,
    });
    let command_line = kernel.text("/proc/cmdline").unwrap_or_default();
    let lists = command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("modprobe.blacklist=").or_else(|| word.strip_prefix("module_blacklist=")));
    by_file || lists.flat_map(|list| list.split(',')).any(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    fn function(class: u32) -> Function {
        // Tests of one process run side by side.
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("gpu-handoff-function-{}-{number}", std::process::id()));
        let directory = root.join("sys/bus/pci/devices/0000:01:00.0");
        std::fs::create_dir_all(&directory).unwrap();
        for (name, text) in [("vendor", "0x10de"), ("device", "0x2684"), ("class", &format!("0x{class:06x}"))] {
            std::fs::write(directory.join(name), text).unwrap();
        }
        let function = Function::read(&Linux::at(root.clone()), "0000:01:00.0".parse().unwrap()).unwrap();
        std::fs::remove_dir_all(root).unwrap();
        function
    }

    /// The driver for a class on a host with these files.
    fn taken(class: u32, files: &[(&str, &str)]) -> Option<String> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("gpu-handoff-taken-{}-{number}", std::process::id()));
        for (path, text) in files.iter().chain(&[("proc/sys/kernel/osrelease", "6.14")]) {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let taker = would_take(&Linux::at(root.clone()), &function(class));
        std::fs::remove_dir_all(root).unwrap();
        taker.map(|taker| taker.driver)
    }

    const ALIASES: (&str, &str) = (
        "lib/modules/6.14/modules.alias",
        "alias pci:v000010DEd*sv*sd*bc03sc*i* nouveau\nalias pci:v000010DEd*sv*sd*bc03sc00i00* nvidia\n\
         alias pci:v000010DEd*sv*sd*bc04sc03i00* snd_hda_intel\nalias pci:v*d*sv*sd*bc0Csc03i30* xhci-pci\n",
    );

    #[test]
    fn who_would_take_it() {
        let driver = |taken: Option<String>| taken.unwrap_or_default();
        assert_eq!(driver(taken(0x03_0000, &[ALIASES])), "nvidia");
        assert_eq!(driver(taken(0x04_0300, &[ALIASES])), "snd_hda_intel");
        assert_eq!(driver(taken(0x0c_0330, &[ALIASES])), "xhci_hcd");
        assert_eq!(driver(taken(0x0c_8000, &[ALIASES])), "");
        let dep = ("lib/modules/6.14/modules.dep", "updates/dkms/nvidia-drm.ko: x\nupdates/dkms/nvidia.ko.zst:\n");
        assert_eq!(driver(taken(0x03_0200, &[dep])), "nvidia");
        assert_eq!(driver(taken(0x03_0000, &[])), "");
        assert_eq!(driver(taken(0x03_0000, &[("sys/bus/pci/drivers/nouveau/bind", "")])), "nouveau");
    }

    #[test]
    fn what_is_kept_away_takes_nothing_unless_it_is_loaded() {
        for (path, text) in [
            ("etc/modprobe.d/x.conf", "blacklist nvidia"),
            ("etc/modprobe.d/x.conf", "install nvidia /bin/false"),
            ("etc/modprobe.d/x.conf", "alias nvidia off"),
            ("proc/cmdline", "quiet modprobe.blacklist=a,nvidia"),
            ("proc/cmdline", "module_blacklist=nvidia"),
        ] {
            assert_eq!(taken(0x03_0000, &[ALIASES, (path, text)]).as_deref(), Some("nouveau"), "{text}");
            let loaded = ("sys/bus/pci/drivers/nvidia/bind", "");
            assert_eq!(taken(0x03_0000, &[ALIASES, (path, text), loaded]).as_deref(), Some("nvidia"), "{text}");
        }
        for text in ["blacklist nvidiafb", "install nvidia /sbin/modprobe -i nvidia", "#blacklist nvidia"] {
            assert_eq!(
                taken(0x03_0000, &[ALIASES, ("etc/modprobe.d/x.conf", text)]).as_deref(),
                Some("nvidia"),
                "{text}"
            );
        }
    }
}
