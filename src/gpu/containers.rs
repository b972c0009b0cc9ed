//! Containers that run, which of them could open an NVIDIA GPU, and what their configurations give them of one.

use super::inventory::{Slot, nvidia_slots};
use super::nodes::{self, NVIDIA_MAJOR};
use super::nvidia::Minors;
use crate::proxmox::ct::{self, CtConfig};
use crate::sorted;
use crate::sys::{DeviceNumber, Kernel, Node};
use crate::systemd;
use std::path::{Component, Path};

/// Where Proxmox has LXC put a container's processes (`lxc.cgroup.dir.container = lxc/ID`).
const CGROUPS: &str = "lxc";

/// Of the containers of this node.
const CONFIGS: &str = "/etc/pve/lxc";

/// The attribute that freezes all processes of a container: `1` or `0`.
pub fn freezer(ctid: u32) -> String {
    format!("{}/{CGROUPS}/{ctid}/cgroup.freeze", systemd::CGROUPS)
}

/// Whether all of its processes stand still. One that has ended meanwhile opens nothing.
pub fn is_frozen(kernel: &dyn Kernel, ctid: u32) -> bool {
    let events = kernel.text(&format!("{}/{CGROUPS}/{ctid}/cgroup.events", systemd::CGROUPS));
    events.is_none_or(|events| events.lines().any(|line| line == "frozen 1"))
}

pub fn runs(kernel: &dyn Kernel, ctid: u32) -> bool {
    systemd::has_processes(kernel, &format!("{CGROUPS}/{ctid}"))
}

/// Running containers that could open one of these slots' GPUs by what their configuration gives them, but for those that
/// somebody froze already.
pub fn with_gpu(kernel: &dyn Kernel, slots: &[Slot]) -> Vec<u32> {
    let own = own_nodes(kernel, slots);
    // Of a card whose number is not known any may be meant.
    let is_known = own.iter().filter(|(path, _)| nodes::is_gpu(path)).count()
        == slots.iter().filter(|s| s.gpu().is_some()).count();
    running(kernel, &|config| could_open(kernel, config, &own, is_known))
}

/// As [`with_gpu`], those that have anything of NVIDIA's, whether there is such a GPU now or not.
pub fn with_nvidia(kernel: &dyn Kernel) -> Vec<u32> {
    let all = own_nodes(kernel, &nvidia_slots(kernel));
    running(kernel, &|config| has_nvidia(config) || could_open(kernel, config, &all, true))
}

fn running(kernel: &dyn Kernel, is_meant: &dyn Fn(&CtConfig) -> bool) -> Vec<u32> {
    let cgroups = kernel.list(&format!("{}/{CGROUPS}", systemd::CGROUPS)).into_iter();
    cgroups
        .filter_map(|name| name.parse::<u32>().ok())
        .filter(|ctid| kernel.text(&freezer(*ctid)).is_some_and(|text| text == "0") && runs(kernel, *ctid))
        .filter(|ctid| config(kernel, *ctid).is_some_and(|config| is_meant(&config)))
        .collect()
}

/// The nodes that belong to these slots' GPUs alone.
fn own_nodes(kernel: &dyn Kernel, slots: &[Slot]) -> Vec<(String, DeviceNumber)> {
    let mut own = Vec::new();
    let minors = Minors::read(kernel);
    for gpu in slots.iter().flat_map(|slot| &slot.functions).filter(|function| function.is_nvidia_gpu()) {
        if let Some(minor) = minors.get(gpu.address) {
            own.push((format!("/dev/nvidia{minor}"), DeviceNumber { major: NVIDIA_MAJOR, minor }));
        }
        own.extend(nodes::drm_of(kernel, gpu.address));
    }
    own
}

/// Of several cards it is the nodes that tell which one a container uses; a rule alone, or what all cards share, may be
/// for any.
fn could_open(kernel: &dyn Kernel, config: &CtConfig, own: &[(String, DeviceNumber)], is_known: bool) -> bool {
    let given = resolved(kernel, config, own);
    let is_own = |given: &Given| own.iter().any(|(path, _)| given.has(path));
    if nvidia_hook(config).is_some() || given.iter().any(is_own) {
        return true;
    }
    if given.iter().any(|given| nodes::is_gpu(&given.host)) {
        return !is_known;
    }
    let minors: Vec<&str> = config.devices_allow().filter_map(minor_of_nvidia).collect();
    if !minors.is_empty() {
        let is_own =
            |minor: &&str| *minor == "*" || own.iter().any(|(_, n)| n.to_string() == format!("{NVIDIA_MAJOR}:{minor}"));
        let is_of_all = |minor: &&str| minor.parse().is_ok_and(|minor: u64| minor >= nodes::MODESET_MINOR);
        return !is_known || minors.iter().any(is_own) || minors.iter().all(is_of_all);
    }
    given.iter().any(|given| given.host.starts_with("/dev/nvidia"))
}

/// By its device nodes `/dev/nvidia…`, leave to use NVIDIA's major, or LXC's own hook. What it has of `/dev/dri` may be
/// another vendor's.
pub fn has_nvidia(config: &CtConfig) -> bool {
    config.devices_allow().any(|rule| minor_of_nvidia(rule).is_some())
        || nvidia_hook(config).is_some()
        || given(config).any(|node| node.host.starts_with("/dev/nvidia"))
}

/// `0` of `c 195:0 rwm`.
fn minor_of_nvidia(rule: &str) -> Option<&str> {
    let (major, minor) = rule.split_whitespace().nth(1)?.split_once(':')?;
    (major.parse() == Ok(NVIDIA_MAJOR)).then_some(minor)
}

/// How a configuration gives a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `devN`: Proxmox makes the node, and fails where there is one.
    Dev,
    /// `lxc.mount.entry`
    Entry,
    /// `mpN`: what is below `/dev` Proxmox takes for a disk.
    MountPoint,
}

/// A device node, or a directory of them, that a configuration gives its container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its path on the host.
    pub host: String,
    /// In the container.
    pub inside: String,
    pub way: Way,
    /// Of its line, `dev0`.
    pub key: String,
    /// Of its line as well, `/dev/nvidia0,gid=44`.
    pub value: String,
}

impl Given {
    /// As it stands there: `dev0: /dev/nvidia0,gid=44`.
    pub fn line(&self) -> String {
        format!("{}: {}", self.key, self.value)
    }

    /// What of a path in the container is left below this one: nothing of its own. A `devN` gives one node, whatever it
    /// names.
    pub fn below<'a>(&self, inside: &'a str) -> Option<&'a str> {
        let rest = inside.strip_prefix(self.inside.as_str())?;
        (rest.is_empty() || (self.way != Way::Dev && rest.starts_with('/'))).then_some(rest)
    }

    /// Whether a path of the host is given by it.
    pub fn has(&self, host: &str) -> bool {
        host == self.host || (self.way != Way::Dev && is_at_or_below(host, &self.host))
    }
}

/// What may be a node of a GPU, or a directory of such, by its path on the host: `/dev/nvidia…`, what is in `/dev/dri`, or
/// all of `/dev`.
pub fn given(config: &CtConfig) -> impl Iterator<Item = Given> {
    let is_gpu = |path: &str| path.starts_with("/dev/nvidia") || path == "/dev" || is_at_or_below(path, "/dev/dri");
    all_given(config).filter(move |node| is_gpu(&node.host))
}

/// All that is given; what is one of these nodes under another name has its path.
pub fn resolved(kernel: &dyn Kernel, config: &CtConfig, known: &[(String, DeviceNumber)]) -> Vec<Given> {
    let resolve = |given: Given| {
        // Elsewhere may be what does not answer.
        let is_likely = [&given.host, &given.inside].iter().any(|path| path.starts_with("/dev/"));
        if !is_likely || known.iter().any(|(node, _)| *node == given.host) {
            return given;
        }
        let number = kernel.device_number(&given.host).ok();
        let node = number.and_then(|number| known.iter().find(|(_, other)| *other == number));
        node.map(|(path, _)| Given { host: path.clone(), ..given.clone() }).unwrap_or(given)
    };
    all_given(config).map(resolve).collect()
}

/// Everything that gives a container a path of the host, in the order of kinds.
pub fn all_given(config: &CtConfig) -> impl Iterator<Item = Given> {
    let devices = config.dev.iter().filter_map(|(digits, dev)| Some((digits, dev, dev.device.as_ref()?)));
    let by_dev = devices.map(|(digits, dev, device)| Given {
        host: plain(&device.path),
        inside: plain(&device.path),
        way: Way::Dev,
        key: format!("dev{digits}"),
        value: dev.raw.clone(),
    });
    let by_entry = config.mount_entries().filter_map(|entry| {
        let mut words = entry.split_whitespace().map(unescape);
        let (host, target) = (words.next()?, words.next()?);
        let inside = plain(&format!("/{}", relative(&target)?));
        let (key, value) = ("lxc.mount.entry".to_string(), entry.to_string());
        Some(Given { host: plain(&host), inside, way: Way::Entry, key, value })
    });
    let by_point = config.mount_points.iter().map(|(digits, point)| Given {
        host: plain(&point.host),
        inside: plain(&point.inside),
        way: Way::MountPoint,
        key: format!("mp{digits}"),
        value: point.raw.clone(),
    });
    by_dev.chain(by_entry).chain(by_point)
}

/// A target as it is below the container's root. LXC mounts an absolute one only when it begins with where that root is
/// on the host, and ignores it else.
fn relative(target: &str) -> Option<&str> {
    match target.strip_prefix('/') {
        None => Some(target),
        Some(_) => target.split_once("/rootfs/").map(|(_, rest)| rest),
    }
}

/// `\040` for a blank, as in fstab.
fn unescape(word: &str) -> String {
    ["\\040", "\\011", "\\134"]
        .iter()
        .zip([" ", "\t", "\\"])
        .fold(word.to_string(), |text, (from, to)| text.replace(from, to))
}

/// Without what does not matter: `//`, `/./`, `..`, a slash at the end.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => parts.push(name.to_str().unwrap_or_default()),
            Component::ParentDir => drop(parts.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    format!("/{}", parts.join("/"))
}

/// Whether a path is this one, or in that directory.
pub fn is_at_or_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// LXC's own hook, which has nvidia-container-cli mount the host's driver and its nodes: as it stands there.
pub fn nvidia_hook(config: &CtConfig) -> Option<String> {
    nvidia_hook_line(config).map(|(key, value)| format!("{key}: {value}"))
}

/// As [`nvidia_hook`], key and value.
pub fn nvidia_hook_line(config: &CtConfig) -> Option<&(String, String)> {
    let is_it = |value: &str| {
        value.split_whitespace().any(|word| matches!(word.rsplit('/').next(), Some("nvidia" | "nvidia-container-cli")))
    };
    config.raw_lxc.iter().find(|(key, value)| key.starts_with("lxc.hook.") && is_it(value))
}

/// The configuration of a container of this node, with what it includes.
pub fn config(kernel: &dyn Kernel, ctid: u32) -> Option<CtConfig> {
    let bytes = kernel.read(&format!("{CONFIGS}/{ctid}.conf")).ok()?;
    Some(with_included(kernel, ct::parse(&bytes)))
}

/// As deep as LXC itself goes, and against files that include each other.
const INCLUDES: usize = 8;
const LINES: usize = 10_000;

/// `lxc.include` names a file of such lines, or a directory of `*.conf`, `lxc.mount.fstab` one of mounts: they take the place
/// of that line.
pub fn with_included(kernel: &dyn Kernel, mut config: CtConfig) -> CtConfig {
    for _ in 0..INCLUDES {
        let names_file = |key: &str| matches!(key, "lxc.include" | "lxc.mount.fstab" | "lxc.mount");
        if !config.raw_lxc.iter().any(|(key, _)| names_file(key)) || config.raw_lxc.len() > LINES {
            break;
        }
        let lines = std::mem::take(&mut config.raw_lxc);
        for (key, value) in lines {
            match key.as_str() {
                "lxc.include" => config.raw_lxc.extend(included(kernel, &value)),
                // Its lines are as good as entries.
                "lxc.mount.fstab" | "lxc.mount" => {
                    let text = kernel.text(&value).unwrap_or_default();
                    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
                    config.raw_lxc.extend(lines.map(|line| ("lxc.mount.entry".to_string(), line.to_string())));
                }
                _ => config.raw_lxc.push((key, value)),
            }
        }
    }
    config
}

fn included(kernel: &dyn Kernel, path: &str) -> Vec<(String, String)> {
    let names = kernel.list(path).into_iter().filter(|name| name.ends_with(".conf"));
    let mut files: Vec<String> = names.map(|name| format!("{path}/{name}")).collect();
    if files.is_empty() {
        files.push(path.to_string());
    }
    files.iter().filter_map(|file| kernel.read(file).ok()).flat_map(|bytes| ct::parse_included(&bytes)).collect()
}

/// The containers of this node, running or not.
pub fn all(kernel: &dyn Kernel) -> Vec<u32> {
    let mut all: Vec<u32> =
        kernel.list(CONFIGS).into_iter().filter_map(|name| name.strip_suffix(".conf")?.parse().ok()).collect();
    sorted::sort(&mut all);
    all
}

/// Whether any container of this node, running or not, is given this node.
pub fn is_given_to_any(kernel: &dyn Kernel, node: &str) -> bool {
    let configs = all(kernel).into_iter().filter_map(|ctid| config(kernel, ctid));
    let gives = |config: &CtConfig| nvidia_hook(config).is_some() || given(config).any(|given| given.has(node));
    configs.into_iter().any(|config| gives(&config))
}

/// The driver's nodes that this host lacks, with those of its capabilities that a container is given: Proxmox starts no
/// container without its `devN`.
pub fn missing_nodes(kernel: &dyn Kernel) -> Vec<Node> {
    let mut missing = nodes::missing(kernel);
    let given = nodes::missing_capabilities(kernel).into_iter().filter(|cap| is_given_to_any(kernel, &cap.path));
    missing.extend(given);
    missing
}

/// The PID, on the host, of a running container's init. None as long as LXC itself is still preparing the container.
pub fn init(kernel: &dyn Kernel, ctid: u32) -> Option<i32> {
    let mut cgroups = vec![format!("{}/{CGROUPS}/{ctid}", systemd::CGROUPS)];
    let mut found: Option<(usize, i32)> = None;
    let mut looked_at = 0;
    while let Some(cgroup) = cgroups.get(looked_at) {
        let processes = kernel.text(&format!("{cgroup}/cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            // Containers may have containers: of several inits the outermost is meant.
            let depth = depth_of_init(kernel, pid).filter(|depth| found.is_none_or(|(least, _)| *depth < least));
            found = depth.map(|depth| (depth, pid)).or(found);
        }
        if found.is_some_and(|(depth, _)| depth == 2) {
            break;
        }
        let inner = kernel.list(cgroup).into_iter().map(|name| format!("{cgroup}/{name}"));
        let inner: Vec<String> = inner.filter(|path| kernel.exists(&format!("{path}/cgroup.procs"))).collect();
        cgroups.extend(inner);
        looked_at += 1;
    }
    let (_, pid) = found?;
    let is_lxc = kernel.link_name(&format!("/proc/{pid}/exe")).is_ok_and(|program| program.starts_with("lxc-"));
    (!is_lxc).then_some(pid)
}

/// In how many PID namespaces a process is, if it is the first of the innermost.
fn depth_of_init(kernel: &dyn Kernel, pid: i32) -> Option<usize> {
    let status = kernel.text(&format!("/proc/{pid}/status"))?;
    let numbers: Vec<&str> = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().collect();
    (numbers.len() > 1 && numbers.last() == Some(&"1")).then_some(numbers.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    fn parse(line: &str) -> CtConfig {
        ct::parse(format!("arch: amd64\n{line}\n").as_bytes())
    }

    /// Whether a container with these lines could open the card with minor 0 and `renderD128`.
    fn could(lines: &str) -> bool {
        let own = [("/dev/nvidia0", NVIDIA_MAJOR, 0), ("/dev/dri/renderD128", 226, 128)];
        let own = own.map(|(path, major, minor)| (path.to_string(), DeviceNumber { major, minor }));
        could_open(&Linux::at("/nonexistent".into()), &parse(lines), &own, true)
    }

    #[test]
    fn what_lets_a_container_open_a_card() {
        for lines in [
            "dev0: /dev/nvidia0,gid=44",
            "dev3: path=/dev/dri/renderD128",
            "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file",
            "lxc.mount.entry: /dev/nvidia0 dev/gpu none bind,ro",
            "lxc.mount.entry: /dev/dri dev/dri none bind,optional,create=dir",
            "lxc.mount.entry: /dev dev none bind",
            "lxc.mount.entry = /dev//./nvidia0 dev/nvidia0 none bind",
            "mp0: /dev/dri,mp=/dev/dri",
            "lxc.cgroup2.devices.allow: c 195:* rwm",
            "lxc.cgroup2.devices.allow: c 195:0 rwm",
            "lxc.cgroup2.devices.allow: c 195:255 rwm",
            "lxc.hook.mount: /usr/share/lxc/hooks/nvidia",
            "dev0: /dev/nvidiactl",
            "dev0: /dev/nvidia0\ndev1: /dev/nvidia1",
        ] {
            assert!(could(lines), "{lines}");
        }
        for lines in [
            "dev0: /dev/nvidia1\ndev1: /dev/nvidiactl\ndev2: /dev/nvidia-uvm\nlxc.cgroup2.devices.allow: c 195:* rwm",
            "lxc.mount.entry: /dev/dri/renderD129 dev/dri/renderD129 none bind",
            "dev0: /dev/dri/card1",
            "dev0: /dev/",
            "lxc.cgroup2.devices.allow: c 195:1 rwm\nlxc.cgroup2.devices.allow: c 195:255 rwm",
            "lxc.cgroup2.devices.allow: c 1951:0 rwm",
            "lxc.mount.entry: /mnt/nvidia0 dev/nvidia0 none bind",
            "lxc.hook.mount: /root/my-nvidia-hook",
            "dev0: /dev/ttyUSB0",
            "#dev0: /dev/nvidia0",
            "[snap]\ndev0: /dev/nvidia0",
        ] {
            assert!(!could(lines), "{lines}");
        }
        // While the driver does not tell the card's number.
        let kernel = Linux::at("/nonexistent".into());
        assert!(could_open(&kernel, &parse("dev0: /dev/nvidia1"), &[], false));
        assert!(could_open(&kernel, &parse("lxc.cgroup2.devices.allow: c 195:1 rwm"), &[], false));
        assert!(!could_open(&kernel, &parse("dev0: /dev/dri/card1"), &[], false));
    }

    #[test]
    fn paths_in_every_spelling() {
        let found = |line: &str| {
            let all: Vec<Given> = all_given(&parse(line)).collect();
            all.first().map(|given| (given.host.clone(), given.inside.clone()))
        };
        let is = |line: &str, host: &str, inside: &str| {
            assert_eq!(found(line), Some((host.to_string(), inside.to_string())), "{line}");
        };
        is("lxc.mount.entry: /dev/dri/ dev/dri/ none bind,create=dir", "/dev/dri", "/dev/dri");
        is("lxc.mount.entry: /dev/../dev/nvidia0 ./dev/nvidia0 none bind", "/dev/nvidia0", "/dev/nvidia0");
        is(
            "lxc.mount.entry: /var/lib/lxc/101/rootfs/x /var/lib/lxc/101/rootfs/dev/nvidia0 none bind",
            "/var/lib/lxc/101/rootfs/x",
            "/dev/nvidia0",
        );
        is("lxc.mount.entry: /mnt/a\\040b dev/x none bind", "/mnt/a b", "/dev/x");
        is("mp3: volume=/dev/nvidia0,ro=1,mp=/dev/nvidia0", "/dev/nvidia0", "/dev/nvidia0");
        // LXC ignores it.
        assert_eq!(found("lxc.mount.entry: /dev/nvidia0 /dev/nvidia0 none bind"), None);
        assert_eq!(found("mp0: local:101/a.raw,mp=/x"), None);
    }

    #[test]
    fn what_is_included_counts() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-include-{}", std::process::id()));
        std::fs::create_dir_all(root.join("etc/lxc/d")).unwrap();
        let write = |path: &str, text: &str| std::fs::write(root.join(path), text).unwrap();
        write("etc/lxc/a.conf", "lxc.include = /etc/lxc/d\n# lxc.mount.entry = /dev/x dev/x none bind\n");
        write(
            "etc/lxc/d/b.conf",
            "lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind\nlxc.include = /etc/lxc/a.conf\n",
        );
        write("etc/lxc/fstab", "# x\n/dev/nvidia0 dev/nvidia0 none bind 0 0\n");
        write("etc/lxc/d/c", "lxc.mount.entry = /dev/nvidia1 dev/nvidia1 none bind\n");
        let config = with_included(&Linux::at(root.clone()), parse("lxc.include: /etc/lxc/a.conf"));
        let fstab = with_included(&Linux::at(root.clone()), parse("lxc.mount.fstab: /etc/lxc/fstab"));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(given(&fstab).map(|given| given.inside).collect::<Vec<_>>(), ["/dev/nvidia0"]);
        let hosts: Vec<String> = given(&config).map(|given| given.host).collect();
        assert!(!hosts.is_empty() && hosts.iter().all(|host| host == "/dev/nvidia0"), "{hosts:?}");
    }

    #[test]
    fn frozen_is_what_stands_still_or_is_gone() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-frozen-{}", std::process::id()));
        let cgroup = root.join("sys/fs/cgroup/lxc/101");
        std::fs::create_dir_all(&cgroup).unwrap();
        let is = |text: &str| {
            std::fs::write(cgroup.join("cgroup.events"), text).unwrap();
            is_frozen(&Linux::at(root.clone()), 101)
        };
        let found = [is("populated 1\nfrozen 1\n"), is("populated 1\nfrozen 0\n"), is("frozen 0\n")];
        let gone = is_frozen(&Linux::at(root.clone()), 102);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!((found, gone), ([true, false, false], true));
    }

    /// A container in the container has an init, too.
    #[test]
    fn the_outermost_init_wherever_it_stands() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-init-{}", std::process::id()));
        let write = |path: String, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for (pid, numbers) in [(10, "10 9 1"), (20, "20 1"), (30, "30 1"), (40, "40 7"), (50, "50")] {
            write(format!("proc/{pid}/status"), &format!("Name:\tx\nNSpid:\t{numbers}\n"));
        }
        let init_among = |processes: &str| {
            write("sys/fs/cgroup/lxc/101/cgroup.procs".to_string(), processes);
            init(&Linux::at(root.clone()), 101)
        };
        let found = ["10\n20\n", "20\n10\n", "20\n30\n", "10\n40\n50\n", "40\n50\n"].map(init_among);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [Some(20), Some(20), Some(20), Some(10), None]);
    }
}
