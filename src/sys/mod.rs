//! The only place that changes the machine or holds `unsafe`.
//!
//! Everything else sees the machine through [`Kernel`]: it reads what it likes and changes something only by
//! handing over an [`Action`] with a time limit. Tests put a simulated kernel in its place.

// What clippy.toml keeps from everybody else.
#![allow(clippy::disallowed_methods)]

mod action;
mod begin;
mod device;
mod expendable;
pub mod failpoints;
pub mod files;
mod held;
mod inside;
mod kcmp;
mod kernel;
#[cfg(target_feature = "crt-static")]
mod lean;
mod linux;
mod lock;
mod look;
mod maps;
mod process;
mod program;
mod progress;
mod scan;
mod tables;
mod terminate;
pub mod trace;
mod tree;
mod wait;
mod work;

pub use action::{ActError, Action, Node};
pub use begin::begin;
pub use device::DeviceNumber;
pub use expendable::{Request, decode, encode};
pub use held::{flock_is_held, posix_lock_is_held};
pub use kernel::{Act, Clock, Files, Kernel, Programs, Read};
pub use linux::Linux;
pub use lock::{Lock, Share};
pub use maps::Mapped;
pub use process::{End, Hidden, How, OpenDevice, Process, Sight, Sought, User};
pub use program::{Ended, Running, Talking};
pub use terminate::{forget_callers_signals, heed as heed_termination};
pub use wait::has_reader;
