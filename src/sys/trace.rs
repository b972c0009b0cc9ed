//! Where a run's time goes, told on standard error to whoever wants to know: each request to the worker, helper program,
//! lock, file and wait, in microseconds. Costs nothing as long as nobody asked.

use std::io::{Write, stderr};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// When the run began; set once somebody has asked.
static BEGIN: OnceLock<Instant> = OnceLock::new();

/// From now on everything is told, of a run that began so long ago.
pub fn begin(ago: Duration) {
    let now = Instant::now();
    let _ = BEGIN.set(now.checked_sub(ago).unwrap_or(now));
}

/// Does it, and tells when that began and how long it took.
pub(super) fn timed<T>(what: impl FnOnce() -> String, work: impl FnOnce() -> T) -> T {
    let Some(begin) = BEGIN.get() else { return work() };
    let from = begin.elapsed();
    let done = work();
    let line = line(from, begin.elapsed().saturating_sub(from), &what());
    // Nobody reading is no reason to stop half-way.
    let _ = stderr().write_all(line.as_bytes());
    done
}

/// What is in control characters is shown as such: a path may come from anywhere.
fn line(from: Duration, took: Duration, what: &str) -> String {
    format!("gpu-handoff: trace {:>9} us {:>9} us  {}\n", from.as_micros(), took.as_micros(), what.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_when_it_began_and_how_long_it_took() {
        let (from, took) = (Duration::from_micros(1234), Duration::from_millis(5));
        assert_eq!(
            line(from, took, "write \n to /a"),
            "gpu-handoff: trace      1234 us      5000 us  write \\n to /a\n"
        );
    }

    /// No test of this process asks for it: the trees do, of processes of their own.
    #[test]
    fn who_has_not_asked_is_told_nothing() {
        assert_eq!(timed(|| unreachable!("nobody asked"), || 7), 7);
    }
}
