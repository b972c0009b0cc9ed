//! Which mutant is switched on in this process: the one that the environment names. It can note instead whom it was asked for.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const MUTANTS: usize = 0;

const UNKNOWN: u32 = u32::MAX;
const NOTES: u32 = u32::MAX - 1;

static CHOSEN: AtomicU32 = AtomicU32::new(UNKNOWN);
static SEEN: [AtomicBool; MUTANTS + 1] = [const { AtomicBool::new(false) }; MUTANTS + 1];

#[inline]
pub fn on(mutant: u32) -> bool {
    let chosen = CHOSEN.load(Ordering::Relaxed);
    if chosen < NOTES { chosen == mutant } else { ask(mutant) }
}

#[cold]
fn ask(mutant: u32) -> bool {
    if CHOSEN.load(Ordering::Relaxed) == UNKNOWN {
        let named = std::env::var("GPU_HANDOFF_MUTANT").ok().and_then(|number| number.parse().ok());
        let otherwise = if std::env::var_os("GPU_HANDOFF_MUTANT_NOTES").is_some() { NOTES } else { 0 };
        CHOSEN.store(named.unwrap_or(otherwise), Ordering::Relaxed);
    }
    if CHOSEN.load(Ordering::Relaxed) != NOTES {
        return CHOSEN.load(Ordering::Relaxed) == mutant;
    }
    if !SEEN[mutant as usize].swap(true, Ordering::Relaxed) {
        // Opened each time: a worker closes all that it has.
        let path = std::env::var_os("GPU_HANDOFF_MUTANT_NOTES").unwrap_or_default();
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
            let _ = file.write_all(format!("{mutant}\n").as_bytes());
        }
    }
    false
}
