//! A directory that stands for a host, laid out as the kernel and Proxmox do it, and the program run on it.
//!
//! Writes land in plain files there and nothing reacts: a run goes as far as the first that must have an effect.

mod advice;
pub mod schema;

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, process};

/// When the processes of a tree began, in ticks since boot.
pub const START: u64 = 4711;

pub struct Host {
    root: PathBuf,
    silent: Vec<PathBuf>,
}

/// What a run left: its exit code and what it wrote.
#[derive(Debug, PartialEq)]
pub struct Run {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Host {
    /// A kernel that has vfio-pci, a node called `pve`, and no PCI device.
    pub fn new() -> Host {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = env::temp_dir().join(format!("gpu-handoff-tree-{}-{number}", process::id()));
        // One that is left from a run that was killed, whose number came round again.
        let _ = fs::remove_dir_all(&root);
        Host { root, silent: Vec::new() }
            .file("proc/sys/kernel/osrelease", "6.12.48-1-pve\n")
            .file("proc/sys/kernel/hostname", "pve.example.org\n")
            .file("proc/cmdline", "root=/dev/sda quiet\n")
            .file("sys/bus/pci/drivers_probe", "")
            .driver("vfio-pci")
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file that never answers whoever reads it, as long as the host is there.
    pub fn silent(mut self, path: &str) -> Host {
        let full = self.path(path);
        fs::create_dir_all(full.parent().unwrap()).unwrap();
        nix::unistd::mkfifo(&full, nix::sys::stat::Mode::S_IRWXU).unwrap();
        self.silent.push(full);
        self
    }

    /// A script can be run.
    pub fn file(self, path: &str, text: &str) -> Host {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if !text.starts_with("#!") {
            fs::write(path, text).unwrap();
            return self;
        }
        // By a process of its own: one that another test starts at this moment would inherit the open file, and as long
        // as anybody can write to a program it is busy.
        let mut install = Command::new("install");
        let mut install = install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut install.stdin.take().unwrap(), text.as_bytes()).unwrap();
        assert!(install.wait().unwrap().success());
        self
    }

    /// Relative, as in sysfs; both paths are below the root.
    pub fn link(self, path: &str, target: &str) -> Host {
        let target = "../".repeat(path.matches('/').count()) + target;
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
        self
    }

    pub fn without(self, path: &str) -> Host {
        let path = self.path(path);
        match path.symlink_metadata().unwrap().is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
        self
    }

    /// The card's driver gives this function a framebuffer, and the console is on it.
    pub fn screen(self, address: &str, name: &str) -> Host {
        let console = "sys/class/vtconsole/vtcon";
        self.file(&format!("{}/graphics/{name}/name", device(address)), "nvidia-drmdrmfb\n")
            .file(&format!("sys/class/graphics/{name}/name"), "nvidia-drmdrmfb\n")
            .file(&format!("{console}0/name"), "(S) dummy device\n")
            .file(&format!("{console}0/bind"), "0\n")
            .file(&format!("{console}1/name"), "(M) frame buffer device\n")
            .file(&format!("{console}1/bind"), "1\n")
    }

    /// Whether a function may sleep.
    pub fn power(self, address: &str, control: &str, d3cold_allowed: &str) -> Host {
        self.file(&format!("{}/power/control", device(address)), &format!("{control}\n"))
            .file(&format!("{}/d3cold_allowed", device(address)), &format!("{d3cold_allowed}\n"))
    }

    /// What a function's configuration space begins with.
    pub fn answers(self, address: &str, bytes: &[u8]) -> Host {
        let host = self.file(&format!("{}/config", device(address)), "");
        fs::write(host.path(&format!("{}/config", device(address))), bytes).unwrap();
        host
    }

    /// A registered PCI driver with its loaded module.
    pub fn driver(mut self, name: &str) -> Host {
        let directory = format!("sys/bus/pci/drivers/{name}");
        if self.path(&directory).exists() {
            return self;
        }
        for attribute in ["bind", "unbind", "new_id", "remove_id"] {
            self = self.file(&format!("{directory}/{attribute}"), "");
        }
        let module = format!("sys/module/{}", name.replace('-', "_"));
        fs::create_dir_all(self.path(&format!("{module}/holders"))).unwrap();
        self.link(&format!("{directory}/module"), &module)
    }

    /// One PCI function; no driver when that is empty. `class` and `id` are written as in `010802`, `144d:a80a`.
    pub fn function(mut self, address: &str, class: &str, id: &str, driver: &str, group: u32) -> Host {
        let device = device(address);
        let (vendor, id) = id.split_once(':').unwrap();
        self = self
            .file(&format!("{device}/vendor"), &format!("0x{vendor}\n"))
            .file(&format!("{device}/device"), &format!("0x{id}\n"))
            .file(&format!("{device}/class"), &format!("0x{class}\n"))
            .file(&format!("{device}/driver_override"), "(null)\n")
            .link(&format!("sys/bus/pci/devices/{address}"), &device)
            .link(&format!("{device}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"))
            .link(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), &device);
        if driver.is_empty() {
            return self;
        }
        self.driver(driver)
            .link(&format!("{device}/driver"), &format!("sys/bus/pci/drivers/{driver}"))
            .link(&format!("sys/bus/pci/drivers/{driver}/{address}"), &device)
    }

    /// An NVIDIA GPU and its audio function, in the IOMMU group that has its bus's number.
    pub fn card(self, slot: &str, gpu: &str, audio: &str) -> Host {
        let group = u32::from_str_radix(slot.split(':').nth(1).unwrap(), 16).unwrap();
        self.function(&format!("{slot}.0"), "030000", "10de:2684", gpu, group).function(
            &format!("{slot}.1"),
            "040300",
            "10de:22ba",
            audio,
            group,
        )
    }

    pub fn vm(self, id: u32, config: &str) -> Host {
        self.file(&format!("etc/pve/qemu-server/{id}.conf"), &format!("name: test\n{config}\nmemory: 4096\n"))
    }

    pub fn config(self, json: &str) -> Host {
        self.file("etc/gpu-handoff/config.json", json)
    }

    /// A process that has these files of the real machine open.
    pub fn process(mut self, pid: u32, command: &str, cgroup: &str, open: &[&str]) -> Host {
        self = self
            .file(&format!("proc/{pid}/comm"), &format!("{command}\n"))
            .file(&format!("proc/{pid}/cgroup"), &format!("0::{cgroup}\n"));
        fs::create_dir_all(self.path(&format!("proc/{pid}/fd"))).unwrap();
        for (number, file) in open.iter().enumerate() {
            symlink(file, self.path(&format!("proc/{pid}/fd/{number}"))).unwrap();
        }
        self
    }

    /// A line of the process's maps, and the file of the real machine that is mapped there.
    pub fn maps(self, pid: u32, line: &str, name: &str, file: &str) -> Host {
        let maps = format!("proc/{pid}/maps");
        let before = fs::read_to_string(self.path(&maps)).unwrap_or_default();
        let link = format!("proc/{pid}/map_files/{name}");
        let host = self.file(&maps, &format!("{before}{line}\n"));
        fs::create_dir_all(host.path(&link).parent().unwrap()).unwrap();
        symlink(file, host.path(&link)).unwrap();
        host
    }

    /// QEMU runs this VM: a pid file, and the process whose command line names it.
    pub fn running(self, vmid: u32, pid: u32) -> Host {
        self.file(&format!("run/qemu-server/{vmid}.pid"), &format!("{pid}\n")).file(
            &format!("proc/{pid}/cmdline"),
            &format!("/usr/bin/kvm\0-id\0{vmid}\0-pidfile\0/var/run/qemu-server/{vmid}.pid\0-daemonize\0"),
        )
    }

    /// This process lives, and began at [`START`]. Its name is the worst that one may have.
    pub fn alive(self, pid: u32) -> Host {
        self.stat(pid, 'D', START)
    }

    pub fn stat(self, pid: u32, state: char, start: u64) -> Host {
        let counts = "1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0";
        self.file(&format!("proc/{pid}/stat"), &format!("{pid} (a) Z 1 (b) {state} {counts} {start} 0 0\n"))
    }

    /// `/proc/locks` says that somebody holds a flock on this file.
    pub fn flock(self, path: &str) -> Host {
        let host = self.file(path, "");
        let meta = host.path(path).metadata().unwrap();
        let (major, minor) = (major(meta.dev()), minor(meta.dev()));
        let line = format!("1: FLOCK  ADVISORY  WRITE 4242 {major:02x}:{minor:02x}:{} 0 EOF\n", meta.ino());
        host.file("proc/locks", &line)
    }

    /// `name` is `vm-111` or `manual-0000:01:00`; the GPU's home is this driver.
    pub fn record(self, name: &str, slot: &str, progress: &str, home: &str) -> Host {
        let function = |number: u8, driver: &str| {
            let module = driver.replace('-', "_");
            json!({"slot": slot, "address": format!("{slot}.{number}"), "driver": driver, "module": module})
        };
        let audio = if home == "nvidia" { "snd_hda_intel" } else { home };
        let functions = [function(0, home), function(1, audio)];
        let record = json!({"schema": 1, "progress": progress, "functions": functions, "modules": []});
        self.file(&format!("run/gpu-handoff/{name}"), &record.to_string())
    }

    /// As [`Host::record`], of a card that is with a VM, whose start was asked for by this process.
    pub fn record_by(self, vmid: u32, slot: &str, home: &str, caller: u32) -> Host {
        let name = format!("vm-{vmid}");
        let host = self.record(&name, slot, "away", home);
        let mut record = host.own_file(&name);
        record["caller"] = json!({"pid": caller, "start": START});
        host.file(&format!("run/gpu-handoff/{name}"), &record.to_string())
    }

    /// A call of this process never came back; whether it still lives is another question.
    pub fn wedged(self, slot: &str, pid: u32) -> Host {
        let step = format!("unbind from nvidia {slot}.0");
        let wedge = json!({"step": step, "pid": pid, "start": START, "since": "2026-11-20T12:00:00Z"});
        self.file(&format!("run/gpu-handoff/wedged-{slot}"), &wedge.to_string())
    }

    /// The journal of a handoff to VM 112 that was killed while this process was at a step.
    pub fn journal(self, slot: &str, pid: u32) -> Host {
        let step = format!("unbind from nvidia {slot}.0");
        let journal =
            json!({"schema": 1, "owner": "vm-112", "slots": [slot], "step": step, "pid": pid, "start": START});
        self.file("run/gpu-handoff/journal", &journal.to_string())
    }

    /// What one of the program's own files says.
    pub fn own_file(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(&format!("run/gpu-handoff/{name}"))).unwrap()).unwrap()
    }

    pub fn has_own_file(&self, name: &str) -> bool {
        self.path(&format!("run/gpu-handoff/{name}")).exists()
    }

    /// What `history --json` says.
    pub fn history(&self) -> Vec<Value> {
        let Run { code, out, err } = self.run("history --json");
        assert_eq!((code, err.as_str()), (Some(0), ""));
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The program with these arguments, which are separated by one blank each.
    pub fn command(&self, call: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-handoff"));
        command.args(call.split(' ')).env_clear().env("GPU_HANDOFF_ROOT", &self.root).stdin(Stdio::null());
        command
    }

    pub fn run(&self, call: &str) -> Run {
        let Output { status, stdout, stderr } = self.command(call).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let out = text(stdout);
        has_schema(call, &out);
        let err = text(stderr);
        if self.silent.is_empty() && !call.contains("help") {
            advice::is_understood(&self.root, &format!("{err}{out}"), env!("CARGO_BIN_EXE_gpu-handoff"));
        }
        Run { code: status.code(), out, err }
    }

    /// Everything below the root: directories, targets of links, contents of files.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot(BTreeMap::new());
        snapshot.add(&self.root, "");
        snapshot
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Whoever still reads gets nothing, and an end.
        for path in &self.silent {
            let _ = fs::OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// Whoever asks for JSON gets it as its schema says.
#[track_caller]
fn has_schema(call: &str, out: &str) {
    if !call.contains("json") {
        return;
    }
    let of_all = call.contains("--cluster").then_some("cluster");
    let verb = of_all.or_else(|| {
        call.split(' ').find_map(|word| match word {
            "--status" | "status" => Some("status"),
            "history" | "plan" | "doctor" => Some(word),
            _ => None,
        })
    });
    for line in out.lines() {
        let value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{call}: {error}: {line}"));
        let mistakes = schema::mistakes(verb.unwrap(), &value);
        assert!(mistakes.is_empty(), "{call}:\n{}", mistakes.join("\n"));
    }
}

/// Where a function's attributes are.
pub fn device(address: &str) -> String {
    format!("sys/devices/pci0000:00/{address}")
}

pub struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    fn add(&mut self, directory: &Path, below: &str) {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let name = format!("{below}{}", entry.file_name().to_str().unwrap());
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let what = if kind.is_symlink() {
                format!("link to {}", fs::read_link(path).unwrap().display())
            } else if kind.is_fifo() {
                "silence".to_string()
            } else if kind.is_dir() {
                self.add(&path, &format!("{name}/"));
                "directory".to_string()
            } else {
                format!("file of {:?}", String::from_utf8_lossy(&fs::read(path).unwrap()))
            };
            self.0.insert(name, what);
        }
    }

    /// One line for everything that came, went or changed since `before`.
    pub fn changes_since(&self, before: &Snapshot) -> Vec<String> {
        let names = before.0.keys().chain(self.0.keys().filter(|name| !before.0.contains_key(*name)));
        names
            .filter(|name| before.0.get(*name) != self.0.get(*name))
            .map(|name| format!("{name}: {:?} -> {:?}", before.0.get(name), self.0.get(name)))
            .collect()
    }

    /// Locks may have been taken to find out, and the history and its counters tell of refusals: none is a trace of a handoff.
    pub fn without_lock(mut self) -> Snapshot {
        let is_none = |name: &String| {
            name.starts_with("run/gpu-handoff/lock")
                || ["history.jsonl", "counters.json"].iter().any(|file| *name == format!("var/lib/gpu-handoff/{file}"))
        };
        self.0.retain(|name, _| !is_none(name));
        // Nor are directories that were made for them.
        for directory in ["run/gpu-handoff", "run", "var/lib/gpu-handoff", "var/lib", "var"] {
            if !self.0.keys().any(|name| name.starts_with(&format!("{directory}/"))) {
                self.0.remove(directory);
            }
        }
        self
    }
}
