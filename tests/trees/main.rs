//! What the program says no to, and what it only reads, run as Proxmox or a person runs it on a tree of files.
//!
//! Whether something is accepted shows in how far the run gets: a card that is at home on vfio-pci passes every check
//! and then has nothing to do, which is a success.

#![allow(
    clippy::disallowed_methods,
    clippy::too_many_lines,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr
)]

#[path = "../common/tree.rs"]
mod tree;

mod advice;
mod attach;
mod attach_refused;
mod by_hand;
mod cards;
mod cluster;
mod companions;
mod doctor;
mod doctor_boot;
mod doctor_cases;
mod doctor_containers;
mod doctor_driver;
mod doctor_guests;
mod doctor_host;
mod doctor_ours;
mod driver;
mod events;
mod files;
mod frozen;
mod given;
mod guests;
mod history;
mod holders;
mod mappings;
mod metrics;
mod news;
mod owed;
mod pin;
mod policy;
mod refresh;
mod registration;
mod runs;
mod schemas;
mod screens;
mod setup;
mod setup_causes;
mod setup_driver;
mod setup_installer;
mod setup_kernels;
mod setup_vfio;
mod starts;
mod status;
mod switch;
mod trace;
mod vm_resume;
mod vzdump;
mod watched;

use guests::*;
use holders::*;
use serde_json::{Value, json};
use status::*;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tree::{Host, Run, START, device};

/// No kernel gives a process such a number, so it is never that of the program itself.
const PID: u32 = 5_000_001;

/// Every process may open it, so its number (1:3) can stand for that of a GPU's node.
const NULL: &str = "/dev/null";
const NULL_NUMBER: &str = "1:3\n";

/// One GPU that the host uses, and VM 111 that takes it.
fn host() -> Host {
    Host::new().card("0000:01:00", "nvidia", "snd_hda_intel").vm(111, "hostpci0: 0000:01:00,pcie=1")
}

/// The same, but the GPU is at home on vfio-pci.
fn settled() -> Host {
    Host::new().card("0000:01:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 0000:01:00,pcie=1")
}

/// The exit code and the one line are these, and nothing was touched. Who asks beforehand is told the same, and then
/// not even a lock is taken.
#[track_caller]
fn refuses(host: &Host, call: &str, code: i32, message: &str) {
    let before = host.snapshot();
    if let Some(question) = beforehand(call) {
        assert_eq!(host.run(&question), refusal(code, message), "{question}");
        assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{question}");
    }
    refuses_now(host, call, code, message);
}

/// As [`refuses`], but nobody asks beforehand.
#[track_caller]
fn refuses_now(host: &Host, call: &str, code: i32, message: &str) {
    let before = host.snapshot().without_lock();
    assert_eq!(host.run(call), refusal(code, message), "{call}");
    assert_eq!(host.snapshot().without_lock().changes_since(&before), NOTHING, "{call}");
}

fn refusal(code: i32, message: &str) -> Run {
    Run { code: Some(code), out: String::new(), err: format!("gpu-handoff: error: {message}\n") }
}

/// How to ask what a call would do.
fn beforehand(call: &str) -> Option<String> {
    match call.split_once(' ') {
        Some((id, "pre-start")) => Some(format!("plan {id}")),
        Some((id, _)) if id.parse::<u32>().is_ok() => None,
        _ => Some(format!("{call} --dry-run")),
    }
}

/// These lines on standard output, and nothing changed: not even a lock was taken.
#[track_caller]
fn plans(host: &Host, call: &str, lines: &[&str]) {
    let before = host.snapshot();
    let out: String = lines.iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(host.run(call), Run { code: Some(0), out, err: String::new() }, "{call}");
    assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}");
}

/// The lines that a run wrote, without the name before them and without how long it took.
fn told(run: &Run) -> Vec<String> {
    let line = |line: &str| {
        let line = line.strip_prefix("gpu-handoff: ").unwrap();
        let Some((before, after)) = line.split_once(" ms") else { return line.to_string() };
        format!("{} N ms{after}", before.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end())
    };
    run.err.lines().map(line).collect()
}

/// Success without a word, and not even a lock was taken.
#[track_caller]
fn ignores(host: &Host, call: &str) {
    let before = host.snapshot();
    assert_eq!(host.run(call), Run { code: Some(0), out: String::new(), err: String::new() }, "{call}");
    assert_eq!(host.snapshot().changes_since(&before), NOTHING, "{call}");
}

/// Passes every check: a settled card is ready for its VM as it is.
#[track_caller]
fn accepts(host: &Host, what: &str) {
    plans(host, "plan 111", &["0000:01:00 host -> VM 111", "  nothing to do"]);
    assert_eq!(host.run("111 pre-start"), ready(), "{what}");
}

fn ready() -> Run {
    success("0000:01:00 is already on vfio-pci: nothing to do")
}

fn success(line: &str) -> Run {
    Run { code: Some(0), out: String::new(), err: format!("gpu-handoff: {line}\n") }
}

const NOTHING: [&str; 0] = [];
