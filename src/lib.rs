//! gpu-handoff: an NVIDIA GPU goes to a Proxmox VM when that VM starts and comes home when it stops.
//!
//! An event or a person ([`events`], [`cli`]) becomes a wish; [`gpu`] and [`proxmox`] read how things are; [`handoff`]
//! plans and carries out; [`containers`] gives containers the GPU; [`sys`] is the only place that changes the machine.

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::too_many_lines))]

pub mod address;
mod app;
pub mod causes;
pub mod cli;
pub mod config;
pub mod containers;
pub mod cpus;
pub mod decimal;
pub mod doctor;
pub mod driver;
pub mod events;
pub mod exit;
pub mod gpu;
pub mod handoff;
pub mod json;
pub mod modprobe;
pub mod proxmox;
pub mod report;
pub mod setup;
pub mod sorted;
pub mod story;
#[allow(unsafe_code)]
pub mod sys;
pub mod systemd;
mod teller;
pub mod trouble;
pub mod utc;

pub use app::App;
