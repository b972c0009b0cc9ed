//! What people and programs ask to read: the status, the history, a plan, the metrics, the configuration.

mod claims;
pub mod config;
pub mod history;
pub mod measured;
pub mod metrics;
mod pinned;
pub mod plan;
pub mod screen;
pub mod status;
pub mod zone;
