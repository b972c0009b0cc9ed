//! Threads of a real process go to their CPUs: a child of this test that names its threads as QEMU does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use gpu_handoff::config::pin::{Part, Pin};
use gpu_handoff::cpus::Cpus;
use gpu_handoff::handoff::plan::pin::{There, changes};
use gpu_handoff::proxmox::cpu::{self, Role, Thread};
use gpu_handoff::sys::{Act, Linux};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CHILD: &str = "GPU_HANDOFF_TEST_IS_A_QEMU";
const NAMES: [&str; 3] = ["CPU 0/KVM", "CPU 1/KVM", "IO iothread-virtioscsi0"];

/// What the child does, and nothing where nobody asks for it.
#[test]
fn is_a_qemu() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    for name in NAMES {
        let long = move || std::thread::sleep(Duration::from_secs(100));
        std::thread::Builder::new().name(name.to_string()).spawn(long).unwrap();
    }
    std::thread::sleep(Duration::from_secs(100));
}

struct Qemu(Child);

impl Qemu {
    fn start() -> Qemu {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "is_a_qemu"]).env(CHILD, "1").stdout(Stdio::null());
        Qemu(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    /// Once all of them are there, by what they are for.
    fn threads(&self, linux: &Linux) -> Vec<Thread> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let threads = cpu::threads(linux, self.pid());
            let named = threads.iter().filter(|thread| thread.role != Role::Emulator).count();
            if named == NAMES.len() || Instant::now() > end {
                return threads;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_thread_goes_where_it_shall_be() {
    let linux = Linux::from_environment();
    let qemu = Qemu::start();
    let threads = qemu.threads(&linux);
    let number = |role: Role| threads.iter().filter(|thread| thread.role == role).count();
    assert_eq!([Role::Vcpu(0), Role::Vcpu(1), Role::Iothread].map(number), [1, 1, 1], "{threads:?}");
    assert!(number(Role::Emulator) >= 1, "{threads:?}");

    // This machine may have one CPU only: then both are the same, and less is seen.
    let all = threads[0].cpus.each().to_vec();
    let (first, last) = (all[0], all[all.len() - 1]);
    let list = |cpus: &[u32]| Cpus::from(cpus.to_vec());
    let vcpus = if first == last { list(&[first]) } else { list(&[last, first]) };
    let lists = vec![(Part::Vcpus, vcpus), (Part::Emulator, list(&[first])), (Part::Iothreads, list(&[last]))];
    let pin = Pin { lists, governor: None };
    let there = |threads| There { threads, interrupts: Vec::new(), governors: Vec::new() };
    let planned = changes(&pin, &there(threads));
    assert!(first == last || planned.len() >= 4, "{planned:?}");
    for change in planned {
        linux.act(&change.action(qemu.pid()), Duration::from_secs(20)).unwrap();
    }
    let threads = qemu.threads(&linux);
    for thread in &threads {
        let expected = match thread.role {
            Role::Vcpu(0) | Role::Iothread => last,
            _ => first,
        };
        assert!(first == last || thread.cpus == list(&[expected]), "{thread:?}");
    }
    // Nothing is left to be done.
    assert_eq!(changes(&pin, &there(threads)), []);
}
