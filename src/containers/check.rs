//! Whether a container's driver, nodes and rules fit those of the host. Changes nothing.

use super::cuda::{self, Fit, Release};
use super::seen::Seen;
use super::stages::{self, Stage, Toolkit, Wanted};
use super::stale::{Stale, stale};
use super::theirs::{self, Theirs, V1_ALLOW, may_open};
use super::{Who, Wish, attach, inside};
use crate::App;
use crate::config::Config;
use crate::driver;
use crate::gpu::containers::{self, Way, is_at_or_below};
use crate::gpu::inventory::nvidia_slots;
use crate::gpu::nodes::{CONTROL_MINOR, MODESET_MINOR, NVIDIA_MAJOR};
use crate::gpu::nvidia::{self, Version};
use crate::proxmox::ct;
use crate::stop::{Result, Stop};
use crate::sys::{DeviceNumber, Kernel};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::ErrorKind;

/// What is true of a container in one respect, and what to type where that is not as it should be.
#[derive(Debug, PartialEq, Eq)]
struct Fact {
    name: &'static str,
    what: String,
    mend: Option<String>,
}

impl Fact {
    fn good(name: &'static str, what: impl Into<String>) -> Fact {
        Fact { name, what: what.into(), mend: None }
    }

    fn off(name: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Fact {
        Fact { name, what: what.into(), mend: Some(mend.into()) }
    }
}

/// The report, and whether all is well.
///
/// # Errors
/// When there is nothing to report on.
pub fn check(app: &App, who: Who) -> Result<(String, Result<()>)> {
    let config = app.config_for_verb()?;
    let attached = attach::attached(app);
    let ctids = match who {
        Who::One(ctid) => vec![ctid],
        Who::All => {
            let has_lines = |ctid: &u32| {
                containers::config(app.kernel, *ctid).is_some_and(|config| containers::has_nvidia(&config))
            };
            let all = containers::all(app.kernel).into_iter();
            all.filter(|ctid| attached.contains(ctid) || has_lines(ctid)).collect()
        }
    };
    let mut text = String::new();
    let mut off = Vec::new();
    for ctid in &ctids {
        let looked = Look { app, ctid: *ctid, config: &config, is_attached: attached.contains(ctid) }.facts();
        let facts = match looked {
            // The others are looked at all the same.
            Err(stop) if who == Who::All => vec![Fact::off("state", stop.message, "see its log")],
            looked => looked?,
        };
        let names: Vec<&str> = facts.iter().filter(|fact| fact.mend.is_some()).map(|fact| fact.name).collect();
        if !names.is_empty() {
            off.push(format!("container {ctid}: {}", names.join(", ")));
        }
        write_report(&mut text, *ctid, &facts);
    }
    if ctids.is_empty() {
        text.push_str("no container was given a GPU: gpu-handoff container setup CTID\n");
    }
    let well =
        if off.is_empty() { Ok(()) } else { Err(Stop::failed(format!("not as it should be: {}", off.join("; ")))) };
    Ok((text, well))
}

fn write_report(text: &mut String, ctid: u32, facts: &[Fact]) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "container {ctid}");
    for Fact { name, what, mend } in facts {
        let mend = mend.as_ref().map_or_else(String::new, |mend| format!(": {mend}"));
        let _ = writeln!(text, "  {name:<8}  {what}{mend}");
    }
}

struct Look<'a> {
    app: &'a App<'a>,
    ctid: u32,
    config: &'a Config,
    is_attached: bool,
}

impl Look<'_> {
    fn facts(&self) -> Result<Vec<Fact>> {
        let (app, kernel, ctid) = (self.app, self.app.kernel, self.ctid);
        let bytes = read(kernel, ctid)?;
        let theirs = Theirs::of(kernel, ct::parse_next(&bytes));
        let runs = containers::runs(kernel, ctid);
        let mut facts = vec![if self.is_attached {
            Fact::good("attached", "by this host")
        } else if theirs.has_nvidia() {
            Fact::good("attached", "not by gpu-handoff: its lines are somebody else's")
        } else {
            Fact::off("attached", "no", self.attach(&theirs))
        }];
        facts.extend(theirs.hook.iter().map(|hook| self.hook(hook)));
        facts.extend(twice(ctid, &theirs));
        facts.extend(self.lines(&theirs));
        if !runs {
            facts.extend(self.devices(&theirs));
        }
        facts.push(rules(&theirs, &theirs::known(kernel), &|| {
            let again = if runs { format!(", then pct reboot {ctid}") } else { String::new() };
            format!("{}{again}", self.attach(&theirs))
        }));
        if !runs {
            let starts =
                facts.iter().all(|fact| fact.mend.is_none() || fact.name == "rules" || fact.name == "attached");
            let how = if starts { format!(" (pct start {ctid})") } else { String::new() };
            facts.push(Fact::good("state", format!("stopped: what is inside shows only when it runs{how}")));
            return Ok(facts);
        }
        let package = self.config.cuda.package.as_deref().unwrap_or("cuda-toolkit");
        let seen = inside::look(kernel, ctid, &cuda::base(None), package)?;
        let host = nvidia::version_as_written(kernel);
        let live = inside::live_nodes(kernel);
        let given = theirs.nodes(kernel, &live);
        // Which GPUs it should have nobody knows then.
        let is_somebody_elses = !self.is_attached && !given.is_empty();
        let away = if is_somebody_elses { None } else { attach::away(app, ctid) };
        facts.push(nodes(ctid, &given, &seen, &stale(kernel, ctid), away));
        facts.push(self.driver(&theirs, &seen, host.as_deref()));
        facts.push(self.toolkit(&theirs, &seen, host.as_deref()));
        facts.extend(docker(ctid, &seen));
        Ok(facts)
    }

    /// How to attach it, or what keeps that from working now.
    fn attach(&self, theirs: &Theirs) -> String {
        self.or_why_not(theirs, "attach")
    }

    /// What is advised must be accepted when it is typed.
    fn or_why_not(&self, theirs: &Theirs, verb: &str) -> String {
        let (app, ctid) = (self.app, self.ctid);
        let gpus = self.gpus(theirs);
        let wish = Wish { gpus: gpus.clone(), style: None, dri: false };
        match attach::would(app, ctid, &wish) {
            Ok(()) => {
                let flags: String = gpus.iter().map(|slot| format!(" --gpu {slot}")).collect();
                format!("gpu-handoff container {verb} {ctid}{flags}")
            }
            Err(stop) => stop.message.replace(&format!("container {ctid} was not touched: "), ""),
        }
    }

    /// The GPUs to name where there are several: those whose nodes it has, or else the first that is at home.
    fn gpus(&self, theirs: &Theirs) -> Vec<String> {
        let kernel = self.app.kernel;
        let slots = nvidia_slots(kernel);
        if self.is_attached || slots.len() < 2 {
            return Vec::new();
        }
        let minor = |slot: &crate::gpu::Slot| nvidia::minor(kernel, &slot.gpu()?.address);
        let mut named: Vec<String> = Vec::new();
        for slot in &slots {
            let node = minor(slot).map(|minor| format!("/dev/nvidia{minor}"));
            let is_given = |node: &String| theirs.given.iter().any(|given| given.host == *node);
            named.extend(node.filter(is_given).map(|_| slot.address.clone()));
        }
        if named.is_empty() {
            named.extend(slots.iter().find(|slot| minor(slot).is_some()).map(|slot| slot.address.clone()));
        }
        named
    }

    fn hook(&self, hook: &str) -> Fact {
        let tools = ["/usr/bin/nvidia-container-cli", "/usr/local/bin/nvidia-container-cli"];
        if tools.iter().any(|tool| self.app.kernel.exists(tool)) {
            return Fact::good("hook", format!("LXC's own gives it the host's driver and nodes: {hook}"));
        }
        Fact::off(
            "hook",
            format!(
                "LXC's own ({hook}) calls nvidia-container-cli, which this host lacks: the container does not start"
            ),
            format!(
                "install libnvidia-container-tools from NVIDIA's repository, or take that line out of \
                 /etc/pve/lxc/{}.conf",
                self.ctid
            ),
        )
    }

    /// Lines that do not do what they seem to.
    fn lines(&self, theirs: &Theirs) -> Vec<Fact> {
        let ctid = self.ctid;
        let mut facts = Vec::new();
        let is_ours = |path: &str| path.starts_with("/dev/nvidia") || is_at_or_below(path, "/dev/dri");
        for given in theirs.given.iter().filter(|given| is_ours(&given.host)) {
            if let Some(problem) = attach::will_not_do(ctid, &theirs.config, given) {
                let (what, mend) = problem.rsplit_once(": ").unwrap_or((&problem, ""));
                facts.push(Fact::off("lines", what, mend));
            }
        }
        let ignored = |entry: &&str| {
            entry.starts_with("/dev/nvidia")
                && entry.split_whitespace().nth(1).is_some_and(|target| target.starts_with("/dev/"))
        };
        for entry in theirs.config.mount_entries().filter(ignored) {
            let what = format!("LXC ignores lxc.mount.entry: {entry}, because its target is absolute");
            facts.push(Fact::off("lines", what, self.attach(theirs)));
        }
        if let Some(why) = attach::refuses_dev(&theirs.config) {
            let devs = dev_keys(theirs);
            if !devs.is_empty() {
                facts.push(Fact::off(
                    "lines",
                    format!("{} and {why}", devs.join(" ")),
                    match self.is_attached {
                        true => format!("gpu-handoff container attach {ctid} --style mount"),
                        false => format!(
                            "pct set {ctid} --delete {}, then gpu-handoff container attach {ctid}",
                            devs.join(",")
                        ),
                    },
                ));
            }
        }
        facts
    }

    /// Devices without which Proxmox does not start it.
    fn devices(&self, theirs: &Theirs) -> Vec<Fact> {
        let (kernel, ctid) = (self.app.kernel, self.ctid);
        let makes: Vec<String> = containers::missing_nodes(kernel).into_iter().map(|node| node.path).collect();
        let devs = theirs.given.iter().filter(|given| given.way == Way::Dev && !kernel.exists(&given.inside));
        let (made, others): (Vec<_>, Vec<_>) = devs.partition(|given| makes.contains(&given.inside));
        let told = |list: &[&containers::Given]| {
            let each: Vec<String> =
                list.iter().map(|given| format!("{} is {}", theirs::key_of(&given.line), given.inside)).collect();
            format!("{}, which does not exist: it does not start", each.join(", "))
        };
        let mut facts = Vec::new();
        if !made.is_empty() {
            facts.push(Fact::off("devices", told(&made), "gpu-handoff reconcile"));
        }
        if !others.is_empty() {
            let keys: Vec<String> = others.iter().map(|given| theirs::key_of(&given.line)).collect();
            let delete = format!("pct set {ctid} --delete {}", keys.join(","));
            let away =
                attach::away(self.app, ctid).filter(|_| others.iter().any(|g| g.inside.starts_with("/dev/nvidia")));
            let mend = away.map_or_else(|| delete.clone(), |away| format!("{away}; or without it: {delete}"));
            facts.push(Fact::off("devices", told(&others), mend));
        }
        facts
    }

    fn driver(&self, theirs: &Theirs, seen: &Seen, host: Option<&str>) -> Fact {
        let ctid = self.ctid;
        let has_none = seen.libcuda.is_empty();
        let inside = seen.driver().filter(|_| !seen.is_installing);
        let what = match inside {
            _ if seen.is_installing => "its installation was interrupted".to_string(),
            None if has_none => "none".to_string(),
            None => "not all of it is there, or of more than one version".to_string(),
            Some(inside) => match host {
                None => return Fact::good("driver", format!("{inside}; that of the host is not loaded now")),
                Some(host) if host == inside => return Fact::good("driver", format!("{inside}, as on the host")),
                Some(host) => format!("{inside}, the host has {host}"),
            },
        };
        if theirs.hook.is_some() {
            return Fact::off("driver", what, format!("pct reboot {ctid}, which has LXC's own hook mount the host's"));
        }
        let Some(host) = host else {
            return Fact::off("driver", what, "once the host's driver is loaded: gpu-handoff container check again");
        };
        let alone = Wanted { driver: host.to_string(), cuda: Toolkit::None, repo: None };
        let todo = stages::stages(seen, &alone);
        let hurdle =
            stages::check(ctid, seen, &alone, &todo).and_then(|()| stages::check_space(ctid, seen, &todo, None));
        if let Err(why) = hurdle {
            return Fact::off("driver", what, why.replace(&format!("container {ctid} "), "it "));
        }
        let source = driver::source(self.app, &self.config.driver, host);
        let first = source
            .err()
            .map_or_else(String::new, |stop| format!("{}; then: ", stop.message.replace("; nothing was touched", "")));
        let mend = if inside.is_some() {
            format!("gpu-handoff container sync {ctid}")
        } else {
            self.setup(theirs, seen, host)
        };
        Fact::off("driver", what, format!("{first}{mend}"))
    }

    /// With CUDA where NVIDIA has it for that distribution and there is room for it, and where we attached it.
    fn setup(&self, theirs: &Theirs, seen: &Seen, host: &str) -> String {
        let best = match &self.config.cuda.package {
            Some(package) => Toolkit::Package(package.clone()),
            None => Toolkit::Best,
        };
        let wanted = Wanted { driver: host.to_string(), cuda: best, repo: self.config.cuda.repo.clone() };
        let works = wanted.settled(self.ctid, seen).and_then(|wanted| {
            stages::check_toolkit(&wanted)?;
            let todo: Vec<Stage> = stages::stages(seen, &wanted);
            stages::check(self.ctid, seen, &wanted, &todo)?;
            stages::check_space(self.ctid, seen, &todo, None)
        });
        let call = self.or_why_not(theirs, "setup");
        match works.is_ok() && self.is_attached || !call.starts_with("gpu-handoff") {
            true => call,
            false => format!("{call} --driver-only"),
        }
    }

    /// A container that uses the GPU without a toolkit is well, too.
    fn toolkit(&self, theirs: &Theirs, seen: &Seen, host: Option<&str>) -> Fact {
        let driver = host.and_then(|version| version.parse().ok());
        let package = match &self.config.cuda.package {
            Some(package) => package.clone(),
            None => {
                let there = seen.packages.keys().filter_map(|package| cuda::of_toolkit(package)).max();
                let best = || cuda::best_for(&seen.os.0, &seen.os.1, driver?).ok();
                match there.or_else(best) {
                    Some(release) => cuda::toolkit(release),
                    None => return Fact::good("cuda", "no cuda-toolkit"),
                }
            }
        };
        let setup = self.or_why_not(theirs, "setup");
        toolkit(seen, &package, driver, &setup)
    }
}

fn read(kernel: &dyn Kernel, ctid: u32) -> Result<Vec<u8>> {
    let path = format!("/etc/pve/lxc/{ctid}.conf");
    match kernel.read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Stop::failed(format!("{path}: {error}"))),
        Err(_) if kernel.exists(&format!("/etc/pve/qemu-server/{ctid}.conf")) => {
            Err(Stop::usage(format!("{ctid} is a VM, not a container")))
        }
        Err(_) => Err(Stop::usage(format!("there is no container {ctid} on this host (no {path})"))),
    }
}

fn dev_keys(theirs: &Theirs) -> Vec<String> {
    let devs = theirs.given.iter().filter(|given| given.way == Way::Dev);
    devs.map(|given| theirs::key_of(&given.line)).collect()
}

/// Proxmox makes the node of a `devN`, and the container does not start where there is one by then.
fn twice(ctid: u32, theirs: &Theirs) -> Option<Fact> {
    let pairs = theirs::twice(theirs);
    let each: Vec<String> = pairs.iter().map(|(path, dev, other)| format!("{path} by {dev} and by {other}")).collect();
    let devs: Vec<&str> = pairs.iter().map(|(_, dev, _)| dev.as_str()).collect();
    (!pairs.is_empty()).then(|| {
        let what = format!("{}: it does not start with that", each.join(", "));
        Fact::off("twice", what, format!("pct set {ctid} --delete {}", devs.join(",")))
    })
}

/// Whether the container may open the nodes that are mounted into it. For those of `devN` Proxmox sees to that, and an
/// unprivileged container may open whatever it can see.
fn rules(theirs: &Theirs, known: &[(String, DeviceNumber)], mend: &dyn Fn() -> String) -> Fact {
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
    Fact::off("rules", format!("none for {}{old}", missing.join(", ")), mend())
}

fn kind_of(path: &str) -> &'static str {
    [("/dev/nvidia-uvm", "nvidia-uvm"), ("/dev/nvidia-caps", "nvidia-caps"), ("/dev/dri", "dri")]
        .iter()
        .find(|(start, _)| path.starts_with(start))
        .map_or("nvidia", |(_, kind)| kind)
}

fn fixed_minor(path: &str) -> Option<u64> {
    match path.strip_prefix("/dev/nvidia")? {
        "ctl" => Some(CONTROL_MINOR),
        "-modeset" => Some(MODESET_MINOR),
        digits => digits.parse().ok(),
    }
}

/// `given` are those of the host's nodes that its configuration gives it; `away` says who has a GPU instead.
fn nodes(ctid: u32, given: &[String], seen: &Seen, stale: &[Stale], away: Option<String>) -> Fact {
    let mend = format!("pct reboot {ctid}");
    if !stale.is_empty() {
        let words = stale.iter().map(|Stale { path, inside, host }| match inside {
            Some(inside) => format!("{path} is {inside}, on the host {host}"),
            None => format!("{path} is missing"),
        });
        return Fact::off("nodes", words.collect::<Vec<_>>().join(", "), mend);
    }
    let closed: Vec<&str> = given.iter().filter(|node| !seen.has_node(node)).map(String::as_str).collect();
    if closed.is_empty() {
        let open = if given.is_empty() { "none on the host now".to_string() } else { given.join(" ") };
        return Fact::good("nodes", away.map_or_else(|| open.clone(), |away| format!("{open}; {away}")));
    }
    Fact::off("nodes", format!("{} cannot be opened", closed.join(" ")), mend)
}

fn docker(ctid: u32, seen: &Seen) -> Option<Fact> {
    seen.docker_sets_cgroups.then(|| {
        Fact::off(
            "docker",
            "NVIDIA's runtime in it sets up device cgroups, which fails in a container",
            format!("pct exec {ctid} -- nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"),
        )
    })
}

fn toolkit(seen: &Seen, package: &str, host: Option<Version>, setup: &str) -> Fact {
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
            assert_eq!(rules_of(&format!("{MOUNTS}{}", allow(enough))).mend, None, "{enough}");
        }
        let old = rules_of(&format!("{MOUNTS}{}{}", allow("c 195:* rwm"), allow("c 508:* rwm")));
        assert_eq!(old, Fact::off("rules", "none for nvidia-uvm 511", "type this"));
        assert_eq!(rules_of(MOUNTS).what, "none for nvidia 195, nvidia-uvm 511");
        assert_eq!(rules_of(&format!("{MOUNTS}unprivileged: 1\n")).mend, None);
        assert_eq!(rules_of("dev0: /dev/nvidia0\n").mend, None);
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
            (closed.what.as_str(), closed.mend.as_deref()),
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
        assert_eq!(of("").mend, None);
        let package = "package=cuda-toolkit-12-8 12.8.1-1 installed\n";
        assert_eq!(of(&format!("{package}nvcc=12.8\n")), Fact::good("cuda", "cuda-toolkit-12-8 12.8.1-1, nvcc 12.8"));
        assert!(of(package).what.contains("nvcc does not work"));
        let old =
            toolkit(&Seen::parse(&format!("{package}nvcc=12.8\n")), "cuda-toolkit-12-8", "470.1".parse().ok(), "x");
        assert!(old.mend.is_some_and(|mend| mend.contains("525.60.13")));
    }

    #[test]
    fn a_report_is_aligned_and_says_what_to_type() {
        let mut text = String::new();
        write_report(&mut text, 101, &[Fact::good("rules", "fine"), Fact::off("driver", "none", "type this")]);
        assert_eq!(text, "container 101\n  rules     fine\n  driver    none: type this\n");
    }
}
