//! From the words of a command line to what they ask for.

use super::call::{Asked, Call};
use super::flags::Flag;
use super::given::{Flags, Given, guest_id, usage};
use super::help;
use super::verbs::{self, VERBS, Verb};
use crate::exit::{Exit, Result};
use lexopt::Arg;
use std::ffi::OsString;

/// # Errors
/// One line saying what is wrong with the arguments.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Asked> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let more = after_phase(&arguments);
    // A later Proxmox may say more about a phase, and a start must not fail for that; but this is a person's.
    if more.as_ref().is_some_and(|more| more.iter().any(|word| word == "--dry-run")) {
        return Err(misplaced("dry-run"));
    }
    let is_hook = more.is_some();
    let mut parser = lexopt::Parser::from_args(arguments.into_iter().take(if is_hook { 2 } else { usize::MAX }));
    let mut words: Vec<String> = Vec::new();
    let mut flags = Flags::new();
    while let Some(argument) = parser.next().map_err(|e| usage(&e.to_string()))? {
        match argument {
            Arg::Value(word) => words.push(word.to_string_lossy().into_owned()),
            Arg::Short(_) | Arg::Long(_) => {
                let spelled = match argument {
                    Arg::Short(name) => format!("-{name}"),
                    Arg::Long(name) => format!("--{name}"),
                    Arg::Value(_) => continue,
                };
                let Some(flag) = verbs::flags().find(|flag| flag.spelled() == spelled) else {
                    words.push(spelled);
                    continue;
                };
                let values = flags.entry(flag.name).or_default();
                if flag.value.is_some() {
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
        return Ok(Asked { call: Call::Help { topic: topic_of(&topic)? }, quiet: false, dry_run: false });
    }
    Ok(Asked {
        call: call(&words, &flags)?,
        quiet: flags.contains_key("quiet"),
        dry_run: flags.contains_key("dry-run"),
    })
}

/// What the words of somebody who asks for help are about: a verb, or the first word of several. What follows it is in
/// nobody's way, and a guest's id is no verb.
fn topic_of(words: &[&str]) -> Result<String> {
    let [first, ..] = words else { return Ok(String::new()) };
    if guest_id(first).is_ok() {
        return Ok(String::new());
    }
    match find(words) {
        Ok((verb, _)) => Ok(verb.name().to_string()),
        Err(_) if !seconds(first).is_empty() => Ok((*first).to_string()),
        Err(exit) => Err(exit),
    }
}

/// What follows a guest's id and a phase; none when it is another call.
fn after_phase(arguments: &[OsString]) -> Option<Vec<String>> {
    let [id, phase, more @ ..] = arguments else { return None };
    let is_id = id.to_str().is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()));
    let is_phase = !phase.to_string_lossy().starts_with('-');
    (is_id && is_phase).then(|| more.iter().map(|word| word.to_string_lossy().into_owned()).collect())
}

fn call(words: &[&str], flags: &Flags) -> Result<Call> {
    let Some((first, rest)) = words.split_first() else { return Ok(Call::Everyday) };
    if first.bytes().all(|b| b.is_ascii_digit()) {
        let id = guest_id(first)?;
        let phase = rest.first().ok_or_else(|| usage(&format!("guest {id} needs a phase, such as pre-start")))?;
        refuse_other_flags(flags, |_| false)?;
        return Ok(Call::Hook { id, phase: (*phase).to_string() });
    }
    let (verb, rest) = find(words)?;
    let mut given = Given { verb: verb.name(), words: rest, flags };
    let call = (verb.call)(&mut given)?;
    match given.words.first() {
        Some(flag) if flag.starts_with('-') => return Err(unknown(flag)),
        Some(more) => return Err(usage(&format!("{more} is too much"))),
        None => {}
    }
    refuse_other_flags(flags, |flag| verb.takes(flag))?;
    Ok(call)
}

/// The verb that the words begin with, and what comes after it.
fn find<'a>(words: &'a [&'a str]) -> Result<(&'static Verb, &'a [&'a str])> {
    let named = |name: &str| VERBS.iter().find(|verb| verb.names.contains(&name));
    let [first, rest @ ..] = words else { return Err(usage("a verb is missing")) };
    if let Some(verb) = named(first) {
        return Ok((verb, rest));
    }
    if let [second, rest @ ..] = rest
        && let Some(verb) = named(&format!("{first} {second}"))
    {
        return Ok((verb, rest));
    }
    Err(match seconds(first).as_slice() {
        [] => unknown(first),
        several => usage(&format!("{first} needs {}", listed(several, " or "))),
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

fn refuse_other_flags(flags: &Flags, takes: impl Fn(&str) -> bool) -> Result<()> {
    match flags.keys().find(|flag| !takes(flag)) {
        Some(flag) => Err(misplaced(flag)),
        None => Ok(()),
    }
}

/// A flag where it does not belong.
fn misplaced(flag: &str) -> Exit {
    let verbs: Vec<&str> = VERBS.iter().filter(|verb| verb.takes(flag)).map(Verb::name).collect();
    usage(&match flag {
        "quiet" => "--quiet goes with a verb".to_string(),
        "dry-run" => "--dry-run goes with a verb that changes something, and plan VMID is that of a start".to_string(),
        _ => {
            let spelled = verbs::flags().find(|known| known.name == flag).map(Flag::spelled);
            format!("{} goes with {}", spelled.unwrap_or_default(), listed(&verbs, " and "))
        }
    })
}

fn unknown(word: &str) -> Exit {
    let meant = help::meant(word, verbs::flags().map(Flag::spelled))
        .map_or_else(String::new, |name| format!(", did you mean {name}?"));
    usage(&format!("{word} is unknown{meant}"))
}

#[cfg(test)]
pub(super) fn parsed(line: &str) -> std::result::Result<Asked, String> {
    parse(line.split_whitespace().map(OsString::from)).map_err(|exit| exit.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::SlotId;
    use crate::containers::{Style, Who, Wish};
    use crate::doctor::{self, How};
    use crate::events::watch::After;
    use crate::handoff::way::reconcile::Scope;
    use crate::setup::{self, driver, vfio};

    fn parsed(line: &str) -> std::result::Result<Call, String> {
        super::parsed(line).map(|asked| asked.call)
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
            assert_eq!(parsed(line), Ok(Call::Status { json: false, check: false }));
            assert_eq!(parsed(&format!("{line} --json")), Ok(Call::Status { json: true, check: false }));
            assert_eq!(parsed(&format!("{line} --check")), Ok(Call::Status { json: false, check: true }));
        }
        let doctor = |guest, how| Ok(Call::Doctor(doctor::Wish { guest, how }));
        for (line, guest, how) in [
            ("doctor", None, How::Tell { json: false }),
            ("doctor 111 --json", Some(111), How::Tell { json: true }),
            ("doctor --output-format json", None, How::Tell { json: true }),
            ("doctor --explain iommu-off", None, How::Explain("iommu-off".to_string())),
            ("doctor --fix", None, How::Fix),
            ("doctor 101 --fix --dry-run", Some(101), How::Fix),
            ("doctor --report", None, How::Report { to: None }),
            ("doctor --report --to /root/x", None, How::Report { to: Some("/root/x".to_string()) }),
        ] {
            assert_eq!(parsed(line), doctor(guest, how), "{line}");
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
            assert_eq!(parsed(line), Ok(Call::ToVfio { slot: None }));
            assert_eq!(parsed(&format!("{line} 01:00")), Ok(Call::ToVfio { slot: SlotId::from_written("01:00") }));
        }
        for line in ["to-home", "to-nvidia", "to_nvidia", "handoff nvidia"] {
            assert_eq!(parsed(line), Ok(Call::ToNvidia { slot: None }));
        }
        for line in ["to-home 01:00", "to-home --gpu 01:00", "to-home --gpu=01:00"] {
            assert_eq!(parsed(line), Ok(Call::ToNvidia { slot: SlotId::from_written("01:00") }));
        }
        assert_eq!(parsed("to-nvidia --dry-run"), Ok(Call::ToNvidia { slot: None }));
        let is_dry = |line: &str| super::parsed(line).map(|asked| asked.dry_run);
        for line in ["to-nvidia", "container detach 101", "setup all --cmdline --purge", "reconcile", "enable 111"] {
            assert_eq!(is_dry(line), Ok(false), "{line}");
            assert_eq!(is_dry(&format!("{line} --dry-run")), Ok(true), "{line}");
        }
        assert_eq!(parsed("plan 111"), Ok(Call::Plan { vmid: 111, json: false }));
        let storage = |storage: Option<&str>| Ok(Call::Enable { id: 111, storage: storage.map(str::to_string) });
        assert_eq!(parsed("enable 111"), storage(None));
        assert_eq!(parsed("enable 111 --storage nas"), storage(Some("nas")));
        assert_eq!(parsed("reconcile --dry-run"), Ok(Call::Reconcile { scope: Scope::All }));
        assert_eq!(parsed("reconcile --unfinished"), Ok(Call::Reconcile { scope: Scope::Unfinished }));
        assert_eq!(parsed("reconcile --owed"), Ok(Call::Reconcile { scope: Scope::Owed }));
        assert_eq!(parsed("watch 111"), Ok(Call::Watch { vmid: 111, after: After::Start }));
        assert_eq!(parsed("watch 111 --reboot"), Ok(Call::Watch { vmid: 111, after: After::Reboot }));
        assert_eq!(parsed("watch 111 --stop"), Ok(Call::Watch { vmid: 111, after: After::Stop }));
        assert_eq!(parsed("-V"), Ok(Call::Version));
        assert_eq!(parsed("config check"), Ok(Call::ConfigCheck));
        assert_eq!(parsed("config show"), Ok(Call::ConfigShow));
        let quiet = Asked { call: Call::Plan { vmid: 111, json: true }, quiet: true, dry_run: false };
        assert_eq!(super::parsed("plan --quiet 111 --json"), Ok(quiet));
        for line in ["", "--json"] {
            assert_eq!(parsed(line), Ok(Call::Everyday));
        }
        let wish = |gpus: &[&str], style, dri| Wish {
            gpus: gpus.iter().filter_map(|gpu| SlotId::from_written(gpu)).collect(),
            style,
            dri,
        };
        for (line, wish) in [
            ("container attach 101", wish(&[], None, false)),
            ("container attach 101 --gpu 01:00 --gpu=02:00 --dri", wish(&["01:00", "02:00"], None, true)),
            ("container attach 101 02:00 --gpu 01:00", wish(&["01:00", "02:00"], None, false)),
            ("container attach --style dev 101", wish(&[], Some(Style::Dev), false)),
            ("container attach 101 --style mount", wish(&[], Some(Style::Mount), false)),
        ] {
            assert_eq!(parsed(line), Ok(Call::Attach { ctid: 101, wish }), "{line}");
        }
        assert_eq!(parsed("container detach 101 --dry-run"), Ok(Call::Detach { ctid: 101 }));
        assert_eq!(parsed("container check --all"), Ok(Call::Check { who: Who::All }));
        let kernel = setup::What::Kernel("6.8.12-4-pve".to_string());
        assert_eq!(parsed("setup driver --kernel 6.8.12-4-pve"), Ok(Call::HostSetup { what: kernel }));
        let vfio = vfio::Wish { cmdline: true, ..vfio::Wish::default() };
        let driver = driver::Wish { purge: true, ..driver::Wish::default() };
        let all = setup::What::All(vfio, driver);
        assert_eq!(parsed("setup all --cmdline --purge --dry-run"), Ok(Call::HostSetup { what: all }));
        assert_eq!(parsed("container sync 101"), Ok(Call::Sync { who: Who::One(101) }));
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
            ("to-vfio --json", "--json goes with --status, doctor, history and plan"),
            ("111 pre-start --dry-run", "--dry-run goes with a verb"),
            ("--status --dry-run", "--dry-run goes with a verb"),
            ("--status --unfinished", "--unfinished goes with reconcile"),
            ("history 111 112", "112 is too much"),
            ("history now", "now is no guest id"),
            ("history -n", "missing argument for option '-n'"),
            ("history -n few", "-n few is no number"),
            ("plan 111 -n 5", "-n goes with history"),
            ("plan 111 --output-format yaml", "--output-format yaml is unknown: text or json"),
            ("to-vfio --output-format json", "--output-format goes with --status, doctor, history and plan"),
            ("111 pre-start --dry-run --quiet", "--dry-run goes with a verb"),
            ("--quiet 111 pre-start", "--quiet goes with a verb;"),
            ("history --dry-run", "--dry-run goes with a verb"),
            ("plan", "plan needs the id of a VM"),
            ("plan gpu", "gpu is no guest id"),
            ("doctor gpu", "gpu is no guest id"),
            ("doctor 111 112", "112 is too much"),
            ("doctor --fix --report", "--fix and --report exclude each other"),
            ("doctor --fix --json", "--fix and --json exclude each other"),
            ("doctor --dry-run", "--dry-run of doctor goes with --fix"),
            ("doctor --to x", "--to of doctor goes with --report"),
            ("doctor 111 --explain x", "--explain stands alone"),
            ("doctor --explain", "missing argument for option '--explain'"),
            ("plan 111 --fix", "--fix goes with doctor"),
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
