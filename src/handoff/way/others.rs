//! A VM's other devices come home after its GPU. Proxmox took them from the host when the VM started, by an id that it
//! wrote into vfio-pci (PVE::SysFSTools::pci_dev_bind_to_vfio), and never gives one back.

use super::Handoff;
use crate::address::list;
use crate::exit::{Exit, Result};
use crate::handoff::kept::record::{HomeOf, Progress, Record};
use crate::handoff::kept::store::Locked;
use crate::handoff::way::free::TimeBox;
use crate::trouble::Trouble;

impl Handoff<'_> {
    /// To the drivers they had. Where the start failed before Proxmox took any there is nothing to do, and nothing to tell.
    ///
    /// # Errors
    /// When one could not be brought home: then the record stays, for the keeper to try again.
    pub(super) fn bring_others_home(&self, locked: &Locked, record: &Record, time: TimeBox) -> Result<()> {
        let Some(others) = record.of_others() else { return Ok(()) };
        let is_home = |home: &HomeOf| self.kernel.link_name(&home.address.attribute("driver")).ok() == home.driver;
        if record.progress == Progress::Leaving && others.functions.iter().all(is_home) {
            return Ok(());
        }
        // What is owed for the GPU is done, and stays done if this takes long.
        self.save(locked, record);
        if self.is_in_use(&others, time.end)? {
            self.wait_until_free(&others, time.end)?;
        }
        let (stack, plan) = self.stack_to_go_home(&others, time, None)?;
        let title = list(others.slots());
        self.story.say(&format!("{title} {} -> host", record.owner));
        let outcome = self.run_home(locked, &stack, &others, &plan, time.end);
        if outcome.is_complete() || outcome.only_stuck() {
            return Ok(());
        }
        let again = format!("fix that, then: gpu-handoff to-nvidia {}", record.slot());
        Err(Exit::failed(Trouble::new(format!("{title} is not home: {}", outcome.problem()), again)))
    }
}
