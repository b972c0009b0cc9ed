//! Ids that the administrator gave vfio-pci for good: `ids=` on the kernel command line or in modprobe.d.
//!
//! The kernel registers them exactly like the ones written to `new_id`, so `remove_id` would take them too, and
//! `/sys/module/vfio_pci` does not show them.

use crate::modprobe::DIRECTORIES;
use crate::sys::Kernel;

/// Every id that the administrator gave vfio-pci.
pub fn read(kernel: &dyn Kernel) -> Vec<(u16, u16)> {
    let mut ids = on_command_line(&kernel.text("/proc/cmdline").unwrap_or_default());
    for directory in DIRECTORIES {
        for name in kernel.list(directory).iter().filter(|name| name.ends_with(".conf")) {
            ids.extend(in_modprobe_file(&kernel.text(&format!("{directory}/{name}")).unwrap_or_default()));
        }
    }
    ids
}

fn on_command_line(text: &str) -> Vec<(u16, u16)> {
    text.split_whitespace()
        .filter_map(|word| {
            let word = word.trim_matches('"');
            word.strip_prefix("vfio-pci.ids=").or_else(|| word.strip_prefix("vfio_pci.ids="))
        })
        .flat_map(parse_list)
        .collect()
}

/// `options vfio-pci ids=10de:2684,10de:22ba disable_vga=1`; a backslash continues a line.
fn in_modprobe_file(text: &str) -> Vec<(u16, u16)> {
    let text = text.replace("\\\n", " ");
    let mut ids = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("options") && matches!(words.next(), Some("vfio-pci" | "vfio_pci")) {
            ids.extend(words.filter_map(|w| w.trim_matches('"').strip_prefix("ids=")).flat_map(parse_list));
        }
    }
    ids
}

/// `vendor:device[:subvendor[:subdevice[:class[:mask]]]]`, several after commas (vfio_pci_fill_ids in the kernel).
fn parse_list(list: &str) -> Vec<(u16, u16)> {
    let id = |entry: &str| {
        let mut parts = entry.trim_matches('"').split(':').map(|p| u16::from_str_radix(p.trim_start_matches("0x"), 16));
        Some((parts.next()?.ok()?, parts.next()?.ok()?))
    };
    list.split(',').filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_places_and_both_spellings() {
        let cmdline = "root=/dev/sda quiet vfio-pci.ids=10de:2684,10de:22ba:1043:88e2 vfio_pci.ids=8086:1572";
        assert_eq!(on_command_line(cmdline), [(0x10de, 0x2684), (0x10de, 0x22ba), (0x8086, 0x1572)]);
        let file = "# options vfio-pci ids=1:1\noptions vfio-pci disable_vga=1 \\\n  ids=10de:2684\noptions vfio_pci ids=10DE:22BA,nonsense\noptions nvidia ids=1:2\n";
        assert_eq!(in_modprobe_file(file), [(0x10de, 0x2684), (0x10de, 0x22ba)]);
    }
}
