//! The two files of the configuration: that of the cluster, and over it, key by key, the node's own. Either may be absent.

use super::keys;
use crate::address::SlotId;
use crate::sys::Kernel;
use serde_json::{Map, Value};
use std::io::ErrorKind;

/// The node's own.
pub const PATH: &str = "/etc/gpu-handoff/config.json";

/// For all nodes: pmxcfs has it on each. Absent as well while that is not mounted.
pub const CLUSTER: &str = "/etc/pve/gpu-handoff.json";

/// What is understood of each; null where there is none.
pub(super) struct Files {
    pub own: Value,
    cluster: Value,
    /// Which file, and a line on each key that is not understood, or on all of the cluster's.
    pub problems: Vec<(&'static str, String)>,
}

impl Files {
    /// # Errors
    /// One line, when nothing of the node's own can be understood.
    pub fn read(kernel: &dyn Kernel) -> Result<Files, String> {
        let mut problems = Vec::new();
        let mut add = |file, more: Vec<String>| problems.extend(more.into_iter().map(|problem| (file, problem)));
        let (own, mistakes) = read(kernel, PATH)?;
        add(PATH, mistakes);
        // Written elsewhere, maybe a moment ago: no reason to lose what holds here.
        let (cluster, mistakes) = read(kernel, CLUSTER).unwrap_or_else(|problem| (Value::Null, vec![problem]));
        add(CLUSTER, mistakes);
        Ok(Files { own, cluster, problems })
    }

    /// Those that are there.
    pub fn there(&self) -> Vec<&'static str> {
        let is_there = |(_, document): &(&'static str, &Value)| !document.is_null();
        [(PATH, &self.own), (CLUSTER, &self.cluster)].into_iter().filter(is_there).map(|(path, _)| path).collect()
    }

    /// What holds.
    pub fn merged(&self) -> Value {
        match (&self.cluster, &self.own) {
            (cluster, Value::Null) => cluster.clone(),
            (Value::Null, own) => own.clone(),
            (cluster, own) => merge(&with_slots_spelt_alike(cluster), &with_slots_spelt_alike(own)),
        }
    }

    /// Which of them says what is said under a key of what holds.
    pub fn who_says(&self, key: &str) -> &'static str {
        let own = if self.cluster.is_null() { self.own.clone() } else { with_slots_spelt_alike(&self.own) };
        let is_own = keys::effective(&own).iter().any(|(other, _, is_said)| other == key && *is_said);
        if is_own { PATH } else { CLUSTER }
    }
}

fn read(kernel: &dyn Kernel, path: &str) -> Result<(Value, Vec<String>), String> {
    let named = |problem: String| format!("{path}: {problem}");
    match kernel.read(path) {
        Ok(bytes) => {
            let (value, problems) = understood(&bytes).map_err(named)?;
            Ok((value, problems.into_iter().map(named).collect()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((Value::Null, Vec::new())),
        Err(error) => Err(named(error.to_string())),
    }
}

/// # Errors
/// What is wrong with all of it.
pub(super) fn understood(bytes: &[u8]) -> Result<(Value, Vec<String>), String> {
    let mut value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut problems = Vec::new();
    if !keys::weed(&mut value, &mut Vec::new(), &mut problems) {
        return Err(problems.concat());
    }
    Ok((value, problems))
}

/// What both have as objects counts key by key; otherwise what is above.
fn merge(below: &Value, above: &Value) -> Value {
    let (Value::Object(below), Value::Object(above)) = (below, above) else { return above.clone() };
    let mut all = below.clone();
    for (key, value) in above {
        let both = below.get(key).map(|below| merge(below, value));
        all.insert(key.clone(), both.unwrap_or_else(|| value.clone()));
    }
    Value::Object(all)
}

/// A slot is the same in every spelling.
fn with_slots_spelt_alike(document: &Value) -> Value {
    let mut document = document.clone();
    if let Some(Value::Object(gpus)) = document.get_mut("gpus") {
        let mut alike = Map::new();
        for (key, value) in std::mem::take(gpus) {
            alike.insert(SlotId::from_written(&key).map_or(key, |slot| slot.to_string()), value);
        }
        *gpus = alike;
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_nodes_own_counts_key_by_key() {
        let cluster = json!({"gpus": {"0000:01:00": {"home": "vfio-pci"}, "02:00": {"home": "none"}}, "time": {"stop_s": 30},
            "policy": {"unit": "stop", "units": {"a.service": {"release": ["/a"], "else": "stop"}, "b.service": "stop"}},
            "driver": {"runfile": "/x.run"}});
        let own = json!({"gpus": {"01:00": {"home": "auto"}}, "time": {"lock_s": 3}, "driver": {"runfile": null},
            "policy": {"unit": "refuse", "units": {"a.service": {"else": "refuse"}, "b.service": {"release": ["/b"]}}}});
        let merged = json!({"gpus": {"0000:01:00": {"home": "auto"}, "0000:02:00": {"home": "none"}},
            "time": {"stop_s": 30, "lock_s": 3}, "driver": {"runfile": null},
            "policy": {"unit": "refuse",
                "units": {"a.service": {"release": ["/a"], "else": "refuse"}, "b.service": {"release": ["/b"]}}}});
        let files =
            |own: &Value, cluster: &Value| Files { own: own.clone(), cluster: cluster.clone(), problems: vec![] };
        let both = files(&own, &cluster);
        assert_eq!(both.merged(), merged);
        for (key, who) in [
            ("gpus.0000:01:00.home", PATH),
            ("gpus.0000:02:00.home", CLUSTER),
            ("time.stop_s", CLUSTER),
            ("driver.runfile", PATH),
            ("policy.units.a.service.release", CLUSTER),
            ("policy.units.a.service.else", PATH),
        ] {
            assert_eq!(both.who_says(key), who, "{key}");
        }
        assert_eq!(files(&own, &Value::Null).merged(), own);
        assert_eq!(files(&Value::Null, &cluster).merged(), cluster);
        assert_eq!(files(&own, &Value::Null).who_says("gpus.01:00.home"), PATH);
    }
}
