//! Whoever ends with something undone calls the keeper.

use super::Handoff;
use crate::exit::{Code, Exit};
use crate::handoff::kept::owed::{EVERY, Owed, TIMER, of_record, to_text};
use crate::handoff::kept::record::Owner;
use crate::systemd;

impl Handoff<'_> {
    /// The end of a run that leaves something undone: the keeper is started, also where no unit watches for files, and
    /// whoever reads the error learns what is still owed and that it is being seen to.
    pub(super) fn hand_over(&self, owner: &Owner, exit: Exit) -> Exit {
        if !matches!(exit.code, Code::Failed | Code::Overrun | Code::Locked) {
            return exit;
        }
        let Ok(Some(record)) = self.store.record(owner) else { return exit };
        let mut owed = of_record(&record);
        if !owed.contains(&Owed::Home) {
            match owner {
                Owner::Vm(_) => owed.insert(0, Owed::Home),
                // It was asked for, and is as it was.
                Owner::Manual(_) => return exit,
            }
        }
        match self.start_keeper() {
            Ok(()) => exit.and(&format!("gpu-handoff-keeper tries again by itself: {}", to_text(&owed))),
            // Who has no systemd has nobody to ask.
            Err(_) => exit,
        }
    }

    fn start_keeper(&self) -> Result<(), crate::sys::ActError> {
        systemd::start(self.kernel, TIMER).or_else(|_| {
            let every = EVERY.as_secs().to_string();
            systemd::run_again_and_again(self.kernel, "gpu-handoff-keeper", &every, &["reconcile", "--owed"])
        })
    }
}
