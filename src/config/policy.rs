//! `policy`: what becomes of those who use a GPU when a VM takes it.

use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `policy.process` is `kill`.
    pub kill_processes: bool,
    /// `policy.unit` is `stop`.
    pub stop_units: bool,
    /// `policy.nvidia_services` is `stop`.
    pub stop_nvidia_services: bool,
    units: Vec<(String, Own<bool>)>,
    container: ForContainer,
    containers: Vec<(u32, Own<ForContainer>)>,
    vm: ForVm,
    vms: Vec<(u32, ForVm)>,
    /// One that was shut down for another is started again after that.
    pub vm_resume: bool,
    /// `policy.others` is `home`.
    pub brings_others_home: bool,
    /// `policy.ct_without_gpu` is `refuse`: a container whose GPU a VM has does not start.
    pub refuse_ct_without_gpu: bool,
    /// Of [`Policy::for_idle`]: what else is configured does not count.
    pub is_for_idle: bool,
}

/// What is said of one alone: a word, or an object with `release` and `else`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Own<T> {
    /// None: as for all.
    policy: Option<T>,
    /// A program, by its absolute path, and its arguments.
    release: Vec<String>,
}

/// What becomes of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForContainer {
    /// One that uses the GPU keeps it; one that could is frozen for the moment in which the GPU changes hands.
    Refuse,
    /// One that uses the GPU is stopped, and started again when the GPU is back; one that could is frozen as above.
    Stop,
    /// As `Refuse`, but never frozen.
    Leave,
}

/// What becomes of a VM that has the GPU when another VM starts that takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForVm {
    /// It keeps the GPU.
    Refuse,
    /// It is shut down, and keeps the GPU if it does not do so in time.
    Shutdown,
    /// It is shut down, and stopped hard if it does not do so in time.
    Stop,
}

impl Policy {
    /// Of a document that was weeded.
    pub(super) fn of(document: &Value) -> Policy {
        let defaults = Policy::default();
        let word = |key: &str| document.pointer(&format!("/policy/{key}")).and_then(Value::as_str);
        let is = |key: &str, wanted: &str, default: bool| word(key).map_or(default, |word| word == wanted);
        let each = |key: &str| document.pointer(key).and_then(Value::as_object).into_iter().flatten();
        let units = each("/policy/units").map(|(name, own)| (name.clone(), Own::of(own, |word| Some(word == "stop"))));
        let containers = each("/policy/containers");
        let vms = each("/policy/vms");
        Policy {
            kill_processes: is("process", "kill", defaults.kill_processes),
            stop_units: is("unit", "stop", defaults.stop_units),
            stop_nvidia_services: is("nvidia_services", "stop", defaults.stop_nvidia_services),
            units: units.collect(),
            container: word("container").and_then(for_container).unwrap_or(defaults.container),
            containers: containers
                .filter_map(|(id, own)| Some((id.parse().ok()?, Own::of(own, for_container))))
                .collect(),
            vm: word("vm").and_then(for_vm).unwrap_or(defaults.vm),
            vms: vms.filter_map(|(id, word)| Some((id.parse().ok()?, for_vm(word.as_str()?)?))).collect(),
            vm_resume: document.pointer("/policy/vm_resume").and_then(Value::as_bool).unwrap_or(defaults.vm_resume),
            brings_others_home: is("others", "home", defaults.brings_others_home),
            refuse_ct_without_gpu: is("ct_without_gpu", "refuse", defaults.refuse_ct_without_gpu),
            is_for_idle: false,
        }
    }

    /// As it is for one who takes the GPU only if nobody uses it; NVIDIA's services do not count as use.
    #[must_use]
    pub fn for_idle(&self) -> Policy {
        Policy {
            stop_nvidia_services: self.stop_nvidia_services,
            brings_others_home: self.brings_others_home,
            is_for_idle: true,
            ..Policy::default()
        }
    }

    /// `policy.containers.CTID`, else `policy.container`.
    pub fn for_container(&self, ctid: u32) -> ForContainer {
        of(&self.containers, &ctid).and_then(|own| own.policy).unwrap_or(self.container)
    }

    /// `policy.units.UNIT`, else `policy.nvidia_services` for one of NVIDIA's and `policy.unit` for others.
    pub fn stops_unit(&self, unit: &str, is_nvidias: bool) -> bool {
        let for_all = if is_nvidias { self.stop_nvidia_services } else { self.stop_units };
        self.unit(unit).and_then(|own| own.policy).unwrap_or(for_all)
    }

    /// `policy.vms.VMID`, else `policy.vm`.
    pub fn for_vm(&self, vmid: u32) -> ForVm {
        of(&self.vms, &vmid).copied().unwrap_or(self.vm)
    }

    /// What a container is asked with to let go of the GPU: a program in the container, and its arguments. Empty: nothing.
    pub fn release_of_container(&self, ctid: u32) -> &[String] {
        of(&self.containers, &ctid).map_or(&[], |own| &own.release)
    }

    /// As [`Policy::release_of_container`], of a unit; the program is the host's.
    pub fn release_of_unit(&self, unit: &str) -> &[String] {
        self.unit(unit).map_or(&[], |own| &own.release)
    }

    /// The key that decides whether a container is stopped.
    pub fn key_of_container(&self, ctid: u32) -> String {
        let own = of(&self.containers, &ctid);
        own.map_or("policy.container".to_string(), |own| format!("policy.containers.{ctid}{}", own.end_of_key()))
    }

    /// The key that decides whether a unit is stopped.
    pub fn key_of_unit(&self, unit: &str, is_nvidias: bool) -> String {
        let for_all = if is_nvidias { "policy.nvidia_services" } else { "policy.unit" };
        let own = self.unit(unit);
        own.map_or(for_all.to_string(), |own| format!("policy.units.{unit}{}", own.end_of_key()))
    }

    fn unit(&self, unit: &str) -> Option<&Own<bool>> {
        self.units.iter().find(|(name, _)| name == unit).map(|(_, own)| own)
    }
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            kill_processes: false,
            stop_units: false,
            stop_nvidia_services: true,
            units: Vec::new(),
            container: ForContainer::Refuse,
            containers: Vec::new(),
            vm: ForVm::Refuse,
            vms: Vec::new(),
            vm_resume: false,
            brings_others_home: false,
            refuse_ct_without_gpu: false,
            is_for_idle: false,
        }
    }
}

impl<T> Own<T> {
    fn of(value: &Value, meaning: impl Fn(&str) -> Option<T>) -> Own<T> {
        let word = value.as_str().or_else(|| value.get("else")?.as_str());
        let release = value.get("release").and_then(Value::as_array).into_iter().flatten();
        let release = release.filter_map(Value::as_str).map(str::to_string).collect();
        Own { policy: word.and_then(meaning), release }
    }

    fn end_of_key(&self) -> &'static str {
        if self.release.is_empty() { "" } else { ".else" }
    }
}

fn of<'a, T>(all: &'a [(u32, T)], id: &u32) -> Option<&'a T> {
    all.iter().find(|(one, _)| one == id).map(|(_, own)| own)
}

fn for_vm(word: &str) -> Option<ForVm> {
    match word {
        "refuse" => Some(ForVm::Refuse),
        "shutdown" => Some(ForVm::Shutdown),
        "stop" => Some(ForVm::Stop),
        _ => None,
    }
}

fn for_container(word: &str) -> Option<ForContainer> {
    match word {
        "refuse" => Some(ForContainer::Refuse),
        "stop" => Some(ForContainer::Stop),
        "leave" => Some(ForContainer::Leave),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_container_has_its_own_policy_or_that_of_all() {
        let text = br#"{"policy":{"process":"kill","unit":"stop","nvidia_services":"refuse","container":"leave",
            "containers":{"101":"stop","102":"refuse"},"ct_without_gpu":"refuse"},"time":{"stop_s":5}}"#;
        let config = Config::parse(text).unwrap();
        assert_eq!(config.time.stop, Duration::from_secs(5));
        let policy = config.policy;
        assert_eq!(policy.for_container(101), ForContainer::Stop);
        assert_eq!(policy.for_container(102), ForContainer::Refuse);
        assert_eq!(policy.for_container(103), ForContainer::Leave);
        assert!(policy.kill_processes && policy.stop_units && !policy.stop_nvidia_services);
        assert!(policy.refuse_ct_without_gpu && !Policy::default().refuse_ct_without_gpu);
        assert_eq!(Policy::default().for_container(101), ForContainer::Refuse);
    }

    #[test]
    fn one_is_asked_to_let_go_and_has_a_policy_of_its_own() {
        let text = br#"{"policy":{"units":{
            "a.service":{"release":["/bin/a","-x"],"else":"stop"},"b.service":{"release":["/bin/b"]},
            "c.service":"stop","d.service":{"else":"stop"},"dcgm.service":"refuse"},
            "containers":{"101":{"release":["/bin/c"],"else":"stop"},"102":{"release":["/bin/d"]}}}}"#;
        let policy = Config::parse(text).unwrap().policy;
        assert_eq!(policy.release_of_unit("a.service"), ["/bin/a", "-x"]);
        assert_eq!(policy.release_of_unit("c.service"), [""; 0]);
        assert_eq!(policy.release_of_container(101), ["/bin/c"]);
        let stopped = ["a.service", "b.service", "c.service", "d.service", "e.service"]
            .map(|unit| policy.stops_unit(unit, false));
        assert_eq!(stopped, [true, false, true, true, false]);
        assert_eq!([policy.stops_unit("dcgm.service", true), policy.stops_unit("x", true)], [false, true]);
        assert_eq!([policy.for_container(101), policy.for_container(102)], [ForContainer::Stop, ForContainer::Refuse]);
        let keys = ["b.service", "c.service", "e.service"].map(|unit| policy.key_of_unit(unit, false));
        assert_eq!(keys, ["policy.units.b.service.else", "policy.units.c.service", "policy.unit"]);
        let keys = [101, 103].map(|ctid| policy.key_of_container(ctid));
        assert_eq!(keys, ["policy.containers.101.else", "policy.container"]);
        assert_eq!(policy.for_idle().release_of_unit("a.service"), [""; 0]);
    }
}
