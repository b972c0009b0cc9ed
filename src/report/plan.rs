//! `gpu-handoff plan VMID --json`: what a start would do, or why it would be refused.

use crate::address;
use crate::exit::Result;
use crate::handoff::plan::Outline;
use serde_json::{Value, json};

/// In the words that `--status --json` and the history have for a handoff.
pub fn to_json(vmid: u32, planned: &Result<Outline>) -> Value {
    let outline = planned.as_ref().ok();
    let steps = outline.iter().flat_map(|outline| &outline.steps);
    let steps: Vec<Value> = steps.map(|(phase, step)| json!({"phase": phase, "step": step})).collect();
    let slots = outline.map_or(&[][..], |outline| &outline.slots);
    let (exit, reason) = match planned {
        Ok(_) => (0, None),
        Err(exit) => (exit.code as u8, Some(exit.to_string())),
    };
    json!({"schema": 1, "vmid": vmid, "slots": address::to_json(slots), "steps": steps, "exit": exit, "reason": reason})
}
