//! What people and programs get to read: the story of a handoff, the status, the history.

pub mod history;
pub mod status;
pub mod story;

pub use story::Story;
