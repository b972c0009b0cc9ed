//! Makes one plausible mistake after the other and sees whether a test notices.
//!
//! cargo-mutants says which mistakes there are. All are compiled into one copy of the sources, each behind a switch (`weave`), so
//! that a mistake costs no build, only the tests that reach it (`run`). `tests/mutants` says how it is called.

// The files of this repository, not of a host.
#![allow(clippy::disallowed_methods)]

mod list;
mod run;
mod tree;
mod weave;

use list::Mutant;
use run::Runner;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs, io};
use tree::Tree;

/// Where a mistake costs most comes first.
const FIRST: [&str; 5] = ["src/handoff/plan/", "src/handoff/way/", "src/handoff/kept/", "src/gpu/", "src/sys/"];

/// What a run without the simulation found.
const QUICK: &str = "-quick";

const ALIVE: &str = "tests/mutants.alive";

fn main() -> io::Result<ExitCode> {
    let mut work = Work::new()?;
    let mut mutants = list::read(&work.folder.join("list.json"))?;
    let mut tree = Tree::new(&work.home, &work.folder, &mutants)?;
    tree.weave(&work.folder.join("woven"))?;
    let Some(built) = tree.build(work.simulation)? else {
        return Err(io::Error::other("the copy's tests do not compile"));
    };
    let mut runner = work.runner(&tree)?;
    runner.use_built(&built);
    runner.look(&work.folder.join(format!("reach-{:016x}", work.state(&tree)?)))?;

    let place = |mutant: &Mutant| FIRST.iter().position(|room| mutant.file.starts_with(room)).unwrap_or(FIRST.len());
    mutants.sort_by_key(|mutant| (place(mutant), mutant.number));
    let (woven, alone): (Vec<&Mutant>, Vec<&Mutant>) = mutants.iter().partition(|mutant| tree.is_woven(mutant));
    let alone: Vec<&Mutant> = alone.into_iter().filter(|mutant| !tree.unviable.contains(&mutant.number)).collect();
    let unviable = tree.unviable.len();
    println!("mutants: {} in all, {unviable} are no Rust, {} need a build each", mutants.len(), alone.len());
    for mutant in woven {
        let from = work.begin(mutant)?;
        let by = work.attempt(mutant, || runner.notices(mutant, true, from).map(Some))?;
        if let Some((_, test)) = by.as_deref().and_then(|by| by.split_once(": ")) {
            runner.noticed.entry(mutant.file.clone()).or_default().insert(test.to_string());
        }
    }
    for mutant in alone {
        work.attempt(mutant, || {
            tree.write_alone(&work_home(), mutant)?;
            let outcome = match tree.build(runner.simulation)? {
                Some(_) => Some(runner.notices(mutant, false, 0)?),
                None => None,
            };
            tree.write_woven(&mutant.file)?;
            Ok(outcome)
        })?;
    }
    work.report()
}

fn work_home() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// What is on disk of it.
struct Work {
    home: PathBuf,
    folder: PathBuf,
    /// What came of a mutant, by its key.
    tried: BTreeMap<String, Outcome>,
    /// Of everything that could notice one.
    tests: u64,
    simulation: bool,
    alive: BTreeSet<String>,
    count: [usize; 3],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Caught,
    Alive,
    Unviable,
}

impl Work {
    fn new() -> io::Result<Work> {
        let home = work_home().canonicalize()?;
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| home.join("target"), PathBuf::from);
        let folder = target.join("mutants");
        fs::create_dir_all(&folder)?;
        let mut tried = BTreeMap::new();
        for line in fs::read_to_string(folder.join("tried")).unwrap_or_default().lines() {
            let Some((key, rest)) = line.split_once(' ') else { continue };
            let outcome = match rest.split(' ').next() {
                Some("caught") => Outcome::Caught,
                Some("alive") => Outcome::Alive,
                _ => Outcome::Unviable,
            };
            tried.insert(key.to_string(), outcome);
        }
        let mut tests = 0;
        for folder in ["src", "tests"] {
            for path in tree::sources(&home.join(folder))? {
                tests = hash(tests, &fs::read(path)?);
            }
        }
        let simulation = env::var_os("WITHOUT_SIMULATION").is_none();
        Ok(Work { home, folder, tried, tests, simulation, alive: BTreeSet::new(), count: [0; 3] })
    }

    fn runner(&self, tree: &Tree) -> io::Result<Runner> {
        let scratch = self.folder.join("scratch");
        fs::create_dir_all(&scratch)?;
        let sandbox = self.home.join("dev/mutants/sandbox");
        let (root, simulation) = (tree.root.clone(), self.simulation);
        let (programs, known, noticed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Ok(Runner { sandbox, scratch, root, programs, known, simulation, noticed })
    }

    /// Of what is built, but for its unit tests: what a test reaches stays the same when another is added.
    fn state(&self, tree: &Tree) -> io::Result<u64> {
        let mut state = 0;
        for path in tree::sources(&tree.root.join("src"))? {
            if path.ends_with("tests.rs") {
                continue;
            }
            state = hash(state, tree::code(&fs::read_to_string(path)?).as_bytes());
        }
        Ok(state)
    }

    /// One that was caught stays so as long as its file, but for the unit tests in it, does; one that lives, as long as
    /// nothing changes.
    fn keys(&self, mutant: &Mutant) -> io::Result<[String; 2]> {
        let text = fs::read_to_string(self.home.join(&mutant.file))?;
        let this = format!("{:?} {:?} {} {}", mutant.start, mutant.end, mutant.replacement, mutant.name);
        let key = hash(hash(0, tree::code(&text).as_bytes()), this.as_bytes());
        let quick = if self.simulation { "" } else { QUICK };
        Ok([format!("{key:016x}"), format!("{key:016x}-{:016x}{quick}", self.tests)])
    }

    /// The first layer that can tell more than a run without the simulation has.
    fn begin(&self, mutant: &Mutant) -> io::Result<usize> {
        let [_, alive] = self.keys(mutant)?;
        let before = self.tried.get(&format!("{alive}{QUICK}"));
        Ok(if before == Some(&Outcome::Alive) { run::SIMULATION } else { 0 })
    }

    /// The test that noticed it, if it was tried now and one did.
    fn attempt(
        &mut self,
        mutant: &Mutant,
        attempt: impl FnOnce() -> io::Result<Option<Option<String>>>,
    ) -> io::Result<Option<String>> {
        let keys = self.keys(mutant)?;
        let before = keys.iter().find_map(|key| self.tried.get(key)).copied();
        let mut test = None;
        let outcome = match before {
            Some(outcome) => outcome,
            None => {
                let done = attempt()?;
                test = done.clone().flatten();
                let (key, outcome, by) = match done {
                    None => (&keys[0], Outcome::Unviable, "unviable".to_string()),
                    Some(Some(by)) => (&keys[0], Outcome::Caught, format!("caught by {by}")),
                    Some(None) => (&keys[1], Outcome::Alive, "alive".to_string()),
                };
                let line = format!("{by} {}:{}:{} {}", mutant.file, mutant.start.0, mutant.start.1, mutant.name);
                run::append(&self.folder.join("tried"), &format!("{key} {line}\n"))?;
                if outcome == Outcome::Alive {
                    println!("{line}");
                }
                outcome
            }
        };
        self.count[outcome as usize] += 1;
        if outcome == Outcome::Alive {
            self.alive.insert(mutant.name.clone());
        }
        Ok(test)
    }

    fn report(&self) -> io::Result<ExitCode> {
        let explained = fs::read_to_string(self.home.join(ALIVE))?;
        let lines = explained.lines().filter(|line| !line.starts_with('#'));
        let may: BTreeSet<&str> = lines.filter_map(|line| Some(line.split_once("  # ")?.0)).collect();
        let [caught, alive, unviable] = self.count;
        println!("mutants: {caught} caught, {alive} alive, {unviable} no Rust after all");
        let unknown: Vec<&String> = self.alive.iter().filter(|name| !may.contains(name.as_str())).collect();
        if unknown.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        println!("mutants: alive, and nobody says why they may:");
        for name in unknown {
            println!("{name}");
        }
        Ok(ExitCode::FAILURE)
    }
}

/// FNV-1a; it only has to tell one state from another.
pub fn hash(before: u64, bytes: &[u8]) -> u64 {
    let begin = before ^ 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(begin, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
