//! What the kernel and its administrator wrote, and what a person typed.

use crate::machine::Machine;
use crate::{assert_one_line, parts};
use gpu_handoff::cli::{self, Call};
use gpu_handoff::exit::Code;
use gpu_handoff::gpu::holders::{Devices, Place, Reach};
use gpu_handoff::gpu::inventory::{Function, Slot};
use gpu_handoff::gpu::{nodes, nvidia, static_ids as ids};
use gpu_handoff::proxmox::running;
use gpu_handoff::sys::{self, Action, DeviceNumber, Mapped, Node, Read, Request};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

const GPU: &str = "0000:01:00.0";

/// The kernel command line and a file of modprobe.d.
pub fn static_ids(data: &[u8]) {
    let [cmdline, file] = parts(data);
    let machine = Machine::default().file("/proc/cmdline", cmdline).file("/etc/modprobe.d/a.conf", file);
    let found = ids::read(&machine);
    for (vendor, device) in found.iter().take(2) {
        let text = String::from_utf8_lossy(data).to_lowercase();
        assert!(text.contains(&format!("{vendor:x}:")) && text.contains(&format!("{device:x}")));
    }
    // Only files that modprobe reads count.
    let machine = Machine::default().file("/etc/modprobe.d/a.conf~", file).file("/etc/modprobe.d/conf", file);
    assert!(ids::read(&machine).is_empty());
}

/// What the NVIDIA driver says of itself: version, a GPU's information, params, and the kernel's list of majors.
pub fn driver(data: &[u8]) {
    let [version, information, params, devices] = parts(data);
    let machine = Machine::default()
        .file("/proc/driver/nvidia/version", version)
        .file(&format!("/proc/driver/nvidia/gpus/{GPU}/information"), information)
        .file("/proc/driver/nvidia/params", params)
        .file("/proc/devices", devices)
        .file("/sys/module/nvidia/refcnt", b"0")
        .file("/sys/module/nvidia_modeset/refcnt", b"0");
    if let Some(version) = nvidia::version(&machine) {
        assert!(!version.drm_looks_once() || version < "590.44.01".parse().expect("a version"));
    }
    let missing = nodes::missing(&machine);
    let is_missing = |path: &str, number: DeviceNumber| missing.iter().any(|n| n.path == path && n.number == number);
    if !missing.is_empty() {
        assert!(is_missing("/dev/nvidiactl", DeviceNumber { major: 195, minor: 255 }));
        if let Some(minor) = nvidia::minor(&machine, GPU.parse().expect("an address")) {
            assert!(is_missing(&format!("/dev/nvidia{minor}"), DeviceNumber { major: 195, minor }));
        }
        if let Some(major) = nvidia::major(&machine, "nvidia-uvm") {
            assert!(is_missing("/dev/nvidia-uvm", DeviceNumber { major, minor: 0 }));
        }
    }
    for node in missing {
        survives_the_pipe(&Action::MakeNode(node));
    }
}

/// Each byte says that one module holds another.
pub fn modules(data: &[u8]) {
    const NAMES: [&str; 8] =
        ["nvidia", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia_peermem", "nouveau", "nvidia_fs", "gdrdrv"];
    let edges: Vec<(&str, &str)> =
        data.iter().map(|byte| (NAMES[usize::from(byte % 8)], NAMES[usize::from(byte / 8 % 8)])).collect();
    let mut machine = Machine::default();
    for (module, holder) in &edges {
        machine = machine.file(&format!("/sys/module/{module}/holders/{holder}"), b"");
    }
    for start in ["nvidia", "nouveau"] {
        match nvidia::unload_order(&machine, start) {
            Ok(order) => {
                assert_eq!(order.last().map(String::as_str), Some(start));
                assert!(order.iter().enumerate().all(|(i, module)| !order[..i].contains(module)), "{order:?}");
                let place = |module: &str| order.iter().position(|m| m == module);
                for (module, holder) in &edges {
                    assert!(place(module).is_none() || place(holder).is_some(), "{holder} is missing: {order:?}");
                }
                if !has_cycle(&edges) {
                    assert!(
                        edges.iter().all(|(module, holder)| place(module).is_none() || place(holder) < place(module))
                    );
                }
            }
            Err(stranger) => assert!(edges.iter().any(|(_, holder)| *holder == stranger), "{stranger}"),
        }
    }
}

/// Takes away what nobody holds until nothing is left.
fn has_cycle(edges: &[(&str, &str)]) -> bool {
    let mut left = edges.to_vec();
    loop {
        let before = left.len();
        let held: Vec<&str> = left.iter().map(|(module, _)| *module).collect();
        left.retain(|(_, holder)| held.contains(holder));
        if left.len() == before {
            return before > 0;
        }
    }
}

/// A process that has the GPU open: its cgroup, its name, the number of the DRM node that it opened, and the vfio one's.
pub fn holders(data: &[u8]) {
    let [cgroup, command, drm, vfio] = parts(data);
    let mut machine = Machine::default()
        .gpu(GPU, "nvidia")
        .file(&format!("/sys/bus/pci/devices/{GPU}/drm/card0/dev"), drm)
        .file("/sys/class/vfio/5/dev", vfio)
        .file("/proc/7/cgroup", cgroup)
        .file("/proc/7/comm", command);
    for path in [&format!("/sys/bus/pci/devices/{GPU}/drm/card0/dev"), "/sys/class/vfio/5/dev"] {
        if let Some(number) = machine.text(path).and_then(|text| text.parse().ok()) {
            machine = machine.open(7, number, data.len() % 2 == 1);
        }
    }
    // In any case.
    machine = machine.open(7, DeviceNumber { major: 195, minor: 255 }, false);
    let slots: Vec<Slot> = Slot::read(&machine, "0000:01:00".parse().expect("a slot")).into_iter().collect();
    assert!(slots[0].functions.iter().all(Function::is_nvidia_gpu));
    let found = Devices::of_slots(&machine, &slots, Reach::Unbinding).holders(&machine, Duration::MAX).unwrap();
    assert_eq!(found.len(), 1);
    assert_one_line(&found[0].to_string());
    assert!(found[0].remedy().bytes().all(|b| b.is_ascii_alphanumeric() || b" :,-_.\\@".contains(&b)));
    if let Place::Unit(name) = &found[0].place {
        assert!(name.ends_with(".service") || name.ends_with(".scope"), "{name}");
    }
}

/// A line of `/proc/PID/maps`: what is looked at is in `map_files` and nowhere else.
pub fn maps(data: &[u8]) {
    if let Some(mapped) = Mapped::parse(data) {
        let name = mapped.name();
        assert!(name.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') && name.matches('-').count() == 1, "{name}");
        assert!(data.ends_with(mapped.file));
        // What comes after the inode, however odd, says nothing about where it is mapped.
        let again = [data, b" (deleted)"].concat();
        assert_eq!(Mapped::parse(&again).map(|mapped| mapped.name()).as_ref(), Some(&name));
    }
}

pub fn device_number(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(number) = text.parse::<DeviceNumber>() {
        assert_eq!(number.to_string().parse(), Ok(number));
    }
}

/// `/proc/PID/stat` and a VM's pid file; also a process whose name is all of the input.
pub fn process(data: &[u8]) {
    let [stat, pid_file, command_line] = parts(data);
    let machine = Machine::default()
        .file("/proc/812/stat", stat)
        .file("/run/qemu-server/111.pid", pid_file)
        .file("/proc/812/cmdline", command_line);
    if let Some(process) = machine.process(812) {
        assert_eq!(process.pid, 812);
        assert!(String::from_utf8_lossy(stat).contains(&process.start.to_string()));
    }
    if let Some(pid) = running::qemu_pid(&machine, 111) {
        assert_eq!(pid, 812);
        assert!(String::from_utf8_lossy(command_line).contains("/run/qemu-server/111.pid"));
    }
    let stat = |state: &str| {
        let fields = "1 812 812 0 -1 4194560 9 8 7 6 5 4 3 2 20 0 1 0 4711 220 33 18446744073709551615";
        [b"812 (", data, format!(") {state} {fields}\n").as_bytes()].concat()
    };
    let named = Machine::default().file("/proc/812/stat", &stat("S"));
    assert_eq!(named.process(812).map(|process| process.start), Some(4711));
    let ended = Machine::default().file("/proc/812/stat", &stat("Z"));
    assert_eq!(ended.process(812), None);
}

pub fn locks(data: &[u8]) {
    const HELD: &[u8] = b"\n9: FLOCK  ADVISORY  WRITE 812 00:1a:1234 0 EOF\n";
    const WAITS: &[u8] = b"\n9: -> FLOCK  ADVISORY  WRITE 812 00:1a:1234 0 EOF\n";
    let is_held = |text: &[u8]| sys::flock_is_held(&Machine::default().file("/proc/locks", text), "/run/lock");
    let held = is_held(data);
    if held {
        let text = String::from_utf8_lossy(data);
        assert!(text.contains("FLOCK") && text.contains("00:1a:1234"));
    }
    assert!(is_held(&[data, HELD].concat()));
    assert_eq!(is_held(&[data, WAITS].concat()), held);
}

/// What the worker is told: what is understood is understood again, and what is told is understood.
pub fn message(data: &[u8]) {
    if let Some(request) = sys::decode(data) {
        assert_eq!(sys::decode(&sys::encode(&request)), Some(request));
    }
    let [path, value] = parts(data);
    let (path, value) = (String::from_utf8_lossy(path).into_owned(), String::from_utf8_lossy(value).into_owned());
    let modules = value.split('\0').map(str::to_string).collect();
    let head = Request::ReadHead(path.clone(), data.len().min(4096));
    let claim = Request::TryClaim(path.clone());
    for request in [Request::Read(path.clone()), head, Request::TryOpen(path.clone()), claim] {
        assert_eq!(sys::decode(&sys::encode(&request)), Some(request));
    }
    survives_the_pipe(&Action::Write { path: path.clone(), data: value.clone() });
    survives_the_pipe(&Action::Load { modules });
    survives_the_pipe(&Action::Pin { pid: 1, thread: i32::MAX, cpus: vec![0, 8191] });
    survives_the_pipe(&Action::Unload { module: value.clone() });
    let number = DeviceNumber { major: data.len() as u64, minor: u64::MAX };
    survives_the_pipe(&Action::MakeNode(Node { path, number, mode: 0o666, uid: u32::MAX, gid: 44 }));
}

fn survives_the_pipe(action: &Action) {
    let request = Request::Act(action.clone());
    assert_eq!(sys::decode(&sys::encode(&request)), Some(request));
}

/// The arguments, apart by NUL, as in `/proc/PID/cmdline`.
pub fn command_line(data: &[u8]) {
    let arguments: Vec<OsString> = data.split(|byte| *byte == 0).map(|a| OsString::from_vec(a.to_vec())).collect();
    let parsed = |arguments| cli::parse(arguments).map(|asked| asked.call);
    match parsed(arguments) {
        Ok(Call::Hook { id, phase }) => {
            let again = parsed([id.to_string(), "--".to_string(), phase.clone()].map(OsString::from).to_vec());
            assert_eq!(again, Ok(Call::Hook { id, phase }));
        }
        Ok(_) => {}
        Err(exit) => assert_eq!(exit.code, Code::Usage),
    }
}
