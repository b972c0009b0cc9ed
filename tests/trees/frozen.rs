use super::attach::{BEFORE, CONFIG, RECORD, ready};
use super::*;

// What 0.1.0 wrote is read, and gone on with, by this version.

const VM: &str = include_str!("../fixtures/state-0.1.0/vm-111");
const JOURNAL: &str = include_str!("../fixtures/state-0.1.0/journal");
const HISTORY: &str = include_str!("../fixtures/state-0.1.0/history.jsonl");
const LAST: &str = include_str!("../fixtures/state-0.1.0/last");
const CONTAINER: &str = include_str!("../fixtures/state-0.1.0/101.json");

#[test]
fn a_start_that_the_earlier_version_was_killed_in_comes_home() {
    let host = host().file("run/gpu-handoff/vm-111", VM).file("run/gpu-handoff/journal", JOURNAL);
    let status = super::status::status(&host);
    assert_eq!(status["gpus"][0]["owed"][0]["what"], "home", "{status}");
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(run.err.contains("0000:01:00 is home") && !run.err.contains("warning"), "{}", run.err);
    assert!(!host.has_own_file("vm-111") && !host.has_own_file("journal"));
}

#[test]
fn the_earlier_versions_history_is_told() {
    let host = host().file("var/lib/gpu-handoff/history.jsonl", HISTORY).file("run/gpu-handoff/last-0000:01:00", LAST);
    let run = host.run("history --json");
    assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
    let entries = run.out.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let exits: Vec<_> = entries.map(|entry| entry["exit"].clone()).collect();
    assert_eq!(exits, [3, 1, 0], "{}", run.out);
    assert_eq!(super::status::status(&host)["gpus"][0]["last"]["direction"], "home");
}

#[test]
fn what_the_earlier_version_gave_a_container_is_taken_back() {
    let host = ready();
    host.run("container attach 101");
    let attached = std::fs::read_to_string(host.path(CONFIG)).unwrap();
    let record: serde_json::Value = serde_json::from_str(CONTAINER).unwrap();
    let lines = record["lines"].as_array().unwrap();
    assert!(lines.iter().all(|line| attached.contains(line["line"].as_str().unwrap())), "the lines are those of now");
    let host = host.file(RECORD, CONTAINER);
    assert_eq!(host.run("container detach 101").code, Some(0));
    assert_eq!(std::fs::read_to_string(host.path(CONFIG)).unwrap(), BEFORE);
}
