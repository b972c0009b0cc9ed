//! Whether a VM runs, or Proxmox is busy with a guest, read from what Proxmox leaves in `/run`.

use super::pci_id::PciId;
use super::vm::Passed;
use crate::sys::{ActError, Kernel, flock_is_held};
use std::time::Duration;

/// A process whose memory is locked does not show its command line, for as long as it likes.
const LIMIT: Duration = Duration::from_secs(1);

/// The options that are looked for come first, before the devices.
const COMMAND_LINE: usize = 4096;

/// That of a QEMU with all devices that Proxmox can give it is shorter.
const WHOLE_COMMAND_LINE: usize = 32 * 1024;

/// The PID of a VM's QEMU. A pid file can outlive its process, so the command line must name that pid file
/// (PVE::QemuServer::Helpers::vm_running_locally).
pub fn qemu_pid(kernel: &dyn Kernel, vmid: u32) -> Option<i32> {
    let file = format!("/run/qemu-server/{vmid}.pid");
    let pid: i32 = kernel.text(&file)?.trim().parse().ok()?;
    let command_line = match kernel.peek(&format!("/proc/{pid}/cmdline"), COMMAND_LINE, LIMIT) {
        Ok(bytes) => bytes,
        // What Proxmox wrote down is all there is to go by.
        Err(ActError::Stuck { .. }) => return Some(pid),
        Err(_) => return None,
    };
    let names_it = command_line.split(|b| *b == 0).any(|argument| {
        let argument = String::from_utf8_lossy(argument);
        argument == file || argument == format!("/var{file}")
    });
    names_it.then_some(pid)
}

/// The devices that a VM's QEMU was given; none when that cannot be seen.
pub fn devices(kernel: &dyn Kernel, vmid: u32) -> Option<Vec<PciId>> {
    let pid = qemu_pid(kernel, vmid)?;
    let command_line = kernel.peek(&format!("/proc/{pid}/cmdline"), WHOLE_COMMAND_LINE, LIMIT).ok()?;
    if command_line.len() == WHOLE_COMMAND_LINE {
        return None;
    }
    let words = command_line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    Some(Passed::of(words).ids)
}

/// Whether Proxmox has noted that this VM's start is through: then it fires post-stop when the VM ends, and not
/// otherwise (PVE::QemuServer::RunState::create_cleanup_flag; since qemu-server 9.1.13).
pub fn is_noted(kernel: &dyn Kernel, vmid: u32) -> bool {
    kernel.exists(&format!("/run/qemu-server/{vmid}.cleanup"))
}

/// Whether Proxmox holds the guest's lock: it is starting, stopping or changing it right now.
pub fn is_locked(kernel: &dyn Kernel, vmid: u32) -> bool {
    flock_is_held(kernel, &format!("/var/lock/qemu-server/lock-{vmid}.conf"))
}

/// As [`is_locked`], of a container.
pub fn is_ct_locked(kernel: &dyn Kernel, ctid: u32) -> bool {
    flock_is_held(kernel, &format!("/run/lock/lxc/pve-config-{ctid}.lock"))
}

/// Whether a backup job runs: of a node's jobs one at a time has this lock, until its very end (PVE::VZDump::getlock).
pub fn is_backing_up(kernel: &dyn Kernel) -> bool {
    flock_is_held(kernel, "/run/vzdump.lock")
}

/// Whether Proxmox stops a VM only to start it again (PVE::QemuServer::create_reboot_request).
pub fn is_rebooting(kernel: &dyn Kernel, vmid: u32) -> bool {
    kernel.exists(&format!("/run/qemu-server/{vmid}.reboot"))
}

/// Whether a VM runs, or Proxmox is in the middle of starting or stopping it.
pub fn is_alive(kernel: &dyn Kernel, vmid: u32) -> bool {
    // The lock first: whoever lets go of it after a start has started QEMU before.
    is_locked(kernel, vmid) || qemu_pid(kernel, vmid).is_some()
}
