//! Programs that take long: what they say goes to a log, how they get on to whoever waits, and each has an end.

use crate::App;
use crate::exit::{Exit, Result};
use crate::sys::{Ended, Talking};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::Duration;

const SH: &str = "/bin/sh";
const FLOCK: &str = "/usr/bin/flock";

const LOGS: &str = "/var/log/gpu-handoff";

/// A log that has grown to this begins anew, and the old one is kept beside it.
const ENOUGH: u64 = 4 * 1024 * 1024;

/// What one run may add to it of what programs say. A container may say as much as it likes.
const MOST: usize = 16 * 1024 * 1024;

/// After its end, what a program said is read this often at most: something that it started may go on talking.
const REST: usize = 16;
const BLOCK: u64 = 64 * 1024;

/// How often somebody who waits is told how it gets on.
const TELL_AGAIN: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Between asking a command to end and making it.
const PATIENCE: Duration = Duration::from_secs(10);

/// How the last line of a script of ours begins that says what is wrong.
const VERDICT: &str = "found: ";

/// What `flock` ends with when it got no turn.
pub const NO_TURN: i32 = 75;

pub struct Teller<'a> {
    pub app: &'a App<'a>,
    /// Whom it is about, as each line begins: `container 101`.
    who: String,
    /// Where everything is that programs say.
    pub log_path: String,
    log: RefCell<File>,
    /// Bytes that the log yet takes.
    room: Cell<usize>,
}

/// What is asked about a program that goes on by itself: see [`Teller::run_apart`].
pub struct Apart<'a> {
    /// Whether it may be ended now.
    pub may_end: &'a dyn Fn() -> bool,
    /// How it gets on; nothing when that is not to be seen.
    pub so_far: &'a dyn Fn() -> String,
    /// Why it failed, where that is told elsewhere than by its output.
    pub why: &'a dyn Fn() -> Option<String>,
}

impl Apart<'_> {
    /// One that is never ended, and says all by itself.
    pub const PLAIN: Apart<'static> = Apart { may_end: &|| false, so_far: &String::new, why: &|| None };
}

/// How what a program says gets here.
enum Ear {
    /// Through its pipe, and from here to the log.
    Pipe,
    /// From the log, which it writes to by itself.
    Log(File),
}

impl<'a> Teller<'a> {
    /// `log` is the name of its log, without an ending.
    ///
    /// # Errors
    /// When there can be no log.
    pub fn new(app: &'a App<'a>, who: impl Into<String>, log: &str) -> Result<Teller<'a>> {
        let log_path = format!("{LOGS}/{log}.log");
        let log = open_log(app, &log_path).map_err(|error| Exit::failed(format!("{log_path}: {error}")))?;
        Ok(Teller { app, who: who.into(), log_path, log: RefCell::new(log), room: Cell::new(MOST) })
    }

    pub fn say(&self, text: &str) {
        self.log_line(text);
        self.app.story.say(&format!("{}: {text}", self.who));
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
        self.say(what);
        let talking = self.app.kernel.start_talking(program, arguments);
        let talking = talking.map_err(|error| self.failed(what, &error.to_string()))?;
        self.attend(what, talking, &mut Ear::Pipe, limit, &Apart { may_end: &|| true, so_far, why: &|| None })
    }

    /// As [`Teller::run`], of a program that must not be cut off half-way: it goes on should this run be killed, with a
    /// lock of its own, and is only ended while `about` says so.
    ///
    /// # Errors
    /// As [`Teller::run`]; also when another run's program has the lock.
    pub fn run_apart(
        &self,
        what: &str,
        lock: &str,
        program: &str,
        arguments: &[&str],
        limit: Duration,
        about: &Apart,
    ) -> Result<()> {
        self.say(what);
        let kernel = self.app.kernel;
        let path = kernel.path(&self.log_path);
        let heard = File::open(&path).and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log));
        let heard = heard.map_err(|error| self.failed(what, &error.to_string()))?;
        if let Some(missing) = [FLOCK, program].into_iter().find(|program| !kernel.exists(program)) {
            return Err(self.failed(what, &format!("{missing} is not installed")));
        }
        // A pipe would end it when nobody reads any more. Places for temporary files may be small and in memory.
        let script =
            "log=$1 && shift && export TMPDIR=/var/tmp DEBIAN_FRONTEND=noninteractive && exec \"$@\" >>\"$log\" 2>&1";
        let real = |path: &str| kernel.path(path).to_string_lossy().into_owned();
        let (flock, lock, program) = (real(FLOCK), real(lock), real(program));
        let path = path.to_string_lossy();
        let no_turn = NO_TURN.to_string();
        let mut line = vec!["-c", script, "sh", &path, &flock, "-o", "-n", "-E", &no_turn, &lock, &program];
        line.extend(arguments);
        let talking = kernel.start_talking(SH, &line);
        let talking = talking.map_err(|error| self.failed(what, &error.to_string()))?;
        self.attend(what, talking, &mut Ear::Log(heard), limit, about)
    }

    fn attend(
        &self,
        what: &str,
        mut talking: Talking,
        ear: &mut Ear,
        limit: Duration,
        Apart { may_end, so_far, why }: &Apart,
    ) -> Result<()> {
        let kernel = self.app.kernel;
        let begin = kernel.now();
        let mut said = Said::default();
        let (mut told, mut was_told_to_end) = (begin, false);
        let mut last = None;
        let ended = loop {
            let ended = talking.ended();
            self.hear(ear, &mut talking, if ended.is_some() { REST } else { 1 }, &mut said);
            if let Some(ended) = ended {
                break ended;
            }
            let now = kernel.now();
            if kernel.is_asked_to_end() && !was_told_to_end {
                if may_end() {
                    talking.end(PATIENCE);
                    let again = "was interrupted; the same call goes on from there";
                    return Err(Exit::failed(format!("{}: {what} {again}", self.who)));
                }
                was_told_to_end = true;
                self.say(&format!("{what} goes on: what it has begun must not be cut off"));
            }
            if now.saturating_sub(begin) >= limit && may_end() {
                talking.end(PATIENCE);
                return Err(self.failed(what, &format!("it did not end within {} minutes", limit.as_secs() / 60)));
            }
            if now.saturating_sub(told) >= TELL_AGAIN {
                told = now;
                let how = Some(so_far()).filter(|text| !text.is_empty()).or_else(|| said.last());
                // The same line again would look like news.
                let news = how.filter(|how| last.as_ref() != Some(how));
                last = news.clone().or(last);
                let how = news.map_or_else(String::new, |line| format!(": {line}"));
                let seconds = now.saturating_sub(begin).as_secs();
                self.app.story.say(&format!("{}: {what}, {seconds} s{how}", self.who));
            }
            kernel.sleep(LOOK_AGAIN);
        };
        match ended {
            Ended::Well => Ok(()),
            Ended::Badly { code: Some(NO_TURN), .. } => {
                Err(self.failed(what, "something that an earlier run started is still at work there"))
            }
            Ended::Badly { how, .. } => Err(self.failed(what, &why().or_else(|| said.why()).unwrap_or(how))),
        }
    }

    fn hear(&self, ear: &mut Ear, talking: &mut Talking, times: usize, said: &mut Said) {
        for _ in 0..times {
            let more = match ear {
                Ear::Pipe => talking.said(),
                Ear::Log(log) => {
                    let mut more = Vec::new();
                    let _ = log.take(BLOCK).read_to_end(&mut more);
                    more
                }
            };
            if more.is_empty() {
                break;
            }
            if matches!(ear, Ear::Pipe) {
                let _ = write_some(&mut *self.log.borrow_mut(), &self.room, &more);
            }
            said.add(&more);
        }
    }

    fn failed(&self, what: &str, why: &str) -> Exit {
        Exit::failed(format!("{}: {what} failed: {why} (log: {})", self.who, self.log_path))
    }
}

/// As much as there is room for, and once that the rest is left out.
fn write_some(log: &mut dyn Write, room: &Cell<usize>, bytes: &[u8]) -> io::Result<()> {
    let had = room.get();
    room.set(had.saturating_sub(bytes.len()));
    log.write_all(bytes.get(..had).unwrap_or(bytes))?;
    if had > 0 && room.get() == 0 { log.write_all(b"\n[the rest is left out]\n") } else { Ok(()) }
}

fn open_log(app: &App, path: &str) -> io::Result<File> {
    let log = app.kernel.append_to(path, 0o640)?;
    if log.metadata()?.len() < ENOUGH {
        return Ok(log);
    }
    app.kernel.rename_file(path, &format!("{path}.1"))?;
    app.kernel.append_to(path, 0o640)
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

    /// The lines that say what is wrong, or else the last ones, as one line. What a script of ours found in the end counts
    /// before what a program said on its way there.
    fn why(mut self) -> Option<String> {
        const ENOUGH: usize = 3;
        self.end_line();
        if let Some(verdict) = self.lines.last().and_then(|line| line.strip_prefix(VERDICT)) {
            return Some(verdict.to_string());
        }
        let is_why = |line: &&String| {
            ["E: ", "ERROR", "dpkg: error", "curl: "].iter().any(|sign| line.starts_with(sign))
                || line.contains("No space left")
        };
        let telling: Vec<&String> = self.lines.iter().filter(is_why).collect();
        let chosen = if telling.is_empty() { self.lines.iter().collect() } else { telling };
        let from = chosen.len().saturating_sub(ENOUGH);
        let lines: Vec<&str> = chosen.iter().skip(from).map(|line| line.as_str()).collect();
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
        assert_eq!(
            why("ERROR: Failed to execute `systemctl daemon-reload`\nfound: nvidia-smi: no devices\n").as_deref(),
            Some("nvidia-smi: no devices")
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
