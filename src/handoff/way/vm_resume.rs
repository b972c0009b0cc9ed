//! A VM that is shut down for another runs again when that one's turn is over (`policy.vm_resume`).
//!
//! That is owed from before it is asked to shut down, on its own record. Whoever takes over its slots takes that over with all
//! that was stopped; should nobody, the card comes home, and the VM starts again as well. One that goes on, because it ignored
//! what it was asked for, is owed nothing: what it does later is no business of that start's.

use super::Handoff;
use crate::address::SlotId;
use crate::exit::Result;
use crate::handoff::kept::record::{Owner, Record, Stopped};
use crate::handoff::way::halt::QM;
use crate::proxmox::vm::{self, VmConfig};
use crate::proxmox::{ha, running};
use crate::systemd;
use std::time::Duration;

/// From the hook's end until QEMU runs and Proxmox has let go of the VM: one with very much memory takes minutes.
const BY_PROXMOX: Duration = Duration::from_secs(300);

/// Between systemd's yes and qm's first step nobody is seen at work.
const QUIET: Duration = Duration::from_secs(2);

const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The transient unit that starts a VM again.
fn start_unit(vmid: u32) -> String {
    format!("gpu-handoff-start-{vmid}")
}

/// The transient unit that shuts down a VM.
pub(super) fn shutdown_unit(vmid: u32) -> String {
    format!("gpu-handoff-shutdown-{vmid}")
}

fn config_file(vmid: u32) -> String {
    format!("/etc/pve/qemu-server/{vmid}.conf")
}

/// A VM that is being started is owed no start.
pub(super) fn is_itself(what: &Stopped, owner: &Owner) -> bool {
    matches!(what, Stopped::Vm(vmid) if owner.vmid() == Some(*vmid))
}

impl Handoff<'_> {
    /// On record before it is asked to shut down.
    ///
    /// # Errors
    /// When somebody has the lock of its slots, or it cannot be written: then it must not be shut down.
    pub(super) fn owe_start(&self, vmid: u32, slots: &[SlotId], again: &str) -> Result<()> {
        let locked = self.lock(self.config.time.lock, slots, again)?;
        let Some(mut record) = self.store.record(&Owner::Vm(vmid))? else { return Ok(()) };
        let own = Stopped::Vm(vmid);
        if !record.stopped.contains(&own) {
            record.stopped.push(own);
            locked.save(&record)?;
        }
        Ok(())
    }

    /// It runs, and nobody shuts it down any more.
    pub(super) fn owe_no_start(&self, vmid: u32) -> Result<()> {
        let own = Stopped::Vm(vmid);
        let owing = || -> Result<Option<Record>> {
            let record = self.store.record(&Owner::Vm(vmid))?.filter(|record| record.stopped.contains(&own));
            Ok(record.filter(|_| running::qemu_pid(self.kernel, vmid).is_some()))
        };
        let Some(record) = owing()? else { return Ok(()) };
        let locked = self.lock(Duration::ZERO, &record.slots(), "see gpu-handoff --status")?;
        if let Some(mut record) = owing()? {
            record.stopped.retain(|what| *what != own);
            locked.save(&record)?;
        }
        Ok(())
    }

    /// VMs that were asked to shut down by a start that is over, and go on.
    pub(super) fn forget_who_goes_on(&self) {
        for record in self.store.each_record().into_iter().flatten() {
            let Some(vmid) = record.owner.vmid().filter(|vmid| record.stopped.contains(&Stopped::Vm(*vmid))) else {
                continue;
            };
            let is_asked = || self.store.next_after(self.kernel, vmid).is_some() || self.is_at(&shutdown_unit(vmid));
            let goes_on = || running::qemu_pid(self.kernel, vmid).is_some() && !is_asked();
            if !goes_on() {
                continue;
            }
            // Whoever asked may have been killed since, before systemd was at it.
            self.kernel.sleep(QUIET);
            if goes_on() {
                // If somebody is at it, the keeper comes again.
                let _ = self.owe_no_start(vmid);
            }
        }
    }

    /// Whether this start is not a person's: then nobody has to make way for it.
    pub(super) fn is_started_again(&self, vmid: u32) -> bool {
        let unit = start_unit(vmid);
        systemd::has_processes(self.kernel, &format!("system.slice/{unit}.service")) && self.is_at(&unit)
    }

    /// Why nobody starts it any more; none when it is to be started.
    pub(super) fn is_not_to_start(&self, vmid: u32) -> Option<&'static str> {
        // Without Proxmox's file system nothing is known of any VM.
        if !self.kernel.exists("/etc/pve/qemu-server") {
            return None;
        }
        if !self.kernel.exists(&config_file(vmid)) {
            return Some("this node does not have it any more");
        }
        if ha::manages(self.kernel, "vm", vmid) {
            return Some("HA manages it now, and starts it");
        }
        self.config_of(vmid).template.then_some("it is a template now")
    }

    /// Starts it, as a person would; its own hook has the card leave. That goes on by itself, whatever becomes of this run.
    ///
    /// # Errors
    /// Why it does not run, and what to type.
    pub(super) fn start_vm(&self, vmid: u32) -> std::result::Result<(), String> {
        // One that is backed up runs as well, and no longer than that.
        if let Some(lock) = self.config_of(vmid).lock.filter(|lock| !lock.is_empty()) {
            let lock = lock.escape_debug();
            return Err(format!("waits: it is locked ({lock}), if nothing is at it: qm unlock {vmid}"));
        }
        // The lock first: whoever lets go of it has started QEMU before.
        let is_through = || !running::is_locked(self.kernel, vmid) && running::qemu_pid(self.kernel, vmid).is_some();
        if is_through() {
            return Ok(());
        }
        if let Some(why) = self.in_its_way(vmid) {
            return Err(format!("waits: {why}"));
        }
        let (unit, id) = (start_unit(vmid), vmid.to_string());
        // Proxmox's daemons that serve a VM beside QEMU may be among what qm leaves behind.
        let asked = systemd::run_and_leave(self.kernel, &unit, &[QM, "start", &id]);
        asked.map_err(|error| format!("does not run again ({error}); start it: qm start {vmid}"))?;
        let time = &self.config.time;
        let end = self.kernel.now() + time.lock + time.stop + time.handoff + BY_PROXMOX;
        let mut quiet_since = self.kernel.now();
        while !is_through() {
            let now = self.kernel.now();
            if running::is_locked(self.kernel, vmid) || self.is_at(&unit) {
                quiet_since = now;
            }
            if now.saturating_sub(quiet_since) >= QUIET {
                return Err(format!("does not run again, as its task log says; start it: qm start {vmid}"));
            }
            if now >= end || self.kernel.is_asked_to_end() {
                return Err("is still being started".to_string());
            }
            self.kernel.sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// What must be over before.
    fn in_its_way(&self, vmid: u32) -> Option<String> {
        if running::is_locked(self.kernel, vmid) {
            return Some("Proxmox is at work on it".to_string());
        }
        // In mode `stop` it starts again in a moment, and wants its card.
        let names = self.kernel.list("/etc/pve/qemu-server");
        let others = names.iter().filter_map(|name| name.strip_suffix(".conf")?.parse().ok());
        let mut others = others.filter(|other: &u32| *other != vmid);
        let comes_back = |other: &u32| {
            let config = self.config_of(*other);
            let is_backed_up = config.lock.as_deref() == Some("backup") && !config.hostpci.is_empty();
            is_backed_up && running::qemu_pid(self.kernel, *other).is_none()
        };
        others.find(comes_back).map(|other| format!("VM {other} is being backed up, and may come back for the card"))
    }

    fn config_of(&self, vmid: u32) -> VmConfig {
        vm::parse(&self.kernel.read(&config_file(vmid)).unwrap_or_default())
    }

    fn is_at(&self, unit: &str) -> bool {
        let state = systemd::state(self.kernel, &format!("{unit}.service"));
        matches!(state.as_deref(), Some("active" | "activating" | "deactivating"))
    }
}
