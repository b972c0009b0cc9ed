//! Whether a container's driver, nodes and rules fit those of the host. Changes nothing.

use super::attaching::Attaching;
use super::cuda;
use super::host;
use super::judge::{dev_keys, docker, nodes, rules, toolkit, twice, write_report};
use super::seen::Seen;
use super::stages::{self, Stage, Toolkit, Wanted};
use super::stale::stale;
use super::theirs::{self, Theirs};
use super::{Who, Wish, attach, inside, wanted};
use crate::App;
use crate::address::SlotId;
use crate::config::Config;
use crate::driver;
use crate::exit::{Exit, Result};
use crate::gpu::containers::{self, Way, is_at_or_below};
use crate::gpu::inventory::nvidia_slots;
use crate::gpu::nvidia::{self};
use crate::proxmox::ct;
use crate::sys::Kernel;
use std::io::ErrorKind;

pub use super::judge::Fact;

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
            Err(exit) if who == Who::All => vec![Fact::off("state", exit.to_string(), "see its log")],
            looked => looked?,
        };
        let names: Vec<&str> = facts.iter().filter(|fact| fact.remedy.is_some()).map(|fact| fact.name).collect();
        if !names.is_empty() {
            off.push(format!("container {ctid}: {}", names.join(", ")));
        }
        write_report(&mut text, *ctid, &facts);
    }
    if ctids.is_empty() {
        text.push_str("no container was given a GPU: gpu-handoff container setup CTID\n");
    }
    let well =
        if off.is_empty() { Ok(()) } else { Err(Exit::failed(format!("not as it should be: {}", off.join("; ")))) };
    Ok((text, well))
}

/// What is true of one container.
///
/// # Errors
/// When nothing can be told of it.
pub fn facts(app: &App, config: &Config, ctid: u32, is_attached: bool) -> Result<Vec<Fact>> {
    Look { app, ctid, config, is_attached }.facts()
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
        facts.extend(containers::nvidia_hook_line(&theirs.config).map(|(key, value)| self.hook(key, value)));
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
                facts.iter().all(|fact| fact.remedy.is_none() || fact.name == "rules" || fact.name == "attached");
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
        let away = if is_somebody_elses { None } else { host::away(app, ctid) };
        facts.push(nodes(ctid, &given, &seen, &stale(kernel, ctid), away));
        facts.push(self.driver(&theirs, &seen, host.as_deref()));
        facts.push(self.toolkit(&theirs, &seen, host.as_deref()));
        facts.extend(docker(ctid, &seen));
        Ok(facts)
    }

    /// How to attach it, or what keeps that from working now.
    fn attach(&self, theirs: &Theirs) -> String {
        self.or_why_not(theirs, "attach").unwrap_or_else(|why| why)
    }

    /// What is advised must be accepted when it is typed.
    fn or_why_not(&self, theirs: &Theirs, verb: &str) -> std::result::Result<String, String> {
        let (app, ctid) = (self.app, self.ctid);
        let gpus = self.gpus(theirs);
        let wish = Wish { gpus: gpus.clone(), style: None, dri: false };
        match Attaching::read(app, ctid, &wish) {
            Ok(_) => {
                let flags: String = gpus.iter().map(|slot| format!(" --gpu {slot}")).collect();
                Ok(format!("gpu-handoff container {verb} {ctid}{flags}"))
            }
            Err(exit) => Err(exit.trouble.untitled().to_string()),
        }
    }

    /// The GPUs to name where there are several: those whose nodes it has, or else the first that is at home.
    fn gpus(&self, theirs: &Theirs) -> Vec<SlotId> {
        let kernel = self.app.kernel;
        let slots = nvidia_slots(kernel);
        if self.is_attached || slots.len() < 2 {
            return Vec::new();
        }
        let minor = |slot: &crate::gpu::Slot| nvidia::minor(kernel, slot.gpu()?.address);
        let mut named: Vec<SlotId> = Vec::new();
        for slot in &slots {
            let node = minor(slot).map(|minor| format!("/dev/nvidia{minor}"));
            let is_given = |node: &String| theirs.given.iter().any(|given| given.host == *node);
            named.extend(node.filter(is_given).map(|_| slot.id));
        }
        if named.is_empty() {
            named.extend(slots.iter().find(|slot| minor(slot).is_some()).map(|slot| slot.id));
        }
        named
    }

    fn hook(&self, key: &str, value: &str) -> Fact {
        let hook = format!("{key}: {value}");
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
        .at(value.split_whitespace().next().map(str::to_string))
    }

    /// Lines that do not do what they seem to.
    fn lines(&self, theirs: &Theirs) -> Vec<Fact> {
        let ctid = self.ctid;
        let mut facts = Vec::new();
        let is_ours = |path: &str| path.starts_with("/dev/nvidia") || is_at_or_below(path, "/dev/dri");
        for given in theirs.given.iter().filter(|given| is_ours(&given.host)) {
            if let Some(problem) = wanted::will_not_do(ctid, &theirs.config, given) {
                let at = [given.key.clone(), given.host.clone()];
                facts.push(Fact::off("lines", problem.what.as_str(), problem.remedy.as_str()).at(at));
            }
        }
        let ignored = |entry: &&str| {
            entry.starts_with("/dev/nvidia")
                && entry.split_whitespace().nth(1).is_some_and(|target| target.starts_with("/dev/"))
        };
        for entry in theirs.config.mount_entries().filter(ignored) {
            let what = format!("LXC ignores lxc.mount.entry: {entry}, because its target is absolute");
            let source = entry.split_whitespace().next().map(str::to_string);
            facts.push(Fact::off("lines", what, self.attach(theirs)).at(source));
        }
        if let Some(why) = wanted::refuses_dev(&theirs.config) {
            let devs = dev_keys(theirs);
            if !devs.is_empty() {
                let what = format!("{} and {why}", devs.join(" "));
                let remedy = match self.is_attached {
                    true => format!("gpu-handoff container attach {ctid} --style mount"),
                    false => {
                        format!("pct set {ctid} --delete {}, then gpu-handoff container attach {ctid}", devs.join(","))
                    }
                };
                facts.push(Fact::off("lines", what, remedy).at(devs));
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
            let each: Vec<String> = list.iter().map(|given| format!("{} is {}", given.key, given.inside)).collect();
            format!("{}, which does not exist: it does not start", each.join(", "))
        };
        let at = |list: &[&containers::Given]| {
            list.iter().flat_map(|given| [given.key.clone(), given.inside.clone()]).collect::<Vec<_>>()
        };
        let mut facts = Vec::new();
        if !made.is_empty() {
            facts.push(Fact::off("devices", told(&made), "gpu-handoff reconcile").at(at(&made)));
        }
        if !others.is_empty() {
            let keys: Vec<String> = others.iter().map(|given| given.key.clone()).collect();
            let delete = format!("pct set {ctid} --delete {}", keys.join(","));
            let away =
                host::away(self.app, ctid).filter(|_| others.iter().any(|g| g.inside.starts_with("/dev/nvidia")));
            let remedy = away.map_or_else(|| delete.clone(), |away| format!("{away}; or without it: {delete}"));
            facts.push(Fact::off("devices", told(&others), remedy).at(at(&others)));
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
        let first = source.err().map_or_else(String::new, |exit| format!("{}; then: ", exit.trouble.what));
        let remedy = if inside.is_some() {
            format!("gpu-handoff container sync {ctid}")
        } else {
            self.setup(theirs, seen, host)
        };
        Fact::off("driver", what, format!("{first}{remedy}"))
    }

    /// With CUDA where NVIDIA has it for that distribution and there is room for it, and where we attached it.
    fn setup(&self, theirs: &Theirs, seen: &Seen, host: &str) -> String {
        let best = match &self.config.cuda.package {
            Some(package) => Toolkit::Package(package.clone()),
            None => Toolkit::Best,
        };
        let wanted = Wanted { driver: host.to_string(), cuda: best, repo: self.config.cuda.repo.clone() };
        let works = wanted.with_toolkit(self.ctid, seen).and_then(|wanted| {
            stages::check_toolkit(&wanted).map_err(|unfit| unfit.to_string())?;
            let todo: Vec<Stage> = stages::stages(seen, &wanted);
            stages::check(self.ctid, seen, &wanted, &todo)?;
            stages::check_space(self.ctid, seen, &todo, None)
        });
        match self.or_why_not(theirs, "setup") {
            Ok(call) if works.is_ok() && self.is_attached => call,
            Ok(call) => format!("{call} --driver-only"),
            Err(why) => why,
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
        let setup = self.or_why_not(theirs, "setup").unwrap_or_else(|why| why);
        toolkit(seen, &package, driver, &setup)
    }
}

fn read(kernel: &dyn Kernel, ctid: u32) -> Result<Vec<u8>> {
    let path = format!("/etc/pve/lxc/{ctid}.conf");
    match kernel.read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Exit::failed(format!("{path}: {error}"))),
        Err(_) if kernel.exists(&format!("/etc/pve/qemu-server/{ctid}.conf")) => {
            Err(Exit::usage(format!("{ctid} is a VM, not a container")))
        }
        Err(_) => Err(Exit::usage(format!("there is no container {ctid} on this host (no {path})"))),
    }
}
