//! What the NVIDIA driver says of itself in `/proc/driver/nvidia` and `/sys/module`.

use super::inventory::{self, READ_LIMIT, addresses};
use super::power;
use crate::address::Address;
use crate::story::printable;
use crate::sys::{ActError, Kernel};
use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

pub const UVM: &str = "nvidia_uvm";

/// What the driver says of each GPU that it has, or cannot let go of.
pub const GPUS: &str = "/proc/driver/nvidia/gpus";

/// A process that changes its program for another may keep others from looking at it.
const STACK_LIMIT: Duration = Duration::from_millis(200);

/// Modules that depend on `nvidia` and that this program may unload with it and load again.
const STACK: [&str; 4] = [UVM, "nvidia_drm", "nvidia_modeset", "nvidia_peermem"];

/// Of all numbers the first three decide: `580.95.05`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Version, ()> {
        let mut numbers = text.trim().split('.').map(|n| n.parse::<u32>().map_err(|_| ()));
        let mut next = || numbers.next().unwrap_or(Ok(0));
        let version = Version(next()?, next()?, next()?);
        if version.0 == 0 { Err(()) } else { Ok(version) }
    }
}

impl Version {
    pub const fn of(first: u32, second: u32, third: u32) -> Version {
        Version(first, second, third)
    }

    /// Before 580.105.08, of 590 before 590.44.01, nvidia_drm looks for GPUs when it is loaded and never again. With
    /// modeset=1 it holds each of them until it is unloaded; a GPU that is unbound leaves its DRM device behind, and one
    /// that is bound later gets none.
    pub fn drm_looks_once(self) -> bool {
        self < if self.0 >= 590 { Version(590, 44, 1) } else { Version(580, 105, 8) }
    }

    /// From 595.45 on the driver forgets a GPU that is unbound before it waits for its users. Whoever has the GPU's node
    /// lets go of it by ending, as before; whoever has it attached through nvidiactl no more, and that wait never ends.
    pub fn forgets_attached(self) -> bool {
        self >= Version(595, 45, 0)
    }
}

/// The loaded driver's version: the field after `x86_64` (or `Module`) in the first line.
pub fn version(kernel: &dyn Kernel) -> Option<Version> {
    version_as_written(kernel)?.parse().ok()
}

/// As it stands in names of files: `580.95.05`.
pub fn version_as_written(kernel: &dyn Kernel) -> Option<String> {
    let text = kernel.text("/proc/driver/nvidia/version")?;
    let is_version = |word: &&str| word.contains('.') && word.parse::<Version>().is_ok();
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_string)
}

pub fn modeset_enabled(kernel: &dyn Kernel) -> bool {
    kernel.text("/sys/module/nvidia_drm/parameters/modeset").is_some_and(|t| matches!(t.as_str(), "Y" | "1"))
}

/// Which node is whose: of each GPU that the driver lists, by address, the N of its `/dev/nvidiaN`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Minors {
    of: BTreeMap<Address, u64>,
    /// The driver did not say, or not of all.
    pub is_busy: bool,
}

impl Minors {
    /// `information` takes the lock that the driver holds as long as it starts or resets any GPU, which may be half a
    /// minute.
    pub fn read(kernel: &dyn Kernel) -> Minors {
        let mut minors = Minors::default();
        for address in addresses(kernel, GPUS) {
            match information(kernel, address) {
                Ok(text) => minors.of.extend(device_minor(&text).map(|minor| (address, minor))),
                Err(ActError::Stuck { .. }) => {
                    minors.is_busy = true;
                    return minors;
                }
                Err(_) => {}
            }
        }
        minors
    }

    pub fn get(&self, address: Address) -> Option<u64> {
        self.of.get(&address).copied()
    }

    pub fn each(&self) -> impl Iterator<Item = (Address, u64)> {
        self.of.iter().map(|(address, minor)| (*address, *minor))
    }
}

/// What the driver says of a GPU; nothing of one that does not answer on its bus: asked then, the driver looks for the end of
/// a list of capabilities that has none, and never gives its lock back (`pciPbiCheck`, seen with 550.163.01).
///
/// # Errors
/// [`ActError::Stuck`] while the driver is busy.
pub fn information(kernel: &dyn Kernel, address: Address) -> Result<String, ActError> {
    if !power::sleeps(kernel, address) && inventory::is_gone(kernel, address)? {
        return Ok(String::new());
    }
    let text = kernel.read_slowly(&format!("{GPUS}/{address}/information"), READ_LIMIT)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// That of one GPU; none, too, while the driver is busy.
pub fn minor(kernel: &dyn Kernel, address: Address) -> Option<u64> {
    Minors::read(kernel).get(address)
}

fn device_minor(information: &str) -> Option<u64> {
    information.lines().find_map(|line| line.strip_prefix("Device Minor:")?.trim().parse().ok())
}

/// Why nothing could be learnt from the driver, for a sentence that says what was not done.
pub fn busy(kernel: &dyn Kernel) -> String {
    let who = in_the_driver(kernel, &["nvidia_open", "nv_open_device"]);
    let who =
        who.map_or_else(|| "somebody".to_string(), |process| format!("PID {} ({})", process.pid, process.command));
    format!(
        "the NVIDIA driver is busy, {who} has it start or reset a GPU ({GPUS} did not answer within {} s)",
        READ_LIMIT.as_secs()
    )
}

/// A process that is in one of these functions of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InKernel {
    pub pid: i32,
    pub command: String,
}

/// Looks at where every process is in the kernel; none when nobody is seen there, or only by root.
pub fn in_the_driver(kernel: &dyn Kernel, functions: &[&str]) -> Option<InKernel> {
    let mut patience = 3;
    for pid in kernel.list("/proc").iter().filter_map(|name| name.parse::<i32>().ok()) {
        let stack = match kernel.read_slowly(&format!("/proc/{pid}/stack"), STACK_LIMIT) {
            Ok(stack) => String::from_utf8_lossy(&stack).into_owned(),
            Err(ActError::Stuck { .. }) if patience == 0 => return None,
            Err(ActError::Stuck { .. }) => {
                patience -= 1;
                continue;
            }
            Err(_) => continue,
        };
        if functions.iter().any(|function| stack.contains(function)) {
            let command = kernel.text(&format!("/proc/{pid}/comm")).unwrap_or_else(|| "?".to_string());
            return Some(InKernel { pid, command: printable(&command) });
        }
    }
    None
}

/// The majors that `/proc/devices` lists for a character device under exactly this name.
pub fn major(kernel: &dyn Kernel, name: &str) -> Option<u64> {
    let text = kernel.text("/proc/devices")?;
    text.lines().take_while(|line| !line.starts_with("Block")).find_map(|line| {
        let (number, driver) = line.trim_start().split_once(' ')?;
        (driver == name).then(|| number.parse().ok())?
    })
}

/// A module and all that hold it, in an order in which they can be unloaded: holders first.
///
/// # Errors
/// The name of a holder that this program does not know and so must not unload.
pub fn unload_order(kernel: &dyn Kernel, module: &str) -> Result<Vec<String>, String> {
    let mut order = Vec::new();
    add_with_holders(kernel, module, &mut Vec::new(), &mut order)?;
    Ok(order)
}

/// Looks at each module once, even should they hold each other in a circle.
fn add_with_holders(
    kernel: &dyn Kernel,
    module: &str,
    seen: &mut Vec<String>,
    order: &mut Vec<String>,
) -> Result<(), String> {
    if seen.iter().any(|m| m == module) {
        return Ok(());
    }
    seen.push(module.to_string());
    for holder in kernel.list(&format!("/sys/module/{module}/holders")) {
        if !STACK.contains(&holder.as_str()) {
            return Err(holder);
        }
        add_with_holders(kernel, &holder, seen, order)?;
    }
    order.push(module.to_string());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn versions_compare_by_number() {
        let looks_once = |text: &str| text.parse::<Version>().unwrap().drm_looks_once();
        for old in ["515.43.04", "535.261.03", "550.163.01", "565.77", "570.86.16", "580.95.05", "590.9.1"] {
            assert!(looks_once(old), "{old}");
        }
        for new in ["580.105.08", "585.1", "590.44.01", "595.45.04"] {
            assert!(!looks_once(new), "{new}");
        }
        let forgets = |text: &str| text.parse::<Version>().unwrap().forgets_attached();
        assert!(forgets("595.45.04") && forgets("600.1") && !forgets("590.48.01"));
        assert!("Module".parse::<Version>().is_err());
        assert!("".parse::<Version>().is_err());
    }

    #[test]
    fn modules_that_hold_each_other_come_once() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-modules-{}", std::process::id()));
        for (module, holder) in
            [("nvidia", "nvidia_modeset"), ("nvidia_modeset", "nvidia_drm"), ("nvidia_drm", "nvidia_modeset")]
        {
            std::fs::create_dir_all(root.join(format!("sys/module/{module}/holders/{holder}"))).unwrap();
        }
        let order = unload_order(&Linux::at(root.clone()), "nvidia");
        std::fs::remove_dir_all(root).unwrap();
        assert_eq!(order.unwrap(), ["nvidia_drm", "nvidia_modeset", "nvidia"]);
    }

    /// Each that does not answer costs time.
    #[test]
    fn who_is_in_the_driver_is_looked_for_with_little_patience() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-stacks-{}", std::process::id()));
        let mut silent = Vec::new();
        let mut process = |pid: i32, stack: Option<&str>| {
            let folder = root.join(format!("proc/{pid}"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("comm"), "smi\n").unwrap();
            match stack {
                Some(text) => std::fs::write(folder.join("stack"), text).unwrap(),
                None => {
                    nix::unistd::mkfifo(&folder.join("stack"), nix::sys::stat::Mode::S_IRWXU).unwrap();
                    silent.push(folder.join("stack"));
                }
            }
        };
        for pid in 11..14 {
            process(pid, None);
        }
        process(21, Some("[<0>] do_sys_open+0x1\n"));
        process(22, Some("[<0>] nv_open_device+0x1/0x2 [nvidia]\n"));
        let find = || in_the_driver(&Linux::at(root.clone()), &["nvidia_open", "nv_open_device"]);
        let found = find();
        process(14, None);
        let given_up = find();
        for fifo in silent {
            let mut end = std::fs::OpenOptions::new();
            let _ = std::os::unix::fs::OpenOptionsExt::custom_flags(end.write(true), nix::libc::O_NONBLOCK).open(fifo);
        }
        std::fs::remove_dir_all(root).unwrap();
        assert_eq!(found, Some(InKernel { pid: 22, command: "smi".to_string() }));
        assert_eq!(given_up, None);
    }
}
