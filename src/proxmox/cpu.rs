//! The processors of a VM: how many its configuration gives it, on which of the host it may run, and the threads of its QEMU.

use super::guest;
use crate::cpus::Cpus;
use crate::sys::Kernel;
use crate::systemd::CGROUPS;

/// What a VM's configuration says of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// As many as it may have in all, those that are hot-plugged included.
    pub most: usize,
    /// `affinity`: Proxmox starts QEMU with `taskset` on these.
    pub affinity: Option<Cpus>,
}

impl Configured {
    /// None when there is no such VM.
    pub fn read(kernel: &dyn Kernel, vmid: u32) -> Option<Configured> {
        Some(Configured::parse(&kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")).ok()?))
    }

    fn parse(bytes: &[u8]) -> Configured {
        let value = |key: &str| guest::name(bytes, key);
        // What Proxmox takes where nothing, or nothing that it takes, is said.
        let number =
            |key: &str| value(key).and_then(|text| text.parse().ok()).filter(|number: &usize| *number > 0).unwrap_or(1);
        Configured {
            most: number("sockets").saturating_mul(number("cores")),
            affinity: value("affinity").and_then(|text| Cpus::of_set(&text)),
        }
    }
}

/// What a thread of QEMU is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the vCPU of this number.
    Vcpu(u32),
    /// Serves disks, where Proxmox was told `iothread=1`.
    Iothread,
    /// All else: the main loop, the display, helpers that come and go.
    Emulator,
}

impl Role {
    /// By its name, which QEMU gives it with `debug-threads=on`, as Proxmox starts it; from QEMU 11 on always.
    /// `CPU 0/KVM`, `CPU 0/TCG`: `kvm_start_vcpu_thread`, `mttcg_start_vcpu_thread`; `IO iothread-virtioscsi0`, of which the
    /// kernel keeps 15 bytes: `iothread_init`.
    fn of(name: &str) -> Role {
        let vcpu = name.strip_prefix("CPU ").and_then(|rest| rest.split_once('/')?.0.parse().ok());
        match vcpu {
            Some(index) => Role::Vcpu(index),
            None if name.starts_with("IO iothread") => Role::Iothread,
            None => Role::Emulator,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    pub id: i32,
    pub role: Role,
    /// Where it may run.
    pub cpus: Cpus,
}

/// The threads of a process, but for those that end meanwhile.
pub fn threads(kernel: &dyn Kernel, pid: i32) -> Vec<Thread> {
    let folder = format!("/proc/{pid}/task");
    let read = |name: String| {
        let role = Role::of(&kernel.text(&format!("{folder}/{name}/comm"))?);
        let status = kernel.text(&format!("{folder}/{name}/status"))?;
        let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(Thread { id: name.parse().ok()?, role, cpus: Cpus::of_set(cpus.trim())? })
    };
    kernel.list(&folder).into_iter().filter_map(read).collect()
}

/// Where a process's cgroup lets it run; None where no cgroup says so.
pub fn cpuset(kernel: &dyn Kernel, pid: i32) -> Option<Cpus> {
    let text = kernel.text(&format!("/proc/{pid}/cgroup"))?;
    let mut cgroup = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    loop {
        // One without the controller has what the next above has.
        if let Some(cpus) = kernel.text(&format!("{CGROUPS}{cgroup}/cpuset.cpus.effective")) {
            return Cpus::of_set(&cpus);
        }
        cgroup = cgroup.rsplit_once('/')?.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_is_for() {
        for (name, role) in [
            ("CPU 0/KVM", Role::Vcpu(0)),
            ("CPU 113/TCG", Role::Vcpu(113)),
            ("IO iothread-vir", Role::Iothread),
            // That of the monitor is no disk's.
            ("IO mon_iothread", Role::Emulator),
            ("ALL CPUs/TCG", Role::Emulator),
            ("CPU x/KVM", Role::Emulator),
            ("kvm", Role::Emulator),
            ("vhost-4711", Role::Emulator),
        ] {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }

    #[test]
    fn what_the_configuration_says() {
        let parse = |text: &str| Configured::parse(text.as_bytes());
        let of = |most, affinity: Option<&str>| Configured { most, affinity: affinity.and_then(Cpus::of_set) };
        assert_eq!(parse(""), of(1, None));
        assert_eq!(parse("cores: 4\n"), of(4, None));
        assert_eq!(parse("affinity: 0,5,8-11\ncores: 4\nsockets: 2\nvcpus: 3\n"), of(8, Some("0,5,8-11")));
        // What a snapshot had is not what is.
        assert_eq!(parse("cores: 2\n[before]\ncores: 8\naffinity: 1\n"), of(2, None));
        assert_eq!(parse("cores: 0\naffinity: x\n"), of(1, None));
    }
}
