//! What a container shall have of the host's GPUs, and what speaks against giving it that.

use super::edit;
use super::host::chosen;
use super::line;
use super::record::{self, Attachment};
use super::rules::{self, Facts, LineKind, Need};
use super::theirs::{About, Theirs};
use super::there;
use super::{Style, Wish, config, untouched};
use crate::App;
use crate::address::SlotId;
use crate::exit::{Code, Exit, Result};
use crate::gpu::Slot;
use crate::gpu::containers::{Given, Way};
use crate::gpu::inventory;
use crate::proxmox::ct;
use crate::trouble::Trouble;

/// What a container shall have, with nothing left open.
#[derive(Clone)]
pub(super) struct Wanted {
    pub style: Style,
    pub slots: Vec<SlotId>,
    pub dri: bool,
    /// Why it is not quite what was asked for.
    pub warning: Option<String>,
}

impl Wanted {
    /// Of what is not quite as it was asked for, and of what is given by somebody else's lines and will not do.
    pub fn warn(&self, app: &App, ctid: u32, facts: &Facts) {
        self.warning.iter().for_each(|warning| app.story.warn(warning));
        warn_of_theirs(app, ctid, facts, self);
    }

    pub fn read(app: &App, ctid: u32, wish: &Wish) -> Result<Wanted> {
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
pub(super) fn look(app: &App, ctid: u32) -> Result<Vec<u8>> {
    let bytes = config::read(app.kernel, ctid)?;
    let parsed = ct::parse(&bytes);
    config::refuse_template(ctid, &parsed)?;
    config::refuse_locked(ctid, &parsed)?;
    Ok(bytes)
}

pub(super) fn refuse_unreadable(ctid: u32, bytes: &[u8], style: Style) -> Result<()> {
    let odd = there::unreadable_devs(bytes);
    if style != Style::Dev || odd.is_empty() {
        return Ok(());
    }
    let what = format!("Proxmox cannot read its {} and starts it with none", odd.join(" "));
    let remedy = format!("fix that: pct set {ctid} --delete {}", odd.join(","));
    Err(untouched(ctid, Trouble::new(what, remedy)))
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
pub(super) fn not_given(app: &App, ctid: u32, others: &[u8], facts: &Facts, wanted: &Wanted) -> Result<Vec<Need>> {
    let theirs = Theirs::read(app.kernel, others);
    let all = rules::needs(facts, wanted.style, wanted.dri);
    let needs_rules = theirs.needs_rules(app.kernel, &all);
    let left = theirs.left(app.kernel, all, &|need| need.by_node(facts));
    let mut left = left.map_err(|given| {
        let what = format!("something else than the host's {} is given to it there, by {}", given.inside, given.line());
        let path = config::path(ctid);
        // Where there are several it must be said once more.
        let is_one = inventory::nvidia_slots(app.kernel).len() == 1;
        let which: String = wanted.slots.iter().filter(|_| !is_one).map(|slot| format!(" --gpu {slot}")).collect();
        let remedy = format!("take that line out of {path}, then: gpu-handoff container attach {ctid}{which}");
        untouched(ctid, Trouble::new(what, remedy))
    })?;
    left.retain(|need| needs_rules || need.kind != LineKind::Rule);
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
pub(super) fn will_not_do(ctid: u32, config: &ct::CtConfig, given: &Given) -> Option<Trouble> {
    let Given { host, way, key, .. } = given;
    let trouble = |what: String, remedy: String| Some(Trouble::new(what, remedy).joined(": "));
    let dev = key.strip_prefix("dev").and_then(|digits| config.dev.get(digits)?.device.as_ref());
    match way {
        Way::Dev if dev.is_some_and(|dev| dev.deny_write) => trouble(
            format!("{key} gives it {host} without leave to write, which CUDA needs"),
            format!("pct set {ctid} --{key} {host},mode=0666"),
        ),
        Way::MountPoint if host.starts_with("/dev/") => trouble(
            format!("Proxmox takes {host} of {key} for a disk, and such a container does not start"),
            format!("pct set {ctid} --delete {key}"),
        ),
        Way::Dev | Way::Entry | Way::MountPoint => None,
    }
}

pub(super) fn too_many(ctid: u32) -> Exit {
    let what = "there are not enough numbers between dev0 and dev255 left for its devices";
    let remedy = format!("delete some (pct set {ctid} --delete devN), or use --style mount");
    untouched(ctid, Trouble::new(what, remedy))
}

pub(super) fn readable_record(app: &App, ctid: u32) -> Result<Option<Attachment>> {
    record::read(app.kernel, ctid).map_err(|error| {
        let what = format!("the record of what was attached cannot be read: {error:#}");
        let why = Trouble::new(what, "if you remove that file, its lines are yours to take out");
        Exit { code: Code::Failed, ..untouched(ctid, why) }
    })
}

/// Nodes that are mounted keep the owner they have in the host, whom an unprivileged container does not know.
pub(super) fn warn_of_permissions(app: &App, ctid: u32, facts: &Facts, wanted: &Wanted) {
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
