//! Time must grow with the size of what is read and no faster: nothing that others write may keep a hook busy.

use std::time::{Duration, Instant};

/// How large inputs become.
const SIZE: usize = 1 << 20;

/// What reading one may take, with sanitizers and with what the targets do besides; a release build is ten times
/// faster.
const LIMIT: Duration = Duration::from_secs(5);

/// Between the parts of the input; NUL is between the parts of the other targets' inputs.
const APART: u8 = 2;

/// Stands for the number of the repetition.
const NUMBER: u8 = 1;

const TARGETS: &[(&str, fn(&[u8]))] = &[
    ("vm", crate::vm),
    ("ct", crate::ct),
    ("mapping", crate::mapping),
    ("pci_id", crate::pci_id),
    ("property", crate::property),
    ("record", crate::record),
    ("journal", crate::journal),
    ("wedge", crate::wedge),
    ("config", crate::config),
    ("static_ids", crate::static_ids),
    ("driver", crate::driver),
    ("holders", crate::holders),
    ("process", crate::process),
    ("locks", crate::locks),
    ("message", crate::message),
    ("command_line", crate::command_line),
];

/// The name of another target, a beginning, what is repeated up to a MiB, and an end.
pub fn growth(data: &[u8]) {
    let mut rest = data.splitn(4, |byte| *byte == APART);
    let [name, begin, repeated, end] = std::array::from_fn(|_| rest.next().unwrap_or_default());
    let Some((_, target)) = TARGETS.iter().find(|(known, _)| known.as_bytes() == name) else { return };
    if repeated.is_empty() || data.len() > SIZE {
        return;
    }
    let mut input = begin.to_vec();
    for number in 0.. {
        if input.len() >= SIZE {
            break;
        }
        for byte in repeated {
            match *byte {
                NUMBER => input.extend_from_slice(number.to_string().as_bytes()),
                byte => input.push(byte),
            }
        }
    }
    input.extend_from_slice(end);
    let begin = Clock::now();
    target(&input);
    let took = begin.elapsed();
    assert!(took < LIMIT, "{} took {took:?}", String::from_utf8_lossy(name));
}

/// The time of this thread on a CPU, so that it does not matter what else the machine does.
enum Clock {
    Cpu(u64),
    /// For kernels that do not tell.
    Wall(Instant),
}

impl Clock {
    fn now() -> Clock {
        cpu_nanoseconds().map_or_else(|| Clock::Wall(Instant::now()), Clock::Cpu)
    }

    fn elapsed(&self) -> Duration {
        match self {
            Clock::Cpu(begin) => Duration::from_nanos(cpu_nanoseconds().unwrap_or(*begin).saturating_sub(*begin)),
            Clock::Wall(begin) => begin.elapsed(),
        }
    }
}

fn cpu_nanoseconds() -> Option<u64> {
    std::fs::read_to_string("/proc/thread-self/schedstat").ok()?.split_whitespace().next()?.parse().ok()
}
