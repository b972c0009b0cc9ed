//! Which thread and which interrupt of a VM goes to which CPUs, what of that cannot be, and what is left to be done. Pure, but
//! for the reading of its facts.

use crate::address::Address;
use crate::config::pin::{Part, Pin};
use crate::config::{Config, PATH};
use crate::cpus::Cpus;
use crate::gpu::interrupts::{self, Interrupt};
use crate::handoff::kept::pinned::Kept;
use crate::proxmox::cpu::{self, Configured, Role, Thread};
use crate::proxmox::running;
use crate::sys::{Action, Kernel};
use serde_json::{Value, json};
use std::fmt;

const CPUS: &str = "/sys/devices/system/cpu";

/// What limits it.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// None where the kernel does not say: then nothing is said against a CPU.
    pub online: Option<Cpus>,
    /// What the CPU of the first vCPU can have; empty where there is no cpufreq.
    pub governors: String,
    pub vm: Option<Configured>,
    /// Of the running QEMU's cgroup.
    pub cpuset: Option<Cpus>,
}

impl Facts {
    pub fn of_host(kernel: &dyn Kernel, pin: &Pin) -> Facts {
        let first = pin.of(Part::Vcpus).and_then(|cpus| cpus.each().first());
        let governors = first.filter(|_| pin.governor.is_some());
        let governors =
            governors.and_then(|cpu| kernel.text(&format!("{CPUS}/cpu{cpu}/cpufreq/scaling_available_governors")));
        Facts {
            online: kernel.text(&format!("{CPUS}/online")).and_then(|text| Cpus::of_set(&text)),
            governors: governors.unwrap_or_default(),
            ..Facts::default()
        }
    }

    /// With its QEMU, where it runs.
    pub fn of_vm(kernel: &dyn Kernel, pin: &Pin, vmid: u32, qemu: Option<i32>) -> Facts {
        let cpuset = qemu.and_then(|pid| cpu::cpuset(kernel, pid));
        Facts { vm: Configured::read(kernel, vmid), cpuset, ..Facts::of_host(kernel, pin) }
    }

    fn why_not(&self, part: Part, cpus: &Cpus) -> Option<String> {
        let (mut most, mut affinity) = (0, None);
        if let Some(vm) = &self.vm {
            most = vm.most;
            affinity = vm.affinity.as_ref();
        }
        let limits = [
            (self.online.as_ref(), "not there or not online; online are "),
            (affinity, "not in affinity of the VM's configuration, "),
            (self.cpuset.as_ref(), "not in the cpuset of QEMU's cgroup, "),
        ];
        // Interrupts are the host's.
        let number = if part == Part::Irq { 1 } else { limits.len() };
        for (limit, why) in limits.into_iter().take(number) {
            let Some(limit) = limit else { continue };
            let outside = cpus.without(limit);
            if !outside.is_empty() {
                return Some(format!("CPU {outside} is {why}{limit}"));
            }
        }
        (part == Part::Vcpus && cpus.each().len() < most)
            .then(|| format!("{cpus} is too few for the {most} vCPUs that the VM may have (sockets x cores)"))
    }
}

/// What of it can be; and of the rest a line that says why not: `vms.111.pin.vcpus in /etc/gpu-handoff/config.json: CPU 9 is …`
pub fn judge(vmid: u32, pin: &Pin, facts: &Facts) -> (Pin, Vec<String>) {
    let mut good = Pin::default();
    let mut mistakes = Vec::new();
    let mut wrong = |key: &str, why: String| mistakes.push(format!("vms.{vmid}.pin.{key} in {PATH}: {why}"));
    for (part, cpus) in &pin.lists {
        match facts.why_not(*part, cpus) {
            Some(why) => wrong(part.key(), why),
            None => good.lists.push((*part, cpus.clone())),
        }
    }
    if let Some(governor) = &pin.governor {
        let known = facts.governors.trim();
        if pin.of(Part::Vcpus).is_none() {
            wrong("governor", "it is that of the CPUs in vcpus, and there are none".to_string());
        } else if good.of(Part::Vcpus).is_none() {
            // That is told already.
        } else if facts.online.is_none() || known.split_whitespace().any(|one| one == governor) {
            good.governor = Some(governor.clone());
        } else {
            let known = if known.is_empty() { "none to choose (no cpufreq)" } else { known };
            wrong("governor", format!("these CPUs do not have {governor}, but {known}"));
        }
    }
    (good, mistakes)
}

/// What can be said against the configuration without asking for a VM's.
pub fn mistakes_of(kernel: &dyn Kernel, config: &Config) -> Vec<String> {
    let mut mistakes = Vec::new();
    for (vmid, pin) in &config.pins {
        mistakes.append(&mut judge(*vmid, pin, &Facts::of_host(kernel, pin)).1);
    }
    mistakes
}

/// What a start would do.
pub fn wished(pin: &Pin, vm: Option<&Configured>) -> Placed {
    let of = |part: Part| pin.of(part).cloned().unwrap_or_default();
    let mut placed = Placed { emulator: of(Part::Emulator), iothreads: of(Part::Iothreads), ..Placed::default() };
    for (index, cpu) in (0..).zip(of(Part::Vcpus).each()).take(vm.map_or(1, |vm| vm.most)) {
        placed.vcpus.push((index, Cpus::from(vec![*cpu])));
    }
    placed.any_interrupt = of(Part::Irq);
    placed.governors.extend(pin.governor.clone());
    placed
}

/// What there is to pin, and where it is.
pub struct There {
    pub threads: Vec<Thread>,
    pub interrupts: Vec<Interrupt>,
    /// The attribute and what it says, one for all CPUs that have it in common.
    pub governors: Vec<(String, String)>,
}

impl There {
    /// Of a QEMU that runs, as far as the wish is about it.
    pub fn read(kernel: &dyn Kernel, vmid: u32, qemu: i32, pin: &Pin) -> There {
        let ids = pin.of(Part::Irq).and_then(|_| running::devices(kernel, vmid)).unwrap_or_default();
        let is_passed = |address: Address| ids.iter().any(|id| id.covers(address));
        There {
            threads: cpu::threads(kernel, qemu),
            interrupts: if ids.is_empty() { Vec::new() } else { interrupts::of_vfio(kernel, &is_passed) },
            governors: There::governors(kernel, pin.of(Part::Vcpus).filter(|_| pin.governor.is_some())),
        }
    }

    /// Of the CPUs in a list.
    fn governors(kernel: &dyn Kernel, cpus: Option<&Cpus>) -> Vec<(String, String)> {
        let mut found: Vec<(String, String)> = Vec::new();
        for cpu in cpus.into_iter().flat_map(Cpus::each) {
            let Ok(policy) = kernel.link_name(&format!("{CPUS}/cpu{cpu}/cpufreq")) else { continue };
            let path = format!("{CPUS}/cpufreq/{policy}/scaling_governor");
            if !found.iter().any(|(other, _)| *other == path) {
                found.extend(kernel.text(&path).map(|governor| (path, governor)));
            }
        }
        found
    }

    pub fn placed(&self) -> Placed {
        let mut placed = Placed::default();
        for thread in &self.threads {
            placed.add(&Thing::Thread(thread.role), &thread.cpus);
        }
        for interrupt in &self.interrupts {
            placed.add(&Thing::Interrupt(interrupt.number), &interrupt.cpus);
        }
        for (_, governor) in &self.governors {
            placed.add(&Thing::Governor(governor.clone()), &Cpus::default());
        }
        placed
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    Thread(Role),
    Interrupt(u32),
    /// Which one.
    Governor(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// By its number.
    Pin(i32),
    /// And put back when the VM has stopped.
    Write(Kept),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub thing: Thing,
    /// Where it goes.
    pub cpus: Cpus,
    pub how: How,
}

impl Change {
    pub fn kept(&self) -> Option<&Kept> {
        if let How::Write(kept) = &self.how { Some(kept) } else { None }
    }

    /// `qemu` is the process whose threads they are.
    pub fn action(&self, qemu: i32) -> Action {
        match &self.how {
            How::Pin(thread) => Action::Pin { pid: qemu, thread: *thread, cpus: self.cpus.each().to_vec() },
            How::Write(kept) => Action::Write { path: kept.path.clone(), data: kept.set.clone() },
        }
    }
}

/// What is not yet as it shall be, of a wish that was judged.
pub fn changes(pin: &Pin, there: &There) -> Vec<Change> {
    let mut changes = Vec::new();
    for Thread { id, role, cpus: now } in &there.threads {
        let wanted = match role {
            Role::Vcpu(index) => pin.of(Part::Vcpus).and_then(|cpus| cpus.of_vcpu(*index)),
            Role::Iothread => pin.of(Part::Iothreads).or(pin.of(Part::Emulator)).cloned(),
            Role::Emulator => pin.of(Part::Emulator).cloned(),
        };
        if let Some(cpus) = wanted.filter(|cpus| !cpus.is_same_as(now)) {
            changes.push(Change { thing: Thing::Thread(*role), cpus, how: How::Pin(*id) });
        }
    }
    for Interrupt { number, name, cpus: now } in &there.interrupts {
        if let Some(cpus) = pin.of(Part::Irq).filter(|cpus| !cpus.is_same_as(now)) {
            let (path, was) = (interrupts::attribute(*number), now.to_string());
            let kept = Kept { path, was, set: cpus.to_string(), handler: name.clone() };
            changes.push(Change { thing: Thing::Interrupt(*number), cpus: cpus.clone(), how: How::Write(kept) });
        }
    }
    for (path, now) in &there.governors {
        if let Some(governor) = pin.governor.as_ref().filter(|governor| *governor != now) {
            let (path, was, set) = (path.clone(), now.clone(), governor.clone());
            let kept = Kept { path, was, set: set.clone(), handler: String::new() };
            changes.push(Change { thing: Thing::Governor(set), cpus: Cpus::default(), how: How::Write(kept) });
        }
    }
    changes
}

/// What is where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placed {
    /// By their numbers, upwards.
    pub vcpus: Vec<(u32, Cpus)>,
    /// Wherever one of them may run.
    pub emulator: Cpus,
    pub iothreads: Cpus,
    pub interrupts: Vec<(u32, Cpus)>,
    /// Before it is known which there will be.
    pub any_interrupt: Cpus,
    pub governors: Vec<String>,
}

impl Placed {
    pub fn of(changes: &[Change]) -> Placed {
        let mut placed = Placed::default();
        changes.iter().for_each(|change| placed.add(&change.thing, &change.cpus));
        placed
    }

    fn add(&mut self, thing: &Thing, cpus: &Cpus) {
        match thing {
            Thing::Thread(Role::Vcpu(index)) => {
                let at = self.vcpus.iter().position(|(other, _)| other > index).unwrap_or(self.vcpus.len());
                self.vcpus.insert(at, (*index, cpus.clone()));
            }
            Thing::Thread(Role::Iothread) => self.iothreads.add(cpus),
            Thing::Thread(Role::Emulator) => self.emulator.add(cpus),
            Thing::Interrupt(number) => self.interrupts.push((*number, cpus.clone())),
            Thing::Governor(governor) if self.governors.contains(governor) => {}
            Thing::Governor(governor) => self.governors.push(governor.clone()),
        }
    }

    pub fn to_json(&self) -> Value {
        let each = |all: &[(u32, Cpus)]| -> Vec<Value> {
            all.iter().map(|(number, cpus)| json!({"number": number, "cpus": cpus.to_string()})).collect()
        };
        json!({
            "vcpus": each(&self.vcpus),
            "emulator": self.emulator.to_string(),
            "iothreads": self.iothreads.to_string(),
            "interrupts": each(&self.interrupts),
            "governors": self.governors,
        })
    }
}

/// `vCPUs 0-3 on 2-5, emulator on 0-1, interrupts 45-46 on 0-1, governor performance`: by ", " apart.
impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut parts = Vec::new();
        add_each(&mut parts, "vCPU", &self.vcpus);
        let sets = [("emulator", &self.emulator), ("iothreads", &self.iothreads), ("interrupts", &self.any_interrupt)];
        for (name, cpus) in sets {
            if !cpus.is_empty() {
                parts.push(format!("{name} on {cpus}"));
            }
        }
        add_each(&mut parts, "interrupt", &self.interrupts);
        if !self.governors.is_empty() {
            parts.push(format!("governor {}", self.governors.join(" ")));
        }
        f.write_str(&parts.join(", "))
    }
}

/// In one go where all are on the same CPUs, or each has one to itself.
fn add_each(parts: &mut Vec<String>, name: &str, all: &[(u32, Cpus)]) {
    let (mut numbers, mut each) = (Vec::new(), Vec::new());
    let (mut are_same, mut are_single) = (true, true);
    for (number, cpus) in all {
        numbers.push(*number);
        each.extend_from_slice(cpus.each());
        are_same &= all.first().is_some_and(|(_, first)| cpus.is_same_as(first));
        are_single &= cpus.each().len() == 1;
    }
    if are_same && let [(_, cpus), _, ..] = all {
        parts.push(format!("{name}s {} on {cpus}", Cpus::from(numbers)));
    } else if are_single && all.len() > 1 {
        parts.push(format!("{name}s {} on {}", Cpus::from(numbers), Cpus::from(each)));
    } else {
        all.iter().for_each(|(number, cpus)| parts.push(format!("{name} {number} on {cpus}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(text: &str) -> Cpus {
        Cpus::parse(text).unwrap()
    }

    fn pin(lists: &[(Part, &str)], governor: Option<&str>) -> Pin {
        let lists = lists.iter().map(|(part, text)| (*part, cpus(text))).collect();
        Pin { lists, governor: governor.map(str::to_string) }
    }

    fn usual() -> Pin {
        let lists = [(Part::Vcpus, "2-5"), (Part::Emulator, "0-1"), (Part::Iothreads, "1"), (Part::Irq, "0")];
        pin(&lists, Some("performance"))
    }

    fn host() -> Facts {
        let governors = "performance powersave\n".to_string();
        Facts { online: Some(cpus("0-7")), governors, ..Facts::default() }
    }

    fn vm(most: usize, affinity: Option<&str>) -> Option<Configured> {
        Some(Configured { most, affinity: affinity.map(cpus) })
    }

    #[test]
    fn what_can_be_stays_as_it_is() {
        for facts in [
            Facts::default(),
            host(),
            Facts { vm: vm(4, None), ..host() },
            Facts { vm: vm(1, Some("0-5")), cpuset: Some(cpus("0-5")), ..host() },
        ] {
            assert_eq!(judge(111, &usual(), &facts), (usual(), vec![]), "{facts:?}");
        }
        // Interrupts are no thread's: where QEMU may run is no matter.
        let irq = pin(&[(Part::Irq, "6")], None);
        assert_eq!(judge(111, &irq, &Facts { vm: vm(8, Some("0")), cpuset: Some(cpus("0")), ..host() }).1, [""; 0]);
    }

    #[test]
    fn what_cannot_be_takes_only_itself_out() {
        let said = |pin: &Pin, facts: &Facts| {
            let (good, mistakes) = judge(111, pin, facts);
            let keys: Vec<&str> = good.lists.iter().map(|(part, _)| part.key()).collect();
            (keys.join(" "), good.governor.is_some(), mistakes)
        };
        let line = |text: &str| vec![format!("vms.111.pin.{text}").replacen(": ", &format!(" in {PATH}: "), 1)];
        let rest = "emulator iothreads irq".to_string();
        let few = Facts { vm: vm(5, None), ..host() };
        let expected = line("vcpus: 2-5 is too few for the 5 vCPUs that the VM may have (sockets x cores)");
        assert_eq!(said(&usual(), &few), (rest.clone(), false, expected));
        let offline = Facts { online: Some(cpus("0-3,5")), ..host() };
        let expected = line("vcpus: CPU 4 is not there or not online; online are 0-3,5");
        assert_eq!(said(&usual(), &offline), (rest.clone(), false, expected));
        let affinity = Facts { vm: vm(4, Some("1-5")), ..host() };
        let expected = line("emulator: CPU 0 is not in affinity of the VM's configuration, 1-5");
        assert_eq!(said(&usual(), &affinity), ("vcpus iothreads irq".to_string(), true, expected));
        let cpuset = Facts { cpuset: Some(cpus("0,2-7")), ..host() };
        let (keys, _, mistakes) = said(&usual(), &cpuset);
        assert_eq!((keys.as_str(), mistakes.len()), ("vcpus irq", 2));
        assert!(mistakes[1].ends_with(
            "iothreads in /etc/gpu-handoff/config.json: CPU 1 is not in the cpuset of QEMU's cgroup, 0,2-7"
        ));
        for (pin, facts, text) in [
            (pin(&[], Some("performance")), host(), "governor: it is that of the CPUs in vcpus, and there are none"),
            (
                usual(),
                Facts { governors: String::new(), ..host() },
                "governor: these CPUs do not have performance, but none to choose (no cpufreq)",
            ),
            (
                usual(),
                Facts { governors: "performance2 powersave".to_string(), ..host() },
                "governor: these CPUs do not have performance, but performance2 powersave",
            ),
        ] {
            let (_, has_governor, mistakes) = said(&pin, &facts);
            assert_eq!((has_governor, mistakes), (false, line(text)));
        }
    }

    fn thread(id: i32, role: Role, text: &str) -> Thread {
        Thread { id, role, cpus: cpus(text) }
    }

    fn there() -> There {
        let interrupt =
            |number: u32, name: &str, text: &str| Interrupt { number, name: name.to_string(), cpus: cpus(text) };
        There {
            threads: vec![
                thread(10, Role::Emulator, "0-7"),
                thread(11, Role::Emulator, "0-1"),
                thread(12, Role::Vcpu(1), "0-7"),
                thread(13, Role::Vcpu(0), "2"),
                thread(14, Role::Iothread, "0-7"),
                // More than there are CPUs for.
                thread(15, Role::Vcpu(4), "0-7"),
            ],
            interrupts: vec![
                interrupt(45, "vfio-msix[0](0000:01:00.0)", "0-7"),
                interrupt(46, "vfio-msix[1](0000:01:00.0)", "0"),
            ],
            governors: vec![
                ("/p2".to_string(), "powersave".to_string()),
                ("/p3".to_string(), "performance".to_string()),
            ],
        }
    }

    #[test]
    fn only_what_is_not_as_it_shall_be_is_changed() {
        let kept = |path: &str, was: &str, set: &str, handler: &str| {
            let [path, was, set, handler] = [path, was, set, handler].map(str::to_string);
            How::Write(Kept { path, was, set, handler })
        };
        let of = |id, role, text: &str| Change { thing: Thing::Thread(role), cpus: cpus(text), how: How::Pin(id) };
        let irq = kept("/proc/irq/45/smp_affinity_list", "0-7", "0", "vfio-msix[0](0000:01:00.0)");
        let governor = kept("/p2", "powersave", "performance", "");
        let expected = [
            of(10, Role::Emulator, "0-1"),
            of(12, Role::Vcpu(1), "3"),
            of(14, Role::Iothread, "1"),
            Change { thing: Thing::Interrupt(45), cpus: cpus("0"), how: irq },
            Change { thing: Thing::Governor("performance".to_string()), cpus: Cpus::default(), how: governor },
        ];
        assert_eq!(changes(&usual(), &there()), expected);
        assert_eq!(
            Placed::of(&expected).to_string(),
            "vCPU 1 on 3, emulator on 0-1, iothreads on 1, interrupt 45 on 0, governor performance"
        );
        assert_eq!(changes(&Pin::default(), &there()), []);
        // Without a list of their own they go where the emulator is; and without either nowhere.
        let all = |pin: &Pin| changes(pin, &there());
        assert!(all(&pin(&[(Part::Emulator, "6")], None)).contains(&of(14, Role::Iothread, "6")));
        assert_eq!(all(&pin(&[(Part::Iothreads, "6")], None)), [of(14, Role::Iothread, "6")]);
    }

    #[test]
    fn what_is_where_is_told_in_few_words() {
        let text = "vCPU 0 on 2, vCPU 1 on 0-7, vCPU 4 on 0-7, emulator on 0-7, iothreads on 0-7, interrupt 45 on 0-7, \
                    interrupt 46 on 0, governor powersave performance";
        assert_eq!(there().placed().to_string(), text);
        let each = |all: &[(u32, &str)]| all.iter().map(|(number, text)| (*number, cpus(text))).collect::<Vec<_>>();
        for (vcpus, text) in [
            (&[(0, "2")][..], "vCPU 0 on 2"),
            (&[(0, "2"), (1, "10"), (2, "3")], "vCPUs 0-2 on 2,10,3"),
            (&[(0, "0-7"), (1, "0-7")], "vCPUs 0-1 on 0-7"),
        ] {
            assert_eq!(Placed { vcpus: each(vcpus), ..Placed::default() }.to_string(), text);
        }
        let wish = |pin: &Pin, most| wished(pin, Some(&Configured { most, affinity: None })).to_string();
        let text = "emulator on 0-1, iothreads on 1, interrupts on 0, governor performance";
        assert_eq!(wish(&usual(), 3), format!("vCPUs 0-2 on 2-4, {text}"));
        assert_eq!(wish(&usual(), 1), format!("vCPU 0 on 2, {text}"));
        assert_eq!(wish(&pin(&[(Part::Irq, "0")], None), usize::MAX), "interrupts on 0");
    }
}
