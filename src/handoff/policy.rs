//! Who must go before a GPU leaves the host, and who refuses it: the administrator's policy. Pure.

use super::record::Stopped;
use crate::config::{ForContainer, Policy};
use crate::gpu::holders::{Holder, Place, is_service};
use std::fmt;

/// One that must go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Halt {
    /// Stopped in order, and started again when the GPU is back.
    Stop(Stopped),
    /// Asked to end, then killed. Nobody can start it again.
    Kill { pid: i32, command: String },
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Halt::Stop(what) => write!(f, "stop {what}"),
            Halt::Kill { pid, command } => write!(f, "kill PID {pid} ({command})"),
        }
    }
}

/// NVIDIA's services and those around them that use every GPU all the time, without the `.service`.
const NVIDIA_SERVICES: [&str; 11] = [
    "dcgm-exporter",
    "nvidia-dcgm-exporter",
    "nvidia_gpu_exporter",
    "nvidia-gpu-exporter",
    "nvidia-smi-exporter",
    "nvidia-dcgm",
    "dcgm",
    "nv-hostengine",
    "nvidia-fabricmanager",
    "nvidia-powerd",
    "nvidia-persistenced",
];

pub fn is_nvidia_service(unit: &str) -> bool {
    unit.strip_suffix(".service").is_some_and(|name| NVIDIA_SERVICES.contains(&name))
}

pub fn nvidia_services() -> impl Iterator<Item = String> {
    NVIDIA_SERVICES.iter().map(|name| format!("{name}.service"))
}

/// In the order in which they are stopped. `services` are NVIDIA's services that run: they look at every GPU time and
/// again, so they go whether they have it open at this moment or not.
///
/// # Errors
/// Those that keep the GPU; then nobody is stopped.
pub fn decide(policy: &Policy, holders: &[Holder], services: &[String]) -> Result<Vec<Halt>, Vec<Holder>> {
    let mut halts = Vec::new();
    let mut keepers = Vec::new();
    for holder in holders {
        match halt(policy, holder) {
            Some(halt) => halts.push(halt),
            None => keepers.push(holder.clone()),
        }
    }
    if !keepers.is_empty() {
        return Err(keepers);
    }
    if policy.stop_nvidia_services {
        halts.extend(services.iter().map(|unit| Halt::Stop(Stopped::Unit(unit.clone()))));
    }
    // Whoever needs one of NVIDIA's services goes before it.
    halts.sort_by_key(|halt| (rank(halt), halt.clone()));
    halts.dedup();
    Ok(halts)
}

fn halt(policy: &Policy, holder: &Holder) -> Option<Halt> {
    let kill = || {
        let may = policy.kill_processes && holder.pid != 1;
        may.then(|| Halt::Kill { pid: holder.pid, command: holder.command.clone() })
    };
    match &holder.place {
        Place::Vm(_) => None,
        Place::Container(id) => {
            (policy.for_container(*id) == ForContainer::Stop).then_some(Halt::Stop(Stopped::Container(*id)))
        }
        Place::Unit(unit) if is_service(unit) => {
            let may = if is_nvidia_service(unit) { policy.stop_nvidia_services } else { policy.stop_units };
            may.then(|| Halt::Stop(Stopped::Unit(unit.clone())))
        }
        Place::Unit(_) | Place::Unknown => kill(),
    }
}

fn rank(halt: &Halt) -> usize {
    match halt {
        Halt::Stop(Stopped::Container(_)) => 0,
        Halt::Kill { .. } => 1,
        Halt::Stop(Stopped::Unit(unit)) => {
            let service = NVIDIA_SERVICES.iter().position(|name| unit.strip_suffix(".service") == Some(name));
            service.map_or(2, |place| 3 + place)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn holder(pid: i32, place: Place) -> Holder {
        Holder { pid, command: "x".to_string(), via: "/dev/nvidia0".to_string(), mapped: false, place }
    }

    fn unit(name: &str) -> Place {
        Place::Unit(name.to_string())
    }

    fn policy(text: &str) -> Policy {
        Config::parse(format!(r#"{{"policy":{text}}}"#).as_bytes()).unwrap().policy
    }

    #[test]
    fn by_default_only_nvidias_services_go() {
        let defaults = Policy::default();
        let persistenced = "nvidia-persistenced.service".to_string();
        let service = holder(7, unit(&persistenced));
        let stop = vec![Halt::Stop(Stopped::Unit(persistenced.clone()))];
        assert_eq!(decide(&defaults, std::slice::from_ref(&service), &[]), Ok(stop.clone()));
        assert_eq!(decide(&defaults, &[], std::slice::from_ref(&persistenced)), Ok(stop));
        for place in [Place::Vm(111), Place::Container(101), unit("jellyfin.service"), Place::Unknown] {
            let keeper = holder(8, place);
            assert_eq!(decide(&defaults, &[service.clone(), keeper.clone()], &[]), Err(vec![keeper]));
        }
        let refusing = policy(r#"{"nvidia_services":"refuse"}"#);
        assert_eq!(decide(&refusing, std::slice::from_ref(&service), &[]), Err(vec![service]));
        assert_eq!(decide(&refusing, &[], &[persistenced]), Ok(Vec::new()));
    }

    #[test]
    fn everybody_goes_once_and_whoever_needs_a_service_before_it() {
        let all = policy(r#"{"process":"kill","unit":"stop","container":"stop"}"#);
        let holders = [
            holder(3, unit("nvidia-persistenced.service")),
            holder(4, unit("dcgm-exporter.service")),
            holder(5, unit("jellyfin.service")),
            holder(6, unit("jellyfin.service")),
            holder(7, unit("session-3.scope")),
            holder(8, Place::Container(101)),
            holder(9, Place::Container(101)),
        ];
        let stop = |unit: &str| Halt::Stop(Stopped::Unit(unit.to_string()));
        let expected = vec![
            Halt::Stop(Stopped::Container(101)),
            Halt::Kill { pid: 7, command: "x".to_string() },
            stop("jellyfin.service"),
            stop("dcgm-exporter.service"),
            stop("nvidia-persistenced.service"),
        ];
        assert_eq!(decide(&all, &holders, &["nvidia-persistenced.service".to_string()]), Ok(expected));
    }

    #[test]
    fn what_others_live_in_is_not_stopped() {
        let units = policy(r#"{"unit":"stop"}"#);
        let both = policy(r#"{"unit":"stop","process":"kill"}"#);
        for name in ["pvedaemon.service", "user@1000.service", "ssh.service", "session-3.scope", "docker-1.scope"] {
            let process = holder(7, unit(name));
            assert_eq!(decide(&units, std::slice::from_ref(&process), &[]), Err(vec![process.clone()]), "{name}");
            let kill = vec![Halt::Kill { pid: 7, command: "x".to_string() }];
            assert_eq!(decide(&both, &[process], &[]), Ok(kill), "{name}");
        }
        let init = holder(1, Place::Unknown);
        assert_eq!(decide(&both, std::slice::from_ref(&init), &[]), Err(vec![init]));
        let vm = holder(9, Place::Vm(111));
        assert_eq!(decide(&both, std::slice::from_ref(&vm), &[]), Err(vec![vm]));
    }
}
