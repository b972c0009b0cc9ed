//! Lets a container use the GPU, and takes that back.

use super::edit::{self, Change, Line, TooManyDevices};
use super::record::{self, Record};
use super::rules::{self, Away, Facts};
use super::{Style, Wish, config};
use crate::App;
use crate::gpu::choice::choose;
use crate::gpu::inventory::{VFIO_PCI, nvidia_slots};
use crate::gpu::{containers, nodes};
use crate::handoff::is_alive;
use crate::handoff::reconcile::nodes_to_text;
use crate::proxmox::{ct, pci_id::PciId, running, vm};
use crate::stop::{Result, Stop};
use crate::sys::{ActError, Action, Kernel};
use std::fmt::Write;
use std::time::Duration;

const UVM: &str = "nvidia-uvm";

/// Longer than loading it ever takes, unless something is stuck in the kernel.
const LOAD: Duration = Duration::from_secs(20);
const MAKE: Duration = Duration::from_secs(5);

/// # Errors
/// Why the container is left as it is.
pub fn attach(app: &App, ctid: u32, wish: &Wish) -> Result<()> {
    let again = format!("gpu-handoff container attach {ctid}");
    look(app, ctid, wish.style)?;
    config::refuse_read_only(&app.kernel, ctid)?;
    let slots = chosen(app, wish)?;
    let mut facts = facts(app, ctid, &slots)?;
    if facts.uvm.is_none() {
        load_uvm(app)?;
        facts = self::facts(app, ctid, &slots)?;
    }
    make_nodes(app);
    let lock = config::lock(app, ctid, &again)?;
    // As it is now: Proxmox may have changed it meanwhile.
    let bytes = look(app, ctid, wish.style)?;
    let old = readable_record(app, ctid)?;
    let recorded = old.as_ref().map_or(&[][..], |record| &record.lines);
    let change = change(ctid, &bytes, recorded, &facts, wish)?;
    let (new, newline) = change.apply(&bytes, old.as_ref().is_some_and(|old| old.newline && is_present(&bytes, old)));
    let record = Record { style: wish.style, slots, dri: wish.dri, lines: change.ours.clone(), newline };
    // All that is ours before and after: whatever happens between the two, detach finds it.
    let mut both = record.clone();
    both.lines.extend(recorded.iter().filter(|line| !change.ours.contains(line)).cloned());
    save(app, ctid, old.as_ref(), &both)?;
    if !change.is_nothing()
        && let Err(stop) = config::write(&app.kernel, ctid, &new, &lock)
    {
        put_back(app, ctid, old.as_ref());
        return Err(stop);
    }
    save(app, ctid, Some(&both), &record)?;
    drop(lock);
    warn_of_permissions(app, ctid, &bytes, &facts, wish);
    let slots = record.slots.join(" ");
    if change.is_nothing() {
        app.story.say(&format!("container {ctid} has {slots} already: nothing to do"));
        return Ok(());
    }
    app.story.say(&format!("container {ctid} gets {slots}: {} in {}", change.summary(), config::path(ctid)));
    say_when(app, ctid, "it takes effect");
    Ok(())
}

/// What [`attach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, ctid: u32, wish: &Wish) -> Result<String> {
    let bytes = look(app, ctid, wish.style)?;
    config::refuse_read_only(&app.kernel, ctid)?;
    let slots = chosen(app, wish)?;
    let facts = facts(app, ctid, &slots)?;
    let old = readable_record(app, ctid)?;
    let recorded = old.as_ref().map_or(&[][..], |record| &record.lines);
    let change = change(ctid, &bytes, recorded, &facts, wish)?;
    let mut text = format!("container {ctid} gets {}\n", slots.join(" "));
    if facts.uvm.is_none() {
        let _ = writeln!(text, "  {:<9} {UVM}", "load");
    }
    let missing = nodes::missing(&app.kernel);
    if !missing.is_empty() {
        let _ = writeln!(text, "  {:<9} {}", "make", nodes_to_text(&missing));
    }
    text.push_str(&change.to_text());
    if facts.uvm.is_none() && wish.style == Style::Mount {
        let _ = writeln!(text, "  {:<9} a rule for the major that {UVM} will have", "add");
    } else if change.is_nothing() {
        text.push_str("  nothing to do\n");
    }
    Ok(text)
}

/// # Errors
/// Why the container is left as it is.
pub fn detach(app: &App, ctid: u32) -> Result<()> {
    let Some(record) = readable_record(app, ctid)? else {
        app.story.say(&not_ours(ctid, &config::read(&app.kernel, ctid)?));
        return Ok(());
    };
    if config::is_gone(&app.kernel, ctid) {
        record::remove(&app.kernel, ctid)?;
        app.story.say(&gone(ctid));
        return Ok(());
    }
    config::read(&app.kernel, ctid)?;
    config::refuse_read_only(&app.kernel, ctid)?;
    let lock = config::lock(app, ctid, &format!("gpu-handoff container detach {ctid}"))?;
    let bytes = config::read(&app.kernel, ctid)?;
    config::refuse_locked(ctid, &ct::parse(&bytes))?;
    // Another call may have been quicker.
    let record = readable_record(app, ctid)?.unwrap_or(record);
    let change = Change::detach(&bytes, &record.lines);
    let changed = edit::changed(&bytes, &record.lines);
    if !change.is_nothing() {
        let (new, _) = change.apply(&bytes, record.newline && changed.is_empty());
        config::write(&app.kernel, ctid, &new, &lock)?;
    }
    record::remove(&app.kernel, ctid)?;
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
    say_when(app, ctid, "it keeps the GPU until then");
    Ok(())
}

/// What [`detach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_detach(app: &App, ctid: u32) -> Result<String> {
    let Some(record) = readable_record(app, ctid)? else {
        return Ok(format!("{}\n", not_ours(ctid, &config::read(&app.kernel, ctid)?)));
    };
    if config::is_gone(&app.kernel, ctid) {
        return Ok(format!("{}\n", gone(ctid)));
    }
    let bytes = config::read(&app.kernel, ctid)?;
    config::refuse_read_only(&app.kernel, ctid)?;
    config::refuse_locked(ctid, &ct::parse(&bytes))?;
    let mut text = format!("container {ctid} is detached from {}\n", record.slots.join(" "));
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
    let mut ids = record::all(&app.kernel);
    ids.retain(|ctid| app.kernel.exists(&config::path(*ctid)));
    ids
}

/// Brings what [`attach`] wrote up to the numbers of now: majors, minors. Whether anything had to be changed; nothing to
/// do for a container that was not attached, and while a GPU of its is away.
///
/// # Errors
/// Why the container is left as it is.
pub fn refresh(app: &App, ctid: u32) -> Result<bool> {
    let outdated = || -> Result<Option<(Record, Vec<u8>, Change)>> {
        let Some(record) = readable_record(app, ctid)? else { return Ok(None) };
        if !app.kernel.exists(&config::path(ctid)) {
            return Ok(None);
        }
        let bytes = config::read(&app.kernel, ctid)?;
        let Ok(facts) = Facts::read(&app.kernel, &record.slots) else { return Ok(None) };
        if facts.uvm.is_none() {
            return Ok(None);
        }
        let needs = rules::needs(&facts, record.style, record.dri);
        let change = Change::refresh(&bytes, &record.lines, &needs).map_err(|_| too_many(ctid))?;
        Ok((!change.is_nothing()).then_some((record, bytes, change)))
    };
    if outdated()?.is_none() {
        return Ok(false);
    }
    let lock = config::lock(app, ctid, "gpu-handoff container sync --all")?;
    let Some((record, bytes, change)) = outdated()? else { return Ok(false) };
    config::refuse_locked(ctid, &ct::parse(&bytes))?;
    config::refuse_read_only(&app.kernel, ctid)?;
    let (new, newline) = change.apply(&bytes, record.newline);
    let after = Record { lines: change.ours.clone(), newline, ..record.clone() };
    let mut both = after.clone();
    both.lines.extend(record.lines.iter().filter(|line| !change.ours.contains(line)).cloned());
    save(app, ctid, Some(&record), &both)?;
    if let Err(stop) = config::write(&app.kernel, ctid, &new, &lock) {
        put_back(app, ctid, Some(&record));
        return Err(stop);
    }
    save(app, ctid, Some(&both), &after)?;
    app.story.say(&format!("container {ctid}: {} in {}", change.summary(), config::path(ctid)));
    Ok(true)
}

/// The configuration of a container that may be attached.
fn look(app: &App, ctid: u32, style: Style) -> Result<Vec<u8>> {
    let bytes = config::read(&app.kernel, ctid)?;
    let parsed = ct::parse(&bytes);
    config::refuse_template(ctid, &parsed)?;
    config::refuse_locked(ctid, &parsed)?;
    let odd = edit::unreadable_devs(&bytes);
    if style == Style::Dev && !odd.is_empty() {
        return Err(Stop::refused(format!(
            "container {ctid} was not touched: Proxmox cannot read its {} and starts it with none; mend that: pct set \
             {ctid} --delete {}",
            odd.join(" "),
            odd.join(",")
        )));
    }
    Ok(bytes)
}

/// The slots that were named, each once; or the only one there is.
fn chosen(app: &App, wish: &Wish) -> Result<Vec<String>> {
    if wish.gpus.is_empty() {
        return Ok(vec![choose(&app.kernel, None).map_err(|stop| match nvidia_slots(&app.kernel).len() {
            0 | 1 => stop,
            _ => Stop { message: format!("{} (--gpu SLOT, also more than once)", stop.message), ..stop },
        })?]);
    }
    let mut slots = Vec::new();
    for named in &wish.gpus {
        let slot = choose(&app.kernel, Some(named))?;
        if !slots.contains(&slot) {
            slots.push(slot);
        }
    }
    Ok(slots)
}

fn facts(app: &App, ctid: u32, slots: &[String]) -> Result<Facts> {
    Facts::read(&app.kernel, slots).map_err(|away| Stop::refused(explain(app, ctid, &away)))
}

/// Who has it instead of the host's driver, and what to type.
fn explain(app: &App, ctid: u32, away: &Away) -> String {
    let Away { slot, driver } = away;
    let records = app.store.each_record().into_iter().flatten();
    let owner = records.filter(|record| record.slots().contains(&slot.as_str())).map(|record| record.owner).next();
    let vm = match &owner {
        Some(owner) => owner.vmid().filter(|vmid| is_alive(&app.kernel, *vmid)),
        None => running_vm(&app.kernel, slot),
    };
    let again = format!("then: gpu-handoff container attach {ctid}");
    let who = match (vm, owner, driver.as_deref()) {
        (Some(vmid), ..) => format!("VM {vmid} has it; stop that first: qm stop {vmid}, {again}"),
        (None, Some(owner), _) => {
            format!("it was given to {owner}; bring it home first: gpu-handoff to-nvidia {slot}, {again}")
        }
        (None, None, Some("nvidia")) => {
            "the NVIDIA driver has it but does not list it in /proc/driver/nvidia/gpus; see dmesg".to_string()
        }
        (None, None, Some(VFIO_PCI)) => {
            "it is at home on vfio-pci; containers can only use a GPU that NVIDIA's driver has".to_string()
        }
        (None, None, Some(driver)) => {
            format!("{driver} has it; containers can only use a GPU that NVIDIA's driver has")
        }
        (None, None, None) => format!("no driver has it; load NVIDIA's first: modprobe nvidia, {again}"),
    };
    format!("container {ctid} was not touched: the numbers of {slot} are not known: {who}")
}

/// A running VM whose configuration names the slot, when no handoff of ours gave it the card.
fn running_vm(kernel: &dyn Kernel, slot: &str) -> Option<u32> {
    let names = kernel.list("/etc/pve/qemu-server");
    let vms = names.iter().filter_map(|name| name.strip_suffix(".conf")?.parse::<u32>().ok());
    vms.filter(|vmid| running::qemu_pid(kernel, *vmid).is_some()).find(|vmid| {
        let bytes = kernel.read(&format!("/etc/pve/qemu-server/{vmid}.conf")).unwrap_or_default();
        let config = vm::parse(&bytes);
        let ids: Vec<PciId> = config.hostpci.values().flat_map(vm::Hostpci::addresses).collect();
        ids.iter().any(|id| id.slot == slot)
    })
}

/// Nobody loads it before the first CUDA program runs, and its major is known only then: as `nvidia-modprobe -u` does.
fn load_uvm(app: &App) -> Result<()> {
    let action = Action::Load { modules: vec![UVM.to_string()] };
    match app.kernel.act(&action, LOAD) {
        Ok(()) => app.story.say(&format!("{UVM} loaded")),
        Err(error @ ActError::Stuck { .. }) => return Err(Stop::overrun(format!("loading {UVM} {error}; see dmesg"))),
        Err(error) => {
            return Err(Stop::failed(format!("{UVM} is not loaded and could not be: {error}; try: modprobe {UVM}")));
        }
    }
    Ok(())
}

/// One that cannot be made keeps no container from being attached: the next start of one looks for it again.
fn make_nodes(app: &App) {
    let missing = nodes::missing(&app.kernel);
    let is_made = |node: &&crate::sys::Node| {
        let made = app.kernel.act(&Action::MakeNode((*node).clone()), MAKE);
        made.inspect_err(|error| app.story.warn(&format!("{} is missing and was not made: {error}", node.path))).is_ok()
    };
    let made: Vec<_> = missing.iter().filter(is_made).cloned().collect();
    if !made.is_empty() {
        app.story.say(&format!("device nodes {}", nodes_to_text(&made)));
    }
}

fn change(ctid: u32, bytes: &[u8], recorded: &[Line], facts: &Facts, wish: &Wish) -> Result<Change> {
    let needs = rules::needs(facts, wish.style, wish.dri);
    Change::attach(bytes, recorded, &needs).map_err(|TooManyDevices| too_many(ctid))
}

fn too_many(ctid: u32) -> Stop {
    Stop::refused(format!(
        "container {ctid} was not touched: there are not enough numbers between dev0 and dev255 left for its devices; \
         delete some (pct set {ctid} --delete devN), or use --style mount"
    ))
}

fn is_present(bytes: &[u8], record: &Record) -> bool {
    !Change::detach(bytes, &record.lines).is_nothing()
}

fn readable_record(app: &App, ctid: u32) -> Result<Option<Record>> {
    record::read(&app.kernel, ctid).map_err(|error| {
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
    record::write(&app.kernel, ctid, new)
        .map_err(|error| Stop::refused(format!("container {ctid} was not touched: {error:#}")))
}

/// The configuration is as it was, so the record shall be. Should that fail it names lines that are not there, which
/// does no harm.
fn put_back(app: &App, ctid: u32, old: Option<&Record>) {
    let done = match old {
        Some(old) => record::write(&app.kernel, ctid, old),
        None => record::remove(&app.kernel, ctid),
    };
    if let Err(error) = done {
        app.story.warn(&format!("{error:#}"));
    }
}

/// Nodes that are mounted keep the owner they have in the host, whom an unprivileged container does not know.
fn warn_of_permissions(app: &App, ctid: u32, bytes: &[u8], facts: &Facts, wish: &Wish) {
    if wish.dri && facts.gpus.iter().any(|gpu| gpu.drm.is_empty()) {
        app.story
            .warn(&format!("container {ctid}: a GPU has no DRM nodes: nvidia-drm is not loaded; then attach again"));
    }
    if wish.style != Style::Mount || !ct::parse(bytes).unprivileged {
        return;
    }
    if wish.dri {
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

fn say_when(app: &App, ctid: u32, until: &str) {
    if containers::runs(&app.kernel, ctid) {
        app.story.say(&format!("container {ctid} runs; restart it, {until}: pct reboot {ctid}"));
    }
}

fn not_ours(ctid: u32, bytes: &[u8]) -> String {
    let others = edit::of_others(bytes, &[]);
    let also = match others.as_slice() {
        [] => String::new(),
        others => format!("; these lines are somebody else's: {}", others.join(" | ")),
    };
    format!("container {ctid}: nothing was attached by this host: nothing to do{also}")
}

fn gone(ctid: u32) -> String {
    format!("container {ctid} does not exist any more: its record is forgotten")
}
