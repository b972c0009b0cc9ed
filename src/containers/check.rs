//! Whether a container's driver, nodes and rules fit those of the host. Changes nothing.

use super::cuda::{self, Fit, Release};
use super::seen::Seen;
use super::setup::given_nodes;
use super::stale::{Stale, stale};
use super::{Who, attach, inside};
use crate::App;
use crate::gpu::nodes::NVIDIA_MAJOR;
use crate::gpu::nvidia::Version;
use crate::gpu::{containers, nvidia};
use crate::proxmox::ct::{self, CtConfig};
use crate::stop::{Result, Stop};
use crate::sys::Kernel;
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
        Who::All => attached.clone(),
    };
    let mut text = String::new();
    let mut off = Vec::new();
    for ctid in &ctids {
        let facts = facts(app, *ctid, &config.cuda.package, attached.contains(ctid))?;
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

fn facts(app: &App, ctid: u32, package: &str, is_attached: bool) -> Result<Vec<Fact>> {
    let kernel = &app.kernel;
    let config = read(kernel, ctid)?;
    let mut facts = vec![if is_attached {
        Fact::good("attached", "by this host")
    } else if given_nodes(&config).is_empty() {
        Fact::off("attached", "no", format!("gpu-handoff container attach {ctid}"))
    } else {
        Fact::good("attached", "not by gpu-handoff: its lines are somebody else's")
    }];
    facts.push(rules(ctid, &config, nvidia::major(kernel, "nvidia-uvm")));
    if !containers::runs(kernel, ctid) {
        facts.push(Fact::good("state", format!("stopped: what is inside shows only when it runs (pct start {ctid})")));
        return Ok(facts);
    }
    let seen = inside::look(kernel, ctid, &cuda::base(None), package)?;
    let host = nvidia::version_as_written(kernel);
    let live = inside::live_nodes(kernel);
    // Which GPUs it should have nobody knows then.
    let is_somebody_elses = !is_attached && given_nodes(&config).iter().any(|node| live.contains(node));
    let away = if is_somebody_elses { None } else { attach::away(app, ctid) };
    facts.push(nodes(ctid, &config, &seen, &stale(kernel, ctid), &live, away));
    facts.push(driver(ctid, &seen, host.as_deref()));
    facts.push(toolkit(ctid, &seen, package, host.and_then(|version| version.parse().ok())));
    Ok(facts)
}

fn read(kernel: &dyn Kernel, ctid: u32) -> Result<CtConfig> {
    let path = format!("/etc/pve/lxc/{ctid}.conf");
    match kernel.read(&path) {
        Ok(bytes) => Ok(ct::parse(&bytes)),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Stop::failed(format!("{path}: {error}"))),
        Err(_) if kernel.exists(&format!("/etc/pve/qemu-server/{ctid}.conf")) => {
            Err(Stop::usage(format!("{ctid} is a VM, not a container")))
        }
        Err(_) => Err(Stop::usage(format!("there is no container {ctid} on this host (no {path})"))),
    }
}

/// Whether the container may open the nodes that are mounted into it. For those of `devN` Proxmox sees to that, and an
/// unprivileged container may open whatever it can see.
fn rules(ctid: u32, config: &CtConfig, uvm: Option<u64>) -> Fact {
    let mounted: Vec<&str> = config.mount_entries().filter_map(|entry| entry.split_whitespace().next()).collect();
    let has = |stem: &str| mounted.iter().any(|path| path.starts_with(stem));
    if config.unprivileged || !has("/dev/nvidia") {
        return Fact::good("rules", "none needed");
    }
    let allows = |major: u64| {
        config.devices_allow().any(|rule| {
            let mut words = rule.split_whitespace();
            let kind = words.next();
            let number = words.next().and_then(|number| number.split(':').next()).unwrap_or_default();
            kind == Some("a") || (kind == Some("c") && (number == "*" || number.parse() == Ok(major)))
        })
    };
    let mut majors = vec![("nvidia", NVIDIA_MAJOR)];
    match uvm {
        Some(major) if has("/dev/nvidia-uvm") => majors.push(("nvidia-uvm", major)),
        _ => {}
    }
    let words = |majors: &[&(&str, u64)]| {
        majors.iter().map(|(name, major)| format!("{name} {major}")).collect::<Vec<_>>().join(", ")
    };
    let missing: Vec<_> = majors.iter().filter(|(_, major)| !allows(*major)).collect();
    if missing.is_empty() {
        return Fact::good("rules", format!("for {}", words(&majors.iter().collect::<Vec<_>>())));
    }
    Fact::off(
        "rules",
        format!("none for {}", words(&missing)),
        format!("gpu-handoff container sync {ctid}, then pct reboot {ctid}"),
    )
}

/// `live` are those that the host's driver has, `away` says who has a GPU instead.
fn nodes(ctid: u32, config: &CtConfig, seen: &Seen, stale: &[Stale], live: &[String], away: Option<String>) -> Fact {
    let mend = format!("pct reboot {ctid}");
    if !stale.is_empty() {
        let words = stale.iter().map(|Stale { path, inside, host }| match inside {
            Some(inside) => format!("{path} is {inside}, on the host {host}"),
            None => format!("{path} is missing"),
        });
        return Fact::off("nodes", words.collect::<Vec<_>>().join(", "), mend);
    }
    let given: Vec<String> = given_nodes(config).into_iter().filter(|node| live.contains(node)).collect();
    let closed: Vec<&str> = given.iter().filter(|node| !seen.has_node(node)).map(String::as_str).collect();
    if closed.is_empty() {
        let open = if given.is_empty() { "none on the host now".to_string() } else { given.join(" ") };
        return Fact::good("nodes", away.map_or_else(|| open.clone(), |away| format!("{open}; {away}")));
    }
    Fact::off("nodes", format!("{} cannot be opened", closed.join(" ")), mend)
}

fn driver(ctid: u32, seen: &Seen, host: Option<&str>) -> Fact {
    let setup = format!("gpu-handoff container setup {ctid}");
    if seen.is_installing {
        return Fact::off("driver", "its installation was interrupted", setup);
    }
    let Some(inside) = seen.driver() else {
        let what = if seen.libcuda.is_empty() { "none" } else { "not all of it is there, or of more than one version" };
        return Fact::off("driver", what, setup);
    };
    match host {
        None => Fact::good("driver", format!("{inside}; that of the host is not loaded now")),
        Some(host) if host == inside => Fact::good("driver", format!("{inside}, as on the host")),
        Some(host) => {
            Fact::off("driver", format!("{inside}, the host has {host}"), format!("gpu-handoff container sync {ctid}"))
        }
    }
}

/// A container that uses the GPU without a toolkit is well, too.
fn toolkit(ctid: u32, seen: &Seen, package: &str, host: Option<Version>) -> Fact {
    let Some(version) = seen.packages.get(package) else {
        return Fact::good("cuda", format!("no {package} (gpu-handoff container setup {ctid} installs it)"));
    };
    let setup = format!("gpu-handoff container setup {ctid}");
    if cuda::has_compiler(package) && seen.nvcc.is_none() {
        return Fact::off("cuda", format!("{package} {version}, but nvcc does not work"), setup);
    }
    let nvcc = seen.nvcc.as_ref().map_or_else(String::new, |release| format!(", nvcc {release}"));
    let what = format!("{package} {version}{nvcc}");
    let fit = Release::of_package(package).zip(host).map(|(release, driver)| cuda::fit(release, driver));
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

    fn rules_of(text: &str) -> Fact {
        rules(101, &ct::parse(text.as_bytes()), Some(511))
    }

    #[test]
    fn rules_are_held_against_the_majors_of_now() {
        let allow = |rule: &str| format!("lxc.cgroup2.devices.allow: {rule}\n");
        let both = format!("{}{}", allow("c 195:* rwm"), allow("c 511:* rwm"));
        assert_eq!(rules_of(&format!("{MOUNTS}{both}")), Fact::good("rules", "for nvidia 195, nvidia-uvm 511"));
        for enough in ["a", "c *:* rwm"] {
            assert_eq!(rules_of(&format!("{MOUNTS}{}", allow(enough))).mend, None, "{enough}");
        }
        let old = rules_of(&format!("{MOUNTS}{}{}", allow("c 195:* rwm"), allow("c 508:* rwm")));
        assert_eq!((old.what.as_str(), old.mend.is_some()), ("none for nvidia-uvm 511", true));
        assert_eq!(rules_of(MOUNTS).what, "none for nvidia 195, nvidia-uvm 511");
        assert_eq!(rules_of(&format!("{MOUNTS}unprivileged: 1\n")).mend, None);
        assert_eq!(rules_of("dev0: /dev/nvidia0\n").mend, None);
        let major = rules(101, &ct::parse(format!("{MOUNTS}{}", allow("c 195:* rwm")).as_bytes()), None);
        assert_eq!(major.what, "for nvidia 195");
    }

    #[test]
    fn drivers_are_compared_as_written() {
        let seen = |version: &str| Seen::parse(&format!("libcuda={version}\nlibnvidia-ml={version}\nsmi=yes\n"));
        let host = Some("580.95.05");
        assert_eq!(driver(101, &seen("580.95.05"), host), Fact::good("driver", "580.95.05, as on the host"));
        let other = driver(101, &seen("570.86.16"), host);
        assert_eq!(other.what, "570.86.16, the host has 580.95.05");
        assert_eq!(other.mend.as_deref(), Some("gpu-handoff container sync 101"));
        assert_eq!(driver(101, &seen("580.95.05"), None).mend, None);
        assert_eq!(driver(101, &Seen::default(), host).what, "none");
        assert!(driver(101, &Seen::parse("installing=yes"), host).what.contains("interrupted"));
        assert!(driver(101, &Seen::parse("libcuda=1.1\nlibcuda=1.2"), host).what.starts_with("not all"));
    }

    #[test]
    fn nodes_must_open_and_be_the_hosts() {
        let config = ct::parse(MOUNTS.as_bytes());
        let good = Seen::parse("node=/dev/nvidia0\nnode=/dev/nvidia-uvm\n");
        let live = ["/dev/nvidia0", "/dev/nvidia-uvm"].map(str::to_string);
        assert_eq!(nodes(101, &config, &good, &[], &live, None), Fact::good("nodes", "/dev/nvidia-uvm /dev/nvidia0"));
        let closed = nodes(101, &config, &Seen::parse("node=/dev/nvidia0\n"), &[], &live, None);
        assert_eq!(
            (closed.what.as_str(), closed.mend.as_deref()),
            ("/dev/nvidia-uvm cannot be opened", Some("pct reboot 101"))
        );
        assert_eq!(nodes(101, &config, &Seen::default(), &[], &[], None).what, "none on the host now");
        let away = nodes(101, &config, &Seen::parse("node=/dev/nvidia-uvm\n"), &[], &live[1..], Some("who".into()));
        assert_eq!(away, Fact::good("nodes", "/dev/nvidia-uvm; who"));
        let number = |major| DeviceNumber { major, minor: 0 };
        let old = Stale { path: "/dev/nvidia-uvm".into(), inside: Some(number(508)), host: number(511) };
        let stale = nodes(101, &config, &good, &[old], &live, None);
        assert_eq!(stale.what, "/dev/nvidia-uvm is 508:0, on the host 511:0");
    }

    #[test]
    fn a_toolkit_is_no_duty_but_must_work() {
        let of = |text: &str| toolkit(101, &Seen::parse(text), "cuda-toolkit-12-8", "580.95.05".parse().ok());
        assert_eq!(of("").mend, None);
        let package = "package=cuda-toolkit-12-8 12.8.1-1 installed\n";
        assert_eq!(of(&format!("{package}nvcc=12.8\n")), Fact::good("cuda", "cuda-toolkit-12-8 12.8.1-1, nvcc 12.8"));
        assert!(of(package).what.contains("nvcc does not work"));
        let old =
            toolkit(101, &Seen::parse(&format!("{package}nvcc=12.8\n")), "cuda-toolkit-12-8", "470.1".parse().ok());
        assert!(old.mend.is_some_and(|mend| mend.contains("525.60.13")));
    }

    #[test]
    fn a_report_is_aligned_and_says_what_to_type() {
        let mut text = String::new();
        write_report(&mut text, 101, &[Fact::good("rules", "fine"), Fact::off("driver", "none", "type this")]);
        assert_eq!(text, "container 101\n  rules     fine\n  driver    none: type this\n");
    }
}
