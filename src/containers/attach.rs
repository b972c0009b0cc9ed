//! Lets a container use the GPU, and takes that back.

use super::edit::{self, Change, TooManyDevices};
use super::host::{UVM, chosen, facts, load_uvm, make_nodes};
use super::line;
use super::record::{self, Record};
use super::rules::{self, Away, Facts, Kind, Need};
use super::theirs::{self, About, Theirs, key_of};
use super::there;
use super::{Style, Wish, config};
use crate::App;
use crate::address::{SlotId, list};
use crate::gpu::containers::{Given, Way};
use crate::gpu::{Slot, containers, nodes};
use crate::handoff::way::reconcile::nodes_to_text;
use crate::proxmox::ct;
use crate::stop::{Result, Stop};
use crate::sys::Lock;
use std::fmt::Write;

/// # Errors
/// Why the container is left as it is.
pub fn attach(app: &App, ctid: u32, wish: &Wish) -> Result<()> {
    let wanted = Wanted::read(app, ctid, wish)?;
    let mut facts = facts(app, ctid, &wanted.slots)?;
    // Whatever can be refused, before anything is touched.
    Edit::attach(app, ctid, &wanted, &facts)?;
    if facts.uvm.is_none() {
        load_uvm(app)?;
        facts = self::facts(app, ctid, &wanted.slots)?;
    }
    make_nodes(app);
    let lock = config::lock(app, ctid, &format!("gpu-handoff container attach {ctid}"))?;
    // Again: Proxmox may have changed it meanwhile.
    let edit = Edit::attach(app, ctid, &wanted, &facts)?;
    let summary = edit.summary();
    edit.carry_out(app, ctid, &wanted, &lock)?;
    drop(lock);
    wanted.warn(app);
    warn_of_theirs(app, ctid, &facts, &wanted);
    warn_of_permissions(app, ctid, &facts, &wanted);
    let slots = list(&wanted.slots);
    let Some(summary) = summary else {
        app.story.say(&format!("container {ctid} has {slots} already: nothing to do"));
        return Ok(());
    };
    app.story.say(&format!("container {ctid} gets {slots}: {summary} in {}", config::path(ctid)));
    if containers::runs(app.kernel, ctid) {
        app.story.say(&format!("container {ctid} runs and gets it when it starts again: pct reboot {ctid}"));
    }
    Ok(())
}

/// # Errors
/// Why [`attach`] would refuse.
pub(super) fn would(app: &App, ctid: u32, wish: &Wish) -> Result<()> {
    let wanted = Wanted::read(app, ctid, wish)?;
    let facts = facts(app, ctid, &wanted.slots)?;
    Edit::attach(app, ctid, &wanted, &facts).map(drop)
}

/// What [`attach`] would do now.
pub(super) struct Planned {
    /// A line each.
    pub text: String,
    /// A node of the driver's gets into the container with it.
    pub adds_node: bool,
}

/// What [`attach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, ctid: u32, wish: &Wish) -> Result<String> {
    Ok(planned(app, ctid, wish)?.text)
}

/// # Errors
/// As [`plan`].
pub(super) fn planned(app: &App, ctid: u32, wish: &Wish) -> Result<Planned> {
    let wanted = Wanted::read(app, ctid, wish)?;
    let facts = facts(app, ctid, &wanted.slots)?;
    let change = Edit::attach(app, ctid, &wanted, &facts)?.change;
    wanted.warn(app);
    warn_of_theirs(app, ctid, &facts, &wanted);
    let mut text = format!("container {ctid} gets {}\n", list(&wanted.slots));
    let is_loaded = facts.uvm.is_some();
    if !is_loaded {
        let _ = writeln!(text, "  {:<9} {UVM}", "load");
    }
    let missing = nodes::missing(app.kernel);
    if !missing.is_empty() {
        let _ = writeln!(text, "  {:<9} {}", "make", nodes_to_text(&missing));
    }
    text.push_str(&change.to_text());
    if !is_loaded && wanted.style == Style::Mount {
        let _ = writeln!(text, "  {:<9} a rule for the major that {UVM} will have", "add");
    } else if is_loaded && missing.is_empty() && change.is_nothing() {
        text.push_str("  nothing to do\n");
    }
    Ok(Planned { text, adds_node: change.adds_node() })
}

/// # Errors
/// Why the container is left as it is.
pub fn detach(app: &App, ctid: u32) -> Result<()> {
    let Some(record) = readable_record(app, ctid)? else {
        app.story.say(&not_ours(app, ctid, &config::read(app.kernel, ctid)?));
        return Ok(());
    };
    if config::is_gone(app.kernel, ctid) {
        record::remove(app.kernel, ctid)?;
        app.story.say(&gone(ctid));
        return Ok(());
    }
    config::read(app.kernel, ctid)?;
    config::refuse_read_only(app.kernel, ctid)?;
    if record.lines.is_empty() {
        record::remove(app.kernel, ctid)?;
        app.story.say(&not_ours(app, ctid, &config::read(app.kernel, ctid)?));
        return Ok(());
    }
    let lock = config::lock(app, ctid, &format!("gpu-handoff container detach {ctid}"))?;
    let bytes = config::read(app.kernel, ctid)?;
    config::refuse_locked(ctid, &ct::parse(&bytes))?;
    // Another call may have been quicker.
    let record = readable_record(app, ctid)?.unwrap_or(record);
    let change = Change::detach(&bytes, &record.lines);
    let changed = edit::changed(&bytes, &record.lines);
    if !change.is_nothing() {
        let (new, _) = change.apply(&bytes, record.newline && changed.is_empty());
        config::write(app.kernel, ctid, &new, &lock)?;
    }
    record::remove(app.kernel, ctid)?;
    drop(lock);
    for line in changed {
        app.story.warn(&format!(
            "container {ctid}: somebody changed the line for {}, left as it is: it was {line}",
            line.what
        ));
    }
    if change.is_nothing() {
        app.story.say(&format!("container {ctid}: nothing that was attached is there any more: nothing to do"));
        return Ok(());
    }
    app.story.say(&format!("container {ctid}: {} in {}", change.summary(), config::path(ctid)));
    if containers::runs(app.kernel, ctid) {
        app.story.say(&format!("container {ctid} runs and keeps it until it starts again: pct reboot {ctid}"));
    }
    Ok(())
}

/// What [`detach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_detach(app: &App, ctid: u32) -> Result<String> {
    let Some(record) = readable_record(app, ctid)? else {
        return Ok(format!("{}\n", not_ours(app, ctid, &config::read(app.kernel, ctid)?)));
    };
    if config::is_gone(app.kernel, ctid) {
        return Ok(format!("{}\n", gone(ctid)));
    }
    let bytes = config::read(app.kernel, ctid)?;
    config::refuse_read_only(app.kernel, ctid)?;
    config::refuse_locked(ctid, &ct::parse(&bytes))?;
    let mut text = format!("container {ctid} is detached from {}\n", list(&record.slots));
    let change = Change::detach(&bytes, &record.lines);
    text.push_str(&change.to_text());
    for line in edit::changed(&bytes, &record.lines) {
        let _ = writeln!(text, "  {:<9} what somebody made of: {line}", "leave");
    }
    if change.is_nothing() {
        text.push_str("  nothing to do\n");
    }
    Ok(text)
}

/// The containers that were attached on this host, by CTID.
pub fn attached(app: &App) -> Vec<u32> {
    let mut ids = record::all(app.kernel);
    ids.retain(|ctid| app.kernel.exists(&config::path(*ctid)));
    ids
}

/// Brings what [`attach`] wrote up to the numbers of now: majors, minors. Whether anything had to be changed; nothing to
/// do for a container that was not attached. While a GPU of its is away its numbers are not known: then only what has
/// become another GPU's is taken out.
///
/// # Errors
/// Why the container is left as it is.
pub fn refresh(app: &App, ctid: u32) -> Result<bool> {
    // Mostly there is nothing to do, and then nobody is kept waiting for the lock.
    if Edit::refresh(app, ctid)?.is_none() {
        return Ok(false);
    }
    let lock = config::lock(app, ctid, "gpu-handoff container sync --all")?;
    let Some((edit, wanted)) = Edit::refresh(app, ctid)? else { return Ok(false) };
    let summary = edit.summary().unwrap_or_default();
    edit.carry_out(app, ctid, &wanted, &lock)?;
    app.story.say(&format!("container {ctid}: {summary} in {}", config::path(ctid)));
    Ok(true)
}

/// As [`refresh`], of every container that was attached; what does not work is told. Those with other device rules now.
pub fn refresh_all(app: &App) -> Vec<u32> {
    let is_changed = |ctid: &u32| {
        let changed = refresh(app, *ctid);
        changed.inspect_err(|stop| app.story.warn(&stop.message)).is_ok_and(|changed| changed)
    };
    attached(app).into_iter().filter(is_changed).collect()
}

/// A configuration and what becomes of it.
struct Edit {
    old: Option<Record>,
    change: Change,
    new: Vec<u8>,
    newline: bool,
}

impl Edit {
    fn attach(app: &App, ctid: u32, wanted: &Wanted, facts: &Facts) -> Result<Edit> {
        let bytes = look(app, ctid)?;
        refuse_unreadable(ctid, &bytes, wanted.style)?;
        let old = readable_record(app, ctid)?;
        let recorded = old.as_ref().map_or(&[][..], |record| &record.lines);
        let needs = not_given(app, ctid, &edit::without_ours(&bytes, recorded), facts, wanted)?;
        let change = Change::attach(&bytes, recorded, &needs).map_err(|TooManyDevices| too_many(ctid))?;
        Edit::new(ctid, &bytes, old, change)
    }

    /// None when there is nothing to do.
    fn refresh(app: &App, ctid: u32) -> Result<Option<(Edit, Wanted)>> {
        let Some(record) = readable_record(app, ctid)? else { return Ok(None) };
        if !app.kernel.exists(&config::path(ctid)) {
            return Ok(None);
        }
        let bytes = config::read(app.kernel, ctid)?;
        let change = match Facts::read(app.kernel, &record.slots) {
            Ok(facts) if facts.uvm.is_none() => return Ok(None),
            Ok(facts) => {
                let theirs = Theirs::read(app.kernel, &edit::without_ours(&bytes, &record.lines));
                let split = |need: Need| need.by_node(&facts);
                let left = |need| theirs.left(app.kernel, vec![need], &split).unwrap_or_default();
                let needs =
                    rules::needs(&facts, record.style, record.dri).into_iter().flat_map(left).collect::<Vec<_>>();
                // Of a run that was killed in between, what is not there was not taken out: it never got there.
                let mut recorded = record.lines.clone();
                if record.unfinished {
                    let present = line::present(&bytes, &record.lines);
                    recorded.retain(|line| present.contains(&line));
                }
                Change::refresh(&bytes, &recorded, &needs).map_err(|TooManyDevices| too_many(ctid))?
            }
            Err(Away { .. }) => {
                let others = rules::needs_of_others(app.kernel, &record.slots, record.style);
                Change::withdraw(&bytes, &record.lines, &others)
            }
        };
        if change.is_nothing() {
            return Ok(None);
        }
        config::refuse_locked(ctid, &ct::parse(&bytes))?;
        config::refuse_read_only(app.kernel, ctid)?;
        let wanted = Wanted { style: record.style, slots: record.slots.clone(), dri: record.dri, warning: None };
        Ok(Some((Edit::new(ctid, &bytes, Some(record), change)?, wanted)))
    }

    fn new(ctid: u32, bytes: &[u8], old: Option<Record>, change: Change) -> Result<Edit> {
        // That of a container which is no more says nothing about the newline of this one.
        let is_of_this = |old: &Record| !Change::detach(bytes, &old.lines).is_nothing();
        let (new, newline) = change.apply(bytes, old.as_ref().is_some_and(|old| old.newline && is_of_this(old)));
        config::refuse_large(ctid, &new)?;
        Ok(Edit { old, change, new, newline })
    }

    /// None when nothing changes.
    fn summary(&self) -> Option<String> {
        (!self.change.is_nothing()).then(|| self.change.summary())
    }

    /// First the record, of all that is ours before and after: whatever happens then, detach finds it.
    fn carry_out(self, app: &App, ctid: u32, wanted: &Wanted, lock: &Lock) -> Result<()> {
        let Wanted { style, slots, dri, .. } = wanted.clone();
        let lines = self.change.ours.clone();
        let record = Record { style, slots, dri, lines, newline: self.newline, unfinished: false };
        if self.change.is_nothing() {
            return save(app, ctid, self.old.as_ref(), &record);
        }
        let mut both = Record { unfinished: true, ..record.clone() };
        let before = self.old.iter().flat_map(|old| &old.lines);
        both.lines.extend(before.filter(|line| !record.lines.contains(line)).cloned());
        save(app, ctid, self.old.as_ref(), &both)?;
        if let Err(stop) = config::write(app.kernel, ctid, &self.new, lock) {
            put_back(app, ctid, self.old.as_ref());
            return Err(stop);
        }
        put_back(app, ctid, Some(&record));
        Ok(())
    }
}

/// What a container shall have, with nothing left open.
#[derive(Clone)]
struct Wanted {
    style: Style,
    slots: Vec<SlotId>,
    dri: bool,
    /// Why it is not quite what was asked for.
    warning: Option<String>,
}

impl Wanted {
    fn warn(&self, app: &App) {
        self.warning.iter().for_each(|warning| app.story.warn(warning));
    }

    fn read(app: &App, ctid: u32, wish: &Wish) -> Result<Wanted> {
        let bytes = look(app, ctid)?;
        config::refuse_read_only(app.kernel, ctid)?;
        // Not that of an earlier container with this number.
        let old = readable_record(app, ctid)?.filter(|old| !line::present(&bytes, &old.lines).is_empty());
        let is_gpu = |slot: &SlotId| Slot::read(app.kernel, *slot).is_some_and(|slot| slot.is_nvidia_gpu());
        let slots = match &old {
            Some(old) if wish.gpus.is_empty() && old.slots.iter().all(is_gpu) => old.slots.clone(),
            _ => chosen(app, wish)?,
        };
        let mut style = wish.style.or(old.as_ref().map(|old| old.style)).unwrap_or_default();
        let refuses_dev = refuses_dev(&ct::parse_next(&bytes)).filter(|_| style == Style::Dev);
        if refuses_dev.is_some() {
            style = Style::Mount;
        }
        let warning = refuses_dev.map(|why| format!("container {ctid} gets mounts and no dev[n]: {why}"));
        let dri = wish.dri || old.is_some_and(|old| old.dri);
        Ok(Wanted { style, slots, dri, warning })
    }
}

/// The configuration of a container that may be attached.
fn look(app: &App, ctid: u32) -> Result<Vec<u8>> {
    let bytes = config::read(app.kernel, ctid)?;
    let parsed = ct::parse(&bytes);
    config::refuse_template(ctid, &parsed)?;
    config::refuse_locked(ctid, &parsed)?;
    Ok(bytes)
}

fn refuse_unreadable(ctid: u32, bytes: &[u8], style: Style) -> Result<()> {
    let odd = there::unreadable_devs(bytes);
    if style != Style::Dev || odd.is_empty() {
        return Ok(());
    }
    Err(Stop::refused(format!(
        "container {ctid} was not touched: Proxmox cannot read its {} and starts it with none; mend that: pct set {ctid} \
         --delete {}",
        odd.join(" "),
        odd.join(",")
    )))
}

/// Why Proxmox starts no such container with a `devN`: it looks at errno without a call that failed, and says that the
/// device does not exist (tried with pve-container 6.1.10).
pub(super) fn refuses_dev(config: &ct::CtConfig) -> Option<String> {
    let ostype = config.ostype.as_deref().filter(|ostype| matches!(*ostype, "unmanaged" | "nixos"))?;
    (!config.unprivileged).then(|| {
        format!(
            "it is privileged and of ostype {ostype}, and Proxmox starts none such with dev[n] (\"does not exist\")"
        )
    })
}

/// What a container needs and does not have by the lines that are not ours, which are `others`.
fn not_given(app: &App, ctid: u32, others: &[u8], facts: &Facts, wanted: &Wanted) -> Result<Vec<Need>> {
    let theirs = Theirs::read(app.kernel, others);
    let all = rules::needs(facts, wanted.style, wanted.dri);
    let needs_rules = theirs.needs_rules(app.kernel, &all);
    let left = theirs.left(app.kernel, all, &|need| need.by_node(facts));
    let mut left = left.map_err(|Given { inside, line, .. }| {
        Stop::refused(format!(
            "container {ctid} was not touched: something else than the host's {inside} is given to it there, by {line}; take \
             that line out of {}, then: gpu-handoff container attach {ctid}",
            config::path(ctid)
        ))
    })?;
    left.retain(|need| needs_rules || need.kind != Kind::Rule);
    Ok(left)
}

/// What is given by somebody else's lines and will not do.
fn warn_of_theirs(app: &App, ctid: u32, facts: &Facts, wanted: &Wanted) {
    let recorded = record::read(app.kernel, ctid).ok().flatten().map_or_else(Vec::new, |record| record.lines);
    let Ok(bytes) = config::read(app.kernel, ctid) else { return };
    let theirs = Theirs::read(app.kernel, &edit::without_ours(&bytes, &recorded));
    if let Some(hook) = &theirs.hook {
        app.story.warn(&format!(
            "container {ctid} has LXC's own hook ({hook}), which gives it the host's nodes and driver: nothing is added to that"
        ));
    }
    for path in rules::needs(facts, wanted.style, wanted.dri).iter().filter_map(Need::path) {
        let About::Given(given) = theirs.about(app.kernel, &path) else { continue };
        if let Some(problem) = will_not_do(ctid, &theirs.config, given) {
            app.story.warn(&format!("container {ctid}: {problem}"));
        }
    }
}

/// What is wrong with a line that gives a node, and what to type.
pub(super) fn will_not_do(ctid: u32, config: &ct::CtConfig, given: &Given) -> Option<String> {
    let Given { host, way, line, .. } = given;
    let key = key_of(line);
    let dev = key.strip_prefix("dev").and_then(|digits| config.dev.get(digits)?.device.as_ref());
    match way {
        Way::Dev if dev.is_some_and(|dev| dev.deny_write) => Some(format!(
            "{key} gives it {host} without leave to write, which CUDA needs: pct set {ctid} --{key} {host},mode=0666"
        )),
        Way::MountPoint if host.starts_with("/dev/") => Some(format!(
            "Proxmox takes {host} of {key} for a disk, and such a container does not start: pct set {ctid} --delete {key}"
        )),
        Way::Dev | Way::Entry | Way::MountPoint => None,
    }
}

fn too_many(ctid: u32) -> Stop {
    Stop::refused(format!(
        "container {ctid} was not touched: there are not enough numbers between dev0 and dev255 left for its devices; \
         delete some (pct set {ctid} --delete devN), or use --style mount"
    ))
}

fn readable_record(app: &App, ctid: u32) -> Result<Option<Record>> {
    record::read(app.kernel, ctid).map_err(|error| {
        Stop::failed(format!(
            "container {ctid} was not touched: the record of what was attached cannot be read: {error:#}; if you \
             remove that file, its lines are yours to take out"
        ))
    })
}

fn save(app: &App, ctid: u32, old: Option<&Record>, new: &Record) -> Result<()> {
    if old == Some(new) {
        return Ok(());
    }
    record::write(app.kernel, ctid, new)
        .map_err(|error| Stop::refused(format!("container {ctid} was not touched: {error:#}")))
}

/// The record as it fits the configuration again. Should that fail it names lines that are not there, which does no
/// harm.
fn put_back(app: &App, ctid: u32, record: Option<&Record>) {
    let done = match record {
        Some(record) => record::write(app.kernel, ctid, record),
        None => record::remove(app.kernel, ctid),
    };
    if let Err(error) = done {
        app.story.warn(&format!("{error:#}"));
    }
}

/// Nodes that are mounted keep the owner they have in the host, whom an unprivileged container does not know.
fn warn_of_permissions(app: &App, ctid: u32, facts: &Facts, wanted: &Wanted) {
    if wanted.dri && facts.gpus.iter().any(|gpu| gpu.drm.is_empty()) {
        app.story
            .warn(&format!("container {ctid}: a GPU has no DRM nodes: nvidia-drm is not loaded; then attach again"));
    }
    let is_unprivileged = config::read(app.kernel, ctid).is_ok_and(|bytes| ct::parse(&bytes).unprivileged);
    if wanted.style != Style::Mount || !is_unprivileged {
        return;
    }
    if wanted.dri {
        app.story.warn(&format!(
            "container {ctid} is unprivileged: the modes of /dev/dri in the host may keep it from opening them; with \
             --style dev they do not"
        ));
    }
    if facts.mode & 0o006 != 0o006 {
        app.story.warn(&format!(
            "container {ctid} is unprivileged and cannot open nodes of mode {:04o} (DeviceFileMode of nvidia); with \
             --style dev its root can",
            facts.mode & 0o777
        ));
    }
}

fn not_ours(app: &App, ctid: u32, bytes: &[u8]) -> String {
    let also = match theirs::told(&Theirs::read(app.kernel, bytes)).as_slice() {
        [] => String::new(),
        others => {
            let then = theirs::how_to_take_out(ctid, others);
            format!("; these lines are somebody else's: {}; to take them out: {then}", others.join(" | "))
        }
    };
    format!("container {ctid}: nothing was attached by this host: nothing to do{also}")
}

fn gone(ctid: u32) -> String {
    format!("container {ctid} does not exist any more: its record is forgotten")
}
