//! Which GPU a person means.

use super::inventory::{Slot, nvidia_slots};
use crate::address::SlotId;
use crate::exit::{Exit, Result};
use crate::sys::Kernel;
use crate::trouble::Trouble;

/// The slot that was named; or the only GPU there is.
///
/// # Errors
/// When it is not clear which slot is meant, or it has no NVIDIA GPU.
pub fn choose(kernel: &dyn Kernel, named: Option<SlotId>) -> Result<SlotId> {
    let Some(id) = named else {
        let slots = nvidia_slots(kernel);
        return match slots.as_slice() {
            [] => {
                let what = "there is no NVIDIA GPU in this host";
                Err(Exit::refused(Trouble::new(what, "lspci -nn shows what there is")))
            }
            [slot] => Ok(slot.id),
            several => {
                let all: Vec<String> = several.iter().map(|slot| slot.id.to_string()).collect();
                Err(Exit::usage(format!("there are several NVIDIA GPUs, say which: {}", all.join(" or "))))
            }
        };
    };
    let slot = Slot::read(kernel, id)
        .ok_or_else(|| Trouble::new(format!("there is no device in slot {id}"), "lspci -D shows what there is"))
        .map_err(Exit::refused)?;
    if !slot.is_nvidia_gpu() && !slot.is_nvswitch() {
        let what = format!("slot {id} has no NVIDIA GPU");
        return Err(Exit::refused(Trouble::new(what, "gpu-handoff --status shows those there are")));
    }
    Ok(id)
}
