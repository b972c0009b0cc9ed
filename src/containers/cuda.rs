//! Which CUDA there is for which driver and which distribution. Pure.

use crate::gpu::nvidia::Version;
use std::fmt;

/// NVIDIA's repositories, one for each distribution.
const REPOSITORIES: &str = "https://developer.download.nvidia.com/compute/cuda/repos/";

pub const KEYRING: &str = "cuda-keyring_1.1-1_all.deb";

/// One of NVIDIA's repositories.
struct Distribution {
    /// `ID` and `VERSION_ID` of os-release.
    id: &'static str,
    version: &'static str,
    name: &'static str,
    /// The first release that it has. What it really has is looked up before anything is installed.
    begins_with: Release,
}

const DISTRIBUTIONS: [Distribution; 4] = [
    Distribution { id: "debian", version: "12", name: "debian12", begins_with: Release(12, 3) },
    Distribution { id: "debian", version: "13", name: "debian13", begins_with: Release(13, 0) },
    Distribution { id: "ubuntu", version: "22.04", name: "ubuntu2204", begins_with: Release(12, 0) },
    Distribution { id: "ubuntu", version: "24.04", name: "ubuntu2404", begins_with: Release(12, 5) },
];

pub const SUPPORTED: &str = "Debian 12 and 13, Ubuntu 22.04 and 24.04";

/// The first driver that a release was made for, by NVIDIA's release notes ("CUDA Toolkit and Corresponding Driver
/// Versions", docs.nvidia.com/cuda/cuda-toolkit-release-notes), each as it first came out. Newer releases: at least that of
/// the newest here.
const MADE_FOR: [(Release, &str); 13] = [
    (Release(12, 0), "525.60.13"),
    (Release(12, 1), "530.30.02"),
    (Release(12, 2), "535.54.03"),
    (Release(12, 3), "545.23.06"),
    (Release(12, 4), "550.54.14"),
    (Release(12, 5), "555.42.02"),
    (Release(12, 6), "560.28.03"),
    (Release(12, 8), "570.26"),
    (Release(12, 9), "575.51.03"),
    (Release(13, 0), "580.65.06"),
    (Release(13, 1), "590.44.01"),
    (Release(13, 2), "595.45.04"),
    (Release(13, 3), "610.43.02"),
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
        None if MADE_FOR.iter().all(|(made, _)| made.0 < release.0) => match MADE_FOR.last() {
            Some((_, first)) if older_than(first) => Fit::No(first),
            _ => Fit::Good,
        },
        _ => Fit::Good,
    }
}

/// The toolkit for a driver: the newest release that was made for it or an earlier one, or else the oldest that runs with
/// it at all. `has` tells whether there is that release.
pub fn best(driver: Version, has: &dyn Fn(Release) -> bool) -> Option<Release> {
    let there = || MADE_FOR.iter().map(|(release, _)| *release).filter(|release| has(*release));
    let fits = |release: &Release| fit(*release, driver) == Fit::Good;
    there().filter(fits).last().or_else(|| there().find(|release| matches!(fit(*release, driver), Fit::Partly(_))))
}

/// As [`best`], of what NVIDIA has for a distribution.
///
/// # Errors
/// Why there is none.
pub fn best_for(id: &str, version: &str, driver: Version) -> Result<Release, String> {
    let Some(distribution) = distribution(id, version) else {
        return Err("there is none for its distribution".to_string());
    };
    let first = distribution.begins_with;
    best(driver, &|release| release >= first).ok_or_else(|| {
        let needed = RUNS_WITH.iter().find(|(major, _)| *major == first.0).map_or("a newer one", |(_, driver)| driver);
        format!("NVIDIA's repository {} begins with CUDA {first}, which needs driver {needed}", distribution.name)
    })
}

pub fn toolkit(release: Release) -> String {
    format!("cuda-toolkit-{}-{}", release.0, release.1)
}

/// Which toolkit a package is: `cuda-toolkit-12-8`, and no part of one.
pub fn of_toolkit(package: &str) -> Option<Release> {
    Release::of_package(package).filter(|release| toolkit(*release) == package)
}

fn distribution(id: &str, version: &str) -> Option<&'static Distribution> {
    DISTRIBUTIONS.iter().find(|distribution| (distribution.id, distribution.version) == (id, version))
}

/// Why a toolkit cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// The configuration names what cannot be.
    Named(String),
    /// It is made for a newer driver.
    Driver(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (Unfit::Named(why) | Unfit::Driver(why)) = self;
        f.write_str(why)
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
    Some(format!("{}{}/x86_64/", self::base(base), distribution(id, version)?.name))
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
        assert_eq!(fits("12.4", "550.54.14"), Fit::Good);
        assert_eq!(fits("12.4", "550.54"), Fit::Partly("550.54.14"));
        assert_eq!(fits("13.0", "580.65.06"), Fit::Good);
        assert_eq!(fits("13.0", "575.57.08"), Fit::No("580.65.06"));
        assert_eq!(fits("13.1", "580.95.05"), Fit::Partly("590.44.01"));
        assert_eq!(fits("13.2", "580.95.05"), Fit::Partly("595.45.04"));
        assert_eq!(fits("13.9", "600.10"), Fit::Partly("610.43.02"));
        assert_eq!(fits("14.0", "580.95.05"), Fit::No("610.43.02"));
        assert_eq!(fits("14.0", "620.10"), Fit::Good);
    }

    #[test]
    fn the_toolkit_for_a_distribution_and_a_driver() {
        let chosen =
            |id: &str, version: &str, driver: &str| best_for(id, version, driver.parse().unwrap()).map(toolkit);
        for (id, version, driver, package) in [
            ("debian", "13", "580.95.05", "cuda-toolkit-13-0"),
            ("debian", "13", "595.45.04", "cuda-toolkit-13-2"),
            ("debian", "13", "620.10", "cuda-toolkit-13-3"),
            ("debian", "12", "570.86.16", "cuda-toolkit-12-8"),
            ("debian", "12", "565.77", "cuda-toolkit-12-6"),
            ("debian", "12", "535.54.03", "cuda-toolkit-12-3"),
            ("ubuntu", "22.04", "535.54.03", "cuda-toolkit-12-2"),
            ("ubuntu", "24.04", "550.163.01", "cuda-toolkit-12-5"),
            ("ubuntu", "24.04", "590.48.01", "cuda-toolkit-13-1"),
        ] {
            assert_eq!(chosen(id, version, driver), Ok(package.to_string()), "{id} {version} {driver}");
        }
        let none = chosen("debian", "13", "570.86.16").unwrap_err();
        assert_eq!(none, "NVIDIA's repository debian13 begins with CUDA 13.0, which needs driver 580.65.06");
        assert!(chosen("debian", "12", "470.256.02").is_err() && chosen("alpine", "3.22", "580.95.05").is_err());
        // Of what there really is.
        let some = [Release(12, 4), Release(12, 6), Release(13, 1)];
        let best = |driver: &str| best(driver.parse().unwrap(), &|release| some.contains(&release));
        assert_eq!(best("580.95.05"), Some(Release(12, 6)));
        assert_eq!(best("530.30.02"), Some(Release(12, 4)));
        assert_eq!(best("470.256.02"), None);
        assert_eq!(of_toolkit("cuda-toolkit-12-8"), Some(Release(12, 8)));
        assert_eq!(of_toolkit("cuda-toolkit-12-8-config-common"), None);
        assert_eq!(of_toolkit("cuda-nvcc-12-8"), None);
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
