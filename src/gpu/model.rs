//! What a card is called: as its driver has it, else as the list of PCI ids has it that pciutils brings along.

use super::inventory::Function;
use super::nvidia::{self, GPUS};
use crate::address::Address;
use crate::story::printable;
use crate::sys::Kernel;

const PCI_IDS: &str = "/usr/share/misc/pci.ids";

/// `NVIDIA GeForce RTX 4090`, of a card that NVIDIA's driver has. It may be busy with another card and not answer.
pub fn by_driver(kernel: &dyn Kernel, address: Address) -> Option<String> {
    let path = format!("{GPUS}/{address}/information");
    if !kernel.exists(&path) {
        return None;
    }
    let text = nvidia::information(kernel, address).ok()?;
    let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim();
    // Before it has looked at the card it says that.
    (!model.is_empty() && model != "Unknown").then(|| printable(model))
}

/// As [`by_driver`], of a function that is a GPU's.
pub fn of(kernel: &dyn Kernel, function: &Function) -> Option<String> {
    if function.is_nvidia_gpu() { by_driver(kernel, function.address) } else { None }
}

pub fn by_ids(kernel: &dyn Kernel, gpu: &Function) -> Option<String> {
    named(&String::from_utf8_lossy(&kernel.read(PCI_IDS).ok()?), gpu.vendor, gpu.device)
}

/// Of `AD102 [GeForce RTX 4090]` the name that the card is sold under.
fn named(list: &str, vendor: u16, device: u16) -> Option<String> {
    let (_, devices) = list.split_once(&format!("\n{vendor:04x}  "))?;
    let mut lines = devices.lines().skip(1).take_while(|line| line.starts_with(['\t', '#']) || line.is_empty());
    let name = lines.find_map(|line| line.strip_prefix(&format!("\t{device:04x}  ")))?.trim();
    let sold = name.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']')).unwrap_or(name);
    Some(printable(&format!("NVIDIA {sold}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# a list\n10dd  Another\n\t2684  Nothing\n10de  NVIDIA Corporation\n\t2204  GA102 [GeForce RTX \
                        3090]\n\t\t10de 2684  a subsystem\n# between\n\t2684  AD102 [GeForce RTX 4090]\n\t2bb1  GB202GL\n\
                        10df  Emulex\n\t2330  No GPU\n";

    #[test]
    fn a_name_by_ids() {
        let name = |device| named(LIST, 0x10de, device);
        assert_eq!(name(0x2684).as_deref(), Some("NVIDIA GeForce RTX 4090"));
        assert_eq!(name(0x2204).as_deref(), Some("NVIDIA GeForce RTX 3090"));
        assert_eq!(name(0x2bb1).as_deref(), Some("NVIDIA GB202GL"));
        assert_eq!((name(0x2330), name(0x10de)), (None, None), "another vendor's, and none");
        assert_eq!(named(LIST, 0x1002, 0x2684), None);
    }
}
