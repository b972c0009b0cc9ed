//! `enable` and `disable`: whether a guest has this program as its hookscript.
//!
//! A guest has one hookscript. Somebody else's is never replaced; and it is Proxmox's own tools that write the guest's
//! configuration, under its lock.

use super::conflicts;
use crate::App;
use crate::config::Config;
use crate::handoff::record::Owner;
use crate::proxmox::{ct, guest, vm};
use crate::stop::{Result, Stop};
use crate::sys::{Kernel, is_writable};
use std::fmt;
use std::time::Duration;

/// Storage `local` is /var/lib/vz on every Proxmox host (PVE::Storage::Plugin).
const VOLUME: &str = "local:snippets/gpu-handoff";
const LINK: &str = "/var/lib/vz/snippets/gpu-handoff";
const PROGRAM: &str = "/usr/sbin/gpu-handoff";
const HA_RESOURCES: &str = "/etc/pve/ha/resources.cfg";
const CLUSTER: &str = "/etc/pve/corosync.conf";

/// Proxmox waits 10 s for a guest's lock before it gives up.
const ANSWER: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vm,
    Container,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Kind::Vm => "qemu-server",
            Kind::Container => "lxc",
        }
    }

    fn tool(self) -> &'static str {
        match self {
            Kind::Vm => "/usr/sbin/qm",
            Kind::Container => "/usr/sbin/pct",
        }
    }

    /// As HA calls it.
    fn resource(self) -> &'static str {
        match self {
            Kind::Vm => "vm",
            Kind::Container => "ct",
        }
    }
}

struct Guest {
    id: u32,
    kind: Kind,
    hookscript: Option<String>,
    /// As its `hostpci` lines name them.
    addresses: Vec<String>,
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = match self.kind {
            Kind::Vm => "VM",
            Kind::Container => "container",
        };
        write!(f, "{name} {}", self.id)
    }
}

/// What there is to do about a guest's hookscript.
#[derive(Debug, PartialEq, Eq)]
enum Todo {
    Nothing,
    /// The arguments of `qm` or `pct`.
    Set(&'static [&'static str]),
}

impl Guest {
    fn read(kernel: &dyn Kernel, id: u32) -> Result<Guest> {
        for kind in [Kind::Vm, Kind::Container] {
            let path = format!("/etc/pve/{}/{id}.conf", kind.folder());
            match kernel.read(&path) {
                Ok(bytes) => {
                    let (hookscript, addresses) = match kind {
                        Kind::Vm => {
                            let config = vm::parse(&bytes);
                            let addresses = config.hostpci.values().flat_map(|line| line.ids.clone()).collect();
                            (config.hookscript, addresses)
                        }
                        Kind::Container => (ct::parse(&bytes).hookscript, Vec::new()),
                    };
                    return Ok(Guest { id, kind, hookscript, addresses });
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(guest::unreadable(&path, &error)),
            }
        }
        if guest::is_down(kernel) {
            return Err(Stop::failed(guest::DOWN));
        }
        Err(Stop::usage(match guest::node_of(kernel, id) {
            Some(node) => format!("guest {id} is on node {node}: say this there"),
            None => format!("there is no guest {id}; qm list and pct list show those that there are"),
        }))
    }

    /// Whatever storage it lies on: a link to this program has its name.
    fn has_ours(&self) -> bool {
        self.hookscript.as_deref().is_some_and(|volume| volume.ends_with(":snippets/gpu-handoff"))
    }

    fn enable(&self) -> Result<Todo> {
        match &self.hookscript {
            _ if self.has_ours() => Ok(Todo::Nothing),
            None => Ok(Todo::Set(&["--hookscript", VOLUME])),
            Some(other) => Err(Stop::refused(format!(
                "{self} was not changed: its hookscript is {other}, and a guest has only one; to have both, let one \
                 call the other as in /usr/share/doc/gpu-handoff/examples/chain-hookscript"
            ))),
        }
    }

    fn disable(&self, app: &App) -> Result<Todo> {
        match &self.hookscript {
            None => Ok(Todo::Nothing),
            Some(other) if !self.has_ours() => Err(Stop::refused(format!(
                "{self} was not changed: its hookscript is {other}, which is not this program"
            ))),
            // Nobody would bring it home when the VM stops.
            Some(_) if app.store.has_record(&Owner::Vm(self.id)) => Err(Stop::refused(format!(
                "{self} was not changed: it has a GPU, which comes home by the hookscript; stop it first: qm stop {}",
                self.id
            ))),
            Some(_) => Ok(Todo::Set(&["--delete", "hookscript"])),
        }
    }

    fn call(&self, arguments: &[&str]) -> String {
        format!("{} set {} {}", self.kind.tool(), self.id, arguments.join(" "))
    }

    /// How the guest is afterwards. That counts, whatever the program said: one that took too long may have done it.
    fn set(&self, app: &App, arguments: &[&str], is_done: &dyn Fn(&Guest) -> bool) -> Result<Guest> {
        if let Ok(false) = is_writable(&app.kernel.path("/etc/pve/local")) {
            return Err(Stop::refused(format!(
                "{self} was not changed: /etc/pve is read-only, the cluster has no quorum; see: pvecm status"
            )));
        }
        let id = self.id.to_string();
        let line = [&["set", &id], arguments].concat();
        let call = self.call(arguments);
        let said = app.kernel.program(self.kind.tool(), &line, ANSWER);
        let Err(error) = said else { return Guest::read(&app.kernel, self.id) };
        match Guest::read(&app.kernel, self.id) {
            Ok(now) if is_done(&now) => {
                app.story.warn(&format!("{call}: {error}; the change is made all the same"));
                Ok(now)
            }
            Ok(_) => Err(Stop::failed(format!("{self} was not changed: {call}: {error}"))),
            Err(stop) => Err(Stop::failed(format!(
                "whether {self} was changed is not known: {call}: {error}; and now {}",
                stop.message
            ))),
        }
    }
}

/// # Errors
/// When the guest has another hookscript, or Proxmox does not set this one.
pub fn enable(app: &App, id: u32) -> Result<()> {
    let guest = Guest::read(&app.kernel, id)?;
    let todo = guest.enable()?;
    // Without it the guest does not start.
    if link_is_missing(&app.kernel)? {
        app.kernel.link(LINK, PROGRAM).map_err(|error| Stop::failed(format!("{LINK}: {error}")))?;
    }
    match todo {
        Todo::Nothing => app.story.say(&format!("{guest} has the hookscript already: nothing to do")),
        Todo::Set(arguments) => {
            if !guest.set(app, arguments, &Guest::has_ours)?.has_ours() {
                return Err(Stop::failed(format!(
                    "{guest} has no hookscript although Proxmox set it; look at it: {} config {id}",
                    guest.kind.tool()
                )));
            }
            app.story.say(&format!("{guest} has the hookscript {VOLUME} from its next start on"));
        }
    }
    warn(app, &guest);
    Ok(())
}

/// What may surprise whoever enables it, and what keeps the card from ever being the host's.
fn warn(app: &App, guest: &Guest) {
    let addresses: Vec<&str> = guest.addresses.iter().map(String::as_str).collect();
    let config = Config::read(&app.kernel).unwrap_or_default();
    for warning in warnings(&app.kernel, guest).iter().chain(&conflicts::of_cards(app, &config, &addresses)) {
        app.story.warn(warning);
    }
}

/// # Errors
/// When the hookscript is somebody else's, the VM has a GPU, or Proxmox does not remove it.
pub fn disable(app: &App, id: u32) -> Result<()> {
    let guest = Guest::read(&app.kernel, id)?;
    match guest.disable(app)? {
        Todo::Nothing => app.story.say(&format!("{guest} has no hookscript: nothing to do")),
        Todo::Set(arguments) => {
            if guest.set(app, arguments, &|guest| !guest.has_ours())?.has_ours() {
                return Err(Stop::failed(format!("{guest} still has the hookscript although Proxmox removed it")));
            }
            app.story.say(&format!("{guest} has no hookscript any more"));
        }
    }
    Ok(())
}

/// What [`enable`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_enable(app: &App, id: u32) -> Result<String> {
    let guest = Guest::read(&app.kernel, id)?;
    let todo = guest.enable()?;
    let link = if link_is_missing(&app.kernel)? { format!("ln -s {PROGRAM} {LINK}\n") } else { String::new() };
    let Todo::Set(arguments) = todo else {
        return Ok(if link.is_empty() { format!("{guest} has the hookscript already: nothing to do\n") } else { link });
    };
    warn(app, &guest);
    Ok(format!("{link}{}\n", guest.call(arguments)))
}

/// What [`disable`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_disable(app: &App, id: u32) -> Result<String> {
    let guest = Guest::read(&app.kernel, id)?;
    Ok(match guest.disable(app)? {
        Todo::Nothing => format!("{guest} has no hookscript: nothing to do\n"),
        Todo::Set(arguments) => format!("{}\n", guest.call(arguments)),
    })
}

/// The package makes the link; without the package, whoever enables the first guest.
fn link_is_missing(kernel: &dyn Kernel) -> Result<bool> {
    match kernel.link_name(LINK) {
        Ok(name) if name == "gpu-handoff" => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        _ => Err(Stop::refused(format!("{LINK} is no link to {PROGRAM}; move it away, then try again"))),
    }
}

/// What may surprise whoever enables it.
fn warnings(kernel: &dyn Kernel, guest: &Guest) -> Vec<String> {
    let mut warnings = Vec::new();
    if is_managed(&kernel.text(HA_RESOURCES).unwrap_or_default(), guest.kind, guest.id) {
        warnings.push(format!(
            "{guest} is managed by HA: when its start is refused because the GPU is in use, HA tries other nodes and \
             then puts it into the state error"
        ));
    }
    if kernel.exists(CLUSTER) {
        warnings.push(format!(
            "this node is in a cluster: {guest} starts only on nodes that have gpu-handoff, so install it on all that \
             may start it"
        ));
    }
    warnings
}

/// `vm: 111` begins a section (PVE::HA::Resources).
fn is_managed(resources: &str, kind: Kind, id: u32) -> bool {
    resources.lines().any(|line| {
        let named = line.split_once(':').map(|(kind, id)| (kind, id.trim()));
        named == Some((kind.resource(), id.to_string().as_str()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(hookscript: Option<&str>) -> Guest {
        Guest { id: 111, kind: Kind::Vm, hookscript: hookscript.map(str::to_string), addresses: Vec::new() }
    }

    #[test]
    fn only_ours_counts_as_ours() {
        for volume in [VOLUME, "nas:snippets/gpu-handoff"] {
            assert_eq!(guest(Some(volume)).enable(), Ok(Todo::Nothing), "{volume}");
        }
        for volume in ["local:snippets/gpu-handoff.sh", "local:snippets/my-gpu-handoff", "local:snippets/a"] {
            let refused = guest(Some(volume)).enable().unwrap_err();
            assert!(refused.message.contains(volume), "{}", refused.message);
        }
        assert_eq!(guest(None).enable(), Ok(Todo::Set(&["--hookscript", VOLUME])));
    }

    #[test]
    fn ha_names_its_guests() {
        let resources = "vm: 111\n\tstate started\n\nct: 101\n\tgroup a\n";
        assert!(is_managed(resources, Kind::Vm, 111) && is_managed(resources, Kind::Container, 101));
        assert!(!is_managed(resources, Kind::Container, 111) && !is_managed(resources, Kind::Vm, 11));
    }
}
