//! A handoff: slots go to a VM, or to vfio-pci by hand, and come home again.
//!
//! There is no undo list. A plan is made from how things are and how they shall be, so undoing, finishing what was
//! killed and coming home are one and the same: plan the way home from here, carry it out, verify each step.

pub mod kept;
pub mod plan;
pub mod way;

pub use way::Handoff;
