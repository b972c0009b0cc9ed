//! What comes of a driver's count that is too low: one that says that nobody has the card while somebody does. The kernel
//! itself refuses to unload what is in use; a card that is unbound beside another is looked at all the same; only a sound
//! card, which is unbound alone by its count, would wait, and that wait is given up.

use super::bench::{Bench, End, Wish};
use super::check::Check;
use super::machine::{Home, Machine};
use super::setup::{Busy, Setup, Way, occupy};
use gpu_handoff::handoff::kept::record::Owner;

/// Cards, who is busy, what the count says: the exit code, and a part of the message.
type Case = (usize, Busy, bool, u8, &'static str);

const CASES: [Case; 6] = [
    (1, Busy::First, true, 3, "it is in use: PID"),
    (1, Busy::First, false, 1, "is back where it was: unload nvidia_uvm: it is in use"),
    (2, Busy::First, true, 3, "it is in use: PID"),
    (2, Busy::First, false, 3, "it is in use: PID"),
    (1, Busy::FirstSound, true, 3, "it is in use: PID"),
    (1, Busy::FirstSound, false, 4, "is wedged and left alone: unbind from snd_hda_intel"),
];

/// How many cases there were.
///
/// # Errors
/// Those with another outcome.
pub fn play(bench: &mut Bench) -> Result<String, String> {
    let problems: Vec<String> = CASES.iter().filter_map(|case| one(bench, case).err()).collect();
    let text = format!("a count that is right, and one that is too low: {} cases as expected", CASES.len());
    if problems.is_empty() { Ok(text) } else { Err(problems.join("\n")) }
}

fn one(bench: &mut Bench, case: &Case) -> Check {
    let (cards, busy, counts, code, words) = *case;
    let homes = (Home::Nvidia, (cards == 2).then_some(Home::Nvidia));
    let machine =
        Machine { homes, functions: 2, version: "580.105.08", modeset: false, poller: false, vfio_loaded: true };
    let setup = Setup { machine, take: vec![1], way: Way::ToVm, busy: Busy::Nobody };
    setup.prepare(bench)?.ok_or("there is no such situation")?;
    if !occupy(&mut bench.kernel.state.borrow_mut(), busy) {
        return Err(format!("{busy:?} is not possible"));
    }
    bench.kernel.state.borrow_mut().counts_nothing = !counts;
    match bench.run(&Wish::Leave(Owner::Vm(111), setup.slots()), None).end {
        End::Exit(is, text) if is == code && text.contains(words) => Ok(()),
        end => Err(format!("{case:?}: {end:?}")),
    }
}
