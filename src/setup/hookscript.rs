//! `enable` and `disable`: whether a guest has this program as its hookscript.
//!
//! A guest has one hookscript. Somebody else's is never replaced; and it is Proxmox's own tools that write the guest's
//! configuration, under its lock.

use super::conflicts;
use super::snippet::{self, Place};
pub use super::snippet::{LINK, PROGRAM, VOLUME, link_is_missing};
use crate::App;
use crate::address::{SlotId, list};
use crate::config::Config;
use crate::events::{hookscript, stray};
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::{HomeOf, Owner, Record};
use crate::handoff::plan;
use crate::handoff::way::home::Asker;
use crate::proxmox::running::is_alive;
use crate::proxmox::{cluster, ct, guest, ha, storage, vm};
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::fmt;
use std::time::Duration;

/// What to do where a guest has somebody else's.
pub const CHAIN: &str =
    "to have both, let one call the other as in /usr/share/doc/gpu-handoff/examples/chain-hookscript";

/// Proxmox waits 10 s for a guest's lock before it gives up.
const ANSWER: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, PartialEq, Eq)]
enum GuestKind {
    Vm,
    Container,
}

impl GuestKind {
    fn folder(self) -> &'static str {
        match self {
            GuestKind::Vm => "qemu-server",
            GuestKind::Container => "lxc",
        }
    }

    fn tool(self) -> &'static str {
        match self {
            GuestKind::Vm => "/usr/sbin/qm",
            GuestKind::Container => "/usr/sbin/pct",
        }
    }

    /// As HA calls it.
    fn resource(self) -> &'static str {
        match self {
            GuestKind::Vm => "vm",
            GuestKind::Container => "ct",
        }
    }
}

struct Guest {
    id: u32,
    kind: GuestKind,
    hookscript: Option<String>,
    /// As its `hostpci` lines name them.
    slots: Vec<SlotId>,
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = match self.kind {
            GuestKind::Vm => "VM",
            GuestKind::Container => "container",
        };
        write!(f, "{name} {}", self.id)
    }
}

/// What there is to do about a guest's hookscript.
#[derive(Debug, PartialEq, Eq)]
enum Todo {
    Nothing,
    /// The arguments of `qm` or `pct`.
    Set(Vec<String>),
}

fn to_set(arguments: &[&str]) -> Todo {
    Todo::Set(arguments.iter().map(ToString::to_string).collect())
}

impl Guest {
    fn read(kernel: &dyn Kernel, id: u32) -> Result<Guest> {
        for kind in [GuestKind::Vm, GuestKind::Container] {
            let path = format!("/etc/pve/{}/{id}.conf", kind.folder());
            match kernel.read(&path) {
                Ok(bytes) => {
                    let (hookscript, slots) = match kind {
                        GuestKind::Vm => {
                            let config = vm::parse(&bytes);
                            let ids = config.hostpci.values().flat_map(vm::Hostpci::addresses);
                            (config.hookscript, ids.filter_map(|id| id.slot()).collect())
                        }
                        GuestKind::Container => (ct::parse(&bytes).hookscript, Vec::new()),
                    };
                    return Ok(Guest { id, kind, hookscript, slots });
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(guest::unreadable(&path, &error)),
            }
        }
        if guest::is_down(kernel) {
            return Err(Exit::failed(guest::down()));
        }
        Err(Exit::usage(match guest::node_of(kernel, id) {
            Some(node) => Trouble::new(format!("guest {id} is on node {node}"), "say this there").joined(": "),
            None => Trouble::new(format!("there is no guest {id}"), "qm list and pct list show those that there are"),
        }))
    }

    /// Whatever storage it lies on: a link to this program has its name.
    fn has_ours(&self) -> bool {
        self.hookscript.as_deref().is_some_and(|volume| volume.ends_with(":snippets/gpu-handoff"))
    }

    /// `volume`: where the hookscript shall be; of one that has it anywhere nobody may ask that.
    fn enable(&self, volume: Option<&str>) -> Result<Todo> {
        match &self.hookscript {
            Some(own) if self.has_ours() && volume.is_none_or(|volume| volume == own) => Ok(Todo::Nothing),
            None => Ok(to_set(&["--hookscript", volume.unwrap_or(VOLUME)])),
            Some(_) if self.has_ours() => Ok(to_set(&["--hookscript", volume.unwrap_or(VOLUME)])),
            Some(other) => {
                let what = format!("{self} was not changed: its hookscript is {other}, and a guest has only one");
                Err(Exit::refused(Trouble::new(what, CHAIN)))
            }
        }
    }

    fn disable(&self, app: &App) -> Result<Todo> {
        match &self.hookscript {
            None => Ok(Todo::Nothing),
            Some(other) if !self.has_ours() => Err(Exit::refused(format!(
                "{self} was not changed: its hookscript is {other}, which is not this program"
            ))),
            // Nobody would bring it home when the VM stops.
            Some(_) if app.store.has_record(&Owner::Vm(self.id)) => Err(Exit::refused(Trouble::new(
                format!("{self} was not changed: it has a GPU, which comes home by the hookscript"),
                format!("stop it first: qm shutdown {}", self.id),
            ))),
            Some(_) => Ok(to_set(&["--delete", "hookscript"])),
        }
    }

    fn call(&self, arguments: &[String]) -> String {
        format!("{} set {} {}", self.kind.tool(), self.id, arguments.join(" "))
    }

    /// How the guest is afterwards. That counts, whatever the program said: one that took too long may have done it.
    fn set(&self, app: &App, arguments: &[String], is_done: &dyn Fn(&Guest) -> bool) -> Result<Guest> {
        if let Ok(false) = app.kernel.is_writable("/etc/pve/local") {
            let what = format!("{self} was not changed: /etc/pve is read-only, the cluster has no quorum");
            return Err(Exit::refused(Trouble::new(what, "see: pvecm status")));
        }
        let id = self.id.to_string();
        let line: Vec<&str> = ["set", &id].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let call = self.call(arguments);
        let said = app.kernel.program(self.kind.tool(), &line, ANSWER);
        let Err(error) = said else { return Guest::read(app.kernel, self.id) };
        match Guest::read(app.kernel, self.id) {
            Ok(now) if is_done(&now) => {
                app.story.warn(&format!("{call}: {error}; the change is made all the same"));
                Ok(now)
            }
            Ok(_) => Err(Exit::failed(format!("{self} was not changed: {call}: {error}"))),
            Err(exit) => {
                Err(Exit::failed(format!("whether {self} was changed is not known: {call}: {error}; and now {exit}")))
            }
        }
    }
}

/// Whether a guest is on this host.
///
/// # Errors
/// Where it is, or how to see those that there are.
pub fn find(kernel: &dyn Kernel, id: u32) -> Result<()> {
    Guest::read(kernel, id).map(drop)
}

/// Somebody else's hookscript, for which [`enable`] would refuse a guest.
pub fn other_hookscript(kernel: &dyn Kernel, id: u32) -> Option<String> {
    let guest = Guest::read(kernel, id).ok()?;
    if guest.has_ours() { None } else { guest.hookscript }
}

/// What may surprise whoever enables a guest.
#[derive(Debug, Default)]
pub struct Surprises {
    /// HA manages it.
    pub ha: Option<String>,
    /// It may start on other nodes.
    pub cluster: Option<Trouble>,
}

/// None for a guest that is not here.
pub fn surprises(kernel: &dyn Kernel, id: u32) -> Surprises {
    Guest::read(kernel, id).map(|guest| warnings(kernel, &guest)).unwrap_or_default()
}

/// # Errors
/// When the guest has another hookscript, Proxmox does not set this one, or the storage would not do.
pub fn enable(app: &App, id: u32, storage: Option<&str>) -> Result<()> {
    let mut guest = Guest::read(app.kernel, id)?;
    let place = Place::of(app.kernel, storage)?;
    let todo = guest.enable(place.asked())?;
    // Without it the guest does not start.
    place.fill(app.kernel)?;
    match todo {
        Todo::Nothing => app.story.say(&format!("{guest} has the hookscript already: nothing to do")),
        Todo::Set(arguments) => {
            let is_done = |guest: &Guest| guest.enable(place.asked()) == Ok(Todo::Nothing);
            guest = guest.set(app, &arguments, &is_done)?;
            if !is_done(&guest) {
                return Err(Exit::failed(Trouble::new(
                    format!("{guest} has no hookscript although Proxmox set it"),
                    format!("look at it: {} config {id}", guest.kind.tool()),
                )));
            }
            app.story.say(&format!("{guest} has the hookscript {} from its next start on", place.volume()));
        }
    }
    if guest.kind == GuestKind::Container {
        warn(app, &guest);
        return Ok(());
    }
    let done = put_right(app, id);
    warn(app, &guest);
    tell_of_start(app, id);
    done
}

/// The VM ran before it had the hook: then Proxmox has left its card on vfio-pci.
fn put_right(app: &App, id: u32) -> Result<()> {
    let (config, owner) = (app.config_for_hook(), Owner::Vm(id));
    let handoff = app.handoff(&config);
    let slots = hookscript::slots_of(app, id).unwrap_or_default();
    let Some(record) = handoff.left_there(&owner, &slots) else { return Ok(()) };
    if let Some(other) = other_vm(app, id, &record) {
        app.story.say(&format!(
            "{} is on vfio-pci for VM {other}, which runs without the hookscript: gpu-handoff enable {other}",
            list(record.slots())
        ));
        return Ok(());
    }
    let homes = homes_of(&record);
    if !handoff.is_running(&owner) {
        handoff.plan_come_home(&record)?;
    }
    let Some(record) = handoff.adopt(&owner, &record.slots())? else { return Ok(()) };
    let title = list(record.slots());
    if handoff.is_running(&owner) {
        app.story.say(&format!("VM {id} runs with {title} since before it had the hookscript; when it stops, {homes}"));
        return Ok(());
    }
    app.story
        .say(&format!("Proxmox has left {title} on vfio-pci when VM {id} ran without the hookscript: now {homes}"));
    handoff.come_home(&owner, Asker::Person)
}

/// `0000:01:00.0 goes home to nvidia, 0000:01:00.1 to snd_hda_intel`
fn homes_of(record: &Record) -> String {
    let home = |home: &HomeOf| format!("{} to {}", home.address, home.driver.as_deref().unwrap_or("no driver"));
    let homes: Vec<String> = record.functions.iter().map(home).collect();
    format!("it goes home: {}", homes.join(", "))
}

/// Another VM that runs and names one of these slots.
fn other_vm(app: &App, id: u32, record: &Record) -> Option<u32> {
    let names = app.kernel.list("/etc/pve/qemu-server");
    let mut vms = names.iter().filter_map(|name| name.strip_suffix(".conf")?.parse::<u32>().ok());
    vms.find(|vmid| {
        *vmid != id
            && is_alive(app.kernel, *vmid)
            && hookscript::slots_of(app, *vmid)
                .is_ok_and(|slots| slots.iter().any(|slot| record.slots().contains(slot)))
    })
}

/// What its next start would be refused for as things are; and what it does not name.
fn tell_of_start(app: &App, id: u32) {
    if app.store.has_record(&Owner::Vm(id)) {
        return;
    }
    if let Err(exit) = hookscript::plan(app, id) {
        app.story.warn(&format!("as things are VM {id} would not start: {exit}"));
    }
    for trouble in hookscript::by_args(app.kernel, id).iter().chain(&stray::of_config(app)) {
        app.story.warn(&trouble.to_string());
    }
}

/// What may surprise whoever enables it, and what keeps the card from ever being the host's.
fn warn(app: &App, guest: &Guest) {
    let config = Config::lenient(app.kernel).0;
    let Surprises { ha, cluster } = warnings(app.kernel, guest);
    let cluster = cluster.map(|trouble| trouble.to_string());
    for warning in ha.iter().chain(&cluster).chain(&conflicts::of_cards(app, &config, &guest.slots)) {
        app.story.warn(warning);
    }
}

/// # Errors
/// When the hookscript is somebody else's, the VM has a GPU, or Proxmox does not remove it.
pub fn disable(app: &App, id: u32) -> Result<()> {
    let guest = Guest::read(app.kernel, id)?;
    match guest.disable(app)? {
        Todo::Nothing => app.story.say(&format!("{guest} has no hookscript: nothing to do")),
        Todo::Set(arguments) => {
            if guest.set(app, &arguments, &|guest| !guest.has_ours())?.has_ours() {
                return Err(Exit::failed(format!("{guest} still has the hookscript although Proxmox removed it")));
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
pub fn plan_enable(app: &App, id: u32, storage: Option<&str>) -> Result<String> {
    let guest = Guest::read(app.kernel, id)?;
    let place = Place::of(app.kernel, storage)?;
    let todo = guest.enable(place.asked())?;
    let link = place.plan(app.kernel)?;
    let Todo::Set(arguments) = todo else {
        let right = plan_put_right(app, &guest);
        return Ok(match link.is_empty() && right.is_empty() {
            true => format!("{guest} has the hookscript already: nothing to do\n"),
            false => format!("{link}{right}"),
        });
    };
    let guest = Guest { hookscript: Some(place.volume().to_string()), ..guest };
    warn(app, &guest);
    let right = plan_put_right(app, &guest);
    if guest.kind == GuestKind::Vm {
        tell_of_start(app, id);
    }
    Ok(format!("{link}{}\n{right}", guest.call(&arguments)))
}

fn plan_put_right(app: &App, guest: &Guest) -> String {
    if guest.kind == GuestKind::Container {
        return String::new();
    }
    let (config, owner) = (app.config_for_hook(), Owner::Vm(guest.id));
    let handoff = app.handoff(&config);
    let left = hookscript::slots_of(app, guest.id).ok().and_then(|slots| handoff.left_there(&owner, &slots));
    let Some(record) = left.filter(|record| other_vm(app, guest.id, record).is_none()) else { return String::new() };
    let title = list(record.slots());
    if handoff.is_running(&owner) {
        return format!("{title} is on record for {guest}; when that stops, {}\n", homes_of(&record));
    }
    let title = format!("{title} vfio-pci -> host, where Proxmox left it");
    handoff
        .plan_home(&record)
        .map_or_else(|exit| format!("{exit}\n"), |plan| plan::to_text(&title, &record.slots(), &plan))
}

/// What [`disable`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_disable(app: &App, id: u32) -> Result<String> {
    let guest = Guest::read(app.kernel, id)?;
    Ok(match guest.disable(app)? {
        Todo::Nothing => format!("{guest} has no hookscript: nothing to do\n"),
        Todo::Set(arguments) => format!("{}\n", guest.call(&arguments)),
    })
}

/// What may surprise whoever enables it.
fn warnings(kernel: &dyn Kernel, guest: &Guest) -> Surprises {
    let ha = ha::manages(kernel, guest.kind.resource(), guest.id).then(|| {
        format!(
            "{guest} is managed by HA: when its start is refused because the GPU is in use, HA tries other nodes and \
             then puts it into the state error"
        )
    });
    let cluster = cluster::is_in_one(kernel).then(|| of_cluster(kernel, guest));
    Surprises { ha, cluster }
}

fn of_cluster(kernel: &dyn Kernel, guest: &Guest) -> Trouble {
    let storages = storage::all(kernel);
    let volume = guest.hookscript.as_deref().unwrap_or(VOLUME);
    if storage::of_volume(&storages, volume).is_some_and(|storage| storage.is_shared) {
        let what = format!(
            "this node is in a cluster: on nodes without gpu-handoff {guest} starts all the same and its card stays on \
             vfio-pci"
        );
        return Trouble::new(what, "install it on all that may start it").joined(", so ");
    }
    let what = format!("this node is in a cluster: {guest} starts only on nodes that have gpu-handoff");
    let remedy = format!(
        "install it on all that may start it, or have its hookscript on a shared storage: gpu-handoff enable {} --storage {}",
        guest.id,
        snippet::candidate(&storages)
    );
    Trouble::new(what, remedy).joined(", so ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(hookscript: Option<&str>) -> Guest {
        Guest { id: 111, kind: GuestKind::Vm, hookscript: hookscript.map(str::to_string), slots: Vec::new() }
    }

    #[test]
    fn only_ours_counts_as_ours() {
        for volume in [VOLUME, "nas:snippets/gpu-handoff"] {
            assert_eq!(guest(Some(volume)).enable(None), Ok(Todo::Nothing), "{volume}");
            let other = guest(Some(volume)).enable(Some("other:snippets/gpu-handoff"));
            assert_eq!(other, Ok(to_set(&["--hookscript", "other:snippets/gpu-handoff"])), "{volume}");
        }
        for volume in ["local:snippets/gpu-handoff.sh", "local:snippets/my-gpu-handoff", "local:snippets/a"] {
            let refused = guest(Some(volume)).enable(None).unwrap_err();
            assert!(refused.to_string().contains(volume), "{refused}");
        }
        assert_eq!(guest(None).enable(None), Ok(to_set(&["--hookscript", VOLUME])));
    }
}
