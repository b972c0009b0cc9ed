//! Events become wishes: Proxmox starts or stops a guest, a person types a verb.

pub mod hookscript;
pub mod manual;
