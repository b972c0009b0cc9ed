//! A copy of everything, with all mutants woven into its sources, and what is built of it.

use crate::hash;
use crate::list::Mutant;
use crate::weave::{Blame, File, Woven};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

/// What asks whether a mutant is switched on, and notes which were asked for.
const SWITCH: &str = include_str!("switch.rs");

/// How often the compiler may find something more; each time it is fewer.
const ROUNDS: usize = 40;

pub struct Tree {
    pub root: PathBuf,
    build: PathBuf,
    files: BTreeMap<String, File>,
    /// What it would do is no Rust.
    pub unviable: BTreeSet<usize>,
}

/// A program that has tests in it.
pub struct Built {
    pub target: String,
    pub program: PathBuf,
}

impl Tree {
    /// # Errors
    /// When the copy cannot be made, or a source is not understood.
    pub fn new(from: &Path, folder: &Path, mutants: &[Mutant]) -> io::Result<Tree> {
        let root = folder.join("tree");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        copy(from, &root)?;
        let mut files = BTreeMap::new();
        for name in mutants.iter().map(|mutant| &mutant.file).collect::<BTreeSet<_>>() {
            let text = fs::read_to_string(from.join(name))?;
            let here: Vec<&Mutant> = mutants.iter().filter(|mutant| mutant.file == *name).collect();
            let file = File::new(&text, &here).map_err(|error| io::Error::other(format!("{name}: {error}")))?;
            files.insert(name.clone(), file);
        }
        let unviable = files.values().flat_map(|file: &File| &file.unviable).copied().collect();
        let tree = Tree { root, build: folder.join("build"), files, unviable };
        tree.prepare(mutants.len())?;
        Ok(tree)
    }

    /// All but the mutants: the switch, and that it reaches whatever a test starts.
    fn prepare(&self, mutants: usize) -> io::Result<()> {
        let library = self.root.join("src/lib.rs");
        let text = fs::read_to_string(&library)?;
        fs::write(library, format!("{text}\n#[doc(hidden)]\npub mod mutation;\n"))?;
        let switch = SWITCH.replace("MUTANTS: usize = 0", &format!("MUTANTS: usize = {mutants}"));
        fs::write(self.root.join("src/mutation.rs"), switch)?;
        let passed =
            "std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with(\"GPU_HANDOFF_MUTANT\"))";
        for path in sources(&self.root.join("tests"))? {
            let text = fs::read_to_string(&path)?;
            let mut changed = text.replace(".env_clear()", &format!(".env_clear().envs({passed})"));
            // The first failure is enough.
            let end = "if std::env::var_os(\"GPU_HANDOFF_MUTANT\").is_some() { std::process::exit(1) }";
            if path.ends_with("simulation/main.rs") {
                changed = changed.replacen("self.failed += 1;", &format!("self.failed += 1; {end}"), 1);
                if !changed.contains(end) {
                    return Err(io::Error::other("the simulation counts its failures in another way"));
                }
            }
            if changed != text {
                fs::write(path, changed)?;
            }
        }
        Ok(())
    }

    /// Drops what does not compile until the rest does; `saved` is what the last time came to.
    ///
    /// # Errors
    /// When that leads nowhere.
    pub fn weave(&mut self, saved: &Path) -> io::Result<()> {
        let state = self.files.values().fold(0, |state, file| hash(state, code(&file.weave().text).as_bytes()));
        self.drop_again(&format!("{state:016x}"), &fs::read_to_string(saved).unwrap_or_default());
        self.drop_what_fails()?;
        let unviable: Vec<String> = self.unviable.iter().map(usize::to_string).collect();
        let woven = self.files.values().flat_map(|file| file.woven.keys()).map(usize::to_string).collect::<Vec<_>>();
        fs::write(saved, format!("{state:016x}\n{}\n{}\n", unviable.join(" "), woven.join(" ")))
    }

    fn drop_again(&mut self, state: &str, saved: &str) {
        let mut lines = saved.lines();
        if lines.next() != Some(state) {
            return;
        }
        let mut numbers =
            || lines.next().unwrap_or_default().split(' ').filter_map(|number| number.parse().ok()).collect();
        let (unviable, woven): (BTreeSet<usize>, BTreeSet<usize>) = (numbers(), numbers());
        self.unviable.extend(unviable);
        for file in self.files.values_mut() {
            file.woven.retain(|mutant, _| woven.contains(mutant));
        }
    }

    fn drop_what_fails(&mut self) -> io::Result<()> {
        for round in 1..=ROUNDS {
            let woven: BTreeMap<&String, Woven> = self.files.iter().map(|(name, file)| (name, file.weave())).collect();
            for (name, woven) in &woven {
                let path = self.root.join(name);
                if fs::read_to_string(&path)? != woven.text {
                    fs::write(path, &woven.text)?;
                }
            }
            let (done, messages) = self.cargo(&["check", "--lib", "--bins"])?;
            let errors: Vec<Trouble> = messages.iter().filter_map(Trouble::read).collect();
            println!("mutants: woven in, round {round}: {} do not compile", errors.len());
            if done {
                return Ok(());
            }
            let mut blames = Vec::new();
            for error in &errors {
                let blame =
                    error.places.iter().find_map(|(file, range)| Some((file.clone(), woven.get(file)?.blame(range)?)));
                match blame {
                    Some(blame) => blames.push(blame),
                    None => eprintln!("mutants: nobody's: {}", error.text),
                }
            }
            if blames.is_empty() {
                return Err(io::Error::other("the copy does not compile"));
            }
            for (name, blame) in blames {
                let Some(file) = self.files.get_mut(&name) else { continue };
                match blame {
                    Blame::Mutant(mutant) => {
                        file.drop_mutant(mutant);
                        self.unviable.insert(mutant);
                    }
                    Blame::Site(site) => drop(file.drop_site(site)),
                }
            }
        }
        Err(io::Error::other("the copy never compiles"))
    }

    pub fn is_woven(&self, mutant: &Mutant) -> bool {
        self.files.get(&mutant.file).is_some_and(|file| file.woven.contains_key(&mutant.number))
    }

    /// Instead of all that is woven into its file, only this one, written out.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_alone(&self, from: &Path, mutant: &Mutant) -> io::Result<()> {
        let text = fs::read_to_string(from.join(&mutant.file))?;
        let byte = |(line, column): (usize, usize)| {
            let begin: usize = text.split_inclusive('\n').take(line - 1).map(str::len).sum();
            begin + text[begin..].char_indices().nth(column - 1).map_or(0, |(at, _)| at)
        };
        let (start, end) = (byte(mutant.start), byte(mutant.end));
        let changed = format!("{}{}{}", &text[..start], mutant.replacement, &text[end..]);
        fs::write(self.root.join(&mutant.file), changed)
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write_woven(&self, name: &str) -> io::Result<()> {
        let Some(file) = self.files.get(name) else { return Ok(()) };
        fs::write(self.root.join(name), file.weave().text)
    }

    /// The programs with tests; none when it does not compile. The simulation takes long, and pays for being optimized; the
    /// others do not.
    ///
    /// # Errors
    /// When cargo cannot be called.
    pub fn build(&self, simulation: bool) -> io::Result<Option<Vec<Built>>> {
        let quick: &[&str] = &["test", "--no-run", "--lib", "--test", "vectors", "--test", "trees"];
        let slow: &[&str] = &["test", "--no-run", "--test", "simulation", "--config", "profile.dev.opt-level=1"];
        let mut messages = Vec::new();
        for arguments in [quick, slow].into_iter().take(1 + usize::from(simulation)) {
            let (done, told) = self.cargo(arguments)?;
            if !done {
                return Ok(None);
            }
            messages.extend(told);
        }
        let built = |value: &Value| {
            let program = value.get("executable")?.as_str()?;
            let is_test = value.get("profile")?.get("test")?.as_bool()?;
            let target = value.get("target")?;
            let kind = target.get("kind")?.get(0)?.as_str()?;
            let target = if kind == "lib" { "lib" } else { target.get("name")?.as_str()? };
            is_test.then(|| Built { target: target.to_string(), program: program.into() })
        };
        Ok(Some(messages.iter().filter_map(built).collect()))
    }

    fn cargo(&self, arguments: &[&str]) -> io::Result<(bool, Vec<Value>)> {
        let mut cargo = Command::new("cargo");
        cargo.args(["--config", "profile.dev.opt-level=0"]).args(arguments);
        cargo.args(["--locked", "--quiet", "--message-format=json", "--target-dir"]).arg(&self.build);
        // What the compiler would not let pass is made on purpose; cargo reads its warnings.
        let flags = "-Ctarget-feature=+crt-static --cap-lints=warn";
        cargo.current_dir(&self.root).env("RUSTFLAGS", flags).env("CARGO_PROFILE_DEV_DEBUG", "0");
        let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        let lines = output.stdout.split(|byte| *byte == b'\n');
        Ok((output.status.success(), lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()))
    }
}

/// An error of the compiler, and where it is, the likeliest first.
struct Trouble {
    places: Vec<(String, Range<usize>)>,
    text: String,
}

impl Trouble {
    fn read(message: &Value) -> Option<Trouble> {
        let message = message.get("message")?;
        if message.get("level")?.as_str()? != "error" {
            return None;
        }
        let spans = message.get("spans")?.as_array()?;
        let place = |span: &Value| {
            let byte = |key: &str| usize::try_from(span.get(key)?.as_u64()?).ok();
            Some((span.get("file_name")?.as_str()?.to_string(), byte("byte_start")?..byte("byte_end")?))
        };
        let is_primary = |span: &&Value| span.get("is_primary").and_then(Value::as_bool) == Some(true);
        let mut places: Vec<_> = spans.iter().filter(is_primary).filter_map(place).collect();
        places.extend(spans.iter().filter_map(place));
        let text = message.get("rendered")?.as_str()?.to_string();
        (!places.is_empty()).then_some(Trouble { places, text })
    }
}

/// Every file below, but for what is built and what git has.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target, kind) = (entry.path(), to.join(entry.file_name()), entry.file_type()?);
        if ["target", ".git"].iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if kind.is_dir() {
            copy(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, target)?;
        } else {
            fs::copy(source, target)?;
        }
    }
    Ok(())
}

/// A source without its unit tests.
pub fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default()
}

/// Every Rust file below.
pub fn sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}
