//! What people and programs get to read: the story of a handoff, the status.

pub mod status;
pub mod story;

pub use story::Story;
