//! The command line: one table of verbs makes the parser and `--help`.

use crate::App;
use crate::events::watch::{self, After};
use crate::events::{hookscript, manual};
use crate::handoff::history::History;
use crate::handoff::reconcile::Scope;
use crate::handoff::resume;
use crate::report::history;
use crate::report::status::Status;
use crate::stop::{Result, Stop};
use lexopt::Arg;
use std::ffi::OsString;
use std::io::{ErrorKind, Write};

/// What may be asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    Hook { id: u32, phase: String },
    Status { json: bool },
    History { json: bool },
    ToVfio { slot: Option<String>, dry_run: bool },
    ToNvidia { slot: Option<String>, dry_run: bool },
    Plan { vmid: u32 },
    Reconcile { scope: Scope, dry_run: bool },
    Resume,
    Watch { vmid: u32, after: After },
    Help,
    Version,
}

struct Verb {
    /// The first is the one to use; the others are older spellings.
    names: &'static [&'static str],
    arguments: &'static str,
    about: &'static str,
}

const TO_VFIO: Verb = Verb {
    names: &["to-vfio", "to_vfio"],
    arguments: "[SLOT] [--dry-run]",
    about: "give a GPU to vfio-pci by hand, until to-nvidia or a reboot",
};
const TO_NVIDIA: Verb = Verb {
    names: &["to-nvidia", "to_nvidia"],
    arguments: "[SLOT] [--dry-run]",
    about: "bring a GPU home by hand, whatever its home is",
};
const HANDOFF: Verb = Verb {
    names: &["handoff"],
    arguments: "vfio|nvidia [SLOT] [--dry-run]",
    about: "the same as to-vfio and to-nvidia",
};
const PLAN: Verb = Verb {
    names: &["plan"],
    arguments: "VMID",
    about: "the steps that starting this VM would take now, or why it would be refused",
};
const RECONCILE: Verb = Verb {
    names: &["reconcile"],
    arguments: "[--unfinished] [--dry-run]",
    about: "bring home what a VM that does not run, or (--unfinished) only what a killed handoff left behind; make \
            missing device nodes",
};
const WATCH: Verb = Verb {
    names: &["watch"],
    arguments: "VMID [--reboot]",
    about: "what pre-start leaves behind: wait until the VM runs, or its start is given up and its GPU must come home",
};
const RESUME: Verb = Verb {
    names: &[resume::VERB],
    arguments: "",
    about: "start again what was stopped for a handoff that is over; runs by itself",
};
const STATUS: Verb = Verb {
    names: &["--status", "status"],
    arguments: "[--json]",
    about: "every NVIDIA GPU: functions, drivers, owner, users, last handoff",
};
const HISTORY: Verb = Verb {
    names: &["history"],
    arguments: "[--json]",
    about: "past handoffs and refusals, the newest last: when, which way, how long, with what result",
};
const HELP: Verb = Verb { names: &["--help", "-h", "help"], arguments: "", about: "this text" };
const VERSION: Verb = Verb { names: &["--version", "-V"], arguments: "", about: "the version" };
const VERBS: &[&Verb] =
    &[&STATUS, &HISTORY, &TO_VFIO, &TO_NVIDIA, &HANDOFF, &PLAN, &RECONCILE, &RESUME, &WATCH, &HELP, &VERSION];

impl Verb {
    fn is(&self, word: &str) -> bool {
        self.names.contains(&word)
    }
}

pub fn help() -> String {
    let mut text = String::from(
        "gpu-handoff: an NVIDIA GPU goes to a Proxmox VM when that VM starts and comes home when it stops\n\n\
         Usage:\n  gpu-handoff VMID PHASE\n      Proxmox hookscript: pre-start, post-start, pre-stop, post-stop\n",
    );
    for verb in VERBS {
        let call = format!("gpu-handoff {} {}", verb.names[0], verb.arguments);
        let also = match verb.names {
            [] | [_] => String::new(),
            [_, others @ ..] => format!(" (also: {})", others.join(", ")),
        };
        text.push_str(&format!("  {}\n      {}{also}\n", call.trim_end(), verb.about));
    }
    text.push_str(
        "\nA SLOT is written like 0000:01:00; it may be left out when there is one GPU.\n\n\
         Exit codes:\n  \
         0  done, or nothing to do\n  \
         1  failed: towards a VM the GPU is back where it was, towards home it is stranded\n  \
         2  bad usage, unknown guest, mistake in the configuration\n  \
         3  refused, nothing was touched\n  \
         4  the time box was overrun, or the slot is wedged\n  \
         5  another handoff did not end in time\n",
    );
    text
}

/// # Errors
/// One line saying what is wrong with the arguments.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Call> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut words: Vec<String> = Vec::new();
    let (mut json, mut dry_run, mut unfinished, mut reboot) = (false, false, false, false);
    while let Some(argument) = parser.next().map_err(|e| usage(&e.to_string()))? {
        match argument {
            Arg::Value(word) => words.push(word.to_string_lossy().into_owned()),
            Arg::Long("json") => json = true,
            Arg::Long("dry-run") => dry_run = true,
            Arg::Long("unfinished") => unfinished = true,
            Arg::Long("reboot") => reboot = true,
            Arg::Long(name) => words.push(format!("--{name}")),
            Arg::Short(name) => words.push(format!("-{name}")),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut call = call(&words)?;
    match &mut call {
        Call::Status { json: wanted } | Call::History { json: wanted } => *wanted = std::mem::take(&mut json),
        Call::ToVfio { dry_run: wanted, .. } | Call::ToNvidia { dry_run: wanted, .. } => {
            *wanted = std::mem::take(&mut dry_run);
        }
        Call::Reconcile { scope, dry_run: wanted } => {
            *wanted = std::mem::take(&mut dry_run);
            if std::mem::take(&mut unfinished) {
                *scope = Scope::Unfinished;
            }
        }
        Call::Watch { after, .. } => {
            if std::mem::take(&mut reboot) {
                *after = After::Reboot;
            }
        }
        Call::Hook { .. } | Call::Plan { .. } | Call::Resume | Call::Help | Call::Version => {}
    }
    // A flag that is still set here belongs to no such verb.
    match (json, dry_run, unfinished, reboot) {
        (true, _, _, _) => Err(usage("--json goes with --status and history")),
        (_, true, _, _) => Err(usage("--dry-run goes with a verb that changes something; for a VM, see plan")),
        (_, _, true, _) => Err(usage("--unfinished goes with reconcile")),
        (_, _, _, true) => Err(usage("--reboot goes with watch")),
        _ => Ok(call),
    }
}

fn call(words: &[&str]) -> Result<Call> {
    let (verb, rest) = words.split_first().ok_or_else(|| usage("nothing to do"))?;
    if verb.bytes().all(|b| b.is_ascii_digit()) {
        let id = verb.parse().map_err(|_| usage(&format!("{verb} is no guest id")))?;
        return match rest {
            [phase] => Ok(Call::Hook { id, phase: (*phase).to_string() }),
            [] => Err(usage(&format!("guest {id} needs a phase, such as pre-start"))),
            [_, more, ..] => Err(usage(&format!("{more} is too much"))),
        };
    }
    let to_vfio = TO_VFIO.is(verb) || (HANDOFF.is(verb) && rest.first() == Some(&"vfio"));
    let to_nvidia = TO_NVIDIA.is(verb) || (HANDOFF.is(verb) && rest.first() == Some(&"nvidia"));
    let slot = || optional(if HANDOFF.is(verb) { &rest[1..] } else { rest });
    if to_vfio {
        return Ok(Call::ToVfio { slot: slot()?, dry_run: false });
    }
    if to_nvidia {
        return Ok(Call::ToNvidia { slot: slot()?, dry_run: false });
    }
    if HANDOFF.is(verb) {
        return Err(usage("handoff needs vfio or nvidia"));
    }
    if PLAN.is(verb) || WATCH.is(verb) {
        let id = rest.first().ok_or_else(|| usage(&format!("{verb} needs the id of a VM")))?;
        let vmid = id.parse().map_err(|_| usage(&format!("{id} is no guest id")))?;
        return match rest.get(1) {
            None if PLAN.is(verb) => Ok(Call::Plan { vmid }),
            None => Ok(Call::Watch { vmid, after: After::Start }),
            Some(more) => Err(usage(&format!("{more} is too much"))),
        };
    }
    let call = [
        (&RECONCILE, Call::Reconcile { scope: Scope::All, dry_run: false }),
        (&RESUME, Call::Resume),
        (&STATUS, Call::Status { json: false }),
        (&HISTORY, Call::History { json: false }),
        (&HELP, Call::Help),
        (&VERSION, Call::Version),
    ]
    .into_iter()
    .find_map(|(known, call)| known.is(verb).then_some(call))
    .ok_or_else(|| usage(&format!("{verb} is unknown")))?;
    match rest.first() {
        None => Ok(call),
        Some(more) => Err(usage(&format!("{more} is too much"))),
    }
}

fn optional(rest: &[&str]) -> Result<Option<String>> {
    match rest {
        [] => Ok(None),
        [slot] if !slot.starts_with('-') => Ok(Some((*slot).to_string())),
        [flag] => Err(usage(&format!("{flag} is unknown"))),
        [_, more, ..] => Err(usage(&format!("{more} is too much"))),
    }
}

fn usage(problem: &str) -> Stop {
    Stop::usage(format!("{problem}; see gpu-handoff --help"))
}

/// # Errors
/// What the caller must be told, with its exit code.
pub fn run(app: &App, call: &Call) -> Result<()> {
    let changes = matches!(
        call,
        Call::ToVfio { dry_run: false, .. }
            | Call::ToNvidia { dry_run: false, .. }
            | Call::Reconcile { dry_run: false, .. }
            | Call::Resume
            | Call::Watch { .. }
    );
    if changes && app.kernel.is_real() && !nix::unistd::geteuid().is_root() {
        return Err(Stop::failed("only root can hand a GPU over; nothing was touched; try again with sudo"));
    }
    if !changes && !matches!(call, Call::Hook { .. }) {
        app.kernel.end_with_this_run();
    }
    match call {
        Call::Hook { id, phase } => hookscript::run(app, *id, phase),
        Call::ToVfio { slot, dry_run: true } => print(&manual::plan_to_vfio(app, slot.as_deref())?),
        Call::ToVfio { slot, dry_run: false } => manual::to_vfio(app, slot.as_deref()),
        Call::ToNvidia { slot, dry_run: true } => print(&manual::plan_to_nvidia(app, slot.as_deref())?),
        Call::ToNvidia { slot, dry_run: false } => manual::to_nvidia(app, slot.as_deref()),
        Call::Plan { vmid } => print(&hookscript::plan(app, *vmid)?),
        Call::Reconcile { scope, dry_run: true } => print(&manual::plan_reconcile(app, *scope)?),
        Call::Reconcile { scope, dry_run: false } => manual::reconcile(app, *scope),
        Call::Resume => manual::resume(app),
        Call::Watch { vmid, after } => watch::run(app, *vmid, *after),
        Call::Status { json } => status(app, *json),
        Call::History { json } => past(app, *json),
        Call::Help => print(&help()),
        Call::Version => print(concat!("gpu-handoff ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}

fn status(app: &App, json: bool) -> Result<()> {
    let status = Status::read(&app.kernel, &app.store, nix::unistd::geteuid().is_root());
    for problem in status.problems() {
        app.story.warn(problem);
    }
    if json { print(&format!("{}\n", status.to_json())) } else { print(&status.to_text()) }
}

fn past(app: &App, json: bool) -> Result<()> {
    let past = app.store.history().map(History::read).transpose()?.unwrap_or_default();
    for problem in &past.problems {
        app.story.warn(problem);
    }
    print(&if json { history::to_json(&past) } else { history::to_text(&past) })
}

/// A reader that has seen enough is no failure.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Stop::failed(format!("standard output: {error}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> std::result::Result<Call, String> {
        parse(line.split_whitespace().map(OsString::from)).map_err(|stop| stop.message)
    }

    #[test]
    fn every_spelling() {
        assert_eq!(parsed("111 pre-start"), Ok(Call::Hook { id: 111, phase: "pre-start".to_string() }));
        assert_eq!(parsed("111 whatever"), Ok(Call::Hook { id: 111, phase: "whatever".to_string() }));
        for line in ["--status", "status"] {
            assert_eq!(parsed(line), Ok(Call::Status { json: false }));
            assert_eq!(parsed(&format!("{line} --json")), Ok(Call::Status { json: true }));
        }
        assert_eq!(parsed("history"), Ok(Call::History { json: false }));
        assert_eq!(parsed("history --json"), Ok(Call::History { json: true }));
        for line in ["to-vfio", "to_vfio", "handoff vfio"] {
            assert_eq!(parsed(line), Ok(Call::ToVfio { slot: None, dry_run: false }));
            assert_eq!(
                parsed(&format!("{line} 01:00")),
                Ok(Call::ToVfio { slot: Some("01:00".to_string()), dry_run: false })
            );
        }
        for line in ["to-nvidia", "to_nvidia", "handoff nvidia"] {
            assert_eq!(parsed(line), Ok(Call::ToNvidia { slot: None, dry_run: false }));
        }
        assert_eq!(parsed("to-nvidia --dry-run"), Ok(Call::ToNvidia { slot: None, dry_run: true }));
        assert_eq!(parsed("plan 111"), Ok(Call::Plan { vmid: 111 }));
        assert_eq!(parsed("reconcile --dry-run"), Ok(Call::Reconcile { scope: Scope::All, dry_run: true }));
        assert_eq!(parsed("reconcile --unfinished"), Ok(Call::Reconcile { scope: Scope::Unfinished, dry_run: false }));
        assert_eq!(parsed("watch 111"), Ok(Call::Watch { vmid: 111, after: After::Start }));
        assert_eq!(parsed("watch 111 --reboot"), Ok(Call::Watch { vmid: 111, after: After::Reboot }));
        assert_eq!(parsed("-V"), Ok(Call::Version));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, problem) in [
            ("", "nothing to do"),
            ("111", "guest 111 needs a phase"),
            ("111 pre-start now", "now is too much"),
            ("99999999999 pre-start", "99999999999 is no guest id"),
            ("to-vfio --force", "--force is unknown"),
            ("to-vfio 01:00 02:00", "02:00 is too much"),
            ("handoff", "handoff needs vfio or nvidia"),
            ("frobnicate", "frobnicate is unknown"),
            ("--status now", "now is too much"),
            ("to-vfio --json", "--json goes with --status and history"),
            ("111 pre-start --dry-run", "--dry-run goes with a verb"),
            ("--status --dry-run", "--dry-run goes with a verb"),
            ("--status --unfinished", "--unfinished goes with reconcile"),
            ("history 111", "111 is too much"),
            ("history --dry-run", "--dry-run goes with a verb"),
            ("plan", "plan needs the id of a VM"),
            ("plan gpu", "gpu is no guest id"),
            ("watch", "watch needs the id of a VM"),
            ("watch 111 112", "112 is too much"),
            ("reconcile --reboot", "--reboot goes with watch"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.starts_with(problem), "{line}: {message}");
        }
    }

    #[test]
    fn help_names_every_verb() {
        let help = help();
        for name in VERBS.iter().flat_map(|verb| verb.names) {
            assert!(help.contains(name), "{name}");
        }
    }
}
