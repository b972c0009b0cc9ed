//! The table of verbs: parser, help, manual page and completions are made of it.

use super::call::Call;
use super::flags::Argument::{May, Needs, Several};
use super::flags::{
    ALL, Argument, CHECK, CLUSTER, CMDLINE, CTID, DEFER, DRI, DRIVER_ONLY, DRY_RUN, EXPLAIN, FIX, Flag, GPU, ID,
};
use super::flags::{
    INSTALL_DEPS, JSON, KERNEL, MODE, NUMBER, OUTPUT_FORMAT, OWED, PHASE, PURGE, QUIET, REBOOT, REPORT, SLOT, STOP,
};
use super::flags::{STORAGE, STYLE, TEST, TO, Term, UNDO, UNFINISHED, VERB, VMID, WATCH, WRITE};
use super::given::{Given, usage};
use super::publish;
use crate::events::settle;
use crate::events::watch::After;
use crate::exit::Result;
use crate::handoff::way::reconcile::Scope;
use crate::handoff::way::resume;
use crate::setup::{self, driver};

/// Under which heading of `--help` a verb stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Heading {
    Everyday,
    Container,
    Host,
    /// Runs by itself: `--help` does not list it.
    Internal,
}

pub struct Verb {
    /// The first is the one to use; the others are older spellings. Some are of two words.
    pub names: &'static [&'static str],
    pub kind: Heading,
    /// Flags are in here too: what is not, does not go with this verb.
    pub arguments: &'static [Argument],
    pub about: &'static str,
    /// What the list of verbs has no room for.
    pub more: &'static str,
    /// A call with this verb, without the program's name.
    pub example: &'static str,
    pub(super) call: fn(&mut Given) -> Result<Call>,
}

impl Verb {
    /// The one to use.
    pub fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or_default()
    }

    /// Of its own.
    pub fn flags(&self) -> impl Iterator<Item = &'static Flag> {
        self.arguments.iter().flat_map(Argument::terms).filter_map(Term::flag)
    }

    /// With those that go with more than one verb.
    pub fn all_flags(&self) -> impl Iterator<Item = &'static Flag> {
        let has_json = self.flags().any(|flag| flag.name == "json");
        self.flags().chain(has_json.then_some(&OUTPUT_FORMAT)).chain([&QUIET])
    }

    pub(super) fn takes(&self, flag: &str) -> bool {
        self.all_flags().any(|own| own.name == flag)
    }

    /// What may follow it.
    pub fn usage(&self) -> String {
        let arguments: Vec<String> = self.arguments.iter().map(Argument::usage).collect();
        arguments.join(" ")
    }
}

/// Every flag that there is, as often as it stands in the table.
pub(super) fn flags() -> impl Iterator<Item = &'static Flag> {
    VERBS.iter().flat_map(Verb::all_flags)
}

pub const VERBS: &[Verb] = &[
    Verb {
        names: &["--status", "status"],
        kind: Heading::Everyday,
        arguments: &[May(&[JSON]), May(&[CHECK, WATCH, CLUSTER])],
        about: "every NVIDIA GPU: functions, drivers, owner, users, last handoff",
        more: "Ask as root: others are not shown who uses a GPU. With --check it ends with 1 when something is not as it \
               should be, which it names: a GPU that is stranded or wedged or has not all that is its own, a set-up that is \
               not done, a file that cannot be read. With --watch it is shown whenever it changes, until Ctrl-C; with --json as \
               well a document on each line. With --cluster who has the cards of every node, and how long ago each \
               node told that.",
        example: "status",
        call: |given| {
            let asked: Vec<&str> = ["check", "watch", "cluster"].into_iter().filter(|flag| given.has(flag)).collect();
            let json = given.json()?;
            match asked.as_slice() {
                [one, other, ..] => Err(usage(&format!("--{one} and --{other} exclude each other"))),
                ["watch"] => Ok(Call::WatchStatus { json }),
                ["cluster"] => Ok(Call::ClusterStatus { json }),
                asked => Ok(Call::Status { json, check: !asked.is_empty() }),
            }
        },
    },
    Verb {
        names: &["doctor"],
        kind: Heading::Everyday,
        arguments: &[
            May(&[ID]),
            May(&[JSON]),
            May(&[EXPLAIN]),
            May(&[FIX]),
            May(&[DRY_RUN]),
            May(&[REPORT]),
            May(&[TO]),
        ],
        about: "what is wrong with this host, its guests and containers, and how to put it right",
        more: "With an ID of that guest alone. It ends with 1 when there is an error. --explain tells more of a finding, or with \
               all lists them; --fix, with --dry-run first, makes missing nodes and takes away what is left over; --report has \
               all that a helper would ask for, without addresses of the network, also in a file (--to).",
        example: "doctor",
        call: |given| Ok(Call::Doctor(given.doctor()?)),
    },
    Verb {
        names: &["history"],
        kind: Heading::Everyday,
        arguments: &[May(&[VMID]), May(&[NUMBER]), May(&[JSON])],
        about: "past handoffs and refusals, the newest last",
        more: "Each with when it ended (local time; UTC with --json), which way it went, how long it took, its result and \
               the error; with -n the newest only.",
        example: "history 111 -n 5",
        call: |given| {
            let count = given.number()?;
            let vmid = if given.words.is_empty() { None } else { Some(given.id("VM")?) };
            Ok(Call::History { json: given.json()?, vmid, count })
        },
    },
    Verb {
        names: &["plan"],
        kind: Heading::Everyday,
        arguments: &[Needs(&[VMID]), May(&[JSON])],
        about: "the steps that starting this VM would take now, or why it would be refused",
        more: "",
        example: "plan 111",
        call: |given| Ok(Call::Plan { vmid: given.id("VM")?, json: given.json()? }),
    },
    Verb {
        names: &["switch"],
        kind: Heading::Everyday,
        arguments: &[Needs(&[VMID]), May(&[DRY_RUN])],
        about: "shut down the VM that has this one's GPU, and start this one",
        more: "Whatever policy.vm says; hard only where that is stop. The GPU stays with vfio-pci in between. Refused where the \
               other VM is locked, managed by HA, or does not shut down within time.stop_s.",
        example: "switch 112",
        call: |given| Ok(Call::Switch { vmid: given.id("VM")? }),
    },
    Verb {
        names: &["enable"],
        kind: Heading::Everyday,
        arguments: &[Needs(&[ID]), May(&[STORAGE]), May(&[DRY_RUN])],
        about: "make this the hookscript of a VM or container; never in the place of another",
        more: "What the next start of a VM would be refused for is told. With --storage the hookscript is a small script on that \
               shared storage, with which the guest also starts on a node without gpu-handoff.",
        example: "enable 111",
        call: |given| Ok(Call::Enable { storage: given.value("storage"), id: given.id("guest")? }),
    },
    Verb {
        names: &["disable"],
        kind: Heading::Everyday,
        arguments: &[Needs(&[ID]), May(&[DRY_RUN])],
        about: "remove this hookscript from a VM or container, and no other",
        more: "",
        example: "disable 111",
        call: |given| Ok(Call::Disable { id: given.id("guest")? }),
    },
    Verb {
        names: &["to-vfio", "to_vfio", "handoff vfio"],
        kind: Heading::Everyday,
        arguments: &[May(&[SLOT, GPU]), May(&[DRY_RUN])],
        about: "give a GPU to vfio-pci by hand, until to-home or a reboot",
        more: "",
        example: "to-vfio 01:00",
        call: |given| Ok(Call::ToVfio { slot: given.slot()? }),
    },
    Verb {
        names: &["to-home", "to-nvidia", "to_nvidia", "handoff nvidia"],
        kind: Heading::Everyday,
        arguments: &[May(&[SLOT, GPU]), May(&[DRY_RUN])],
        about: "bring a GPU home by hand, whatever its home is",
        more: "",
        example: "to-home 01:00",
        call: |given| Ok(Call::ToNvidia { slot: given.slot()? }),
    },
    Verb {
        names: &["container attach"],
        kind: Heading::Container,
        arguments: &[Needs(&[CTID]), Several(&[SLOT]), May(&[GPU]), May(&[STYLE]), May(&[DRI]), May(&[DRY_RUN])],
        about: "let a container use the GPU: device rules and nodes in its configuration",
        more: "It starts without the GPU too; with --style dev only while the nodes are there. --dri adds the DRM nodes.",
        example: "container attach 101",
        call: |given| Ok(Call::Attach { ctid: given.id("container")?, wish: given.wish()? }),
    },
    Verb {
        names: &["container detach"],
        kind: Heading::Container,
        arguments: &[Needs(&[CTID]), May(&[DRY_RUN])],
        about: "take out of its configuration what attach put in, and nothing else",
        more: "",
        example: "container detach 101",
        call: |given| Ok(Call::Detach { ctid: given.id("container")? }),
    },
    Verb {
        names: &["container setup"],
        kind: Heading::Container,
        arguments: &[
            Needs(&[CTID]),
            Several(&[SLOT]),
            May(&[DRIVER_ONLY]),
            May(&[GPU]),
            May(&[STYLE]),
            May(&[DRI]),
            May(&[DRY_RUN]),
        ],
        about: "attach, then install the host's version of the driver and CUDA in the container, and verify",
        more: "After a failure the same call goes on.",
        example: "container setup 101 --driver-only",
        call: |given| {
            let (ctid, driver_only) = (given.id("container")?, given.has("driver-only"));
            Ok(Call::ContainerSetup { ctid, wish: given.wish()?, driver_only })
        },
    },
    Verb {
        names: &["container check"],
        kind: Heading::Container,
        arguments: &[Needs(&[CTID, ALL])],
        about: "whether driver, device nodes and rules of a container fit those of the host",
        more: "",
        example: "container check --all",
        call: |given| Ok(Call::Check { who: given.who()? }),
    },
    Verb {
        names: &["container sync"],
        kind: Heading::Container,
        arguments: &[Needs(&[CTID, ALL]), May(&[DRY_RUN])],
        about: "bring containers to the host's version of the driver, and their rules up to date",
        more: "",
        example: "container sync --all",
        call: |given| Ok(Call::Sync { who: given.who()? }),
    },
    Verb {
        names: &["setup vfio"],
        kind: Heading::Host,
        arguments: &[May(&[CMDLINE]), May(&[UNDO]), May(&[DEFER]), May(&[DRY_RUN])],
        about: "prepare the host: vfio-pci at boot, and no driver that takes the card first",
        more: "--cmdline turns the IOMMU on in the kernel's command line; --undo takes it all back; --defer keeps what fails for setup pending.",
        example: "setup vfio --cmdline",
        call: |given| given.set_up(setup::What::Vfio(given.vfio())),
    },
    Verb {
        names: &["setup driver"],
        kind: Heading::Host,
        arguments: &[May(&[INSTALL_DEPS]), May(&[PURGE]), May(&[KERNEL]), May(&[UNDO]), May(&[DEFER]), May(&[DRY_RUN])],
        about: "install NVIDIA's driver on the host from its own installer",
        more: "--kernel builds only its modules for that kernel; --install-deps has apt install what that takes; --purge has apt purge a driver from packages; --undo takes it back.",
        example: "setup driver --dry-run",
        call: |given| match given.value("kernel") {
            None => given.set_up(setup::What::Driver(given.driver())),
            Some(_) if given.driver() != driver::Wish::default() => {
                Err(usage("--kernel stands alone, or with --dry-run"))
            }
            Some(release) => given.set_up(setup::What::Kernel(release)),
        },
    },
    Verb {
        names: &["setup all"],
        kind: Heading::Host,
        arguments: &[May(&[CMDLINE]), May(&[INSTALL_DEPS]), May(&[PURGE]), May(&[UNDO]), May(&[DRY_RUN])],
        about: "setup vfio, and setup driver where one is configured",
        more: "",
        example: "setup all --undo",
        call: |given| given.set_up(setup::What::All(given.vfio(), given.driver())),
    },
    Verb {
        names: &["setup pending"],
        kind: Heading::Host,
        arguments: &[May(&[DRY_RUN])],
        about: "what set-up could not do when it was due; runs by itself at boot",
        more: "",
        example: "setup pending --dry-run",
        call: |given| given.set_up(setup::What::Pending),
    },
    Verb {
        names: &["config check"],
        kind: Heading::Host,
        arguments: &[],
        about: "what is wrong with the configuration, a line for each mistake",
        more: "A hook goes on without a key that is wrong.",
        example: "config check",
        call: |_| Ok(Call::ConfigCheck),
    },
    Verb {
        names: &["config show"],
        kind: Heading::Host,
        arguments: &[],
        about: "every key with the value that holds, and where it comes from",
        more: "",
        example: "config show",
        call: |_| Ok(Call::ConfigShow),
    },
    Verb {
        names: &["metrics"],
        kind: Heading::Host,
        arguments: &[May(&[WRITE])],
        about: "numbers for Prometheus: who has each GPU, handoffs, how long they took",
        more: "OpenMetrics 1.0. With --write they are in Prometheus's own text format, for node_exporter's textfile collector; \
               with metrics.textfile in the configuration whatever changes something does so by itself.",
        example: "metrics",
        call: |given| Ok(Call::Metrics { write: given.has("write") }),
    },
    Verb {
        names: &["notify"],
        kind: Heading::Host,
        arguments: &[May(&[TEST])],
        about: "tell by Proxmox's notifications what is wrong, once while it lasts",
        more: "What notify.about in the configuration names; runs by itself when something has changed. --test sends one that \
               says that it is a test.",
        example: "notify --test",
        call: |given| Ok(Call::Notify { test: given.has("test") }),
    },
    Verb {
        names: &["reconcile"],
        kind: Heading::Host,
        arguments: &[May(&[UNFINISHED, OWED]), May(&[DRY_RUN])],
        about: "bring home what a VM that does not run left behind; make missing device nodes",
        more: "Runs at boot. --unfinished: only what a killed handoff left behind; --owed is what the keeper runs by itself.",
        example: "reconcile --dry-run",
        call: |given| {
            let scope = match (given.has("unfinished"), given.has("owed")) {
                (true, true) => return Err(usage("--unfinished and --owed exclude each other")),
                (true, false) => Scope::Unfinished,
                (false, true) => Scope::Owed,
                (false, false) => Scope::All,
            };
            Ok(Call::Reconcile { scope })
        },
    },
    Verb {
        names: &["udev"],
        kind: Heading::Internal,
        arguments: &[],
        about: "what a device event calls for, read from the environment; udev runs it",
        more: "",
        example: "udev",
        call: |_| Ok(Call::Udev),
    },
    Verb {
        names: &[settle::VERB],
        kind: Heading::Internal,
        arguments: &[],
        about: "after device events: make missing device nodes, see to containers whose nodes went stale",
        more: "",
        example: "settle",
        call: |_| Ok(Call::Settle),
    },
    Verb {
        names: &[resume::VERB],
        kind: Heading::Internal,
        arguments: &[],
        about: "start again what was stopped for a handoff that is over",
        more: "",
        example: "resume",
        call: |_| Ok(Call::Resume),
    },
    Verb {
        names: &["watch"],
        kind: Heading::Internal,
        arguments: &[Needs(&[VMID]), May(&[REBOOT, STOP])],
        about: "what a hook leaves behind: wait until Proxmox is through with the VM, or its GPU must come home",
        more: "",
        example: "watch 111",
        call: |given| {
            let after = match (given.has("reboot"), given.has("stop")) {
                (true, _) => After::Reboot,
                (_, true) => After::Stop,
                _ => After::Start,
            };
            Ok(Call::Watch { vmid: given.id("VM")?, after })
        },
    },
    Verb {
        names: &[publish::VERB],
        kind: Heading::Internal,
        arguments: &[],
        about: "tell the other nodes of the cluster who has this one's cards",
        more: "At most every ten seconds, and only what is another than before. Without quorum it is tried again for ten minutes.",
        example: "publish",
        call: |_| Ok(Call::Publish),
    },
    Verb {
        names: &["vzdump"],
        kind: Heading::Internal,
        arguments: &[Needs(&[PHASE]), May(&[MODE]), May(&[VMID])],
        about: "what the script of /etc/vzdump.conf calls: free the GPU for the backup of a VM that is stopped",
        more: "It is brought home when the job ends. vzdump.script in the configuration is called after it.",
        example: "vzdump job-end",
        call: |given| match std::mem::take(&mut given.words) {
            [] => Err(usage("vzdump needs a phase")),
            words => Ok(Call::Vzdump { words: words.iter().map(ToString::to_string).collect() }),
        },
    },
    Verb {
        names: &["--help", "-h", "help"],
        kind: Heading::Host,
        arguments: &[May(&[VERB])],
        about: "what there is, or one verb with an example",
        more: "",
        example: "help plan",
        call: |_| Ok(Call::Help { topic: String::new() }),
    },
    Verb {
        names: &["--version", "-V"],
        kind: Heading::Host,
        arguments: &[],
        about: "the version",
        more: "",
        example: "--version",
        call: |_| Ok(Call::Version),
    },
];
