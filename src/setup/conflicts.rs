//! What others wrote that would keep the GPU from changing hands. Told, never edited.

use crate::gpu::static_ids;
use crate::sys::Kernel;

const NVIDIA: u16 = 0x10de;
const DIRECTORY: &str = "/etc/modprobe.d";

/// Proxmox's own blacklist of nvidiafb.
const PVE_BLACKLIST: &str = "pve-blacklist.conf";

/// A line each.
pub fn find(kernel: &dyn Kernel) -> Vec<String> {
    let mut found = Vec::new();
    if static_ids::read(kernel).iter().any(|(vendor, _)| *vendor == NVIDIA) {
        found.push(
            "vfio-pci takes NVIDIA devices at boot (ids= on the kernel's command line or in modprobe.d), so the host never \
             has them; take that out"
                .to_string(),
        );
    }
    for directory in static_ids::MODPROBE_DIRECTORIES {
        for name in kernel.list(directory).iter().filter(|name| name.ends_with(".conf")) {
            let path = format!("{directory}/{name}");
            if let Some(line) = blocks_nvidia(&kernel.text(&path).unwrap_or_default()) {
                found.push(format!("{path} keeps the NVIDIA driver from being loaded at boot ({line}); take that out"));
            }
        }
    }
    let renamed = |name: &&String| name.starts_with("pve-blacklist") && *name != PVE_BLACKLIST;
    if let Some(name) = kernel.list(DIRECTORY).iter().find(renamed) {
        found.push(format!(
            "{DIRECTORY}/{name} was Proxmox's {PVE_BLACKLIST}, which belongs to pve-manager: give it its name again"
        ));
    }
    found
}

/// `blacklist nvidia`, or an install rule that does nothing.
fn blocks_nvidia(text: &str) -> Option<String> {
    text.lines().map(str::trim).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let blocks = match words.as_slice() {
            ["blacklist", module] => *module == "nvidia",
            ["install", "nvidia", program, ..] => matches!(program.rsplit('/').next(), Some("false" | "true")),
            _ => false,
        };
        blocks.then(|| words.join(" "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_the_driver_away() {
        for line in ["blacklist nvidia", "  blacklist\tnvidia ", "install nvidia /bin/false"] {
            assert!(blocks_nvidia(&format!("# x\n{line}\n")).is_some(), "{line}");
        }
        for line in [
            "# blacklist nvidia",
            "blacklist nvidiafb",
            "install nvidia /sbin/modprobe -i nvidia",
            "options nvidia a=1",
        ] {
            assert_eq!(blocks_nvidia(line), None, "{line}");
        }
    }
}
