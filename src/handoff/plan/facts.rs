//! What a handoff must know before it decides, read once under the lock.

use crate::address::{Address, SlotId};
use crate::gpu::console::Console;
use crate::gpu::inventory::{self, Function, READ_LIMIT, Slot, VFIO_PCI};
use crate::gpu::{nvidia, static_ids};
use crate::sorted;
use crate::sys::{ActError, Kernel};
use std::collections::BTreeMap;

/// GPU drivers whose modules are unloaded when nothing else needs them.
const UNLOADABLE: [&str; 2] = ["nvidia", "nouveau"];

#[derive(Debug, Clone)]
pub struct Facts {
    pub slots: Vec<Slot>,
    pub vfio_pci: Availability,
    /// Endpoints in the slots' IOMMU groups that are not in the slots.
    pub strangers: Vec<Function>,
    /// By GPU driver that one of the slots has now or had at home.
    pub gpu_drivers: BTreeMap<String, GpuDriver>,
    /// Modules named here are loaded.
    pub loaded: Vec<String>,
    /// Registered PCI drivers that somebody asked about.
    pub registered: Vec<String>,
    /// The administrator's own ids of vfio-pci.
    pub static_ids: Vec<(u16, u16)>,
    /// nvidia_drm is loaded and keeps every GPU of the driver in use (modeset=1 with some driver versions).
    pub drm_holds_gpus: bool,
    pub console: Console,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    Registered,
    Loadable,
    Missing,
}

/// The modules of a GPU's driver and who else needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuDriver {
    /// The driver's module and its holders, holders first; a holder that is not known is the error.
    pub unload_order: Result<Vec<String>, String>,
    /// Other slots with functions that have this driver, or with NVIDIA GPUs without any driver: loading the driver again
    /// would take them.
    pub elsewhere: Vec<SlotId>,
}

impl Facts {
    /// `homes` are drivers, and `modules` their modules, that a record wants back.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when something else is stuck in the kernel with one of the slots.
    pub fn read(
        kernel: &dyn Kernel,
        mut slots: Vec<Slot>,
        homes: &[&str],
        modules: &[&str],
    ) -> Result<Facts, ActError> {
        for slot in &mut slots {
            slot.read_slow_attributes(kernel)?;
        }
        let strangers = strangers(kernel, &slots);
        let functions = || slots.iter().flat_map(|slot| &slot.functions);
        let is_ours = |address: Address| functions().any(|f| f.address == address);
        let mut gpu_drivers = BTreeMap::new();
        for gpu in functions().filter(|f| f.is_nvidia_gpu()) {
            let (Some(driver), Some(module)) = (&gpu.driver, &gpu.module) else { continue };
            if UNLOADABLE.contains(&driver.as_str()) {
                let of_driver = inventory::functions_of_driver(kernel, driver).into_iter();
                let others = of_driver.chain(inventory::unbound_gpus(kernel)).filter(|address| !is_ours(*address));
                let elsewhere = others.map(|address| address.slot).collect();
                let unload_order = nvidia::unload_order(kernel, module);
                gpu_drivers.insert(driver.clone(), GpuDriver { unload_order, elsewhere });
            }
        }
        let addresses: Vec<Address> = functions().map(|f| f.address).collect();
        let console = Console::read(kernel, &addresses, READ_LIMIT);
        let is_loaded = |module: &str| kernel.exists(&format!("/sys/module/{module}"));
        Ok(Facts {
            vfio_pci: vfio_pci(kernel),
            strangers,
            gpu_drivers,
            loaded: modules.iter().filter(|m| is_loaded(m)).map(|m| (*m).to_string()).collect(),
            registered: homes
                .iter()
                .filter(|driver| inventory::driver_exists(kernel, driver))
                .map(|driver| (*driver).to_string())
                .collect(),
            static_ids: static_ids::read(kernel),
            drm_holds_gpus: is_loaded("nvidia_drm")
                && nvidia::modeset_enabled(kernel)
                && nvidia::version(kernel).is_none_or(nvidia::Version::drm_looks_once),
            console,
            slots,
        })
    }

    /// A call that is stuck in a wedged slot holds its driver, although sysfs no longer shows the two together.
    #[must_use]
    pub fn avoiding(mut self, wedged: &[SlotId]) -> Facts {
        for driver in self.gpu_drivers.values_mut() {
            driver.elsewhere.extend(wedged);
        }
        self
    }

    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.slots.iter().flat_map(|slot| &slot.functions)
    }
}

/// Who shares an IOMMU group with these slots.
pub fn strangers(kernel: &dyn Kernel, slots: &[Slot]) -> Vec<Function> {
    let functions = || slots.iter().flat_map(|slot| &slot.functions);
    let is_ours = |address: Address| functions().any(|f| f.address == address);
    let mut groups: Vec<u32> = functions().filter_map(|f| f.iommu_group).collect();
    sorted::sort(&mut groups);
    groups.dedup();
    let members = groups.into_iter().flat_map(|group| inventory::group_members(kernel, group));
    members.filter(|f| !is_ours(f.address) && !f.is_harmless_bridge()).collect()
}

/// Whether this kernel has vfio-pci.
pub fn vfio_pci(kernel: &dyn Kernel) -> Availability {
    if inventory::driver_exists(kernel, VFIO_PCI) {
        return Availability::Registered;
    }
    // The lists that modprobe itself goes by.
    let release = kernel.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let names_it = |list: &str| {
        kernel
            .text(&format!("/lib/modules/{release}/{list}"))
            .is_some_and(|text| text.lines().any(|line| line.split(':').next().is_some_and(is_vfio_pci_file)))
    };
    if names_it("modules.dep") || names_it("modules.builtin") { Availability::Loadable } else { Availability::Missing }
}

/// `kernel/drivers/vfio/pci/vfio-pci.ko.xz`
fn is_vfio_pci_file(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|name| name.split('.').next() == Some(VFIO_PCI))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;
    use std::fs;

    #[test]
    fn nvidia_drm_holds_the_cards_when_it_is_loaded_sets_modes_and_looks_once() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-facts-{}", std::process::id()));
        let holds = |is_loaded: bool, modeset: &str, version: &str| {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(root.join("proc/driver/nvidia")).unwrap();
            fs::write(root.join("proc/driver/nvidia/version"), format!("NVRM version: x  {version}  y\n")).unwrap();
            if is_loaded {
                fs::create_dir_all(root.join("sys/module/nvidia_drm/parameters")).unwrap();
                fs::write(root.join("sys/module/nvidia_drm/parameters/modeset"), modeset).unwrap();
            }
            Facts::read(&Linux::at(root.clone()), Vec::new(), &[], &[]).unwrap().drm_holds_gpus
        };
        let old = "550.163.01";
        let found = [
            holds(true, "Y\n", old),
            holds(true, "N\n", old),
            holds(true, "Y\n", "595.45.04"),
            holds(false, "", old),
            holds(true, "1\n", "?"),
        ];
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [true, false, false, false, true]);
    }
}
