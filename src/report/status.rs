//! `gpu-handoff --status`: every NVIDIA slot, who has it, who uses it, who lays claim to it, how its last handoff went. Reads
//! only.

use super::claims::{self, Claim};
use super::pinned::Pinned;
use crate::address::SlotId;
use crate::config::{Config, Home};
use crate::gpu::foreign::Foreign;
use crate::gpu::holders::{Devices, Holder, Place, Reach, hidden};
use crate::gpu::inventory::{Function, Slot, VFIO_PCI, nvidia_slots};
use crate::gpu::{dri, model, nvidia};
use crate::handoff::kept::owed::{self, Owed};
use crate::handoff::kept::record::is_with;
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::kept::store::Store;
use crate::handoff::kept::under_way;
use crate::handoff::kept::wedge::Wedge;
use crate::handoff::way::elsewhere;
use crate::json::put;
use crate::proxmox::mapping;
use crate::setup::kept::pending::Pending;
use crate::sys::{How, Kernel, User};
use serde_json::{Value, json};
use std::fmt;
use std::time::Duration;

const SCHEMA: u64 = 1;

/// What a slot is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    Host,
    Vm(u32),
    Manual,
    /// No driver has it, or vfio-pci without anybody using it.
    None,
    /// A handoff is under way.
    Moving(Option<u32>),
    Wedged(Option<u32>),
    /// Neither at home nor with a running VM, and nobody working on it.
    Stranded(Option<u32>),
}

impl Has {
    pub fn word(self) -> &'static str {
        match self {
            Has::Host => "host",
            Has::Vm(_) => "vm",
            Has::Manual => "manual",
            Has::None => "none",
            Has::Moving(_) => "moving",
            Has::Wedged(_) => "wedged",
            Has::Stranded(_) => "stranded",
        }
    }

    /// Its owner has it as he should.
    pub fn has_it(self) -> bool {
        matches!(self, Has::Vm(_) | Has::Manual)
    }

    pub fn vmid(self) -> Option<u32> {
        match self {
            Has::Vm(id) => Some(id),
            Has::Moving(id) | Has::Wedged(id) | Has::Stranded(id) => id,
            Has::Host | Has::Manual | Has::None => None,
        }
    }
}

/// What a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    Wedged,
    Stranded,
    Owed,
    /// Nodes in /dev/dri that are others than before.
    Dri,
    Reboot,
    SetUp,
    /// What could not be read or understood.
    Problem,
    /// In the configuration.
    Mistake,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    pub slot: Option<SlotId>,
    /// Where it is one file's.
    pub file: Option<String>,
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let title = if self.kind == FaultKind::SetUp { "set-up is not done: " } else { "" };
        write!(f, "{title}{}", self.text)
    }
}

/// What could not be read or understood.
struct Problem {
    file: Option<String>,
    is_mistake: bool,
    text: String,
}

impl Problem {
    /// Of one of the store's files, which names the file first.
    fn of_file(error: &anyhow::Error) -> Problem {
        Problem { file: Some(error.to_string()), ..Problem::from(format!("{error:#}")) }
    }

    fn mistake(text: String) -> Problem {
        Problem { is_mistake: true, ..Problem::from(text) }
    }
}

impl From<String> for Problem {
    fn from(text: String) -> Problem {
        Problem { file: None, is_mistake: false, text }
    }
}

pub struct Status {
    pub(super) gpus: Vec<Gpu>,
    /// The version of NVIDIA's driver that the host has loaded.
    pub(super) driver: Option<String>,
    pub(super) sees_all: bool,
    pub(super) reboot_required: bool,
    /// Why set-up is not done with.
    pub(super) setup_error: Option<String>,
    problems: Vec<Problem>,
}

pub(super) struct Gpu {
    pub slot: Slot,
    pub name: Option<String>,
    pub has: Has,
    /// When whoever has it got it, UTC; none when nothing says so.
    pub since: Option<String>,
    /// By function: its home, as recorded or, without a record, as configured, else where it is.
    pub homes: Vec<Option<String>>,
    /// None when this process may not see who uses it, or the driver is busy.
    pub users: Option<Vec<Holder>>,
    pub is_blind: bool,
    pub wedged: Option<Wedge>,
    /// A remove that hangs and is none of ours.
    pub foreign: Option<Foreign>,
    pub owed: Vec<Owed>,
    /// It has other nodes in /dev/dri than before a card left.
    pub dri: Option<String>,
    /// What acts at boot and keeps it from its home, with what to type.
    pub causes: Vec<String>,
    /// Resource mappings that may stand for it on this node.
    pub mappings: Vec<String>,
    pub claims: Vec<Claim>,
    pub pinned: Option<Pinned>,
    pub last: Option<Value>,
}

impl Status {
    /// `sees_all`: whether this process may look into every other one (root may). What cannot be read is a problem,
    /// not a failure: the rest can still be told.
    pub fn read(kernel: &dyn Kernel, store: &Store, sees_all: bool) -> Status {
        Status::read_within(kernel, store, sees_all, None)
    }

    /// As [`Status::read`]; what is to be seen of processes must be seen in this time.
    pub fn read_within(kernel: &dyn Kernel, store: &Store, sees_all: bool, limit: Option<Duration>) -> Status {
        let mut problems = Vec::new();
        let mut records = Vec::new();
        for record in store.each_record() {
            match record {
                Ok(record) => records.push(record),
                Err(error) => problems.push(Problem::of_file(&error)),
            }
        }
        let (config, mistakes) = Config::lenient(kernel);
        problems.extend(mistakes.into_iter().map(Problem::mistake));
        let setup_error = match Pending::read(kernel) {
            Ok(pending) => pending.why(),
            Err(error) => Some(format!("{error:#}")),
        };
        let slots = nvidia_slots(kernel);
        let limit = limit.unwrap_or(config.time.handoff / 2);
        let open = if sees_all { look(kernel, &slots, limit, &mut problems) } else { None };
        let users = open.as_deref();
        let claims = claims::all(kernel);
        let gpus = slots.into_iter().map(|slot| {
            let claims = claims.iter().filter(|claim| claim.slots.contains(&slot.id)).cloned().collect();
            Gpu { claims, ..Gpu::read(kernel, store, &config, &records, slot, users, &mut problems) }
        });
        Status {
            gpus: gpus.collect(),
            driver: nvidia::version_as_written(kernel),
            sees_all,
            reboot_required: kernel
                .text("/run/reboot-required.pkgs")
                .is_some_and(|packages| packages.lines().any(|package| package == "gpu-handoff")),
            setup_error,
            problems,
        }
    }

    /// As it may be shown to others: what the guests are called is nobody's business.
    #[must_use]
    pub fn without_names(mut self) -> Status {
        self.gpus.iter_mut().flat_map(|gpu| &mut gpu.claims).for_each(|claim| claim.name = None);
        self
    }

    /// Files of ours that could not be read or understood.
    pub fn problems(&self) -> impl Iterator<Item = &str> {
        self.problems.iter().map(|problem| problem.text.as_str())
    }

    /// In the configuration.
    pub fn add_mistakes(&mut self, mistakes: impl IntoIterator<Item = String>) {
        self.problems.extend(mistakes.into_iter().map(Problem::mistake));
    }

    /// What is not as it should be. A handoff that is under way may owe what it likes.
    pub fn faults(&self) -> Vec<String> {
        self.each_fault().iter().map(ToString::to_string).collect()
    }

    /// As [`Status::faults`], with what each is about.
    pub fn each_fault(&self) -> Vec<Fault> {
        let fault = |kind, text: String| Fault { kind, slot: None, file: None, text };
        let mut faults: Vec<Fault> = self.gpus.iter().filter_map(Gpu::fault).collect();
        if self.reboot_required {
            faults.push(fault(FaultKind::Reboot, "a reboot is required".to_string()));
        }
        faults.extend(self.setup_error.iter().map(|why| fault(FaultKind::SetUp, why.clone())));
        faults.extend(self.problems.iter().map(|problem| {
            let kind = if problem.is_mistake { FaultKind::Mistake } else { FaultKind::Problem };
            Fault { file: problem.file.clone(), ..fault(kind, problem.text.clone()) }
        }));
        faults
    }

    pub fn to_json(&self) -> Value {
        let gpus: Vec<Value> = self.gpus.iter().map(Gpu::to_json).collect();
        json!({
            "schema": SCHEMA,
            "gpus": gpus,
            "driver": self.driver,
            "setup": {"reboot_required": self.reboot_required, "error": self.setup_error},
            "problems": self.problems().collect::<Vec<_>>(),
        })
    }
}

impl Gpu {
    fn read(
        kernel: &dyn Kernel,
        store: &Store,
        config: &Config,
        records: &[Record],
        mut slot: Slot,
        open: Option<&[User]>,
        problems: &mut Vec<Problem>,
    ) -> Gpu {
        let ours: Vec<&Record> = records.iter().filter(|r| r.slots().contains(&slot.id)).collect();
        let wedge = store.wedge(slot.id).map(|wedge| wedge.filter(|wedge| wedge.is_still_stuck(kernel)));
        let is_wedged = !matches!(wedge, Ok(None));
        let wedged = wedge.unwrap_or_else(|error| {
            problems.push(Problem::of_file(&error));
            None
        });
        let homes = slot.functions.iter().map(|function| {
            match ours.iter().find_map(|record| record.home_of(function.address)) {
                Some(home) => home.driver.clone(),
                None => home_without_record(config, &slot, function),
            }
        });
        let homes = homes.collect();
        // Next to a call they cannot be read.
        if !store.has_call(kernel, slot.id)
            && let Err(error) = slot.read_slow_attributes_asleep(kernel)
        {
            problems.push(Problem::from(format!("{}: reading its driver_override {error}", slot.id)));
        }
        let devices = Devices::of_slots(kernel, std::slice::from_ref(&slot), Reach::Slots);
        let is_blind = devices.is_blind;
        let users = open.filter(|_| !is_blind).map(|open| devices.holders_among(kernel, open));
        let foreign = Foreign::find(kernel, &slot, || is_wedged || store.has_call(kernel, slot.id));
        let has =
            if is_wedged || foreign.is_some() { Has::Wedged(vmid(&ours)) } else { who_has(kernel, &slot, &ours, open) };
        let owed = owed::of_slot(store, slot.id, wedged.as_ref());
        let before = store.dri();
        let now = dri::names(kernel).unwrap_or_default();
        let gpu = slot.gpu().map(|gpu| gpu.address).filter(|gpu| dri::differences(&before, &now).contains(gpu));
        let dri = gpu.map(|gpu| dri::in_words(&before, &now, gpu));
        let last = store.last(slot.id);
        let causes = match has {
            Has::None => elsewhere::behind(kernel, store, config, slot.id),
            _ => Vec::new(),
        };
        let causes = causes.iter().map(ToString::to_string).collect();
        let name = slot.gpu().and_then(|gpu| name(kernel, &ours, gpu, is_blind));
        let since = last.as_ref().and_then(|last| since(has, last));
        Gpu {
            name,
            since,
            has,
            homes,
            users,
            is_blind,
            owed,
            dri,
            causes,
            mappings: mapping::names_of(kernel, slot.id),
            last,
            wedged,
            foreign,
            slot,
            pinned: if let Has::Vm(id) = has { Pinned::read(kernel, config, id) } else { None },
            claims: Vec::new(),
        }
    }

    fn fault(&self) -> Option<Fault> {
        let slot = self.slot.id;
        let (kind, text) = match (self.has, &self.dri) {
            (Has::Wedged(_), _) => (FaultKind::Wedged, format!("{slot} is {}", self.has.word())),
            (Has::Stranded(_), _) => (FaultKind::Stranded, format!("{slot} is {}", self.has.word())),
            (Has::Host | Has::None, _) if !self.owed.is_empty() => {
                (FaultKind::Owed, format!("{slot} is owed: {}", owed::to_text(&self.owed)))
            }
            (Has::Host | Has::None, Some(dri)) => (FaultKind::Dri, dri.clone()),
            _ => return None,
        };
        Some(Fault { kind, slot: Some(slot), file: None, text })
    }

    fn to_json(&self) -> Value {
        let functions: Vec<Value> = self
            .slot
            .functions
            .iter()
            .zip(&self.homes)
            .map(|(function, home)| {
                json!({
                    "address": function.address.to_string(),
                    "class": format!("{:06x}", function.class),
                    "id": format!("{:04x}:{:04x}", function.vendor, function.device),
                    "driver": function.driver,
                    "home": home,
                    "override": function.driver_override,
                    "iommu_group": function.iommu_group,
                })
            })
            .collect();
        let mut value = json!({
            "slot": self.slot.id.to_string(),
            "name": self.name,
            "since": self.since,
            "owner": {"kind": self.has.word(), "vmid": self.has.vmid()},
            "functions": functions,
            "users": self.users.as_ref().map(|users| users.iter().map(user_to_json).collect::<Vec<_>>()),
            "wedged": self.wedged.as_ref().map(Wedge::told).or(self.foreign.as_ref().map(Foreign::to_json)),
            "owed": self.owed.iter().map(Owed::to_json).collect::<Vec<_>>(),
            "dri": self.dri,
            "causes": self.causes,
            "mappings": self.mappings,
            "guests": self.claims.iter().map(Claim::to_json).collect::<Vec<_>>(),
            "last": self.last,
        });
        if let Some(pinned) = &self.pinned {
            put(&mut value, "pinned", pinned.to_json());
        }
        value
    }
}

/// Who has something of any slot open; none when that cannot be told in time.
fn look(kernel: &dyn Kernel, slots: &[Slot], limit: Duration, problems: &mut Vec<Problem>) -> Option<Vec<User>> {
    let devices = [Devices::of_slots(kernel, slots, Reach::Slots), Devices::vfio_of_slots(kernel, slots)];
    if devices.iter().all(|devices| devices.is_idle(kernel)) {
        return Some(Vec::new());
    }
    match kernel.look(&Devices::sought(&devices), limit) {
        Ok(sight) => {
            if !sight.hidden.is_empty() {
                problems.push(Problem::from(format!("not seen is what these have open: {}", hidden(&sight.hidden))));
            }
            Some(sight.users)
        }
        Err(problem) => {
            problems.push(Problem::from(problem));
            None
        }
    }
}

/// As its driver says, or said when the card left; else by its id. A driver that is busy is not asked.
fn name(kernel: &dyn Kernel, records: &[&Record], gpu: &Function, is_busy: bool) -> Option<String> {
    let recorded = || records.iter().find_map(|record| record.home_of(gpu.address)?.model.clone());
    let by_driver = || if is_busy { None } else { model::by_driver(kernel, gpu.address) };
    recorded().or_else(by_driver).or_else(|| model::by_ids(kernel, gpu))
}

/// The last handoff is how it came to who has it now, if it went well.
fn since(has: Has, last: &Value) -> Option<String> {
    let text = |name: &str| last.get(name).and_then(Value::as_str);
    let vmid = last.get("vmid").and_then(Value::as_u64);
    let is_how = match has {
        Has::Vm(id) => text("direction") == Some("vfio") && vmid == Some(id.into()),
        Has::Manual => text("direction") == Some("vfio") && vmid.is_none(),
        Has::Host | Has::None => text("direction") == Some("home"),
        Has::Moving(_) | Has::Wedged(_) | Has::Stranded(_) => false,
    };
    let went_well = last.get("exit").and_then(Value::as_u64) == Some(0);
    text("time").filter(|_| is_how && went_well).map(str::to_string)
}

/// Where a function would be at home if it were handed over now.
fn home_without_record(config: &Config, slot: &Slot, function: &Function) -> Option<String> {
    match config.homes.get(&slot.id).filter(|_| function.is_nvidia_gpu()) {
        Some(Home::Driver(driver)) => Some(driver.clone()),
        Some(Home::None) => None,
        None => function.driver.clone(),
    }
}

fn vmid(records: &[&Record]) -> Option<u32> {
    records.iter().find_map(|record| record.owner.vmid())
}

fn who_has(kernel: &dyn Kernel, slot: &Slot, records: &[&Record], open: Option<&[User]>) -> Has {
    let vmid = vmid(records);
    let unfinished = records.iter().any(|record| record.progress != Progress::Away);
    if unfinished && under_way::is_under_way(kernel, Some(slot.id)) {
        return Has::Moving(vmid);
    }
    // A VM that has a node of the host's driver open, to draw on it, is a user, not the owner.
    let devices = Devices::vfio_of_slots(kernel, std::slice::from_ref(slot));
    let holders = devices.holders_among(kernel, open.unwrap_or_default());
    if let Some(id) = holders.iter().find_map(|h| if let Place::Vm(id) = h.place { Some(id) } else { None }) {
        return Has::Vm(id);
    }
    for record in records {
        if let (Owner::Vm(id), Progress::Away) = (&record.owner, record.progress)
            // Who may not see Proxmox's files has only the record to go by.
            && (open.is_none() || is_with(kernel, record, *id))
        {
            return Has::Vm(*id);
        }
    }
    if records.iter().any(|record| matches!(record.owner, Owner::Manual(_))) && !unfinished {
        return Has::Manual;
    }
    let is_home = |record: &&Record| {
        slot.functions.iter().all(|f| record.home_of(f.address).is_some_and(|home| home.driver == f.driver))
    };
    // Killed before it had moved anything, or after all was home.
    if !records.iter().all(is_home) {
        return Has::Stranded(vmid);
    }
    match slot.gpu().and_then(|gpu| gpu.driver.as_deref()) {
        None | Some(VFIO_PCI | "pci-stub") => Has::None,
        Some(_) => Has::Host,
    }
}

fn user_to_json(user: &Holder) -> Value {
    let (ctid, vmid, unit) = match &user.place {
        Place::Container(id) => (Some(id), None, None),
        Place::Vm(id) => (None, Some(id), None),
        Place::Unit(name) => (None, None, Some(name)),
        Place::Unknown => (None, None, None),
    };
    json!({"pid": user.process.pid, "command": user.command, "via": user.via, "mapped": user.how == How::Mapped, "ctid": ctid, "vmid": vmid, "unit": unit})
}
