//! Every key of the configuration: what it may hold, and what it has where nobody says otherwise.

use crate::address::SlotId;
use crate::cpus::Cpus;
use crate::decimal::seconds;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a key may hold.
enum Holds {
    /// At least so many thousandths, and the default.
    Seconds(u64, u64),
    /// The first is the default.
    Word(&'static [&'static str]),
    /// Any of these, none by default.
    Words(&'static [&'static str]),
    TextOrNull,
    /// By an absolute path that ends like this.
    FileOrNull(&'static str),
    /// A program by its absolute path, and its arguments.
    Program,
    Flag,
    Cpus,
}

impl Holds {
    fn default(&self) -> Value {
        match self {
            Holds::Seconds(_, default) => (*default).into(),
            Holds::Word(words) => words.first().copied().into(),
            Holds::TextOrNull | Holds::FileOrNull(_) | Holds::Program | Holds::Cpus => Value::Null,
            Holds::Flag => false.into(),
            Holds::Words(_) => Value::Array(Vec::new()),
        }
    }
}

/// Every key there is. `*` stands for a slot, a CTID, a VMID or a service. Where both are there, `a.*` and `a.*.b`, one alone
/// has either a word or an object.
const KEYS: &[(&str, Holds)] = &[
    ("gpus.*.home", Holds::Word(&["auto", "nvidia", "nouveau", "vfio-pci", "none"])),
    // With less an ordinary modprobe, which gets two thirds of it, would look stuck.
    ("time.handoff_s", Holds::Seconds(1000, 60)),
    ("time.lock_s", Holds::Seconds(100, 10)),
    ("time.stop_s", Holds::Seconds(100, 90)),
    ("time.backup_s", Holds::Seconds(100, 600)),
    ("policy.process", Holds::Word(&["refuse", "kill"])),
    ("policy.unit", Holds::Word(&["refuse", "stop"])),
    ("policy.units.*", Holds::Word(&["refuse", "stop"])),
    ("policy.units.*.release", Holds::Program),
    ("policy.units.*.else", Holds::Word(&["refuse", "stop"])),
    ("policy.nvidia_services", Holds::Word(&["stop", "refuse"])),
    ("policy.container", Holds::Word(&["refuse", "stop", "leave"])),
    ("policy.containers.*", Holds::Word(&["refuse", "stop", "leave"])),
    ("policy.containers.*.release", Holds::Program),
    ("policy.containers.*.else", Holds::Word(&["refuse", "stop", "leave"])),
    ("policy.vm", Holds::Word(&["refuse", "shutdown", "stop"])),
    ("policy.vms.*", Holds::Word(&["refuse", "shutdown", "stop"])),
    ("policy.vm_resume", Holds::Flag),
    ("policy.backup", Holds::Word(&["idle", "refuse", "policy", "wait"])),
    ("policy.others", Holds::Word(&["leave", "home"])),
    ("policy.ct_without_gpu", Holds::Word(&["start", "refuse"])),
    ("driver.runfile", Holds::TextOrNull),
    ("driver.runfile_url", Holds::TextOrNull),
    ("driver.sha256", Holds::TextOrNull),
    ("driver.dkms", Holds::Flag),
    ("driver.module", Holds::Word(&["auto", "open", "proprietary"])),
    ("cuda.package", Holds::TextOrNull),
    ("cuda.repo", Holds::TextOrNull),
    // node_exporter reads no other.
    ("metrics.textfile", Holds::FileOrNull(".prom")),
    ("vzdump.script", Holds::FileOrNull("")),
    ("vms.*.pin.vcpus", Holds::Cpus),
    ("vms.*.pin.emulator", Holds::Cpus),
    ("vms.*.pin.iothreads", Holds::Cpus),
    ("vms.*.pin.irq", Holds::Cpus),
    // Those of Linux; which of them a CPU has is asked where it is known.
    ("vms.*.pin.governor", Holds::Word(&["performance", "powersave", "schedutil", "ondemand", "conservative"])),
    ("notify.about", Holds::Words(&["stranded", "wedged", "owed", "driver"])),
];

/// Takes out of a document what cannot stand there: an unknown key, a wrong type, a slot that is none or is there twice. A
/// line on each, by its path. Whether anything is left.
pub(super) fn weed(value: &mut Value, path: &mut Vec<String>, problems: &mut Vec<String>) -> bool {
    // A key may be any text, the message is one line.
    let at = |path: &[String]| path.join(".").escape_debug().to_string();
    let mut wrong = |problem: String| {
        problems.push(problem);
        false
    };
    let has_parts = || value.is_object() && KEYS.iter().any(|(key, _)| begins(key, path) && !fits(key, path));
    if let Some((_, kind)) = KEYS.iter().find(|(pattern, _)| fits(pattern, path)).filter(|_| !has_parts()) {
        return match check_value(value, kind) {
            Ok(()) => true,
            Err(expected) => wrong(format!("{}: expected {expected}, got {value}", at(path))),
        };
    }
    if !KEYS.iter().any(|(pattern, _)| begins(pattern, path)) {
        return wrong(format!("{}: unknown key", at(path)));
    }
    let Value::Object(entries) = value else {
        let place = if path.is_empty() { "the document".to_string() } else { at(path) };
        return wrong(format!("{place}: expected an object, got {value}"));
    };
    let mut slots = BTreeMap::new();
    entries.retain(|key, inner| {
        path.push(key.clone());
        let of_slot = || match SlotId::from_written(key) {
            _ if !matches!(path.as_slice(), [gpus, _] if gpus == "gpus") => Ok(()),
            None => Err(format!("{}: no slot; a slot is written like 0000:01:00", at(path))),
            Some(slot) => match slots.insert(slot, key.clone()) {
                Some(other) => Err(format!("{}: the same slot as {other}", at(path))),
                None => Ok(()),
            },
        };
        let is_right = match { of_slot }() {
            Ok(()) => weed(inner, path, problems),
            Err(problem) => {
                problems.push(problem);
                false
            }
        };
        path.pop();
        is_right
    });
    true
}

/// Of a document that was weeded.
pub(super) fn effective(document: &Value) -> Vec<(String, Value, bool)> {
    let mut all = Vec::new();
    for (pattern, kind) in KEYS {
        let (before, after) = pattern.split_once('*').unwrap_or((pattern, ""));
        let pointer = |key: &str| format!("/{}", key.trim_matches('.').replace('.', "/"));
        let found = document.pointer(&pointer(before));
        if before == *pattern {
            all.push((pattern.to_string(), found.cloned().unwrap_or_else(|| kind.default()), found.is_some()));
            continue;
        }
        for (name, entry) in found.and_then(Value::as_object).into_iter().flatten() {
            let own = Some(entry).filter(|entry| !entry.is_object());
            let entry = if after.is_empty() { own } else { entry.pointer(&pointer(after)) };
            all.extend(entry.map(|value| (format!("{before}{name}{after}"), value.clone(), true)));
        }
    }
    all
}

fn check_value(value: &Value, kind: &Holds) -> Result<(), String> {
    let (right, expected) = match kind {
        Holds::Seconds(least, _) => {
            let right = value.as_f64().is_some_and(|s| (*least as f64 / 1000.0..=3600.0).contains(&s));
            (right, format!("seconds from {} to 3600", seconds(Duration::from_millis(*least))))
        }
        Holds::Word(words) => (value.as_str().is_some_and(|w| words.contains(&w)), words.join(" or ")),
        Holds::Words(words) => {
            let is_word = |word: &Value| word.as_str().is_some_and(|word| words.contains(&word));
            (value.as_array().is_some_and(|all| all.iter().all(is_word)), format!("a list of {}", words.join(", ")))
        }
        Holds::TextOrNull => (value.is_string() || value.is_null(), "a string or null".to_string()),
        Holds::FileOrNull(end) => {
            let is_file = |text: &str| text.starts_with('/') && text.ends_with(end) && !text.contains('\n');
            let ending = if end.is_empty() { String::new() } else { format!(" that ends in {end}") };
            (value.is_null() || value.as_str().is_some_and(is_file), format!("an absolute path{ending}, or null"))
        }
        Holds::Program => {
            let words = value.as_array().filter(|words| words.iter().all(Value::is_string));
            let program = words.and_then(|words| words.first()?.as_str());
            (
                program.is_some_and(|program| program.starts_with('/')),
                "a list of strings, the first an absolute path".to_string(),
            )
        }
        Holds::Cpus => {
            (value.as_str().is_some_and(|text| Cpus::parse(text).is_some()), "CPUs as in 2-5,8, each once".to_string())
        }
        Holds::Flag => (value.is_boolean(), "true or false".to_string()),
    };
    if right { Ok(()) } else { Err(expected) }
}

fn fits(pattern: &str, path: &[String]) -> bool {
    pattern.split('.').count() == path.len() && begins(pattern, path)
}

/// Whether `path` is the beginning of `pattern`.
fn begins(pattern: &str, path: &[String]) -> bool {
    let parts: Vec<&str> = pattern.split('.').collect();
    let before = [""].iter().chain(&parts);
    path.len() <= parts.len()
        && path.iter().zip(&parts).zip(before).all(|((key, part), before)| match (*part, *before) {
            ("*", "gpus") => true,
            ("*", "units") => key.len() > ".service".len() && key.ends_with(".service"),
            ("*", _) => key.bytes().all(|b| b.is_ascii_digit()) && key.parse::<u32>().is_ok(),
            (part, _) => part == key,
        })
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use serde_json::json;

    #[test]
    fn every_default_is_right_and_is_the_one_that_holds() {
        let mut document = json!({});
        for (pattern, kind) in KEYS.iter().filter(|(pattern, _)| !pattern.contains('*')) {
            assert_eq!(check_value(&kind.default(), kind), Ok(()), "{pattern}");
            let (section, key) = pattern.split_once('.').unwrap();
            document[section][key] = kind.default();
        }
        assert_eq!(Config::parse(document.to_string().as_bytes()).unwrap(), Config::default());
        for (key, value, is_said) in effective(&Value::Null) {
            let (section, key) = key.split_once('.').unwrap();
            assert_eq!((&document[section][key], is_said), (&value, false), "{section}.{key}");
        }
    }

    #[test]
    fn a_mistake_takes_nothing_else_with_it() {
        let mut document = json!({
            "gpus": {"01:00": {"home": "none"}, "0000:01:00": {"home": "nouveau"}, "x": {"home": "none"}},
            "tine": 7,
            "time": {"lock_s": "3", "stop_s": 5},
            "policy": {"unt": "stop", "process": "kill", "containers": {"101": "stop", "web": "stop", "102": "halt"}},
            "driver": [],
        });
        let mut problems = Vec::new();
        assert!(weed(&mut document, &mut Vec::new(), &mut problems));
        let left = json!({
            "gpus": {"0000:01:00": {"home": "nouveau"}},
            "time": {"stop_s": 5},
            "policy": {"process": "kill", "containers": {"101": "stop"}},
        });
        assert_eq!(document, left);
        let keys: Vec<&str> = problems.iter().map(|problem| problem.split_once(": ").unwrap().0).collect();
        let expected = [
            "driver",
            "gpus.01:00",
            "gpus.x",
            "policy.containers.102",
            "policy.containers.web",
            "policy.unt",
            "time.lock_s",
            "tine",
        ];
        assert_eq!(keys, expected);
    }

    #[test]
    fn one_alone_has_a_word_or_an_object() {
        let release = json!(["/usr/bin/curl", "-d", ""]);
        let mut document = json!({"policy": {
            "units": {"a.service": {"release": release, "else": "stop"}, "b.service": "stop", "c.scope": "stop",
                "d.service": {"release": ["curl"]}, "e.service": {"release": "/bin/e"}, "f.service": {"otherwise": "stop"},
                "g.service": {"release": []}, "h.service": {"else": "leave"}, ".service": "stop", "i.service": 7},
            "containers": {"101": {"release": ["/bin/c"], "else": "leave"}, "102": {"release": ["/bin/c", 7]}},
            "vms": {"111": {"release": ["/bin/c"]}},
        }});
        let mut problems = Vec::new();
        assert!(weed(&mut document, &mut Vec::new(), &mut problems));
        let left = json!({"policy": {
            "units": {"a.service": {"release": release, "else": "stop"}, "b.service": "stop", "d.service": {},
                "e.service": {}, "f.service": {}, "g.service": {}, "h.service": {}},
            "containers": {"101": {"release": ["/bin/c"], "else": "leave"}, "102": {}}, "vms": {},
        }});
        assert_eq!(document, left);
        problems.sort();
        let expected = [
            r#"policy.containers.102.release: expected a list of strings, the first an absolute path, got ["/bin/c",7]"#,
            "policy.units..service: unknown key",
            "policy.units.c.scope: unknown key",
            r#"policy.units.d.service.release: expected a list of strings, the first an absolute path, got ["curl"]"#,
            r#"policy.units.e.service.release: expected a list of strings, the first an absolute path, got "/bin/e""#,
            "policy.units.f.service.otherwise: unknown key",
            "policy.units.g.service.release: expected a list of strings, the first an absolute path, got []",
            "policy.units.h.service.else: expected refuse or stop, got \"leave\"",
            "policy.units.i.service: expected refuse or stop, got 7",
            r#"policy.vms.111: expected refuse or shutdown or stop, got {"release":["/bin/c"]}"#,
        ];
        assert_eq!(problems, expected);
        let said: Vec<String> =
            effective(&document).into_iter().filter_map(|(key, _, said)| said.then_some(key)).collect();
        let expected = [
            "policy.units.b.service",
            "policy.units.a.service.release",
            "policy.units.a.service.else",
            "policy.containers.101.release",
            "policy.containers.101.else",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn what_holds_and_who_says_so() {
        let document = json!({"gpus": {"01:00": {"home": "none"}, "02:00": {}}, "policy": {"containers": {"101": "stop"}},
            "time": {"lock_s": 10}});
        let all = effective(&document);
        let said: Vec<&str> = all.iter().filter(|(.., is_said)| *is_said).map(|(key, ..)| key.as_str()).collect();
        assert_eq!(said, ["gpus.01:00.home", "time.lock_s", "policy.containers.101"]);
        assert!(all.contains(&("policy.nvidia_services".to_string(), json!("stop"), false)));
    }
}
