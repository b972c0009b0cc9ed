//! What can go wrong with one change to the machine.

use gpu_handoff::sys::Action;
use nix::libc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Of all changes that a run makes, the one that it befalls, counted from 1.
    pub at: usize,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The kernel says no, once.
    Errno(i32),
    /// A helper program says no, once.
    Words,
    /// modprobe loads the first of several modules and fails with the rest.
    OnlyTheFirst,
    /// The kernel says no from here on, also to whatever is tried to put things right.
    EverythingFails,
    /// Success is reported and nothing is done, once.
    Lie,
    /// Success is reported and nothing is done from here on.
    EverythingLies,
    /// It is done, but who did it died before it could say so.
    DoneUnheard,
    /// No process could be started to do it.
    NoProcess,
    /// It hangs past every limit, and is done in the end.
    HangEnds,
    HangForever,
    /// Everything hangs from here on, for ever.
    EverythingHangs,
    /// SIGKILL just before. `alone`: the worker's own last act, reconcile, does not come about either.
    KillBefore {
        alone: bool,
    },
    KillAfter {
        alone: bool,
    },
    /// SIGKILL while the call hangs.
    KillInHang {
        ends: bool,
    },
    /// SIGKILL at any look at the machine; `at` counts looks.
    KillAtLook,
    /// Just before, somebody whom the search for holders did not see opens the first card's node, and keeps it open for
    /// a while.
    Opened,
    /// The same through nvidiactl: the first card is attached to it.
    Attached,
    /// Somebody begins to open it, which takes a while: there is no descriptor yet.
    Opening,
    /// SIGTERM: asked to end from here on.
    Term,
    /// At any look, Proxmox takes VM 111's lock: it is being started. Not a fault, but as inconvenient.
    StartAtLook,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Errno(_) | Kind::Words => "error",
            Kind::OnlyTheFirst => "half loaded",
            Kind::EverythingFails => "errors from here on",
            Kind::Lie => "lie",
            Kind::EverythingLies => "lies from here on",
            Kind::DoneUnheard => "done, but unheard",
            Kind::NoProcess => "no process",
            Kind::HangEnds => "hang that ends",
            Kind::HangForever => "hang for ever",
            Kind::EverythingHangs => "hangs from here on",
            Kind::KillBefore { alone: true } => "kill before, alone",
            Kind::KillBefore { alone: false } => "kill before",
            Kind::KillAfter { alone: true } => "kill after, alone",
            Kind::KillAfter { alone: false } => "kill after",
            Kind::KillInHang { ends: true } => "kill in a hang that ends",
            Kind::KillInHang { ends: false } => "kill in a hang for ever",
            Kind::KillAtLook => "kill at any look",
            Kind::Opened => "opened unseen",
            Kind::Attached => "attached unseen",
            Kind::Opening => "opening",
            Kind::Term => "SIGTERM",
            Kind::StartAtLook => "start at any look",
        }
    }

    pub fn is_hang(self) -> bool {
        matches!(self, Kind::HangEnds | Kind::HangForever | Kind::EverythingHangs | Kind::KillInHang { .. })
    }

    pub fn is_kill(self) -> bool {
        matches!(self, Kind::KillBefore { .. } | Kind::KillAfter { .. } | Kind::KillInHang { .. } | Kind::KillAtLook)
    }

    /// No worker is left to put things right.
    pub fn leaves_nobody(self) -> bool {
        matches!(self, Kind::KillBefore { alone: true } | Kind::KillAfter { alone: true } | Kind::KillAtLook)
    }

    /// The hang comes to an end.
    pub fn ends(self) -> bool {
        matches!(self, Kind::HangEnds | Kind::KillInHang { ends: true })
    }

    /// Going back is hindered as well, so it need not succeed within the same run.
    pub fn goes_on(self) -> bool {
        matches!(self, Kind::EverythingFails | Kind::EverythingLies | Kind::EverythingHangs)
    }
}

/// The errors that the kernel can give for an action, besides those that follow from the machine's state: a device
/// that is not bound is ENODEV, a module in use EWOULDBLOCK, an id that is absent ENODEV without our doing.
fn errors_of(action: &Action) -> Vec<Kind> {
    let of = |numbers: &[i32]| numbers.iter().map(|n| Kind::Errno(*n)).collect();
    match action {
        // driver_set_override: kstrndup fails (ENOMEM); kernfs: the device is going away (ENODEV).
        Action::Write { path, .. } if path.ends_with("/driver_override") => of(&[libc::ENOMEM, libc::ENODEV]),
        // unbind_store: not bound to that driver any more (ENODEV); the driver's directory went (ENOENT).
        Action::Write { path, .. } if path.ends_with("/unbind") => of(&[libc::ENODEV, libc::ENOENT]),
        // drivers_probe_store: whatever device_attach fails with becomes EINVAL; no such device (ENODEV).
        Action::Write { path, .. } if path.ends_with("/drivers_probe") => of(&[libc::EINVAL, libc::ENODEV]),
        // remove_id_store: a text it does not understand (EINVAL); kernfs: no memory. ENODEV would be a lie.
        Action::Write { path, .. } if path.ends_with("/remove_id") => of(&[libc::EINVAL, libc::ENOMEM]),
        // pm_runtime_forbid and pci_bridge_d3_update do not fail; kernfs: the device is going away (ENODEV).
        Action::Write { .. } => of(&[libc::ENODEV]),
        // modprobe: no memory, a module of another kernel, a key that Secure Boot does not know.
        Action::Load { modules } if modules.len() > 1 => vec![Kind::Words, Kind::OnlyTheFirst],
        Action::Load { .. } => vec![Kind::Words],
        // delete_module: in use (EWOULDBLOCK), being loaded or unloaded by somebody else (EBUSY), not allowed (EPERM).
        Action::Unload { .. } => of(&[libc::EWOULDBLOCK, libc::EBUSY, libc::EPERM]),
        // sched_setaffinity: the thread has ended (ESRCH), none of these CPUs is online and in its cpuset (EINVAL).
        Action::Pin { .. } => of(&[libc::ESRCH, libc::EINVAL]),
        // mknod and rename in devtmpfs: full (ENOSPC), read-only (EROFS).
        Action::MakeNode(_) => of(&[libc::ENOSPC, libc::EROFS]),
    }
}

/// Everything that can befall this action.
pub fn kinds_for(action: &Action) -> Vec<Kind> {
    let mut kinds = errors_of(action);
    kinds.extend([
        Kind::EverythingFails,
        Kind::Lie,
        Kind::EverythingLies,
        Kind::DoneUnheard,
        Kind::NoProcess,
        Kind::HangEnds,
        Kind::HangForever,
        Kind::EverythingHangs,
        Kind::KillBefore { alone: true },
        Kind::KillBefore { alone: false },
        Kind::KillAfter { alone: true },
        Kind::KillAfter { alone: false },
        Kind::KillInHang { ends: true },
        Kind::KillInHang { ends: false },
        Kind::Term,
    ]);
    let releases = match action {
        Action::Write { path, .. } => path == "/sys/bus/pci/drivers/nvidia/unbind",
        Action::Unload { module } => module.starts_with("nvidia"),
        _ => false,
    };
    if releases {
        kinds.extend([Kind::Opened, Kind::Attached, Kind::Opening]);
    }
    kinds
}
