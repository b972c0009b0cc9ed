//! What has to be done in a container, from what a look into it found. Pure.

use super::cuda::{self, Fit, Release};
use super::seen::Seen;
use crate::gpu::nvidia::Version;
use std::fmt;

/// What a container shall have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The host's, as it writes it.
    pub driver: String,
    /// A package of CUDA; none when only the driver is looked after.
    pub cuda: Option<String>,
    /// `cuda.repo`.
    pub repo: Option<String>,
}

/// One thing to do. Whether it is done is seen by looking again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Remove the files of a run that did not end.
    Clean,
    Driver {
        version: String,
        instead_of: Option<String>,
    },
    /// End what an interrupted dpkg was at.
    Repair,
    Repository {
        url: String,
    },
    Toolkit {
        package: String,
    },
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Stage::Clean => write!(f, "{:<9} what an interrupted run left", "remove"),
            Stage::Driver { version, instead_of } => {
                let old = instead_of.as_ref().map_or_else(String::new, |old| format!(" in place of {old}"));
                write!(f, "{:<9} driver {version}{old}, without kernel modules", "install")
            }
            Stage::Repair => write!(f, "{:<9} what an interrupted dpkg was at", "end"),
            Stage::Repository { url } => write!(f, "{:<9} the CUDA repository {url}", "add"),
            Stage::Toolkit { package } => write!(f, "{:<9} {package}", "install"),
        }
    }
}

const GIB: f64 = 1024.0 * 1024.0;

/// An installer (0.4 GiB) and what it unpacks (1 GiB), where temporary files are: in KiB, as `df` counts.
const DRIVER_UNPACKED: f64 = 1.5 * GIB;
/// The driver without kernel modules.
const DRIVER_INSTALLED: f64 = GIB;
/// A whole toolkit: packages (3.3 GiB) that are there until all are installed (6.7 GiB).
const TOOLKIT: f64 = 10.0 * GIB;
/// Any other package of CUDA. apt looks for itself before it begins.
const PACKAGE: f64 = GIB;

/// In order; none when all is as it should be.
pub fn stages(seen: &Seen, wanted: &Wanted) -> Vec<Stage> {
    let mut stages = Vec::new();
    let has_driver = seen.driver() == Some(wanted.driver.as_str());
    if seen.has_leftovers && has_driver {
        stages.push(Stage::Clean);
    }
    if !has_driver {
        let instead_of = seen.driver().map(str::to_string);
        stages.push(Stage::Driver { version: wanted.driver.clone(), instead_of });
    }
    let Some(package) = &wanted.cuda else { return stages };
    if seen.is_broken {
        stages.push(Stage::Repair);
    }
    let url = cuda::repository(wanted.repo.as_deref(), &seen.os.0, &seen.os.1);
    if let Some(url) = url.filter(|_| !has_repository(seen)) {
        stages.push(Stage::Repository { url });
    }
    if !has_toolkit(seen, package) {
        stages.push(Stage::Toolkit { package: package.clone() });
    }
    stages
}

impl Stage {
    /// Whether a look afterwards shows it.
    pub fn is_done(&self, seen: &Seen) -> bool {
        match self {
            Stage::Clean => !seen.has_leftovers,
            Stage::Driver { version, .. } => seen.driver() == Some(version.as_str()),
            Stage::Repair => !seen.is_broken,
            Stage::Repository { .. } => has_repository(seen),
            Stage::Toolkit { package } => has_toolkit(seen, package),
        }
    }
}

fn has_repository(seen: &Seen) -> bool {
    seen.knows_repository && seen.packages.contains_key("cuda-keyring")
}

fn has_toolkit(seen: &Seen, package: &str) -> bool {
    let release = Release::of_package(package);
    let nvcc = seen.nvcc.as_deref().and_then(Release::parse);
    let compiles = match release {
        _ if !cuda::has_compiler(package) => true,
        Some(release) => nvcc == Some(release),
        None => nvcc.is_some(),
    };
    compiles && seen.packages.contains_key(package)
}

/// What must be known before anything is downloaded: whether this toolkit runs with this driver. A warning, if any.
///
/// # Errors
/// Why it does not.
pub fn check_toolkit(wanted: &Wanted) -> Result<Option<String>, String> {
    let Some(package) = &wanted.cuda else { return Ok(None) };
    cuda::check_package(package)?;
    wanted.repo.as_deref().map_or(Ok(()), cuda::check_repo)?;
    let Ok(driver) = wanted.driver.parse::<Version>() else { return Ok(None) };
    let Some(release) = Release::of_package(package) else {
        return Ok(Some(format!(
            "{package} names no release of CUDA: whether driver {} is new enough was not checked",
            wanted.driver
        )));
    };
    match cuda::fit(release, driver) {
        Fit::Good => Ok(None),
        Fit::Partly(first) => Ok(Some(format!(
            "CUDA {release} was made for drivers from {first} on; with {} it runs but for what needs a newer one, such as \
             PTX from that toolkit",
            wanted.driver
        ))),
        Fit::No(first) => Err(format!(
            "{package} needs driver {first} or newer, the host has {}; name an older toolkit in cuda.package, or install a \
             newer driver on the host",
            wanted.driver
        )),
    }
}

/// Whether it can be done there at all.
///
/// # Errors
/// Why not.
pub fn check(ctid: u32, seen: &Seen, wanted: &Wanted, stages: &[Stage]) -> Result<(), String> {
    if wanted.cuda.is_some() && cuda::repository(None, &seen.os.0, &seen.os.1).is_none() {
        let name = [&seen.os_name, &seen.os.0].into_iter().find(|name| !name.is_empty());
        let name = name.map_or("a distribution that does not tell its name", String::as_str);
        return Err(format!(
            "container {ctid} has {name}, which NVIDIA's CUDA repository is not set up for here: supported are {}",
            cuda::SUPPORTED
        ));
    }
    let installs_driver = stages.iter().any(|stage| matches!(stage, Stage::Driver { .. }));
    let packages = seen.driver_packages();
    if installs_driver && !packages.is_empty() {
        return Err(format!(
            "container {ctid} has a driver from packages ({}), which an installer would mix with; remove them: pct exec \
             {ctid} -- apt-get purge {}",
            packages.join(", "),
            packages.iter().filter_map(|package| package.split(' ').next()).collect::<Vec<_>>().join(" ")
        ));
    }
    check_space(ctid, seen, stages)
}

fn check_space<'a>(ctid: u32, seen: &'a Seen, stages: &[Stage]) -> Result<(), String> {
    let mut needs: Vec<(&str, u64, f64)> = Vec::new();
    let mut need = |place: Option<(&'a str, u64)>, kib: f64| {
        let Some((mount, free)) = place else { return };
        match needs.iter_mut().find(|(other, ..)| *other == mount) {
            Some((.., needed)) => *needed += kib,
            None => needs.push((mount, free, kib)),
        }
    };
    let place = |at: &'a Option<(String, u64)>| at.as_ref().map(|(mount, free)| (mount.as_str(), *free));
    for stage in stages {
        match stage {
            Stage::Driver { instead_of, .. } => {
                need(place(&seen.temporary), DRIVER_UNPACKED);
                if instead_of.is_none() {
                    need(place(&seen.root), DRIVER_INSTALLED);
                }
            }
            Stage::Toolkit { package } => {
                need(place(&seen.root), if package.starts_with("cuda-toolkit") { TOOLKIT } else { PACKAGE });
            }
            Stage::Clean | Stage::Repair | Stage::Repository { .. } => {}
        }
    }
    match needs.into_iter().find(|(_, free, needed)| (*free as f64) < *needed) {
        Some((mount, free, needed)) => Err(format!(
            "container {ctid} has {:.1} GiB free on {mount}, and {:.1} GiB are needed: pct resize makes a volume larger",
            free as f64 / GIB,
            needed / GIB
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: &str = "os=debian\nos_version=13\nos_name=Debian 13\nfree=/ / 20000000\nfree=/var/tmp / 20000000\n";
    const DRIVER: &str = "libcuda=580.95.05\nlibnvidia-ml=580.95.05\nsmi=yes\n";
    const CUDA: &str = "repository=yes\npackage=cuda-keyring 1.1-1 installed\nnvcc=12.8\n\
        package=cuda-toolkit-12-8 12.8.1-1 installed\n";

    fn wanted() -> Wanted {
        Wanted { driver: "580.95.05".into(), cuda: Some("cuda-toolkit-12-8".into()), repo: None }
    }

    fn driver(instead_of: Option<&str>) -> Stage {
        Stage::Driver { version: "580.95.05".into(), instead_of: instead_of.map(str::to_string) }
    }

    fn repository() -> Stage {
        Stage::Repository { url: "https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/".into() }
    }

    fn toolkit() -> Stage {
        Stage::Toolkit { package: "cuda-toolkit-12-8".into() }
    }

    /// What is left to do where a look finds this.
    fn left(text: &str) -> Vec<Stage> {
        stages(&Seen::parse(text), &wanted())
    }

    #[test]
    fn what_is_done_is_not_done_again() {
        assert_eq!(left(FRESH), [driver(None), repository(), toolkit()]);
        assert_eq!(left(&format!("{FRESH}{DRIVER}")), [repository(), toolkit()]);
        assert_eq!(left(&format!("{FRESH}{CUDA}")), [driver(None)]);
        assert_eq!(left(&format!("{FRESH}{DRIVER}{CUDA}")), []);
    }

    #[test]
    fn what_was_interrupted_is_done_again() {
        let all = format!("{FRESH}{DRIVER}{CUDA}");
        assert_eq!(left(&format!("{all}installing=yes\nleftovers=yes\n")), [driver(None)]);
        assert_eq!(left(&format!("{all}leftovers=yes\n")), [Stage::Clean]);
        assert_eq!(left(&format!("{all}broken=yes\n")), [Stage::Repair]);
        assert_eq!(left(&all.replace("-12-8 12.8.1-1 installed", "-12-8 12.8.1-1 half-configured")), [toolkit()]);
        assert_eq!(left(&all.replace("nvcc=12.8\n", "")), [toolkit()]);
        assert_eq!(left(&all.replace("repository=yes\n", "")), [repository()]);
    }

    #[test]
    fn another_version_is_replaced() {
        let other = format!("{FRESH}{DRIVER}{CUDA}").replace("580.95.05", "570.86.16");
        assert_eq!(left(&other), [driver(Some("570.86.16"))]);
        let only_driver = Wanted { cuda: None, ..wanted() };
        assert_eq!(stages(&Seen::parse(FRESH), &only_driver), [driver(None)]);
    }

    #[test]
    fn each_stage_shows_when_it_is_done() {
        let (before, after) = (Seen::parse(FRESH), Seen::parse(&format!("{FRESH}{DRIVER}{CUDA}")));
        for stage in left(FRESH) {
            assert!(!stage.is_done(&before) && stage.is_done(&after), "{stage}");
        }
        assert!(!Stage::Clean.is_done(&Seen::parse("leftovers=yes")) && Stage::Clean.is_done(&before));
        assert!(!Stage::Repair.is_done(&Seen::parse("broken=yes")) && Stage::Repair.is_done(&before));
    }

    fn refusal(text: &str) -> String {
        let seen = Seen::parse(text);
        check(101, &seen, &wanted(), &stages(&seen, &wanted())).unwrap_err()
    }

    #[test]
    fn where_it_cannot_be_done() {
        let fedora = FRESH.replace("os=debian", "os=fedora").replace("Debian 13", "Fedora Linux 42");
        assert!(refusal(&fedora).starts_with("container 101 has Fedora Linux 42, which"), "{}", refusal(&fedora));
        assert!(
            refusal(&FRESH.replace("os_version=13", "os_version=11"))
                .contains("supported are Debian 12 and 13, Ubuntu")
        );
        assert!(refusal("").contains("does not tell its name"));
        let packaged = refusal(&format!("{FRESH}package=libcuda1 550.1-1 installed\n"));
        assert!(packaged.contains("libcuda1 550.1-1") && packaged.ends_with("apt-get purge libcuda1"), "{packaged}");
    }

    #[test]
    fn room_is_counted_by_volume() {
        let room = |root: u64, temporary: (&str, u64)| {
            let (mount, free) = temporary;
            let seen = format!("{FRESH}free=/ / {root}\nfree=/var/tmp {mount} {free}\n");
            let seen = Seen::parse(&seen);
            check(101, &seen, &wanted(), &stages(&seen, &wanted()))
        };
        let gib = 1024 * 1024;
        assert_eq!(room(13 * gib, ("/", 13 * gib)), Ok(()));
        let message = room(12 * gib, ("/", 12 * gib)).unwrap_err();
        assert!(message.contains("has 12.0 GiB free on /, and 12.5 GiB are needed"), "{message}");
        assert_eq!(room(12 * gib, ("/var/tmp", 2 * gib)), Ok(()));
        let message = room(12 * gib, ("/var/tmp", gib)).unwrap_err();
        assert!(message.contains("has 1.0 GiB free on /var/tmp, and 1.5 GiB are needed"), "{message}");
        // Nothing to do needs no room.
        let full = Seen::parse(&format!("{FRESH}{DRIVER}{CUDA}free=/ / 0\nfree=/var/tmp / 0\n"));
        assert_eq!(check(101, &full, &wanted(), &stages(&full, &wanted())), Ok(()));
    }

    #[test]
    fn a_toolkit_is_judged_before_anything_is_downloaded() {
        let with = |driver: &str, package: &str| {
            check_toolkit(&Wanted { driver: driver.into(), cuda: Some(package.into()), repo: None })
        };
        assert_eq!(with("580.95.05", "cuda-toolkit-12-8"), Ok(None));
        assert!(with("560.35.03", "cuda-toolkit-12-8").unwrap().is_some_and(|w| w.contains("drivers from 570.26 on")));
        assert!(with("570.86.16", "cuda-toolkit-13-0").unwrap_err().contains("needs driver 580.65.06 or newer"));
        assert!(with("580.95.05", "cuda-toolkit").unwrap().is_some_and(|w| w.contains("not checked")));
        assert!(with("580.95.05", "cuda-drivers").is_err());
        let bad_mirror = Wanted { repo: Some("/srv/x".into()), ..wanted() };
        assert!(check_toolkit(&bad_mirror).unwrap_err().starts_with("cuda.repo"));
    }
}
