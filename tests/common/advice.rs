//! What a message says to type is typed, on a copy of the tree that it was said about.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// Each once, whatever its numbers are.
static TYPED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Whatever of these a message names is meant to be typed.
const TOOLS: [(&str, &[&str]); 3] = [
    ("qm", &["start", "stop", "shutdown", "reboot", "resume", "set", "unlock", "list", "config", "status"]),
    ("pct", &["start", "stop", "shutdown", "reboot", "set", "unlock", "list", "exec", "clone", "resize", "unmount"]),
    ("systemctl", &["start", "stop", "restart", "disable", "enable", "unmask", "--user"]),
];

/// Where this program is spoken of, and not typed.
const PROSE: [&str; 8] = ["brings", "did", "does", "has", "is", "itself", "keeps", "may"];

const WITH_A_VALUE: [&str; 5] = ["--explain", "--gpu", "--storage", "--style", "--to"];

/// What stands behind `program` and a blank, up to where a sentence goes on.
fn behind<'a>(text: &'a str, program: &str) -> Vec<&'a str> {
    let begins = format!("{program} ");
    let is_word = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || "/-_.".contains(c));
    let starts = text.match_indices(&begins).filter(|(at, _)| is_word(*at)).map(|(at, _)| &text[at + begins.len()..]);
    let end = |rest: &str| {
        let ends = [";", ", ", "(", ")", ": ", "\n", ". ", "\"", " && "].iter().filter_map(|end| rest.find(end));
        ends.min().unwrap_or(rest.len())
    };
    starts.map(|rest| rest[..end(rest)].trim_end_matches(['.', ',', ':', ' '])).collect()
}

/// Arguments of this program, without what a sentence says of them: `doctor 111 tells what to type`.
fn arguments(behind: &str) -> Vec<&str> {
    let mut words: Vec<&str> = Vec::new();
    for word in behind.split(' ') {
        let last = words.last().copied().unwrap_or_default();
        let is_second = matches!((last, word), ("setup", "vfio" | "driver" | "pending") | ("config", "check" | "show"))
            || (words.len() == 1 && last == "container");
        let is_argument = word.starts_with('-') || word.contains(|c: char| c.is_ascii_digit() || c == '/');
        if words.is_empty() || is_second || is_argument || WITH_A_VALUE.contains(&last) {
            words.push(word);
        } else {
            break;
        }
    }
    words
}

/// Digits as one, so that one message is one, whatever it is about.
fn shape(command: &str) -> String {
    let mut shape = String::new();
    for c in command.chars() {
        let c = if c.is_ascii_hexdigit() && c.is_ascii_digit() { '0' } else { c };
        if !(c == '0' && shape.ends_with('0')) {
            shape.push(c);
        }
    }
    shape
}

fn is_new(command: &str) -> bool {
    TYPED.lock().unwrap().insert(shape(command))
}

/// # Panics
/// When something is named that the program it is for would not understand, or that is refused with the same again.
pub fn is_understood(root: &Path, said: &str, binary: &str) {
    for (tool, verbs) in TOOLS {
        for command in behind(said, tool) {
            let verb = command.split(' ').next().unwrap_or_default();
            assert!(verbs.contains(&verb), "{tool} {command}: {said}");
        }
    }
    for behind in behind(said, "gpu-handoff") {
        let words = arguments(behind);
        let command = format!("gpu-handoff {}", words.join(" "));
        let is_pattern = behind.split(' ').any(|word| word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase()));
        if is_pattern || PROSE.contains(&words[0]) || words[0].contains('.') || !is_new(&command) {
            continue;
        }
        let copy = root.with_extension("typed");
        let _ = std::fs::remove_dir_all(&copy);
        assert!(Command::new("/bin/cp").arg("-a").arg(root).arg(&copy).status().unwrap().success());
        let typed =
            Command::new(binary).args(&words).env("GPU_HANDOFF_ROOT", &copy).env("LC_ALL", "C").output().unwrap();
        let _ = std::fs::remove_dir_all(&copy);
        let answer = String::from_utf8_lossy(&typed.stderr);
        // What is wrong with the configuration is this one's answer, and may have been said beside the command.
        let why = answer.trim_start_matches("gpu-handoff: error: ").trim_end();
        let is_answer = command == "gpu-handoff config check" || said.contains(&format!("found  {why}\n"));
        assert!(
            is_answer || typed.status.code() != Some(2),
            "{said}\nnames {command}, which is answered with: {answer}"
        );
        // Where it is to be typed after something else, that was not done.
        let line = said.lines().find(|line| line.contains(&command)).unwrap_or_default();
        let is_last =
            line.split(&command).next().is_some_and(|before| before.contains("then") || before.ends_with("; "));
        let is_circle = !is_last && typed.status.code() == Some(3) && answer.contains(&command);
        assert!(!is_circle, "{said}\nnames {command}, which is refused with itself: {answer}");
    }
}
