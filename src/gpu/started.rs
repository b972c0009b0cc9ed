//! Whether the NVIDIA driver has started a GPU. It asks for the GPU's interrupt first of all when somebody begins to use
//! it (`nv_start_device` in nv.c), by its node, through nvidiactl, nvidia-uvm or nvidia-modeset alike, and gives it back when
//! nobody does any more (`nv_shutdown_adapter`), with persistence not even then. A GPU without one is used by nobody, and
//! taking it from the driver waits for nobody (read in 515.43.04 to 595.45.04, seen on 550.163.01).

use crate::address::Address;
use crate::sys::Kernel;

/// False only when it is certain.
pub fn may_be(kernel: &dyn Kernel, address: Address) -> bool {
    let Some(text) = kernel.text("/proc/interrupts") else { return true };
    // Those of a GPU that signals by message; else the one of its line, which others may have as well.
    let mut numbers = kernel.list(&address.attribute("msi_irqs"));
    numbers.extend(kernel.text(&address.attribute("irq")));
    numbers.is_empty() || numbers.iter().any(|number| has_nvidia(&text, number))
}

/// ` 16:      0      0   IO-APIC   16-fasteoi   snd_hda_intel:card0, nvidia`
fn has_nvidia(interrupts: &str, number: &str) -> bool {
    let of_line = |line: &&str| line.trim_start().split_once(':').is_some_and(|(irq, _)| irq == number);
    let names = |line: &str| line.split([' ', ',']).any(|word| word.starts_with("nvidia"));
    interrupts.lines().find(of_line).is_some_and(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn who_has_an_interrupt_may_be_in_use() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-started-{}", std::process::id()));
        let file = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let kernel = Linux::at(root.clone());
        let devices = "sys/bus/pci/devices";
        let may_be = |kernel: &Linux, address: &str| may_be(kernel, address.parse().unwrap());
        assert!(may_be(&kernel, "0000:01:00.0"), "nothing is known of interrupts");
        file(
            "proc/interrupts",
            "           CPU0       CPU1\n  1:          9          0   IO-APIC    1-edge      i8042\n\
             \x20 16:          0          4   IO-APIC   16-fasteoi   snd_hda_intel:card0, nvidia\n\
             \x20 17:          0          4   IO-APIC   17-fasteoi   snd_hda_intel:card1\n\
             \x20142:          7          0   PCI-MSI-0000:03:00.0    0-edge      nvidia\n",
        );
        assert!(may_be(&kernel, "0000:01:00.0"), "nor of its own");
        file(&format!("{devices}/0000:01:00.0/irq"), "16\n");
        file(&format!("{devices}/0000:02:00.0/irq"), "17\n");
        file(&format!("{devices}/0000:03:00.0/irq"), "11\n");
        file(&format!("{devices}/0000:03:00.0/msi_irqs/142"), "msi\n");
        file(&format!("{devices}/0000:04:00.0/irq"), "42\n");
        assert!(may_be(&kernel, "0000:01:00.0"), "its line has one of nvidia's");
        assert!(!may_be(&kernel, "0000:02:00.0"));
        assert!(may_be(&kernel, "0000:03:00.0"), "by message");
        assert!(!may_be(&kernel, "0000:04:00.0"), "142 is another number");
        std::fs::remove_dir_all(root).unwrap();
    }
}
