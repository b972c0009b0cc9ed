//! Events become wishes: Proxmox starts or stops a guest, a start is given up, a device comes or goes, a person types a
//! verb.

mod backup;
mod companions;
mod container;
pub mod hookscript;
pub mod manual;
pub mod mapped;
pub mod nodes;
pub mod notes;
pub mod settle;
pub mod stray;
pub mod switch;
pub mod udev;
pub mod vzdump;
pub mod watch;
