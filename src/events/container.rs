//! Proxmox's phases of containers. They never take the handoff lock: a VM's hook that has it may be waiting until a
//! container has stopped, and so for this.

use super::notes::{Notes, handoff_is_under_way};
use crate::App;
use crate::address::{SlotId, list};
use crate::config;
use crate::exit::{Exit, Result};
use crate::gpu::inventory::Slot;
use crate::gpu::nvidia::Minors;
use crate::gpu::{containers, nodes};
use crate::handoff::kept::record::{Owner, Progress, Record};
use crate::handoff::way::reconcile::make_nodes;
use crate::proxmox::ct::CtConfig;
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::time::Duration;

/// For a GPU that is on its way home to arrive.
const WAY_HOME: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const NODE: Duration = Duration::from_millis(200);

/// # Errors
/// When its GPU is with a VM, and by policy it does not start without.
pub fn pre_start(app: &App, ctid: u32) -> Result<()> {
    let Some(ct) = containers::config(app.kernel, ctid).filter(containers::has_nvidia) else { return Ok(()) };
    app.kernel.end_with_this_run();
    Notes::of(app.kernel).forget(ctid);
    wait_for_way_home(app);
    if let Err(exit) = make_nodes(app.kernel, &app.story, &containers::missing_nodes(app.kernel), NODE) {
        app.story.warn(&exit.to_string());
    }
    let Some(away) = gone(app, &ct) else { return Ok(()) };
    let (slots, owner) = (list(away.slots()), &away.owner);
    if away.progress == Progress::Returning {
        let problem = format!("{slots} is not home yet from {owner}, see gpu-handoff --status");
        if app.config_for_hook().policy.refuse_ct_without_gpu {
            let what = format!("container {ctid} was not started: {problem}");
            return Err(Exit::refused(Trouble::new(what, format!("then: pct start {ctid}"))));
        }
        app.story.say(&format!("container {ctid} starts without its GPU: {problem}; then: pct reboot {ctid}"));
        return Ok(());
    }
    let remedy = match owner {
        Owner::Vm(vmid) => format!("qm shutdown {vmid}"),
        Owner::Manual(slot) => format!("gpu-handoff to-nvidia {slot}"),
    };
    if app.config_for_hook().policy.refuse_ct_without_gpu {
        let what = format!(
            "container {ctid} was not started: {owner} has {slots}, and policy.ct_without_gpu is refuse in {}",
            config::PATH
        );
        return Err(Exit::refused(Trouble::new(what, format!("first: {remedy}, then: pct start {ctid}"))));
    }
    app.story.say(&format!("container {ctid} starts without {slots}: {owner} has it; to get it back: {remedy}"));
    Ok(())
}

pub fn post_stop(app: &App, ctid: u32) {
    Notes::of(app.kernel).forget(ctid);
}

/// Waiting while a GPU leaves could be waiting in a circle: its handoff may have this very container's stop in line
/// behind the lock that Proxmox holds for this start. On the way home nobody is stopped, and what is started again is
/// started after the handoff lock is released.
fn wait_for_way_home(app: &App) {
    let end = app.kernel.now() + WAY_HOME;
    let is_on_its_way_home = || {
        let is = |record: &Record, progress| record.progress == progress;
        let records: Vec<Record> = app.store.each_record().into_iter().flatten().collect();
        records.iter().any(|record| is(record, Progress::Returning))
            && !records.iter().any(|record| is(record, Progress::Leaving))
            && handoff_is_under_way(app.kernel)
    };
    while is_on_its_way_home() && app.kernel.now() < end {
        app.kernel.sleep(LOOK_AGAIN);
    }
}

/// Who has a GPU that the configuration gives this container; none when the container gets all that it names.
fn gone(app: &App, ct: &CtConfig) -> Option<Record> {
    let kernel = app.kernel;
    let is_under_way = handoff_is_under_way(kernel);
    let records = app.store.each_record().into_iter().flatten();
    let away: Vec<Record> =
        records.filter_map(|record| record.only(&slots_gone(kernel, &record, is_under_way))).collect();
    if away.is_empty() {
        return None;
    }
    let minors = Minors::read(kernel);
    // What is not known keeps no container from starting.
    if minors.is_busy {
        return None;
    }
    // One that is just leaving still has its number.
    let leaving: Vec<String> = away
        .iter()
        .flat_map(|record| &record.functions)
        .filter_map(|home| {
            let minor = minors.get(home.address)?;
            Some(format!("/dev/nvidia{minor}"))
        })
        .collect();
    let mut here: Vec<String> = nodes::wanted(kernel).into_iter().map(|(path, _)| path).collect();
    here.retain(|path| nodes::is_gpu(path) && !leaving.contains(path));
    let mut named = containers::given(ct).map(|node| node.host).filter(|path| nodes::is_gpu(path)).peekable();
    let lacks = match named.peek() {
        Some(_) => named.any(|path| !here.contains(&path)),
        // By a rule alone: any will do.
        None => here.is_empty(),
    };
    away.into_iter().next().filter(|_| lacks)
}

/// The slots of a record whose GPU containers do not get.
fn slots_gone(kernel: &dyn Kernel, record: &Record, is_under_way: bool) -> Vec<SlotId> {
    let is_here = |slot: SlotId| {
        let gpu = Slot::read(kernel, slot).and_then(|slot| slot.gpu().cloned());
        gpu.is_some_and(|gpu| gpu.is_on("nvidia"))
    };
    let leaves = is_under_way && record.progress == Progress::Leaving;
    record.slots().into_iter().filter(|slot| leaves || !is_here(*slot)).collect()
}
