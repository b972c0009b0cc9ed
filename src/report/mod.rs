//! What people and programs ask to read or are told of: the status, the history, a plan, the metrics, news, the configuration.

mod claims;
pub mod cluster;
pub mod config;
pub mod history;
pub mod measured;
pub mod metrics;
pub mod news;
mod pinned;
pub mod plan;
pub mod screen;
pub mod status;
pub mod zone;
