//! Interrupts of devices that a VM has: where the kernel sends them.

use crate::address::Address;
use crate::cpus::Cpus;
use crate::sys::Kernel;

/// One that vfio-pci handles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interrupt {
    pub number: u32,
    /// As the kernel has it: `vfio-msix[0](0000:01:00.0)`, `vfio-msi[0](…)`, `vfio-intx(…)` (`vfio_pci_intrs.c`).
    pub name: String,
    pub cpus: Cpus,
}

/// Where the kernel is told which CPUs may get it.
pub fn attribute(number: u32) -> String {
    format!("/proc/irq/{number}/smp_affinity_list")
}

/// Those of the devices that are passed. There are none before the guest's driver has asked for them.
pub fn of_vfio(kernel: &dyn Kernel, is_passed: &dyn Fn(Address) -> bool) -> Vec<Interrupt> {
    let text = kernel.text("/proc/interrupts").unwrap_or_default();
    let read = |(number, name): (u32, &str)| {
        let cpus = Cpus::of_set(&kernel.text(&attribute(number))?)?;
        Some(Interrupt { number, name: name.to_string(), cpus })
    };
    named(&text).filter(|(_, name)| address(name).is_some_and(is_passed)).filter_map(read).collect()
}

/// Whether the interrupt with this attribute is one that vfio-pci handles by that name.
pub fn has_handler(kernel: &dyn Kernel, of: &str, handler: &str) -> bool {
    let text = kernel.text("/proc/interrupts").unwrap_or_default();
    named(&text).any(|(number, name)| name == handler && attribute(number) == of)
}

/// ` 45:  0  7  IR-PCI-MSIX-0000:01:00.0  0-edge  vfio-msix[0](0000:01:00.0)`; drivers that share one stand behind each
/// other, with a comma.
fn named(text: &str) -> impl Iterator<Item = (u32, &str)> {
    text.lines().filter_map(|line| {
        let (number, _) = line.split_once(':')?;
        let (_, rest) = line.split_once(" vfio-")?;
        let name = line.get(line.len() - rest.len() - "vfio-".len()..)?;
        Some((number.trim().parse().ok()?, name.get(..=name.find(')')?)?))
    })
}

fn address(name: &str) -> Option<Address> {
    name.split_once('(')?.1.strip_suffix(')')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_interrupts_says() {
        let text = "           CPU0       CPU1
   9:          0          4  IR-IO-APIC    9-fasteoi   acpi
  16:          0          0  IR-IO-APIC   16-fasteoi   snd_hda_intel:card0, vfio-intx(0000:01:00.1), ehci
  45:          0          7  IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)
 146:          0          0  IR-PCI-MSI-10000:e1:00.0    0-edge      vfio-msi[12](10000:e1:00.0)
  47:          0          0  IR-PCI-MSIX-0000:02:00.0    0-edge      nvidia
 NMI:          0          0   Non-maskable interrupts vfio-msi[0](0000:01:00.0)";
        let found: Vec<(u32, &str, String)> =
            named(text).map(|(number, name)| (number, name, address(name).unwrap().to_string())).collect();
        let expected = [
            (16, "vfio-intx(0000:01:00.1)", "0000:01:00.1".to_string()),
            (45, "vfio-msix[0](0000:01:00.0)", "0000:01:00.0".to_string()),
            (146, "vfio-msi[12](10000:e1:00.0)", "10000:e1:00.0".to_string()),
        ];
        assert_eq!(found, expected);
        assert_eq!(address("vfio-msi[0]()"), None);
    }
}
