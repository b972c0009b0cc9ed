//! Runs tests with one mutant switched on, the quick ones first, until one notices.

use crate::list::Mutant;
use crate::tree::Built;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// So many of the quickest tests come before all others.
const FIRST: usize = 10;

/// What a test may take in any case, on a machine that has other things to do.
const LEAST: Duration = Duration::from_secs(60);

/// The programs with tests, the quick ones first.
const ORDER: [&str; 4] = ["lib", "vectors", "trees", "simulation"];

pub const SIMULATION: usize = 3;

/// A program that is one test, or one test of a program that has many.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Test {
    /// Its place in [`ORDER`].
    pub layer: usize,
    pub name: Option<String>,
}

/// What is known of a test when nothing is switched on.
#[derive(Debug, Clone, Default)]
pub struct Known {
    pub took: Duration,
    pub reaches: BTreeSet<usize>,
}

pub struct Runner {
    pub sandbox: PathBuf,
    /// Where a test may write.
    pub scratch: PathBuf,
    /// Where tests are run.
    pub root: PathBuf,
    pub programs: BTreeMap<usize, PathBuf>,
    pub known: BTreeMap<Test, Known>,
    pub simulation: bool,
    /// Tests that noticed a mutant of a file: they are likely to notice the next.
    pub noticed: BTreeMap<String, BTreeSet<String>>,
}

enum End {
    Passed,
    /// With the first test that failed, when one is named.
    Failed(Option<String>),
    OutOfTime,
}

impl Runner {
    pub fn use_built(&mut self, built: &[Built]) {
        let layer = |built: &Built| ORDER.iter().position(|name| *name == built.target);
        self.programs = built.iter().filter_map(|built| Some((layer(built)?, built.program.clone()))).collect();
    }

    /// Every test by itself, with nothing switched on: how long it takes and which mutants it reaches. Those that fail are
    /// told and left out.
    ///
    /// # Errors
    /// When no test can be run.
    pub fn look(&mut self, saved: &Path) -> io::Result<()> {
        let mut tests = Vec::new();
        for layer in self.programs.keys().copied().filter(|layer| self.simulation || *layer != SIMULATION) {
            match ORDER[layer] {
                "vectors" | "simulation" => tests.push(Test { layer, name: None }),
                _ => tests.extend(self.names(layer)?.into_iter().map(|name| Test { layer, name: Some(name) })),
            }
        }
        self.known = read_known(saved);
        println!("mutants: {} tests, {} of them looked at before", tests.len(), self.known.len());
        self.known.retain(|test, _| tests.contains(test));
        let notes = self.scratch.join("notes");
        for test in tests {
            if self.known.contains_key(&test) {
                continue;
            }
            let _ = fs::remove_file(&notes);
            let begin = Instant::now();
            let named: Vec<&str> = test.name.iter().map(String::as_str).collect();
            let environment = ("GPU_HANDOFF_MUTANT_NOTES", notes.display().to_string());
            match self.run(test.layer, &named, &environment, Duration::from_secs(3600))? {
                End::Passed => {
                    let text = fs::read_to_string(&notes).unwrap_or_default();
                    let reaches = text.lines().filter_map(|line| line.parse().ok()).collect();
                    let known = Known { took: begin.elapsed(), reaches };
                    append(saved, &known_line(&test, &known))?;
                    self.known.insert(test, known);
                }
                _ => println!("mutants: left out, fails with nothing changed: {} {:?}", ORDER[test.layer], test.name),
            }
        }
        Ok(())
    }

    fn names(&self, layer: usize) -> io::Result<Vec<String>> {
        let Some(program) = self.programs.get(&layer) else { return Ok(Vec::new()) };
        let output = Command::new(program).args(["--list", "--format", "terse"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_string).collect())
    }

    /// Which test notices this mutant, or what else befell; none when none does. `woven`: only those that reach it can.
    /// `from`: what stands before this layer is known not to.
    ///
    /// # Errors
    /// When no test can be run.
    pub fn notices(&self, mutant: &Mutant, woven: bool, from: usize) -> io::Result<Option<String>> {
        let number = if woven { mutant.number } else { 0 };
        let environment = ("GPU_HANDOFF_MUTANT", number.to_string());
        let before = self.noticed.get(&mutant.file);
        let is_likely =
            |test: &Test| test.name.as_ref().is_some_and(|name| before.is_some_and(|before| before.contains(name)));
        for layer in self.programs.keys().copied().filter(|layer| *layer >= from) {
            let concerns = |known: &Known| !woven || known.reaches.contains(&number);
            let here = self.known.iter().filter(|(test, known)| test.layer == layer && concerns(known));
            let mut tests: Vec<(&Test, Duration)> = here.map(|(test, known)| (test, known.took)).collect();
            tests.sort_by_key(|(test, took)| (!is_likely(test), *took));
            let (first, rest) = tests.split_at(tests.len().min(FIRST));
            for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
                if let Some(by) = self.part_notices(layer, part, &environment)? {
                    return Ok(Some(by));
                }
            }
        }
        Ok(None)
    }

    fn part_notices(
        &self,
        layer: usize,
        tests: &[(&Test, Duration)],
        environment: &(&str, String),
    ) -> io::Result<Option<String>> {
        let mut names: Vec<&str> = tests.iter().filter_map(|(test, _)| test.name.as_deref()).collect();
        let is_whole = names.is_empty();
        let limit = LEAST + tests.iter().map(|(_, took)| *took * 3).sum::<Duration>();
        loop {
            let by = match self.run(layer, &names, environment, limit)? {
                End::Passed => return Ok(None),
                End::OutOfTime => return Ok(Some(format!("{}: out of time", ORDER[layer]))),
                End::Failed(None) => return Ok(Some(ORDER[layer].to_string())),
                End::Failed(Some(name)) => name,
            };
            // One that fails now and then proves nothing, nor one that has too little time on a busy machine.
            let again = is_whole || !matches!(self.run(layer, &[&by], environment, limit)?, End::Passed);
            let nothing = (environment.0, "0".to_string());
            if again && (is_whole || matches!(self.run(layer, &[&by], &nothing, limit)?, End::Passed)) {
                return Ok(Some(format!("{}: {by}", ORDER[layer])));
            }
            names.retain(|name| *name != by);
            if names.is_empty() {
                return Ok(None);
            }
        }
    }

    fn run(&self, layer: usize, names: &[&str], environment: &(&str, String), limit: Duration) -> io::Result<End> {
        let Some(program) = self.programs.get(&layer) else { return Ok(End::Passed) };
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc"]).arg(&self.sandbox);
        command.arg(&self.scratch).arg(program).current_dir(&self.root).env(environment.0, &environment.1);
        if !names.is_empty() {
            command.args(["--exact", "--test-threads", "2"]).args(names);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (send, lines) = channel();
        if let Some(output) = child.stdout.take() {
            // It ends with whoever writes.
            thread::spawn(move || {
                let mut lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
                lines.all(|line| send.send(line).is_ok())
            });
        }
        let end = Instant::now() + limit;
        let seen = loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => break Some(End::OutOfTime),
                Err(RecvTimeoutError::Disconnected) => break None,
                Ok(line) => {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    let failed = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED"));
                    if let Some(name) = failed {
                        break Some(End::Failed(Some(name.to_string())));
                    }
                }
            }
        };
        if let Some(seen) = seen {
            child.kill()?;
            child.wait()?;
            return Ok(seen);
        }
        Ok(if child.wait()?.success() { End::Passed } else { End::Failed(None) })
    }
}

fn known_line(test: &Test, known: &Known) -> String {
    let reaches: Vec<String> = known.reaches.iter().map(usize::to_string).collect();
    let name = test.name.as_deref().unwrap_or("-");
    format!("{} {name} {} {}\n", test.layer, known.took.as_millis(), reaches.join(","))
}

fn read_known(saved: &Path) -> BTreeMap<Test, Known> {
    let text = fs::read_to_string(saved).unwrap_or_default();
    let read = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [layer, name, took, reaches] = words[..] else { return None };
        let name = (name != "-").then(|| name.to_string());
        let reaches = reaches.split(',').filter_map(|number| number.parse().ok()).collect();
        let took = Duration::from_millis(took.parse().ok()?);
        Some((Test { layer: layer.parse().ok()?, name }, Known { took, reaches }))
    };
    text.lines().filter_map(read).collect()
}

/// # Errors
/// When it cannot be written.
pub fn append(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().append(true).create(true).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}
