//! Time must grow with the size of what is read and no faster: nothing that others write may keep a hook busy.

use std::time::{Duration, Instant};

/// How large inputs become, and how much larger than the small ones that they are compared with.
const SIZE: usize = 256 * 1024;
const TIMES: usize = 4;

/// What reading one may take, with sanitizers and with what the targets do besides; a release build is ten times
/// faster.
const LIMIT: Duration = Duration::from_secs(2);

/// What takes less shows nothing about how it grows.
const TOO_SHORT: Duration = Duration::from_millis(100);

/// Between the parts of the input; NUL is between the parts of the other targets' inputs.
const APART: u8 = 2;

/// Stands for the number of the repetition.
const NUMBER: u8 = 1;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
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
    ("maps", crate::maps),
    ("message", crate::message),
    ("command_line", crate::command_line),
    ("attach", crate::attach),
    ("setup", crate::setup),
];

/// The name of another target, a beginning, what is repeated, and an end.
pub fn growth(data: &[u8]) {
    let mut rest = data.splitn(4, |byte| *byte == APART);
    let [name, begin, repeated, end] = std::array::from_fn(|_| rest.next().unwrap_or_default());
    let Some((name, target)) = TARGETS.iter().find(|(known, _)| known.as_bytes() == name) else { return };
    if repeated.is_empty() || data.len() > SIZE / TIMES / 4 {
        return;
    }
    let time = |size: usize| {
        let input = stretch(begin, repeated, end, size);
        let begin = Clock::now();
        target(&input);
        begin.elapsed()
    };
    // Once is enough unless it looks bad.
    for tries in 1.. {
        let (small, large) = (time(SIZE / TIMES), time(SIZE));
        // Four times the size takes four times as long, sixteen times as long if each part is compared with all others.
        let is_proportional = large < TOO_SHORT || large < small * (2 * TIMES as u32);
        if large < LIMIT && is_proportional {
            break;
        }
        assert!(tries < 3, "{name}: {} KiB took {small:?}, {} KiB {large:?}", SIZE / TIMES / 1024, SIZE / 1024);
    }
}

fn stretch(begin: &[u8], repeated: &[u8], end: &[u8], size: usize) -> Vec<u8> {
    let mut input = begin.to_vec();
    for number in 0.. {
        if input.len() >= size {
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
    input
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
