//! Which devices `mapping=NAME` gives to a VM: those that Proxmox will take (PVE::QemuServer::PCI).
//!
//! Proxmox chooses after pre-start: of several alternatives the first, in the file's order, that nobody else has reserved.
//! So the same choice is made here, once every other start has come so far that Proxmox knows of it, too. Should Proxmox have
//! chosen otherwise all the same: what QEMU has in the end is looked at by the watcher.

use crate::App;
use crate::address::{Address, SlotId};
use crate::exit::{Exit, Result};
use crate::gpu::Slot;
use crate::handoff::Handoff;
use crate::handoff::kept::record::{Owner, is_with};
use crate::proxmox::mapping::{self, Entry};
use crate::proxmox::pci_id::PciId;
use crate::proxmox::vm::{self, Driver, Hostpci, VmConfig};
use crate::proxmox::{reservations, running};
use crate::sorted;
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What takes longer is told of while it lasts.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the lines of a VM name, those with a mapping resolved.
#[derive(Debug, Default)]
pub struct Named {
    /// By the number of the `hostpciN` line.
    pub ids: BTreeMap<u32, Vec<PciId>>,
    /// The mappings that give it an NVIDIA GPU, as they are told.
    pub by: Vec<String>,
}

impl Named {
    /// ` (mapping=gpu)`, to go behind the slots; nothing without a mapping.
    pub fn in_brackets(&self) -> String {
        if self.by.is_empty() { String::new() } else { format!(" ({})", self.by.join(", ")) }
    }

    /// What is refused is told with the mapping that it comes by.
    pub fn refused(&self, exit: Exit) -> Exit {
        if self.by.is_empty() {
            return exit;
        }
        exit.of(&self.by.join(", "))
    }
}

/// What of a VM's configuration keeps it from starting.
#[derive(Debug)]
pub struct Unusable {
    /// Of its `hostpci` line; none where it is in `args`.
    pub index: Option<u32>,
    pub trouble: Trouble,
}

impl From<Unusable> for Exit {
    fn from(unusable: Unusable) -> Exit {
        Exit::refused(unusable.trouble)
    }
}

type Usable<T> = std::result::Result<T, Unusable>;

/// Whose a device is that this VM cannot have.
type Taken = BTreeMap<Address, u32>;

/// What Proxmox handles by itself is not resolved: mediated devices.
///
/// # Errors
/// Why Proxmox would not start the VM.
pub fn resolve(app: &App, vmid: u32, vm: &VmConfig) -> Usable<Named> {
    let mut named = Named::default();
    let mut used: Vec<Address> = Vec::new();
    let taken = OnceCell::new();
    let has_mapping = vm.hostpci.values().any(|hostpci| hostpci.mapping.is_some());
    for (index, hostpci) in vm.hostpci.iter().filter(|(_, hostpci)| hostpci.mdev.is_none()) {
        let is_taken =
            |address| used.contains(&address) || taken.get_or_init(|| taken_from(app, vmid)).contains_key(&address);
        let (ids, by) = match &hostpci.mapping {
            Some(name) => match one(app, vmid, (*index, hostpci), name, &is_taken) {
                // Proxmox says so itself.
                Err(_) if hostpci.driver == Driver::Keep => (Vec::new(), None),
                given => given?,
            },
            None => (hostpci.addresses().collect(), None),
        };
        if has_mapping {
            used.extend(ids.iter().flat_map(|id| functions(app.kernel, id)));
        }
        named.by.extend(by);
        named.ids.insert(*index, ids);
    }
    Ok(named)
}

/// Until Proxmox knows whose every alternative is. It goes by its reservations alone: a device that another VM is on the way
/// to, and for which others may be stopped meanwhile, is free for it until that VM's own pre-start is over.
///
/// # Errors
/// When that takes longer than another start may.
pub fn wait_for_others(app: &App, vmid: u32, vm: &VmConfig) -> Result<()> {
    let kernel = app.kernel;
    let wanted = alternatives(kernel, vm);
    if wanted.is_empty() {
        return Ok(());
    }
    let time = app.config_for_hook().time;
    let limit = time.lock + time.stop + time.handoff;
    let begin = kernel.now();
    let mut told = None;
    while let Some((other, slot)) = on_its_way(app, vmid, &wanted) {
        let taken = taken_from(app, vmid);
        if wanted.iter().all(|address| taken.contains_key(address)) {
            return Ok(());
        }
        let waited = kernel.now().saturating_sub(begin);
        if waited >= limit || kernel.is_asked_to_end() {
            let what = format!(
                "VM {other} is still on its way to {slot} after {} s, so which device of its mapping VM {vmid} gets is \
                 not known",
                waited.as_secs()
            );
            let remedy = format!("then start VM {vmid} again: qm start {vmid}");
            return Err(Exit::locked(Trouble::new(what, remedy)));
        }
        if waited >= PATIENCE && told != Some(other) {
            told = Some(other);
            app.story
                .say(&format!("waits for VM {other}, which is on its way to {slot}, for up to {} s", limit.as_secs()));
        }
        kernel.sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// Whether any mapping of a VM stands for several devices, of which it gets one.
pub fn has_choice(kernel: &dyn Kernel, vm: &VmConfig) -> bool {
    !alternatives(kernel, vm).is_empty()
}

/// What the mappings of a VM stand for, where Proxmox has a choice.
fn alternatives(kernel: &dyn Kernel, vm: &VmConfig) -> Vec<Address> {
    let lines = vm.hostpci.values().filter(|line| line.mdev.is_none() && line.driver != Driver::Keep);
    let pools = lines.filter_map(|line| Some(mapping::alternatives(kernel, line.mapping.as_ref()?)));
    let entries = pools.filter(|entries| entries.len() > 1).flatten();
    entries.flat_map(|entry| entry.ids().flat_map(|id| functions(kernel, &id)).collect::<Vec<_>>()).collect()
}

/// A VM whose start has not come to Proxmox's reservations yet, and what of `wanted` it is on the way to.
fn on_its_way(app: &App, vmid: u32, wanted: &[Address]) -> Option<(u32, SlotId)> {
    let reserved = reservations::read(app.kernel);
    app.store.each_record().into_iter().flatten().find_map(|record| {
        let other = record.owner.vmid().filter(|id| *id != vmid)?;
        let is_reserved = |address| reserved.get(address) == Some(&other);
        let mut functions = record.functions.iter().filter(|function| wanted.contains(&function.address));
        let on_its_way = functions.find(|function| !is_reserved(&function.address))?;
        // Whoever calls the hook by hand starts no VM.
        let is_starting =
            !record.by_hand && running::is_locked(app.kernel, other) && running::qemu_pid(app.kernel, other).is_none();
        is_starting.then_some((other, on_its_way.slot))
    })
}

/// Now that the VM runs: whether it has what was made ready for it, and if not that is put right.
///
/// # Errors
/// When a record cannot be written, or what was made ready in vain could not be brought home.
pub fn look_again(handoff: &Handoff, vmid: u32) -> Result<()> {
    let kernel = handoff.kernel;
    let Ok(bytes) = kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")) else { return Ok(()) };
    if !vm::parse(&bytes).hostpci.values().any(|hostpci| hostpci.mapping.is_some()) {
        return Ok(());
    }
    let Some(ids) = running::devices(kernel, vmid) else { return Ok(()) };
    let is_ours = |id: &PciId| slot_of(kernel, id).filter(|slot| takes_part(slot, id)).map(|slot| slot.id);
    let mut has: Vec<SlotId> = ids.iter().filter_map(is_ours).collect();
    sorted::sort(&mut has);
    has.dedup();
    handoff.has_been_given(&Owner::Vm(vmid), &has)
}

/// Of a line that is not understood; as if it were alone.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_one(app: &App, vmid: u32, index: u32, hostpci: &Hostpci) -> Usable<Vec<PciId>> {
    match &hostpci.mapping {
        Some(name) => {
            let taken = taken_from(app, vmid);
            Ok(one(app, vmid, (index, hostpci), name, &|address| taken.contains_key(&address))?.0)
        }
        None => Ok(hostpci.addresses().collect()),
    }
}

/// What one mapping gives, and how that is told if it is an NVIDIA GPU.
fn one(
    app: &App,
    vmid: u32,
    (index, hostpci): (u32, &Hostpci),
    name: &str,
    is_taken: &dyn Fn(Address) -> bool,
) -> Usable<(Vec<PciId>, Option<String>)> {
    let kernel = app.kernel;
    let entries = mapping::alternatives(kernel, name);
    let refused = |why: &str, remedy: &str| {
        let what = format!("VM {vmid}: hostpci{index} uses mapping={name}, {why}");
        Err(Unusable { index: Some(index), trouble: Trouble::new(what, remedy) })
    };
    if entries.is_empty() {
        let see = "see: pvesh get /cluster/mapping/pci";
        let why = match mapping::not_understood(kernel, name) {
            Some((line, text)) => format!(
                "whose entry for this node is not understood ({}:{line}: map {}), so which device it gives is not known",
                mapping::PATH,
                text.escape_debug()
            ),
            None => format!("which {} does not have for this node", mapping::PATH),
        };
        return refused(&why, see);
    }
    let absent = entries
        .iter()
        .flat_map(|entry| entry.path.split(';'))
        .find(|path| PciId::parse(path).is_none_or(|id| functions(kernel, &id).is_empty()));
    if let Some(absent) = absent {
        let why = format!("which stands for {absent}, but there is no such device");
        return refused(&why, "lspci -D shows what there is");
    }
    // What has nothing to do with NVIDIA is Proxmox's own business.
    let is_ours = |entry: &Entry| entry.ids().any(|id| slot_of(kernel, &id).is_some_and(|slot| takes_part(&slot, &id)));
    if !entries.iter().any(is_ours) || hostpci.driver == Driver::Keep {
        let entry = pick(kernel, &entries, &[], is_taken).or(entries.first());
        return Ok((entry.into_iter().flat_map(Entry::ids).collect(), None));
    }
    // One that is wrong keeps Proxmox from all the others.
    for entry in &entries {
        if let Some(why) = invalid(name, entry, &|address| Seen::read(kernel, address)) {
            let why = format!("which Proxmox refuses: PCI device mapping invalid (hardware probably changed): {why}");
            let remedy = format!(
                "fix it in Datacenter, Resource Mappings; what it says now: pvesh get /cluster/mapping/pci/{name}"
            );
            return refused(&why, &remedy);
        }
    }
    let owner = Owner::Vm(vmid);
    let has = match running::qemu_pid(kernel, vmid) {
        Some(_) => app.store.record(&owner).ok().flatten().map(|record| record.slots()).unwrap_or_default(),
        None => Vec::new(),
    };
    let picked = pick(kernel, &entries, &has, is_taken);
    let none_free = if picked.is_none() { ", of which none is free" } else { "" };
    let Some(entry) = picked.or(entries.first()) else { return Ok((Vec::new(), None)) };
    Ok((entry.ids().collect(), is_ours(entry).then(|| format!("mapping={name}{none_free}"))))
}

/// A single alternative is it, free or not. A running VM has what it `has`.
fn pick<'a>(
    kernel: &dyn Kernel,
    entries: &'a [Entry],
    has: &[SlotId],
    is_taken: &dyn Fn(Address) -> bool,
) -> Option<&'a Entry> {
    let is_had = |entry: &Entry| entry.ids().all(|id| id.slot().is_some_and(|slot| has.contains(&slot)));
    let is_free = |entry: &Entry| !entry.ids().flat_map(|id| functions(kernel, &id)).any(is_taken);
    match entries {
        [only] => Some(only),
        _ => entries.iter().find(|entry| is_had(entry)).or_else(|| entries.iter().find(|entry| is_free(entry))),
    }
}

/// What others have reserved, or are about to.
fn taken_from(app: &App, vmid: u32) -> Taken {
    let mut taken = reservations::read(app.kernel);
    taken.retain(|_, other| *other != vmid);
    for record in app.store.each_record().into_iter().flatten() {
        let other = record.owner.vmid().filter(|id| *id != vmid && is_with(app.kernel, &record, *id));
        if let Some(other) = other {
            taken.extend(record.functions.iter().map(|function| (function.address, other)));
        }
    }
    taken
}

/// What `id` names of what is there.
fn functions(kernel: &dyn Kernel, id: &PciId) -> Vec<Address> {
    let slot = slot_of(kernel, id);
    let functions = slot.iter().flat_map(|slot| &slot.functions).map(|function| function.address);
    functions.filter(|address| id.covers(*address)).collect()
}

/// What is there where an id names something.
pub(super) fn slot_of(kernel: &dyn Kernel, id: &PciId) -> Option<Slot> {
    Slot::read(kernel, id.slot()?)
}

/// A GPU, or an NVSwitch, which needs NVIDIA's driver to come home as well.
pub(super) fn takes_part(slot: &Slot, id: &PciId) -> bool {
    takes_gpu(slot, id) || slot.functions.iter().any(|f| f.is_nvswitch() && !f.is_virtual && id.covers(f.address))
}

/// Whether an id takes an NVIDIA GPU, and not only virtual functions of one.
pub(super) fn takes_gpu(slot: &Slot, id: &PciId) -> bool {
    slot.is_nvidia_gpu() && slot.functions.iter().any(|f| !f.is_virtual && id.covers(f.address))
}

/// What Proxmox compares with a mapping's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    id: String,
    subsystem_id: Option<String>,
    iommugroup: Option<i64>,
}

impl Seen {
    fn read(kernel: &dyn Kernel, address: Address) -> Option<Seen> {
        let attribute = |name: &str| {
            let text = kernel.text(&address.attribute(name))?;
            Some(text.lines().next()?.trim_start_matches("0x").to_string())
        };
        let subsystem = attribute("subsystem_vendor").zip(attribute("subsystem_device"));
        let group = kernel.link_name(&address.attribute("iommu_group")).ok();
        Some(Seen {
            id: format!("{}:{}", attribute("vendor")?, attribute("device")?),
            subsystem_id: subsystem.map(|(vendor, device)| format!("{vendor}:{device}")),
            iommugroup: group.and_then(|group| group.parse().ok()),
        })
    }
}

/// Why Proxmox does not take an entry, in its words (`PVE::Mapping::PCI::assert_valid`).
fn invalid(name: &str, entry: &Entry, seen: &dyn Fn(Address) -> Option<Seen>) -> Option<String> {
    entry.ids().enumerate().find_map(|(at, id)| {
        // Of a whole device the first function counts.
        let address = id.slot()?.function(id.function.unwrap_or(0));
        let Some(seen) = seen(address) else { return Some(format!("pci device '{address}' not found")) };
        let group = |group: Option<i64>| group.map(|group| group.to_string());
        let mdev = |mdev: bool| Some(u8::from(mdev).to_string());
        let properties = [
            ("id", Some(seen.id), Some(entry.id.clone())),
            ("iommugroup", group(seen.iommugroup), group(entry.iommugroup)),
            // A device that a VM is given whole has none when Proxmox looks: it is on vfio-pci by then.
            ("mdev", mdev(false), mdev(entry.mdev)),
            ("subsystem-id", seen.subsystem_id, entry.subsystem_id.clone()),
        ];
        let counts = properties.into_iter().filter(|(property, ..)| at == 0 || *property != "iommugroup");
        counts.into_iter().find_map(|(property, expected, configured)| match (expected, configured) {
            (Some(_), None) => Some(format!("missing expected property '{property}' for device '{address}'")),
            (None, Some(_)) => Some(format!("unexpected property '{property}' configured for device '{address}'")),
            (Some(expected), Some(configured)) if expected != configured.replace("0x", "") => {
                Some(format!("'{property}' does not match for '{name}' ({expected} != {configured})"))
            }
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str) -> Entry {
        Entry {
            path: path.to_string(),
            id: "10de:2684".to_string(),
            subsystem_id: Some("1043:889a".to_string()),
            iommugroup: Some(1),
            mdev: false,
        }
    }

    fn seen(address: Address) -> Option<Seen> {
        (address.function == 0).then(|| Seen {
            id: "10de:2684".to_string(),
            subsystem_id: Some("1043:889a".to_string()),
            iommugroup: Some(1),
        })
    }

    #[test]
    fn what_proxmox_does_not_take() {
        let why = |entry: &Entry| invalid("gpu", entry, &seen);
        assert_eq!(why(&entry("0000:01:00")), None);
        assert_eq!(why(&entry("0000:01:00.0")), None);
        assert_eq!(why(&entry("0000:01:00.1")).unwrap(), "pci device '0000:01:00.1' not found");
        let other = Entry { id: "10de:2204".to_string(), ..entry("0000:01:00") };
        assert_eq!(why(&other).unwrap(), "'id' does not match for 'gpu' (10de:2684 != 10de:2204)");
        // Letters count, as they do in Perl.
        assert!(why(&Entry { id: "10DE:2684".to_string(), ..entry("0000:01:00") }).is_some());
        let other = Entry { iommugroup: Some(2), ..entry("0000:01:00") };
        assert_eq!(why(&other).unwrap(), "'iommugroup' does not match for 'gpu' (1 != 2)");
        let other = Entry { iommugroup: None, ..entry("0000:01:00") };
        assert_eq!(why(&other).unwrap(), "missing expected property 'iommugroup' for device '0000:01:00.0'");
        let other = Entry { mdev: true, ..entry("0000:01:00") };
        assert_eq!(why(&other).unwrap(), "'mdev' does not match for 'gpu' (0 != 1)");
        let other = Entry { subsystem_id: Some("1043:0000".to_string()), ..entry("0000:01:00") };
        assert_eq!(why(&other).unwrap(), "'subsystem-id' does not match for 'gpu' (1043:889a != 1043:0000)");
        let bare = |address| seen(address).map(|seen| Seen { subsystem_id: None, iommugroup: None, ..seen });
        let none = Entry { subsystem_id: None, iommugroup: None, ..entry("0000:01:00") };
        assert_eq!(invalid("gpu", &none, &bare), None);
        let why = invalid("gpu", &Entry { iommugroup: None, ..entry("0000:01:00") }, &bare).unwrap();
        assert_eq!(why, "unexpected property 'subsystem-id' configured for device '0000:01:00.0'");
    }

    #[test]
    fn of_several_devices_together_the_group_of_the_first_counts() {
        let group = |address: Address| {
            Some(Seen { iommugroup: Some(1 + i64::from(address.function)), ..seen(address.slot.function(0))? })
        };
        assert_eq!(invalid("gpu", &entry("0000:01:00.0;0000:01:00.1"), &group), None);
        assert!(invalid("gpu", &entry("0000:01:00.1;0000:01:00.0"), &group).is_some());
    }
}
