//! What is done in a container: a script of our own that `pct exec` hands to `sh`. Only one of them runs at a time: one
//! that outlived the run which started it is waited for.

use super::seen::Seen;
use crate::App;
use crate::exit::{Exit, Result};
use crate::gpu::nodes;
use crate::sys::Kernel;
use crate::teller::{NO_TURN, Teller};
use std::time::Duration;

pub const PCT: &str = "/usr/sbin/pct";

/// Looking around in a container, on a busy machine.
const LOOK: Duration = Duration::from_secs(60);

/// Starting and stopping one. `pct` has limits of its own, of a minute each.
const TURN: Duration = Duration::from_secs(300);

/// Copying an installer.
const COPY: Duration = Duration::from_secs(900);

/// How long `pct reboot` lets a container shut down.
const SHUTDOWN: &str = "60";

/// In the container: held by whatever script of ours runs there.
const TURNS: &str = "/run/gpu-handoff-setup.lock";
const TURNS_LIMIT: &str = "600";

pub struct Inside<'a> {
    pub teller: Teller<'a>,
    pub ctid: u32,
}

impl<'a> Inside<'a> {
    /// # Errors
    /// When there can be no log.
    pub fn new(app: &'a App<'a>, ctid: u32) -> Result<Inside<'a>> {
        let teller = Teller::new(app, format!("container {ctid}"), &format!("container-{ctid}"))?;
        Ok(Inside { teller, ctid })
    }

    /// A script of ours in the container.
    ///
    /// # Errors
    /// As [`Teller::run`].
    pub fn inside(&self, what: &str, script: &str, arguments: &[&str], limit: Duration) -> Result<()> {
        let id = self.ctid.to_string();
        // The lock is the waiting flock's alone: a service that a package starts must not keep it.
        let no_turn = NO_TURN.to_string();
        let mut line = vec!["exec", &id, "--", "flock", "-o", "-w", TURNS_LIMIT, "-E", &no_turn, TURNS];
        line.extend(["/bin/sh", "-c", script, "sh"]);
        line.extend(arguments);
        self.teller.run(what, PCT, &line, limit, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn push(&self, from: &str, to: &str) -> Result<()> {
        let from = self.teller.app.kernel.path(from);
        let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let line = ["push", &self.ctid.to_string(), &from.to_string_lossy(), to, "--perms", "0600"];
        self.teller.run(&format!("copying {name}"), PCT, &line, COPY, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn start(&self) -> Result<()> {
        self.teller.run("starting it", PCT, &["start", &self.ctid.to_string()], TURN, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn restart(&self, why: &str) -> Result<()> {
        let line = ["reboot", &self.ctid.to_string(), "--timeout", SHUTDOWN];
        self.teller.run(&format!("restarting it, {why}"), PCT, &line, TURN, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn shut_down(&self, why: &str) -> Result<()> {
        let line = ["shutdown", &self.ctid.to_string(), "--forceStop", "1", "--timeout", SHUTDOWN];
        self.teller.run(&format!("stopping it, {why}"), PCT, &line, TURN, &String::new)
    }

    /// Files for a script of ours may lie there from now on, and no others do.
    ///
    /// # Errors
    /// As [`Teller::run`].
    pub fn make_room(&self) -> Result<()> {
        self.inside("making room for what is copied", include_str!("scripts/clean.sh"), &["keep"], LOOK)
    }
}

/// Looks into a running container, without a log and without waiting for anybody. `repository` is the one that apt
/// should know.
///
/// # Errors
/// pct's words.
pub fn look(kernel: &dyn Kernel, ctid: u32, repository: &str, package: &str) -> Result<Seen> {
    let id = ctid.to_string();
    let script = include_str!("scripts/look.sh");
    let live = live_nodes(kernel);
    let mut line = vec!["exec", &id, "--", "/bin/sh", "-c", script, "sh", repository, package];
    line.extend(live.iter().map(String::as_str));
    let said = kernel.program(PCT, &line, LOOK);
    let said = said.map_err(|error| Exit::failed(format!("container {ctid} cannot be looked into: {error}")))?;
    Ok(Seen::parse(&said))
}

/// The host's nodes with a driver behind them. To open any other has the kernel ask for its module, also while a VM has
/// the card.
pub fn live_nodes(kernel: &dyn Kernel) -> Vec<String> {
    let nodes = nodes::wanted(kernel).into_iter().map(|(path, _)| path);
    nodes.filter(|path| kernel.device_number(path).is_ok()).collect()
}
