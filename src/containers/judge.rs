//! What is true of a container in one respect, and what to type where that is not as it should be. Pure.

use super::cuda::{self, Fit, Release};
use super::seen::Seen;
use super::stale::Stale;
use super::theirs::{self, Theirs, V1_ALLOW, may_open};
use crate::gpu::containers::{Way, is_at_or_below};
use crate::gpu::nodes::{CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use crate::gpu::nvidia::Version;
use crate::sys::DeviceNumber;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What is true of a container in one respect, and what to type where that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    pub name: &'static str,
    pub what: String,
    pub remedy: Option<String>,
    /// [`Fact::what`] without what the doctor has a finding of its own for, where there is such a thing.
    pub alone: Option<String>,
    /// Keys of the container's configuration and paths on the host, as the lines have them that it is about.
    pub at: Vec<String>,
}

impl Fact {
    pub(super) fn good(name: &'static str, what: impl Into<String>) -> Fact {
        Fact { name, what: what.into(), remedy: None, alone: None, at: Vec::new() }
    }

    pub(super) fn off(name: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Fact {
        Fact { remedy: Some(remedy.into()), ..Fact::good(name, what) }
    }

    pub(super) fn at(self, at: impl IntoIterator<Item = String>) -> Fact {
        Fact { at: at.into_iter().collect(), ..self }
    }
}

pub(super) fn write_report(text: &mut String, ctid: u32, facts: &[Fact]) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "container {ctid}");
    for Fact { name, what, remedy, .. } in facts {
        let remedy = remedy.as_ref().map_or_else(String::new, |remedy| format!(": {remedy}"));
        let _ = writeln!(text, "  {name:<8}  {what}{remedy}");
    }
}

pub(super) fn dev_keys(theirs: &Theirs) -> Vec<String> {
    let devs = theirs.given.iter().filter(|given| given.way == Way::Dev);
    devs.map(|given| given.key.clone()).collect()
}

/// Proxmox makes the node of a `devN`, and the container does not start where there is one by then.
pub(super) fn twice(ctid: u32, theirs: &Theirs) -> Option<Fact> {
    let pairs = theirs::twice(theirs);
    let each: Vec<String> = pairs.iter().map(|(path, dev, other)| format!("{path} by {dev} and by {other}")).collect();
    let devs: Vec<&str> = pairs.iter().map(|(_, dev, _)| dev.as_str()).collect();
    (!pairs.is_empty()).then(|| {
        let what = format!("{}: it does not start with that", each.join(", "));
        let at = pairs.iter().flat_map(|(path, dev, other)| [path.clone(), dev.clone(), other.clone()]);
        Fact::off("twice", what, format!("pct set {ctid} --delete {}", devs.join(","))).at(at)
    })
}

/// Whether the container may open the nodes that are mounted into it. For those of `devN` Proxmox sees to that, and an
/// unprivileged container may open whatever it can see.
pub(super) fn rules(theirs: &Theirs, known: &[(String, DeviceNumber)], remedy: &dyn Fn() -> String) -> Fact {
    let mounted: Vec<_> = theirs.given.iter().filter(|given| given.way != Way::Dev).collect();
    // By major: what it is, and the numbers that must be allowed.
    let mut needed: BTreeMap<u64, (&str, Vec<DeviceNumber>)> = BTreeMap::new();
    let mut add = |path: &str, number: DeviceNumber| {
        needed.entry(number.major).or_insert((kind_of(path), Vec::new())).1.push(number);
    };
    for (path, number) in known {
        let is_mounted = mounted.iter().any(|given| is_at_or_below(path, &given.host));
        if is_mounted || (theirs.hook.is_some() && path.starts_with("/dev/nvidia")) {
            add(path, *number);
        }
    }
    // While the driver is not loaded the numbers that never change are known all the same.
    for given in mounted.iter().filter(|given| !known.iter().any(|(path, _)| *path == given.host)) {
        if let Some(minor) = fixed_minor(&given.host) {
            add(&given.host, DeviceNumber { major: NVIDIA_MAJOR, minor });
        }
    }
    let old = theirs.config.raw_lxc.iter().any(|(key, _)| key == V1_ALLOW);
    let old = if old { format!("; {V1_ALLOW} is of cgroup v1 and does nothing here") } else { String::new() };
    if theirs.config.unprivileged || needed.is_empty() {
        return Fact::good("rules", format!("none needed{old}"));
    }
    let mut missing = Vec::new();
    for (major, (kind, numbers)) in &needed {
        let lacking: Vec<_> = numbers.iter().filter(|number| !may_open(&theirs.config, **number)).collect();
        match lacking.as_slice() {
            [] => {}
            all if all.len() == numbers.len() => missing.push(format!("{kind} {major}")),
            some => missing.extend(some.iter().map(|number| format!("{kind} {number}"))),
        }
    }
    if missing.is_empty() {
        let all: Vec<String> = needed.iter().map(|(major, (kind, _))| format!("{kind} {major}")).collect();
        return Fact::good("rules", format!("for {}{old}", all.join(", ")));
    }
    let alone = format!("none for {}", missing.join(", "));
    let fact = Fact::off("rules", format!("{alone}{old}"), remedy());
    if old.is_empty() { fact } else { Fact { alone: Some(alone), ..fact } }
}

pub(super) fn kind_of(path: &str) -> &'static str {
    [("/dev/nvidia-uvm", "nvidia-uvm"), ("/dev/nvidia-caps", "nvidia-caps"), ("/dev/dri", "dri")]
        .iter()
        .find(|(start, _)| path.starts_with(start))
        .map_or("nvidia", |(_, kind)| kind)
}

pub(super) fn fixed_minor(path: &str) -> Option<u64> {
    match path.strip_prefix("/dev/nvidia")? {
        "ctl" => Some(CONTROL_MINOR),
        "-modeset" => Some(MODESET_MINOR),
        digits => digits.parse().ok(),
    }
}

/// `given` are those of the host's nodes that its configuration gives it; `away` says who has a GPU instead.
pub(super) fn nodes(ctid: u32, given: &[String], seen: &Seen, stale: &[Stale], away: Option<String>) -> Fact {
    let remedy = format!("pct reboot {ctid}");
    if !stale.is_empty() {
        let words = stale.iter().map(|Stale { path, inside, host }| match inside {
            Some(inside) => format!("{path} is {inside}, on the host {host}"),
            None => format!("{path} is missing"),
        });
        let at = stale.iter().map(|stale| stale.path.clone());
        return Fact::off("nodes", words.collect::<Vec<_>>().join(", "), remedy).at(at);
    }
    let closed: Vec<&str> = given.iter().filter(|node| !seen.has_node(node)).map(String::as_str).collect();
    if closed.is_empty() {
        let open = if given.is_empty() { "none on the host now".to_string() } else { given.join(" ") };
        return Fact::good("nodes", away.map_or_else(|| open.clone(), |away| format!("{open}; {away}")));
    }
    let at = closed.iter().map(ToString::to_string);
    Fact::off("nodes", format!("{} cannot be opened", closed.join(" ")), remedy).at(at)
}

pub(super) fn docker(ctid: u32, seen: &Seen) -> Option<Fact> {
    seen.docker_sets_cgroups.then(|| {
        Fact::off(
            "docker",
            "NVIDIA's runtime in it sets up device cgroups, which fails in a container",
            format!("pct exec {ctid} -- nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"),
        )
    })
}

pub(super) fn toolkit(seen: &Seen, package: &str, host: Option<Version>, setup: &str) -> Fact {
    let Some(version) = seen.packages.get(package) else {
        return Fact::good("cuda", format!("no {package} ({setup} installs it)"));
    };
    let release = Release::of_package(package);
    let mut nvcc = seen.nvcc.iter().filter(|text| release.is_none_or(|release| Release::parse(text) == Some(release)));
    let nvcc = nvcc.next();
    if cuda::has_compiler(package) && nvcc.is_none() {
        return Fact::off("cuda", format!("{package} {version}, but nvcc does not work"), setup);
    }
    let nvcc = nvcc.map_or_else(String::new, |release| format!(", nvcc {release}"));
    let what = format!("{package} {version}{nvcc}");
    let fit = release.zip(host).map(|(release, driver)| cuda::fit(release, driver));
    match fit {
        Some(Fit::No(first)) => Fact::off("cuda", what, format!("it needs driver {first} or newer on the host")),
        Some(Fit::Partly(first)) => Fact::good("cuda", format!("{what}, made for drivers from {first} on")),
        _ => Fact::good("cuda", what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::DeviceNumber;

    const MOUNTS: &str = "lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file\n\
        lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file\n";

    fn theirs(text: &str) -> Theirs {
        Theirs::read(&crate::sys::Linux::at("/nonexistent".into()), text.as_bytes())
    }

    fn known() -> Vec<(String, DeviceNumber)> {
        let nodes =
            [("nvidia0", 195, 0), ("nvidiactl", 195, 255), ("nvidia-uvm", 511, 0), ("nvidia-uvm-tools", 511, 1)];
        nodes.map(|(name, major, minor)| (format!("/dev/{name}"), DeviceNumber { major, minor })).to_vec()
    }

    fn rules_of(text: &str) -> Fact {
        rules(&theirs(text), &known(), &|| "type this".to_string())
    }

    #[test]
    fn rules_are_held_against_the_numbers_of_now() {
        let allow = |rule: &str| format!("lxc.cgroup2.devices.allow: {rule}\n");
        let both = format!("{}{}", allow("c 195:* rwm"), allow("c 511:* rwm"));
        assert_eq!(rules_of(&format!("{MOUNTS}{both}")), Fact::good("rules", "for nvidia 195, nvidia-uvm 511"));
        for enough in ["a", "c *:* rwm"] {
            assert_eq!(rules_of(&format!("{MOUNTS}{}", allow(enough))).remedy, None, "{enough}");
        }
        let old = rules_of(&format!("{MOUNTS}{}{}", allow("c 195:* rwm"), allow("c 508:* rwm")));
        assert_eq!(old, Fact::off("rules", "none for nvidia-uvm 511", "type this"));
        assert_eq!(rules_of(MOUNTS).what, "none for nvidia 195, nvidia-uvm 511");
        assert_eq!(rules_of(&format!("{MOUNTS}unprivileged: 1\n")).remedy, None);
        assert_eq!(rules_of("dev0: /dev/nvidia0\n").remedy, None);
        // Minors that do not fit, an order that takes it back, and what is of another time.
        let ctl = "lxc.mount.entry: /dev/nvidiactl dev/nvidiactl none bind\n";
        let exact = format!("{MOUNTS}{ctl}{}{}{}", allow("c 195:1 rwm"), allow("c 195:255 rwm"), allow("c 511:* rwm"));
        assert_eq!(rules_of(&exact).what, "none for nvidia 195:0");
        let denied = format!("{MOUNTS}{both}lxc.cgroup2.devices.deny: a\n");
        assert_eq!(rules_of(&denied).what, "none for nvidia 195, nvidia-uvm 511");
        let v1 = rules_of(&format!("{MOUNTS}{both}").replace("cgroup2", "cgroup"));
        assert_eq!(
            v1.what,
            "none for nvidia 195, nvidia-uvm 511; lxc.cgroup.devices.allow is of cgroup v1 and does nothing here"
        );
        // The driver is not loaded.
        let fixed = rules(&theirs(&format!("{MOUNTS}{}", allow("c 195:* rwm"))), &[], &String::new);
        assert_eq!(fixed, Fact::good("rules", "for nvidia 195"));
        // A directory, and LXC's own hook.
        assert_eq!(rules_of("lxc.mount.entry: /dev dev none bind\n").what, "none for nvidia 195, nvidia-uvm 511");
        assert_eq!(
            rules_of("lxc.hook.mount: /usr/share/lxc/hooks/nvidia\n").what,
            "none for nvidia 195, nvidia-uvm 511"
        );
    }

    #[test]
    fn nodes_must_open_and_be_the_hosts() {
        let good = Seen::parse("node=/dev/nvidia0\nnode=/dev/nvidia-uvm\n");
        let given = ["/dev/nvidia-uvm", "/dev/nvidia0"].map(str::to_string);
        assert_eq!(nodes(101, &given, &good, &[], None), Fact::good("nodes", "/dev/nvidia-uvm /dev/nvidia0"));
        let closed = nodes(101, &given, &Seen::parse("node=/dev/nvidia0\n"), &[], None);
        assert_eq!(
            (closed.what.as_str(), closed.remedy.as_deref()),
            ("/dev/nvidia-uvm cannot be opened", Some("pct reboot 101"))
        );
        assert_eq!(nodes(101, &[], &Seen::default(), &[], None).what, "none on the host now");
        let away = nodes(101, &given[..1], &Seen::parse("node=/dev/nvidia-uvm\n"), &[], Some("who".into()));
        assert_eq!(away, Fact::good("nodes", "/dev/nvidia-uvm; who"));
        let number = |major| DeviceNumber { major, minor: 0 };
        let old = Stale { path: "/dev/nvidia-uvm".into(), inside: Some(number(508)), host: number(511) };
        let stale = nodes(101, &given, &good, &[old], None);
        assert_eq!(stale.what, "/dev/nvidia-uvm is 508:0, on the host 511:0");
    }

    #[test]
    fn a_toolkit_is_no_duty_but_must_work() {
        let of = |text: &str| toolkit(&Seen::parse(text), "cuda-toolkit-12-8", "580.95.05".parse().ok(), "x");
        assert_eq!(of("").remedy, None);
        let package = "package=cuda-toolkit-12-8 12.8.1-1 installed\n";
        assert_eq!(of(&format!("{package}nvcc=12.8\n")), Fact::good("cuda", "cuda-toolkit-12-8 12.8.1-1, nvcc 12.8"));
        assert!(of(package).what.contains("nvcc does not work"));
        let old =
            toolkit(&Seen::parse(&format!("{package}nvcc=12.8\n")), "cuda-toolkit-12-8", "470.1".parse().ok(), "x");
        assert!(old.remedy.is_some_and(|remedy| remedy.contains("525.60.13")));
    }

    #[test]
    fn a_report_is_aligned_and_says_what_to_type() {
        let mut text = String::new();
        write_report(&mut text, 101, &[Fact::good("rules", "fine"), Fact::off("driver", "none", "type this")]);
        assert_eq!(text, "container 101\n  rules     fine\n  driver    none: type this\n");
    }
}
