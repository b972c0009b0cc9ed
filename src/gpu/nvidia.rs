//! What the NVIDIA driver says of itself in `/proc/driver/nvidia` and `/sys/module`.

use crate::sys::Kernel;
use std::str::FromStr;

pub const UVM: &str = "nvidia_uvm";

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
    /// Drivers from 570 on, up to 580.95.05, hold each GPU while nvidia_drm with modeset=1 is loaded; 580.105.08 and
    /// 590.44.01 let go of a GPU that is unbound.
    pub fn drm_holds_gpu(self) -> bool {
        let fixed = if self.0 >= 590 { Version(590, 44, 1) } else { Version(580, 105, 8) };
        self >= Version(570, 0, 0) && self < fixed
    }

    /// From 595.45 on the driver forgets a GPU that is unbound before it waits for its users: the wait never ends.
    pub fn waits_for_ever(self) -> bool {
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

/// `Device Minor:` of a GPU, the N of its `/dev/nvidiaN`.
pub fn minor(kernel: &dyn Kernel, address: &str) -> Option<u64> {
    let text = kernel.text(&format!("/proc/driver/nvidia/gpus/{address}/information"))?;
    text.lines().find_map(|line| line.strip_prefix("Device Minor:")?.trim().parse().ok())
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
        let holds = |text: &str| text.parse::<Version>().unwrap().drm_holds_gpu();
        assert!(!holds("565.77"));
        assert!(holds("570.86.16"));
        assert!(holds("580.95.05"));
        assert!(!holds("580.105.08"));
        assert!(holds("590.9.1"));
        assert!(!holds("590.44.01"));
        assert!(!holds("595.45.04"));
        let waits = |text: &str| text.parse::<Version>().unwrap().waits_for_ever();
        assert!(waits("595.45.04") && waits("600.1") && !waits("590.48.01"));
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
}
