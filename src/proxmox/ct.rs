//! Container configurations (`/etc/pve/lxc/ID.conf`), read as `PVE::LXC::Config::parse_pct_config` reads them.
//!
//! Less is refused than for VMs: a plain line is kept whatever its value. Only `lxc.*` lines are
//! dropped, when LXC (as far as Proxmox knows it) has no such setting.

use super::property::{self, Key, Shape};
use super::{guest, perl};
use std::collections::{BTreeMap, BTreeSet};

/// The settings of a container that matter for giving it a GPU.
#[derive(Debug, Default, PartialEq)]
pub struct CtConfig {
    /// `devN` lines by the digits as written, of which there may be any number.
    pub dev: BTreeMap<String, Dev>,
    /// `mpN` lines that mount something of the host, by the digits as written.
    pub mount_points: BTreeMap<String, MountPoint>,
    /// The `lxc.*` lines that are kept, as key and value, in file order.
    pub raw_lxc: Vec<(String, String)>,
    pub ostype: Option<String>,
    pub unprivileged: bool,
    pub template: bool,
    pub lock: Option<String>,
    pub hookscript: Option<String>,
}

/// One `devN` line.
#[derive(Debug, PartialEq)]
pub struct Dev {
    pub raw: String,
    /// `None` if it cannot be read, and then Proxmox refuses to start the container.
    pub device: Option<Device>,
}

/// A device node of the host that the container gets too.
#[derive(Debug, PartialEq)]
pub struct Device {
    pub path: String,
    /// Octal, as written.
    pub mode: Option<String>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub deny_write: bool,
}

/// One `mpN` line whose volume is a path of the host.
#[derive(Debug, PartialEq)]
pub struct MountPoint {
    pub raw: String,
    pub host: String,
    pub inside: String,
}

const DEV: &[Key] = &[
    Key::new("path", Shape::Text(is_device_path)).bare(),
    Key::new("mode", Shape::Text(is_mode)),
    Key::new("uid", Shape::Integer { minimum: 0 }),
    Key::new("gid", Shape::Integer { minimum: 0 }),
    Key::new("deny-write", Shape::Boolean),
];

/// Reads what is written; never fails.
pub fn parse(bytes: &[u8]) -> CtConfig {
    let mut config = CtConfig::default();
    for (_, line) in perl::lines(main_section(bytes)) {
        if let Some((key, value)) = raw_lxc(line) {
            if is_lxc_key(key) {
                config.raw_lxc.push((perl::text(key), perl::text(value)));
            }
        } else if !guest::is_snapstate(line) {
            config.read(line);
        }
    }
    config
}

/// As the container is at its next start: Proxmox applies what is pending first.
pub fn parse_next(bytes: &[u8]) -> CtConfig {
    let mut config = parse(bytes);
    let mut now = None;
    let mut pending = Vec::new();
    for (_, line) in perl::lines(bytes) {
        now = section(line).or(now);
        if now == Some(Section::Pending) && raw_lxc(line).is_none() && !guest::is_snapstate(line) {
            pending.push(line);
        }
    }
    for (key, value) in pending.iter().filter_map(|line| setting(line)) {
        if key == b"delete" {
            value.split(|byte| b",; !".contains(byte)).for_each(|key| config.remove(&perl::text(key)));
        }
    }
    pending.into_iter().for_each(|line| config.read(line));
    config
}

/// The lines of a file of LXC's own, as `lxc.include` names them.
pub fn parse_included(bytes: &[u8]) -> Vec<(String, String)> {
    let lines = perl::lines(bytes).map(|(_, line)| perl::trim_start(line));
    lines.filter_map(raw_lxc).map(|(key, value)| (perl::text(key), perl::text(value))).collect()
}

/// What describes the container as it is: up to the first header, newlines included.
pub fn main_section(bytes: &[u8]) -> &[u8] {
    let mut begin = 0;
    for (_, line) in perl::lines(bytes) {
        if section(line).is_some() {
            return bytes.get(..begin).unwrap_or(bytes);
        }
        begin += line.len() + 1;
    }
    bytes
}

/// The key of a line and its value, as Proxmox reads them; none when it is no setting.
pub fn setting(line: &[u8]) -> Option<(&[u8], &[u8])> {
    raw_lxc(line).or_else(|| {
        let (key, value) = perl::split_once(line, b':')?;
        Some((key, guest::value(value)?))
    })
}

pub fn is_blank(line: &[u8]) -> bool {
    perl::trim(line).is_empty()
}

/// The N of every `devN` that is taken, or will be when what is pending is applied: also those that are to be deleted
/// then.
pub fn taken_dev(bytes: &[u8]) -> BTreeSet<u64> {
    let mut taken = BTreeSet::new();
    let mut now = None;
    for (_, line) in perl::lines(bytes) {
        now = section(line).or(now);
        let Some((key, value)) = setting(line).filter(|_| now != Some(Section::Snapshot)) else { continue };
        taken.extend(dev_number(key));
        if key == b"delete" {
            taken.extend(value.split(|byte| b",; !".contains(byte)).filter_map(dev_number));
        }
    }
    taken
}

/// Of `dev7` and of `dev007`; what has too many digits is the largest there is.
fn dev_number(key: &[u8]) -> Option<u64> {
    let digits = key.strip_prefix(b"dev").filter(|digits| is_number(digits))?;
    Some(perl::text(digits).parse().unwrap_or(u64::MAX))
}

impl CtConfig {
    pub fn devices_allow(&self) -> impl Iterator<Item = &str> {
        self.raw_values("lxc.cgroup2.devices.allow")
    }

    pub fn mount_entries(&self) -> impl Iterator<Item = &str> {
        self.raw_values("lxc.mount.entry")
    }

    fn raw_values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.raw_lxc.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The last line with a key counts, also if its value is refused.
    fn read(&mut self, line: &[u8]) {
        let Some((key, value)) = perl::split_once(line, b':') else {
            return;
        };
        let Some(value) = guest::value(value) else {
            return;
        };
        // A refused value stays as text, and Perl takes all text but 0 for true.
        let is_set = property::boolean(value) != Some(false);
        match key {
            b"unprivileged" => self.unprivileged = is_set,
            b"template" => self.template = is_set,
            b"lock" => self.lock = Some(perl::text(value)),
            b"hookscript" => self.hookscript = Some(perl::text(value)),
            b"ostype" => self.ostype = Some(perl::text(value)),
            [b'm', b'p', digits @ ..] if is_number(digits) => {
                self.mount_points.remove(&perl::text(digits));
                self.mount_points.extend(MountPoint::parse(value).map(|point| (perl::text(digits), point)));
            }
            [b'd', b'e', b'v', digits @ ..] if is_number(digits) => {
                let dev = Dev { raw: perl::text(value), device: Device::parse(value) };
                self.dev.insert(perl::text(digits), dev);
            }
            _ => {}
        }
    }
}

impl CtConfig {
    /// Of the settings that can be pending, those that give something of the host.
    fn remove(&mut self, key: &str) {
        if let Some(digits) = key.strip_prefix("dev") {
            self.dev.remove(digits);
        } else if let Some(digits) = key.strip_prefix("mp") {
            self.mount_points.remove(digits);
        }
    }
}

impl MountPoint {
    /// None for a volume of a storage.
    fn parse(value: &[u8]) -> Option<MountPoint> {
        let raw = perl::text(value);
        let value_of = |part: &str, name: &str| part.strip_prefix(name)?.strip_prefix('=').map(str::to_string);
        let bare = |part: &str| (!part.contains('=')).then(|| part.to_string());
        let host = raw.split(',').find_map(|part| value_of(part, "volume").or_else(|| bare(part)))?;
        let inside = raw.split(',').find_map(|part| value_of(part, "mp"))?;
        host.starts_with('/').then_some(MountPoint { host, inside, raw })
    }
}

impl Device {
    fn parse(value: &[u8]) -> Option<Device> {
        let options = property::parse(DEV, value).ok()?;
        Some(Device {
            path: options.text("path")?,
            mode: options.text("mode"),
            uid: options.integer("uid"),
            gid: options.integer("gid"),
            deny_write: options.boolean("deny-write").unwrap_or(false),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Pending,
    Snapshot,
}

/// The section that a line opens: `[pve:pending]` or a snapshot's name. Unlike in a VM's configuration, after any other
/// `[…]` the section goes on.
fn section(line: &[u8]) -> Option<Section> {
    let name = line.strip_prefix(b"[").and_then(|line| perl::trim_end(line).strip_suffix(b"]"))?;
    if name.eq_ignore_ascii_case(b"pve:pending") {
        return Some(Section::Pending);
    }
    property::is_config_id(name).then_some(Section::Snapshot)
}

/// `^(lxc\.[a-z0-9_\-\.]+)(:|\s*=)\s*(.*?)\s*$`: key and value, which may be empty.
fn raw_lxc(line: &[u8]) -> Option<(&[u8], &[u8])> {
    const START: &[u8] = b"lxc.";
    let name = line.strip_prefix(START)?;
    let in_key = |byte: &&u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'.');
    let (key, rest) = line.split_at(START.len() + name.iter().take_while(in_key).count());
    let value = rest.strip_prefix(b":").or_else(|| perl::trim_start(rest).strip_prefix(b"="))?;
    (key.len() > START.len()).then(|| (key, perl::trim(value)))
}

fn is_number(digits: &[u8]) -> bool {
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
}

/// `verify_lxc_dev_string`: below /dev and staying there.
fn is_device_path(path: &[u8]) -> bool {
    path.starts_with(b"/dev/") && !path.split(|&byte| byte == b'/').any(|part| matches!(part, b"." | b".."))
}

fn is_mode(mode: &[u8]) -> bool {
    matches!(mode, [b'0', digits @ ..] if digits.len() == 3 && digits.iter().all(|byte| (b'0'..=b'7').contains(byte)))
}

/// Whether Proxmox keeps a raw line with this key (`is_valid_lxc_conf_key`). It keeps
/// `lxc.environment.runtime` too, but not with the others.
fn is_lxc_key(key: &[u8]) -> bool {
    let Some(key) = key.strip_prefix(b"lxc.") else {
        return false;
    };
    FAMILIES.iter().any(|family| key.starts_with(family.as_bytes()))
        || KEYS.iter().chain(OLD_KEYS).any(|known| key == known.as_bytes())
}

const FAMILIES: [&str; 5] = ["cgroup2.", "cgroup.", "prlimit.", "limit.", "net."];

#[rustfmt::skip]
const KEYS: &[&str] = &[
        "apparmor.allow_incomplete", "apparmor.allow_nesting", "apparmor.profile", "apparmor.raw",
        "arch", "autodev", "cap.drop", "cap.keep", "console.logfile", "console.path", "devtty.dir",
        "environment", "environment.hooks", "group", "hook.autodev", "hook.clone", "hook.destroy",
        "hook.mount", "hook.post-stop", "hook.pre-mount", "hook.pre-start", "hook.start", "hook.stop",
        "hook.version", "idmap", "include", "init.cmd", "init.cwd", "init.gid", "init.groups",
        "init.uid", "kmsg", "log.file", "log.level", "mount.auto", "mount.entry", "mount.fstab",
        "pty.max", "rootfs.mount", "seccomp.notify.cookie", "seccomp.notify.proxy", "seccomp.profile",
        "selinux.context", "signal.halt", "signal.reboot", "signal.stop", "start.auto", "start.delay",
        "start.order", "sysctl.fs.mqueue", "sysctl.kernel.msgmax", "sysctl.kernel.msgmnb", "sysctl.kernel.msgmni",
        "sysctl.kernel.sem", "sysctl.kernel.shm_rmid_forced", "sysctl.kernel.shmall", "sysctl.kernel.shmmax",
        "sysctl.kernel.shmmni", "tty.max", "uts.name",
];

/// As LXC called them before 3.0: Proxmox warns about these.
#[rustfmt::skip]
const OLD_KEYS: &[&str] = &[
        "aa_allow_incomplete", "aa_profile", "console", "devttydir", "haltsignal", "id_map",
        "init_cmd", "logfile", "loglevel", "mount", "network.flags", "network.hwaddr", "network.ipv4",
        "network.ipv4.gateway", "network.ipv6", "network.ipv6.gateway", "network.link", "network.mtu",
        "network.name", "network.script.down", "network.script.up", "network.type", "pts", "rebootsignal",
        "se_context", "seccomp", "stopsignal", "tty", "utsname",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxmox::noise;

    #[test]
    fn only_pending_and_snapshots_end_the_main_section() {
        for header in ["[pve:pending]", "[PVE:Pending]\r", "[pending]", "[a-1] "] {
            assert!(!parse(format!("{header}\ntemplate: 1").as_bytes()).template, "{header}");
        }
        for line in ["[a]", "[2024]", "[a b]", "[pve:pending ]", " [snap]", "[snap] x", "[special:x]"] {
            assert!(parse(format!("{line}\ntemplate: 1").as_bytes()).template, "{line}");
        }
    }

    #[test]
    fn raw_lines_come_with_either_separator() {
        let key = b"lxc.mount.entry".as_slice();
        for line in ["lxc.mount.entry:x", "lxc.mount.entry \t=  x\r", "lxc.mount.entry=x"] {
            assert_eq!(raw_lxc(line.as_bytes()), Some((key, b"x".as_slice())), "{line}");
        }
        assert_eq!(raw_lxc(b"lxc.mount.entry:= x"), Some((key, b"= x".as_slice())));
        for line in ["lxc.mount.entry : x", "lxc.:x", "lxc.Mount.entry: x", "lxc.mount.entry x", " lxc.mount.entry: x"]
        {
            assert_eq!(raw_lxc(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn pending_devices_are_taken_and_those_of_snapshots_are_not() {
        let text = "dev0: /dev/a\ndev007: x\ndevx: y\ndev: z\n[pve:pending]\ndelete: dev3,!dev4 mp0\ndev9: /dev/b\n[snap]\n\
                    dev11: /dev/c\ndelete: dev12\n";
        assert_eq!(taken_dev(text.as_bytes()).into_iter().collect::<Vec<_>>(), [0, 3, 4, 7, 9]);
        assert_eq!(taken_dev(b"dev99999999999999999999: x").into_iter().collect::<Vec<_>>(), [u64::MAX]);
    }

    #[test]
    fn what_is_pending_counts_at_the_next_start() {
        let text = "ostype: debian\ndev0: /dev/a\ndev1: /dev/b\nmp0: /srv/x,mp=/x\nmp1: local:101/a.raw,mp=/y\n[pve:pending]\n\
                    delete: dev1,!mp0\ndev0: /dev/c\ndev2: /dev/d\n[snap]\ndev3: /dev/e\ndelete: dev0\n";
        let paths = |config: &CtConfig| {
            config.dev.values().map(|dev| dev.device.as_ref().unwrap().path.clone()).collect::<Vec<_>>()
        };
        let (now, next) = (parse(text.as_bytes()), parse_next(text.as_bytes()));
        assert_eq!(paths(&now), ["/dev/a", "/dev/b"]);
        assert_eq!(paths(&next), ["/dev/c", "/dev/d"]);
        assert_eq!((now.mount_points.len(), next.mount_points.len()), (1, 0));
        let point = &now.mount_points["0"];
        assert_eq!((point.host.as_str(), point.inside.as_str()), ("/srv/x", "/x"));
        assert_eq!(now.ostype.as_deref(), Some("debian"));
    }

    #[test]
    fn a_file_of_lxcs() {
        let text = b"# x\n  lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind\nlxc.cgroup2.devices.allow=c 195:* rwm\nnonsense\n";
        let lines = parse_included(text);
        assert_eq!(lines[0], ("lxc.mount.entry".to_string(), "/dev/nvidia0 dev/nvidia0 none bind".to_string()));
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn the_main_section_ends_where_the_next_begins() {
        for (bytes, main) in [
            (&b"a: b\n[snap]\nc: d"[..], &b"a: b\n"[..]),
            (b"a: b", b"a: b"),
            (b"a: b\n", b"a: b\n"),
            (b"[pve:pending]", b""),
            (b"", b""),
            (b"a\n[a b]\n\n[snap]", b"a\n[a b]\n\n"),
        ] {
            assert_eq!(main_section(bytes), main, "{}", perl::quoted(bytes));
        }
    }

    #[test]
    fn refused_values_are_kept() {
        let config = parse(b"unprivileged: maybe\ntemplate: 00\nlock: \"x\"\nhookscript: /x\ndev007: x\n");
        assert!(config.unprivileged && config.template);
        assert_eq!(config.lock.as_deref(), Some("\"x\""));
        assert_eq!(config.hookscript.as_deref(), Some("/x"));
        assert_eq!(config.dev["007"], Dev { raw: "x".into(), device: None });
    }

    #[test]
    fn survives_any_bytes() {
        let seed = b"dev0: /dev/nvidia0,gid=44,mode=0660\nlxc.mount.entry = /a b none bind\nlock: x\n[pve:pending]\n";
        noise::mutations(seed, |bytes| {
            let config = parse(bytes);
            assert!(config.raw_lxc.iter().all(|(key, _)| is_lxc_key(key.as_bytes())));
            for device in config.dev.values().filter_map(|dev| dev.device.as_ref()) {
                assert!(device.path.starts_with("/dev/") && !device.path.contains("/../"));
            }
        });
    }
}
