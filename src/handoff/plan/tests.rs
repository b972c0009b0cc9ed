//! The planner, by plans that it makes of facts.

use super::*;
use crate::gpu::console::Console;
use crate::gpu::inventory::Slot;
use crate::handoff::kept::record::Owner;

fn facts(functions: Vec<Function>, gpu_drivers: &[(&str, GpuDriver)]) -> Facts {
    let id = "0000:01:00".parse().unwrap();
    Facts {
        slots: vec![Slot { id, functions }],
        vfio_pci: Availability::Registered,
        strangers: Vec::new(),
        gpu_drivers: gpu_drivers.iter().map(|(name, driver)| (name.to_string(), driver.clone())).collect(),
        loaded: Vec::new(),
        registered: Vec::new(),
        static_ids: Vec::new(),
        drm_holds_gpus: false,
        console: Console::default(),
    }
}

/// A function of the card: 0 is a GPU.
fn function(number: u8, driver: Option<&str>) -> Function {
    let slot: SlotId = "0000:01:00".parse().unwrap();
    Function {
        address: slot.function(number),
        vendor: 0x10de,
        device: 0x2684,
        class: if number == 0 { 0x0003_0000 } else { 0x0004_0300 },
        driver: driver.map(str::to_string),
        module: driver.map(|driver| driver.replace('-', "_")),
        driver_override: None,
        iommu_group: Some(1),
        is_virtual: false,
        virtual_functions: 0,
        has_mdevs: false,
        is_gone: false,
        power: Power::default(),
    }
}

fn record(homes: &[Option<&str>]) -> Record {
    let home = |(number, driver): (u8, &Option<&str>)| {
        let Function { address, driver, module, power, .. } = function(number, *driver);
        HomeOf { slot: address.slot, address, driver, module, power, model: None }
    };
    Record { functions: (0..).zip(homes).map(home).collect(), ..Record::new(Owner::Vm(111)) }
}

fn words(plan: &Plan) -> Vec<String> {
    plan.iter().map(|(_, step)| step.to_string()).collect()
}

fn leaving(facts: &Facts, homes: &[Option<&str>]) -> Vec<String> {
    words(&to_vfio(facts, &record(homes)).expect("nothing refuses"))
}

#[test]
fn a_module_of_two_drivers_is_unloaded_once() {
    let driver = GpuDriver { unload_order: Ok(vec!["nvidia_uvm".into(), "nvidia".into()]), elsewhere: Vec::new() };
    let facts = facts(Vec::new(), &[("nouveau", driver.clone()), ("nvidia", driver)]);
    assert_eq!(leaving(&facts, &[]), ["unload nvidia_uvm", "unload nvidia"]);
}

#[test]
fn only_what_is_and_lives_on_vfio_pci_needs_no_override() {
    let (set, bind) = ("driver_override=vfio-pci 0000:01:00.0", "bind to vfio-pci 0000:01:00.0");
    let there = function(0, Some(VFIO_PCI));
    let other = Function { driver_override: Some("nvidia".into()), ..there.clone() };
    let is_set = Function { driver_override: Some(VFIO_PCI.into()), ..there.clone() };
    for (function, home, wanted) in [
        (there.clone(), VFIO_PCI, &[][..]),
        (there, "nvidia", &[set]),
        (function(0, None), VFIO_PCI, &[set, bind]),
        (other, VFIO_PCI, &[set]),
        (is_set, "nvidia", &[]),
    ] {
        assert_eq!(leaving(&facts(vec![function], &[]), &[Some(home)]), wanted, "{home}");
    }
}

#[test]
fn the_console_is_detached_from_a_screen_that_does_not_go_with_its_module() {
    let gpu = function(0, Some("nvidia"));
    let console = Console { is_attached: true, can_attach: true, screen: Some(gpu.address), ..Console::default() };
    let detaches = |modules: &[&str], elsewhere: &[&str], console: &Console| {
        let unload_order = Ok(modules.iter().map(|module| module.to_string()).collect());
        let elsewhere = elsewhere.iter().map(|slot| slot.parse().unwrap()).collect();
        let driver = GpuDriver { unload_order, elsewhere };
        let facts = Facts { console: console.clone(), ..facts(vec![gpu.clone()], &[("nvidia", driver)]) };
        leaving(&facts, &[Some("nvidia")]).contains(&"console detach".to_string())
    };
    let other = ["0000:02:00"];
    assert!(detaches(&["nvidia"], &other, &console));
    assert!(!detaches(&["nvidia"], &[], &console));
    assert!(!detaches(&["nvidia_drm"], &[], &console));
    assert!(!detaches(&["nvidia"], &other, &Console { can_attach: false, ..console.clone() }));
    assert!(!detaches(&["nvidia"], &other, &Console { is_attached: false, ..console.clone() }));
    assert!(!detaches(&["nvidia"], &other, &Console { screen: None, ..console }));
}

#[test]
fn what_is_at_home_without_a_driver_is_kept_from_a_module_that_is_loaded() {
    let facts = |registered: &[&str]| {
        let functions = vec![function(0, Some(VFIO_PCI)), function(1, Some(VFIO_PCI))];
        Facts { registered: registered.iter().map(|name| name.to_string()).collect(), ..facts(functions, &[]) }
    };
    let record = record(&[Some("nvidia"), None]);
    let keeps = "driver_override=vfio-pci 0000:01:00.1".to_string();
    let loads = words(&to_home(&facts(&[]), &record));
    assert!(loads.contains(&keeps) && loads.contains(&"load nvidia".to_string()), "{loads:?}");
    let nothing_loaded = words(&to_home(&facts(&["nvidia"]), &record));
    assert!(!nothing_loaded.contains(&keeps), "{nothing_loaded:?}");
}

#[test]
fn a_line_for_each_phase() {
    let slots: [SlotId; 2] = ["0000:01:00", "0000:02:00"].map(|slot| slot.parse().unwrap());
    let unload = |module: &str| (Phase::Release, Step::Unload { module: module.to_string() });
    let bind = |function| (Phase::Bind, probe(slots[0].function(function), VFIO_PCI));
    let plan = vec![(Phase::Prepare, load(&["vfio_pci"])), unload("a"), unload("b"), bind(0), bind(1)];
    let told = |slots: &[SlotId]| lines(slots, &plan).into_iter().map(|(name, what)| format!("{name}: {what}"));
    let one: Vec<String> = told(&slots[..1]).collect();
    assert_eq!(one, ["prepare: load vfio_pci", "release: unload a b", "bind: bind to vfio-pci .0 .1"]);
    // Of which of two slots they are must be said.
    assert_eq!(told(&slots).next_back().unwrap(), "bind: bind to vfio-pci 0000:01:00.0 0000:01:00.1");
    assert_eq!(told(&slots[1..]).next_back().unwrap(), "bind: bind to vfio-pci 0000:01:00.0 0000:01:00.1");
    assert_eq!(to_text("a title", &slots, &Plan::new()), "a title\n  nothing to do\n");
}

#[test]
fn only_what_loads_or_unloads_modules_has_them_alone() {
    let address = function(0, None).address;
    let share_of = |step: Step| share(&vec![(Phase::Bind, load(&["vfio_pci"])), (Phase::Bind, step)]);
    assert_eq!(share_of(unbind(address, "nvidia")), Share::Together);
    assert_eq!(share_of(load(&["vfio_pci"])), Share::Together);
    assert_eq!(share_of(load(&["nvidia"])), Share::Alone);
    assert_eq!(share_of(Step::Unload { module: "nvidia".to_string() }), Share::Alone);
}

#[test]
fn nvidia_drm_is_away_while_a_card_of_nvidias_leaves_another() {
    let leaves = |driver: &str, drm_holds_gpus| {
        let elsewhere = vec!["0000:02:00".parse().unwrap()];
        let modules = GpuDriver { unload_order: Ok(vec![driver.to_string()]), elsewhere };
        let facts = facts(vec![function(0, Some(driver))], &[(driver, modules)]);
        leaving(&Facts { drm_holds_gpus, ..facts }, &[Some(driver)])
    };
    let drm = ["unload nvidia_drm", "load nvidia_drm"].map(str::to_string);
    assert!(drm.iter().all(|step| leaves("nvidia", true).contains(step)));
    for others in [leaves("nvidia", false), leaves("nouveau", true)] {
        assert!(!drm.iter().any(|step| others.contains(step)), "{others:?}");
    }
}

#[test]
fn an_override_that_is_right_is_not_written_again() {
    let returns = |now: Option<&str>| {
        let function = Function { driver_override: now.map(str::to_string), ..function(0, Some(VFIO_PCI)) };
        words(&to_home(&facts(vec![function], &[]), &record(&[Some("nvidia")])))
    };
    let set = "driver_override=nvidia 0000:01:00.0".to_string();
    assert!(returns(Some(VFIO_PCI)).contains(&set) && returns(None).contains(&set));
    assert!(!returns(Some("nvidia")).contains(&set));
}

#[test]
fn only_what_moved_is_put_right_in_the_end() {
    let auto = Power { control: Some("auto".into()), d3cold_allowed: None };
    let with = |function: Function| Function { power: auto.clone(), ..function };
    let functions = vec![with(function(0, Some(VFIO_PCI))), with(function(1, Some("snd_hda_intel")))];
    let mut record = record(&[Some("nvidia"), Some("snd_hda_intel")]);
    record.functions.iter_mut().for_each(|home| home.power = auto.clone());
    let plan = to_home(&facts(functions, &[]), &record);
    let in_the_end: Plan = plan.into_iter().filter(|(phase, _)| *phase == Phase::Clear).collect();
    // Moving it has changed what it may.
    assert_eq!(words(&in_the_end), ["power/control=auto 0000:01:00.0", "clear driver_override 0000:01:00.0"]);
}

#[test]
fn nodes_are_made_for_nvidias_driver_alone() {
    let makes = |home| {
        let plan = to_home(&facts(vec![function(0, Some(VFIO_PCI))], &[]), &record(&[Some(home)]));
        words(&plan).contains(&"device nodes".to_string())
    };
    assert!(makes("nvidia") && !makes("nouveau"));
}

#[test]
fn the_drivers_other_modules_are_loaded_for_a_gpu_that_it_drives() {
    let loads = |now: &str, home: &str, loaded: &[&str], modules: &[&str]| {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let facts = Facts { loaded: names(loaded), ..facts(vec![function(0, Some(now))], &[]) };
        let record = Record { modules: names(modules), ..record(&[Some(home)]) };
        let plan = words(&to_home(&facts, &record));
        plan.into_iter().find(|step| step.starts_with("load")).unwrap_or_default()
    };
    let stack = ["nvidia", "nvidia_uvm"];
    assert_eq!(loads(VFIO_PCI, "nvidia", &[], &stack), "load nvidia nvidia_uvm");
    // It is home already.
    assert_eq!(loads("nvidia", "nvidia", &["nvidia"], &stack), "load nvidia_uvm");
    assert_eq!(loads("nvidia", "nvidia", &stack, &stack), "");
    // Somebody gave it another driver.
    assert_eq!(loads("nouveau", "nvidia", &[], &stack), "");
    // It lives with a driver that none of them is of.
    assert_eq!(loads(VFIO_PCI, "nouveau", &[], &stack), "load nouveau");
}

#[test]
fn a_console_that_is_off_goes_to_the_screen_of_another_card_meanwhile() {
    let gpu = function(0, Some("nouveau"));
    let attaches = |had: bool, console: Console| {
        let elsewhere = vec!["0000:02:00".parse().unwrap()];
        let driver = GpuDriver { unload_order: Ok(vec!["nouveau".to_string()]), elsewhere };
        let facts = Facts { console, ..facts(vec![gpu.clone()], &[("nouveau", driver)]) };
        let record = Record { console: had, ..record(&[Some("nouveau")]) };
        let plan = words(&to_vfio(&facts, &record).expect("nothing refuses"));
        plan.contains(&"console attach".to_string())
    };
    let off = Console { can_attach: true, has_other: true, ..Console::default() };
    let elsewhere = Console { is_attached: true, ..off.clone() };
    let here = Console { screen: Some(gpu.address), ..elsewhere.clone() };
    assert!(attaches(true, off.clone()) && attaches(true, here.clone()));
    assert!(!attaches(true, elsewhere) && !attaches(false, off.clone()));
    assert!(!attaches(true, Console { has_other: false, ..here }));
    assert!(!attaches(true, Console { can_attach: false, ..off }));
}
