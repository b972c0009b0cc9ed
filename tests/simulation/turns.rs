//! One VM after another, and back (`policy.vm_resume`): VM 112 takes over from VM 111, which runs again after it. At whatever
//! look one of the runs is killed, VM 111 is owed its start until it runs, somebody comes for that, and it is never started
//! while another VM has the card.

use super::bench::{Bench, Ran, Wish, World};
use super::check::{Check, always, is_home};
use super::faults::{Fault, Kind};
use super::machine::{AtHome, slot};
use super::setup::Setup;
use gpu_handoff::address::SlotId;
use gpu_handoff::config::Config;
use gpu_handoff::handoff::kept::record::{Owner, Stopped};
use gpu_handoff::handoff::way::departure::Departure;
use std::time::Duration;

const FIRST: u32 = 111;
const SECOND: u32 = 112;

/// Looks of the keeper until everything must be as it shall be.
const LOOKS: usize = 8;

const PAUSE: Duration = Duration::from_secs(10);

/// What comes after a run that was killed.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// The same once more.
    Again,
    /// The post-stop of the VM that has ended.
    PostStop,
    Keeper,
}

const THENS: [Then; 3] = [Then::Again, Then::PostStop, Then::Keeper];

/// How many moments there were.
///
/// # Errors
/// What does not hold, in words.
pub fn play(bench: &mut Bench) -> Result<String, String> {
    let setup = Setup::given_up();
    let ready = setup.prepare(bench)?.ok_or("there is no such situation")?;
    let text = br#"{"policy":{"vm":"shutdown","vm_resume":true}}"#;
    bench.config.policy = Config::parse(text).map_err(|_| "the configuration")?.policy;
    bench.restore(&ready.before);
    bench.kernel.state.borrow_mut().start_qemu(FIRST, &slots());
    let with_first = bench.world();
    let done = all(bench, &with_first, &ready.home);
    bench.config.policy = Config::default().policy;
    let moments = done.map_err(|problem| format!("{problem}\n  {}", bench.log.join("\n  ")))?;
    Ok(format!("one VM after another and back: killed at {moments} looks, the first VM runs again after each"))
}

fn all(bench: &mut Bench, with_first: &World, home: &AtHome) -> Result<usize, String> {
    ignores(bench, with_first)?;
    let mut moments = 0;
    let taken_over = each_moment(bench, with_first, home, &mut moments, &take_over)?;
    bench.restore(&taken_over);
    bench.kernel.state.borrow_mut().start_qemu(SECOND, &slots());
    bench.kernel.state.borrow_mut().stop_qemu(SECOND, Duration::ZERO);
    let second_ended = bench.world();
    let home_again = each_moment(bench, &second_ended, home, &mut moments, &|bench, fault| {
        bench.run(&Wish::Home(Owner::Vm(SECOND)), fault)
    })?;
    bench.restore(&home_again);
    bench.kernel.state.borrow_mut().hosted.vm_start = None;
    let to_start = bench.world();
    each_moment(bench, &to_start, home, &mut moments, &|bench, fault| {
        bench.run_as(None, "resume", fault, None, &|handoff| handoff.resume())
    })?;
    Ok(moments)
}

type Run<'a> = &'a dyn Fn(&mut Bench, Option<Fault>) -> Ran;

/// The world after a run that nothing befell.
fn each_moment(
    bench: &mut Bench,
    before: &World,
    home: &AtHome,
    moments: &mut usize,
    run: Run,
) -> Result<World, String> {
    bench.restore(before);
    let ran = run(bench, None);
    if ran.end.code() != Some(0) {
        return Err(format!("without a fault: {:?}", ran.end));
    }
    is_owed(bench)?;
    always(bench, home)?;
    let after = bench.world();
    let looks = bench.kernel.looks();
    for at in 1..=looks {
        // Neighbours rarely differ.
        let then = THENS[at % THENS.len()];
        bench.restore(before);
        run(bench, Some(Fault { at, kind: Kind::KillAtLook }));
        killed(bench, home, run, then).map_err(|problem| format!("killed at look {at}, then {then:?}: {problem}"))?;
    }
    *moments += looks;
    Ok(after)
}

fn killed(bench: &mut Bench, home: &AtHome, run: Run, then: Then) -> Check {
    is_owed(bench)?;
    always(bench, home)?;
    match then {
        Then::Again => {
            run(bench, None);
        }
        Then::PostStop => {
            for vmid in [FIRST, SECOND] {
                let runs = bench.kernel.state.borrow().pid_files.contains_key(&vmid);
                if !runs && bench.record(&Owner::Vm(vmid)).is_some() {
                    bench.run(&Wish::Home(Owner::Vm(vmid)), None);
                }
            }
        }
        Then::Keeper => {}
    }
    is_owed(bench)?;
    // Who was given the card and has no QEMU is seen to by the keeper.
    for _ in 0..LOOKS {
        if runs_and_owes_nothing(bench).is_ok() {
            break;
        }
        starts(bench)?;
        is_owed(bench)?;
        bench.kernel.advance(PAUSE);
        bench.run(&Wish::Owed, None);
        is_owed(bench)?;
        always(bench, home)?;
    }
    runs_and_owes_nothing(bench)?;
    ends(bench, home)
}

/// The start of VM 112, as its hook does that.
fn take_over(bench: &mut Bench, fault: Option<Fault>) -> Ran {
    bench.run_as(Some(SECOND), "112 pre-start", fault, None, &|handoff| {
        let departure = Departure::of(Owner::Vm(SECOND), slots());
        let making_way = handoff.who_makes_way(&departure, false)?;
        let _locks = handoff.take_over(&departure.owner, &making_way)?;
        handoff.leave(&departure)
    })
}

/// qm was asked to start VM 111: its hook, and QEMU.
fn starts(bench: &mut Bench) -> Check {
    let Some(vmid) = bench.kernel.state.borrow_mut().hosted.vm_start.take() else { return Ok(()) };
    if vmid != FIRST {
        return Err(format!("VM {vmid} is started"));
    }
    if bench.kernel.state.borrow().pid_files.contains_key(&SECOND) {
        return Err("VM 111 is started while VM 112 has its card".to_string());
    }
    if bench.kernel.state.borrow().pid_files.contains_key(&FIRST) {
        return Ok(());
    }
    let ran = bench.run(&Wish::Leave(Owner::Vm(FIRST), slots()), None);
    if ran.end.code() != Some(0) {
        return Err(format!("VM 111 does not get its card: {:?}", ran.end));
    }
    is_owed(bench)?;
    bench.kernel.state.borrow_mut().start_qemu(FIRST, &slots());
    Ok(())
}

/// It runs, or it stands in a file that it is to, for which somebody comes.
fn is_owed(bench: &Bench) -> Check {
    if bench.kernel.state.borrow().pid_files.contains_key(&FIRST) {
        return Ok(());
    }
    if !owing(bench) {
        return Err("VM 111 was shut down, and nothing says that it is to run again".to_string());
    }
    if bench.has_keeper() { Ok(()) } else { Err("no keeper comes for VM 111".to_string()) }
}

fn owing(bench: &Bench) -> bool {
    let what = Stopped::Vm(FIRST);
    let records = bench.store.records().unwrap_or_default();
    let to_start = bench.store.to_start().unwrap_or_default();
    records.iter().any(|record| record.stopped.contains(&what)) || to_start.iter().any(|entry| entry.what == what)
}

fn runs_and_owes_nothing(bench: &Bench) -> Check {
    if !bench.kernel.state.borrow().pid_files.contains_key(&FIRST) {
        return Err("VM 111 does not run again".to_string());
    }
    if bench.kernel.state.borrow().pid_files.contains_key(&SECOND) {
        return Err("VM 112 runs, and nobody started it".to_string());
    }
    if owing(bench) { Err("VM 111 runs, and is owed a start".to_string()) } else { Ok(()) }
}

/// Of a VM that ends by itself nobody thinks it was shut down for another.
fn ends(bench: &mut Bench, home: &AtHome) -> Check {
    bench.kernel.state.borrow_mut().stop_qemu(FIRST, Duration::ZERO);
    bench.run(&Wish::Home(Owner::Vm(FIRST)), None);
    if bench.kernel.state.borrow().hosted.vm_start.is_some() || owing(bench) {
        return Err("VM 111 has ended by itself, and is started again".to_string());
    }
    is_home(bench, home)
}

/// It does not shut down in time, and goes on.
fn ignores(bench: &mut Bench, with_first: &World) -> Check {
    bench.restore(with_first);
    bench.kernel.state.borrow_mut().hosted.ignores_acpi = true;
    let ran = take_over(bench, None);
    if ran.end.code() != Some(3) {
        return Err(format!("VM 111 goes on, and yet: {:?}", ran.end));
    }
    runs_and_owes_nothing(bench)
}

fn slots() -> Vec<SlotId> {
    vec![slot(1)]
}
