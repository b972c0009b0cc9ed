//! The table of verbs and flags.

use super::{Call, Given, usage};
use crate::events::settle;
use crate::events::watch::After;
use crate::handoff::reconcile::Scope;
use crate::handoff::resume;
use crate::setup::{self, driver};
use crate::stop::Result;

/// `--NAME`, or `--NAME VALUE`.
pub(super) struct Flag {
    pub name: &'static str,
    pub has_value: bool,
    pub goes_with: &'static str,
}

pub(super) const FLAGS: &[Flag] = &[
    Flag { name: "json", has_value: false, goes_with: "--status and history" },
    Flag { name: "dry-run", has_value: false, goes_with: "a verb that changes something; for a VM, see plan" },
    Flag { name: "unfinished", has_value: false, goes_with: "reconcile" },
    Flag { name: "owed", has_value: false, goes_with: "reconcile" },
    Flag { name: "reboot", has_value: false, goes_with: "watch" },
    Flag { name: "stop", has_value: false, goes_with: "watch" },
    Flag { name: "gpu", has_value: true, goes_with: "container attach and container setup" },
    Flag { name: "style", has_value: true, goes_with: "container attach and container setup" },
    Flag { name: "dri", has_value: false, goes_with: "container attach and container setup" },
    Flag { name: "driver-only", has_value: false, goes_with: "container setup" },
    Flag { name: "cmdline", has_value: false, goes_with: "setup vfio and setup all" },
    Flag { name: "install-deps", has_value: false, goes_with: "setup driver and setup all" },
    Flag { name: "purge", has_value: false, goes_with: "setup driver and setup all" },
    Flag { name: "kernel", has_value: true, goes_with: "setup driver" },
    Flag { name: "defer", has_value: false, goes_with: "setup vfio and setup driver" },
    Flag { name: "undo", has_value: false, goes_with: "setup vfio, setup driver and setup all" },
    Flag { name: "all", has_value: false, goes_with: "container check and container sync" },
];

pub(super) struct Verb {
    /// The first is the one to use; the others are older spellings. Some are of two words.
    pub names: &'static [&'static str],
    /// Flags are in here too: what is not, does not go with this verb.
    pub arguments: &'static str,
    pub about: &'static str,
    pub call: fn(&mut Given) -> Result<Call>,
}

pub(super) const VERBS: &[Verb] = &[
    Verb {
        names: &["--status", "status"],
        arguments: "[--json]",
        about: "every NVIDIA GPU: functions, drivers, owner, users, last handoff",
        call: |given| Ok(Call::Status { json: given.has("json") }),
    },
    Verb {
        names: &["history"],
        arguments: "[--json]",
        about: "past handoffs and refusals, the newest last: when, which way, how long, with what result",
        call: |given| Ok(Call::History { json: given.has("json") }),
    },
    Verb {
        names: &["to-vfio", "to_vfio", "handoff vfio"],
        arguments: "[SLOT] [--dry-run]",
        about: "give a GPU to vfio-pci by hand, until to-nvidia or a reboot",
        call: |given| Ok(Call::ToVfio { slot: given.slot()?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["to-nvidia", "to_nvidia", "handoff nvidia"],
        arguments: "[SLOT] [--dry-run]",
        about: "bring a GPU home by hand, whatever its home is",
        call: |given| Ok(Call::ToNvidia { slot: given.slot()?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["plan"],
        arguments: "VMID",
        about: "the steps that starting this VM would take now, or why it would be refused",
        call: |given| Ok(Call::Plan { vmid: given.id("VM")? }),
    },
    Verb {
        names: &["reconcile"],
        arguments: "[--unfinished|--owed] [--dry-run]",
        about: "bring home what a VM that does not run, or (--unfinished) only what a killed handoff left behind; \
                make missing device nodes; --owed is what the keeper runs by itself",
        call: |given| {
            let scope = match (given.has("unfinished"), given.has("owed")) {
                (true, true) => return Err(usage("--unfinished and --owed exclude each other")),
                (true, false) => Scope::Unfinished,
                (false, true) => Scope::Owed,
                (false, false) => Scope::All,
            };
            Ok(Call::Reconcile { scope, dry_run: given.has("dry-run") })
        },
    },
    Verb {
        names: &["container attach"],
        arguments: "CTID [--gpu SLOT] [--style mount|dev] [--dri] [--dry-run]",
        about: "let a container use the GPU: device rules and nodes in its configuration",
        call: |given| {
            Ok(Call::Attach { ctid: given.id("container")?, wish: given.wish()?, dry_run: given.has("dry-run") })
        },
    },
    Verb {
        names: &["container detach"],
        arguments: "CTID [--dry-run]",
        about: "take out of its configuration what attach put in, and nothing else",
        call: |given| Ok(Call::Detach { ctid: given.id("container")?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["container setup"],
        arguments: "CTID [--driver-only] [--gpu SLOT] [--style mount|dev] [--dri] [--dry-run]",
        about: "attach, then install the host's version of the driver and CUDA in the container, and verify",
        call: |given| {
            let (wish, driver_only) = (given.wish()?, given.has("driver-only"));
            Ok(Call::Setup { ctid: given.id("container")?, wish, driver_only, dry_run: given.has("dry-run") })
        },
    },
    Verb {
        names: &["container check"],
        arguments: "CTID|--all",
        about: "whether driver, device nodes and rules of a container fit those of the host",
        call: |given| Ok(Call::Check { who: given.who()? }),
    },
    Verb {
        names: &["container sync"],
        arguments: "CTID|--all [--dry-run]",
        about: "bring containers to the host's version of the driver, and their rules up to date",
        call: |given| Ok(Call::Sync { who: given.who()?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["enable"],
        arguments: "ID [--dry-run]",
        about: "make this the hookscript of a VM or container; never in the place of another",
        call: |given| Ok(Call::Enable { id: given.id("guest")?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["disable"],
        arguments: "ID [--dry-run]",
        about: "remove this hookscript from a VM or container, and no other",
        call: |given| Ok(Call::Disable { id: given.id("guest")?, dry_run: given.has("dry-run") }),
    },
    Verb {
        names: &["setup vfio"],
        arguments: "[--cmdline] [--undo] [--defer] [--dry-run]",
        about: "prepare the host: vfio-pci at boot, no driver that takes the card first, with --cmdline the IOMMU on the \
                kernel's command line; --undo takes it all back",
        call: |given| given.set_up(setup::What::Vfio(given.vfio())),
    },
    Verb {
        names: &["setup driver"],
        arguments: "[--install-deps] [--purge] [--kernel KERNEL] [--undo] [--defer] [--dry-run]",
        about: "install NVIDIA's driver on the host from its own installer, or with --kernel only its modules for that \
                kernel; --undo takes it back",
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
        arguments: "[--cmdline] [--install-deps] [--purge] [--undo] [--dry-run]",
        about: "setup vfio, and setup driver where one is configured",
        call: |given| given.set_up(setup::What::All(given.vfio(), given.driver())),
    },
    Verb {
        names: &["setup pending"],
        arguments: "[--dry-run]",
        about: "what set-up could not do when it was due; runs by itself at boot",
        call: |given| given.set_up(setup::What::Pending),
    },
    Verb {
        names: &["udev"],
        arguments: "",
        about: "what a device event calls for, read from the environment; udev runs it",
        call: |_| Ok(Call::Udev),
    },
    Verb {
        names: &[settle::VERB],
        arguments: "",
        about: "after device events: make missing device nodes, see to containers whose nodes went stale; runs by itself",
        call: |_| Ok(Call::Settle),
    },
    Verb {
        names: &[resume::VERB],
        arguments: "",
        about: "start again what was stopped for a handoff that is over; runs by itself",
        call: |_| Ok(Call::Resume),
    },
    Verb {
        names: &["watch"],
        arguments: "VMID [--reboot|--stop]",
        about: "what a hook leaves behind: wait until Proxmox is through with the VM, or its GPU must come home",
        call: |given| {
            let after = match (given.has("reboot"), given.has("stop")) {
                (true, _) => After::Reboot,
                (_, true) => After::Stop,
                _ => After::Start,
            };
            Ok(Call::Watch { vmid: given.id("VM")?, after })
        },
    },
    Verb { names: &["--help", "-h", "help"], arguments: "", about: "this text", call: |_| Ok(Call::Help) },
    Verb { names: &["--version", "-V"], arguments: "", about: "the version", call: |_| Ok(Call::Version) },
];
