//! Cluster-wide PCI resource mappings (`/etc/pve/mapping/pci.cfg`), read as `PVE::Mapping::PCI` and
//! `PVE::SectionConfig::parse_config` read them.

use super::cluster;
use super::pci_id::{PciId, is_hex, slot_len};
use super::perl;
use super::property::{self, Key, Shape, is_config_id};
use crate::address::SlotId;
use crate::sys::Kernel;
use std::collections::BTreeMap;

pub const PATH: &str = "/etc/pve/mapping/pci.cfg";

/// Mapping name, then node name, then that node's entries in file order: alternatives, of which
/// Proxmox takes the first free one when a VM starts.
pub type Mappings = BTreeMap<String, BTreeMap<String, Vec<Entry>>>;

/// One device, or several together, that a mapping stands for on one node.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Address as written, or several with `;` between them. Not necessarily one that can exist.
    pub path: String,
    /// Vendor and device id that the device must have.
    pub id: String,
    /// The same of the board that the chip is on.
    pub subsystem_id: Option<String>,
    pub iommugroup: Option<i64>,
    /// Whether the mapping (not only this entry) is for mediated devices.
    pub mdev: bool,
}

const MAP: &[Key] = &[
    Key::new("node", Shape::Text(is_node_name)).required(),
    Key::new("id", Shape::Text(is_device_id)).required(),
    Key::new("path", Shape::Text(is_path)).required(),
    Key::new("subsystem-id", Shape::Text(is_device_id)),
    Key::new("iommugroup", Shape::Integer { minimum: i64::MIN }),
    Key::new("description", Shape::Text(|value| value.len() <= 4096)),
];

/// What a mapping may stand for on this node, in the file's order.
pub fn alternatives(kernel: &dyn Kernel, name: &str) -> Vec<Entry> {
    let mut mappings = kernel.read(PATH).map(|bytes| parse(&bytes)).unwrap_or_default();
    mappings.get_mut(name).and_then(|nodes| nodes.remove(&cluster::this_node(kernel))).unwrap_or_default()
}

/// The addresses that a mapping may stand for on this node.
pub fn on_this_node(kernel: &dyn Kernel, name: &str) -> Vec<PciId> {
    alternatives(kernel, name).iter().flat_map(Entry::ids).collect()
}

/// The mappings that may stand for something in this slot, on this node.
pub fn names_of(kernel: &dyn Kernel, slot: SlotId) -> Vec<String> {
    let mappings = kernel.read(PATH).map(|bytes| parse(&bytes)).unwrap_or_default();
    let node = cluster::this_node(kernel);
    let is_it = |entry: &Entry| entry.ids().any(|id| id.slot() == Some(slot));
    let names = mappings.into_iter().filter(|(_, nodes)| nodes.get(&node).is_some_and(|all| all.iter().any(is_it)));
    names.map(|(name, _)| name).collect()
}

impl Entry {
    /// What cannot be an address is none.
    pub fn ids(&self) -> impl Iterator<Item = PciId> {
        self.path.split(';').filter_map(PciId::parse)
    }
}

/// The first line of a mapping for this node that cannot be read, with its number.
pub fn not_understood(kernel: &dyn Kernel, name: &str) -> Option<(usize, String)> {
    let bytes = kernel.read(PATH).ok()?;
    let own = format!("node={}", cluster::this_node(kernel));
    let mut is_in_it = false;
    for (number, line) in perl::lines(&bytes) {
        if ends_section(line) {
            is_in_it = false;
        } else if let Some(header) = header(line) {
            is_in_it = header == name.as_bytes();
        }
        let Some((b"map", Some(value))) = property(line).filter(|_| is_in_it) else { continue };
        if entry(value).is_none() && perl::text(value).split(',').any(|word| word == own) {
            return Some((number, perl::text(value)));
        }
    }
    None
}

/// Reads what is written; what Proxmox would warn about and drop is dropped.
pub fn parse(bytes: &[u8]) -> Mappings {
    let mut mappings = Mappings::new();
    let mut lines = perl::lines(bytes).map(|(_, line)| line).filter(|line| !perl::trim_start(line).starts_with(b"#"));

    while let Some(line) = lines.next() {
        let Some(name) = header(line) else { continue };
        let section = lines.by_ref().take_while(|line| !ends_section(line));
        if !is_config_id(name) {
            section.for_each(drop);
            continue;
        }
        let nodes = nodes(section);
        // A later section replaces an earlier one, even with nothing.
        if nodes.is_empty() {
            mappings.remove(&perl::text(name));
        } else {
            mappings.insert(perl::text(name), nodes);
        }
    }
    mappings
}

/// Reads the properties of one mapping.
fn nodes<'a>(lines: impl Iterator<Item = &'a [u8]>) -> BTreeMap<String, Vec<Entry>> {
    let mut nodes = BTreeMap::<String, Vec<Entry>>::new();
    let mut mdev = None;
    for (key, value) in lines.filter_map(property) {
        match (key, value) {
            (b"map", Some(value)) => {
                if let Some((node, entry)) = entry(value) {
                    nodes.entry(node).or_default().push(entry);
                }
            }
            // Unlike most flags this one knows no words. The first that can be read counts.
            (b"mdev", None | Some(b"1")) => mdev = mdev.or(Some(true)),
            (b"mdev", Some(b"0")) => mdev = mdev.or(Some(false)),
            _ => {}
        }
    }
    for entry in nodes.values_mut().flatten() {
        entry.mdev = mdev.unwrap_or(false);
    }
    nodes
}

fn entry(value: &[u8]) -> Option<(String, Entry)> {
    if value.contains(&b'\r') {
        return None;
    }
    let map = property::parse(MAP, value).ok()?;
    let entry = Entry {
        path: map.text("path")?,
        id: map.text("id")?,
        subsystem_id: map.text("subsystem-id"),
        iommugroup: map.integer("iommugroup"),
        mdev: false,
    };
    Some((map.text("node")?, entry))
}

/// A line that Perl takes for false. One of blanks is true, so that with CRLF line ends the file is
/// one section.
fn ends_section(line: &[u8]) -> bool {
    matches!(line, b"" | b"0")
}

/// A section begins with one word at the start of a line: no type before it, unlike in other files
/// of Proxmox.
fn header(line: &[u8]) -> Option<&[u8]> {
    let name = perl::trim_end(line);
    (!ends_section(line) && !name.is_empty() && !name.iter().any(perl::is_space)).then_some(name)
}

/// An indented key and, unless it is a flag, its value.
fn property(line: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    if !line.first().is_some_and(perl::is_space) {
        return None;
    }
    let text = perl::trim(line);
    match text.iter().position(perl::is_space) {
        None if text.is_empty() => None,
        None => Some((text, None)),
        Some(end) => text.split_at_checked(end).map(|(key, value)| (key, Some(perl::trim_start(value)))),
    }
}

/// `PVE::JSONSchema::pve_verify_node_name`.
fn is_node_name(name: &[u8]) -> bool {
    let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends_well(name.first())
        && ends_well(name.last())
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

fn is_device_id(id: &[u8]) -> bool {
    matches!(id, [vendor @ .., b':', _, _, _, _] if vendor.len() == 4)
        && id.iter().filter(|byte| byte.is_ascii_hexdigit()).count() == 8
}

/// Addresses with `;` between them. Proxmox's pattern (`$PCI_RE` in `PVE::Mapping::PCI`) needs the
/// domain and, its dot being unescaped, takes any character before the function, even a `;`.
fn is_path(path: &[u8]) -> bool {
    let mut rest = path;
    loop {
        match slot_len(rest) {
            Some(len) if len > b"01:00".len() => rest = rest.get(len..).unwrap_or_default(),
            _ => return false,
        }
        // Never ambiguous: after a `;` that ends an address come four digits, not one.
        rest = match rest {
            [] => return true,
            [_, function] if is_hex(function) => return true,
            [_, function, b';', next @ ..] if is_hex(function) => next,
            [b';', next @ ..] => next,
            _ => return false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxmox::noise;

    #[test]
    fn a_section_goes_on_over_blanks_but_not_over_a_zero() {
        let map = "\tmap id=10de:2684,node=n,path=0000:01:00\n";
        let text = format!("aa\n{map} \n\r\nbb\n{map}\n0\ncc\n{map}0\n{map}");
        let mappings = parse(text.as_bytes());
        assert_eq!(mappings.keys().collect::<Vec<_>>(), ["aa", "cc"]);
        assert_eq!(mappings["aa"]["n"].len(), 2);
        assert_eq!(mappings["cc"]["n"].len(), 1);
    }

    #[test]
    fn a_later_section_replaces_an_earlier_one_even_if_it_is_useless() {
        let text = "aa\n\tmap id=10de:2684,node=n,path=0000:01:00\n\naa\n\tmdev 1\n";
        assert!(parse(text.as_bytes()).is_empty());
    }

    #[test]
    fn paths() {
        for good in [
            "0000:01:00",
            "0000:01:00.0;10000:01:00",
            "0000:01:00;a",
            "0000:01:00;a;0000:01:00",
            "0000:01:00;0000:01:00:f",
        ] {
            assert!(is_path(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            "01:00.0",
            "0000:01:00;",
            "0000:01:00.",
            "0000:01:00.A",
            "0000:01:00;aa",
            "0000:01:00é1",
            "0000:01:00;01:00",
        ] {
            assert!(!is_path(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn survives_any_bytes() {
        let seed = b"gpu-a\n\tmap id=10de:2684,iommugroup=14,node=pve1,path=0000:01:00.0\n\tmdev 1\n\ngpu-b\n";
        noise::mutations(seed, |bytes| {
            for (name, nodes) in parse(bytes) {
                assert!(is_config_id(name.as_bytes()));
                assert!(!nodes.is_empty() && nodes.values().all(|entries| !entries.is_empty()));
            }
        });
    }
}
