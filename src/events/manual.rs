//! A person asks: `to-vfio` and `to-nvidia`. What is done by hand lasts until the opposite call or a reboot.

use crate::App;
use crate::address::{SlotId, list};
use crate::causes;
use crate::config::Config;
use crate::containers::attach;
use crate::exit::Result;
use crate::gpu::choice::choose;
use crate::gpu::inventory::VFIO_PCI;
use crate::gpu::{Slot, nvidia};
use crate::handoff::kept::record::{Owner, Record};
use crate::handoff::plan::{self, Plan};
use crate::handoff::way::attempt::Direction;
use crate::handoff::way::departure::Departure;
use crate::handoff::way::elsewhere;
use crate::handoff::way::home::Asker;
use crate::handoff::way::intent::unknown_home;
use crate::handoff::way::reconcile::{Scope, nodes_to_text};
use crate::story::row;
use crate::sys::Kernel;

/// # Errors
/// As a handoff to a VM, and when it is not clear which slot is meant.
pub fn to_vfio(app: &App, slot: Option<SlotId>) -> Result<()> {
    let slot = choose(app.kernel, slot)?;
    let config = app.config_for_verb()?;
    app.handoff(&config).leave(&Departure::of(Owner::Manual(slot), vec![slot]))
}

/// What [`to_vfio`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_to_vfio(app: &App, slot: Option<SlotId>) -> Result<String> {
    let slot = choose(app.kernel, slot)?;
    let config = app.config_for_verb()?;
    let departure = Departure::of(Owner::Manual(slot), vec![slot]);
    Ok(app.handoff(&config).plan_leave(&departure)?.to_text())
}

/// Also one whose card was pulled out, as long as a record names it: that must have an end.
fn choose_to_come_home(app: &App, slot: Option<SlotId>) -> Result<SlotId> {
    choose(app.kernel, slot).or_else(|exit| {
        let names = |slot: SlotId| app.store.each_record().into_iter().flatten().any(|r| r.slots().contains(&slot));
        let is_gone = |slot: &SlotId| Slot::read(app.kernel, *slot).is_none() && names(*slot);
        slot.filter(is_gone).ok_or(exit)
    })
}

/// Home, whatever home is.
///
/// # Errors
/// When a running VM has the slot, when it is not clear which slot is meant, or when it cannot be brought home.
pub fn to_nvidia(app: &App, slot: Option<SlotId>) -> Result<()> {
    let slot = choose_to_come_home(app, slot)?;
    let config = app.config_for_verb()?;
    let by_hand = Owner::Manual(slot);
    let records = away(app, slot)
        .inspect_err(|exit| app.handoff(&config).note_refused(Direction::Home, &by_hand, &[slot], exit))?;
    if records.is_empty() {
        return bring_what_was_left(app, &config, slot);
    }
    for record in records {
        app.handoff(&config).come_home(&record.owner, Asker::Person)?;
    }
    Ok(())
}

/// No handoff of ours put it where it is, but Proxmox may have.
fn bring_what_was_left(app: &App, config: &Config, slot: SlotId) -> Result<()> {
    let (handoff, by_hand) = (app.handoff(config), Owner::Manual(slot));
    let Some(record) = handoff.left_there(&by_hand, &[slot]) else {
        app.story.say(&already_home(app.kernel, slot));
        why_there(app, config, slot).iter().for_each(|why| app.story.warn(why));
        return Ok(());
    };
    handoff.plan_come_home(&record)?;
    match handoff.adopt(&by_hand, &[slot])? {
        Some(_) => handoff.come_home(&by_hand, Asker::Person),
        None => Ok(()),
    }
}

/// What [`to_nvidia`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan_to_nvidia(app: &App, slot: Option<SlotId>) -> Result<String> {
    let slot = choose_to_come_home(app, slot)?;
    let config = app.config_for_verb()?;
    let records = away(app, slot)?;
    let handoff = app.handoff(&config);
    if records.is_empty() {
        let left = handoff.left_there(&Owner::Manual(slot), &[slot]);
        return match left {
            Some(record) => Ok(home_to_text(&record, &handoff.plan_come_home(&record)?)),
            None => {
                let why = why_there(app, &config, slot).into_iter().map(|why| format!("  found     {why}\n"));
                Ok(format!("{}\n{}", already_home(app.kernel, slot), why.collect::<String>()))
            }
        };
    }
    records.iter().map(|record| Ok(home_to_text(record, &handoff.plan_come_home(record)?))).collect()
}

/// # Errors
/// When something could not be brought home.
pub fn reconcile(app: &App, scope: Scope) -> Result<()> {
    // As a hook: it also runs by itself, and a mistake in the configuration must not strand a GPU.
    let config = app.config_for_hook();
    if scope != Scope::All {
        app.kernel.end_with_this_run();
    }
    let done = app.handoff(&config).reconcile(scope);
    // Before any container starts: a rule for an earlier major would let it have the node and not open it.
    if scope == Scope::All {
        attach::refresh_all(app);
    }
    done
}

/// # Errors
/// As [`reconcile`].
pub fn resume(app: &App) -> Result<()> {
    attach::refresh_all(app);
    app.handoff(&app.config_for_hook()).resume()
}

/// What [`reconcile`] would do now, a line each.
///
/// # Errors
/// When something is stuck in the kernel with a slot.
pub fn plan_reconcile(app: &App, scope: Scope) -> Result<String> {
    let config = app.config_for_verb()?;
    let handoff = app.handoff(&config);
    let records = handoff.left_behind(scope);
    let missing = handoff.missing_nodes(scope);
    let lacks_uvm = handoff.lacks_uvm(scope);
    let pinned = handoff.left_pinned();
    if records.is_empty() && missing.is_empty() && !lacks_uvm && pinned.is_empty() {
        return Ok("nothing was left behind: nothing to do\n".to_string());
    }
    let plans = records.iter().map(|record| Ok(home_to_text(record, &handoff.plan_fetch(record)?)));
    let mut text = plans.collect::<Result<String>>()?;
    if lacks_uvm {
        text.push_str(&format!("a container has nvidia-uvm\n  {}\n", row("load", &nvidia::UVM)));
    }
    for vmid in pinned {
        text.push_str(&format!(
            "VM {vmid} was pinned\n  {}\n",
            row("put back", &"interrupts' affinities and governors")
        ));
    }
    if !missing.is_empty() {
        text.push_str(&format!("missing device nodes\n  {}\n", row("make", &nodes_to_text(&missing))));
    }
    Ok(text)
}

fn home_to_text(record: &Record, plan: &Plan) -> String {
    let slots = record.slots();
    plan::to_text(&format!("{} {} -> host", list(&slots), record.owner), &slots, plan)
}

/// The records that name this slot.
fn away(app: &App, slot: SlotId) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut problem = None;
    for record in app.store.each_record() {
        match record {
            Ok(record) if record.slots().contains(&slot) => records.push(record),
            Ok(_) => {}
            Err(error) => problem = Some(format!("{error:#}")),
        }
    }
    // One that cannot be read may be the one that says where this slot is at home.
    if let Some(problem) = problem {
        if records.is_empty() {
            refuse_unknown_home(app.kernel, slot, &problem)?;
        }
        app.story.warn(&problem);
    }
    Ok(records)
}

fn refuse_unknown_home(kernel: &dyn Kernel, slot: SlotId, problem: &str) -> Result<()> {
    let slot = Slot::read(kernel, slot);
    match slot.iter().flat_map(|slot| &slot.functions).find(|function| function.is_on(VFIO_PCI)) {
        Some(away) => Err(unknown_home(away.address, problem)),
        None => Ok(()),
    }
}

/// What put a card where it is that the host was to have, and what to type.
fn why_there(app: &App, config: &Config, slot: SlotId) -> Vec<String> {
    let mut why: Vec<String> =
        elsewhere::behind(app.kernel, &app.store, config, slot).iter().map(ToString::to_string).collect();
    if !why.is_empty() {
        why.push(causes::when_fixed());
    }
    why
}

fn already_home(kernel: &dyn Kernel, slot: SlotId) -> String {
    let gpu = Slot::read(kernel, slot).and_then(|slot| slot.gpu().cloned());
    match gpu.as_ref().and_then(|gpu| gpu.driver.as_deref()) {
        Some(VFIO_PCI) => format!("{slot} is at home on {VFIO_PCI}: no handoff of ours put it there, nothing to do"),
        Some(driver) => format!("{slot} is at home on {driver}: nothing to do"),
        None => format!("{slot} is at home without a driver: nothing to do"),
    }
}
