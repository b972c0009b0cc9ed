//! What Proxmox does with a VM while a watcher looks: each step of a start, at every moment between two looks. While
//! Proxmox works on the VM or its QEMU runs nothing is touched, and in the end the card is with a VM that runs or at home.

use super::bench::{Bench, Wish, World};
use super::check::{Check, is_home};
use super::machine::AtHome;
use super::setup::Setup;
use super::state::State;
use gpu_handoff::address::{Address, SlotId};
use gpu_handoff::events::watch::After;
use gpu_handoff::handoff::kept::record::{Owner, Progress, Record};
use std::time::Duration;

const VM: u32 = 111;

/// How many looks at the machine lie before each step: one look at a VM is up to seven of them.
type Gaps = &'static [&'static [usize]];
const EACH: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
const GAPS: Gaps = &[EACH, EACH, &[0, 4], &[0], &[0, 4]];
/// In so many looks the watcher has seen a QEMU that is there.
const SEEN: usize = 20;
const SLOWLY: Gaps = &[EACH, &[0, 3], &[0, 4, SEEN]];
/// The second start is through within a moment of the watcher's way to the card.
const AT_ONCE: Gaps = &[EACH, &[0, 3], &[0], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], &[0], &[0]];

/// Proxmox, or who kills it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Lock,
    /// The hook finds the card where the VM wants it. It has to wait while the watcher is at the card.
    PreStart,
    Unlock,
    QemuBegins,
    /// Proxmox says that the start is through.
    Note,
    QemuEnds,
    /// As `QemuEnds`, but what it had open is closed later than a handoff may take.
    QemuEndsSlowly,
}

impl Step {
    pub fn take(self, state: &mut State) {
        let slots: Vec<SlotId> =
            state.functions.keys().filter_map(|a| a.parse().ok()).map(|a: Address| a.slot).collect();
        match self {
            Step::PreStart => {}
            Step::Lock => drop(state.locked_guests.insert(VM)),
            Step::Unlock => drop(state.locked_guests.remove(&VM)),
            Step::QemuBegins => state.start_qemu(VM, &slots),
            Step::Note => drop(state.noted.insert(VM)),
            Step::QemuEnds => state.stop_qemu(VM, Duration::from_millis(20)),
            Step::QemuEndsSlowly => state.stop_qemu(VM, Duration::from_secs(600)),
        }
    }
}

struct Story {
    name: &'static str,
    after: After,
    /// How far the record says that the handoff has come.
    progress: Progress,
    then: &'static [Step],
    gaps: Gaps,
}

use Step::{Lock, Note, PreStart, QemuBegins, QemuEnds, QemuEndsSlowly, Unlock};

const STORIES: [Story; 12] = [
    Story::start("a start", &[QemuBegins, Note, Unlock]),
    Story::start("a start that fails before QEMU", &[Unlock]),
    Story::start("a start that fails after QEMU", &[QemuBegins, QemuEnds, Unlock]),
    Story::start("a start that times out", &[QemuBegins, Unlock, QemuEnds]),
    Story { gaps: SLOWLY, ..Story::start("one with very much memory", &[QemuBegins, Unlock, QemuEndsSlowly]) },
    Story::start("a task that dies, and the VM is stopped", &[QemuBegins, Unlock, Lock, QemuEnds, Unlock]),
    Story::start("a start whose VM ends before the task", &[QemuBegins, Note, QemuEnds, Unlock]),
    Story {
        gaps: AT_ONCE,
        ..Story::start("given up and started again", &[Unlock, Lock, PreStart, QemuBegins, Note, Unlock])
    },
    Story { progress: Progress::Leaving, ..Story::start("a start that was refused half-way", &[Unlock]) },
    Story { progress: Progress::Returning, ..Story::start("one whose card was on its way home", &[Unlock]) },
    Story { after: After::Reboot, ..Story::start("a reboot", &[Unlock, Lock, QemuBegins, Note, Unlock]) },
    Story { after: After::Stop, ..Story::start("a post-stop that is killed", &[Unlock]) },
];

impl Story {
    const fn start(name: &'static str, then: &'static [Step]) -> Story {
        Story { name, after: After::Start, progress: Progress::Away, then, gaps: GAPS }
    }
}

/// How many orders there were.
///
/// # Errors
/// What does not hold, in words.
pub fn play(bench: &mut Bench) -> Result<String, String> {
    let setup = Setup::given_up();
    let ready = setup.prepare(bench)?.ok_or("there is no such situation")?;
    let mut orders = 0;
    for story in &STORIES {
        for gaps in all_gaps(story) {
            one(bench, &ready.before, &ready.home, story, &gaps)
                .map_err(|problem| format!("{}, {gaps:?} looks apart: {problem}", story.name))?;
            orders += 1;
        }
    }
    Ok(format!(
        "a watcher beside Proxmox: {} stories in {orders} orders, the card ends with the VM or at home",
        STORIES.len()
    ))
}

fn all_gaps(story: &Story) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for gaps in &story.gaps[..story.then.len()] {
        all = all.iter().flat_map(|head| gaps.iter().map(move |gap| [head.as_slice(), &[*gap]].concat())).collect();
    }
    all
}

fn one(bench: &mut Bench, before: &World, home: &AtHome, story: &Story, gaps: &[usize]) -> Check {
    bench.restore(before);
    let record = bench.record(&Owner::Vm(VM)).ok_or("no record")?;
    bench.save(&Record { progress: story.progress, ..record })?;
    Lock.take(&mut bench.kernel.state.borrow_mut());
    let moments = gaps.iter().scan(1, |at, gap| {
        *at += gap;
        Some(*at)
    });
    let steps: Vec<(usize, Step)> = moments.zip(story.then.iter().copied()).collect();
    let touched = match bench.watch_over(VM, story.after, &steps) {
        Ok(touched) => touched,
        // It never saw the QEMU that is still ending: there is somebody else for what it leaves.
        Err(_) if story.then.contains(&QemuEndsSlowly) && gaps[2] < SEEN => {
            bench.kernel.advance(Duration::from_secs(600));
            bench.run(&Wish::Reconcile, None).acts
        }
        Err(problem) => return Err(problem),
    };
    if let Some((_, step)) = bench.kernel.steps_left().first().filter(|(_, step)| !matches!(step, Lock | PreStart)) {
        return Err(format!("nobody watches any longer, and then: {step:?}"));
    }
    let runs = bench.kernel.state.borrow().pid_files.contains_key(&VM);
    if runs && touched != 0 {
        return Err("a card was taken from a VM that runs".to_string());
    }
    if !runs {
        return is_home(bench, home);
    }
    // As it would have been without a watcher.
    bench.kernel.state.borrow_mut().stop_qemu(VM, Duration::ZERO);
    bench.run(&Wish::Home(Owner::Vm(VM)), None);
    is_home(bench, home)
}
