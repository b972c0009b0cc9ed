//! The story of a handoff, line by line as it happens, on standard error and in syslog.
//!
//! Proxmox copies a hook's standard error into the task log. Standard output stays empty: Proxmox shows both streams
//! but does not keep their order.

use once_cell::unsync::OnceCell;
use std::cell::RefCell;
use std::io::Write;
use std::time::Duration;
use syslog::{Facility, LogFormat, Logger, LoggerBackend};

const NAME: &str = "gpu-handoff";

pub struct Story {
    /// Opened by the first line, so that a run without one costs nothing. None without a syslog daemon.
    syslog: OnceCell<Option<RefCell<Logger<LoggerBackend, Plain>>>>,
    to_syslog: bool,
    to_stderr: bool,
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
        Story { syslog: OnceCell::new(), to_syslog, to_stderr: true, warned: RefCell::default() }
    }

    /// Tells nobody.
    pub fn silent() -> Story {
        Story { syslog: OnceCell::new(), to_syslog: false, to_stderr: false, warned: RefCell::default() }
    }

    pub fn say(&self, text: &str) {
        self.line(Severity::Info, text);
    }

    /// Once per run: what several parts of a run come across is still one problem.
    pub fn warn(&self, text: &str) {
        let mut warned = self.warned.borrow_mut();
        if warned.iter().any(|told| told == text) {
            return;
        }
        warned.push(text.to_string());
        self.line(Severity::Warning, &format!("warning: {text}"));
    }

    pub fn error(&self, text: &str) {
        self.line(Severity::Error, &format!("error: {text}"));
    }

    /// One phase of a handoff, columns aligned with its neighbours.
    pub fn phase(&self, name: &str, took: Duration, what: &str) {
        self.say(&format!("  {name:<9} {:>6} ms  {what}", took.as_millis()));
    }

    fn line(&self, severity: Severity, text: &str) {
        let text = &*printable(text);
        if self.to_stderr {
            // Nobody reading is no reason to stop half-way.
            let _ = std::io::stderr().write_all(format!("{NAME}: {text}\n").as_bytes());
        }
        if !self.to_syslog {
            return;
        }
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
    fn a_line_for_syslog() {
        let mut line = Vec::new();
        Plain.format(&mut line, syslog::Severity::LOG_WARNING, "a text").unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), format!("<28>gpu-handoff[{}]: a text", std::process::id()));
    }
}
