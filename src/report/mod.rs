//! What people and programs ask to read: the status, the history.

pub mod history;
pub mod status;
