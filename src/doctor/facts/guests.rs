//! The guests' configurations, and what the rest of the program says of them.

use crate::App;
use crate::address::SlotId;
use crate::config::Config;
use crate::containers::{Wish, attach, check};
use crate::events::hookscript::{self, DroppedLine};
use crate::events::mapped::Unusable;
use crate::events::nodes::{self, Elsewhere};
use crate::events::stray;
use crate::gpu::containers::{self, Given};
use crate::gpu::nodes::{UVM, is_gpu};
use crate::gpu::{Slot, power};
use crate::handoff::kept::told::Told;
use crate::proxmox::ct::{self, CtConfig};
use crate::proxmox::guest;
use crate::proxmox::pci_id::PciId;
use crate::proxmox::running::is_alive;
use crate::proxmox::storage::{self, Storage};
use crate::proxmox::vm::{self, VmConfig};
use crate::setup::hookscript as registration;
use crate::sorted;
use crate::story::Story;
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::collections::BTreeSet;

/// Plans are made for so many different wishes; each looks at every process.
const PLANS: usize = 4;

pub struct Guests {
    pub vms: Vec<Vm>,
    pub containers: Vec<Container>,
    pub storages: Vec<Storage>,
    /// Volumes that are there.
    pub snippets: Vec<String>,
    /// Why the configuration of a guest that is there cannot be read.
    pub unreadable: Vec<(String, Trouble)>,
    /// The cluster file system takes no changes.
    pub is_read_only: bool,
    /// Files that may be a card's ROM.
    pub roms: Vec<String>,
    /// Of the host, in KiB; none when it does not say.
    pub memory: Option<u64>,
    /// Nodes of the cluster beside this one, and what each has told.
    pub nodes: Vec<(String, Option<Told>)>,
}

/// A line of a guest's configuration, up to the first section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub line: usize,
    pub key: String,
    pub value: String,
}

pub struct Vm {
    pub id: u32,
    pub path: String,
    pub settings: Vec<Setting>,
    pub config: VmConfig,
    pub has_hook: bool,
    /// Of NVIDIA's GPUs, those that it takes.
    pub slots: Vec<SlotId>,
    /// Every address that it names.
    pub listed: Vec<PciId>,
    /// Why that cannot be told: a start is refused for it.
    pub unusable: Option<Unusable>,
    /// It has the hook and names another device.
    pub remark: Option<stray::Remark>,
    /// It has the hook and names nothing.
    pub nothing_named: Option<Trouble>,
    pub dropped: Vec<DroppedLine>,
    pub by_args: Option<Trouble>,
    /// Somebody else's, for which it cannot have ours.
    pub other_hook: Option<String>,
    pub surprises: registration::Surprises,
    /// Where else it may start.
    pub elsewhere: Elsewhere,
    pub runs: bool,
    /// Why it would not start now.
    pub refusal: Option<Trouble>,
}

pub struct Container {
    pub id: u32,
    pub path: String,
    pub settings: Vec<Setting>,
    pub config: CtConfig,
    pub given: Vec<Given>,
    pub has_nvidia: bool,
    /// As `container check` tells them.
    pub facts: Result<Vec<check::Fact>, String>,
    /// Whether attaching it would do, or why not; none where nobody asked.
    pub attaching: Option<Result<(), String>>,
}

impl Guests {
    /// `is_whole`: with what takes more than reading files of this host.
    pub fn read(app: &App, config: &Config, slots: &[Slot], only: Option<u32>, is_whole: bool) -> Guests {
        let kernel = app.kernel;
        let mut unreadable = Vec::new();
        for folder in ["/etc/pve/qemu-server", "/etc/pve/lxc"] {
            for path in ids(kernel, folder).into_iter().map(|id| format!("{folder}/{id}.conf")) {
                let why = kernel.read(&path).err().map(|error| guest::unreadable(&path, &error).trouble);
                unreadable.extend(why.map(|why| (path, why)));
            }
        }
        let vms = ids(kernel, "/etc/pve/qemu-server").into_iter();
        let mut vms: Vec<Vm> = vms.filter_map(|id| Vm::read(app, id)).collect();
        if is_whole {
            ask_for_starts(app, &mut vms, slots, only);
        }
        let attached = attach::attached(app);
        let container = |id| {
            let is_asked = only == Some(id);
            Container::read(app, config, id, attached.contains(&id), is_asked, slots)
        };
        let ids = if is_whole { containers::all(kernel) } else { Vec::new() };
        let mut all: Vec<Container> = ids.into_iter().filter_map(container).collect();
        if is_whole {
            ask_for_attaching(app, &mut all, slots, only);
        }
        let storages = if is_whole { storage::all(kernel) } else { Vec::new() };
        Guests {
            vms,
            containers: all,
            snippets: snippets(kernel, &storages),
            storages,
            unreadable,
            is_read_only: kernel.is_writable("/etc/pve/local").is_ok_and(|is| !is),
            roms: kernel.list("/usr/share/kvm"),
            memory: memory(kernel),
            nodes: nodes::others(kernel).into_iter().map(|(node, told)| (node.name, told)).collect(),
        }
    }
}

/// Whether they would start now. Each question looks at every process, so one of several VMs with the same wish is enough.
fn ask_for_starts(app: &App, vms: &mut [Vm], slots: &[Slot], only: Option<u32>) {
    // That VMs take turns is no mistake.
    let busy = sorted::set(vms.iter().filter(|vm| vm.runs).flat_map(|vm| vm.slots.clone()));
    // What sleeps is not woken for this.
    let sleeps = |slot: &&Slot| slot.functions.iter().any(|one| power::sleeps(app.kernel, one.address));
    let asleep: Vec<SlotId> = slots.iter().filter(sleeps).map(|slot| slot.id).collect();
    let mut wishes: BTreeSet<Vec<SlotId>> = BTreeSet::new();
    for vm in vms.iter_mut().filter(|vm| !vm.runs && vm.takes_gpu() && vm.unusable.is_none()) {
        let is_free = vm.slots.iter().all(|slot| !busy.contains(slot) && !asleep.contains(slot));
        let is_new = wishes.len() < PLANS && !wishes.contains(&vm.slots);
        if only == Some(vm.id) || (only.is_none() && is_free && is_new) {
            wishes.insert(vm.slots.clone());
            vm.refusal = hookscript::plan(app, vm.id).err().map(|exit| exit.trouble);
        }
    }
}

fn ids(kernel: &dyn Kernel, directory: &str) -> Vec<u32> {
    let names = kernel.list(directory).into_iter();
    let mut ids: Vec<u32> = names.filter_map(|name| name.strip_suffix(".conf")?.parse().ok()).collect();
    sorted::sort(&mut ids);
    ids
}

/// Up to the first section; comments are the guest's description.
fn settings(bytes: &[u8]) -> Vec<Setting> {
    let text = String::from_utf8_lossy(bytes);
    let lines = (1..).zip(text.lines()).take_while(|(_, line)| !(line.starts_with('[') && line.contains(']')));
    let setting = |(line, text): (usize, &str)| {
        let (key, value) = text.split_once([':', '='])?;
        let key = key.trim_end().to_string();
        (!key.starts_with('#')).then(|| Setting { line, key, value: value.trim().to_string() })
    };
    lines.filter_map(setting).collect()
}

impl Vm {
    fn read(app: &App, id: u32) -> Option<Vm> {
        let kernel = app.kernel;
        let path = format!("/etc/pve/qemu-server/{id}.conf");
        let bytes = kernel.read(&path).ok()?;
        let config = vm::parse(&bytes);
        let has_hook = stray::has_hook(&config);
        let names_any = !(config.hostpci.is_empty() && config.doubtful.is_empty() && config.args.ids.is_empty());
        let proposed = vm::parse(&bytes).fitted();
        let found = if names_any { hookscript::nvidia_slots(app, id, &proposed) } else { Ok(Vec::new()) };
        let (slots, unusable) = match found {
            Ok(slots) => (slots, None),
            Err(unusable) => (Vec::new(), Some(unusable)),
        };
        let takes_none = slots.is_empty() && unusable.is_none() && !config.template;
        let remark = if takes_none { stray::remark(app, id, &proposed) } else { None };
        let takes_part = has_hook || !slots.is_empty();
        Some(Vm {
            has_hook,
            listed: if names_any { hookscript::listed(app, id, &config) } else { Vec::new() },
            remark,
            nothing_named: if takes_none && has_hook { stray::nothing_named(app, id, &config) } else { None },
            dropped: hookscript::dropped_lines(kernel, id, &proposed),
            by_args: if config.args.ids.is_empty() { None } else { hookscript::by_args(kernel, id) },
            other_hook: registration::other_hookscript(kernel, id).filter(|_| takes_part),
            surprises: if takes_part {
                registration::surprises(kernel, id)
            } else {
                registration::Surprises::default()
            },
            elsewhere: if takes_part { nodes::of_vm(kernel, id, &config) } else { Elsewhere::default() },
            runs: takes_part && is_alive(kernel, id),
            refusal: None,
            settings: settings(&bytes),
            config,
            slots,
            unusable,
            id,
            path,
        })
    }

    /// Of several lines with a key the last one counts.
    pub fn setting(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().rfind(|setting| setting.key == key)
    }

    pub fn value(&self, key: &str) -> Option<&str> {
        self.setting(key).map(|setting| setting.value.as_str())
    }

    /// `FILE:LINE` of a key, or the file.
    pub fn place(&self, key: &str) -> String {
        place(&self.path, self.setting(key))
    }

    pub fn takes_gpu(&self) -> bool {
        !self.slots.is_empty() && !self.config.template
    }

    pub fn slots_in_words(&self) -> String {
        self.slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    pub fn is_q35(&self) -> bool {
        self.value("machine").is_some_and(|machine| machine.contains("q35"))
    }
}

pub fn place(path: &str, setting: Option<&Setting>) -> String {
    setting.map_or_else(|| path.to_string(), |setting| format!("{path}:{}", setting.line))
}

impl Container {
    fn read(
        app: &App,
        config: &Config,
        id: u32,
        is_attached: bool,
        is_asked: bool,
        slots: &[Slot],
    ) -> Option<Container> {
        let kernel = app.kernel;
        let path = format!("/etc/pve/lxc/{id}.conf");
        let bytes = kernel.read(&path).ok()?;
        let theirs = containers::with_included(kernel, ct::parse_next(&bytes));
        let has_nvidia = containers::has_nvidia(&theirs);
        let is_looked_at = (has_nvidia && !slots.is_empty()) || is_attached || is_asked;
        let facts = if is_looked_at { check::facts(app, config, id, is_attached) } else { Ok(Vec::new()) };
        Some(Container {
            attaching: None,
            given: containers::given(&theirs).collect(),
            facts: facts.map_err(|exit| exit.to_string()),
            settings: settings(&bytes),
            config: theirs,
            has_nvidia,
            id,
            path,
        })
    }

    pub fn place_of(&self, is_it: impl Fn(&Setting) -> bool) -> String {
        place(&self.path, self.settings.iter().find(|setting| is_it(setting)))
    }
}

/// What CUDA needs beside a card's own node.
const NODES: [&str; 2] = ["/dev/nvidiactl", UVM];

impl Container {
    /// The line that gives it a card, where it lacks other nodes, and those.
    pub fn lacks(&self) -> Option<(&Given, Vec<&'static str>)> {
        let card = self.given.iter().find(|given| is_gpu(&given.host))?;
        let has = |node: &&str| self.given.iter().any(|given| given.has(node));
        let missing: Vec<&str> = NODES.into_iter().filter(|node| !has(node)).collect();
        let is_whole = missing.is_empty() || containers::nvidia_hook(&self.config).is_some();
        (!is_whole).then_some((card, missing))
    }
}

/// Whether those that lack nodes may be attached.
fn ask_for_attaching(app: &App, all: &mut [Container], slots: &[Slot], only: Option<u32>) {
    let gpus: Vec<SlotId> = slots.iter().take(usize::from(slots.len() > 1)).map(|slot| slot.id).collect();
    let is_asked = |one: &&mut Container| only.is_none_or(|only| only == one.id) && one.lacks().is_some();
    for container in all.iter_mut().filter(is_asked).take(PLANS) {
        let wish = Wish { gpus: gpus.clone(), style: None, dri: false };
        container.attaching = Some(attach::plan(app, container.id, &wish).map(drop).map_err(|exit| exit.to_string()));
    }
}

/// What is among the snippets of these, as guests name it: `nas:snippets/x`.
fn snippets(kernel: &dyn Kernel, storages: &[Storage]) -> Vec<String> {
    let of = |storage: &Storage| {
        let files = storage.folder().map(|folder| kernel.list(&folder)).unwrap_or_default();
        files.into_iter().map(|file| format!("{}:snippets/{file}", storage.name)).collect::<Vec<_>>()
    };
    storages.iter().flat_map(of).collect()
}

fn memory(kernel: &dyn Kernel) -> Option<u64> {
    let text = kernel.text("/proc/meminfo")?;
    text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
}

/// The same program, but nobody is told what it comes across.
pub fn silent<'a>(app: &App<'a>) -> App<'a> {
    App { kernel: app.kernel, store: app.store.clone(), story: Story::silent() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_guest_end_with_the_first_section() {
        let found =
            settings(b"#machine: x\nmachine: q35\nlxc.apparmor.profile = a\n\nname: b\n[PENDING]\nmachine: pc\n");
        let found: Vec<(usize, &str, &str)> =
            found.iter().map(|one| (one.line, one.key.as_str(), one.value.as_str())).collect();
        assert_eq!(found, [(2, "machine", "q35"), (3, "lxc.apparmor.profile", "a"), (5, "name", "b")]);
    }
}
