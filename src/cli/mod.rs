//! The command line: one table of verbs makes the parser and all help.

mod help;
mod verbs;

use crate::App;
use crate::config::{self, Config};
use crate::containers::{self, Style, Who, Wish};
use crate::events::watch::{self, After};
use crate::events::{hookscript, manual, settle, stray, udev};
use crate::handoff::history::History;
use crate::handoff::reconcile::Scope;
use crate::report::status::Status;
use crate::report::zone::Zone;
use crate::report::{self, history};
use crate::setup::{self, driver, hookscript as registration, vfio};
use crate::stop::{Result, Stop};
use lexopt::Arg;
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use verbs::{FLAGS, VERBS, Verb};

/// What may be asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    Hook { id: u32, phase: String },
    Status { json: bool },
    History { json: bool, vmid: Option<u32>, count: Option<usize> },
    ToVfio { slot: Option<String>, dry_run: bool },
    ToNvidia { slot: Option<String>, dry_run: bool },
    Plan { vmid: u32, json: bool },
    Reconcile { scope: Scope, dry_run: bool },
    Resume,
    Watch { vmid: u32, after: After },
    Attach { ctid: u32, wish: Wish, dry_run: bool },
    Detach { ctid: u32, dry_run: bool },
    Setup { ctid: u32, wish: Wish, driver_only: bool, dry_run: bool },
    Check { who: Who },
    Sync { who: Who, dry_run: bool },
    Enable { id: u32, dry_run: bool },
    Disable { id: u32, dry_run: bool },
    SetUp { what: setup::What, dry_run: bool },
    ConfigCheck,
    ConfigShow,
    Udev,
    Settle,
    Quiet(Box<Call>),
    Help { topic: String },
    Everyday,
    Version,
}

/// What stood after the verb.
struct Given<'a> {
    verb: &'a str,
    words: &'a [&'a str],
    flags: &'a BTreeMap<&'static str, Vec<String>>,
}

impl Given<'_> {
    fn has(&self, flag: &str) -> bool {
        self.flags.contains_key(flag)
    }

    fn next(&mut self) -> Option<&str> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        Some(first)
    }

    /// The one that was named, with `--gpu` or without.
    fn slot(&mut self) -> Result<Option<String>> {
        if let Some(flag) = self.words.first().filter(|word| word.starts_with('-')) {
            return Err(unknown(flag));
        }
        let slots: Vec<String> = self.values("gpu").into_iter().chain(self.next().map(str::to_string)).collect();
        match slots.as_slice() {
            [] => Ok(None),
            [slot] if slot.starts_with('-') => Err(usage(&format!("{slot} is no slot"))),
            [slot] => Ok(Some(slot.clone())),
            [_, more, ..] => Err(usage(&format!("{more} is too much"))),
        }
    }

    fn id(&mut self, kind: &str) -> Result<u32> {
        let verb = self.verb;
        let word = self.next().ok_or_else(|| usage(&format!("{verb} needs the id of a {kind}")))?;
        guest_id(word)
    }

    fn values(&self, flag: &str) -> Vec<String> {
        self.flags.get(flag).cloned().unwrap_or_default()
    }

    fn value(&self, flag: &str) -> Option<String> {
        self.values(flag).pop()
    }

    fn number(&self) -> Result<Option<usize>> {
        let number = |word: String| word.parse().map_err(|_| usage(&format!("-n {word} is no number")));
        self.value("n").map(number).transpose()
    }

    /// As `--json`, or in the words of Proxmox's own tools.
    fn json(&self) -> Result<bool> {
        match self.value("output-format").as_deref() {
            None => Ok(self.has("json")),
            Some("json") => Ok(true),
            Some("text") => Ok(false),
            Some(other) => Err(usage(&format!("--output-format {other} is unknown: text or json"))),
        }
    }

    fn vfio(&self) -> vfio::Wish {
        vfio::Wish { cmdline: self.has("cmdline"), undo: self.has("undo"), defer: self.has("defer") }
    }

    fn driver(&self) -> driver::Wish {
        let (install_deps, purge) = (self.has("install-deps"), self.has("purge"));
        driver::Wish { install_deps, purge, undo: self.has("undo"), defer: self.has("defer"), offline: false }
    }

    fn set_up(&self, what: setup::What) -> Result<Call> {
        match ["cmdline", "install-deps", "purge", "defer"].into_iter().find(|flag| self.has("undo") && self.has(flag))
        {
            Some(flag) => Err(usage(&format!("--undo takes all of it back: leave out --{flag}"))),
            None => Ok(Call::SetUp { what, dry_run: self.has("dry-run") }),
        }
    }

    fn who(&mut self) -> Result<Who> {
        match (self.has("all"), self.words.first()) {
            (true, None) => Ok(Who::All),
            (true, Some(word)) => Err(usage(&format!("{word} and --all exclude each other"))),
            (false, None) => Err(usage(&format!("{} needs the id of a container, or --all", self.verb))),
            (false, Some(_)) => Ok(Who::One(self.id("container")?)),
        }
    }

    fn wish(&mut self) -> Result<Wish> {
        let mut gpus = self.values("gpu");
        // Only what may be one: a second id is a mistake that must be named.
        while let Some(slot) = self.words.first().filter(|word| word.contains(':')) {
            gpus.push((*slot).to_string());
            self.next();
        }
        let style = match self.value("style").as_deref() {
            None => None,
            Some("mount") => Some(Style::Mount),
            Some("dev") => Some(Style::Dev),
            Some(other) => return Err(usage(&format!("--style {other} is unknown: mount or dev"))),
        };
        Ok(Wish { gpus, style, dri: self.has("dri") })
    }
}

fn guest_id(word: &str) -> Result<u32> {
    word.parse().map_err(|_| usage(&format!("{word} is no guest id")))
}

/// # Errors
/// One line saying what is wrong with the arguments.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Call> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let more = after_phase(&arguments);
    // A later Proxmox may say more about a phase, and a start must not fail for that; but this is a person's.
    if more.as_ref().is_some_and(|more| more.iter().any(|word| word == "--dry-run")) {
        return Err(misplaced("dry-run"));
    }
    let is_hook = more.is_some();
    let mut parser = lexopt::Parser::from_args(arguments.into_iter().take(if is_hook { 2 } else { usize::MAX }));
    let mut words: Vec<String> = Vec::new();
    let mut flags: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    while let Some(argument) = parser.next().map_err(|e| usage(&e.to_string()))? {
        match argument {
            Arg::Value(word) => words.push(word.to_string_lossy().into_owned()),
            Arg::Short(name) if name != 'n' => words.push(format!("-{name}")),
            Arg::Short(_) | Arg::Long(_) => {
                let name = if let Arg::Long(name) = argument { name } else { "n" };
                let Some(flag) = FLAGS.iter().find(|flag| flag.name == name) else {
                    words.push(format!("--{name}"));
                    continue;
                };
                let values = flags.entry(flag.name).or_default();
                if flag.has_value {
                    let value = parser.value().map_err(|e| usage(&e.to_string()))?;
                    values.push(value.to_string_lossy().into_owned());
                }
            }
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let asks_for_help = |word: &&str| ["--help", "-h"].contains(word) || words.first() == Some(&"help");
    if !is_hook && words.iter().any(asks_for_help) {
        let topic: Vec<&str> = words.into_iter().filter(|word| !["--help", "-h", "help"].contains(word)).collect();
        return Ok(Call::Help { topic: topic_of(&topic)? });
    }
    let call = call(&words, &flags)?;
    Ok(if flags.contains_key("quiet") { Call::Quiet(Box::new(call)) } else { call })
}

/// What the words of somebody who asks for help are about: a verb, or the first word of several. What follows it is in
/// nobody's way, and a guest's id is no verb.
fn topic_of(words: &[&str]) -> Result<String> {
    let [first, ..] = words else { return Ok(String::new()) };
    if guest_id(first).is_ok() {
        return Ok(String::new());
    }
    match find(words) {
        Ok((verb, _)) => Ok(verb.names[0].to_string()),
        Err(_) if !seconds(first).is_empty() => Ok((*first).to_string()),
        Err(stop) => Err(stop),
    }
}

/// What follows a guest's id and a phase; none when it is another call.
fn after_phase(arguments: &[OsString]) -> Option<Vec<String>> {
    let [id, phase, more @ ..] = arguments else { return None };
    let is_id = id.to_str().is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()));
    let is_phase = !phase.to_string_lossy().starts_with('-');
    (is_id && is_phase).then(|| more.iter().map(|word| word.to_string_lossy().into_owned()).collect())
}

fn call(words: &[&str], flags: &BTreeMap<&'static str, Vec<String>>) -> Result<Call> {
    let Some((first, rest)) = words.split_first() else { return Ok(Call::Everyday) };
    if first.bytes().all(|b| b.is_ascii_digit()) {
        let id = guest_id(first)?;
        let phase = rest.first().ok_or_else(|| usage(&format!("guest {id} needs a phase, such as pre-start")))?;
        refuse_other_flags(flags, "")?;
        return Ok(Call::Hook { id, phase: (*phase).to_string() });
    }
    let (verb, rest) = find(words)?;
    let mut given = Given { verb: verb.names[0], words: rest, flags };
    let call = (verb.call)(&mut given)?;
    match given.words.first() {
        Some(flag) if flag.starts_with('-') => return Err(unknown(flag)),
        Some(more) => return Err(usage(&format!("{more} is too much"))),
        None => {}
    }
    refuse_other_flags(flags, &[verb.arguments, " --quiet"].concat())?;
    Ok(call)
}

/// The verb that the words begin with, and what comes after it.
fn find<'a>(words: &'a [&'a str]) -> Result<(&'static Verb, &'a [&'a str])> {
    let named = |name: &str| VERBS.iter().find(|verb| verb.names.contains(&name));
    if let Some(verb) = named(words[0]) {
        return Ok((verb, &words[1..]));
    }
    if let Some(verb) = words.get(1).and_then(|second| named(&format!("{} {second}", words[0]))) {
        return Ok((verb, &words[2..]));
    }
    Err(match seconds(words[0]).as_slice() {
        [] => unknown(words[0]),
        several => usage(&format!("{} needs {}", words[0], listed(several, " or "))),
    })
}

/// What may follow the first word of a verb of two words.
fn seconds(first: &str) -> Vec<&'static str> {
    let names = VERBS.iter().flat_map(|verb| verb.names);
    names.filter_map(|name| name.strip_prefix(first)?.strip_prefix(' ')).collect()
}

/// `a, b or c`
fn listed(words: &[&str], last: &str) -> String {
    match words {
        [others @ .., end] if !others.is_empty() => [&others.join(", "), last, end].concat(),
        _ => words.concat(),
    }
}

fn refuse_other_flags(flags: &BTreeMap<&'static str, Vec<String>>, arguments: &str) -> Result<()> {
    match flags.keys().find(|flag| !takes(arguments, flag)) {
        Some(flag) => Err(misplaced(flag)),
        None => Ok(()),
    }
}

fn takes(arguments: &str, flag: &str) -> bool {
    let flag = if flag == "output-format" { "json" } else { flag };
    arguments.split([' ', '[', ']', '|']).any(|word| word.starts_with('-') && word.trim_start_matches('-') == flag)
}

/// A flag where it does not belong.
fn misplaced(flag: &str) -> Stop {
    let verbs: Vec<&str> = VERBS.iter().filter(|verb| takes(verb.arguments, flag)).map(|verb| verb.names[0]).collect();
    usage(&match flag {
        "quiet" => "--quiet goes with a verb".to_string(),
        "n" => "-n goes with history".to_string(),
        "dry-run" => "--dry-run goes with a verb that changes something, and plan VMID is that of a start".to_string(),
        _ => format!("--{flag} goes with {}", listed(&verbs, " and ")),
    })
}

fn unknown(word: &str) -> Stop {
    let flags = FLAGS.iter().map(|flag| format!("--{}", flag.name));
    let meant = help::meant(word, flags).map_or_else(String::new, |name| format!(", did you mean {name}?"));
    usage(&format!("{word} is unknown{meant}"))
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
            | Call::Attach { dry_run: false, .. }
            | Call::Detach { dry_run: false, .. }
            | Call::Setup { dry_run: false, .. }
            | Call::Sync { dry_run: false, .. }
            | Call::Enable { dry_run: false, .. }
            | Call::Disable { dry_run: false, .. }
            | Call::SetUp { dry_run: false, .. }
            | Call::Udev
            | Call::Settle
    );
    if changes && app.kernel.is_real() && !nix::unistd::geteuid().is_root() {
        return Err(Stop::failed("only root can do that; nothing was touched; try again with sudo"));
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
        Call::Plan { vmid, json: false } => print(&hookscript::plan(app, *vmid)?.to_text()),
        Call::Plan { vmid, json: true } => {
            let planned = hookscript::plan(app, *vmid);
            print(&format!("{}\n", report::plan::to_json(*vmid, &planned)))?;
            planned.map(|_| ())
        }
        Call::Reconcile { scope, dry_run: true } => print(&manual::plan_reconcile(app, *scope)?),
        Call::Reconcile { scope, dry_run: false } => {
            driver::services::start_forgotten(app);
            manual::reconcile(app, *scope)
        }
        Call::Resume => manual::resume(app),
        Call::Watch { vmid, after } => watch::run(app, *vmid, *after),
        Call::Attach { ctid, wish, dry_run: true } => print(&containers::attach::plan(app, *ctid, wish)?),
        Call::Attach { ctid, wish, dry_run: false } => containers::attach::attach(app, *ctid, wish),
        Call::Detach { ctid, dry_run: true } => print(&containers::attach::plan_detach(app, *ctid)?),
        Call::Detach { ctid, dry_run: false } => containers::attach::detach(app, *ctid),
        Call::Setup { ctid, wish, driver_only, dry_run: true } => {
            print(&containers::setup::plan(app, *ctid, wish, *driver_only)?)
        }
        Call::Setup { ctid, wish, driver_only, dry_run: false } => {
            containers::setup::setup(app, *ctid, wish, *driver_only)
        }
        Call::Check { who } => {
            let (report, done) = containers::check::check(app, *who)?;
            print(&report)?;
            done
        }
        Call::Sync { who, dry_run: true } => print(&containers::setup::plan_sync(app, *who)?),
        Call::Sync { who, dry_run: false } => containers::setup::sync(app, *who),
        Call::Enable { id, dry_run: true } => print(&registration::plan_enable(app, *id)?),
        Call::Enable { id, dry_run: false } => registration::enable(app, *id),
        Call::Disable { id, dry_run: true } => print(&registration::plan_disable(app, *id)?),
        Call::Disable { id, dry_run: false } => registration::disable(app, *id),
        Call::SetUp { what, dry_run: true } => print(&setup::plan(app, what)?),
        Call::SetUp { what, dry_run: false } => setup::run(app, what),
        Call::ConfigCheck => check_config(app),
        Call::ConfigShow => print(&report::config::to_text(&config::effective(&app.kernel).map_err(Stop::usage)?)),
        Call::Udev => udev::run(app),
        Call::Settle => settle::run(app),
        Call::Status { json } => status(app, *json),
        Call::History { json, vmid, count } => past(app, *json, *vmid, *count),
        Call::Help { topic } => print(&help::help(topic)),
        Call::Quiet(call) => {
            app.story.be_quiet();
            run(app, call)
        }
        Call::Everyday => {
            print(&help::everyday())?;
            Err(usage("nothing to do"))
        }
        Call::Version => print(concat!("gpu-handoff ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}

fn status(app: &App, json: bool) -> Result<()> {
    let status = Status::read(&app.kernel, &app.store, nix::unistd::geteuid().is_root());
    for problem in status.problems().iter().chain(&stray::of_config(app)) {
        app.story.warn(problem);
    }
    if json { print(&format!("{}\n", status.to_json())) } else { print(&status.to_text()) }
}

fn past(app: &App, json: bool, vmid: Option<u32>, count: Option<usize>) -> Result<()> {
    let mut past = app.store.history().map(History::read).transpose()?.unwrap_or_default();
    for problem in &past.problems {
        app.story.warn(problem);
    }
    history::choose(&mut past, vmid, count);
    if json {
        return print(&history::to_json(&past));
    }
    let zone = Zone::read(env::var("TZ").ok().as_deref(), |path| app.kernel.path(path));
    print(&history::to_text(&past, &zone))
}

fn check_config(app: &App) -> Result<()> {
    let (_, mut problems) = Config::read(&app.kernel).map_err(Stop::usage)?;
    problems.extend(stray::of_config(app));
    match problems.as_slice() {
        [] => print(&format!("{}: nothing is wrong\n", config::PATH)),
        [problem] => Err(Stop::usage(problem)),
        [others @ .., last] => {
            others.iter().for_each(|problem| app.story.error(problem));
            Err(Stop::usage(last))
        }
    }
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
        // Whatever a later Proxmox has to add.
        for line in ["111 pre-start now", "111 pre-start --node pve", "111 pre-start --node=pve -x 7"] {
            assert_eq!(parsed(line), Ok(Call::Hook { id: 111, phase: "pre-start".to_string() }), "{line}");
        }
        for line in ["--status", "status"] {
            assert_eq!(parsed(line), Ok(Call::Status { json: false }));
            assert_eq!(parsed(&format!("{line} --json")), Ok(Call::Status { json: true }));
        }
        let history = |json, vmid, count| Ok(Call::History { json, vmid, count });
        assert_eq!(parsed("history"), history(false, None, None));
        for line in ["history --json", "history --output-format json", "history --output-format=json"] {
            assert_eq!(parsed(line), history(true, None, None), "{line}");
        }
        for line in ["history 111 -n 5", "history -n5 111", "history -n=5 111 --output-format text"] {
            assert_eq!(parsed(line), history(false, Some(111), Some(5)), "{line}");
        }
        for line in ["to-vfio", "to_vfio", "handoff vfio"] {
            assert_eq!(parsed(line), Ok(Call::ToVfio { slot: None, dry_run: false }));
            assert_eq!(
                parsed(&format!("{line} 01:00")),
                Ok(Call::ToVfio { slot: Some("01:00".to_string()), dry_run: false })
            );
        }
        for line in ["to-home", "to-nvidia", "to_nvidia", "handoff nvidia"] {
            assert_eq!(parsed(line), Ok(Call::ToNvidia { slot: None, dry_run: false }));
        }
        for line in ["to-home 01:00", "to-home --gpu 01:00", "to-home --gpu=01:00"] {
            assert_eq!(parsed(line), Ok(Call::ToNvidia { slot: Some("01:00".to_string()), dry_run: false }));
        }
        assert_eq!(parsed("to-nvidia --dry-run"), Ok(Call::ToNvidia { slot: None, dry_run: true }));
        assert_eq!(parsed("plan 111"), Ok(Call::Plan { vmid: 111, json: false }));
        assert_eq!(parsed("reconcile --dry-run"), Ok(Call::Reconcile { scope: Scope::All, dry_run: true }));
        assert_eq!(parsed("reconcile --unfinished"), Ok(Call::Reconcile { scope: Scope::Unfinished, dry_run: false }));
        assert_eq!(parsed("reconcile --owed"), Ok(Call::Reconcile { scope: Scope::Owed, dry_run: false }));
        assert_eq!(parsed("watch 111"), Ok(Call::Watch { vmid: 111, after: After::Start }));
        assert_eq!(parsed("watch 111 --reboot"), Ok(Call::Watch { vmid: 111, after: After::Reboot }));
        assert_eq!(parsed("watch 111 --stop"), Ok(Call::Watch { vmid: 111, after: After::Stop }));
        assert_eq!(parsed("-V"), Ok(Call::Version));
        assert_eq!(parsed("config check"), Ok(Call::ConfigCheck));
        assert_eq!(parsed("config show"), Ok(Call::ConfigShow));
        let quiet = Call::Quiet(Box::new(Call::Plan { vmid: 111, json: true }));
        assert_eq!(parsed("plan --quiet 111 --json"), Ok(quiet));
        for line in ["", "--json"] {
            assert_eq!(parsed(line), Ok(Call::Everyday));
        }
        let wish =
            |gpus: &[&str], style, dri| Wish { gpus: gpus.iter().map(ToString::to_string).collect(), style, dri };
        for (line, wish) in [
            ("container attach 101", wish(&[], None, false)),
            ("container attach 101 --gpu 01:00 --gpu=02:00 --dri", wish(&["01:00", "02:00"], None, true)),
            ("container attach 101 02:00 --gpu 01:00", wish(&["01:00", "02:00"], None, false)),
            ("container attach --style dev 101", wish(&[], Some(Style::Dev), false)),
            ("container attach 101 --style mount", wish(&[], Some(Style::Mount), false)),
        ] {
            assert_eq!(parsed(line), Ok(Call::Attach { ctid: 101, wish, dry_run: false }), "{line}");
        }
        assert_eq!(parsed("container detach 101 --dry-run"), Ok(Call::Detach { ctid: 101, dry_run: true }));
        assert_eq!(parsed("container check --all"), Ok(Call::Check { who: Who::All }));
        let kernel = setup::What::Kernel("6.8.12-4-pve".to_string());
        assert_eq!(parsed("setup driver --kernel 6.8.12-4-pve"), Ok(Call::SetUp { what: kernel, dry_run: false }));
        let vfio = vfio::Wish { cmdline: true, ..vfio::Wish::default() };
        let driver = driver::Wish { purge: true, ..driver::Wish::default() };
        let all = setup::What::All(vfio, driver);
        assert_eq!(parsed("setup all --cmdline --purge --dry-run"), Ok(Call::SetUp { what: all, dry_run: true }));
        assert_eq!(parsed("container sync 101"), Ok(Call::Sync { who: Who::One(101), dry_run: false }));
    }

    #[test]
    fn help_is_never_an_error() {
        for (line, topic) in [
            ("--help", ""),
            ("-h", ""),
            ("help", ""),
            ("help help", ""),
            ("111 --help", ""),
            ("plan --help", "plan"),
            ("plan -h", "plan"),
            ("help plan", "plan"),
            ("--help plan", "plan"),
            ("to-nvidia 01:00 02:00 --help", "to-home"),
            ("container attach --dri --help", "container attach"),
            ("help container check", "container check"),
            ("container --help", "container"),
            ("help container", "container"),
            ("udev --help", "udev"),
        ] {
            assert_eq!(parsed(line), Ok(Call::Help { topic: topic.to_string() }), "{line}");
        }
        // Whatever a later Proxmox has to add.
        assert_eq!(parsed("111 pre-start --help"), Ok(Call::Hook { id: 111, phase: "pre-start".to_string() }));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, problem) in [
            ("111", "guest 111 needs a phase"),
            ("--dry-run 111 pre-start", "--dry-run goes with a verb"),
            ("reconcile --unfinished --owed", "--unfinished and --owed exclude each other"),
            ("99999999999 pre-start", "99999999999 is no guest id"),
            ("to-vfio --force", "--force is unknown"),
            ("to-vfio 01:00 02:00", "02:00 is too much"),
            ("handoff", "handoff needs vfio or nvidia"),
            ("frobnicate", "frobnicate is unknown;"),
            ("stauts", "stauts is unknown, did you mean --status?;"),
            ("plan 111 --jsno", "--jsno is unknown, did you mean --json?;"),
            ("help stauts", "stauts is unknown, did you mean --status?;"),
            ("to-home 01:00 --gpu 02:00", "01:00 is too much"),
            ("to-home --gpu -x", "-x is no slot"),
            ("--status now", "now is too much"),
            ("to-vfio --json", "--json goes with --status, history and plan"),
            ("111 pre-start --dry-run", "--dry-run goes with a verb"),
            ("--status --dry-run", "--dry-run goes with a verb"),
            ("--status --unfinished", "--unfinished goes with reconcile"),
            ("history 111 112", "112 is too much"),
            ("history now", "now is no guest id"),
            ("history -n", "missing argument for option '-n'"),
            ("history -n few", "-n few is no number"),
            ("plan 111 -n 5", "-n goes with history"),
            ("plan 111 --output-format yaml", "--output-format yaml is unknown: text or json"),
            ("to-vfio --output-format json", "--output-format goes with --status, history and plan"),
            ("111 pre-start --dry-run --quiet", "--dry-run goes with a verb"),
            ("--quiet 111 pre-start", "--quiet goes with a verb;"),
            ("history --dry-run", "--dry-run goes with a verb"),
            ("plan", "plan needs the id of a VM"),
            ("plan gpu", "gpu is no guest id"),
            ("watch", "watch needs the id of a VM"),
            ("watch 111 112", "112 is too much"),
            ("reconcile --reboot", "--reboot goes with watch"),
            ("container", "container needs attach, detach, setup, check or sync"),
            ("container frob 101", "container needs attach, detach, setup, check or sync"),
            ("container attach", "container attach needs the id of a container"),
            ("container attach gpu", "gpu is no guest id"),
            ("container attach 101 102", "102 is too much"),
            ("container attach 101 --style vfio", "--style vfio is unknown: mount or dev"),
            ("container attach 101 --gpu", "missing argument for option '--gpu'"),
            ("container attach --all", "container attach needs the id of a container"),
            ("container detach 101 --dri", "--dri goes with container attach and container setup"),
            ("container check", "container check needs the id of a container, or --all"),
            ("container check 101 --all", "101 and --all exclude each other"),
            ("container check 101 --dry-run", "--dry-run goes with a verb"),
            ("config", "config needs check or show"),
            ("setup", "setup needs vfio, driver, all or pending"),
            ("setup vfio --purge", "--purge goes with setup driver and setup all"),
            ("setup vfio --undo --cmdline", "--undo takes all of it back: leave out --cmdline"),
            ("setup driver --undo --defer", "--undo takes all of it back: leave out --defer"),
            ("setup driver --kernel 6.8.12-4-pve --purge", "--kernel stands alone"),
            ("setup driver --kernel", "missing argument for option '--kernel'"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.starts_with(problem), "{line}: {message}");
        }
    }
}
