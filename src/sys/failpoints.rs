//! Ways to make things go wrong, for the lab. They exist only in builds with the feature `failpoints`; in every other
//! build they are empty.

/// A point in the life of a step where a run can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The journal names the step, nothing of it is done.
    Before,
    /// It is done, the journal still names it.
    After,
}

#[cfg(not(feature = "failpoints"))]
mod switches {
    pub fn is_blind() -> bool {
        false
    }

    pub fn is_alone() -> bool {
        false
    }

    pub fn pass(_: crate::sys::failpoints::Point) {}

    pub fn forget(_: &mut std::process::Command) {}
}

#[cfg(feature = "failpoints")]
mod switches {
    use crate::sys::failpoints::Point;
    use nix::sys::signal::{Signal, raise};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// `GPU_HANDOFF_TEST_BLIND`: the look for holders sees nobody, nor does the driver's count tell of any.
    pub fn is_blind() -> bool {
        std::env::var_os("GPU_HANDOFF_TEST_BLIND").is_some()
    }

    /// `GPU_HANDOFF_TEST_ALONE`: a worker whose parent was killed does not start `reconcile`, so that a test can look
    /// at what was left behind.
    pub fn is_alone() -> bool {
        std::env::var_os("GPU_HANDOFF_TEST_ALONE").is_some()
    }

    /// What is started to put things right is not to be killed as well.
    pub fn forget(command: &mut std::process::Command) {
        command.env_remove("GPU_HANDOFF_TEST_KILL");
    }

    /// `GPU_HANDOFF_TEST_KILL=before:3` or `after:3`: SIGKILL at the third step that changes something;
    /// `GPU_HANDOFF_TEST_TERM` likewise, SIGTERM.
    pub fn pass(point: Point) {
        static STEPS: AtomicU32 = AtomicU32::new(0);
        let step = match point {
            Point::Before => STEPS.fetch_add(1, Ordering::Relaxed) + 1,
            Point::After => STEPS.load(Ordering::Relaxed),
        };
        let here = match point {
            Point::Before => format!("before:{step}"),
            Point::After => format!("after:{step}"),
        };
        for (variable, signal) in
            [("GPU_HANDOFF_TEST_KILL", Signal::SIGKILL), ("GPU_HANDOFF_TEST_TERM", Signal::SIGTERM)]
        {
            if std::env::var(variable).is_ok_and(|wanted| wanted == here) {
                let _ = raise(signal);
            }
        }
    }
}

pub use switches::{forget, is_alone, is_blind, pass};
