//! Who must go before a GPU leaves the host, and who refuses it: the administrator's policy. Pure.

use crate::config::{ForContainer, Policy};
use crate::gpu::holders::{Ends, Holder};
use crate::handoff::kept::record::Stopped;
use crate::sorted;
use crate::sys::Process;
use std::fmt;

/// One that must go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Halt {
    /// Stopped in order, and started again when the GPU is back.
    Stop(Stopped),
    /// Asked to end, then killed. Nobody can start it again.
    Kill { process: Process, command: String },
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Halt::Stop(what) => write!(f, "stop {what}"),
            Halt::Kill { process, command } => write!(f, "kill PID {} ({command})", process.pid),
        }
    }
}

/// One that is asked to let go of the GPU before anybody is stopped, and runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    pub who: Stopped,
    /// By its absolute path, with its arguments; for a container, in it.
    pub program: Vec<String>,
    /// Whether the policy stops it if that does not help.
    stops: bool,
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let otherwise = if self.stops { "stop" } else { "refuse" };
        write!(f, "{} by {}, else {otherwise}", self.who, self.program.join(" "))
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

/// In the order in which they are stopped, whether they have the GPU open at this moment or not: `services` are NVIDIA's
/// that run, which look at every GPU time and again; `just_started` was stopped for an earlier handoff, and has run again
/// for too short a time to have opened it.
///
/// # Errors
/// Those that keep the GPU; then nobody is stopped.
pub fn decide(
    policy: &Policy,
    holders: &[Holder],
    services: &[String],
    just_started: &[Stopped],
) -> Result<Vec<Halt>, Vec<Holder>> {
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
    halts.extend(just_started.iter().cloned().map(Halt::Stop));
    // Whoever needs one of NVIDIA's services goes before it.
    sorted::sort_by_key(&mut halts, |halt| (rank(halt), halt.clone()));
    halts.dedup();
    Ok(halts)
}

/// Whether it is asked to let go or stopped, and runs again later: then there is no point in waiting until it lets go by
/// itself.
pub fn stops(policy: &Policy, holder: &Holder) -> bool {
    release(policy, holder).is_some() || matches!(halt(policy, holder), Some(Halt::Stop(_)))
}

/// The container or service that a holder is in, as far as that could be stopped.
pub fn in_which(holder: &Holder) -> Option<Stopped> {
    match &holder.ends {
        Ends::Container(id) => Some(Stopped::Container(*id)),
        Ends::Service(unit) => Some(Stopped::Unit(unit.clone())),
        _ => None,
    }
}

/// Who is asked to let go, each once. `asked` were, and did not: for them the policy counts.
pub fn releases(policy: &Policy, holders: &[Holder], asked: &[Stopped]) -> Vec<Release> {
    let mut releases = Vec::new();
    for release in holders.iter().filter_map(|holder| release(policy, holder)) {
        if !asked.contains(&release.who) && !releases.contains(&release) {
            releases.push(release);
        }
    }
    releases
}

fn release(policy: &Policy, holder: &Holder) -> Option<Release> {
    let who = in_which(holder)?;
    let program = match &who {
        Stopped::Container(id) => policy.release_of_container(*id),
        Stopped::Unit(unit) => policy.release_of_unit(unit),
        Stopped::Vm(_) => &[],
    };
    let stops = matches!(halt(policy, holder), Some(Halt::Stop(_)));
    (!program.is_empty()).then(|| Release { who, program: program.to_vec(), stops })
}

fn halt(policy: &Policy, holder: &Holder) -> Option<Halt> {
    match &holder.ends {
        // Killed, it would be started again, or take others with it.
        Ends::Vm(_) | Ends::Passes | Ends::Typed(..) | Ends::Told(_) => None,
        Ends::Container(id) => {
            (policy.for_container(*id) == ForContainer::Stop).then_some(Halt::Stop(Stopped::Container(*id)))
        }
        Ends::Service(unit) => {
            policy.stops_unit(unit, is_nvidia_service(unit)).then(|| Halt::Stop(Stopped::Unit(unit.clone())))
        }
        Ends::Kill => {
            let kill = Halt::Kill { process: holder.process, command: holder.command.clone() };
            policy.kill_processes.then_some(kill)
        }
    }
}

/// The keys, with their values, that have everybody stopped who keeps the GPU: empty where no policy would.
pub fn that_would_do(policy: &Policy, keepers: &[Holder]) -> Vec<String> {
    let key = |holder: &Holder| match &holder.ends {
        Ends::Container(id) => Some(format!("{} \"stop\"", policy.key_of_container(*id))),
        Ends::Service(unit) => Some(format!("{} \"stop\"", policy.key_of_unit(unit, is_nvidia_service(unit)))),
        Ends::Kill => Some("policy.process \"kill\"".to_string()),
        Ends::Vm(_) | Ends::Passes | Ends::Typed(..) | Ends::Told(_) => None,
    };
    let keys: Option<Vec<String>> = keepers.iter().map(key).collect();
    sorted::set(keys.filter(|_| !policy.is_for_idle).unwrap_or_default()).into_iter().collect()
}

/// What to type to end them all, in the order in which the policy stops, each once.
pub fn commands(keepers: &[Holder]) -> Vec<String> {
    let rank = |holder: &Holder| match &holder.ends {
        Ends::Container(_) | Ends::Vm(_) => 0,
        Ends::Kill => 1,
        Ends::Service(unit) if is_nvidia_service(unit) => 4,
        Ends::Service(_) => 3,
        Ends::Typed(..) | Ends::Told(_) | Ends::Passes => 2,
    };
    let mut ordered: Vec<&Holder> = keepers.iter().collect();
    sorted::sort_by_key(&mut ordered, |holder| rank(holder));
    let pids = ordered.iter().filter(|one| one.ends == Ends::Kill).map(|one| one.process.pid.to_string());
    let kill = format!("kill {}", pids.collect::<Vec<_>>().join(" "));
    let mut commands: Vec<String> = Vec::new();
    for holder in ordered {
        let command = if holder.ends == Ends::Kill { Some(kill.clone()) } else { holder.ends.command(0) };
        commands.extend(command.filter(|command| !commands.contains(command)));
    }
    commands
}

fn rank(halt: &Halt) -> usize {
    match halt {
        Halt::Stop(Stopped::Container(_) | Stopped::Vm(_)) => 0,
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
    use crate::gpu::holders::Place;
    use crate::sys::{DeviceNumber, How};

    fn process(pid: i32) -> Process {
        Process { pid, start: 1 }
    }

    fn holder(pid: i32, ends: Ends) -> Holder {
        let (command, via) = ("x".to_string(), "/dev/nvidia0".to_string());
        let number = DeviceNumber { major: 195, minor: 0 };
        Holder { process: process(pid), command, number, via, how: How::Open, place: Place::Unknown, ends }
    }

    fn docker() -> Ends {
        Ends::Typed("docker stop 0123456789ab".to_string(), String::new())
    }

    fn unit(name: &str) -> Ends {
        Ends::Service(name.to_string())
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
        assert_eq!(decide(&defaults, std::slice::from_ref(&service), &[], &[]), Ok(stop.clone()));
        assert_eq!(decide(&defaults, &[], std::slice::from_ref(&persistenced), &[]), Ok(stop));
        for ends in [Ends::Vm(111), Ends::Container(101), unit("jellyfin.service"), Ends::Kill, Ends::Passes] {
            let keeper = holder(8, ends);
            assert_eq!(decide(&defaults, &[service.clone(), keeper.clone()], &[], &[]), Err(vec![keeper]));
        }
        let refusing = policy(r#"{"nvidia_services":"refuse"}"#);
        assert_eq!(decide(&refusing, std::slice::from_ref(&service), &[], &[]), Err(vec![service]));
        assert_eq!(decide(&refusing, &[], &[persistenced], &[]), Ok(Vec::new()));
    }

    #[test]
    fn everybody_goes_once_and_whoever_needs_a_service_before_it() {
        let all = policy(r#"{"process":"kill","unit":"stop","container":"stop"}"#);
        let holders = [
            holder(3, unit("nvidia-persistenced.service")),
            holder(4, unit("dcgm-exporter.service")),
            holder(5, unit("jellyfin.service")),
            holder(6, unit("jellyfin.service")),
            holder(7, Ends::Kill),
            holder(8, Ends::Container(101)),
            holder(9, Ends::Container(101)),
        ];
        let stop = |unit: &str| Halt::Stop(Stopped::Unit(unit.to_string()));
        let expected = vec![
            Halt::Stop(Stopped::Container(101)),
            Halt::Kill { process: process(7), command: "x".to_string() },
            stop("jellyfin.service"),
            stop("dcgm-exporter.service"),
            stop("nvidia-persistenced.service"),
        ];
        assert_eq!(decide(&all, &holders, &["nvidia-persistenced.service".to_string()], &[]), Ok(expected));
    }

    #[test]
    fn what_would_come_back_or_take_others_along_is_not_ended() {
        let all = policy(r#"{"process":"kill","unit":"stop","container":"stop"}"#);
        for ends in [Ends::Vm(111), Ends::Passes, Ends::Told("delete its pod".to_string()), docker()] {
            let keeper = holder(7, ends);
            assert_eq!(decide(&all, std::slice::from_ref(&keeper), &[], &[]), Err(vec![keeper]));
        }
        let units = policy(r#"{"unit":"stop"}"#);
        let mere = holder(7, Ends::Kill);
        assert_eq!(decide(&units, std::slice::from_ref(&mere), &[], &[]), Err(vec![mere]));
    }

    #[test]
    fn what_was_just_started_again_goes_once_and_not_where_somebody_stays() {
        let started = [Stopped::Unit("ollama.service".to_string()), Stopped::Container(101)];
        let [ollama, container] = started.clone().map(Halt::Stop);
        let units = policy(r#"{"unit":"stop"}"#);
        let holder = |name| holder(7, unit(name));
        let expected = Ok(vec![container, ollama]);
        assert_eq!(decide(&units, &[], &[], &started), expected);
        assert_eq!(decide(&units, &[holder("ollama.service")], &[], &started), expected);
        let keeper = Holder { ends: Ends::Kill, ..holder("x") };
        assert_eq!(decide(&units, std::slice::from_ref(&keeper), &[], &started), Err(vec![keeper]));
    }

    #[test]
    fn who_is_asked_to_let_go_and_what_else() {
        let policy = policy(
            r#"{"container":"stop","units":{"a.service":{"release":["/bin/a","x"]}},
                "containers":{"101":{"release":["/bin/c"]}}}"#,
        );
        let holders = [Ends::Container(101), unit("a.service"), unit("a.service"), unit("b.service"), Ends::Kill]
            .map(|ends| holder(7, ends));
        let words =
            |asked: &[Stopped]| releases(&policy, &holders, asked).iter().map(ToString::to_string).collect::<Vec<_>>();
        let a = "a.service by /bin/a x, else refuse";
        assert_eq!(words(&[]), ["container 101 by /bin/c, else stop", a]);
        assert_eq!(words(&[Stopped::Container(101)]), [a]);
        assert_eq!(holders.map(|holder| stops(&policy, &holder)), [true, true, true, false, false]);
    }

    #[test]
    fn all_that_must_be_typed_once_and_in_order() {
        let holders = [
            holder(3, unit("nvidia-persistenced.service")),
            holder(4, unit("ollama.service")),
            holder(5, Ends::Kill),
            holder(6, unit("ollama.service")),
            holder(7, docker()),
            holder(8, Ends::Container(101)),
            holder(9, Ends::Kill),
            holder(10, Ends::Container(101)),
            holder(11, Ends::Vm(112)),
            holder(12, Ends::Told("delete its pod".to_string())),
        ];
        let expected = [
            "pct shutdown 101",
            "qm shutdown 112",
            "kill 5 9",
            "docker stop 0123456789ab",
            "systemctl stop ollama.service",
            "systemctl stop nvidia-persistenced.service",
        ];
        assert_eq!(commands(&holders), expected);
    }

    #[test]
    fn a_policy_is_named_where_it_would_do() {
        let keys = |policy: &Policy, ends: &[Ends]| {
            let holders: Vec<Holder> = ends.iter().map(|ends| holder(7, ends.clone())).collect();
            that_would_do(policy, &holders).join(" ")
        };
        let container = Ends::Container(101);
        let defaults = Policy::default();
        let all = [unit("a.service"), container.clone(), Ends::Kill, unit("b.service"), unit("dcgm.service")];
        let expected =
            "policy.container \"stop\" policy.nvidia_services \"stop\" policy.process \"kill\" policy.unit \"stop\"";
        assert_eq!(keys(&defaults, &all), expected);
        // One that is named by itself is not told by the rule for all.
        let named = policy(r#"{"container":"stop","containers":{"101":"leave"}}"#);
        assert_eq!(keys(&named, std::slice::from_ref(&container)), "policy.containers.101 \"stop\"");
        for ends in [Ends::Vm(112), docker(), Ends::Told("log out".to_string()), Ends::Passes] {
            assert_eq!(keys(&defaults, &[container.clone(), ends]), "");
        }
        assert_eq!(keys(&defaults.for_idle(), &[container]), "");
    }

    #[test]
    fn who_is_stopped_runs_again_and_who_is_killed_does_not() {
        let all = policy(r#"{"process":"kill","unit":"stop","container":"stop"}"#);
        for (ends, stopped) in [(unit("a.service"), true), (Ends::Container(101), true), (Ends::Kill, false)] {
            let holder = holder(7, ends);
            assert_eq!(stops(&all, &holder), stopped);
            assert!(!stops(&Policy::default(), &holder));
        }
    }
}
