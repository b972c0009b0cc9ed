//! What the checks go by. All of it is read here, once; whatever decides after that is pure.

pub mod driver;
pub mod guests;
pub mod host;
pub mod ours;

use crate::App;
use crate::address::{Address, SlotId};
use crate::config::Config;
use crate::gpu::inventory::nvidia_slots;
use crate::gpu::{Function, Slot, behind};
use crate::handoff::plan::{check, facts};
use crate::proxmox::guest;
use crate::proxmox::pci_id::PciId;
use crate::report::status::Status;
use crate::sys::Kernel;
use crate::trouble::{About, Trouble};

pub struct Facts {
    /// The guest that was asked about.
    pub only: Option<u32>,
    /// Who is not sees less.
    pub is_root: bool,
    pub is_proxmox: bool,
    /// Proxmox is there, and its cluster file system is not.
    pub is_down: bool,
    pub config: Config,
    /// Those with an NVIDIA GPU, and what was read of them slowly.
    pub slots: Vec<Slot>,
    /// By slot: who shares an IOMMU group with it.
    pub strangers: Vec<(SlotId, Function)>,
    /// What of the host is behind another function of a card, and in use.
    pub behind: Vec<(Address, Trouble)>,
    pub host: host::Host,
    pub driver: driver::Driver,
    pub ours: ours::Ours,
    pub guests: guests::Guests,
}

impl Facts {
    pub fn read(app: &App, only: Option<u32>) -> Facts {
        Facts::of(app, only, None)
    }

    /// `status`: one that was read already. Then only files of this host are read beside it: no program is run, no container
    /// looked into, no process looked at, and no storage, which may be somewhere else.
    pub fn of(app: &App, only: Option<u32>, status: Option<&Status>) -> Facts {
        let kernel = app.kernel;
        let is_whole = status.is_none();
        let (config, _) = Config::lenient(kernel);
        let mistakes = Config::mistakes(kernel);
        let mut slots = nvidia_slots(kernel);
        for slot in &mut slots {
            // Next to a call that hangs nothing of it can be read; what sleeps is left to sleep.
            if !app.store.has_call(kernel, slot.id) {
                let _ = slot.read_slow_attributes_asleep(kernel);
            }
        }
        let functions = slots.iter().flat_map(|slot| &slot.functions);
        let behind = functions.filter_map(|one| Some((one.address, behind::in_use(kernel, one)?))).collect();
        let host = host::Host::read(app, &config, &slots, is_whole);
        let guests = guests::Guests::read(app, &config, &slots, only, is_whole);
        let is_proxmox = ["/usr/bin/pveversion", "/usr/share/perl5/PVE"].iter().any(|path| kernel.exists(path));
        Facts {
            only,
            is_root: nix::unistd::geteuid().is_root() || !kernel.is_real(),
            is_proxmox: is_proxmox || !guest::is_down(kernel),
            is_down: is_proxmox && guest::is_down(kernel),
            strangers: strangers(kernel, &slots),
            behind,
            driver: driver::Driver::read(app, &config, &slots),
            ours: ours::Ours { mistakes, ..ours::Ours::read(app, &config, &slots, &host, &guests, status) },
            host,
            guests,
            slots,
            config,
        }
    }

    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.slots.iter().flat_map(|slot| &slot.functions)
    }

    /// Why who shares a group with a card keeps it from a VM. A VM that takes the card may list the other as well.
    pub fn in_groups(&self) -> Vec<(&Function, Trouble)> {
        let one = |(slot, stranger): &'_ (SlotId, Function)| {
            let takers = self.guests.vms.iter().filter(|vm| vm.slots.contains(slot));
            let listed: Vec<PciId> = takers.flat_map(|vm| vm.listed.iter().cloned()).collect();
            check::of_stranger(stranger, &listed)
        };
        let told = self.strangers.iter().filter_map(|pair| Some((&pair.1, one(pair)?)));
        let mut found: Vec<(&Function, Trouble)> = Vec::new();
        for (function, trouble) in told {
            if !found.iter().any(|(_, other)| *other == trouble) {
                found.push((function, trouble));
            }
        }
        found
    }

    /// What a start is refused for that has a finding of its own.
    pub fn known_refusals(&self) -> Vec<About> {
        let own = self.functions().filter_map(|one| check::of_function(one).or_else(|| check::gone_function(one)));
        let groups = self.in_groups().into_iter().map(|(_, trouble)| trouble);
        let behind = self.behind.iter().map(|(_, trouble)| trouble.clone());
        own.chain(groups).chain(behind).chain([check::no_vfio_pci()]).filter_map(|trouble| trouble.about).collect()
    }
}

fn strangers(kernel: &dyn Kernel, slots: &[Slot]) -> Vec<(SlotId, Function)> {
    let of = |slot: &Slot| {
        let all = facts::strangers(kernel, std::slice::from_ref(slot)).into_iter();
        all.map(|function| (slot.id, function)).collect::<Vec<_>>()
    };
    slots.iter().flat_map(of).collect()
}
