//! What this node has is told to the others of its cluster, in a file that all of them see. A run that may have changed
//! something has a unit look; nobody waits for that, nor for Proxmox's cluster file system, which may take its time.

use crate::App;
use crate::exit::{Exit, Result};
use crate::handoff::kept::told::{Told, path};
use crate::proxmox::cluster;
use crate::report::cluster::of_this_node;
use crate::report::status::Status;
use crate::sys::Share;
use crate::systemd;
use crate::utc::utc;
use std::time::Duration;

/// For the look who uses what.
const LOOK: Duration = Duration::from_secs(5);

/// For another run that is at it.
const TURN: Duration = Duration::from_secs(60);

/// Each change goes to every node's disk: this far apart at least, in seconds.
const APART: u64 = 10;

/// Without quorum nothing can be written; it is tried again that often.
const PAUSE: Duration = Duration::from_secs(30);
const ATTEMPTS: usize = 20;

const LOCK: &str = "/run/gpu-handoff/publish.lock";
const NEXT_LOCK: &str = "/run/gpu-handoff/publish-next.lock";

pub const VERB: &str = "publish";

/// The end of a run after which something may be otherwise.
pub fn ask(app: &App) {
    if cluster::is_in_one(app.kernel) && !app.kernel.is_asked_to_end() {
        let unit = format!("gpu-handoff-publish-{}", std::process::id());
        // Not worth a word: the next change is told as well.
        let _ = systemd::begin_later(app.kernel, &unit, &[VERB]);
    }
}

/// Tells it, if it is another than before. That it cannot be told is no failure: without quorum nobody could read it.
///
/// # Errors
/// When a file of our own cannot be locked.
pub fn publish(app: &App) -> Result<()> {
    if !cluster::is_in_one(app.kernel) {
        return Ok(());
    }
    let lock = |path: &str, limit| {
        app.kernel.lock(path, Share::Alone, limit).map_err(|error| Exit::failed(format!("{path}: {error}")))
    };
    // Who waits for its turn will see what this run has to tell.
    let Some(next) = lock(NEXT_LOCK, Duration::ZERO)? else { return Ok(()) };
    let Some(_turn) = lock(LOCK, TURN)? else { return Ok(()) };
    drop(next);
    let node = cluster::this_node(app.kernel);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            app.kernel.sleep(PAUSE);
        }
        if app.kernel.is_asked_to_end() || try_to_tell(app, &node) {
            break;
        }
    }
    Ok(())
}

/// False when it is to be tried again.
fn try_to_tell(app: &App, node: &str) -> bool {
    let before = Told::read(app.kernel, node).ok().flatten();
    let now = app.kernel.unix_time();
    let is_soon = |told: &Told| told.time <= utc(now) && told.age(now) < APART;
    if let Some(told) = before.as_ref().filter(|told| is_soon(told)) {
        app.kernel.sleep(Duration::from_secs(APART - told.age(now)));
    }
    let status = Status::read_within(app.kernel, &app.store, nix::unistd::geteuid().is_root(), Some(LOOK));
    let told = of_this_node(app.kernel, &status);
    if before.is_some_and(|before| before == Told { time: before.time.clone(), ..told.clone() }) {
        return true;
    }
    // As the file system says itself: root is let in all the same.
    let takes_changes = app.kernel.is_writable("/etc/pve/local").unwrap_or(true);
    let text = format!("{}\n", told.to_json());
    takes_changes && app.kernel.write_lightly(&path(node), text.as_bytes(), 0o640).is_ok()
}
