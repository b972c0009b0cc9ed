//! What there is and who uses it: PCI functions, the NVIDIA driver, device nodes, holders. Reads only.

pub mod behind;
pub mod choice;
pub mod console;
pub mod containers;
pub mod devices;
pub mod dri;
pub mod foreign;
pub mod holders;
pub mod interrupts;
pub mod inventory;
pub mod model;
pub mod nodes;
pub mod nvidia;
pub mod place;
pub mod power;
pub mod started;
pub mod static_ids;
pub mod usage;
pub mod would_take;

pub use inventory::{Function, Slot};
