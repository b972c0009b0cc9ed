//! The story of a handoff, line by line as it happens, on standard error and in syslog.
//!
//! Proxmox copies a hook's standard error into the task log. Standard output stays empty: Proxmox shows both streams
//! but does not keep their order.

use once_cell::unsync::OnceCell;
use std::cell::{Cell, RefCell};
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::Duration;
use syslog::{Facility, LogFormat, Logger, LoggerBackend};

const NAME: &str = "gpu-handoff";

/// `install   driver 550.163.01`: a line of what is done or would be, in the columns that all of them share.
pub fn row(verb: &str, what: &dyn fmt::Display) -> String {
    format!("{verb:<9} {what}")
}

pub struct Story {
    /// Opened by the first line, so that a run without one costs nothing. None without a syslog daemon.
    syslog: OnceCell<Option<RefCell<Logger<LoggerBackend, Plain>>>>,
    to_syslog: bool,
    to_stderr: bool,
    /// Only warnings and errors on standard error.
    is_quiet: Cell<bool>,
    warned: RefCell<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Severity {
    Info,
    Warning,
    Error,
}

impl Story {
    pub fn new(to_syslog: bool) -> Story {
        Story {
            syslog: OnceCell::new(),
            to_syslog,
            to_stderr: true,
            is_quiet: Cell::default(),
            warned: RefCell::default(),
        }
    }

    /// Tells nobody.
    pub fn silent() -> Story {
        Story { to_stderr: false, ..Story::new(false) }
    }

    /// The journal has all of it still.
    pub fn be_quiet(&self) {
        self.is_quiet.set(true);
    }

    pub fn say(&self, text: &str) {
        self.line(Severity::Info, text);
    }

    /// Each line below a title that was said.
    pub fn say_below(&self, lines: &str) {
        lines.lines().for_each(|line| self.say(&below(line)));
    }

    /// Once per run: what several parts of a run come across is still one problem.
    pub fn warn(&self, text: &str) {
        let mut warned = self.warned.borrow_mut();
        if warned.iter().any(|told| told == text) {
            return;
        }
        warned.push(text.to_string());
        self.line(Severity::Warning, text);
    }

    pub fn error(&self, text: &str) {
        self.line(Severity::Error, text);
    }

    /// One phase of a handoff, columns aligned with its neighbours.
    pub fn phase(&self, name: &str, took: Duration, what: &str) {
        self.say(&below(&row(name, &format_args!("{:>6} ms  {what}", took.as_millis()))));
    }

    fn line(&self, severity: Severity, text: &str) {
        let label = severity.label();
        let text = printable(text);
        if self.to_stderr && !(severity == Severity::Info && self.is_quiet.get()) {
            let mut stderr = std::io::stderr();
            let is_plain = severity == Severity::Info || !wants_colour(stderr.is_terminal(), |name| env::var_os(name));
            let (on, off) = if is_plain { ("", "") } else { (severity.colour(), "\x1b[0m") };
            // Nobody reading is no reason to stop half-way.
            let _ = stderr.write_all(format!("{NAME}: {on}{label}{off}{text}\n").as_bytes());
        }
        if !self.to_syslog {
            return;
        }
        let text = &*format!("{label}{text}");
        if let Some(logger) = self.syslog.get_or_init(open_syslog) {
            let mut logger = logger.borrow_mut();
            let _ = match severity {
                Severity::Info => logger.info(text),
                Severity::Warning => logger.warning(text),
                Severity::Error => logger.err(text),
            };
        }
    }
}

impl Severity {
    fn label(self) -> &'static str {
        match self {
            Severity::Info => "",
            Severity::Warning => "warning: ",
            Severity::Error => "error: ",
        }
    }

    fn colour(self) -> &'static str {
        if self == Severity::Error { "\x1b[31m" } else { "\x1b[33m" }
    }
}

/// What would be done: a title, and below it a line for each thing.
pub fn titled(title: &str, lines: &str) -> String {
    lines.lines().fold(format!("{title}\n"), |text, line| text + &below(line) + "\n")
}

fn below(line: &str) -> String {
    format!("  {line}")
}

/// Only a person who looks at a terminal that has colours, and does not mind (no-color.org).
fn wants_colour(is_terminal: bool, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is_set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    is_terminal && !is_set("NO_COLOR") && variable("TERM").is_some_and(|term| term != "dumb")
}

/// For text that came from programs or containers: nothing that a terminal or a log would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// As in RFC 3164, but for the time, which the receiver adds: the crate's own formatters write UTC without saying so.
#[derive(Clone)]
struct Plain;

impl LogFormat<&str> for Plain {
    fn format<W: Write>(&self, to: &mut W, severity: syslog::Severity, text: &str) -> syslog::Result<()> {
        let priority = Facility::LOG_DAEMON as u8 | severity as u8;
        write!(to, "<{priority}>{NAME}[{}]: {text}", std::process::id()).map_err(syslog::Error::Write)
    }
}

fn open_syslog() -> Option<RefCell<Logger<LoggerBackend, Plain>>> {
    let logger = syslog::unix(Plain).ok()?;
    // A journal that takes nothing more must not hold a handoff.
    match &logger.backend {
        LoggerBackend::Unix(socket) => socket.set_nonblocking(true).ok()?,
        _ => return None,
    }
    Some(RefCell::new(logger))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_for_whom() {
        for (is_terminal, variables, wanted) in [
            (true, &[("TERM", "xterm")][..], true),
            (true, &[("TERM", "xterm"), ("NO_COLOR", "")], true),
            (true, &[("TERM", "xterm"), ("NO_COLOR", "1")], false),
            (true, &[("TERM", "dumb")], false),
            (true, &[], false),
            (false, &[("TERM", "xterm")], false),
        ] {
            let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
            assert_eq!(wants_colour(is_terminal, variable), wanted, "{is_terminal} {variables:?}");
        }
    }

    #[test]
    fn below_a_title() {
        assert_eq!(titled("setup vfio", "write     x\nrun       y\n"), "setup vfio\n  write     x\n  run       y\n");
    }

    #[test]
    fn a_line_for_syslog() {
        let mut line = Vec::new();
        Plain.format(&mut line, syslog::Severity::LOG_WARNING, "a text").unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), format!("<28>gpu-handoff[{}]: a text", std::process::id()));
    }
}
