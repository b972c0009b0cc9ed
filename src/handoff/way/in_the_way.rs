//! Who would make a step hang that takes a function from its driver. Looked at when it is decided, and once more right
//! before the step: unbinding waits, without a limit, for whoever has the function's nodes open, where unloading a module
//! only says that it is in use.
//!
//! Not all of them can be seen: a descriptor on its way through a socket is in no process, nor is an open that is not done
//! yet. So what was seen is compared with the driver's own count.

use crate::address::Address;
use crate::gpu::holders::{self, Devices, Found, Holder, Reach};
use crate::gpu::inventory::{self, Function, Slot};
use crate::gpu::nodes::{MODESET_MINOR, NVIDIA_MAJOR};
use crate::gpu::{behind, nodes, nvidia, usage};
use crate::sys::{DeviceNumber, Kernel, failpoints};
use crate::trouble::Trouble;
use std::time::Duration;

/// Drivers of which it is known what holds a reference on their module: open files, and nothing else.
const COUNTED: [&str; 2] = ["nvidia", "snd_hda_intel"];

/// An open that is not done yet is done after this time, or has failed.
const IN_BETWEEN: Duration = Duration::from_secs(3);

const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Before a function is unbound from a driver, whoever has it open by now, in words.
pub fn of_unbinding(kernel: &dyn Kernel, address: Address, driver: &str, limit: Duration) -> Option<String> {
    let slot = Slot::read(kernel, address.slot)?;
    let function = slot.functions.iter().find(|function| function.address == address)?.clone();
    if let Some(behind) = behind::in_use(kernel, &function) {
        return Some(format!("meanwhile {behind}"));
    }
    let devices = match driver {
        "nvidia" => Devices::of_slots(kernel, std::slice::from_ref(&slot), Reach::Unbinding),
        inventory::VFIO_PCI => return None,
        _ => Devices::of_function(kernel, &function),
    };
    if devices.is_blind {
        return Some(format!("meanwhile {}", nvidia::busy(kernel)));
    }
    match devices.find_lasting(kernel, limit, &|_| true) {
        Err(problem) => Some(problem),
        Ok(found) => match found.holders.first() {
            Some(holder) => Some(format!("meanwhile {holder}")),
            None => unseen(kernel, &function, &devices, found, limit).map(|why| why.to_string()),
        },
    }
}

/// Before the first of these modules is unloaded, or when one could not be. It is left to the kernel to say no, unless
/// somebody can be named.
pub fn of_unloading(kernel: &dyn Kernel, modules: &[&str], limit: Duration) -> Option<Holder> {
    if modules.iter().all(|module| usage::references(kernel, module) == Some(0)) {
        return None;
    }
    let slots = inventory::nvidia_slots(kernel);
    let is_on = |slot: &Slot| {
        slot.gpu().is_some_and(|gpu| gpu.driver.as_deref().is_some_and(|driver| driver != inventory::VFIO_PCI))
    };
    let slots: Vec<Slot> = slots.into_iter().filter(is_on).collect();
    let mut devices = match modules {
        // Only that goes, and whoever uses another node does not matter to it.
        ["nvidia_drm"] => Devices::default(),
        modules => {
            let reach = if modules.contains(&"nvidia") { Reach::Unloading } else { Reach::Slots };
            Devices::of_slots(kernel, &slots, reach)
        }
    };
    devices.add_all_drm(kernel, &nodes::gpus_of_nvidia_drm(kernel));
    devices.find_lasting(kernel, limit, &|_| true).ok()?.holders.into_iter().next()
}

/// Why a function cannot be unbound although nobody is seen that has it open; none when it can.
pub fn unseen(
    kernel: &dyn Kernel,
    function: &Function,
    devices: &Devices,
    mut found: Found,
    limit: Duration,
) -> Option<Trouble> {
    let driver = function.driver.as_deref().filter(|driver| *driver != inventory::VFIO_PCI)?;
    // What nobody could have open needs no count; and who is blind counts nothing.
    if devices.paths().is_empty() || failpoints::is_blind() {
        return None;
    }
    let module = function.module.as_deref()?;
    let end = kernel.now() + limit.min(IN_BETWEEN);
    let mut weight = None;
    loop {
        let count = usage::references(kernel, module);
        let mut explained = explained(kernel, driver, &found, 1);
        if driver == "nvidia" && explained > 0 && count.is_some_and(|count| count > explained) {
            // How many references an open file holds is another number in each line of the driver.
            let weight = *weight.get_or_insert_with(|| {
                let counter = format!("/sys/module/{module}/refcnt");
                kernel.weigh_open("/dev/nvidiactl", &counter, IN_BETWEEN).unwrap_or(1)
            });
            explained = self::explained(kernel, driver, &found, weight);
        }
        match count {
            Some(count) if count <= explained => return None,
            Some(_) if !COUNTED.contains(&driver) && found.hidden.is_empty() => return None,
            None if found.hidden.is_empty() => return None,
            _ => {}
        }
        if kernel.now() >= end {
            return Some(in_words(function, driver, count.map(|count| count.saturating_sub(explained)), &found));
        }
        kernel.sleep(LOOK_AGAIN);
        found = match devices.find(kernel, limit) {
            Ok(found) => found,
            Err(problem) => return Some(problem.into()),
        };
        if let Some(holder) = found.holders.first() {
            return Some(format!("meanwhile {holder}").into());
        }
    }
}

/// How many of a driver's references those explain that were seen, of which each holds so many.
fn explained(kernel: &dyn Kernel, driver: &str, found: &Found, of_each: u64) -> u64 {
    let nodes = if driver == "nvidia" { Vec::new() } else { nodes_of(kernel, driver) };
    // Devices with many minors may hold two references for each open file.
    let families: Vec<u64> = ["nvidia-nvlink", "nvidia-nvswitch", "nvidia-caps", "nvidia-caps-imex-channels"]
        .iter()
        .filter_map(|name| nvidia::major(kernel, name))
        .collect();
    let weight = |number: &DeviceNumber| match driver {
        "nvidia" if number.major == NVIDIA_MAJOR => of_each * u64::from(number.minor != MODESET_MINOR),
        "nvidia" if families.contains(&number.major) => 2,
        // A buffer of the driver's.
        "nvidia" => u64::from(number.major == 0),
        _ => u64::from(nodes.contains(number)),
    };
    let open: u64 = found.files.iter().map(|(number, count)| count * weight(number)).sum();
    let mapped: u64 = found.mapped.iter().map(weight).sum();
    open + mapped
}

/// The nodes of every function that a driver has.
fn nodes_of(kernel: &dyn Kernel, driver: &str) -> Vec<DeviceNumber> {
    let functions = inventory::functions_of_driver(kernel, driver);
    let functions = functions.into_iter().filter_map(|address| Function::read(kernel, address));
    functions.flat_map(|function| Devices::of_function(kernel, &function).numbers()).collect()
}

fn in_words(function: &Function, driver: &str, more: Option<u64>, found: &Found) -> Trouble {
    let hidden = holders::hidden(&found.hidden);
    let address = function.address;
    match more {
        Some(more) if hidden.is_empty() => Trouble::new(
            format!(
                "{driver} has {more} open file(s) that belong to no process, such as a descriptor that was sent and not \
                 yet received, and nobody can tell whether it is {address}: taking that from the driver could hang"
            ),
            format!("end what uses {driver}"),
        ),
        _ => Trouble::new(
            format!("whether {address} is in use cannot be seen, and taking it from {driver} could hang: {hidden}"),
            "end that, or wait for it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn what_is_open_explains_the_drivers_references() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-explained-{}", std::process::id()));
        std::fs::create_dir_all(root.join("proc")).unwrap();
        std::fs::write(root.join("proc/devices"), "Character devices:\n195 nvidia\n234 nvidia-caps\n").unwrap();
        let kernel = Linux::at(root.clone());
        let number = |major, minor| DeviceNumber { major, minor };
        let of = |driver, files: &[(u64, u64, u64)], mapped: &[(u64, u64)], of_each| {
            let files = files.iter().map(|(major, minor, count)| (number(*major, *minor), *count)).collect();
            let mapped = mapped.iter().map(|(major, minor)| number(*major, *minor)).collect();
            explained(&kernel, driver, &Found { files, mapped, ..Found::default() }, of_each)
        };
        let found = [
            of("nvidia", &[(195, 0, 3)], &[], 1),
            of("nvidia", &[(195, 0, 3)], &[], 5),
            // Of nvidia-modeset, which is another module.
            of("nvidia", &[(195, 254, 3)], &[], 5),
            of("nvidia", &[(234, 1, 3)], &[], 5),
            of("nvidia", &[(0, 0, 3)], &[], 5),
            of("nvidia", &[(226, 0, 3)], &[], 5),
            of("nvidia", &[(195, 0, 2)], &[(195, 255), (226, 0)], 3),
            of("snd_hda_intel", &[(195, 0, 3)], &[(195, 0)], 1),
        ];
        std::fs::remove_dir_all(root).unwrap();
        assert_eq!(found, [3, 15, 0, 6, 3, 0, 9, 0]);
    }
}
