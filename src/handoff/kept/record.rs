//! What cannot be read back from the kernel: who was given which slots, and where each function was at home.
//!
//! `/run/gpu-handoff/vm-ID` for a VM, `/run/gpu-handoff/manual-SLOT` for a handoff by hand. A reboot undoes every
//! handoff, so `/run` forgets with it.

use crate::address::{Address, NoAddress, SlotId};
use crate::gpu::inventory::Function;
use crate::gpu::model;
use crate::gpu::power::Power;
use crate::json::put;
use crate::proxmox::running;
use crate::sys::{Kernel, Process};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

const SCHEMA: u64 = 1;

/// The names of records of handoffs by hand begin with this.
pub(super) const MANUAL: &str = "manual-";

/// Who a record gives its slots to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    Vm(u32),
    /// A person, who named one slot.
    Manual(SlotId),
}

impl Owner {
    pub fn file_name(&self) -> String {
        match self {
            Owner::Vm(id) => format!("vm-{id}"),
            Owner::Manual(slot) => format!("{MANUAL}{slot}"),
        }
    }

    pub fn from_file_name(name: &str) -> Option<Owner> {
        if let Some(id) = name.strip_prefix("vm-") {
            return id.parse().ok().map(Owner::Vm);
        }
        name.strip_prefix(MANUAL)?.parse().ok().map(Owner::Manual)
    }

    pub fn vmid(&self) -> Option<u32> {
        match self {
            Owner::Vm(id) => Some(*id),
            Owner::Manual(_) => None,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Owner::Vm(id) => write!(f, "VM {id}"),
            Owner::Manual(_) => f.write_str("vfio-pci by hand"),
        }
    }
}

/// How far the handoff that the record is about has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// On its way to its owner.
    Leaving,
    /// With its owner.
    Away,
    /// On its way home.
    Returning,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub owner: Owner,
    pub progress: Progress,
    pub functions: Vec<HomeOf>,
    /// The VM's other devices, which Proxmox takes from the host when it starts (`policy.others`): where they were.
    pub others: Vec<HomeOf>,
    /// Modules of the GPU's driver that were loaded, in the order in which they must be loaded again.
    pub modules: Vec<String>,
    /// What was stopped for it and is to run again when the GPU is home, in the order in which it was stopped.
    pub stopped: Vec<Stopped>,
    /// Containers that are frozen while the GPU changes hands.
    pub frozen: Vec<u32>,
    /// The framebuffer console was on, and one of the functions had a framebuffer.
    pub console: bool,
    /// Who asked for it: while that process lives, the start that it belongs to may still be under way.
    pub caller: Option<Process>,
    /// The hook was called without Proxmox being at work on the VM: only its caller knows how that goes on.
    pub by_hand: bool,
    /// It comes home when the backup job has ended that ran when it left.
    pub for_backup: bool,
}

/// Something that ran and was stopped, so that it can be started again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stopped {
    Container(u32),
    Unit(String),
    /// That was shut down for another VM (`policy.vm_resume`).
    Vm(u32),
}

impl Stopped {
    pub fn to_json(&self) -> Value {
        match self {
            Stopped::Container(id) => json!({"container": id}),
            Stopped::Unit(name) => json!({"unit": name}),
            Stopped::Vm(id) => json!({"vm": id}),
        }
    }

    /// None when it is none of these.
    pub fn from_json(value: &Value) -> Option<Stopped> {
        match (value.get("container"), value.get("unit"), value.get("vm")) {
            (Some(id), None, None) => Some(Stopped::Container(id.as_u64()?.try_into().ok()?)),
            (None, Some(name), None) => Some(Stopped::Unit(name.as_str()?.to_string())),
            (None, None, Some(id)) => Some(Stopped::Vm(id.as_u64()?.try_into().ok()?)),
            _ => None,
        }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Stopped::Container(id) => write!(f, "container {id}"),
            Stopped::Unit(name) => f.write_str(name),
            Stopped::Vm(id) => write!(f, "VM {id}"),
        }
    }
}

/// Where one function was when it was first handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HomeOf {
    pub slot: SlotId,
    pub address: Address,
    /// Its driver; none when it had none.
    pub driver: Option<String>,
    /// The module of that driver.
    pub module: Option<String>,
    /// Whether it might sleep.
    pub power: Power,
    /// What its driver calls it, which nobody can ask while it is away.
    pub model: Option<String>,
}

impl HomeOf {
    /// Where it is now.
    pub fn now(kernel: &dyn Kernel, function: &Function) -> HomeOf {
        HomeOf {
            slot: function.address.slot,
            address: function.address,
            driver: function.driver.clone(),
            module: function.module.clone(),
            power: Power::read(kernel, function.address),
            model: model::of(kernel, function),
        }
    }

    fn to_json(&self) -> Value {
        let mut home = json!({
            "slot": self.slot.to_string(),
            "address": self.address.to_string(),
            "driver": self.driver,
            "module": self.module,
        });
        if !self.power.is_empty() {
            let power = json!({"control": self.power.control, "d3cold_allowed": self.power.d3cold_allowed});
            put(&mut home, "power", power);
        }
        if let Some(model) = &self.model {
            put(&mut home, "model", model.as_str());
        }
        home
    }
}

/// Whether a VM has what its record names, or is still being started.
pub fn is_with(kernel: &dyn Kernel, record: &Record, vmid: u32) -> bool {
    let is_starting = |caller: Process| kernel.process(caller.pid) == Some(caller);
    running::is_alive(kernel, vmid) || (record.progress == Progress::Away && record.caller.is_some_and(is_starting))
}

impl Record {
    /// Of nothing yet.
    pub fn new(owner: Owner) -> Record {
        Record {
            owner,
            progress: Progress::Leaving,
            functions: Vec::new(),
            others: Vec::new(),
            modules: Vec::new(),
            stopped: Vec::new(),
            frozen: Vec::new(),
            console: false,
            caller: None,
            by_hand: false,
            for_backup: false,
        }
    }

    pub fn slots(&self) -> Vec<SlotId> {
        let mut seen = BTreeSet::new();
        self.functions.iter().map(|f| f.slot).filter(|slot| seen.insert(*slot)).collect()
    }

    /// The VM's other devices as a record of their own, to be brought home once the GPU is; none without any.
    pub fn of_others(&self) -> Option<Record> {
        let functions = self.others.clone();
        (!functions.is_empty()).then(|| Record {
            functions,
            progress: Progress::Returning,
            ..Record::new(self.owner.clone())
        })
    }

    /// One slot to name in a message.
    pub fn slot(&self) -> String {
        self.functions.first().map_or_else(String::new, |f| f.slot.to_string())
    }

    /// The record as if it had never named these slots; none when nothing is left of it.
    pub fn without(&self, slots: &[SlotId]) -> Option<Record> {
        self.filtered(|function| !slots.contains(&function.slot))
    }

    /// The record as if it named only these slots; none when it names none of them.
    pub fn only(&self, slots: &[SlotId]) -> Option<Record> {
        self.filtered(|function| slots.contains(&function.slot))
    }

    fn filtered(&self, keep: impl Fn(&HomeOf) -> bool) -> Option<Record> {
        let functions: Vec<HomeOf> = self.functions.iter().filter(|f| keep(f)).cloned().collect();
        (!functions.is_empty()).then(|| Record { functions, ..self.clone() })
    }

    pub fn home_of(&self, address: Address) -> Option<&HomeOf> {
        self.functions.iter().find(|f| f.address == address)
    }

    pub fn to_json(&self) -> String {
        let homes = |list: &[HomeOf]| -> Value { list.iter().map(HomeOf::to_json).collect() };
        let mut document = json!({
            "schema": SCHEMA,
            "progress": progress_word(self.progress),
            "functions": homes(&self.functions),
            "modules": self.modules,
            "caller": self.caller.map(|caller| json!({"pid": caller.pid, "start": caller.start})),
        });
        if !self.others.is_empty() {
            put(&mut document, "others", homes(&self.others));
        }
        if !self.stopped.is_empty() {
            put(&mut document, "stopped", self.stopped.iter().map(Stopped::to_json).collect::<Value>());
        }
        if !self.frozen.is_empty() {
            put(&mut document, "frozen", self.frozen.clone());
        }
        if self.console {
            put(&mut document, "console", true);
        }
        if self.by_hand {
            put(&mut document, "by_hand", true);
        }
        if self.for_backup {
            put(&mut document, "for_backup", true);
        }
        document.to_string()
    }

    /// # Errors
    /// When the text is not a record, or one of a schema that this version does not know.
    pub fn parse(owner: Owner, bytes: &[u8]) -> Result<Record> {
        let value: Value = serde_json::from_slice(bytes)?;
        match value.get("schema").and_then(Value::as_u64) {
            Some(SCHEMA) => {}
            Some(schema) => bail!("schema {schema}: written by a newer gpu-handoff; install that version again"),
            None => bail!("schema: not a number"),
        }
        let progress = text(&value, "progress")?;
        let progress = progress_of(&progress).with_context(|| format!("progress: {progress:?} is unknown"))?;
        let list = |name: &str| value.get(name).and_then(Value::as_array).with_context(|| format!("{name}: no list"));
        let functions = list("functions")?.iter().map(parse_function).collect::<Result<_>>()?;
        let others = value.get("others").and_then(Value::as_array).into_iter().flatten();
        let others = others.map(|home| parse_function(home).context("others")).collect::<Result<_>>()?;
        let modules = list("modules")?
            .iter()
            .map(|m| m.as_str().map(str::to_string).context("modules: not a string"))
            .collect::<Result<_>>()?;
        let stopped = later_list(&value, "stopped", Stopped::from_json)?;
        let frozen = later_list(&value, "frozen", |id| id.as_u64()?.try_into().ok())?;
        // One without these is as good: there was nothing to tell, or an earlier version wrote it.
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let (console, by_hand, for_backup) = (flag("console"), flag("by_hand"), flag("for_backup"));
        let caller = value.get("caller").and_then(process);
        Ok(Record {
            owner,
            progress,
            functions,
            others,
            modules,
            stopped,
            frozen,
            console,
            caller,
            by_hand,
            for_backup,
        })
    }
}

/// The process that a record, a journal or a wedge names.
pub fn process(value: &Value) -> Option<Process> {
    let pid = value.get("pid")?.as_i64()?.try_into().ok()?;
    Some(Process { pid, start: value.get("start")?.as_u64()? })
}

/// A list that is not written when it is empty.
fn later_list<T>(value: &Value, name: &str, parse: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
    let Some(list) = value.get(name) else { return Ok(Vec::new()) };
    let list = list.as_array().with_context(|| format!("{name}: no list"))?;
    list.iter().map(|entry| parse(entry).with_context(|| format!("{name}: {entry} is not understood"))).collect()
}

fn parse_function(value: &Value) -> Result<HomeOf> {
    Ok(HomeOf {
        slot: parsed(value, "slot")?,
        address: parsed(value, "address")?,
        driver: optional(value, "driver")?,
        module: optional(value, "module")?,
        power: match value.get("power") {
            None | Some(Value::Null) => Power::default(),
            Some(power) => {
                Power { control: optional(power, "control")?, d3cold_allowed: optional(power, "d3cold_allowed")? }
            }
        },
        model: optional(value, "model")?,
    })
}

fn parsed<T: FromStr<Err = NoAddress>>(value: &Value, name: &str) -> Result<T> {
    let text = text(value, name)?;
    text.parse().with_context(|| format!("{name}: {text:?} is none"))
}

fn text(value: &Value, name: &str) -> Result<String> {
    optional(value, name)?.with_context(|| format!("{name}: missing"))
}

fn optional(value: &Value, name: &str) -> Result<Option<String>> {
    match value.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => bail!("{name}: expected a string, got {other}"),
    }
}

fn progress_word(progress: Progress) -> &'static str {
    match progress {
        Progress::Leaving => "leaving",
        Progress::Away => "away",
        Progress::Returning => "returning",
    }
}

fn progress_of(word: &str) -> Option<Progress> {
    [Progress::Leaving, Progress::Away, Progress::Returning].into_iter().find(|p| progress_word(*p) == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            owner: Owner::Vm(111),
            progress: Progress::Away,
            functions: vec![HomeOf {
                slot: "0000:01:00".parse().unwrap(),
                address: "0000:01:00.0".parse().unwrap(),
                driver: Some("nvidia".to_string()),
                module: None,
                power: Power { control: Some("auto".to_string()), d3cold_allowed: None },
                model: Some("NVIDIA GeForce RTX 4090".to_string()),
            }],
            others: vec![HomeOf {
                slot: "0000:05:00".parse().unwrap(),
                address: "0000:05:00.0".parse().unwrap(),
                driver: Some("xhci_hcd".to_string()),
                module: Some("xhci_pci".to_string()),
                power: Power::default(),
                model: None,
            }],
            modules: vec!["nvidia".to_string(), "nvidia_uvm".to_string()],
            stopped: vec![
                Stopped::Container(101),
                Stopped::Unit("nvidia-persistenced.service".to_string()),
                Stopped::Vm(112),
            ],
            frozen: vec![102],
            console: true,
            caller: Some(Process { pid: 812, start: 4711 }),
            by_hand: true,
            for_backup: true,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(Record::parse(Owner::Vm(111), record().to_json().as_bytes()).unwrap(), record());
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let text = r#"{"schema":1,"progress":"away","functions":[{"slot":"0000:01:00","address":"0000:01:00.0",
            "driver":"nvidia","module":null}],"modules":["nvidia","nvidia_uvm"],"caller":{"pid":812,"start":4711}}"#;
        let mut expected = record();
        (expected.console, expected.by_hand, expected.for_backup) = (false, false, false);
        (expected.stopped, expected.frozen, expected.others) = (Vec::new(), Vec::new(), Vec::new());
        expected.functions[0].power = Power::default();
        expected.functions[0].model = None;
        assert_eq!(Record::parse(Owner::Vm(111), text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn slots_come_once_in_the_order_of_the_functions() {
        let mut record = record();
        for slot in ["0000:02:00", "0000:01:00", "0000:00:00", "0000:02:00"] {
            record.functions.push(HomeOf { slot: slot.parse().unwrap(), ..record.functions[0].clone() });
        }
        let slots: Vec<String> = record.slots().iter().map(ToString::to_string).collect();
        assert_eq!(slots, ["0000:01:00", "0000:02:00", "0000:00:00"]);
    }

    #[test]
    fn others_are_on_their_way_home_whatever_the_gpu_is() {
        let others = record().of_others().unwrap();
        assert_eq!((others.functions, others.progress), (record().others, Progress::Returning));
        assert_eq!(Record::new(Owner::Vm(111)).of_others(), None);
    }

    #[test]
    fn what_is_not_understood_is_refused_and_named() {
        let problem = |text: &str| format!("{:#}", Record::parse(Owner::Vm(1), text.as_bytes()).unwrap_err());
        assert!(problem(&record().to_json().replace(r#""schema":1"#, r#""schema":2"#)).contains("schema 2"));
        assert!(problem(&record().to_json().replace("away", "lost")).contains(r#"progress: "lost" is unknown"#));
        assert!(problem(&record().to_json().replace(r#""nvidia","#, "7,")).contains("expected a string, got 7"));
        assert!(problem(&record().to_json().replace(r#"{"container":101}"#, "101")).contains("stopped: 101 is not"));
        let other = |from: &str, to: &str| problem(&record().to_json().replace(from, to));
        assert!(other(r#""0000:01:00""#, r#""1:0""#).contains(r#"slot: "1:0" is none"#));
        assert!(other("0000:01:00.0", "0000:01:00.x").contains(r#"address: "0000:01:00.x" is none"#));
        assert!(problem("{}").contains("schema"));
        assert!(problem("").contains("EOF"));
    }
}
