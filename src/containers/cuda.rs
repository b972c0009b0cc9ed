//! Which CUDA there is for which driver and which distribution. Pure.

use crate::gpu::nvidia::Version;
use std::fmt;

/// NVIDIA's repositories, one for each distribution.
const REPOSITORIES: &str = "https://developer.download.nvidia.com/compute/cuda/repos/";

pub const KEYRING: &str = "cuda-keyring_1.1-1_all.deb";

/// `ID` and `VERSION_ID` of os-release, and the repository's name.
const DISTRIBUTIONS: [(&str, &str, &str); 4] = [
    ("debian", "12", "debian12"),
    ("debian", "13", "debian13"),
    ("ubuntu", "22.04", "ubuntu2204"),
    ("ubuntu", "24.04", "ubuntu2404"),
];

pub const SUPPORTED: &str = "Debian 12 and 13, Ubuntu 22.04 and 24.04";

/// The first driver that a release was made for. Newer releases: at least that of the newest here.
const MADE_FOR: [(Release, &str); 4] = [
    (Release(12, 8), "570.26"),
    (Release(12, 9), "575.51.03"),
    (Release(13, 0), "580.65.06"),
    (Release(13, 1), "590.44.01"),
];

/// The first driver that all releases of a major version run with, for what needs no newer one ("minor version
/// compatibility").
const RUNS_WITH: [(u32, &str); 3] = [(11, "450.80.02"), (12, "525.60.13"), (13, "580.65.06")];

/// Major and minor version of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Release {
    /// `12.8`
    pub fn parse(text: &str) -> Option<Release> {
        let (major, minor) = text.split_once('.')?;
        Some(Release(major.parse().ok()?, minor.parse().ok()?))
    }

    /// Of a package: `cuda-toolkit-12-8`. None for one that follows the newest release.
    pub fn of_package(package: &str) -> Option<Release> {
        let mut parts = package.rsplit('-');
        let (minor, major) = (parts.next()?, parts.next()?);
        Some(Release(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// Whether a driver is new enough for a release.
#[derive(Debug, PartialEq, Eq)]
pub enum Fit {
    Good,
    /// It runs, but not all of it: what only drivers from this one on have is missing.
    Partly(&'static str),
    /// It does not run; the first driver that it does with.
    No(&'static str),
}

pub fn fit(release: Release, driver: Version) -> Fit {
    let older_than = |text: &str| text.parse::<Version>().is_ok_and(|version| driver < version);
    if let Some((_, first)) = RUNS_WITH.iter().find(|(major, _)| *major == release.0)
        && older_than(first)
    {
        return Fit::No(first);
    }
    match MADE_FOR.iter().rev().find(|(made, _)| made.0 == release.0 && *made <= release) {
        Some((_, first)) if older_than(first) => Fit::Partly(first),
        // A major version nobody knew when this was written needs at least what the newest one known does.
        None if MADE_FOR.iter().all(|(made, _)| made.0 < release.0) && older_than(MADE_FOR[MADE_FOR.len() - 1].1) => {
            Fit::No(MADE_FOR[MADE_FOR.len() - 1].1)
        }
        _ => Fit::Good,
    }
}

/// Whether `package` may be installed: those that bring a driver along would take the place of the one that fits the host.
///
/// # Errors
/// Why not.
pub fn check_package(package: &str) -> Result<(), String> {
    let is_name = package.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && package.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    if !is_name {
        return Err(format!("cuda.package: {} is no name of a package", package.escape_debug()));
    }
    let stem = package.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-' || c == '.');
    if matches!(stem, "cuda" | "cuda-drivers" | "cuda-drivers-fabricmanager" | "cuda-runtime" | "cuda-demo-suite")
        || stem.starts_with("cuda-compat")
        || stem.starts_with("nvidia-")
        || stem.starts_with("libcuda")
    {
        return Err(format!("cuda.package: {package} brings a driver along, take a cuda-toolkit-MAJOR-MINOR"));
    }
    Ok(())
}

/// Whether the package has nvcc.
pub fn has_compiler(package: &str) -> bool {
    ["cuda-toolkit", "cuda-nvcc", "cuda-compiler"].iter().any(|stem| match package.strip_prefix(stem) {
        Some(rest) => rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-').is_empty(),
        None => false,
    })
}

/// Where the repository of a distribution is, with a slash at its end; none for one that is not supported.
pub fn repository(base: Option<&str>, id: &str, version: &str) -> Option<String> {
    let (.., name) = DISTRIBUTIONS.iter().find(|(an_id, a_version, _)| (*an_id, *a_version) == (id, version))?;
    Some(format!("{}{name}/x86_64/", self::base(base)))
}

/// What the addresses of all repositories begin with.
pub fn base(repo: Option<&str>) -> String {
    format!("{}/", repo.unwrap_or(REPOSITORIES).trim_end_matches('/'))
}

/// # Errors
/// What is wrong with `cuda.repo`. It ends up in a file that apt reads: one line, no blanks.
pub fn check_repo(repo: &str) -> Result<(), String> {
    let known = ["https://", "http://", "file:/"].iter().any(|scheme| repo.starts_with(scheme));
    if known && repo.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(format!("cuda.repo: {} is no http, https or file URL", repo.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(release: &str, driver: &str) -> Fit {
        fit(Release::parse(release).unwrap(), driver.parse().unwrap())
    }

    #[test]
    fn releases_and_drivers() {
        assert_eq!(fits("12.8", "570.26"), Fit::Good);
        assert_eq!(fits("12.8", "580.95.05"), Fit::Good);
        assert_eq!(fits("12.8", "565.77"), Fit::Partly("570.26"));
        assert_eq!(fits("12.8", "525.60.13"), Fit::Partly("570.26"));
        assert_eq!(fits("12.8", "520.61.05"), Fit::No("525.60.13"));
        assert_eq!(fits("12.9", "575.51.02"), Fit::Partly("575.51.03"));
        assert_eq!(fits("12.4", "550.54"), Fit::Good);
        assert_eq!(fits("13.0", "580.65.06"), Fit::Good);
        assert_eq!(fits("13.0", "575.57.08"), Fit::No("580.65.06"));
        assert_eq!(fits("13.1", "580.95.05"), Fit::Partly("590.44.01"));
        assert_eq!(fits("13.2", "580.95.05"), Fit::Partly("590.44.01"));
        assert_eq!(fits("14.0", "580.95.05"), Fit::No("590.44.01"));
        assert_eq!(fits("14.0", "600.10"), Fit::Good);
    }

    #[test]
    fn releases_of_packages() {
        assert_eq!(Release::of_package("cuda-toolkit-12-8"), Some(Release(12, 8)));
        assert_eq!(Release::of_package("cuda-nvcc-13-0"), Some(Release(13, 0)));
        assert_eq!(Release::of_package("cuda-toolkit"), None);
        assert_eq!(Release::of_package("cuda-toolkit-12"), None);
    }

    #[test]
    fn no_package_with_a_driver_and_no_option_for_apt() {
        for good in ["cuda-toolkit-12-8", "cuda-toolkit", "cuda-nvcc-13-0", "libcublas-12-8"] {
            assert_eq!(check_package(good), Ok(()), "{good}");
        }
        for bad in ["cuda", "cuda-12-8", "cuda-drivers", "cuda-drivers-580", "cuda-runtime-12-8", "cuda-compat-12-8"] {
            assert!(check_package(bad).unwrap_err().contains("brings a driver"), "{bad}");
        }
        for bad in ["", "-y", "a b", "x;y", "Cuda", "a\nb", "../x"] {
            assert!(check_package(bad).unwrap_err().contains("no name"), "{bad}");
        }
        assert!(has_compiler("cuda-toolkit-12-8") && has_compiler("cuda-nvcc-13-0") && has_compiler("cuda-toolkit"));
        assert!(!has_compiler("cuda-nvcc-prev-12-8") && !has_compiler("cuda-libraries-12-8"));
    }

    #[test]
    fn repositories() {
        let nvidia = repository(None, "debian", "12").unwrap();
        assert_eq!(nvidia, "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/");
        for base in ["http://mirror/cuda", "http://mirror/cuda/"] {
            let mirror = repository(Some(base), "ubuntu", "24.04");
            assert_eq!(mirror.as_deref(), Some("http://mirror/cuda/ubuntu2404/x86_64/"));
        }
        assert_eq!(repository(None, "debian", "11"), None);
        assert_eq!(repository(None, "linuxmint", "22.04"), None);
        assert_eq!(check_repo("file:/srv/cuda"), Ok(()));
        for bad in ["", "/srv/cuda", "ftp://x/", "http://a b/", "http://a\nb/"] {
            assert!(check_repo(bad).is_err(), "{bad}");
        }
    }
}
