//! What is decided on a machine that is nothing but some files.

use super::*;
use crate::config::Home;
use crate::gpu::inventory::{Function, Slot, VFIO_PCI};
use crate::gpu::power::Power;
use crate::handoff::kept::record::{HomeOf, Stopped};
use crate::sys::Linux;
use std::fs;

/// The class of a GPU.
const GPU: u32 = 0x03_0000;

/// On a machine with these files, gone with the test.
pub(super) fn ask<T>(files: &[(&str, &str)], config: &Config, what: impl FnOnce(&Handoff) -> T) -> T {
    let thread = format!("{:?}", std::thread::current().id());
    let root = std::env::temp_dir().join(format!("gpu-handoff-intent-{}-{thread}", std::process::id()));
    for (path, text) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let (kernel, store) = (Linux::at(root.clone()), Store::at(root.join("run/gpu-handoff")));
    let answer = what(&Handoff { kernel: &kernel, store: &store, config, story: &Story::silent() });
    let _ = fs::remove_dir_all(root);
    answer
}

/// A slot with nothing but a GPU.
pub(super) fn slot(id: &str, driver: &str) -> Slot {
    let id: SlotId = id.parse().unwrap();
    let gpu = Function {
        address: id.function(0),
        vendor: 0x10de,
        device: 0x2684,
        class: GPU,
        driver: Some(driver.to_string()),
        module: Some(driver.replace('-', "_")),
        driver_override: None,
        iommu_group: None,
        is_virtual: false,
        virtual_functions: 0,
        has_mdevs: false,
        is_gone: false,
        power: Power::default(),
    };
    Slot { id, functions: vec![gpu] }
}

fn record_of(handoff: &Handoff, owner: Owner, slot: &Slot) -> Record {
    let functions = slot.functions.iter().map(|function| HomeOf::now(handoff.kernel, function)).collect();
    Record { functions, ..Record::new(owner) }
}

/// The configuration says where a card is at home, but for one that is with vfio-pci by hand.
#[test]
fn a_slot_that_no_record_knows_is_at_home_as_configured() {
    let slots = [slot("0000:01:00", VFIO_PCI), slot("0000:02:00", "nvidia")];
    let mut config = Config::default();
    config.homes.insert(slots[1].id, Home::None);
    let home = |owner: Owner, earlier: &Slot| {
        let record =
            |handoff: &Handoff| handoff.record_for(&Owner::Vm(111), &slots, &[record_of(handoff, owner, earlier)]);
        ask(&[], &config, record).functions[1].driver.clone()
    };
    for owner in [Owner::Vm(111), Owner::Vm(112), Owner::Manual(slots[0].id)] {
        assert_eq!(home(owner, &slots[0]), None);
    }
    assert_eq!(home(Owner::Manual(slots[1].id), &slots[1]).as_deref(), Some("nvidia"));
}

/// Those of the driver that the card has at home, where it has that or will have it again.
#[test]
fn which_modules_are_loaded_again() {
    let files = [("sys/module/nvidia/holders/nvidia_uvm", ""), ("sys/module/nouveau/refcnt", "0\n")];
    let modules = |driver: &str, home: &str| {
        ask(&files, &Config::default(), |handoff| {
            let earlier = record_of(handoff, Owner::Vm(112), &slot("0000:01:00", home));
            handoff.record_for(&Owner::Vm(111), &[slot("0000:01:00", driver)], &[earlier]).modules
        })
    };
    assert_eq!(modules("nvidia", "nvidia"), ["nvidia", "nvidia_uvm"]);
    assert_eq!(modules(VFIO_PCI, "nvidia"), ["nvidia", "nvidia_uvm"]);
    assert!(modules("nvidia", "nouveau").is_empty());
}

/// The driver that the configuration names is that of the card's GPU alone, and its module the one that it is in.
#[test]
fn a_home_that_is_configured_is_the_gpus() {
    let home = |driver: &str, module: &str, class: u32| {
        let mut slot = slot("0000:01:00", driver);
        (slot.functions[0].module, slot.functions[0].class) = (Some(module.to_string()), class);
        let mut config = Config::default();
        config.homes.insert(slot.id, Home::Driver("nvidia".to_string()));
        let record = ask(&[], &config, |handoff| handoff.record_for(&Owner::Vm(111), &[slot], &[]));
        let home = record.functions[0].clone();
        (home.driver.unwrap(), home.module.unwrap())
    };
    let nvidia = |module: &str| ("nvidia".to_string(), module.to_string());
    assert_eq!(home("nouveau", "nouveau", GPU), nvidia("nvidia"));
    assert_eq!(home("nvidia", "nvidia_current", GPU), nvidia("nvidia_current"));
    let sound = "snd_hda_intel".to_string();
    assert_eq!(home(&sound, &sound, 0x04_0300), (sound.clone(), sound));
}

/// Whoever takes over from a VM that did not come to have the card takes over all that is owed for it.
#[test]
fn what_an_abandoned_record_knew_is_inherited() {
    let slots = [slot("0000:01:00", VFIO_PCI)];
    let other = slot("0000:02:00", "nvidia");
    let inherited = ask(&[], &Config::default(), |handoff| {
        let mut earlier = Record {
            modules: vec!["nvidia".to_string()],
            stopped: vec![Stopped::Container(101)],
            frozen: vec![102],
            console: true,
            ..record_of(handoff, Owner::Vm(112), &slot("0000:01:00", "nvidia"))
        };
        // That card is to come home, whoever has the first.
        earlier.functions.push(HomeOf::now(handoff.kernel, &other.functions[0]));
        handoff.record_for(&Owner::Vm(111), &slots, &[earlier])
    });
    assert_eq!(inherited.slots(), [slots[0].id]);
    assert_eq!(
        (&*inherited.modules, &*inherited.stopped),
        (&["nvidia".to_string()][..], &[Stopped::Container(101)][..])
    );
    assert_eq!((&*inherited.frozen, inherited.console), (&[102][..], true));
}

/// What vfio-pci has for no reason that would be there after a boot is at home with whoever would take it.
#[test]
fn the_home_of_what_was_left_on_vfio_pci() {
    let home = |files: &[(&str, &str)], functions: &[(u32, &str)]| {
        let mut slot = slot("0000:01:00", VFIO_PCI);
        let one = slot.functions.remove(0);
        for ((class, driver), number) in functions.iter().zip(0..) {
            let (address, driver) = (slot.id.function(number), Some((*driver).to_string()));
            slot.functions.push(Function { address, driver, class: *class, ..one.clone() });
        }
        let record =
            ask(files, &Config::default(), |handoff| handoff.record_for(&Owner::Vm(111), &[slot.clone()], &[]));
        let last = record.functions.last().unwrap().clone();
        (last.driver, last.module)
    };
    let (gpu, sound) = ((GPU, "nvidia"), (0x04_0300, VFIO_PCI));
    let sound_has = [
        ("proc/sys/kernel/osrelease", "6.12.48-1-pve\n"),
        ("lib/modules/6.12.48-1-pve/modules.dep", "kernel/sound/pci/hda/snd-hda-intel.ko.zst:\n"),
    ];
    let snd = Some("snd_hda_intel".to_string());
    assert_eq!(home(&sound_has, &[gpu, sound]), (snd.clone(), snd.clone()));
    // In the kernel itself: there is no module.
    let built_in = [("sys/bus/pci/drivers/snd_hda_intel/bind", "")];
    assert_eq!(home(&built_in, &[gpu, sound]), (snd, None));
    assert_eq!(home(&[], &[gpu, sound]), (None, None));
    // Nothing of NVIDIA's: it is no business of ours.
    let vfio = (Some(VFIO_PCI.to_string()), Some("vfio_pci".to_string()));
    assert_eq!(home(&[], &[sound]), vfio);
    // On a host that has no driver for it the GPU is there for VMs, and its sound with it.
    assert_eq!(home(&[], &[(GPU, VFIO_PCI), sound]), vfio);
}
