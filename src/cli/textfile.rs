//! The metrics as a file for node_exporter's textfile collector, written anew where a run ends that may have changed them.

use crate::App;
use crate::config::{Config, PATH};
use crate::exit::{Exit, Result};
use crate::report::measured;
use crate::report::metrics::Format;
use crate::report::status::Status;
use crate::sys::Share;
use crate::systemd;
use std::io;
use std::time::Duration;

/// For the look who uses what.
const LOOK: Duration = Duration::from_secs(2);

/// For another run that is writing it.
const TURN: Duration = Duration::from_secs(3);

/// Does the same as this program's `metrics --write`.
const UNIT: &str = "gpu-handoff-metrics.service";

/// Where it is wanted. That it cannot be written changes nothing about what this run has done. `waits`: somebody waits for
/// this run, who need not wait for that; a unit does it then, if there is one.
pub fn refresh(app: &App, waits: bool) {
    let Some(path) = Config::lenient(app.kernel).0.textfile else { return };
    if app.kernel.is_asked_to_end() {
        return;
    }
    let folders = ["/lib/systemd/system", "/etc/systemd/system"];
    let done = if waits && folders.iter().any(|folder| app.kernel.exists(&format!("{folder}/{UNIT}"))) {
        systemd::start(app.kernel, UNIT).map_err(|error| format!("{UNIT} was not started: {error}"))
    } else {
        write(app, &path).map_err(|error| format!("{path} was not written: {error}"))
    };
    if let Err(problem) = done {
        app.story.warn(&format!("{problem}; only the metrics are affected"));
    }
}

/// # Errors
/// That no file is configured, or cannot be written.
pub fn write_now(app: &App) -> Result<()> {
    let path = app.config_for_verb()?.textfile;
    let path =
        path.ok_or_else(|| Exit::usage(format!("metrics.textfile is not set in {PATH}: nothing to write to")))?;
    write(app, &path).map_err(|error| Exit::failed(format!("{path} was not written: {error}")))
}

fn write(app: &App, path: &str) -> io::Result<()> {
    // What is read is no older than what another run has just written.
    let turn = app.kernel.lock("/run/gpu-handoff/metrics.lock", Share::Alone, TURN)?;
    let _turn = turn.ok_or(io::ErrorKind::WouldBlock)?;
    let status = Status::read_within(app.kernel, &app.store, nix::unistd::geteuid().is_root(), Some(LOOK));
    let text = measured::read(app, &status).to_text(Format::Prometheus);
    app.kernel.write_lightly(path, text.as_bytes(), 0o644)
}
