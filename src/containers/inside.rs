//! Commands that take long, on the host and inside a container: what they say goes to a log, how they get on to whoever
//! waits, and each has an end.
//!
//! Inside, everything is a script of our own that `pct exec` hands to `sh`. Only one of them runs at a time: one that
//! outlived the run which started it is waited for.

use super::seen::Seen;
use crate::App;
use crate::gpu::nodes;
use crate::stop::{Result, Stop};
use crate::sys::Kernel;
use std::cell::{Cell, RefCell};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::time::Duration;

pub const PCT: &str = "/usr/sbin/pct";

const LOGS: &str = "/var/log/gpu-handoff";

/// A log that has grown to this begins anew, and the old one is kept beside it.
const ENOUGH: u64 = 4 * 1024 * 1024;

/// What one run may add to it of what programs say. A container may say as much as it likes.
const MOST: usize = 16 * 1024 * 1024;

/// After its end, what a program said is read this often at most: something that it started may go on talking.
const REST: usize = 16;

/// How often somebody who waits is told how it gets on.
const TELL_AGAIN: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Between asking a command to end and making it.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// What `flock` ends with when it got no turn.
const NO_TURN: &str = "75";

pub struct Teller<'a> {
    pub app: &'a App,
    pub ctid: u32,
    log: RefCell<File>,
    /// Bytes that the log yet takes.
    room: Cell<usize>,
}

impl<'a> Teller<'a> {
    /// # Errors
    /// When there can be no log.
    pub fn new(app: &'a App, ctid: u32) -> Result<Teller<'a>> {
        let log = open_log(app, ctid).map_err(|error| Stop::failed(format!("{}: {error}", log_path(ctid))))?;
        Ok(Teller { app, ctid, log: RefCell::new(log), room: Cell::new(MOST) })
    }

    pub fn say(&self, text: &str) {
        self.log_line(text);
        self.app.story.say(&format!("container {}: {text}", self.ctid));
    }

    /// A full disk must not end what goes well.
    fn log_line(&self, text: &str) {
        let _ = writeln!(self.log.borrow_mut(), "{} {text}", self.app.kernel.unix_time());
    }

    /// Runs a program of the host to its end. `what` is said before: "installing the driver". `so_far` is asked now and
    /// then, and when it has nothing to say the program's last line is told.
    ///
    /// # Errors
    /// What the program said last, and where the rest is.
    pub fn run(
        &self,
        what: &str,
        program: &str,
        arguments: &[&str],
        limit: Duration,
        so_far: &dyn Fn() -> String,
    ) -> Result<()> {
        let kernel = &self.app.kernel;
        self.say(what);
        let begin = kernel.now();
        let mut talking =
            kernel.start_talking(program, arguments).map_err(|error| self.failed(what, &error.to_string()))?;
        let mut said = Said::default();
        let mut told = begin;
        let ended = loop {
            let ended = talking.ended();
            for _ in 0..if ended.is_some() { REST } else { 1 } {
                let more = talking.said();
                if more.is_empty() {
                    break;
                }
                let _ = write_some(&mut *self.log.borrow_mut(), &self.room, &more);
                said.add(&more);
            }
            if let Some(ended) = ended {
                break ended;
            }
            let now = kernel.now();
            if kernel.is_asked_to_end() {
                talking.end(PATIENCE);
                return Err(Stop::failed(format!(
                    "container {}: {what} was interrupted; the same call goes on from there",
                    self.ctid
                )));
            }
            if now.saturating_sub(begin) >= limit {
                talking.end(PATIENCE);
                return Err(self.failed(what, &format!("it did not end within {} minutes", limit.as_secs() / 60)));
            }
            if now.saturating_sub(told) >= TELL_AGAIN {
                told = now;
                let how = Some(so_far()).filter(|text| !text.is_empty()).or_else(|| said.last());
                let how = how.map_or_else(String::new, |line| format!(": {line}"));
                let seconds = now.saturating_sub(begin).as_secs();
                self.app.story.say(&format!("container {}: {what}, {seconds} s{how}", self.ctid));
            }
            kernel.sleep(LOOK_AGAIN);
        };
        if ended.is_empty() {
            return Ok(());
        }
        if ended.ends_with(&format!(": {NO_TURN}")) {
            return Err(self.failed(what, "something that an earlier run started is still at work there"));
        }
        let why = said.why().unwrap_or(ended);
        Err(self.failed(what, &why))
    }

    fn failed(&self, what: &str, why: &str) -> Stop {
        let ctid = self.ctid;
        Stop::failed(format!("container {ctid}: {what} failed: {why} (log: {})", log_path(ctid)))
    }

    /// A script of ours in the container.
    ///
    /// # Errors
    /// As [`Teller::run`].
    pub fn inside(&self, what: &str, script: &str, arguments: &[&str], limit: Duration) -> Result<()> {
        let id = self.ctid.to_string();
        // The lock is the waiting flock's alone: a service that a package starts must not keep it.
        let mut line = vec!["exec", &id, "--", "flock", "-o", "-w", TURNS_LIMIT, "-E", NO_TURN, TURNS];
        line.extend(["/bin/sh", "-c", script, "sh"]);
        line.extend(arguments);
        self.run(what, PCT, &line, limit, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn push(&self, from: &str, to: &str) -> Result<()> {
        let from = self.app.kernel.path(from);
        let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let line = ["push", &self.ctid.to_string(), &from.to_string_lossy(), to, "--perms", "0600"];
        self.run(&format!("copying {name}"), PCT, &line, COPY, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn start(&self) -> Result<()> {
        self.run("starting it", PCT, &["start", &self.ctid.to_string()], TURN, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn restart(&self, why: &str) -> Result<()> {
        let line = ["reboot", &self.ctid.to_string(), "--timeout", SHUTDOWN];
        self.run(&format!("restarting it, {why}"), PCT, &line, TURN, &String::new)
    }

    /// # Errors
    /// As [`Teller::run`].
    pub fn shut_down(&self, why: &str) -> Result<()> {
        let line = ["shutdown", &self.ctid.to_string(), "--forceStop", "1", "--timeout", SHUTDOWN];
        self.run(&format!("stopping it, {why}"), PCT, &line, TURN, &String::new)
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
    let said = said.map_err(|error| Stop::failed(format!("container {ctid} cannot be looked into: {error}")))?;
    Ok(Seen::parse(&said))
}

/// The host's nodes with a driver behind them. To open any other has the kernel ask for its module, also while a VM has
/// the card.
pub fn live_nodes(kernel: &dyn Kernel) -> Vec<String> {
    let nodes = nodes::wanted(kernel).into_iter().map(|(path, _)| path);
    nodes.filter(|path| kernel.device_number(path).is_ok()).collect()
}

pub fn log_path(ctid: u32) -> String {
    format!("{LOGS}/container-{ctid}.log")
}

/// As much as there is room for, and once that the rest is left out.
fn write_some(log: &mut dyn Write, room: &Cell<usize>, bytes: &[u8]) -> std::io::Result<()> {
    let had = room.get();
    room.set(had.saturating_sub(bytes.len()));
    log.write_all(&bytes[..bytes.len().min(had)])?;
    if had > 0 && room.get() == 0 { log.write_all(b"\n[the rest is left out]\n") } else { Ok(()) }
}

fn open_log(app: &App, ctid: u32) -> std::io::Result<File> {
    let path = app.kernel.path(&log_path(ctid));
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    match fs::metadata(&path) {
        Ok(file) if file.len() >= ENOUGH => fs::rename(&path, path.with_extension("log.1"))?,
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create(true).mode(0o640).open(&path)
}

/// The end of what a program said, by lines.
#[derive(Default)]
struct Said {
    lines: Vec<String>,
    unfinished: Vec<u8>,
}

impl Said {
    const KEPT: usize = 50;
    const LONG: usize = 300;

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            // A progress bar goes back to the beginning of its line.
            if matches!(byte, b'\n' | b'\r') {
                self.end_line();
            } else if self.unfinished.len() < Said::LONG {
                self.unfinished.push(*byte);
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.unfinished);
        let text: String = String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).collect();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.is_empty() {
            return;
        }
        if self.lines.len() == Said::KEPT {
            self.lines.remove(0);
        }
        self.lines.push(text);
    }

    fn last(&self) -> Option<String> {
        self.lines.last().cloned()
    }

    /// The lines that say what is wrong, or else the last ones, as one line.
    fn why(mut self) -> Option<String> {
        const ENOUGH: usize = 3;
        self.end_line();
        let is_why = |line: &&String| {
            ["E: ", "ERROR", "dpkg: error", "curl: "].iter().any(|sign| line.starts_with(sign))
                || line.contains("No space left")
        };
        let telling: Vec<&String> = self.lines.iter().filter(is_why).collect();
        let chosen = if telling.is_empty() { self.lines.iter().collect() } else { telling };
        let from = chosen.len().saturating_sub(ENOUGH);
        let lines: Vec<&str> = chosen[from..].iter().map(|line| line.as_str()).collect();
        (!lines.is_empty()).then(|| lines.join(" | "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(text: &str) -> Option<String> {
        let mut said = Said::default();
        said.add(text.as_bytes());
        said.why()
    }

    #[test]
    fn why_it_failed_is_told_in_one_line() {
        assert_eq!(why(""), None);
        assert_eq!(why("one\ntwo\n\nthree\r\nfour").as_deref(), Some("two | three | four"));
        assert_eq!(
            why("Reading\nE: Unable to locate package x\nbye\n").as_deref(),
            Some("E: Unable to locate package x")
        );
        assert_eq!(
            why("10%\r20%\r\x1b[1mtar: x: No space left on device\n").as_deref(),
            Some("[1mtar: x: No space left on device")
        );
        let long = "x".repeat(10_000);
        assert!(why(&long).is_some_and(|text| text.len() == Said::LONG));
    }

    #[test]
    fn a_log_takes_so_much_and_says_where_it_stops() {
        let (mut log, room) = (Vec::new(), Cell::new(10));
        for _ in 0..4 {
            write_some(&mut log, &room, b"sixsix").unwrap();
        }
        assert_eq!(log, b"sixsixsixs\n[the rest is left out]\n");
    }

    #[test]
    fn only_the_end_of_very_much_is_kept() {
        let mut said = Said::default();
        for number in 0..1000 {
            said.add(format!("{number}\n").as_bytes());
        }
        assert_eq!(said.lines.len(), Said::KEPT);
        assert_eq!(said.last().as_deref(), Some("999"));
    }
}
