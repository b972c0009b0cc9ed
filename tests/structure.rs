//! The house: ARCHITECTURE.md lists the rooms and the files of `src` from the top to the ground, and a file may use only
//! what stands below it there. So there are no circles, and nothing reaches up.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of one file.
const LONGEST: usize = 500;

/// `src/handoff/way/home.rs` is `handoff::way::home`, `src/handoff/mod.rs` is `handoff`.
type Module = Vec<String>;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> BTreeMap<String, String> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root().join("src")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                let name = entry.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
                found.insert(name, fs::read_to_string(&entry).unwrap());
            }
        }
    }
    found
}

/// The layout of ARCHITECTURE.md: a room at the beginning of a line, in the next lines its files.
fn layout() -> Vec<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let block = text.split("<!-- layout -->").nth(1).expect("ARCHITECTURE.md has a layout between two marks");
    let (mut room, mut files) = (String::new(), Vec::new());
    for line in block.lines().filter(|line| !line.trim().is_empty() && !line.contains("```")) {
        match line.strip_prefix("    ") {
            Some(names) => files.extend(names.split_whitespace().map(|name| format!("{room}/{name}.rs"))),
            None => room = line.split_whitespace().next().unwrap().to_string(),
        }
    }
    files
}

fn module(file: &str) -> Module {
    let path = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
    let parts = path.split('/').map(str::to_string);
    let mut parts: Module = parts.filter(|part| !matches!(part.as_str(), "main" | "lib")).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// Without unit tests, comments and what stands between quotes.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut out = String::new();
    for line in text.lines() {
        let (mut quoted, mut escaped) = (false, false);
        let mut characters = line.chars().peekable();
        while let Some(c) = characters.next() {
            match c {
                _ if quoted => {
                    quoted = escaped || c != '"';
                    escaped = c == '\\' && !escaped;
                }
                '/' if characters.peek() == Some(&'/') => break,
                '"' => quoted = true,
                _ => out.push(c),
            }
        }
        out.push('\n');
    }
    out
}

/// `a::{b, c::{d as e}}` is `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((path, list)) = tree.strip_suffix('}').and_then(|tree| tree.split_once('{')) else {
        return vec![tree.split(" as ").next().unwrap().to_string()];
    };
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in list.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if c == ',' && depth == 0 { parts.push(String::new()) } else { parts.last_mut().unwrap().push(c) }
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expand(part)).map(|part| format!("{path}{part}")).collect()
}

/// Every path that a file's code names: what it imports, and what it says in full or by an imported module's name.
fn paths(code: &str) -> BTreeSet<String> {
    let (mut found, mut known, mut rest) = (BTreeSet::new(), BTreeMap::new(), String::new());
    for statement in code.split_inclusive(';') {
        let begin = statement.rfind("use ").filter(|at| {
            let before = statement[..*at].trim_end_matches("pub ").trim_end();
            before.is_empty() || before.ends_with(['}', ']', '{'])
        });
        let Some(begin) = begin.filter(|_| statement.ends_with(';')) else {
            rest.push_str(statement);
            continue;
        };
        for path in expand(&statement[begin + "use ".len()..statement.len() - 1].replace('\n', " ")) {
            let path = path.replace("::self", "");
            known.insert(path.rsplit("::").next().unwrap().to_string(), path.clone());
            found.insert(path);
        }
    }
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for word in rest.split(|c: char| !is_part(c)).filter(|word| word.contains("::")) {
        let word = word.trim_matches(':');
        let (first, after) = word.split_once("::").unwrap_or((word, ""));
        let whole = known.get(first).map(|path| format!("{path}::{after}"));
        found.insert(whole.unwrap_or_else(|| word.to_string()));
    }
    found
}

/// The file that a path leads to; none when it is not ours.
fn target<'a>(path: &str, user: &Module, modules: &'a BTreeMap<Module, String>) -> Option<&'a String> {
    let parts: Module = path.split("::").map(|part| part.trim().to_string()).collect();
    if parts.starts_with(&["crate".to_string(), "App".to_string()]) {
        // lib.rs only hands it on.
        return modules.get(&vec!["app".to_string()]);
    }
    let supers = parts.iter().take_while(|part| *part == "super").count();
    let (base, names) = match parts[0].as_str() {
        "crate" => (&user[..0], &parts[1..]),
        "self" => (&user[..], &parts[1..]),
        "super" => (&user[..user.len() - supers], &parts[supers..]),
        _ => (&user[..], &parts[..]),
    };
    // A name that is no module of ours leads to the file that it is said in, or out of the crate.
    let whole: Module = base.iter().chain(names).cloned().collect();
    let shortest = if ["crate", "self", "super"].contains(&parts[0].as_str()) { 1 } else { base.len() + 1 };
    (shortest..=whole.len()).rev().find_map(|length| modules.get(&whole[..length]))
}

#[test]
fn every_file_has_its_place() {
    let (sources, layout) = (sources(), layout());
    let listed: BTreeSet<&String> = layout.iter().collect();
    assert_eq!(listed.len(), layout.len(), "a file is listed twice in ARCHITECTURE.md");
    let is_missing = |file: &&String| !listed.contains(file);
    assert_eq!(sources.keys().filter(is_missing).collect::<Vec<_>>(), Vec::<&String>::new(), "not in ARCHITECTURE.md");
    let is_gone = |file: &&&String| !Path::new(&root().join(file)).exists();
    assert_eq!(listed.iter().filter(is_gone).collect::<Vec<_>>(), Vec::<&&String>::new(), "ARCHITECTURE.md has these");
}

#[test]
fn nothing_reaches_up() {
    let (sources, layout) = (sources(), layout());
    let height: BTreeMap<&String, usize> = layout.iter().zip(0..).collect();
    let modules: BTreeMap<Module, String> = sources.keys().map(|file| (module(file), file.clone())).collect();
    let (mut up, mut arrows) = (Vec::new(), 0);
    for (file, text) in &sources {
        for path in paths(&code(text)) {
            let Some(used) = target(&path, &module(file), &modules).filter(|used| *used != file) else { continue };
            arrows += 1;
            if height[used] < height[file] {
                up.push(format!("{file} uses {used}, which stands above it ({path})"));
            }
        }
    }
    assert_eq!(up, Vec::<String>::new());
    // Whoever reads nothing finds nothing.
    assert!(arrows > 500, "only {arrows} uses were found");
}

#[test]
fn a_file_says_what_it_is_for_and_is_not_long() {
    for (file, text) in sources() {
        assert!(text.starts_with("//! "), "{file} does not say in its first line what it is for");
        let lines = text.lines().count();
        assert!(lines <= LONGEST, "{file} has {lines} lines");
    }
}

#[test]
fn paths_are_found_in_all_their_forms() {
    let text = "use crate::gpu::{Slot, inventory::{self, Function as F}};\npub use super::kept;\n\nfn f() {\n    use \
                crate::story::Story;\n    inventory::find(crate::sys::files::write(\"crate::no\"));  // crate::nor\n}\n";
    let found: Vec<String> = paths(&code(text)).into_iter().collect();
    assert_eq!(
        found,
        [
            "crate::gpu::Slot",
            "crate::gpu::inventory",
            "crate::gpu::inventory::Function",
            "crate::gpu::inventory::find",
            "crate::story::Story",
            "crate::sys::files::write",
            "super::kept"
        ]
    );
}
