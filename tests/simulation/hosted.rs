//! What runs on the host beside VMs and may use a GPU: units and containers, as systemctl, systemd-run and pct see them.

use super::state::{CONTROL_MINOR, State, nvidia_number};
use gpu_handoff::handoff::kept::record::Stopped;
use gpu_handoff::sys::DeviceNumber;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long the processes of a container go on after it was asked to be frozen.
const FREEZING: Duration = Duration::from_millis(130);

/// How long something takes to end.
const ENDING: Duration = Duration::from_millis(35);

pub const SERVICE: &str = "nvidia-persistenced.service";
pub const UNIT: &str = "jellyfin.service";
/// Uses the GPU.
pub const BUSY_CONTAINER: u32 = 101;
/// Could use it.
pub const IDLE_CONTAINER: u32 = 102;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosted {
    /// By name: the PID of one that runs.
    units: BTreeMap<String, Option<i32>>,
    containers: BTreeMap<u32, Container>,
    /// Somebody asked for `gpu-handoff resume`.
    pub resume: bool,
    /// A VM that qm was asked to start; its hook comes when the run is over.
    pub vm_start: Option<u32>,
    /// VMs do nothing about it when they are asked to shut down.
    pub ignores_acpi: bool,
    /// Drivers were taken from a card while a container that was to be frozen did not stand still yet.
    pub too_early: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Container {
    pid: Option<i32>,
    /// It was asked to be.
    is_frozen: bool,
    /// From when on it is.
    stands: Option<Duration>,
}

/// What of it must be again as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    units: BTreeSet<String>,
    /// And whether frozen.
    containers: BTreeMap<u32, bool>,
}

impl State {
    /// Both kinds of units, both kinds of containers, and a program in a login session. False without a GPU on nvidia.
    pub fn host_everybody(&mut self) -> bool {
        if self.gpu_nodes().is_empty() {
            return false;
        }
        for unit in [SERVICE, UNIT] {
            self.hosted.units.insert(unit.to_string(), None);
            self.start_unit(unit);
        }
        for ctid in [BUSY_CONTAINER, IDLE_CONTAINER] {
            self.hosted.containers.insert(ctid, Container::default());
            self.start_container(ctid);
        }
        let open = self.gpu_nodes();
        self.start_process("game", "0::/user.slice/user-0.slice/session-3.scope\n", open);
        true
    }

    pub fn running(&self) -> Running {
        let is_alive = |pid: &Option<i32>| pid.is_some_and(|pid| self.living().any(|(other, _)| *other == pid));
        let units = self.hosted.units.iter().filter(|(_, pid)| is_alive(pid)).map(|(name, _)| name.clone());
        let containers = self.hosted.containers.iter().filter(|(_, container)| is_alive(&container.pid));
        Running {
            units: units.collect(),
            containers: containers.map(|(ctid, container)| (*ctid, container.is_frozen)).collect(),
        }
    }

    /// What a program says, or why it fails; none when it is not there.
    pub fn program(&mut self, path: &str, arguments: &[&str]) -> Option<Result<String, String>> {
        let name = arguments.last().copied().unwrap_or_default();
        let said = match (path, arguments) {
            ("/usr/bin/systemctl", ["show", "--property=SystemState", "--value"]) => "running".to_string(),
            ("/usr/bin/systemctl", ["show", "--property=ActiveState", "--value", "--", _]) => {
                if self.running().units.contains(name) || self.is_at_it(name) { "active" } else { "inactive" }
                    .to_string()
            }
            // Jellyfin requires NVIDIA's service.
            ("/usr/bin/systemctl", ["show", "--property=RequiredBy,BoundBy,ConsistsOf", "--value", "--", SERVICE]) => {
                format!("{UNIT}\n\n")
            }
            ("/usr/bin/systemctl", ["show", "--property=RequiredBy,BoundBy,ConsistsOf", "--value", "--", _]) => {
                String::new()
            }
            ("/usr/bin/systemctl", [verb, "--no-block", "--", _]) if self.hosted.units.contains_key(name) => {
                // Stopped along; what requires it is gone already when it is stopped for itself.
                if *verb == "stop" && name == SERVICE {
                    let pid = self.hosted.units.get(UNIT).copied().flatten();
                    self.stop_process(pid);
                }
                if matches!(*verb, "stop" | "restart") {
                    let pid = self.hosted.units.get(name).copied().flatten();
                    self.stop_process(pid);
                }
                if matches!(*verb, "start" | "restart") {
                    self.start_unit(name);
                }
                String::new()
            }
            // It comes by itself: see Bench::keeper.
            ("/usr/bin/systemctl", ["start" | "stop", "--no-block", "--", "gpu-handoff-keeper.timer"]) => String::new(),
            ("/usr/bin/systemd-run", [.., "resume"]) => {
                self.hosted.resume = true;
                String::new()
            }
            ("/usr/bin/systemd-run", [.., "/usr/sbin/pct", "shutdown", id, "--forceStop", "1", "--timeout", _]) => {
                let container = id.parse().ok().and_then(|ctid: u32| self.hosted.containers.get(&ctid));
                let pid = container.and_then(|container| container.pid);
                self.stop_process(pid);
                String::new()
            }
            ("/usr/bin/systemd-run", [.., "/usr/sbin/qm", "shutdown", id, "--timeout", _]) => {
                if !self.hosted.ignores_acpi {
                    self.stop_qemu(id.parse().ok()?, ENDING);
                }
                String::new()
            }
            ("/usr/bin/systemd-run", [.., "/usr/sbin/qm", "start", id]) => {
                self.hosted.vm_start = id.parse().ok();
                String::new()
            }
            ("/usr/sbin/pct", ["start", id]) => {
                self.start_container(id.parse().ok()?);
                String::new()
            }
            _ => return None,
        };
        Some(Ok(said))
    }

    /// The unit that stops a container is there until pct comes back, which is when the container has stopped.
    fn is_at_it(&self, unit: &str) -> bool {
        let ctid = unit.strip_prefix("gpu-handoff-stop-").and_then(|unit| unit.strip_suffix(".service"));
        let container = ctid.and_then(|ctid| self.hosted.containers.get(&ctid.parse().ok()?));
        let pid = container.and_then(|container| container.pid);
        self.living().any(|(other, process)| Some(*other) == pid && process.ends.is_some())
    }

    pub fn cgroup_file(&self, path: &[&str]) -> Option<String> {
        let running = self.running();
        let populated = |stands: bool| Some(format!("populated 1\nfrozen {}\n", u8::from(stands)));
        match path {
            ["system.slice", unit, "cgroup.events"] if running.units.contains(*unit) => populated(false),
            ["lxc", id, file] => {
                let ctid = id.parse().ok()?;
                let is_frozen = running.containers.get(&ctid)?;
                match *file {
                    "cgroup.events" => populated(self.stands_still(ctid)),
                    "cgroup.freeze" => Some(format!("{}\n", u8::from(*is_frozen))),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Containers that are frozen.
    pub fn frozen(&self) -> Vec<u32> {
        self.running().containers.into_iter().filter(|(_, is_frozen)| *is_frozen).map(|(ctid, _)| ctid).collect()
    }

    pub fn container_cgroups(&self) -> Vec<String> {
        self.running().containers.keys().map(ToString::to_string).collect()
    }

    pub fn container_config(&self, file: &str) -> Option<String> {
        let ctid: u32 = file.strip_suffix(".conf")?.parse().ok()?;
        self.hosted.containers.get(&ctid)?;
        Some("arch: amd64\nlxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n".to_string())
    }

    /// False when there is no such container, or it does not run.
    pub fn freeze(&mut self, ctid: &str, data: &str) -> bool {
        let Ok(ctid) = ctid.parse() else { return false };
        let runs = self.running().containers.contains_key(&ctid);
        let stands = self.now + FREEZING;
        match self.hosted.containers.get_mut(&ctid).filter(|_| runs) {
            Some(container) => {
                container.is_frozen = data == "1";
                container.stands = container.is_frozen.then(|| container.stands.unwrap_or(stands));
            }
            None => return false,
        }
        true
    }

    fn stands_still(&self, ctid: u32) -> bool {
        self.hosted.containers.get(&ctid).and_then(|container| container.stands).is_some_and(|time| time <= self.now)
    }

    /// A driver is about to lose a card.
    pub fn note_release(&mut self) {
        let running = self.running().containers;
        let is_on_its_way = |(ctid, is_frozen): (&u32, &bool)| *is_frozen && !self.stands_still(*ctid);
        self.hosted.too_early |= running.iter().any(is_on_its_way);
    }

    fn gpu_nodes(&self) -> Vec<DeviceNumber> {
        let minor = self.functions.values().find_map(|function| function.minor);
        minor.map(|minor| vec![nvidia_number(minor), nvidia_number(CONTROL_MINOR)]).unwrap_or_default()
    }

    fn start_unit(&mut self, name: &str) {
        let open = self.gpu_nodes();
        let pid = self.start_process("service", &format!("0::/system.slice/{name}\n"), open);
        self.hosted.units.insert(name.to_string(), Some(pid));
    }

    fn start_container(&mut self, ctid: u32) {
        let open = if ctid == BUSY_CONTAINER { self.gpu_nodes() } else { Vec::new() };
        let pid = self.start_process("init", &format!("0::/lxc/{ctid}/ns/init.scope\n"), open);
        self.hosted.containers.insert(ctid, Container { pid: Some(pid), ..Container::default() });
    }

    fn stop_process(&mut self, pid: Option<i32>) {
        let end = self.now + ENDING;
        if let Some(process) = pid.and_then(|pid| self.processes.get_mut(&pid)) {
            process.ends = process.ends.or(Some(end));
        }
    }

    /// SIGTERM or SIGKILL.
    pub fn end_process(&mut self, pid: i32) {
        self.stop_process(Some(pid));
    }
}

impl Running {
    /// What runs there, by the name that the program has for it, and not here.
    pub fn missing(&self, home: &Running) -> Vec<Stopped> {
        let containers = home.containers.keys().filter(|ctid| !self.containers.contains_key(ctid));
        let units = home.units.difference(&self.units);
        containers.map(|ctid| Stopped::Container(*ctid)).chain(units.cloned().map(Stopped::Unit)).collect()
    }

    /// In words, when it is not as it shall be.
    pub fn difference(&self, home: &Running) -> Option<String> {
        (self != home).then(|| format!("running are {self:?}, at home {home:?}"))
    }
}
