//! What can say no before anything is touched. Pure: each refusal has the device and the remedy.

use crate::gpu::Function;
use crate::gpu::inventory::VFIO_PCI;
use crate::handoff::plan::facts::{Availability, Facts};
use crate::proxmox::pci_id::PciId;
use crate::trouble::{About, Trouble};

/// `listed` is what the VM's own configuration names.
///
/// # Errors
/// The first reason to refuse.
pub fn check(facts: &Facts, listed: &[PciId]) -> Result<(), Trouble> {
    if let Some(gone) = gone(facts) {
        return Err(gone);
    }
    if let Some(why) = facts.functions().find_map(of_function) {
        return Err(why);
    }
    if facts.vfio_pci == Availability::Missing {
        return Err(no_vfio_pci());
    }
    facts.strangers.iter().find_map(|stranger| of_stranger(stranger, listed)).map_or(Ok(()), Err)
}

pub fn no_vfio_pci() -> Trouble {
    Trouble::new(
        "vfio-pci is neither loaded nor among the running kernel's modules",
        "reboot into the installed kernel, or: apt install --reinstall proxmox-kernel-$(uname -r)",
    )
    .about(About::VfioPci)
}

/// Why no VM may have this function.
pub fn of_function(function: &Function) -> Option<Trouble> {
    let address = function.address;
    let trouble = |what: String, remedy: String| Some(Trouble::new(what, remedy).about(About::Function(address)));
    if function.iommu_group.is_none() {
        return trouble(
            format!("{address} is in no IOMMU group: the IOMMU is off"),
            "turn on VT-d or AMD-Vi in the firmware and, on Intel, boot with intel_iommu=on".to_string(),
        );
    }
    if function.virtual_functions > 0 {
        return trouble(
            format!("{address} has {} SR-IOV virtual functions, which would vanish", function.virtual_functions),
            format!("remove them first: echo 0 > /sys/bus/pci/devices/{address}/sriov_numvfs"),
        );
    }
    if function.has_mdevs {
        return trouble(
            format!("{address} has mediated devices (vGPU), which would vanish"),
            format!("stop what uses them, then for each: echo 1 > /sys/class/mdev_bus/{address}/UUID/remove"),
        );
    }
    None
}

/// Why a function that shares the IOMMU group keeps it from a VM; `listed` as for [`check`].
pub fn of_stranger(stranger: &Function, listed: &[PciId]) -> Option<Trouble> {
    let driver = stranger.driver.as_deref().filter(|driver| !matches!(*driver, VFIO_PCI | "pci-stub"))?;
    let is_listed = listed.iter().any(|id| id.covers(stranger.address));
    (!is_listed).then(|| {
        let group = stranger.iommu_group.map_or_else(|| "?".to_string(), |group| group.to_string());
        Trouble::new(
            format!(
                "{} is in the same IOMMU group ({group}) and {driver} has it: a group goes to a VM as a whole",
                stranger.address
            ),
            "move one of the two to another slot, or look in the firmware for ACS, which makes groups smaller",
        )
        .about(About::Neighbour(stranger.address))
    })
}

/// A device that has fallen off the bus, and what may bring it back.
pub fn gone(facts: &Facts) -> Option<Trouble> {
    facts.functions().find_map(gone_function)
}

/// As [`gone`], of one function.
pub fn gone_function(function: &Function) -> Option<Trouble> {
    let address = function.address;
    function.is_gone.then(|| {
        Trouble::new(
            format!("{address} does not answer, it has fallen off the bus (its configuration space reads ff)"),
            format!(
                "power the host off and on again; or, once nothing uses the card: echo 1 | tee \
                 /sys/bus/pci/devices/{}.*/remove, then: echo 1 > /sys/bus/pci/rescan, and if it reads ff still, only a \
                 power cycle helps",
                address.slot
            ),
        )
        .about(About::Function(address))
    })
}
