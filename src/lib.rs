//! gpu-handoff: an NVIDIA GPU goes to a Proxmox VM when that VM starts and comes home when it stops.

pub mod proxmox;
