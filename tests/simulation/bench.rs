//! Runs the program's handoffs on a simulated machine, with the real records in a directory of our own.

use super::beside::Step;
use super::faults::Fault;
use super::kernel::{Killed, SimKernel, Stalled};
use super::state::State;
use gpu_handoff::address::SlotId;
use gpu_handoff::config::{Config, Time};
use gpu_handoff::events::watch::{After, watch};
use gpu_handoff::exit::Exit;
use gpu_handoff::handoff::Handoff;
use gpu_handoff::handoff::kept::history::History;
use gpu_handoff::handoff::kept::record::{Owner, Record};
use gpu_handoff::handoff::kept::store::Store;
use gpu_handoff::handoff::way::departure::Departure;
use gpu_handoff::handoff::way::home::Asker;
use gpu_handoff::handoff::way::reconcile::Scope;
use gpu_handoff::report::status::Status;
use gpu_handoff::story::Story;
use gpu_handoff::sys::Process;
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Duration;

const HISTORY: &str = "history.jsonl";

const COUNTERS: &str = "counters.json";

/// A place that takes nothing.
const NOWHERE: &str = "/dev/null/history.jsonl";

/// For what systemd starts the keeper.
const KEEPER: &str = include_str!("../../packaging/debian/gpu-handoff.gpu-handoff-keeper.path");
const KEEPERS_PAUSE: Duration = Duration::from_secs(10);
/// Then whatever is left is not for it.
const KEEPERS_LOOKS: usize = 12;

/// What somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    Leave(Owner, Vec<SlotId>),
    Home(Owner),
    Reconcile,
    /// What a worker does that outlives its run.
    Unfinished,
    /// What a start does that has its cards: those that are not named go home.
    Keep(Owner, Vec<SlotId>),
    /// What the keeper does when its timer elapses.
    Owed,
    /// What a watcher does once Proxmox has let go of this VM.
    Watch(u32),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Exit(u8, String),
    Killed,
    /// It reads something that never answers.
    Stalled(String),
    Panicked(String),
}

impl End {
    pub fn code(&self) -> Option<u8> {
        if let End::Exit(code, _) = self { Some(*code) } else { None }
    }
}

/// A run that is over.
#[derive(Debug, Clone)]
pub struct Ran {
    pub end: End,
    pub acts: usize,
    pub took: Duration,
}

/// The machine and what the program keeps, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    pub state: State,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl World {
    /// Without what every run changes: the time, the PIDs, who asked for it.
    pub fn but_for_time(mut self) -> World {
        self.state.outlived.clear();
        // Nor who still reads what does not answer.
        let readers: Vec<i32> =
            self.state.hung.iter().filter(|hung| hung.is_reading()).map(|hung| hung.process.pid).collect();
        self.state.hung.retain(|hung| !hung.is_reading());
        self.state.processes.retain(|pid, _| !readers.contains(pid));
        self.state.now = Duration::ZERO;
        self.state.next_pid = 0;
        for bytes in self.files.values_mut() {
            if let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(bytes) {
                if let Some(object) = value.as_object_mut() {
                    object.remove("caller");
                }
                *bytes = value.to_string().into_bytes();
            }
        }
        self
    }
}

pub struct Bench {
    pub kernel: SimKernel,
    pub store: Store,
    directory: PathBuf,
    pub config: Config,
    story: Story,
    /// What was run since the last restore, for whoever must understand it.
    pub log: Vec<String>,
}

impl Bench {
    pub fn new(directory: PathBuf) -> Bench {
        let _ = fs::create_dir_all(&directory);
        let story = if std::env::var_os("SIMULATION_STORY").is_some() { Story::new(false) } else { Story::silent() };
        Bench {
            kernel: SimKernel::new(State::empty()),
            store: Store::at(directory.clone()),
            directory,
            config: Config { time: Time { lock: Duration::from_millis(50), ..Time::default() }, ..Config::default() },
            story,
            log: Vec::new(),
        }
    }

    pub fn restore(&mut self, world: &World) {
        self.kernel.state.replace(world.state.clone());
        self.kernel.begin(None);
        let have = self.files();
        for name in have.keys().filter(|name| !world.files.contains_key(*name)) {
            let _ = fs::remove_file(self.directory.join(name));
        }
        for (name, bytes) in world.files.iter().filter(|(name, bytes)| have.get(*name) != Some(*bytes)) {
            let _ = fs::write(self.directory.join(name), bytes);
        }
        self.log.clear();
    }

    pub fn world(&self) -> World {
        World { state: self.kernel.state.borrow().clone(), files: self.files() }
    }

    /// But for the locks, and for what is only there to be told about.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !["lock", "next-", "last-", HISTORY, COUNTERS].iter().any(|other| name.starts_with(other)) {
                files.insert(name, fs::read(entry.path()).unwrap_or_default());
            }
        }
        files
    }

    pub fn forget_file(&self, name: &str) {
        let _ = fs::remove_file(self.directory.join(name));
    }

    fn handoff(&self) -> Handoff<'_> {
        Handoff { kernel: &self.kernel, store: &self.store, config: &self.config, story: &self.story }
    }

    pub fn budget(&self) -> Duration {
        self.config.time.handoff
    }

    pub fn run(&mut self, wish: &Wish, fault: Option<Fault>) -> Ran {
        self.run_from(wish, fault, None)
    }

    /// How the handoffs of the last run ended, by its history; a run with a fault had nowhere to write one.
    pub fn history(&self) -> Vec<serde_json::Value> {
        self.store.history().and_then(|history| history.read().ok()).unwrap_or_default().entries
    }

    /// How many handoffs and refusals the last run counted.
    pub fn counted(&self) -> u64 {
        self.store.counters().handoffs.iter().flatten().sum()
    }

    /// One run of the program, called by Proxmox, by a person, or by a worker that outlived its run. Proxmox holds the guest's lock around a hook, and lets go of it afterwards.
    fn run_from(&mut self, wish: &Wish, fault: Option<Fault>, caller: Option<Process>) -> Ran {
        let guest = match wish {
            Wish::Leave(Owner::Vm(id), _) | Wish::Home(Owner::Vm(id)) | Wish::Keep(Owner::Vm(id), _) => Some(*id),
            _ => None,
        };
        self.run_as(guest, &format!("{wish:?}"), fault, caller, &|handoff| match wish {
            Wish::Leave(owner, slots) => handoff.leave(&Departure::of(owner.clone(), slots.clone())),
            Wish::Home(owner) => handoff.come_home(owner, asker(owner)),
            Wish::Reconcile => handoff.reconcile(Scope::All),
            Wish::Unfinished => handoff.reconcile(Scope::Unfinished),
            Wish::Owed => handoff.reconcile(Scope::Owed),
            Wish::Keep(owner, kept) => handoff.come_home_but(owner, kept, "its configuration names it no longer"),
            Wish::Watch(id) => handoff.come_home(&Owner::Vm(*id), Asker::Watcher),
        })
    }

    /// As [`Bench::run`], of what is no wish; called by the hook of a guest, or by nobody's.
    pub fn run_as(
        &mut self,
        guest: Option<u32>,
        name: &str,
        fault: Option<Fault>,
        caller: Option<Process>,
        what: &dyn Fn(&Handoff) -> Result<(), Exit>,
    ) -> Ran {
        [HISTORY, COUNTERS].iter().for_each(|name| self.forget_file(name));
        let history = if fault.is_some() { PathBuf::from(NOWHERE) } else { self.directory.join(HISTORY) };
        self.store = self.store.clone().with_history(History::at(history));
        self.kernel.begin(fault);
        self.kernel.state.borrow_mut().locked_guests.extend(guest);
        self.kernel.call_from(caller);
        let begin = self.kernel.state.borrow().now;
        let handoff = self.handoff();
        let done = catch_unwind(AssertUnwindSafe(|| what(&handoff)));
        let end = match done {
            Ok(Ok(())) => End::Exit(0, String::new()),
            Ok(Err(exit)) => End::Exit(exit.code as u8, exit.to_string()),
            Err(payload) => match payload.downcast::<Killed>() {
                Ok(_) => End::Killed,
                Err(payload) => match payload.downcast::<Stalled>() {
                    Ok(stalled) => End::Stalled(stalled.0),
                    Err(payload) => {
                        let text = payload.downcast_ref::<String>().cloned();
                        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_string()));
                        End::Panicked(text.unwrap_or_default())
                    }
                },
            },
        };
        self.resume();
        let is_alone = fault.is_some_and(|fault| fault.kind.leaves_nobody());
        self.kernel.end(end == End::Killed && !is_alone);
        let acts = self.kernel.acts.borrow().len();
        let took = self.kernel.state.borrow().now.saturating_sub(begin);
        if let Some(id) = guest {
            self.kernel.state.borrow_mut().locked_guests.remove(&id);
        }
        self.log.push(format!("{name} with {fault:?} -> {end:?} after {acts} changes, {took:?}"));
        for act in self.kernel.acts.borrow().iter() {
            self.log.push(format!("    {act:?}"));
        }
        Ran { end, acts, took }
    }

    /// A watcher, with this happening beside it; how much it changed.
    ///
    /// # Errors
    /// Why it did not bring the card home.
    pub fn watch_over(&mut self, vmid: u32, after: After, beside: &[(usize, Step)]) -> Result<usize, String> {
        self.kernel.begin(None);
        self.kernel.let_happen(beside, &self.directory);
        let done = watch(&self.handoff(), vmid, after);
        self.resume();
        self.kernel.end(false);
        done.map_err(|exit| exit.to_string())?;
        Ok(self.kernel.acts.borrow().len())
    }

    /// # Errors
    /// When the record could not be written.
    pub fn save(&self, record: &Record) -> Result<(), String> {
        let path = self.directory.join(record.owner.file_name());
        fs::write(path, record.to_json()).map_err(|error| error.to_string())
    }

    /// systemd starts what was asked for.
    fn resume(&mut self) {
        while std::mem::take(&mut self.kernel.state.borrow_mut().hosted.resume) {
            let took_place = self.kernel.fault_is_set(None);
            let resumed = self.handoff().resume();
            self.kernel.fault_is_set(took_place);
            if let Err(exit) = resumed {
                self.log.push(format!("resume: {exit}"));
            }
        }
    }

    /// Every worker that outlived its run starts reconcile as its last act. The last run of them, if there was one.
    pub fn last_acts(&mut self) -> Option<Ran> {
        let mut last = None;
        loop {
            let next = self.kernel.state.borrow_mut().outlived.pop();
            let Some(worker) = next else { return last };
            last = Some(self.run_from(&Wish::Unfinished, None, Some(worker)));
        }
    }

    /// How many looks at the machine a run without a fault takes.
    pub fn looks_of(&mut self, ready: &super::setup::Ready) -> usize {
        self.restore(&ready.before);
        self.run(&ready.wish, None);
        self.kernel.looks()
    }

    /// `--status`: the word for each slot, or why it could not be had.
    pub fn status(&self) -> Result<BTreeMap<String, String>, String> {
        let read = catch_unwind(AssertUnwindSafe(|| Status::read(&self.kernel, &self.store, true)));
        let status = match read {
            Ok(status) => status.to_json(),
            Err(payload) => {
                let stalled = payload.downcast::<Stalled>().map_or_else(|_| "panic".to_string(), |stalled| stalled.0);
                return Err(format!("status stands still at {stalled}"));
            }
        };
        let gpus = status["gpus"].as_array().cloned().unwrap_or_default();
        let word = |value: &serde_json::Value| value.as_str().unwrap_or("?").to_string();
        Ok(gpus.iter().map(|gpu| (word(&gpu["slot"]), word(&gpu["owner"]["kind"]))).collect())
    }

    /// The GPUs of which `--status` says that they have other nodes in /dev/dri than before.
    pub fn status_of_nodes(&self) -> Vec<String> {
        let status = Status::read(&self.kernel, &self.store, true).to_json();
        let gpus = status["gpus"].as_array().cloned().unwrap_or_default();
        gpus.iter().filter_map(|gpu| Some(gpu["dri"].as_str()?.split(' ').next()?.to_string())).collect()
    }

    pub fn record(&self, owner: &Owner) -> Option<Record> {
        self.store.record(owner).ok().flatten()
    }

    pub fn plan(&self, wish: &Wish) -> Option<gpu_handoff::handoff::plan::Plan> {
        match wish {
            Wish::Leave(owner, slots) => {
                let departure = Departure::of(owner.clone(), slots.clone());
                self.handoff().intend(&departure).ok().map(|intent| intent.plan)
            }
            Wish::Home(owner) => self.handoff().plan_home(&self.record(owner)?).ok(),
            Wish::Reconcile | Wish::Unfinished | Wish::Owed | Wish::Watch(_) | Wish::Keep(..) => None,
        }
    }

    /// Whether one of the files is there for which systemd starts the keeper's timer.
    pub fn has_keeper(&self) -> bool {
        let paths =
            KEEPER.lines().filter_map(|line| line.strip_prefix("PathExists")?.split_once('=')).map(|(_, path)| path);
        let names: Vec<&str> = paths.filter_map(|path| path.strip_prefix("/run/gpu-handoff/")).collect();
        let files = self.files();
        names.iter().any(|name| match name.strip_suffix('*') {
            Some(beginning) => files.keys().any(|file| file.starts_with(beginning)),
            None => files.contains_key(*name),
        })
    }

    /// The keeper looks until it has nothing to do any more. Its last look, if it looked at all.
    pub fn keeper(&mut self) -> Option<Ran> {
        let mut last = None;
        for look in 0..KEEPERS_LOOKS {
            if !self.has_keeper() {
                break;
            }
            // What failed is left alone for a while, and longer each time.
            self.kernel.advance(if look < 3 { KEEPERS_PAUSE } else { Duration::from_secs(600) });
            let before = self.files();
            let ran = self.run(&Wish::Owed, None);
            let is_at_rest = ran.acts == 0 && ran.end.code() == Some(0) && self.files() == before;
            last = Some(ran);
            if is_at_rest {
                break;
            }
        }
        last
    }
}

/// What a VM was given comes home by its hook, what was given by hand by hand.
fn asker(owner: &Owner) -> Asker {
    if owner.vmid().is_some() { Asker::Proxmox } else { Asker::Person }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}
