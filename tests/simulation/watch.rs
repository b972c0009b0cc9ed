//! A VM whose start was given up is started once more while its watcher comes for the card: at whatever moment that is,
//! the second start gets the card, and the watcher does not take it back.

use super::bench::{Bench, Wish};
use super::check::{Check, always, is_home, reached};
use super::faults::{Fault, Kind};
use super::machine::AtHome;
use super::setup::{Ready, Setup};
use gpu_handoff::handoff::kept::record::Owner;
use std::time::Duration;

const VM: u32 = 111;

/// How many moments there were.
///
/// # Errors
/// What does not hold, in words.
pub fn play(bench: &mut Bench) -> Result<String, String> {
    let setup = Setup::given_up();
    let ready = setup.prepare(bench)?.ok_or("there is no such situation")?;
    let looks = bench.looks_of(&ready);
    let mut left_alone = 0;
    for at in 1..=looks {
        let in_time = begins_again(bench, &setup, &ready, at).map_err(|problem| format!("at look {at}: {problem}"))?;
        if in_time && left_alone + 1 < at {
            return Err(format!("at look {at} of {looks} the watcher leaves a card alone that it took earlier"));
        }
        left_alone += usize::from(in_time);
    }
    if left_alone == 0 || left_alone == looks {
        return Err(format!("of {looks} moments the watcher left the card alone in {left_alone}"));
    }
    runs_already(bench, &setup, &ready)?;
    let late = looks - left_alone;
    Ok(format!("a start beside a watcher: {left_alone} moments in time, {late} too late, the card ends with the VM"))
}

/// Proxmox takes the lock while the watcher is at it, and then calls pre-start. Whether the watcher saw it in time.
fn begins_again(bench: &mut Bench, setup: &Setup, ready: &Ready, at: usize) -> Result<bool, String> {
    bench.restore(&ready.before);
    let ran = bench.run(&ready.wish, Some(Fault { at, kind: Kind::StartAtLook }));
    if ran.end.code() != Some(0) {
        return Err(format!("{:?}", ran.end));
    }
    always(bench, &ready.home)?;
    let start = Wish::Leave(Owner::Vm(VM), setup.slots());
    must(bench, &start, &ready.home)?;
    runs(bench, setup, &ready.home)?;
    Ok(ran.acts == 0)
}

/// The watcher comes late: the VM was started once more, and runs.
fn runs_already(bench: &mut Bench, setup: &Setup, ready: &Ready) -> Check {
    bench.restore(&ready.before);
    must(bench, &Wish::Leave(Owner::Vm(VM), setup.slots()), &ready.home)?;
    runs(bench, setup, &ready.home)
}

fn runs(bench: &mut Bench, setup: &Setup, home: &AtHome) -> Check {
    bench.kernel.state.borrow_mut().start_qemu(VM, &setup.slots());
    let before = bench.world().but_for_time();
    must(bench, &Wish::Watch(VM), home)?;
    if bench.world().but_for_time() != before {
        return Err("the watcher of an earlier start changed something".to_string());
    }
    bench.kernel.state.borrow_mut().stop_qemu(VM, Duration::ZERO);
    must(bench, &Wish::Home(Owner::Vm(VM)), home)?;
    is_home(bench, home)
}

fn must(bench: &mut Bench, wish: &Wish, home: &AtHome) -> Check {
    let ran = bench.run(wish, None);
    if ran.end.code() != Some(0) {
        return Err(format!("{wish:?}: {:?}", ran.end));
    }
    reached(bench, wish, home)?;
    always(bench, home)
}
