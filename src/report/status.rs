//! `gpu-handoff --status`: every NVIDIA slot, who has it, who uses it, how its last handoff went. Reads only.

use super::history::{result, way};
use crate::address::SlotId;
use crate::config::{Config, Home};
use crate::gpu::dri;
use crate::gpu::foreign::Foreign;
use crate::gpu::holders::{Devices, Holder, Place, Reach, hidden};
use crate::gpu::inventory::{Function, Slot, VFIO_PCI, nvidia_slots};
use crate::handoff::kept::owed::{self, Owed};
use crate::handoff::kept::record::is_with;
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::kept::store::Store;
use crate::handoff::kept::under_way;
use crate::handoff::kept::wedge::Wedge;
use crate::handoff::way::elsewhere;
use crate::proxmox::mapping;
use crate::setup::kept::pending::Pending;
use crate::sys::{How, Kernel, User};
use serde_json::{Value, json};
use std::fmt::Write;

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
    fn word(self) -> &'static str {
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
    fn has_it(self) -> bool {
        matches!(self, Has::Vm(_) | Has::Manual)
    }

    fn vmid(self) -> Option<u32> {
        match self {
            Has::Vm(id) => Some(id),
            Has::Moving(id) | Has::Wedged(id) | Has::Stranded(id) => id,
            Has::Host | Has::Manual | Has::None => None,
        }
    }
}

/// What a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Wedged,
    Stranded,
    Owed,
    /// Nodes in /dev/dri that are others than before.
    Dri,
    Reboot,
    SetUp,
    /// What could not be read or understood.
    Problem,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub kind: Kind,
    pub slot: Option<SlotId>,
    pub text: String,
}

pub struct Status {
    gpus: Vec<Gpu>,
    sees_all: bool,
    reboot_required: bool,
    /// Why set-up is not done with.
    setup_error: Option<String>,
    problems: Vec<String>,
}

struct Gpu {
    slot: Slot,
    has: Has,
    /// By function: its home, as recorded or, without a record, as configured, else where it is.
    homes: Vec<Option<String>>,
    /// None when this process may not see who uses it, or the driver is busy.
    users: Option<Vec<Holder>>,
    is_blind: bool,
    wedged: Option<Wedge>,
    /// A remove that hangs and is none of ours.
    foreign: Option<Foreign>,
    owed: Vec<Owed>,
    /// It has other nodes in /dev/dri than before a card left.
    dri: Option<String>,
    /// What acts at boot and keeps it from its home, with what to type.
    causes: Vec<String>,
    /// Resource mappings that may stand for it on this node.
    mappings: Vec<String>,
    last: Option<Value>,
}

impl Status {
    /// `sees_all`: whether this process may look into every other one (root may). What cannot be read is a problem,
    /// not a failure: the rest can still be told.
    pub fn read(kernel: &dyn Kernel, store: &Store, sees_all: bool) -> Status {
        let mut problems = Vec::new();
        let mut records = Vec::new();
        for record in store.each_record() {
            match record {
                Ok(record) => records.push(record),
                Err(error) => problems.push(format!("{error:#}")),
            }
        }
        let (config, mistakes) = Config::lenient(kernel);
        problems.extend(mistakes);
        let setup_error = match Pending::read(kernel) {
            Ok(pending) => pending.why(),
            Err(error) => Some(format!("{error:#}")),
        };
        let slots = nvidia_slots(kernel);
        let open = if sees_all { look(kernel, &config, &slots, &mut problems) } else { None };
        let users = open.as_deref();
        let gpus =
            slots.into_iter().map(|slot| Gpu::read(kernel, store, &config, &records, slot, users, &mut problems));
        Status {
            gpus: gpus.collect(),
            sees_all,
            reboot_required: kernel
                .text("/run/reboot-required.pkgs")
                .is_some_and(|packages| packages.lines().any(|package| package == "gpu-handoff")),
            setup_error,
            problems,
        }
    }

    /// Files of ours that could not be read or understood.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub fn add_problems(&mut self, problems: Vec<String>) {
        self.problems.extend(problems);
    }

    /// What is not as it should be. A handoff that is under way may owe what it likes.
    pub fn faults(&self) -> Vec<String> {
        self.each_fault().into_iter().map(|fault| fault.text).collect()
    }

    /// As [`Status::faults`], with what each is about.
    pub fn each_fault(&self) -> Vec<Fault> {
        let fault = |kind, text: String| Fault { kind, slot: None, text };
        let mut faults: Vec<Fault> = self.gpus.iter().filter_map(Gpu::fault).collect();
        if self.reboot_required {
            faults.push(fault(Kind::Reboot, "a reboot is required".to_string()));
        }
        faults.extend(self.setup_error.iter().map(|why| fault(Kind::SetUp, format!("set-up is not done: {why}"))));
        faults.extend(self.problems.iter().map(|problem| fault(Kind::Problem, problem.clone())));
        faults
    }

    pub fn to_json(&self) -> Value {
        let gpus: Vec<Value> = self.gpus.iter().map(Gpu::to_json).collect();
        json!({
            "schema": SCHEMA,
            "gpus": gpus,
            "setup": {"reboot_required": self.reboot_required, "error": self.setup_error},
            "problems": self.problems,
        })
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for gpu in &self.gpus {
            gpu.write_text(&mut text, if self.sees_all { "that could not be seen" } else { "only root may see that" });
        }
        if self.gpus.is_empty() {
            text.push_str("no NVIDIA GPU in this host\n");
        }
        if self.reboot_required {
            text.push_str("reboot required: the host preparation takes effect with the next boot\n");
        }
        if let Some(why) = &self.setup_error {
            text.push_str(&format!("set-up is not done: {why}\n"));
        }
        text
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
        problems: &mut Vec<String>,
    ) -> Gpu {
        let ours: Vec<&Record> = records.iter().filter(|r| r.slots().contains(&slot.id)).collect();
        let wedge = store.wedge(slot.id).map(|wedge| wedge.filter(|wedge| wedge.is_still_stuck(kernel)));
        let is_wedged = !matches!(wedge, Ok(None));
        let wedged = wedge.unwrap_or_else(|error| {
            problems.push(format!("{error:#}"));
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
            problems.push(format!("{}: reading its driver_override {error}", slot.id));
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
        let mappings = mapping::names_of(kernel, slot.id);
        Gpu { has, homes, users, is_blind, owed, dri, causes, mappings, last, wedged, foreign, slot }
    }

    fn fault(&self) -> Option<Fault> {
        let slot = self.slot.id;
        let (kind, text) = match (self.has, &self.dri) {
            (Has::Wedged(_), _) => (Kind::Wedged, format!("{slot} is {}", self.has.word())),
            (Has::Stranded(_), _) => (Kind::Stranded, format!("{slot} is {}", self.has.word())),
            (Has::Host | Has::None, _) if !self.owed.is_empty() => {
                (Kind::Owed, format!("{slot} is owed: {}", owed::to_text(&self.owed)))
            }
            (Has::Host | Has::None, Some(dri)) => (Kind::Dri, dri.clone()),
            _ => return None,
        };
        Some(Fault { kind, slot: Some(slot), text })
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
        json!({
            "slot": self.slot.id.to_string(),
            "owner": {"kind": self.has.word(), "vmid": self.has.vmid()},
            "functions": functions,
            "users": self.users.as_ref().map(|users| users.iter().map(user_to_json).collect::<Vec<_>>()),
            "wedged": self.wedged.as_ref().map(Wedge::to_json).or(self.foreign.as_ref().map(Foreign::to_json)),
            "owed": self.owed.iter().map(Owed::to_json).collect::<Vec<_>>(),
            "dri": self.dri,
            "causes": self.causes,
            "mappings": self.mappings,
            "last": self.last,
        })
    }

    /// `unseen`: why it is not known who uses it.
    fn write_text(&self, text: &mut String, unseen: &str) {
        let owner = match (self.has, self.has.vmid()) {
            (Has::Vm(id), _) => format!("VM {id}"),
            (has, Some(id)) => format!("{} (VM {id})", has.word()),
            (has, None) => has.word().to_string(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}  {owner}", self.slot.id);
        for (function, home) in self.slot.functions.iter().zip(&self.homes) {
            let driver = function.driver.as_deref().unwrap_or("no driver");
            let home = home.as_deref().unwrap_or("no driver");
            let away = if driver == home { String::new() } else { format!("  home {home}") };
            let group = function.iommu_group.map_or_else(|| "no IOMMU group".to_string(), |g| format!("group {g}"));
            let line = format!(
                "  .{:x}  {:<7}  {:04x}:{:04x}  {:<9}  {driver:<13}{away}",
                function.address.function,
                function.kind(),
                function.vendor,
                function.device,
                group
            );
            let _ = writeln!(text, "{}", line.trim_end());
        }
        if !self.mappings.is_empty() {
            let _ = writeln!(text, "  mapping  {}", self.mappings.join(", "));
        }
        match &self.users {
            Some(users) => {
                for user in users {
                    let _ = writeln!(text, "  used by  {user}");
                }
            }
            None if self.is_blind => {
                text.push_str("  used by  unknown: the NVIDIA driver is busy and does not answer\n")
            }
            None => text.push_str(&format!("  used by  unknown: {unseen}\n")),
        }
        if let Some(wedged) = &self.wedged {
            let _ = writeln!(text, "  wedged   {wedged}");
        }
        if let Some(foreign) = &self.foreign {
            let _ = writeln!(text, "  wedged   {foreign}");
        }
        if !self.owed.is_empty() {
            let when = if self.has.has_it() { " when it is home" } else { "" };
            let _ = writeln!(text, "  owed     {}{when}", owed::to_text(&self.owed));
        }
        if let Some(dri) = &self.dri {
            let _ = writeln!(text, "  nodes    {dri}");
        }
        for cause in &self.causes {
            let _ = writeln!(text, "  cause    {cause}");
        }
        if let Has::Stranded(_) = self.has {
            let _ = writeln!(text, "  mend     gpu-handoff to-nvidia {}", self.slot.id);
        }
        if let Some(last) = &self.last {
            let _ = writeln!(text, "  last     {}", describe_last(last));
        }
    }
}

/// Who has something of any slot open; none when that cannot be told in time.
fn look(kernel: &dyn Kernel, config: &Config, slots: &[Slot], problems: &mut Vec<String>) -> Option<Vec<User>> {
    let devices = [Devices::of_slots(kernel, slots, Reach::Slots), Devices::vfio_of_slots(kernel, slots)];
    if devices.iter().all(|devices| devices.is_idle(kernel)) {
        return Some(Vec::new());
    }
    match kernel.look(&Devices::sought(&devices), config.handoff / 2) {
        Ok(sight) => {
            if !sight.hidden.is_empty() {
                problems.push(format!("not seen is what these have open: {}", hidden(&sight.hidden)));
            }
            Some(sight.users)
        }
        Err(problem) => {
            problems.push(problem);
            None
        }
    }
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

/// `host -> VM 111 in 84 ms (check 10, release 20; back: clear 54), failed`
fn describe_last(last: &Value) -> String {
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0);
    let word = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).unwrap_or("?").to_string();
    let phases = last.get("phases").and_then(Value::as_array).into_iter().flatten();
    let (back, there): (Vec<_>, Vec<_>) = phases.partition(|phase| word(phase, "way") == "back");
    let listed = |phases: Vec<&Value>| {
        let each: Vec<String> =
            phases.iter().map(|one| format!("{} {}", word(one, "name"), number(one, "ms"))).collect();
        each.join(", ")
    };
    let back = if back.is_empty() { String::new() } else { format!("; back: {}", listed(back)) };
    let end = if number(last, "exit") == 0 { String::new() } else { format!(", {}", result(last)) };
    format!("{} in {} ms ({}{back}){end}", way(last), number(last, "ms"), listed(there))
}
