//! What handoffs keep: in `/run/gpu-handoff` who has which slots, what is stuck and what is still owed, in
//! `/var/lib/gpu-handoff` what has happened.

mod books;
pub mod counters;
pub mod history;
pub mod journal;
pub mod next;
pub mod owed;
pub mod pinned;
pub mod record;
pub mod store;
pub mod to_start;
pub mod told;
pub mod under_way;
pub mod wedge;
