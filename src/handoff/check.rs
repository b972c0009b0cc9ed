//! What can say no before anything is touched. Pure: each refusal is one line with the device and the remedy.

use super::facts::{Availability, Facts};
use crate::gpu::inventory::VFIO_PCI;

/// `listed` tells whether the VM's own configuration names a function.
///
/// # Errors
/// The first reason to refuse.
pub fn check(facts: &Facts, listed: &dyn Fn(&str) -> bool) -> Result<(), String> {
    for function in facts.functions() {
        let address = &function.address;
        if function.iommu_group.is_none() {
            return Err(format!(
                "{address} is in no IOMMU group: the IOMMU is off; turn on VT-d or AMD-Vi in the firmware and, on Intel, \
                 boot with intel_iommu=on"
            ));
        }
        if function.virtual_functions > 0 {
            return Err(format!(
                "{address} has {} SR-IOV virtual functions, which would vanish; remove them first: echo 0 > \
                 /sys/bus/pci/devices/{address}/sriov_numvfs",
                function.virtual_functions
            ));
        }
        if function.has_mdevs {
            return Err(format!(
                "{address} has mediated devices (vGPU), which would vanish; stop what uses them, then for each: echo 1 > \
                 /sys/class/mdev_bus/{address}/UUID/remove"
            ));
        }
    }
    if facts.vfio_pci == Availability::Missing {
        return Err("vfio-pci is neither loaded nor among the running kernel's modules; reboot into the \
                    installed kernel, or: apt install --reinstall proxmox-kernel-$(uname -r)"
            .to_string());
    }
    for stranger in &facts.strangers {
        let Some(driver) = stranger.driver.as_deref() else { continue };
        if !matches!(driver, VFIO_PCI | "pci-stub") && !listed(&stranger.address) {
            return Err(format!(
                "{} is in the same IOMMU group ({}) and {driver} has it: a group goes to a VM as a whole; move the card \
                 to another slot, or take that device from the host: echo {} > /sys/bus/pci/drivers/{driver}/unbind",
                stranger.address,
                stranger.iommu_group.map_or_else(|| "?".to_string(), |g| g.to_string()),
                stranger.address
            ));
        }
    }
    Ok(())
}
