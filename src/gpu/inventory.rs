//! PCI functions, slots and IOMMU groups, read from `/sys/bus/pci` each time: the kernel is the truth.

use super::power::{self, Power};
use crate::address::{Address, DEVICES, SlotId};
use crate::sys::{ActError, Kernel};
use std::time::Duration;

const NVIDIA: u16 = 0x10de;

/// What never takes long, unless the device's lock is held by something stuck.
pub const READ_LIMIT: Duration = Duration::from_secs(2);

/// A GPU that wakes from D3cold is started anew by its driver.
const WAKE_LIMIT: Duration = Duration::from_secs(10);

/// The driver that gives a function to a VM.
pub const VFIO_PCI: &str = "vfio-pci";

/// One PCI function, as `/sys/bus/pci/devices/0000:01:00.0` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    pub address: Address,
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass and programming interface: `0x030000` is a VGA controller.
    pub class: u32,
    pub driver: Option<String>,
    /// The module that the driver is in; none when it is built into the kernel.
    pub module: Option<String>,
    /// None until [`Slot::read_slow_attributes`]: reading it can take long.
    pub driver_override: Option<String>,
    pub iommu_group: Option<u32>,
    /// An SR-IOV virtual function (it has a `physfn`).
    pub is_virtual: bool,
    /// How many SR-IOV virtual functions this physical function has now.
    pub virtual_functions: usize,
    /// Mediated devices (vGPU) exist on it.
    pub has_mdevs: bool,
    /// Its configuration space reads ones, as that of a device which is not there: it has fallen off the bus. Known
    /// after [`Slot::read_slow_attributes`].
    pub is_gone: bool,
    /// Known after [`Slot::read_slow_attributes`].
    pub power: Power,
}

impl Function {
    /// None when there is no such device. Reads nothing that could wait for a call that hangs.
    pub fn read(kernel: &dyn Kernel, address: Address) -> Option<Function> {
        let attribute = |name: &str| address.attribute(name);
        let hexadecimal = |name: &str| parse_hex(&kernel.text(&attribute(name))?);
        let driver = kernel.link_name(&attribute("driver")).ok();
        Some(Function {
            address,
            vendor: hexadecimal("vendor")? as u16,
            device: hexadecimal("device")? as u16,
            class: hexadecimal("class")?,
            module: driver.as_ref().and_then(|_| kernel.link_name(&attribute("driver/module")).ok()),
            driver,
            driver_override: None,
            iommu_group: kernel.link_name(&attribute("iommu_group")).ok().and_then(|n| n.parse().ok()),
            is_virtual: kernel.exists(&attribute("physfn")),
            virtual_functions: virtual_functions(kernel, address),
            has_mdevs: mediated_devices(kernel, address),
            is_gone: false,
            power: Power::default(),
        })
    }

    /// What kind of device it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self.class >> 8 {
            0x0300 => "display",
            0x0302 => "3D",
            0x0403 => "audio",
            0x0c03 => "USB",
            0x0c80 => "UCSI",
            _ if self.is_nvswitch() => "NVSwitch",
            _ => "other",
        }
    }

    /// A display controller, or a data-centre card's 3D controller, made by NVIDIA.
    pub fn is_nvidia_gpu(&self) -> bool {
        self.vendor == NVIDIA && matches!(self.class >> 8, 0x0300 | 0x0302)
    }

    /// What connects the GPUs of a larger machine; a VM that takes them takes these as well.
    pub fn is_nvswitch(&self) -> bool {
        self.vendor == NVIDIA && self.class >> 8 == 0x0680
    }

    /// Bridges stay with the host whatever group they are in, unless their driver has them do DMA for the host: then the
    /// kernel gives the group to nobody. Drivers that say that they do not are those with `driver_managed_dma`.
    pub fn is_harmless_bridge(&self) -> bool {
        let excused = ["pcieport", "pci-stub", "pciback", VFIO_PCI];
        let is_excused = self.driver.as_deref().is_none_or(|driver| excused.contains(&driver));
        self.class >> 16 == 0x06 && is_excused && !self.is_nvswitch()
    }

    pub fn is_on(&self, driver: &str) -> bool {
        self.driver.as_deref() == Some(driver)
    }
}

/// All functions of one card: `0000:01:00`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub id: SlotId,
    pub functions: Vec<Function>,
}

impl Slot {
    /// None when there is no function in that slot.
    pub fn read(kernel: &dyn Kernel, id: SlotId) -> Option<Slot> {
        let own = devices(kernel).filter(|address| address.slot == id);
        let functions: Vec<Function> = own.filter_map(|address| Function::read(kernel, address)).collect();
        (!functions.is_empty()).then_some(Slot { id, functions })
    }

    /// Reading some of these takes the device's lock on most kernels: next to a hung unbind it does not come back.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when it did not.
    pub fn read_slow_attributes(&mut self, kernel: &dyn Kernel) -> Result<(), ActError> {
        self.read_attributes(kernel, true)
    }

    /// As [`Slot::read_slow_attributes`], but what sleeps is not woken for it: whether it is gone is not asked then.
    ///
    /// # Errors
    /// As [`Slot::read_slow_attributes`].
    pub fn read_slow_attributes_asleep(&mut self, kernel: &dyn Kernel) -> Result<(), ActError> {
        self.read_attributes(kernel, false)
    }

    fn read_attributes(&mut self, kernel: &dyn Kernel, may_wake: bool) -> Result<(), ActError> {
        for function in &mut self.functions {
            let address = function.address;
            function.driver_override = read_override(kernel, address, READ_LIMIT)?;
            if kernel.exists(&address.attribute("sriov_numvfs")) {
                let number = read_slowly(kernel, address, "sriov_numvfs", READ_LIMIT)?;
                let number = number.and_then(|text| text.parse().ok()).unwrap_or(0);
                function.virtual_functions = function.virtual_functions.max(number);
            }
            function.power = Power::read(kernel, address);
            // That of a virtual function reads ones by its specification.
            let may_ask = may_wake || !power::sleeps(kernel, address);
            function.is_gone = may_ask && !function.is_virtual && is_gone(kernel, address)?;
        }
        Ok(())
    }

    pub fn is_nvidia_gpu(&self) -> bool {
        self.gpu().is_some()
    }

    pub fn is_nvswitch(&self) -> bool {
        self.functions.iter().any(Function::is_nvswitch)
    }

    /// SR-IOV virtual functions are Proxmox's business and no GPU of ours.
    pub fn gpu(&self) -> Option<&Function> {
        self.functions.iter().find(|f| f.is_nvidia_gpu() && !f.is_virtual)
    }
}

/// Every slot with an NVIDIA GPU, sorted.
pub fn nvidia_slots(kernel: &dyn Kernel) -> Vec<Slot> {
    let mut slots: Vec<Slot> = Vec::new();
    for address in devices(kernel) {
        if slots.iter().any(|slot| slot.id == address.slot) || !is_nvidia(kernel, address) {
            continue;
        }
        slots.extend(Slot::read(kernel, address.slot).filter(Slot::is_nvidia_gpu));
    }
    slots
}

/// Every function there is.
fn devices(kernel: &dyn Kernel) -> impl Iterator<Item = Address> {
    addresses(kernel, DEVICES)
}

/// Those that a directory has an entry for.
pub fn addresses(kernel: &dyn Kernel, directory: &str) -> impl Iterator<Item = Address> + use<> {
    kernel.list(directory).into_iter().filter_map(|name| name.parse().ok())
}

/// The functions that a driver has now, by address.
pub fn functions_of_driver(kernel: &dyn Kernel, driver: &str) -> Vec<Address> {
    addresses(kernel, &format!("/sys/bus/pci/drivers/{driver}")).collect()
}

/// NVIDIA GPUs that no driver has, by address.
pub fn unbound_gpus(kernel: &dyn Kernel) -> Vec<Address> {
    let gpus = nvidia_slots(kernel).into_iter().filter_map(|slot| slot.gpu().cloned());
    gpus.filter(|gpu| gpu.driver.is_none()).map(|gpu| gpu.address).collect()
}

/// Every function in an IOMMU group, itself included.
pub fn group_members(kernel: &dyn Kernel, group: u32) -> Vec<Function> {
    addresses(kernel, &format!("/sys/kernel/iommu_groups/{group}/devices"))
        .filter_map(|address| Function::read(kernel, address))
        .collect()
}

pub fn driver_exists(kernel: &dyn Kernel, driver: &str) -> bool {
    kernel.exists(&format!("/sys/bus/pci/drivers/{driver}"))
}

/// # Errors
/// [`ActError::Stuck`] when it did not come back.
pub fn read_override(kernel: &dyn Kernel, address: Address, limit: Duration) -> Result<Option<String>, ActError> {
    // One that was never set reads "(null)".
    let text = read_slowly(kernel, address, "driver_override", limit)?;
    Ok(text.filter(|text| !text.is_empty() && text != "(null)"))
}

fn read_slowly(kernel: &dyn Kernel, address: Address, name: &str, limit: Duration) -> Result<Option<String>, ActError> {
    match kernel.read_slowly(&address.attribute(name), limit) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end().to_string())),
        Err(error @ ActError::Stuck { .. }) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Vendor and device are all ones where no device answers; the files of that name say what once answered. One that sleeps
/// in D3cold is woken by this, as a handoff would do next, and does not answer either when it cannot wake up.
pub fn is_gone(kernel: &dyn Kernel, address: Address) -> Result<bool, ActError> {
    let sleeps = kernel.text(&address.attribute("power_state")).as_deref() == Some("D3cold");
    let limit = if sleeps { WAKE_LIMIT } else { READ_LIMIT };
    match kernel.read_head(&address.attribute("config"), 4, limit) {
        Ok(bytes) => Ok(bytes == [0xff; 4]),
        Err(error @ ActError::Stuck { .. }) => Err(error),
        Err(_) => Ok(false),
    }
}

/// Their links are counted, which takes no lock.
fn virtual_functions(kernel: &dyn Kernel, address: Address) -> usize {
    kernel.list(&format!("{DEVICES}/{address}")).iter().filter(|name| name.starts_with("virtfn")).count()
}

fn is_nvidia(kernel: &dyn Kernel, address: Address) -> bool {
    kernel.text(&address.attribute("vendor")).and_then(|t| parse_hex(&t)) == Some(u32::from(NVIDIA))
}

/// vGPU keeps its mediated devices in `/sys/class/mdev_bus/ADDRESS`; each is a directory named by a UUID.
fn mediated_devices(kernel: &dyn Kernel, address: Address) -> bool {
    let is_uuid = |name: &String| name.len() == 36 && name.bytes().filter(|b| *b == b'-').count() == 4;
    kernel.list(&format!("/sys/class/mdev_bus/{address}")).iter().any(is_uuid)
}

fn parse_hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}
