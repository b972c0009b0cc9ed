//! Kernels that a driver is known not to build for. Pure. What is not in here may fail as well.

use crate::gpu::nvidia::Version;
use crate::trouble::Trouble;

/// A branch that does not build from a kernel on.
struct Row {
    branch: u32,
    /// The first of the branch that does; none when none is known.
    fixed: Option<&'static str>,
    kernel: (u32, u32),
    /// Only that series, from this release on: a change that came with a stable update.
    stable: Option<u32>,
}

/// From reports to NVIDIA/open-gpu-kernel-modules (#526, #751, #866, #1143), void-packages (#53759, #61087) and
/// nvidia-all (#310); 6.12.117 was tried.
const ROWS: &[Row] = &[
    Row { branch: 390, fixed: None, kernel: (6, 4), stable: None },
    Row { branch: 470, fixed: None, kernel: (6, 12), stable: None },
    Row { branch: 550, fixed: None, kernel: (6, 12), stable: Some(117) },
    Row { branch: 550, fixed: None, kernel: (6, 17), stable: None },
    Row { branch: 555, fixed: None, kernel: (6, 17), stable: None },
    Row { branch: 565, fixed: None, kernel: (6, 13), stable: None },
    Row { branch: 570, fixed: Some("570.153.02"), kernel: (6, 15), stable: None },
    Row { branch: 570, fixed: Some("570.195.03"), kernel: (6, 17), stable: None },
    Row { branch: 580, fixed: Some("580.159.04"), kernel: (7, 1), stable: None },
];

/// Why this driver will hardly build for a kernel.
pub fn doubt(version: &str, release: &str) -> Option<Trouble> {
    let branch: u32 = version.split('.').next()?.parse().ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let (series, stable) = ((numbers.next()?, numbers.next()?), numbers.next().unwrap_or(0));
    let is_older = |fixed: &str| version.parse::<Version>().ok() < fixed.parse().ok();
    let applies = |row: &&Row| {
        let is_kernel = match row.stable {
            None => series >= row.kernel,
            Some(from) => series == row.kernel && stable >= from,
        };
        row.branch == branch && is_kernel && row.fixed.is_none_or(is_older)
    };
    let row = ROWS.iter().rfind(applies)?;
    let then = match row.fixed {
        Some(fixed) => format!("take {fixed} or newer"),
        None => "take a newer branch, or boot an older kernel".to_string(),
    };
    let what = format!("driver {version} is known not to build for kernel {release}");
    Some(Trouble::new(what, then).joined(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_not_to_build_and_what_is_not() {
        for (version, release, then) in [
            ("390.157", "6.8.12-4-pve", "take a newer branch"),
            ("470.256.02", "6.14.11-4-pve", "take a newer branch"),
            ("550.163.01", "6.17.13-2-pve", "take a newer branch"),
            ("550.163.01", "6.12.117+deb13-amd64", "take a newer branch"),
            ("565.77", "6.14.0-1-pve", "take a newer branch"),
            ("570.144", "6.17.1-1-pve", "take 570.195.03 or newer"),
            ("570.144", "6.15.1", "take 570.153.02 or newer"),
            ("580.142", "7.1.0-1-pve", "take 580.159.04 or newer"),
        ] {
            let said = doubt(version, release).map(|doubt| doubt.to_string()).unwrap_or_default();
            assert!(said.contains(then), "{version} {release}: {said}");
        }
        for (version, release) in [
            ("470.256.02", "6.8.12-4-pve"),
            ("550.163.01", "6.14.11-4-pve"),
            ("550.163.01", "6.12.48+deb13-amd64"),
            ("570.195.03", "6.17.1-1-pve"),
            ("580.95.05", "6.17.1-1-pve"),
            ("590.48.01", "7.1.0"),
            ("580.95.05", "nonsense"),
        ] {
            assert_eq!(doubt(version, release), None, "{version} {release}");
        }
    }
}
