//! The files and directories that the simulated machine shows, made from its state whenever somebody looks.

use super::modules::module_of_driver;
use super::state::{NVIDIA_MAJOR, State, group_number};
use gpu_handoff::sys::DeviceNumber;
use std::fmt::Write;

pub const VTCONSOLE_BIND: &str = "/sys/class/vtconsole/vtcon1/bind";
pub const RELEASE: &str = "6.12.0";
const MODPROBE_FILE: &str = "vfio.conf";

/// What reading a file comes to.
pub enum Text {
    Is(String),
    Absent,
    /// The attribute's show function takes a lock that a call which hangs holds.
    NeverReturns,
    /// Nobody told the simulation what that file says.
    NotModelled,
}

impl State {
    pub fn text_of(&self, path: &str) -> Text {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        // The driver's lock is taken.
        if self.is_opening() && path.ends_with("/information") {
            return Text::NeverReturns;
        }
        let text = match parts.as_slice() {
            ["sys", "bus", "pci", "devices", address, attribute @ ..] => return self.attribute(address, attribute),
            ["sys", "module", module, rest @ ..] => self.module_file(module, rest),
            ["sys", "class", "vfio", group, "dev"] => self.vfio_group(group).map(|n| format!("{n}\n")),
            ["proc", "driver", "nvidia", rest @ ..] => self.proc_nvidia(rest),
            ["sys", "class", "vtconsole", console, attribute] => self.vtconsole(console, attribute),
            ["sys", "class", "graphics", _, "device", "boot_vga"] => None,
            // Nobody is young here: those who go by themselves are udev's.
            ["proc", "uptime"] => None,
            ["proc", "iomem"] => Some("00000000-00000fff : Reserved\n".to_string()),
            ["proc", "devices"] => Some(self.proc_devices()),
            ["proc", "cmdline"] => Some("root=/dev/vda rw iommu=pt\n".to_string()),
            ["proc", "interrupts"] => Some(self.interrupts()),
            ["proc", "locks"] => Some(self.proc_locks()),
            ["proc", "sys", "kernel", "osrelease"] => Some(format!("{RELEASE}\n")),
            // Who is where in the kernel is nothing that a decision goes by.
            ["proc", _, "stack"] => None,
            ["proc", pid, file] if pid.parse::<i32>().is_ok() => self.proc_file(pid, file),
            ["lib", "modules", RELEASE, "modules.dep"] => Some("kernel/drivers/vfio/pci/vfio-pci.ko.xz:\n".to_string()),
            ["etc", "modprobe.d", MODPROBE_FILE] => Some(self.modprobe_file()),
            ["sys", "fs", "cgroup", rest @ ..] => self.cgroup_file(rest),
            ["etc", "pve", "lxc", file] => self.container_config(file),
            ["etc", "pve", "qemu-server", _] => Some("hostpci0: 0000:01:00\n".to_string()),
            ["etc", "pve", "ha", ..] => None,
            ["run", "qemu-server", file] => {
                let vmid = file.strip_suffix(".pid").and_then(|id| id.parse().ok());
                vmid.and_then(|id: u32| Some(format!("{}\n", self.pid_files.get(&id)?)))
            }
            ["lib", "modules", ..] | ["etc", "modprobe.d", ..] | ["etc", "gpu-handoff", ..] | ["run", ..] => None,
            _ => return Text::NotModelled,
        };
        text.map_or(Text::Absent, Text::Is)
    }

    fn attribute(&self, address: &str, attribute: &[&str]) -> Text {
        let Some(function) = self.functions.get(address) else { return Text::Absent };
        let line = |text: &Option<String>| text.as_ref().map_or(Text::Absent, |text| Text::Is(format!("{text}\n")));
        let number = |number: Option<DeviceNumber>| number.map_or(Text::Absent, |n| Text::Is(format!("{n}\n")));
        match attribute {
            ["vendor"] => Text::Is(format!("{:#06x}\n", function.vendor)),
            ["device"] => Text::Is(format!("{:#06x}\n", function.device)),
            ["class"] => Text::Is(format!("{:#08x}\n", function.class)),
            // driver_override_show takes the device's lock.
            ["driver_override"] if function.locked => Text::NeverReturns,
            ["driver_override"] => Text::Is(format!("{}\n", function.driver_override.as_deref().unwrap_or("(null)"))),
            // sriov_numvfs_show takes it, too; the GPU has the attribute, and no virtual function.
            ["sriov_numvfs"] if function.locked => Text::NeverReturns,
            ["sriov_numvfs"] if address.ends_with(".0") => Text::Is("0\n".to_string()),
            ["sriov_numvfs"] | ["physfn"] => Text::Absent,
            ["power", "control"] => line(&function.power.control),
            ["d3cold_allowed"] => line(&function.power.d3cold_allowed),
            ["power", "runtime_status"] => Text::Is("active\n".to_string()),
            ["irq"] => Text::Is(format!("{}\n", self.interrupt(address))),
            ["power_state"] => Text::Is("D0\n".to_string()),
            ["drm", _, "dev"] => number(self.drm_number(address)),
            ["graphics", screen, "dev"] => Text::Is(format!("29:{}\n", screen.trim_start_matches("fb"))),
            ["sound", _, "controlC0", "dev"] => number(self.sound_number(address)),
            ["vfio-dev", _, "dev"] => number(self.vfio_device_number(address)),
            _ => Text::NotModelled,
        }
    }

    fn vtconsole(&self, console: &str, attribute: &str) -> Option<String> {
        let (name, is_attached) = match console {
            "vtcon0" if self.can_attach() => ("(S) dummy device", self.console != Some(true)),
            "vtcon0" => ("(M) dummy device", self.console != Some(true)),
            "vtcon1" => ("(M) frame buffer device", self.console?),
            _ => return None,
        };
        match attribute {
            "name" => Some(format!("{name}\n")),
            "bind" => Some(format!("{}\n", u8::from(is_attached))),
            _ => None,
        }
    }

    fn module_file(&self, module: &str, rest: &[&str]) -> Option<String> {
        // It comes and goes with vfio_pci, and nobody here loads or unloads it.
        if !self.is_listed(if module == "vfio" { "vfio_pci" } else { module }) {
            return None;
        }
        match rest {
            ["refcnt"] if self.counts_nothing && module != "vfio" => Some(format!("{}\n", self.holders(module).len())),
            ["refcnt"] => Some(format!("{}\n", self.references(module))),
            ["parameters", "modeset"] => Some(if self.modeset { "Y\n" } else { "N\n" }.to_string()),
            _ => None,
        }
    }

    fn vfio_group(&self, group: &str) -> Option<DeviceNumber> {
        let group: u32 = group.parse().ok()?;
        let on_vfio = self.functions.iter().any(|(a, f)| f.group == group && self.shown_driver(a) == Some("vfio-pci"));
        on_vfio.then(|| group_number(group))
    }

    fn proc_nvidia(&self, rest: &[&str]) -> Option<String> {
        if !self.is_loaded("nvidia") {
            return None;
        }
        match rest {
            ["version"] => Some(format!(
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n",
                self.version
            )),
            ["params"] => {
                Some("ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 44\nDeviceFileMode: 438\n".to_string())
            }
            ["gpus", address, "information"] => {
                let minor = self.functions.get(*address)?.minor?;
                Some(format!("Model: \t\t Simulated\nDevice Minor: \t {minor}\n"))
            }
            _ => None,
        }
    }

    fn proc_devices(&self) -> String {
        let mut text = "Character devices:\n  1 mem\n116 alsa\n".to_string();
        if self.is_loaded("nvidia") {
            let _ = write!(text, "{NVIDIA_MAJOR} nvidia\n{NVIDIA_MAJOR} nvidiactl\n");
        }
        if self.is_loaded("nvidia_uvm") {
            let _ = writeln!(text, "{} nvidia-uvm", self.uvm_major);
        }
        text.push_str("\nBlock devices:\n259 blkext\n");
        text
    }

    fn interrupt(&self, address: &str) -> usize {
        30 + self.functions.keys().position(|other| other == address).unwrap_or(0)
    }

    /// nvidia has one for each GPU that it has started; a line of wires is shared with the card's sound.
    fn interrupts(&self) -> String {
        let mut text = "           CPU0\n".to_string();
        for (address, function) in &self.functions {
            let names = match function.driver {
                Some("nvidia") if self.usage(address) > 0 => "other, nvidia",
                _ => "other",
            };
            let _ = writeln!(text, " {}:          0   IO-APIC   {0}-fasteoi   {names}", self.interrupt(address));
        }
        text
    }

    fn proc_locks(&self) -> String {
        let mut text = String::new();
        for (index, vmid) in self.locked_guests.iter().enumerate() {
            let _ = writeln!(text, "{}: FLOCK  ADVISORY  WRITE 812 00:1a:{vmid} 0 EOF", index + 1);
        }
        text
    }

    fn proc_file(&self, pid: &str, file: &str) -> Option<String> {
        let (_, process) = self.living().find(|(other, _)| other.to_string() == pid)?;
        match file {
            "stat" => {
                let zeros = "0 ".repeat(18);
                Some(format!("{pid} ({}) D {zeros}{} 0\n", process.command, process.start))
            }
            "comm" => Some(format!("{}\n", process.command)),
            "cgroup" => Some(process.cgroup.clone()),
            "cmdline" => Some(process.command_line.clone()),
            _ => None,
        }
    }

    fn modprobe_file(&self) -> String {
        let ids: Vec<String> = self.static_ids.iter().map(|(v, d)| format!("{v:04x}:{d:04x}")).collect();
        if ids.is_empty() { String::new() } else { format!("options vfio-pci ids={}\n", ids.join(",")) }
    }

    pub fn names_in(&self, path: &str) -> Option<Vec<String>> {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        let one = |name: String, is_there: bool| if is_there { vec![name] } else { Vec::new() };
        Some(match parts.as_slice() {
            ["sys", "bus", "pci", "devices"] => self.functions.keys().cloned().collect(),
            ["sys", "bus", "pci", "devices", _] => ["class", "device", "vendor"].map(str::to_string).to_vec(),
            ["sys", "bus", "pci", "devices", address, "drm"] => {
                self.drm_number(address).map(|number| format!("card{}", number.minor)).into_iter().collect()
            }
            ["sys", "bus", "pci", "devices", _, "msi_irqs"] => Vec::new(),
            ["sys", "bus", "pci", "devices", address, "graphics"] => {
                one(self.framebuffer_name(address), self.framebuffers().iter().any(|a| a == address))
            }
            ["sys", "class", "graphics"] => {
                let mut names: Vec<String> = self.framebuffers().iter().map(|a| self.framebuffer_name(a)).collect();
                names.push("fbcon".to_string());
                names.extend(one("fb0".to_string(), self.other_screen));
                names
            }
            ["sys", "class", "vtconsole"] => {
                let mut names = vec!["vtcon0".to_string()];
                names.extend(one("vtcon1".to_string(), self.console.is_some()));
                names
            }
            ["sys", "bus", "pci", "devices", address, "sound"] => {
                one("card0".to_string(), self.sound_number(address).is_some())
            }
            ["sys", "bus", "pci", "devices", address, "sound", "card0"] => {
                one("controlC0".to_string(), self.sound_number(address).is_some())
            }
            ["sys", "bus", "pci", "devices", address, "vfio-dev"] => {
                one("vfio0".to_string(), self.vfio_device_number(address).is_some())
            }
            ["sys", "bus", "pci", "drivers", driver] => {
                let bound = self.functions.keys().filter(|a| self.shown_driver(a) == Some(*driver)).cloned();
                bound.chain(["bind", "module", "new_id", "unbind"].map(str::to_string)).collect()
            }
            ["sys", "kernel", "iommu_groups", group, "devices"] => {
                let inside = self.functions.iter().filter(|(_, f)| f.group.to_string() == *group);
                inside.map(|(address, _)| address.clone()).collect()
            }
            ["sys", "fs", "cgroup", "lxc"] => self.container_cgroups(),
            ["proc"] => self.living().map(|(pid, _)| pid.to_string()).collect(),
            ["sys", "module", "vfio", "holders"] => one("vfio_pci".to_string(), self.is_listed("vfio_pci")),
            ["sys", "module", module, "holders"] => self.holders(module),
            ["proc", "driver", "nvidia", "gpus"] => {
                self.functions.iter().filter(|(_, f)| f.minor.is_some()).map(|(a, _)| a.clone()).collect()
            }
            // Nothing here is at boot: what the containers need is loaded.
            ["etc", "pve", "lxc"] => Vec::new(),
            ["etc", "pve", "qemu-server"] => vec!["111.conf".to_string(), "112.conf".to_string()],
            ["etc", "modprobe.d"] => one(MODPROBE_FILE.to_string(), !self.static_ids.is_empty()),
            ["sys", "class", "mdev_bus", ..] | ["run", "modprobe.d"] => Vec::new(),
            ["usr" | "lib", ..] => Vec::new(),
            _ => return None,
        })
    }

    /// The last component of a link's target; the error says whether there could be such a link.
    pub fn link_at(&self, path: &str) -> Option<Option<String>> {
        let rest = path.strip_prefix("/sys/bus/pci/devices/")?;
        let (address, link) = rest.split_once('/')?;
        let function = self.functions.get(address);
        Some(match link {
            "driver" => self.shown_driver(address).map(str::to_string),
            "driver/module" => self.shown_driver(address).and_then(module_of_driver).map(str::to_string),
            "iommu_group" => function.map(|f| f.group.to_string()),
            // A node itself; controlD64 would be a link.
            _ if link.starts_with("drm/") => None,
            _ => return None,
        })
    }

    pub fn is_there(&self, path: &str) -> Option<bool> {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        Some(match parts.as_slice() {
            ["sys", "module", module] => self.is_listed(module),
            ["sys", "bus", "pci", "drivers", driver] => self.drivers.contains(driver),
            ["sys", "bus", "pci", "drivers", driver, "remove_id"] => self.drivers.contains(driver),
            ["sys", "bus", "pci", "devices", address] => self.functions.contains_key(*address),
            ["sys", "bus", "pci", "devices", _, "physfn"] => false,
            ["sys", "bus", "pci", "devices", address, "sriov_numvfs"] => address.ends_with(".0"),
            ["proc", "driver", "nvidia", "gpus", address] => {
                self.is_loaded("nvidia") && self.functions.get(*address).is_some_and(|f| f.minor.is_some())
            }
            ["etc", "pve", "qemu-server", ..] => true,
            ["dev", ..] => self.nodes.contains_key(path),
            ["run", "qemu-server", file] => {
                let noted = file.strip_suffix(".cleanup").and_then(|id| id.parse().ok());
                noted.is_some_and(|id: u32| self.noted.contains(&id))
            }
            _ => return None,
        })
    }
}
