//! News go to an administrator by Proxmox's own notifications, with whatever targets and matchers those have. A run that may
//! have changed something only has a unit look; sending is done there, and nobody waits for it.

use crate::App;
use crate::config::{Config, PATH};
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::Progress;
use crate::proxmox::cluster;
use crate::proxmox::running::is_alive;
use crate::report::news::{self, Book, Item};
use crate::report::status::Status;
use crate::sys::Share;
use crate::systemd;
use std::time::Duration;

const PERL: &str = "/usr/bin/perl";

/// Of libpve-notify-perl. Proxmox VE 7 has none.
const MODULE: &str = "/usr/share/perl5/PVE/Notify.pm";

/// Where it has the texts of notifications since pve-cluster 8.0.7, in two files for each name; ours are in the package.
/// Before, since 8.0.5, the texts themselves are handed over.
const TEMPLATES: &str = "/usr/share/pve-manager/templates/default";

const PROGRAM: &str = include_str!("notify.pl");

/// For the look who uses what.
const LOOK: Duration = Duration::from_secs(5);

/// For another run that is sending.
const TURN: Duration = Duration::from_secs(300);

/// A mail server may take its time.
const SENDING: Duration = Duration::from_secs(60);

/// The end of a run: a unit looks whether there is news, where that is wanted and something is or was wrong. `is_certain`:
/// this run may have put that right, or wrong.
pub fn ask(app: &App, is_certain: bool) {
    let wanted = !Config::lenient(app.kernel).0.notify.is_empty() && app.kernel.exists(MODULE);
    if !wanted || app.kernel.is_asked_to_end() || !(is_certain || app.store.is_changed() || is_due(app)) {
        return;
    }
    let unit = format!("gpu-handoff-notify-{}", std::process::id());
    // Not worth a word: the keeper asks again.
    let _ = systemd::begin_later(app.kernel, &unit, &["notify"]);
}

/// The keeper comes every few seconds, and mostly because a VM has a card as it should.
fn is_due(app: &App) -> bool {
    let book = Book::read(app.kernel);
    let is_wrong = || {
        let mut records = app.store.each_record().into_iter().flatten();
        let is_nobodys = |id: u32| !is_alive(app.kernel, id);
        !app.store.wedged_slots().is_empty()
            || app.store.to_start().is_ok_and(|entries| entries.iter().any(|entry| entry.since == 0))
            || records.any(|one| one.progress != Progress::Away || one.owner.vmid().is_some_and(is_nobodys))
    };
    book.is_due(app.kernel.unix_time()) || (book.is_empty() && is_wrong())
}

/// Looks, and sends what is to be told by now.
///
/// # Errors
/// When it was not sent; it is tried again later.
pub fn tell(app: &App) -> Result<()> {
    let config = app.config_for_hook();
    if config.notify.is_empty() {
        return Err(Exit::usage(format!("notify.about is not set in {PATH}: nothing is told")));
    }
    if !app.kernel.exists(MODULE) {
        return Ok(());
    }
    // What is read is no older than what another run has just told.
    let turn = app
        .kernel
        .lock("/run/gpu-handoff/news.lock", Share::Alone, TURN)
        .map_err(|error| Exit::failed(error.to_string()))?;
    let Some(_turn) = turn else { return Err(Exit::locked("another run is sending still")) };
    let status = Status::read_within(app.kernel, &app.store, nix::unistd::geteuid().is_root(), Some(LOOK));
    let mut book = Book::read(app.kernel);
    let due = book.take_in(&news::now(app.kernel, &config, &status), &news::moving(&status), app.kernel.unix_time());
    let mut outcome = Ok(());
    for item in due {
        let sent = send(app, &item, item.severity());
        book.note(&item, sent.is_ok(), app.kernel.unix_time());
        match sent {
            Ok(_) => app.story.say(&format!("told: {}", item.title)),
            Err(problem) => outcome = Err(Exit::failed(format!("not told: {}: {problem}", item.title))),
        }
    }
    book.write(app.kernel).map_err(|error| Exit::failed(format!("what was told is not kept: {error}")))?;
    outcome
}

/// Whether one arrives.
///
/// # Errors
/// Why Proxmox does not take it.
pub fn test(app: &App) -> Result<()> {
    if !app.kernel.exists(MODULE) {
        return Err(Exit::failed(format!("this host has no notifications: there is no {MODULE}")));
    }
    let more = "Nothing is wrong. It says that notifications of gpu-handoff arrive.".to_string();
    let item = Item { slot: None, reason: "test", title: "a test of gpu-handoff".to_string(), more };
    let said =
        send(app, &item, "info").map_err(|problem| Exit::failed(format!("Proxmox did not take it: {problem}")))?;
    said.lines().for_each(|line| app.story.warn(line));
    app.story.say("Proxmox has taken it; who gets it is in the web interface, under Datacenter, Notifications");
    Ok(())
}

/// What was said meanwhile.
fn send(app: &App, item: &Item, severity: &str) -> std::result::Result<String, String> {
    let node = cluster::this_node(app.kernel);
    let title = format!("{node}: {}", item.title);
    let message = format!("{title}\n\n{}", item.more);
    let slot = item.slot.map(|slot| slot.to_string());
    let template = if app.kernel.exists(TEMPLATES) { "gpu-handoff" } else { "" };
    let mut line = vec!["-MPVE::Notify", "-e", PROGRAM, "--", template, severity, &title, &message];
    line.extend(["type", "gpu-handoff", "hostname", &node, "reason", item.reason]);
    if let Some(slot) = &slot {
        line.extend(["slot", slot]);
    }
    app.kernel.program(PERL, &line, SENDING).map_err(|error| error.to_string())
}
