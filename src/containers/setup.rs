//! Installs the host's version of the driver, and CUDA, in a container.
//!
//! What there is to do is found by looking, each time: so a second run finds nothing, and one after an interruption
//! goes on where that came. Nothing is changed in a container before it is known that it can be set up.

use super::attaching::Attaching;
use super::index::{Index, Room};
use super::inside::{self, Inside, PCT};
use super::seen::Seen;
use super::stages::{self, Stage, Toolkit, Wanted};
use super::theirs::Theirs;
use super::{Wish, cuda};
use crate::App;
use crate::config::Config;
use crate::driver::{self, Installer, Source};
use crate::exit::{Exit, Result};
use crate::gpu::nodes::{self, UVM};
use crate::gpu::{containers, nvidia};
use crate::proxmox::ct;
use crate::sorted;
use crate::story::row;
use crate::sys::{Lock, Share, heed_termination};
use std::time::Duration;

/// Unpacking, copying, `ldconfig`: some minutes on an ordinary disk.
const DRIVER: Duration = Duration::from_secs(30 * 60);
/// Some gigabytes over a slow line. apt itself gives up when nothing comes.
const TOOLKIT: Duration = Duration::from_secs(3 * 3600);
const PACKAGES: Duration = Duration::from_secs(15 * 60);
const CLEANING: Duration = Duration::from_secs(5 * 60);

/// From its start until a container has its nodes and can be looked into.
const READY: Duration = Duration::from_secs(60);

/// Where `/var/tmp/gpu-handoff` is in a container: see `scripts/clean.sh`.
const ROOM: &str = "/var/tmp/gpu-handoff";

/// One thing to do; a dry run prints the list, a run carries it out.
enum Task {
    Start,
    Attach(Attaching),
    /// So that it gets the device nodes.
    Restart,
    Install(Stage),
}

/// # Errors
/// What did not work; the next call goes on from there.
pub fn setup(app: &App, ctid: u32, wish: &Wish, driver_only: bool) -> Result<()> {
    begin(app);
    let config = app.config_for_verb()?;
    // Whatever refuses comes first.
    Attaching::read(app, ctid, wish)?;
    let wanted = wanted(app, &config, !driver_only)?;
    let source = driver::source(app, &config.driver, &wanted.driver);
    let _turn = take_turn(app, ctid)?;
    let inside = Inside::new(app, ctid)?;

    let was_running = containers::runs(app.kernel, ctid);
    if !was_running {
        // Somebody else may have been quicker.
        inside.start().or_else(|exit| if containers::runs(app.kernel, ctid) { Ok(()) } else { Err(exit) })?;
    }
    // Just after a start it may not answer yet.
    let seen = if was_running { look(app, ctid, &wanted) } else { until_ready(app, || look(app, ctid, &wanted)) };
    let checked = seen.and_then(|seen| {
        let (wanted, todo) = possible(app, ctid, &seen, &wanted, &source)?;
        let (wanted, todo, room) = looked_up(&inside, &seen, &wanted, todo)?;
        if let Some(sizes) = stages::sizes(&seen, &todo, room) {
            inside.teller.say(&format!("takes up to {sizes}"));
        }
        let fetched = fetch(&inside, &config, &wanted, &source, &todo)?;
        let tasks = tasks(app, ctid, Attaching::read(app, ctid, wish)?, &seen, todo)?;
        Ok((wanted, tasks, fetched))
    });
    let (wanted, tasks, fetched) = match checked {
        Ok(checked) => checked,
        Err(exit) if !was_running => {
            // As it was found.
            if let Err(more) = inside.shut_down("as it was") {
                app.story.warn(&more.to_string());
            }
            return Err(exit);
        }
        Err(exit) => return Err(exit),
    };
    let is_done = !tasks.iter().any(|task| matches!(task, Task::Install(_)));
    for task in tasks {
        task.carry_out(&inside, &wanted, &fetched)?;
    }
    fetched.forget(app);
    verify(app, ctid, &wanted)?;
    let nothing = if is_done { "; nothing was to be done" } else { "" };
    inside.teller.say(&format!("has driver {}{}{nothing}", wanted.driver, and_cuda(&wanted)));
    Ok(())
}

/// What [`setup`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, ctid: u32, wish: &Wish, driver_only: bool) -> Result<String> {
    let config = app.config_for_verb()?;
    let attaching = Attaching::read(app, ctid, wish)?;
    attaching.warn(app);
    let title = attaching.title();
    let wanted = wanted(app, &config, !driver_only)?;
    let source = driver::source(app, &config.driver, &wanted.driver);
    let mut text = String::new();
    if containers::runs(app.kernel, ctid) {
        let seen = look(app, ctid, &wanted)?;
        let (_, todo) = possible(app, ctid, &seen, &wanted, &source)?;
        has_room(ctid, &seen, &todo, None)?;
        let sizes = stages::sizes(&seen, &todo, None).map(|sizes| format!("  {}\n", row("take", &sizes)));
        text.extend(tasks(app, ctid, attaching, &seen, todo)?.iter().map(|task| task.to_text(ctid)));
        text.extend(sizes);
    } else {
        text.extend([Task::Attach(attaching), Task::Start].map(|task| task.to_text(ctid)));
        if let Err(exit) = source {
            text.push_str(&format!(
                "  {}\n",
                row("refuse", &format_args!("if it has no driver {}: {exit}", wanted.driver))
            ));
        }
        // Which one is known when it can be looked into.
        let cuda = match &wanted.cuda {
            Toolkit::Best => Toolkit::Package(format!("the CUDA toolkit that fits driver {}", wanted.driver)),
            known => known.clone(),
        };
        let all = stages::stages(&Seen::default(), &Wanted { cuda, ..wanted.clone() });
        text.extend(all.iter().map(|stage| format!("  {stage}, if it is not there\n")));
    }
    Ok(title + if text.is_empty() { "  nothing to do\n" } else { &text })
}

/// For a container that runs.
fn tasks(app: &App, ctid: u32, attaching: Attaching, seen: &Seen, todo: Vec<Stage>) -> Result<Vec<Task>> {
    let lacks = nodes(app, ctid)?.iter().any(|node| !seen.has_node(node));
    let restart = (lacks || attaching.adds_node()).then_some(Task::Restart);
    let install = todo.into_iter().map(Task::Install);
    Ok([Task::Attach(attaching)].into_iter().chain(restart).chain(install).collect())
}

impl Task {
    fn to_text(&self, ctid: u32) -> String {
        match self {
            Task::Start => {
                format!("  {}\n", row("start", &format_args!("container {ctid}, and again with the device nodes")))
            }
            Task::Attach(attaching) => attaching.lines(),
            Task::Restart => {
                format!("  {}\n", row("restart", &format_args!("container {ctid}, so that it gets the device nodes")))
            }
            Task::Install(stage) => format!("  {stage}\n"),
        }
    }

    fn carry_out(self, inside: &Inside, wanted: &Wanted, fetched: &Fetched) -> Result<()> {
        match self {
            Task::Start => inside.start(),
            Task::Attach(attaching) => attaching.carry_out(inside.teller.app),
            Task::Restart => {
                let (app, ctid) = (inside.teller.app, inside.ctid);
                let (seen, nodes) = (look(app, ctid, wanted)?, nodes(app, ctid)?);
                // What was made meanwhile may be another GPU's.
                if nodes.iter().all(|node| seen.has_node(node)) {
                    return Ok(());
                }
                inside.restart("so that it gets the device nodes")?;
                await_nodes(app, ctid, wanted, &nodes)
            }
            Task::Install(stage) => install(inside, wanted, fetched, &stage),
        }
    }
}

pub(super) fn begin(app: &App) {
    heed_termination();
    // Nothing here leaves a GPU half-way.
    app.kernel.end_with_this_run();
}

/// What the host has, and what is to be installed beside it. For a sync only the driver.
pub(super) fn wanted(app: &App, config: &Config, with_cuda: bool) -> Result<Wanted> {
    let driver = nvidia::version_as_written(app.kernel).ok_or_else(|| {
        let records = app.store.each_record().into_iter().flatten();
        let owner = records.map(|record| record.owner).next();
        let why = owner.map_or_else(String::new, |owner| format!(" (the GPU is with {owner})"));
        Exit::refused(format!(
            "the host's NVIDIA driver is not loaded{why}, so its version is not known; nothing was touched"
        ))
    })?;
    let cuda = match &config.cuda.package {
        _ if !with_cuda => Toolkit::None,
        Some(package) => Toolkit::Package(package.clone()),
        None => Toolkit::Best,
    };
    let wanted = Wanted { driver, cuda, repo: config.cuda.repo.clone() };
    match stages::check_toolkit(&wanted) {
        Ok(warning) => warning.iter().for_each(|text| app.story.warn(text)),
        Err(cuda::Unfit::Driver(why)) => return Err(Exit::refused(why)),
        Err(cuda::Unfit::Named(why)) => return Err(Exit::usage(why)),
    }
    Ok(wanted)
}

/// What is to be done, if it can be, and with which toolkit.
fn possible(
    app: &App,
    ctid: u32,
    seen: &Seen,
    wanted: &Wanted,
    source: &Result<Source>,
) -> Result<(Wanted, Vec<Stage>)> {
    let refuse = |why: String| Exit::refused(format!("{why}; nothing was touched"));
    stages::check_distribution(ctid, seen, wanted)
        .or_else(|why| if seen.has_musl { Ok(()) } else { Err(why) })
        .map_err(refuse)?;
    let wanted = match seen.has_musl {
        // That is what is told then.
        true => Wanted { cuda: Toolkit::None, ..wanted.clone() },
        false => wanted.with_toolkit(ctid, seen).map_err(refuse)?,
    };
    let todo = stages::stages(seen, &wanted);
    stages::check(ctid, seen, &wanted, &todo).map_err(refuse)?;
    if todo.iter().any(|stage| matches!(stage, Stage::Driver { .. })) {
        if let Some(hook) = hook(app, ctid) {
            return Err(refuse(format!(
                "container {ctid} gets the host's driver by LXC's own hook, and another cannot be installed over it; take \
                 this line out of /etc/pve/lxc/{ctid}.conf, or leave the driver to it: {hook}"
            )));
        }
        source.clone()?;
    }
    Ok((wanted, todo))
}

pub(super) fn hook(app: &App, ctid: u32) -> Option<String> {
    containers::config(app.kernel, ctid).and_then(|config| containers::nvidia_hook(&config))
}

/// What the repository has, by its index: whether the toolkit is there, or which one is that fits; and how large it is.
/// Before anything is changed inside, where apt would find out much later.
fn looked_up(
    inside: &Inside,
    seen: &Seen,
    wanted: &Wanted,
    todo: Vec<Stage>,
) -> Result<(Wanted, Vec<Stage>, Option<Room>)> {
    let (app, ctid) = (inside.teller.app, inside.ctid);
    let url = cuda::repository(wanted.repo.as_deref(), &seen.os.0, &seen.os.1);
    let is_installed = !todo.iter().any(|stage| matches!(stage, Stage::Toolkit { .. }));
    let (Some(package), Some(url)) = (wanted.package(), url.filter(|_| !is_installed)) else {
        has_room(ctid, seen, &todo, None)?;
        return Ok((wanted.clone(), todo, None));
    };
    let here = format!("{}/container-{ctid}-Packages", driver::CACHE);
    let _ = app.kernel.remove_file(&here);
    driver::download(app, &format!("{url}Packages"), &here, &inside.teller)?;
    let text = app.kernel.read(&here).map_err(|error| Exit::failed(format!("{here}: {error}")));
    let _ = app.kernel.remove_file(&here);
    let text = String::from_utf8_lossy(&text?).into_owned();
    let index = Index::parse(&text);
    if index.is_empty() {
        return Err(Exit::failed(format!("{url}Packages is no index of a repository; nothing was touched")));
    }
    let mut wanted = wanted.clone();
    if !index.has(package) {
        // What was said in the configuration is meant.
        let driver =
            wanted.driver.parse().ok().filter(|_| app.config_for_verb().is_ok_and(|c| c.cuda.package.is_none()));
        let other = driver.and_then(|driver| cuda::best(driver, &|release| index.has(&cuda::toolkit(release))));
        let Some(other) = other else {
            let mut there: Vec<cuda::Release> = index.names().filter_map(cuda::of_toolkit).collect();
            sorted::sort(&mut there);
            let there: Vec<String> = there.into_iter().map(cuda::toolkit).collect();
            return Err(Exit::refused(format!(
                "container {ctid}: {url} has no {package}; it has {}; name one of these in cuda.package (driver {}), or the \
                 driver alone: gpu-handoff container setup {ctid} --driver-only; nothing was touched",
                if there.is_empty() { "no cuda-toolkit".to_string() } else { there.join(" ") },
                wanted.driver
            )));
        };
        wanted.cuda = Toolkit::Package(cuda::toolkit(other));
    }
    if let Some(warning) = stages::check_toolkit(&wanted).map_err(|unfit| Exit::refused(unfit.to_string()))? {
        app.story.warn(&format!("container {ctid}: {warning}"));
    }
    let todo = stages::stages(seen, &wanted);
    let room = wanted.package().map(|package| index.room(package));
    has_room(ctid, seen, &todo, room)?;
    Ok((wanted, todo, room))
}

fn has_room(ctid: u32, seen: &Seen, todo: &[Stage], toolkit: Option<Room>) -> Result<()> {
    stages::check_space(ctid, seen, todo, toolkit).map_err(|why| Exit::refused(format!("{why}; nothing was touched")))
}

/// One setup of a container at a time; an installation is not ended by somebody who is in a hurry.
pub(super) fn take_turn(app: &App, ctid: u32) -> Result<Lock> {
    let path = format!("/run/gpu-handoff/container-{ctid}.lock");
    match app.kernel.lock(&path, Share::Alone, Duration::ZERO) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(Exit::locked(format!("container {ctid} is being set up by another run"))),
        Err(error) => Err(Exit::failed(format!("{path}: {error}"))),
    }
}

/// What comes from elsewhere, as paths on this host.
#[derive(Default)]
pub(super) struct Fetched {
    installer: Option<Installer>,
    keyring: Option<String>,
}

/// Brought here before anything is changed inside: without a network all stays as it is.
pub(super) fn fetch(
    inside: &Inside,
    config: &Config,
    wanted: &Wanted,
    source: &Result<Source>,
    todo: &[Stage],
) -> Result<Fetched> {
    let app = inside.teller.app;
    let mut fetched = Fetched::default();
    for stage in todo {
        match stage {
            Stage::Driver { .. } => {
                let source = source.as_ref().map_err(Clone::clone)?;
                fetched.installer = Some(driver::fetch(app, source, &config.driver, &wanted.driver, &inside.teller)?);
            }
            Stage::Repository { url } => {
                let here = format!("{}/container-{}-{}", driver::CACHE, inside.ctid, cuda::KEYRING);
                // Another address may have another one.
                let _ = app.kernel.remove_file(&here);
                driver::download(app, &format!("{url}{}", cuda::KEYRING), &here, &inside.teller)?;
                fetched.keyring = Some(here);
            }
            Stage::Clean | Stage::Repair | Stage::Toolkit { .. } => {}
        }
    }
    Ok(fetched)
}

impl Fetched {
    /// What the next call would have to fetch anew anyway.
    pub(super) fn forget(&self, app: &App) {
        if let Some(keyring) = &self.keyring {
            let _ = app.kernel.remove_file(keyring);
        }
    }
}

/// And a look whether it is so.
pub(super) fn install(inside: &Inside, wanted: &Wanted, fetched: &Fetched, stage: &Stage) -> Result<()> {
    do_stage(inside, fetched, stage)?;
    let seen = look(inside.teller.app, inside.ctid, wanted)?;
    if stage.is_done(&seen) {
        return Ok(());
    }
    let log = &inside.teller.log_path;
    Err(Exit::failed(format!(
        "container {}: every command for it succeeded, but this is not done: {stage} (log: {log})",
        inside.ctid
    )))
}

fn do_stage(inside: &Inside, fetched: &Fetched, stage: &Stage) -> Result<()> {
    match stage {
        Stage::Clean => {
            inside.inside("removing what an interrupted run left", include_str!("scripts/clean.sh"), &[], CLEANING)
        }
        Stage::Driver { version, .. } => {
            let Some(installer) = &fetched.installer else { return Ok(()) };
            inside.make_room()?;
            inside.push(&installer.path, &format!("{ROOM}/{}", installer.name))?;
            let mut line = vec![installer.name.as_str(), &installer.sha256, version];
            let flags = driver::flags::container(version);
            line.extend(flags.iter().map(String::as_str));
            let what = format!("installing driver {version}");
            inside.inside(&what, include_str!("scripts/driver.sh"), &line, DRIVER)
        }
        Stage::Repair => {
            let what = "ending what an interrupted dpkg was at";
            inside.inside(what, include_str!("scripts/repair.sh"), &[], PACKAGES)
        }
        Stage::Repository { url } => {
            let Some(keyring) = &fetched.keyring else { return Ok(()) };
            inside.make_room()?;
            inside.push(keyring, &format!("{ROOM}/{}", cuda::KEYRING))?;
            let what = "adding the CUDA repository";
            inside.inside(what, include_str!("scripts/repository.sh"), &[cuda::KEYRING, url], PACKAGES)
        }
        Stage::Toolkit { package } => {
            let what = format!("installing {package}");
            inside.inside(&what, include_str!("scripts/toolkit.sh"), &[package], TOOLKIT)
        }
    }
}

pub(super) fn verify(app: &App, ctid: u32, wanted: &Wanted) -> Result<()> {
    let line = ["exec", &ctid.to_string(), "--", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"];
    let said = app.kernel.program(PCT, &line, READY);
    let said = said.map_err(|error| Exit::failed(format!("container {ctid}: nvidia-smi does not work: {error}")))?;
    match said.lines().map(str::trim).find(|line| *line != wanted.driver) {
        None => Ok(()),
        Some(other) => Err(Exit::failed(format!(
            "container {ctid}: nvidia-smi says {}, the host has driver {}",
            other.escape_debug(),
            wanted.driver
        ))),
    }
}

pub(super) fn look(app: &App, ctid: u32, wanted: &Wanted) -> Result<Seen> {
    let package = wanted.package().unwrap_or("cuda-toolkit");
    // Which repository it should be depends on what is inside: the part of the address that all have in common.
    let repository = cuda::base(wanted.repo.as_deref());
    inside::look(app.kernel, ctid, &repository, package)
}

fn await_nodes(app: &App, ctid: u32, wanted: &Wanted, nodes: &[String]) -> Result<()> {
    until_ready(app, || {
        let seen = look(app, ctid, wanted)?;
        match nodes.iter().find(|node| !seen.has_node(node)) {
            None => Ok(()),
            Some(node) => Err(Exit::failed(format!(
                "container {ctid} runs, but {node} cannot be opened in it; gpu-handoff container check {ctid} says more"
            ))),
        }
    })
}

fn until_ready<T>(app: &App, attempt: impl Fn() -> Result<T>) -> Result<T> {
    let end = app.kernel.now() + READY;
    loop {
        match attempt() {
            Err(_) if app.kernel.now() < end && !app.kernel.is_asked_to_end() => {
                app.kernel.sleep(Duration::from_secs(1));
            }
            answer => return answer,
        }
    }
}

/// What CUDA needs among the nodes that its configuration gives a container, as far as the host has them.
fn nodes(app: &App, ctid: u32) -> Result<Vec<String>> {
    let path = format!("/etc/pve/lxc/{ctid}.conf");
    let bytes = app.kernel.read(&path).map_err(|error| Exit::failed(format!("{path}: {error}")))?;
    let live = inside::live_nodes(app.kernel);
    let mut nodes = Theirs::of(app.kernel, ct::parse_next(&bytes)).nodes(app.kernel, &live);
    nodes.retain(|node| nodes::is_gpu(node) || is_for_all(node));
    Ok(nodes)
}

/// Belongs to no single GPU, and CUDA does not work without it.
fn is_for_all(node: &str) -> bool {
    matches!(node, "/dev/nvidiactl" | UVM)
}

fn and_cuda(wanted: &Wanted) -> String {
    wanted.package().map_or_else(String::new, |package| format!(" and {package}"))
}
