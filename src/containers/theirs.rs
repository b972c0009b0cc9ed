//! What a container is given by lines that are not ours, and what it may open by them.
//!
//! A node is given once. Of one that has both a `devN` and a mount, Proxmox makes the node where the mount is already, the
//! kernel says that it exists, and the container does not start.

use super::rules::Need;
use crate::gpu::containers::{self, Given, Way, is_at_or_below};
use crate::gpu::nodes;
use crate::proxmox::ct::{self, CtConfig};
use crate::sorted;
use crate::sys::{DeviceNumber, Kernel};

pub struct Theirs {
    /// As it is at the next start, with what it includes.
    pub config: CtConfig,
    pub given: Vec<Given>,
    /// LXC's own hook mounts the host's driver with all its nodes.
    pub hook: Option<String>,
}

/// What a path of a container is without us.
#[derive(Debug, PartialEq, Eq)]
pub enum About<'a> {
    Nothing,
    /// The host's node of that path.
    Given(&'a Given),
    /// Something else is there.
    Another(&'a Given),
}

impl Theirs {
    /// `bytes` are a configuration without the lines that are ours.
    pub fn read(kernel: &dyn Kernel, bytes: &[u8]) -> Theirs {
        Theirs::of(kernel, ct::parse_next(bytes))
    }

    pub fn of(kernel: &dyn Kernel, config: CtConfig) -> Theirs {
        let config = containers::with_included(kernel, config);
        let given = containers::resolved(kernel, &config, &known(kernel));
        let hook = containers::nvidia_hook(&config);
        Theirs { config, given, hook }
    }

    pub fn about(&self, kernel: &dyn Kernel, path: &str) -> About<'_> {
        for given in &self.given {
            let Some(rest) = given.below(path) else { continue };
            let source = format!("{}{rest}", given.host);
            if source == path {
                return About::Given(given);
            }
            if rest.is_empty() {
                return About::Another(given);
            }
            // A directory of that name with other contents than the host's.
            let number = |path: &str| kernel.device_number(path).ok();
            if source.starts_with("/dev/") && number(&source).is_some_and(|n| Some(n) == number(path)) {
                return About::Given(given);
            }
        }
        About::Nothing
    }

    /// Whether anything of NVIDIA's is given.
    pub fn has_nvidia(&self) -> bool {
        let is_nvidia = |given: &Given| given.host.starts_with("/dev/nvidia") || given.host == "/dev";
        self.hook.is_some() || self.given.iter().any(is_nvidia)
    }

    /// Of these nodes of the host those that the container has under the same path.
    pub fn nodes(&self, kernel: &dyn Kernel, nodes: &[String]) -> Vec<String> {
        let is_given = |node: &&String| self.hook.is_some() || matches!(self.about(kernel, node), About::Given(_));
        let mut given: Vec<String> = nodes.iter().filter(is_given).cloned().collect();
        sorted::sort(&mut given);
        given
    }

    /// What of a directory is given by itself.
    fn has_below(&self, path: &str) -> bool {
        self.given.iter().any(|given| given.inside != path && is_at_or_below(&given.inside, path))
    }

    /// What is left to be given; the error is the line that has something else where a node shall be.
    ///
    /// # Errors
    /// The line.
    pub fn left(
        &self,
        kernel: &dyn Kernel,
        needs: Vec<Need>,
        split: &dyn Fn(Need) -> Vec<Need>,
    ) -> Result<Vec<Need>, Given> {
        let mut left = Vec::new();
        for need in needs {
            let Some(path) = need.path() else {
                left.push(need);
                continue;
            };
            let parts = if self.has_below(&path) { split(need) } else { vec![need] };
            for need in parts {
                let Some(path) = need.path() else { continue };
                if self.hook.is_some() && path.starts_with("/dev/nvidia") {
                    continue;
                }
                match self.about(kernel, &path) {
                    About::Nothing => left.push(need),
                    About::Given(_) => {}
                    About::Another(given) => return Err(given.clone()),
                }
            }
        }
        Ok(left)
    }

    /// Whether a node that this container shall have is given by a mount, which needs a rule beside it; for those of
    /// `devN` Proxmox sees to that.
    pub fn needs_rules(&self, kernel: &dyn Kernel, needs: &[Need]) -> bool {
        let is_mounted = |path: String| match self.about(kernel, &path) {
            About::Given(given) => given.way != Way::Dev,
            About::Nothing | About::Another(_) => true,
        };
        self.hook.is_some() || needs.iter().filter_map(Need::path).any(is_mounted)
    }
}

/// The host's nodes of NVIDIA's GPUs.
pub fn known(kernel: &dyn Kernel) -> Vec<(String, DeviceNumber)> {
    let mut known = nodes::wanted(kernel);
    known.extend(nodes::drm(kernel));
    known.extend(nodes::capabilities(kernel).into_iter().map(|node| (node.path, node.number)));
    known
}

/// Whether what these lines give is given more than once, as pairs of the `devN` and the other line. The paths are the
/// container's.
pub fn twice(theirs: &Theirs) -> Vec<(String, String, String)> {
    let mut found: Vec<(String, String, String)> = Vec::new();
    for (at, given) in theirs.given.iter().enumerate().filter(|(_, given)| given.way == Way::Dev) {
        let others = theirs.given.iter().enumerate().filter(|(other, _)| *other != at);
        let clashes = |(other, earlier): &(usize, &Given)| match earlier.way {
            // Of two the later one fails.
            Way::Dev => *other < at && earlier.inside == given.inside,
            Way::Entry => is_at_or_below(&given.inside, &earlier.inside) && below_is_there(given, earlier),
            // LXC puts its own /dev over what Proxmox mounted there.
            Way::MountPoint => false,
        };
        let other = others.filter(clashes).map(|(_, other)| other.key.clone()).next();
        let hook = containers::nvidia_hook_line(&theirs.config).filter(|_| given.inside.starts_with("/dev/nvidia"));
        if let Some(other) = other.or_else(|| hook.map(|(key, _)| key.clone())) {
            found.push((given.inside.clone(), given.key.clone(), other));
        }
    }
    found
}

/// In a directory that is mounted as a whole the node is there if it is in that of the host.
fn below_is_there(given: &Given, directory: &Given) -> bool {
    given.inside == directory.inside
        || format!("{}{}", directory.host, &given.inside[directory.inside.len()..]) == given.host
}

/// `dev0` of `dev0: /dev/nvidia0`.
pub fn key_of(line: &str) -> String {
    line.split(':').next().unwrap_or_default().to_string()
}

/// Whether a container may open a device by its rules, which take effect in their order.
pub fn may_open(config: &CtConfig, number: DeviceNumber) -> bool {
    let mut may = false;
    for (key, rule) in &config.raw_lxc {
        match key.as_str() {
            "lxc.cgroup2.devices.allow" | "lxc.cgroup2.devices.deny" if rule.is_empty() => may = false,
            "lxc.cgroup2.devices.allow" if fits(rule, number, true) => may = true,
            "lxc.cgroup2.devices.deny" if fits(rule, number, false) => may = false,
            _ => {}
        }
    }
    may
}

/// `c 195:* rwm`, or `a` for all there is. To use a device it must be read and written.
fn fits(rule: &str, number: DeviceNumber, to_use: bool) -> bool {
    let mut words = rule.split_whitespace();
    match words.next() {
        Some("a") => return true,
        Some("c") => {}
        _ => return false,
    }
    let Some((major, minor)) = words.next().and_then(|number| number.split_once(':')) else { return false };
    let is = |text: &str, number: u64| text == "*" || text.parse() == Ok(number);
    let access = words.next().unwrap_or_default();
    is(major, number.major) && is(minor, number.minor) && (!to_use || (access.contains('r') && access.contains('w')))
}

/// Lines that give the container something of NVIDIA's, as they stand there.
pub fn told(theirs: &Theirs) -> Vec<String> {
    let is_nvidia = |given: &&Given| [&given.host, &given.inside].iter().any(|path| path.starts_with("/dev/nvidia"));
    let mut told: Vec<String> = theirs.given.iter().filter(is_nvidia).map(Given::line).collect();
    // Mounts first, as they always were told.
    sorted::sort_by_key(&mut told, |line| !line.starts_with("lxc."));
    let rules = theirs.config.raw_lxc.iter().filter(|(key, rule)| {
        matches!(key.as_str(), "lxc.cgroup2.devices.allow" | V1_ALLOW)
            && rule.split_whitespace().any(|word| word.starts_with("195:"))
    });
    told.extend(rules.map(|(key, rule)| format!("{key}: {rule}")));
    told.extend(theirs.hook.clone());
    told
}

/// Of lines as [`told`] gives them. Proxmox's tool has no way to remove an `lxc.*` line.
pub fn how_to_take_out(ctid: u32, lines: &[String]) -> String {
    let (raw, devs): (Vec<&String>, Vec<&String>) = lines.iter().partition(|line| line.starts_with("lxc."));
    let keys: Vec<String> = devs.iter().map(|line| key_of(line)).collect();
    let dev = (!keys.is_empty()).then(|| format!("pct set {ctid} --delete {}", keys.join(",")));
    let raw = (!raw.is_empty()).then(|| format!("remove the lxc.* ones from /etc/pve/lxc/{ctid}.conf in an editor"));
    dev.into_iter().chain(raw).collect::<Vec<_>>().join(", and ")
}

/// Of cgroup v1, which no Proxmox has any more.
pub const V1_ALLOW: &str = "lxc.cgroup.devices.allow";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    fn theirs(lines: &str) -> Theirs {
        Theirs::read(&Linux::at("/nonexistent".into()), lines.as_bytes())
    }

    #[test]
    fn a_node_that_is_given_twice() {
        const ENTRY: &str = "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n";
        let found = |lines: &str| {
            twice(&theirs(lines))
                .into_iter()
                .map(|(path, dev, other)| format!("{path} {dev} {other}"))
                .collect::<Vec<_>>()
        };
        for (lines, pair) in [
            (format!("dev0: /dev/nvidia0\n{ENTRY}"), "/dev/nvidia0 dev0 lxc.mount.entry"),
            ("dev0: /dev/nvidia0\ndev5: /dev/nvidia0,gid=44\n".into(), "/dev/nvidia0 dev5 dev0"),
            (
                "dev1: /dev/dri/card0\nlxc.mount.entry: /dev/dri dev/dri none bind\n".into(),
                "/dev/dri/card0 dev1 lxc.mount.entry",
            ),
            (format!("{ENTRY}[pve:pending]\ndev3: /dev/nvidia0\n"), "/dev/nvidia0 dev3 lxc.mount.entry"),
            (
                "dev0: /dev/nvidia0\nlxc.hook.mount: /usr/share/lxc/hooks/nvidia\n".into(),
                "/dev/nvidia0 dev0 lxc.hook.mount",
            ),
        ] {
            assert_eq!(found(&lines), [pair], "{lines}");
        }
        for lines in [
            format!("dev0: /dev/nvidia1\n{ENTRY}"),
            format!("#dev0: /dev/nvidia0\n{ENTRY}"),
            format!("{ENTRY}[snap]\ndev0: /dev/nvidia0\n"),
            format!("dev0: /dev/nvidia0\n{ENTRY}[pve:pending]\ndelete: dev0\n"),
            format!("{ENTRY}{ENTRY}"),
            "dev1: /dev/dri/card0\nlxc.mount.entry: /srv/dri dev/dri none bind\n".into(),
        ] {
            assert_eq!(found(&lines), [""; 0], "{lines}");
        }
    }

    #[test]
    fn rules_take_effect_in_their_order() {
        let may = |lines: &[&str]| {
            let text: String = lines.iter().map(|line| format!("lxc.cgroup2.devices.{line}\n")).collect();
            may_open(&ct::parse(text.as_bytes()), DeviceNumber { major: 195, minor: 255 })
        };
        for rule in
            ["allow: c 195:* rwm", "allow: c 195:255 rw", "allow: a", "allow: c *:* rwm", "allow = c  195:255\trwm"]
        {
            assert!(may(&[rule]), "{rule}");
            assert!(!may(&[rule, "deny: a"]), "{rule}");
            assert!(may(&["deny: a", rule, "deny: c 10:* rwm", "deny: b *:* rwm"]), "{rule}");
        }
        for rule in
            ["allow: c 195:0 rwm", "allow: c *:* m", "allow: b 195:* rwm", "allow: c 195:* r", "allow: c 195", "allow:"]
        {
            assert!(!may(&[rule]), "{rule}");
        }
        assert!(!may_open(&ct::parse(b"lxc.cgroup.devices.allow: a\n"), DeviceNumber { major: 195, minor: 255 }));
    }
}
