//! The command line: one table of verbs makes the parser and all help.

mod call;
mod flags;
mod given;
mod help;
mod news;
mod parse;
mod publish;
mod shown;
mod textfile;
mod verbs;

pub use call::{Asked, Call};
pub use flags::{Argument, Flag, OUTPUT_FORMAT, QUIET, Term, Value};
pub use parse::parse;
pub use verbs::{Heading, VERBS, Verb};

use crate::App;
use crate::config::{self, Config};
use crate::containers;
use crate::doctor;
use crate::events::{hookscript, manual, settle, stray, switch, udev, vzdump, watch};
use crate::exit::{Exit, Result};
use crate::handoff::kept::history::History;
use crate::handoff::plan::pin;
use crate::handoff::way::reconcile::Scope;
use crate::report::measured;
use crate::report::metrics::Format;
use crate::report::status::Status;
use crate::report::{self, history};
use crate::setup::{self, driver, hookscript as registration};
use shown::{print, zone};

/// # Errors
/// What the caller must be told, with its exit code.
pub fn run(app: &App, asked: &Asked) -> Result<()> {
    let call = &asked.call;
    if asked.quiet {
        app.story.be_quiet();
    }
    let changes = asked.changes();
    if changes && app.kernel.is_real() && !nix::unistd::geteuid().is_root() {
        return Err(Exit::failed("only root can do that; nothing was touched; try again with sudo"));
    }
    if !changes && !matches!(call, Call::Hook { .. }) {
        app.kernel.end_with_this_run();
    }
    if asked.dry_run {
        return print(&would(app, call)?);
    }
    let done = do_it(app, call);
    let is_due = match call {
        // For most guests they change nothing.
        Call::Hook { .. } | Call::Watch { .. } | Call::Vzdump { .. } => app.store.is_changed(),
        // udev waits for it, and has the rest done in a unit.
        Call::Udev | Call::Metrics { .. } | Call::Notify { .. } | Call::Publish => false,
        _ => changes,
    };
    // At boot, and when a person did something.
    let is_certain = !matches!(call, Call::Reconcile { scope: Scope::Owed | Scope::Unfinished } | Call::Settle);
    if is_due {
        textfile::refresh(app, matches!(call, Call::Hook { .. } | Call::Watch { .. } | Call::Vzdump { .. }));
        news::ask(app, is_certain);
    }
    let is_told = match call {
        // Proxmox waits for a start, and its watcher comes here in a moment.
        Call::Hook { phase, .. } if phase == "pre-start" && done.is_ok() => false,
        Call::Watch { .. } => true,
        _ => is_due && (is_certain || app.store.is_changed()),
    };
    if is_told {
        publish::ask(app);
    }
    match call {
        Call::Vzdump { words } => vzdump::chain(app, words),
        _ => done,
    }
}

/// What a call would do, a line each.
///
/// # Errors
/// Why it would refuse.
fn would(app: &App, call: &Call) -> Result<String> {
    Ok(match call {
        Call::ToVfio { slot, .. } => manual::plan_to_vfio(app, *slot)?,
        Call::ToNvidia { slot, .. } => manual::plan_to_nvidia(app, *slot)?,
        Call::Switch { vmid } => switch::plan(app, *vmid)?,
        Call::Reconcile { scope, .. } => manual::plan_reconcile(app, *scope)?,
        Call::Attach { ctid, wish, .. } => containers::attach::plan(app, *ctid, wish)?,
        Call::Detach { ctid, .. } => containers::detach::plan(app, *ctid)?,
        Call::ContainerSetup { ctid, wish, driver_only, .. } => {
            containers::setup::plan(app, *ctid, wish, *driver_only)?
        }
        Call::Sync { who, .. } => containers::sync::plan_sync(app, *who)?,
        Call::Enable { id, storage } => registration::plan_enable(app, *id, storage.as_deref())?,
        Call::Disable { id, .. } => registration::plan_disable(app, *id)?,
        Call::HostSetup { what, .. } => setup::plan(app, what)?,
        Call::Doctor(wish) => doctor::plan(app, wish)?,
        // The table of verbs has no such flag for any other.
        _ => return Err(given::usage("--dry-run goes with a verb that changes something")),
    })
}

fn do_it(app: &App, call: &Call) -> Result<()> {
    match call {
        Call::Hook { id, phase } => hookscript::run(app, *id, phase),
        Call::ToVfio { slot, .. } => manual::to_vfio(app, *slot),
        Call::ToNvidia { slot, .. } => manual::to_nvidia(app, *slot),
        Call::Plan { vmid, json: false } => print(&hookscript::plan(app, *vmid)?.to_text()),
        Call::Plan { vmid, json: true } => {
            let planned = hookscript::plan(app, *vmid);
            print(&format!("{}\n", report::plan::to_json(*vmid, &planned)))?;
            planned.map(|_| ())
        }
        Call::Switch { vmid } => switch::switch(app, *vmid),
        Call::Reconcile { scope, .. } => {
            driver::services::start_forgotten(app);
            manual::reconcile(app, *scope)
        }
        Call::Resume => manual::resume(app),
        Call::Watch { vmid, after } => watch::run(app, *vmid, *after),
        Call::Attach { ctid, wish, .. } => containers::attach::attach(app, *ctid, wish),
        Call::Detach { ctid, .. } => containers::detach::detach(app, *ctid),
        Call::ContainerSetup { ctid, wish, driver_only, .. } => {
            containers::setup::setup(app, *ctid, wish, *driver_only)
        }
        Call::Check { who } => {
            let (report, done) = containers::check::check(app, *who)?;
            print(&report)?;
            done
        }
        Call::Sync { who, .. } => containers::sync::sync(app, *who),
        Call::Enable { id, storage } => registration::enable(app, *id, storage.as_deref()),
        Call::Disable { id, .. } => registration::disable(app, *id),
        Call::HostSetup { what, .. } => setup::run(app, what),
        Call::ConfigCheck => check_config(app),
        Call::ConfigShow => print(&report::config::to_text(&config::effective(app.kernel).map_err(Exit::usage)?)),
        Call::Udev => udev::run(app),
        Call::Settle => settle::run(app),
        Call::Publish => publish::publish(app),
        Call::Vzdump { words } => {
            vzdump::run(app, words);
            Ok(())
        }
        Call::Doctor(wish) => {
            let (text, outcome) = doctor::run(app, wish)?;
            print(&text)?;
            outcome
        }
        Call::Status { json, check } => shown::status(app, *json, *check),
        Call::WatchStatus { json } => shown::watch(app, *json),
        Call::ClusterStatus { json } => shown::cluster(app, *json),
        Call::Metrics { write: true } => textfile::write_now(app),
        Call::Metrics { write: false } => metrics(app),
        Call::Notify { test: true } => news::test(app),
        Call::Notify { test: false } => news::tell(app),
        Call::History { json, vmid, count } => past(app, *json, *vmid, *count),
        Call::Help { topic } => print(&help::help(topic)),
        Call::Everyday => {
            print(&help::everyday())?;
            Err(given::usage("nothing to do"))
        }
        Call::Version => print(concat!("gpu-handoff ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}

fn metrics(app: &App) -> Result<()> {
    let status = Status::read(app.kernel, &app.store, nix::unistd::geteuid().is_root());
    for problem in status.problems() {
        app.story.warn(problem);
    }
    print(&measured::read(app, &status).to_text(Format::Open))
}

fn past(app: &App, json: bool, vmid: Option<u32>, count: Option<usize>) -> Result<()> {
    let mut past = app.store.history().map(History::read).transpose()?.unwrap_or_default();
    for problem in &past.problems {
        app.story.warn(problem);
    }
    history::choose(&mut past, vmid, count);
    if json {
        return print(&history::to_json(&past));
    }
    print(&history::to_text(&past, &zone(app)))
}

fn check_config(app: &App) -> Result<()> {
    let (_, mut problems) = Config::read(app.kernel).map_err(Exit::usage)?;
    problems.extend(stray::of_config(app).iter().map(ToString::to_string));
    problems.extend(pin::mistakes_of(app.kernel, &Config::own(app.kernel)));
    match problems.as_slice() {
        [] => print(&format!("{}: nothing is wrong\n", config::files(app.kernel).join(", "))),
        [problem] => Err(Exit::usage(problem.as_str())),
        [others @ .., last] => {
            others.iter().for_each(|problem| app.story.error(problem));
            Err(Exit::usage(last.as_str()))
        }
    }
}
