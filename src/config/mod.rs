//! `/etc/gpu-handoff/config.json`: policy for this node, and `/etc/pve/gpu-handoff.json`, for all of the cluster. Absent is
//! normal, every key has a default.

mod files;
mod keys;
pub mod pin;
mod policy;

pub use files::{CLUSTER, PATH};
pub use policy::{ForContainer, ForVm, Policy};

use crate::address::SlotId;
use crate::sys::Kernel;
use files::Files;
use pin::Pin;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The home driver of a slot's GPU where it is not simply what the GPU had: `gpus.SLOT.home`.
    pub homes: BTreeMap<SlotId, Home>,
    pub time: Time,
    pub policy: Policy,
    pub backup: Backup,
    pub driver: Driver,
    pub cuda: Cuda,
    /// `vms.VMID.pin`.
    pub pins: Vec<(u32, Pin)>,
    /// `metrics.textfile`: written at the end of whatever changes something.
    pub textfile: Option<String>,
    /// `notify.about`: what an administrator is told of by Proxmox's notifications.
    pub notify: Vec<String>,
    /// `vzdump.script`: called as this program is by vzdump, after it.
    pub vzdump: Option<String>,
}

/// How long what may take: `time`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Time {
    /// `time.handoff_s`: one handoff in one direction.
    pub handoff: Duration,
    /// `time.lock_s`: until another handoff ends.
    pub lock: Duration,
    /// `time.stop_s`: to stop all that uses a GPU, before the handoff's own time begins.
    pub stop: Duration,
    /// `time.backup_s`: until whoever uses a GPU has done so, with `policy.backup` set to `wait`.
    pub backup: Duration,
}

impl Default for Time {
    fn default() -> Time {
        let seconds = Duration::from_secs;
        Time { handoff: seconds(60), lock: seconds(10), stop: seconds(90), backup: seconds(600) }
    }
}

/// Where the driver's installer comes from: `driver`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Driver {
    /// `driver.runfile`: on this host.
    pub runfile: Option<String>,
    pub runfile_url: Option<String>,
    pub sha256: Option<String>,
    /// `driver.dkms`: modules for other kernels are dkms's business.
    pub dkms: bool,
    pub module: Module,
}

/// Which kind of kernel modules: `driver.module`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Module {
    /// By the generation of the GPUs.
    #[default]
    Auto,
    Open,
    Proprietary,
}

impl Driver {
    pub fn is_configured(&self) -> bool {
        self.runfile.is_some() || self.runfile_url.is_some()
    }
}

/// What is installed in containers beside the driver: `cuda`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cuda {
    /// None for the one that fits the driver and the distribution best.
    pub package: Option<String>,
    /// `cuda.repo`: what stands for NVIDIA's `…/compute/cuda/repos/`.
    pub repo: Option<String>,
}

/// `policy.backup`: whether a VM that is started only to be backed up is given its GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backup {
    /// If nobody uses it: nothing is stopped for a backup.
    Idle,
    Refuse,
    /// As at any start.
    Policy,
    /// As `Idle`, once nobody uses it any more.
    Wait,
}

/// A GPU's home as configured; `auto`, whatever it had, is the absence of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Home {
    Driver(String),
    None,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            homes: BTreeMap::new(),
            time: Time::default(),
            policy: Policy::default(),
            backup: Backup::Idle,
            driver: Driver::default(),
            cuda: Cuda::default(),
            pins: Vec::new(),
            textfile: None,
            notify: Vec::new(),
            vzdump: None,
        }
    }
}

impl Config {
    pub fn pin_of(&self, vmid: u32) -> Option<&Pin> {
        self.pins.iter().find(|(id, _)| *id == vmid).map(|(_, pin)| pin)
    }

    /// What can be understood, and a line on each key that cannot: it has its default, and no other key suffers.
    ///
    /// # Errors
    /// One line naming the file, when nothing of it can be understood.
    pub fn read(kernel: &dyn Kernel) -> Result<(Config, Vec<String>), String> {
        let files = Files::read(kernel)?;
        let problems = files.problems.iter().map(|(_, problem)| problem.clone());
        Ok((Config::of(&files.merged()), problems.collect()))
    }

    /// Of the node's own file alone, as far as it can be understood: what the cluster's says may be about another node.
    pub fn own(kernel: &dyn Kernel) -> Config {
        Files::read(kernel).map_or_else(|_| Config::default(), |files| Config::of(&files.own))
    }

    /// Which file has a mistake, and what it is.
    pub fn mistakes(kernel: &dyn Kernel) -> Vec<(&'static str, String)> {
        Files::read(kernel).map_or_else(|problem| vec![(PATH, problem)], |files| files.problems)
    }

    /// As a person wants it, who can fix it and try again.
    ///
    /// # Errors
    /// One line naming the file and the first key or line that is wrong.
    pub fn strict(kernel: &dyn Kernel) -> Result<Config, String> {
        let (config, problems) = Config::read(kernel)?;
        problems.into_iter().next().map_or(Ok(config), Err)
    }

    /// As one wants it who goes on all the same, and warns.
    pub fn lenient(kernel: &dyn Kernel) -> (Config, Vec<String>) {
        match Config::read(kernel) {
            Ok((config, problems)) => {
                (config, problems.iter().map(|problem| format!("{problem}; going on without it")).collect())
            }
            Err(problem) => (Config::default(), vec![format!("{problem}; going on with the defaults")]),
        }
    }

    /// # Errors
    /// What is wrong, by its path or line.
    pub fn parse(bytes: &[u8]) -> Result<Config, String> {
        let (value, problems) = files::understood(bytes)?;
        problems.into_iter().next().map_or_else(|| Ok(Config::of(&value)), Err)
    }

    fn of(value: &Value) -> Config {
        let defaults = Config::default();
        let seconds = |key: &str, default: Duration| {
            value.pointer(key).and_then(Value::as_f64).map_or(default, Duration::from_secs_f64)
        };
        let text = |key: &str| value.pointer(key).and_then(Value::as_str).map(str::to_string);
        let mut homes = BTreeMap::new();
        let gpus = value.get("gpus").and_then(Value::as_object).into_iter().flatten();
        for (slot, entry) in gpus.filter_map(|(key, entry)| Some((SlotId::from_written(key)?, entry))) {
            match entry.get("home").and_then(Value::as_str) {
                None | Some("auto") => {}
                Some("none") => drop(homes.insert(slot, Home::None)),
                Some(driver) => drop(homes.insert(slot, Home::Driver(driver.to_string()))),
            }
        }
        Config {
            homes,
            time: Time {
                handoff: seconds("/time/handoff_s", defaults.time.handoff),
                lock: seconds("/time/lock_s", defaults.time.lock),
                stop: seconds("/time/stop_s", defaults.time.stop),
                backup: seconds("/time/backup_s", defaults.time.backup),
            },
            policy: Policy::of(value),
            backup: match value.pointer("/policy/backup").and_then(Value::as_str) {
                Some("refuse") => Backup::Refuse,
                Some("policy") => Backup::Policy,
                Some("wait") => Backup::Wait,
                _ => defaults.backup,
            },
            driver: Driver {
                runfile: text("/driver/runfile"),
                runfile_url: text("/driver/runfile_url"),
                sha256: text("/driver/sha256"),
                dkms: value.pointer("/driver/dkms").and_then(Value::as_bool).unwrap_or_default(),
                module: match value.pointer("/driver/module").and_then(Value::as_str) {
                    Some("open") => Module::Open,
                    Some("proprietary") => Module::Proprietary,
                    _ => Module::Auto,
                },
            },
            cuda: Cuda { package: text("/cuda/package"), repo: text("/cuda/repo") },
            pins: pin::all(value),
            textfile: text("/metrics/textfile"),
            notify: words(value.pointer("/notify/about")),
            vzdump: text("/vzdump/script"),
        }
    }
}

fn words(list: Option<&Value>) -> Vec<String> {
    let words = list.and_then(Value::as_array).into_iter().flatten();
    words.filter_map(|word| word.as_str().map(str::to_string)).collect()
}

/// The files that there are; the node's own where there is none.
pub fn files(kernel: &dyn Kernel) -> Vec<&'static str> {
    let there = Files::read(kernel).map(|files| files.there()).unwrap_or_default();
    if there.is_empty() { vec![PATH] } else { there }
}

/// A key with its value, and which file says so; none where that is the default.
pub type Holding = (String, Value, Option<&'static str>);

/// Every key; those for a slot or a container where a file has them.
///
/// # Errors
/// As [`Config::read`].
pub fn effective(kernel: &dyn Kernel) -> Result<Vec<Holding>, String> {
    let files = Files::read(kernel)?;
    let all = keys::effective(&files.merged()).into_iter();
    Ok(all.map(|(key, value, is_said)| (key.clone(), value, is_said.then(|| files.who_says(&key)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(text: &str) -> SlotId {
        text.parse().unwrap()
    }

    fn problem(text: &str) -> String {
        Config::parse(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn the_documented_defaults_are_valid_and_change_nothing() {
        let text = r#"{"gpus":{"0000:01:00":{"home":"auto"}},
            "time":{"handoff_s":60,"lock_s":10,"stop_s":90},
            "policy":{"process":"refuse","unit":"refuse","nvidia_services":"stop","container":"refuse",
              "containers":{},"others":"leave","backup":"idle","ct_without_gpu":"start"},
            "driver":{"runfile":null,"runfile_url":null,"sha256":null,"dkms":false,"module":"auto"},
            "cuda":{"package":null,"repo":null},"metrics":{"textfile":null}}"#;
        assert_eq!(Config::parse(text.as_bytes()).unwrap(), Config::default());
        assert_eq!(Config::parse(b"{}").unwrap(), Config::default());
    }

    #[test]
    fn values_are_taken() {
        let config = Config::parse(
            br#"{"gpus":{"0000:01:00":{"home":"none"},"0000:02:00":{"home":"nouveau"}},"time":{"lock_s":0.5},
                "policy":{"backup":"refuse"}}"#,
        );
        let config = config.unwrap();
        assert_eq!(config.homes[&slot("0000:01:00")], Home::None);
        assert_eq!(config.homes[&slot("0000:02:00")], Home::Driver("nouveau".to_string()));
        assert_eq!(config.time.lock, Duration::from_millis(500));
        assert_eq!(config.backup, Backup::Refuse);
        assert_eq!(Config::parse(br#"{"policy":{"backup":"policy"}}"#).unwrap().backup, Backup::Policy);
    }

    #[test]
    fn what_is_installed_in_containers() {
        let config = Config::parse(
            br#"{"driver":{"runfile":"/root/x.run","runfile_url":"http://a/b","sha256":"00"},
                "cuda":{"package":"cuda-nvcc-13-0","repo":"file:/mirror"}}"#,
        );
        let config = config.unwrap();
        assert_eq!(config.driver.runfile.as_deref(), Some("/root/x.run"));
        assert_eq!(config.driver.runfile_url.as_deref(), Some("http://a/b"));
        assert_eq!(config.driver.sha256.as_deref(), Some("00"));
        assert_eq!(config.cuda, Cuda { package: Some("cuda-nvcc-13-0".into()), repo: Some("file:/mirror".into()) });
    }

    #[test]
    fn mistakes_are_named_by_their_path() {
        assert_eq!(problem(r#"{"time":{"lock":3}}"#), "time.lock: unknown key");
        assert!(problem(r#"{"gpus":{"0000:01:00":{"home":"amdgpu"}}}"#).starts_with("gpus.0000:01:00.home: expected"));
        assert!(problem(r#"{"time":{"lock_s":"3"}}"#).contains("time.lock_s: expected seconds"));
        assert_eq!(problem(r#"{"time":{"lock_s":0.05}}"#), "time.lock_s: expected seconds from 0.1 to 3600, got 0.05");
        assert_eq!(
            problem(r#"{"time":{"handoff_s":0.9}}"#),
            "time.handoff_s: expected seconds from 1 to 3600, got 0.9"
        );
        assert_eq!(
            Config::parse(br#"{"time":{"handoff_s":1,"lock_s":0.1}}"#)
                .map(|config| (config.time.handoff, config.time.lock)),
            Ok((Duration::from_secs(1), Duration::from_millis(100)))
        );
        assert!(problem(r#"{"time":{"lock_s":-1}}"#).contains("time.lock_s: expected seconds"));
        assert_eq!(
            problem(r#"{"policy":{"containers":{"99999999999":"stop"}}}"#),
            "policy.containers.99999999999: unknown key"
        );
        assert!(problem(r#"{"policy":7}"#).contains("policy: expected an object"));
        assert_eq!(problem(r#"{"a\nb":1}"#), r"a\nb: unknown key");
        assert!(problem("[]").contains("the document: expected an object"));
        assert!(problem("{").contains("line 1"));
    }

    #[test]
    fn a_slot_is_the_same_in_every_spelling() {
        for key in ["0000:0a:00", "0000:0A:00", "0a:00", "0A:00"] {
            let config = Config::parse(format!(r#"{{"gpus":{{"{key}":{{"home":"none"}}}}}}"#).as_bytes()).unwrap();
            assert_eq!(config.homes.into_iter().collect::<Vec<_>>(), [(slot("0000:0a:00"), Home::None)], "{key}");
        }
        let twice = problem(r#"{"gpus":{"0A:00":{"home":"none"},"0000:0a:00":{"home":"auto"}}}"#);
        assert_eq!(twice, "gpus.0A:00: the same slot as 0000:0a:00");
    }

    #[test]
    fn what_is_no_slot_is_named() {
        for key in ["gpu", "0a", "0000:0a:00.0", "0a:00.1", "0a:00.", "0000:0a:00:00", "", "0000:0a:0x"] {
            let found = problem(&format!(r#"{{"gpus":{{"{key}":{{"home":"none"}}}}}}"#));
            assert_eq!(found, format!("gpus.{key}: no slot; a slot is written like 0000:01:00"));
        }
    }
}
