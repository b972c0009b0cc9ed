//! `SimKernel`: the machine as the program sees it, with a fault laid in its way.

use super::beside::Step;
use super::change::{apply, outlive, settle};
use super::faults::{Fault, Kind};
use super::files::Text;
use super::modules::driver_of_module;
use super::pci::{Block, Reply};
use super::sabotage::Sabotage;
use super::state::{Hung, State, Until};
use gpu_handoff::sys::{
    Act, ActError, Action, Clock, DeviceNumber, End, Files, Kernel, Process, Programs, Read, Sight, Sought,
};
use nix::libc;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a change costs.
const ACT: Duration = Duration::from_millis(4);
/// What a look costs.
const LOOK: Duration = Duration::from_micros(5);
/// How long after its beginning a hang ends that ends.
pub const HANG: Duration = Duration::from_secs(300);
/// How long a GPU takes to start.
pub const OPENING: Duration = Duration::from_secs(25);

/// The run was killed. Thrown, and caught by who started the run.
pub struct Killed;

/// The run reads something that will never answer. Thrown, because the run would stand still.
pub struct Stalled(pub String);

pub struct SimKernel {
    pub state: RefCell<State>,
    fault: Cell<Option<Fault>>,
    pub sabotage: Cell<Option<Sabotage>>,
    /// Every change that was asked for since [`SimKernel::begin`].
    pub acts: RefCell<Vec<Action>>,
    /// The worker of this run.
    worker: Cell<Option<Process>>,
    looks: Cell<usize>,
    caller: Cell<Option<Process>>,
    /// What happens beside the run, each at one of its looks.
    beside: RefCell<VecDeque<(usize, Step)>>,
    /// Where the locks are that a hook waits for which is called beside the run.
    locks: RefCell<PathBuf>,
    pub not_modelled: RefCell<BTreeSet<String>>,
}

impl SimKernel {
    pub fn new(state: State) -> SimKernel {
        SimKernel {
            state: RefCell::new(state),
            fault: Cell::new(None),
            sabotage: Cell::new(None),
            acts: RefCell::new(Vec::new()),
            worker: Cell::new(None),
            looks: Cell::new(0),
            caller: Cell::new(None),
            beside: RefCell::default(),
            locks: RefCell::default(),
            not_modelled: RefCell::new(BTreeSet::new()),
        }
    }

    /// A new run of the program begins, with this in its way.
    pub fn begin(&self, fault: Option<Fault>) {
        self.fault.set(fault);
        self.acts.borrow_mut().clear();
        self.beside.borrow_mut().clear();
        self.worker.set(None);
        self.caller.set(None);
        self.looks.set(0);
    }

    /// From now on this happens beside the run.
    pub fn let_happen(&self, steps: &[(usize, Step)], locks: &Path) {
        self.locks.replace(locks.to_path_buf());
        self.beside.replace(steps.iter().copied().collect());
    }

    fn happen(&self) {
        let mut beside = self.beside.borrow_mut();
        while let Some((_, step)) = beside.front().copied().filter(|(at, _)| *at <= self.looks.get()) {
            if step == Step::PreStart && is_locked(&self.locks.borrow()) {
                return;
            }
            beside.pop_front();
            let mut state = self.state.borrow_mut();
            if step == Step::PreStart && !self.acts.borrow().is_empty() {
                // The card is home, and the hook takes it from there: another story.
                beside.clear();
                Step::Unlock.take(&mut state);
            }
            step.take(&mut state);
        }
    }

    /// What has not happened yet.
    pub fn steps_left(&self) -> Vec<(usize, Step)> {
        self.beside.borrow().iter().copied().collect()
    }

    /// Puts another fault, or none, in the way; what was there before.
    pub fn fault_is_set(&self, fault: Option<Fault>) -> Option<Fault> {
        self.fault.replace(fault)
    }

    /// Whoever opened a node unseen closes it. True when a call that hung came back for that.
    pub fn close_what_was_opened(&self) -> bool {
        let had = self.state.borrow().hung.len();
        self.state.borrow_mut().processes.retain(|_, process| process.command != "opener");
        self.advance(HANG);
        had > self.state.borrow().hung.len()
    }

    /// Whoever runs the program lives as long as the run, and no longer: what it wanted was given up.
    pub fn call_from(&self, caller: Option<Process>) {
        if caller.is_some() {
            self.caller.set(caller);
            return;
        }
        let mut state = self.state.borrow_mut();
        let pid = state.start_process("task", "0::/system.slice/pvedaemon.service\n", Vec::new());
        self.caller.set(Some(Process { pid, start: state.processes[&pid].start }));
    }

    /// The run is over: a worker that was not left behind in a call ends with it, or after its last act.
    pub fn end(&self, is_killed: bool) {
        let mut state = self.state.borrow_mut();
        if let Some(worker) = self.worker.take()
            && !state.hung.iter().any(|hung| hung.process == worker)
        {
            if is_killed {
                outlive(&mut state, worker);
            } else {
                state.processes.remove(&worker.pid);
            }
        }
        if let Some(caller) = self.caller.take() {
            state.processes.remove(&caller.pid);
        }
    }

    /// Time passes until every hang has ended that ends. True when there was one.
    pub fn let_hangs_end(&self) -> bool {
        let had = self.state.borrow().hung.len();
        self.advance(HANG * 2);
        had > self.state.borrow().hung.len()
    }

    pub fn looks(&self) -> usize {
        self.looks.get()
    }

    pub fn advance(&self, time: Duration) {
        let mut state = self.state.borrow_mut();
        state.now += time;
        settle(&mut state);
    }

    fn look(&self) {
        self.state.borrow_mut().now += LOOK;
        self.looks.set(self.looks.get() + 1);
        self.happen();
        if self.fault.get() == Some(Fault { at: self.looks.get(), kind: Kind::KillAtLook }) {
            killed();
        }
        if self.fault.get() == Some(Fault { at: self.looks.get(), kind: Kind::StartAtLook }) {
            self.state.borrow_mut().locked_guests.insert(111);
        }
    }

    fn note_not_modelled(&self, path: &str) {
        self.not_modelled.borrow_mut().insert(path.to_string());
    }

    fn absent() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOENT)
    }

    /// The fault that befalls the change which is asked for now.
    fn fault_now(&self) -> Option<Kind> {
        let fault = self.fault.get().filter(|fault| fault.kind != Kind::KillAtLook)?;
        let number = self.acts.borrow().len();
        (number == fault.at || (number > fault.at && fault.kind.goes_on())).then_some(fault.kind)
    }

    /// The call does not come back: the worker is in it from now on.
    fn hang(&self, action: &Action, block: Block, limit: Duration) -> ActError {
        let Some(process) = self.worker() else { return ActError::Os(io::Error::from_raw_os_error(libc::EAGAIN)) };
        let mut state = self.state.borrow_mut();
        for address in &block.locks {
            if let Some(function) = state.functions.get_mut(address) {
                function.locked = true;
            }
        }
        state.in_between.extend(block.modules.iter().cloned());
        let Block { until, locks, modules } = block;
        state.hung.push(Hung { action: action.clone(), process, until, locks, modules });
        state.now += limit;
        drop(state);
        self.worker.set(None);
        ActError::Stuck { pid: process.pid }
    }

    /// What an action holds on to while it hangs for no reason of its own.
    fn injected_block(&self, action: &Action, ends: bool) -> Block {
        let mut state = self.state.borrow_mut();
        let until = if ends { Until::Time(state.now + HANG) } else { Until::Never };
        let mut block = Block { until, locks: Vec::new(), modules: Vec::new() };
        match action {
            Action::Write { path, data } if path.ends_with("/unbind") => {
                let address = data.clone();
                state.hide_link(&address);
                block.locks.push(address);
            }
            Action::Write { path, data } if path.ends_with("drivers_probe") => block.locks.push(data.clone()),
            Action::Write { path, .. } if path.starts_with("/sys/bus/pci/devices/") => {
                block.locks.extend(path.split('/').nth(5).map(str::to_string));
            }
            Action::Write { .. } | Action::MakeNode(_) | Action::Pin { .. } => {}
            Action::Load { modules } => {
                // One of them is probing a device.
                let first = modules.iter().find(|m| !state.is_loaded(m));
                let driver = first.and_then(|m| driver_of_module(m));
                block.modules.extend(first.cloned());
                let mut addresses = state.functions.iter().filter(|(_, f)| f.driver.is_none()).map(|(a, _)| a);
                block.locks.extend(addresses.find(|a| driver.is_some_and(|d| state.matches(d, a))).cloned());
            }
            Action::Unload { module } => {
                block.modules.push(module.clone());
                let driver = driver_of_module(module);
                let bound = driver.and_then(|d| state.functions.iter().find(|(_, f)| f.driver == Some(d)));
                let bound = bound.map(|(address, _)| address.clone());
                if let Some(address) = bound {
                    state.hide_link(&address);
                    block.locks.push(address);
                }
            }
        }
        block
    }

    fn carry_out(&self, action: &Action, limit: Duration) -> Result<(), ActError> {
        let reply = {
            let mut state = self.state.borrow_mut();
            let reply = match self.sabotage.get() {
                Some(sabotage) => sabotage.carry_out(&mut state, action),
                None => apply(&mut state, action),
            };
            state.poll_node();
            state.settle_console();
            reply
        };
        match reply {
            Reply::Done => Ok(()),
            Reply::Errno(number) => Err(ActError::Os(io::Error::from_raw_os_error(number))),
            Reply::Words(words) => Err(ActError::Program(words)),
            Reply::Blocks(block) => Err(self.hang(action, block, limit)),
        }
    }

    fn refuse(action: &Action) -> ActError {
        match action {
            Action::Load { .. } => {
                ActError::Program("modprobe: ERROR: could not insert: Cannot allocate memory".into())
            }
            _ => ActError::Os(io::Error::from_raw_os_error(libc::EIO)),
        }
    }
}

/// Whether anybody has a lock of the program's own.
fn is_locked(directory: &Path) -> bool {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut locks = files.filter(|file| file.file_name().to_string_lossy().contains("lock"));
    locks.any(|file| fs::File::open(file.path()).is_ok_and(|file| file.try_lock().is_err()))
}

fn killed() -> ! {
    std::panic::resume_unwind(Box::new(Killed))
}

impl Read for SimKernel {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.look();
        if let Some(text) = self.sabotage.get().and_then(|sabotage| sabotage.text_of(&self.state.borrow(), path)) {
            return Ok(text.into_bytes());
        }
        let text = self.state.borrow().text_of(path);
        match text {
            Text::Is(text) => Ok(text.into_bytes()),
            Text::Absent => Err(SimKernel::absent()),
            Text::NeverReturns => std::panic::resume_unwind(Box::new(Stalled(path.to_string()))),
            Text::NotModelled => {
                self.note_not_modelled(path);
                Err(SimKernel::absent())
            }
        }
    }

    fn link_name(&self, path: &str) -> io::Result<String> {
        self.look();
        let shown = match self.sabotage.get().and_then(|sabotage| sabotage.link_at(path)) {
            Some(shown) => Some(shown),
            None => self.state.borrow().link_at(path),
        };
        if shown.is_none() {
            self.note_not_modelled(path);
        }
        shown.flatten().ok_or_else(SimKernel::absent)
    }

    fn list(&self, path: &str) -> Vec<String> {
        self.look();
        let names = self.state.borrow().names_in(path);
        names.unwrap_or_else(|| {
            self.note_not_modelled(path);
            Vec::new()
        })
    }

    fn exists(&self, path: &str) -> bool {
        self.look();
        if let Some(shown) = self.sabotage.get().and_then(|sabotage| sabotage.is_there(path)) {
            return shown;
        }
        let is_there = self.state.borrow().is_there(path);
        is_there.unwrap_or_else(|| {
            self.note_not_modelled(path);
            false
        })
    }

    fn device_number(&self, path: &str) -> io::Result<DeviceNumber> {
        self.look();
        let state = self.state.borrow();
        if let Some(number) = self.sabotage.get().and_then(|sabotage| sabotage.device_number(&state, path)) {
            return Ok(number);
        }
        state.nodes.get(path).map(|node| node.number).ok_or_else(SimKernel::absent)
    }

    fn file_id(&self, path: &str) -> io::Result<(DeviceNumber, u64)> {
        self.look();
        let name = path.strip_prefix("/var/lock/qemu-server/lock-").and_then(|name| name.strip_suffix(".conf"));
        let vmid = name.and_then(|id| id.parse().ok()).ok_or_else(SimKernel::absent)?;
        Ok((DeviceNumber { major: 0, minor: 0x1a }, vmid))
    }

    fn read_slowly(&self, path: &str, limit: Duration) -> Result<Vec<u8>, ActError> {
        let text = self.state.borrow().text_of(path);
        if !matches!(text, Text::NeverReturns) {
            return self.read(path).map_err(ActError::Os);
        }
        let until = if path.starts_with("/proc/driver/nvidia/") {
            Until::Time(self.state.borrow().opening_until)
        } else {
            Until::Unlocked(path.split('/').nth(5).unwrap_or_default().to_string())
        };
        let block = Block { until, locks: Vec::new(), modules: Vec::new() };
        Err(self.hang(&Hung::reading(), block, limit))
    }

    fn read_head(&self, path: &str, length: usize, _: Duration) -> Result<Vec<u8>, ActError> {
        self.look();
        let function = path.strip_prefix("/sys/bus/pci/devices/").and_then(|rest| rest.strip_suffix("/config"));
        let state = self.state.borrow();
        let Some(function) = function.and_then(|address| state.functions.get(address)) else {
            return Err(ActError::Os(SimKernel::absent()));
        };
        let (vendor, device) = if function.is_gone { (!0, !0) } else { (function.vendor, function.device) };
        Ok([vendor.to_le_bytes(), device.to_le_bytes()].concat()[..length].to_vec())
    }

    fn vfio_group_busy(&self, group: u32, _: Duration) -> Result<bool, ActError> {
        self.look();
        Ok(self.state.borrow().is_group_taken(group))
    }

    fn look(&self, sought: &Sought, _: Duration) -> Result<Sight, String> {
        self.look();
        let state = self.state.borrow();
        if self.sabotage.get() == Some(Sabotage::VmHidden) {
            return Ok(Sight::default());
        }
        Ok(state.sight(sought))
    }

    fn caller(&self) -> Option<Process> {
        self.caller.get()
    }
}

impl Files for SimKernel {
    /// A handoff's own files are the store's.
    fn path(&self, path: &str) -> PathBuf {
        self.note_not_modelled(path);
        PathBuf::from("/nonexistent")
    }

    fn is_real(&self) -> bool {
        false
    }
}

impl Act for SimKernel {
    fn act(&self, action: &Action, limit: Duration) -> Result<(), ActError> {
        self.acts.borrow_mut().push(action.clone());
        if let Some(Sabotage::NoDeadline) = self.sabotage.get() {
            self.advance(Duration::from_secs(70));
        }
        self.advance(ACT);
        match self.fault_now() {
            None | Some(Kind::Term | Kind::KillAtLook | Kind::StartAtLook) => self.carry_out(action, limit),
            Some(kind @ (Kind::Opened | Kind::Attached)) => {
                self.state.borrow_mut().open_unseen(kind == Kind::Attached);
                self.carry_out(action, limit)
            }
            Some(Kind::Opening) => {
                let mut state = self.state.borrow_mut();
                state.opening_until = state.now + OPENING;
                drop(state);
                self.carry_out(action, limit)
            }
            Some(Kind::Errno(number)) => Err(ActError::Os(io::Error::from_raw_os_error(number))),
            Some(Kind::Words | Kind::EverythingFails) => Err(SimKernel::refuse(action)),
            Some(Kind::OnlyTheFirst) => {
                if let Action::Load { modules } = action {
                    let _ = self.state.borrow_mut().load(&modules[0]);
                }
                Err(SimKernel::refuse(action))
            }
            Some(Kind::Lie | Kind::EverythingLies) => Ok(()),
            Some(Kind::DoneUnheard) => {
                self.carry_out(action, limit)?;
                Err(ActError::Died { pid: 1 })
            }
            Some(Kind::NoProcess) => Err(ActError::Os(io::Error::from_raw_os_error(libc::EAGAIN))),
            Some(Kind::HangEnds) => Err(self.hang(action, self.injected_block(action, true), limit)),
            Some(Kind::HangForever | Kind::EverythingHangs) => {
                Err(self.hang(action, self.injected_block(action, false), limit))
            }
            Some(Kind::KillBefore { .. }) => killed(),
            Some(Kind::KillAfter { .. }) => {
                let _ = self.carry_out(action, limit);
                killed()
            }
            Some(Kind::KillInHang { ends }) => {
                let _ = self.hang(action, self.injected_block(action, ends), limit / 2);
                killed()
            }
        }
    }

    fn worker(&self) -> Option<Process> {
        if self.worker.get().is_none() {
            let mut state = self.state.borrow_mut();
            let pid = state.start_process("gpu-handoff", "0::/\n", Vec::new());
            self.worker.set(Some(Process { pid, start: state.processes[&pid].start }));
        }
        self.worker.get()
    }

    fn end(&self, process: Process, _: End) -> io::Result<()> {
        self.look();
        if self.process(process.pid) == Some(process) {
            self.state.borrow_mut().end_process(process.pid);
        }
        Ok(())
    }
}

impl Programs for SimKernel {
    fn program(&self, path: &str, arguments: &[&str], _limit: Duration) -> Result<String, ActError> {
        self.look();
        self.advance(ACT);
        let said = self.state.borrow_mut().program(path, arguments);
        if said.is_none() {
            self.note_not_modelled(&format!("{path} {}", arguments.join(" ")));
        }
        // It is done, and who asked for it may be killed before it hears so.
        self.look();
        said.unwrap_or_else(|| Err(format!("{path} is not installed"))).map_err(ActError::Program)
    }
}

impl Clock for SimKernel {
    fn is_asked_to_end(&self) -> bool {
        matches!(self.fault.get(), Some(Fault { at, kind: Kind::Term }) if self.acts.borrow().len() >= at)
    }

    fn now(&self) -> Duration {
        self.state.borrow().now
    }

    fn unix_time(&self) -> u64 {
        1_795_176_000 + self.state.borrow().now.as_secs()
    }

    fn sleep(&self, time: Duration) {
        self.advance(time);
    }
}

impl Kernel for SimKernel {
    fn wait_for_end(&self, process: Process, limit: Duration) -> bool {
        self.look();
        let (now, ends) = {
            let state = self.state.borrow();
            let Some(waited_for) = state.processes.get(&process.pid) else { return true };
            (state.now, waited_for.ends)
        };
        let waits = ends.map_or(limit, |end| end.saturating_sub(now).min(limit));
        self.advance(waits);
        ends.is_some_and(|end| now + waits >= end)
    }
}
