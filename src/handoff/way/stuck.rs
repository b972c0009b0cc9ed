//! Calls that never came back: whose slots are left alone, and what to do about it.

use super::{Handoff, WORKER_GRACE};
use crate::address::SlotId;
use crate::exit::{Exit, Result};
use crate::gpu::Slot;
use crate::gpu::foreign::Foreign;
use crate::gpu::holders::{Devices, Reach};
use crate::gpu::nvidia;
use crate::handoff::kept::wedge::{Call, Wedge};
use crate::trouble::Trouble;

impl Handoff<'_> {
    /// Those of the slots with a call that has not come back, or of which that is not known.
    pub(super) fn wedged_among(&self, slots: &[SlotId]) -> Vec<SlotId> {
        let is_wedged = |slot: &SlotId| match self.store.wedge(*slot) {
            Ok(wedge) => wedge.is_some_and(|wedge| wedge.is_still_stuck(self.kernel)),
            Err(_) => true,
        };
        slots.iter().copied().filter(is_wedged).collect()
    }

    /// A slot with a call that never came back is left alone until that call ends.
    pub(super) fn refuse_wedged(&self, slots: &[SlotId]) -> Result<()> {
        for &slot in slots {
            let wedge = self.store.wedge(slot).map_err(|error| {
                let what = format!("{slot} may be wedged and was not touched: {error:#}");
                Exit::overrun(Trouble::new(what, "a reboot clears that"))
            })?;
            if let Some(wedge) = wedge.filter(|wedge| wedge.is_still_stuck(self.kernel)) {
                let what = format!("{slot} is wedged and left alone: {wedge}");
                return Err(Exit::overrun(Trouble::new(what, self.remedy_of_wedge(slot, &wedge))));
            }
            if let Some(foreign) =
                Foreign::wait(self.kernel, slot, WORKER_GRACE, || self.store.has_call(self.kernel, slot))
            {
                let holder = self.holder_of(slot).map(|holder| format!("{holder}; ")).unwrap_or_default();
                let remedy = format!(
                    "{holder}until that ends nobody can have the card, and if it never does, only a reboot frees it; other \
                     cards keep working"
                );
                let what = format!("{slot} is wedged and left alone: {foreign}");
                return Err(Exit::overrun(Trouble::new(what, remedy)));
            }
        }
        Ok(())
    }

    /// Who uses a card, and what to type to end that.
    pub(super) fn holder_of(&self, slot: SlotId) -> Option<String> {
        let slots: Vec<Slot> = Slot::read(self.kernel, slot).into_iter().collect();
        let devices = Devices::of_slots(self.kernel, &slots, Reach::Slots);
        let holders = devices.holders(self.kernel, self.config.time.handoff / 6).unwrap_or_default();
        holders.first().map(|holder| format!("{holder}; end it ({})", holder.remedy()))
    }

    /// Whether the driver forgets who had the card attached through its control device: then the call waits for ever.
    pub(super) fn forgets_attached(&self, wedge: &Wedge) -> bool {
        let is_it = match &wedge.call {
            Some(Call::Unbind { driver }) => driver == "nvidia",
            Some(Call::Load(_) | Call::Freeze(_) | Call::Other) => false,
            // By an earlier version. Nearly every call that hangs is that one; and to take another for it has whoever was
            // stopped run again while it hangs, where else he would wait for a call that may never end.
            None => true,
        };
        is_it && nvidia::version(self.kernel).is_some_and(nvidia::Version::forgets_attached)
    }

    /// What to do about a call that never came back.
    pub(super) fn remedy_of_wedge(&self, slot: SlotId, wedge: &Wedge) -> String {
        let holder = self.holder_of(slot).map(|holder| format!("{holder}; ")).unwrap_or_default();
        let then = if self.forgets_attached(wedge) {
            "the card comes home by itself when the call ends; it never does, with this version of the driver, where \
             somebody had the card attached through /dev/nvidiactl: then only a reboot frees it"
        } else {
            "the card comes home by itself when the call ends; if it never does, only a reboot frees it"
        };
        format!("{holder}{then}; other cards keep working")
    }
}
