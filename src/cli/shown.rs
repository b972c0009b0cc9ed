//! What is written to standard output, and the status there, once or whenever it changes.

use crate::App;
use crate::config::Config;
use crate::doctor;
use crate::events::stray;
use crate::exit::{Exit, Result};
use crate::handoff::kept::store::DIRECTORY;
use crate::handoff::plan::pin;
use crate::json::put;
use crate::report::cluster::Nodes;
use crate::report::screen;
use crate::report::status::Status;
use crate::report::zone::Zone;
use crate::sys::{has_reader, heed_termination};
use std::env;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

/// Who uses a card, and how a VM is, is in no file of ours.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A file that was written has its name soon after, and is mostly not the only one.
const SETTLES: Duration = Duration::from_millis(200);

/// Of all processes together; a large host is not to be busy with it.
const SHARE: u32 = 4;

/// The cursor goes to the upper left, and what stood there goes.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// A reader that has seen enough is no failure.
pub fn print(text: &str) -> Result<()> {
    write(text).map(drop)
}

/// False when nobody reads any more.
fn write(text: &str) -> Result<bool> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Exit::failed(format!("standard output: {error}"))),
    }
}

pub fn zone(app: &App) -> Zone {
    Zone::read(env::var("TZ").ok().as_deref(), |path| app.kernel.path(path))
}

/// # Errors
/// With `check`, what is not as it should be.
pub fn status(app: &App, json: bool, check: bool) -> Result<()> {
    let status = read(app);
    for problem in status.problems() {
        app.story.warn(problem);
    }
    print(&to_text(app, &status, json))?;
    match status.faults().as_slice() {
        faults @ [_, ..] if check => Err(Exit::failed(format!("not as it should be: {}", faults.join("; ")))),
        _ => Ok(()),
    }
}

/// Shows the status whenever it is another, until somebody ends it or nobody reads any more.
///
/// # Errors
/// When it cannot be written.
pub fn watch(app: &App, json: bool) -> Result<()> {
    heed_termination();
    let is_terminal = std::io::stdout().is_terminal();
    let mut shown = String::new();
    while !app.kernel.is_asked_to_end() && has_reader() {
        let begin = app.kernel.now();
        let status = read(app);
        let mut text = to_text(app, &status, json);
        if !json {
            status.problems().for_each(|problem| text.push_str(&format!("warning: {problem}\n")));
        }
        if text != shown {
            let before = match (is_terminal, json) {
                (true, false) => CLEAR,
                (false, false) if !shown.is_empty() => "\n",
                _ => "",
            };
            if !write(&format!("{before}{text}"))? {
                break;
            }
            shown = text;
        }
        let took = app.kernel.now().saturating_sub(begin);
        app.kernel.await_any(&[], &[DIRECTORY.to_string()], LOOK_AGAIN.max(took * SHARE));
        app.kernel.sleep(SETTLES);
    }
    Ok(())
}

/// What each node of the cluster has told last.
///
/// # Errors
/// When it cannot be written.
pub fn cluster(app: &App, json: bool) -> Result<()> {
    let nodes = Nodes::read(app.kernel, &read(app));
    if json {
        return print(&format!("{}\n", nodes.to_json()));
    }
    nodes.problems().for_each(|problem| app.story.warn(problem));
    print(&nodes.to_text(&zone(app)))
}

fn read(app: &App) -> Status {
    let mut status = Status::read(app.kernel, &app.store, nix::unistd::geteuid().is_root());
    status.add_mistakes(stray::of_config(app).iter().map(ToString::to_string));
    status.add_mistakes(pin::mistakes_of(app.kernel, &Config::own(app.kernel)));
    status
}

fn to_text(app: &App, status: &Status, json: bool) -> String {
    if !json {
        return screen::to_text(status, &zone(app));
    }
    let mut document = status.to_json();
    put(&mut document, "findings", doctor::in_files(app, status));
    format!("{document}\n")
}
