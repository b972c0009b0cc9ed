//! A container's configuration as a file of Proxmox's: read, and changed under Proxmox's own lock.

use super::untouched;
use crate::App;
use crate::exit::{Code, Exit, Result};
use crate::proxmox::ct::CtConfig;
use crate::proxmox::{guest, vm};
use crate::sys::{Kernel, Lock, Share};
use crate::trouble::Trouble;
use nix::libc;
use std::io::{self, ErrorKind};
use std::time::Duration;

const LOCKS: &str = "/run/lock/lxc";

/// As long as Proxmox's own tools wait.
const PATIENCE: Duration = Duration::from_secs(10);

/// What Proxmox's cluster file system takes.
const LARGEST: usize = 1024 * 1024;

pub fn path(ctid: u32) -> String {
    format!("/etc/pve/lxc/{ctid}.conf")
}

/// # Errors
/// When there is no such container here, with what there is instead.
pub fn read(kernel: &dyn Kernel, ctid: u32) -> Result<Vec<u8>> {
    let path = path(ctid);
    match kernel.read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(no_container(kernel, ctid)),
        Err(error) => Err(Exit::failed(format!("{path}: {error}"))),
    }
}

fn no_container(kernel: &dyn Kernel, ctid: u32) -> Exit {
    if let Ok(bytes) = kernel.read(&format!("/etc/pve/qemu-server/{ctid}.conf")) {
        return Exit::usage(format!(
            "{ctid} is a VM, no container; a VM takes a GPU as a whole: qm set {ctid} --hostpci0 {} --hookscript \
             local:snippets/gpu-handoff",
            vm::parse(&bytes).hostpci_of(&"0000:01:00")
        ));
    }
    if let Some(node) = guest::node_of(kernel, ctid) {
        return Exit::usage(format!("guest {ctid} is on node {node}: its GPU is given to it there"));
    }
    if kernel.exists(&format!("/var/lib/lxc/{ctid}/config")) {
        return Exit::usage(format!(
            "container {ctid} is LXC's own (/var/lib/lxc/{ctid}/config) and none of Proxmox's: its configuration is yours \
             to edit; pct list shows those of Proxmox"
        ));
    }
    if !kernel.exists("/etc/pve/lxc") && !kernel.exists("/etc/pve/qemu-server") {
        return Exit::refused(
            "there is nothing in /etc/pve: Proxmox's cluster file system is down; systemctl start pve-cluster",
        );
    }
    Exit::usage(format!("there is no container {ctid}: {} does not exist; pct list shows the containers", path(ctid)))
}

/// Then nothing is known of any guest.
fn is_down(kernel: &dyn Kernel) -> bool {
    !kernel.exists("/etc/pve/lxc") && !kernel.exists("/etc/pve/qemu-server")
}

/// Whether this container is nowhere any more. One that was migrated may come back.
pub fn is_gone(kernel: &dyn Kernel, ctid: u32) -> bool {
    !kernel.exists(&path(ctid)) && guest::node_of(kernel, ctid).is_none() && !is_down(kernel)
}

/// # Errors
/// When Proxmox is at work on this container, or somebody said that nobody else shall be.
pub fn refuse_locked(ctid: u32, config: &CtConfig) -> Result<()> {
    let Some(lock) = &config.lock else { return Ok(()) };
    let instead = match lock.as_str() {
        "mounted" => format!("pct unmount {ctid}"),
        _ => format!("wait until that task is over, or if there is none: pct unlock {ctid}"),
    };
    Err(Exit::refused(format!("container {ctid} is locked ({}) and was not touched; {instead}", lock.escape_debug())))
}

/// # Errors
/// When Proxmox starts no container of this configuration anyway.
pub fn refuse_template(ctid: u32, config: &CtConfig) -> Result<()> {
    if !config.template {
        return Ok(());
    }
    Err(Exit::refused(format!(
        "container {ctid} is a template, which never runs; attach its clones: pct clone {ctid} NEWID"
    )))
}

/// # Errors
/// When the cluster has no quorum: then nothing can be changed in /etc/pve.
pub fn refuse_read_only(kernel: &dyn Kernel, ctid: u32) -> Result<()> {
    match kernel.is_writable("/etc/pve/local") {
        Ok(false) => {
            let why = Trouble::new("/etc/pve is read-only, the cluster has no quorum", "see: pvecm status");
            Err(untouched(ctid, why))
        }
        _ => Ok(()),
    }
}

/// # Errors
/// When Proxmox's cluster file system would not take it.
pub fn refuse_large(ctid: u32, bytes: &[u8]) -> Result<()> {
    if bytes.len() <= LARGEST {
        return Ok(());
    }
    Err(untouched(ctid, format!("{} would grow beyond the 1 MiB that Proxmox allows", path(ctid))))
}

/// Proxmox's lock on this container's configuration. Not to be taken with the lock on handoffs held: a hook may be
/// waiting for that one while Proxmox holds this one.
///
/// # Errors
/// When Proxmox kept it for too long.
pub fn lock(app: &App, ctid: u32, again: &str) -> Result<Lock> {
    let path = format!("{LOCKS}/pve-config-{ctid}.lock");
    let cannot = |error: io::Error| untouched(ctid, format!("{path}: {error}"));
    let lock = app.kernel.lock(&path, Share::Alone, PATIENCE).map_err(cannot)?;
    lock.ok_or_else(|| {
        let what = format!("Proxmox is at work on it (it has held {path} for {} s)", PATIENCE.as_secs());
        let why = Trouble::new(what, format!("then try again: {again}"));
        Exit { code: Code::Locked, ..untouched(ctid, why) }
    })
}

/// With the lock held. The mode is the one that Proxmox's cluster file system insists on.
///
/// # Errors
/// When it cannot be written: the old one is whole.
pub fn write(kernel: &dyn Kernel, ctid: u32, bytes: &[u8], _lock: &Lock) -> Result<()> {
    let path = path(ctid);
    kernel.write_file(&path, bytes, 0o640).map_err(|error| {
        let why = explain(&error);
        untouched(ctid, format!("{path} cannot be written: {why}"))
    })
}

fn explain(error: &io::Error) -> String {
    let then = match error.raw_os_error() {
        Some(libc::EROFS | libc::EACCES | libc::EPERM) => "; /etc/pve is read-only: see pvecm status",
        Some(libc::ENOSPC | libc::EDQUOT) => "; make room, then try again",
        _ => "",
    };
    format!("{error}{then}")
}
