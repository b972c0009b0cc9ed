//! The metrics as a file for node_exporter's textfile collector, written anew where a run ends that may have changed them.

use crate::App;
use crate::config::{Config, PATH};
use crate::exit::{Exit, Result};
use crate::report::measured;
use crate::report::metrics::Format;
use crate::report::status::Status;
use crate::sys::Share;
use std::io;
use std::time::Duration;

/// For the look who uses what. A hook that is through with its work is not kept for more.
const LOOK: Duration = Duration::from_secs(2);

/// For another run that is writing it.
const TURN: Duration = Duration::from_secs(3);

/// Where it is wanted. That it cannot be written changes nothing about what this run has done.
pub fn refresh(app: &App) {
    let Some(path) = Config::lenient(app.kernel).0.textfile else { return };
    if app.kernel.is_asked_to_end() {
        return;
    }
    if let Err(error) = write(app, &path) {
        app.story.warn(&format!("{path} was not written: {error}; only the metrics are affected"));
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
