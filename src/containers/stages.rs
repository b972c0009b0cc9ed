//! What has to be done in a container, from what a look into it found. Pure.

use super::cuda::{self, Fit, Release};
use super::index::Room;
use super::seen::Seen;
use crate::decimal::tenths;
use crate::gpu::nvidia::Version;
use crate::story::row;
use std::fmt;

/// What a container shall have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The host's, as it writes it.
    pub driver: String,
    pub cuda: Toolkit,
    /// `cuda.repo`.
    pub repo: Option<String>,
}

/// What of CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Toolkit {
    /// Only the driver is looked after.
    None,
    /// The one that fits the driver and the distribution best, unless there is one that fits.
    Best,
    Package(String),
}

impl Wanted {
    pub fn package(&self) -> Option<&str> {
        match &self.cuda {
            Toolkit::Package(package) => Some(package),
            Toolkit::None | Toolkit::Best => None,
        }
    }

    /// With the toolkit that is meant where this is inside.
    ///
    /// # Errors
    /// Why there is none.
    pub fn with_toolkit(&self, ctid: u32, seen: &Seen) -> Result<Wanted, String> {
        if self.cuda != Toolkit::Best {
            return Ok(self.clone());
        }
        let driver =
            self.driver.parse::<Version>().map_err(|()| format!("driver {} is not understood", self.driver))?;
        let there = seen.packages.keys().filter_map(|package| cuda::of_toolkit(package));
        let fits = |release: &Release| !matches!(cuda::fit(*release, driver), Fit::No(_));
        let release = match there.filter(fits).max() {
            Some(release) => release,
            None => cuda::best_for(&seen.os.0, &seen.os.1, driver).map_err(|why| {
                format!(
                    "container {ctid}: no CUDA toolkit fits driver {}: {why}; install a newer driver on the host, or the \
                     driver alone: gpu-handoff container setup {ctid} --driver-only",
                    self.driver
                )
            })?,
        };
        Ok(Wanted { cuda: Toolkit::Package(cuda::toolkit(release)), ..self.clone() })
    }
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
            Stage::Clean => f.write_str(&row("remove", &"what an interrupted run left")),
            Stage::Driver { version, instead_of } => {
                let old = instead_of.as_ref().map_or_else(String::new, |old| format!(" in place of {old}"));
                f.write_str(&row("install", &format_args!("driver {version}{old}, without kernel modules")))
            }
            Stage::Repair => f.write_str(&row("end", &"what an interrupted dpkg was at")),
            Stage::Repository { url } => f.write_str(&row("add", &format_args!("the CUDA repository {url}"))),
            Stage::Toolkit { package } => f.write_str(&row("install", package)),
        }
    }
}

const GIB: u64 = 1024 * 1024;

/// An installer (0.45 GiB) and what it unpacks (1.8 GiB with 610), where temporary files are: in KiB, as `df` counts.
const DRIVER_UNPACKED: u64 = GIB * 23 / 10;
/// The driver without kernel modules.
const DRIVER_INSTALLED: u64 = GIB;
/// A whole toolkit: packages (3.3 GiB) that are there until all are installed (6.7 GiB).
const TOOLKIT: u64 = 10 * GIB;
/// Any other package of CUDA. apt looks for itself before it begins.
const PACKAGE: u64 = GIB;

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
    let Some(package) = wanted.package() else { return stages };
    if seen.is_broken {
        stages.push(Stage::Repair);
    }
    let url = cuda::repository(wanted.repo.as_deref(), &seen.os.0, &seen.os.1);
    if let Some(url) = url.filter(|_| !has_repository(seen)) {
        stages.push(Stage::Repository { url });
    }
    if !has_toolkit(seen, package) {
        stages.push(Stage::Toolkit { package: package.to_string() });
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
    let mut nvcc = seen.nvcc.iter().filter_map(|text| Release::parse(text));
    let compiles = match release {
        _ if !cuda::has_compiler(package) => true,
        Some(release) => nvcc.any(|nvcc| nvcc == release),
        None => nvcc.next().is_some(),
    };
    compiles && seen.packages.contains_key(package)
}

/// What must be known before anything is downloaded: whether this toolkit runs with this driver. A warning, if any.
///
/// # Errors
/// Why it does not.
pub fn check_toolkit(wanted: &Wanted) -> Result<Option<String>, cuda::Unfit> {
    wanted.repo.as_deref().map_or(Ok(()), cuda::check_repo).map_err(cuda::Unfit::Named)?;
    let Some(package) = wanted.package() else { return Ok(None) };
    cuda::check_package(package).map_err(cuda::Unfit::Named)?;
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
        Fit::No(first) => Err(cuda::Unfit::Driver(format!(
            "{package} needs driver {first} or newer, the host has {}; name an older toolkit in cuda.package or leave that \
             out, or install a newer driver on the host",
            wanted.driver
        ))),
    }
}

/// Whether it can be done there at all, but for the room that it takes: [`check_space`].
///
/// # Errors
/// Why not.
pub fn check(ctid: u32, seen: &Seen, wanted: &Wanted, stages: &[Stage]) -> Result<(), String> {
    let installs_driver = stages.iter().any(|stage| matches!(stage, Stage::Driver { .. }));
    if installs_driver && seen.has_musl {
        return Err(format!(
            "container {ctid} has {}, whose C library is musl, and NVIDIA's driver is made for glibc only: take a container \
             of Debian or Ubuntu",
            os_name(seen)
        ));
    }
    check_distribution(ctid, seen, wanted)?;
    if installs_driver && seen.lacks_modprobe {
        return Err(format!(
            "container {ctid} has no modprobe, which NVIDIA's installer wants although it installs no module; install kmod \
             first: pct exec {ctid} -- apt-get -y install kmod"
        ));
    }
    let packages = seen.driver_packages();
    if installs_driver && !packages.is_empty() {
        return Err(format!(
            "container {ctid} has a driver from packages ({}), which an installer would mix with; remove them: pct exec \
             {ctid} -- apt-get purge {}",
            packages.join(", "),
            packages.iter().filter_map(|package| package.split(' ').next()).collect::<Vec<_>>().join(" ")
        ));
    }
    Ok(())
}

/// # Errors
/// When NVIDIA has no CUDA for it.
pub fn check_distribution(ctid: u32, seen: &Seen, wanted: &Wanted) -> Result<(), String> {
    if wanted.cuda == Toolkit::None || cuda::repository(None, &seen.os.0, &seen.os.1).is_some() {
        return Ok(());
    }
    Err(format!(
        "container {ctid} has {}, which NVIDIA's CUDA repository is not set up for here: supported are {}; the driver alone: \
         gpu-handoff container setup {ctid} --driver-only",
        os_name(seen),
        cuda::SUPPORTED
    ))
}

pub fn os_name(seen: &Seen) -> &str {
    let name = [&seen.os_name, &seen.os.0].into_iter().find(|name| !name.is_empty());
    name.map_or("a distribution that does not tell its name", String::as_str)
}

/// What must be free by volume: mount point, free, needed, in KiB. `toolkit` is what the index says of it.
fn space<'a>(seen: &'a Seen, stages: &[Stage], toolkit: Option<Room>) -> Vec<(&'a str, u64, u64)> {
    let mut needs: Vec<(&str, u64, u64)> = Vec::new();
    let mut need = |place: Option<(&'a str, u64)>, kib: u64| {
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
                let told = toolkit.map(|room| room.download + room.installed).filter(|kib| *kib > 0);
                let guess = if package.starts_with("cuda-toolkit") { TOOLKIT } else { PACKAGE };
                need(place(&seen.root), told.unwrap_or(guess));
            }
            Stage::Clean | Stage::Repair | Stage::Repository { .. } => {}
        }
    }
    needs
}

/// # Errors
/// Where there is not enough.
pub fn check_space(ctid: u32, seen: &Seen, stages: &[Stage], toolkit: Option<Room>) -> Result<(), String> {
    let needs = space(seen, stages, toolkit);
    let Some((mount, free, needed)) = needs.into_iter().find(|(_, free, needed)| free < needed) else {
        return Ok(());
    };
    let more = (needed - free).div_ceil(GIB);
    let (volume, which) = match mount {
        "/" => ("rootfs", String::new()),
        _ => ("mpN", format!(" (its N: pct config {ctid})")),
    };
    let alone = match stages {
        [Stage::Driver { .. }, .., Stage::Toolkit { .. }] => {
            format!("; the driver alone: gpu-handoff container setup {ctid} --driver-only")
        }
        _ => String::new(),
    };
    Err(format!(
        "container {ctid} has {} GiB free on {mount}, and {} GiB are needed; make it larger: pct resize {ctid} {volume} \
         +{more}G{which}{alone}",
        tenths(free, GIB),
        tenths(needed, GIB)
    ))
}

/// How much room this takes, a line for people; none when it takes none.
pub fn sizes(seen: &Seen, stages: &[Stage], toolkit: Option<Room>) -> Option<String> {
    let gib = |kib: u64| format!("{} GiB", tenths(kib, GIB));
    let places = space(seen, stages, toolkit);
    let whole: Vec<String> = places
        .iter()
        .map(|(mount, free, needed)| format!("{} on {mount}, where {} are free", gib(*needed), gib(*free)))
        .collect();
    let mut parts = Vec::new();
    for stage in stages {
        match stage {
            Stage::Driver { .. } => parts.push(format!(
                "the driver about {}, and {} while it is installed",
                gib(DRIVER_INSTALLED),
                gib(DRIVER_UNPACKED)
            )),
            Stage::Toolkit { package } => match toolkit.filter(|room| room.installed > 0) {
                Some(Room { download, installed }) => {
                    parts.push(format!("{package} {}, and {} to download", gib(installed), gib(download)))
                }
                None => parts.push(format!("{package} up to {}", gib(TOOLKIT))),
            },
            Stage::Clean | Stage::Repair | Stage::Repository { .. } => {}
        }
    }
    (!whole.is_empty()).then(|| format!("{}: {}", whole.join(", "), parts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: &str = "os=debian\nos_version=13\nos_name=Debian 13\nfree=/ / 20000000\nfree=/var/tmp / 20000000\n";
    const DRIVER: &str = "libcuda=580.95.05\nlibnvidia-ml=580.95.05\nsmi=yes\n";
    const CUDA: &str = "repository=yes\npackage=cuda-keyring 1.1-1 installed\nnvcc=12.8\n\
        package=cuda-toolkit-12-8 12.8.1-1 installed\n";

    fn wanted() -> Wanted {
        Wanted { driver: "580.95.05".into(), cuda: Toolkit::Package("cuda-toolkit-12-8".into()), repo: None }
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
        let only_driver = Wanted { cuda: Toolkit::None, ..wanted() };
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
    fn the_toolkit_that_is_meant() {
        let best = |driver: &str, text: &str| {
            let wanted = Wanted { driver: driver.into(), cuda: Toolkit::Best, repo: None };
            wanted.with_toolkit(101, &Seen::parse(text)).map(|wanted| wanted.package().unwrap_or_default().to_string())
        };
        let debian12 = FRESH.replace("os_version=13", "os_version=12");
        assert_eq!(best("580.95.05", FRESH).unwrap(), "cuda-toolkit-13-0");
        assert_eq!(best("570.86.16", &debian12).unwrap(), "cuda-toolkit-12-8");
        // One that is there and runs is not joined by another.
        assert_eq!(best("580.95.05", &format!("{debian12}{CUDA}")).unwrap(), "cuda-toolkit-12-8");
        let why = best("570.86.16", FRESH).unwrap_err();
        assert!(why.contains("begins with CUDA 13.0") && why.ends_with("container setup 101 --driver-only"), "{why}");
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
        let alone = |text: &str| {
            let (seen, wanted) = (Seen::parse(text), Wanted { cuda: Toolkit::None, ..wanted() });
            check(101, &seen, &wanted, &stages(&seen, &wanted))
        };
        assert_eq!(alone(&fedora), Ok(()));
        let alpine = format!("{}libc=musl\n", FRESH.replace("os=debian", "os=alpine").replace("Debian 13", "Alpine"));
        assert!(alone(&alpine).unwrap_err().contains("has Alpine, whose C library is musl"));
        assert!(refusal(&alpine).contains("musl"), "{}", refusal(&alpine));
        let without = format!("{FRESH}lacks=modprobe\n");
        assert!(alone(&without).unwrap_err().ends_with("pct exec 101 -- apt-get -y install kmod"));
        assert_eq!(alone(&format!("{without}{DRIVER}")), Ok(()));
        let packaged = refusal(&format!("{FRESH}package=libcuda1 550.1-1 installed\n"));
        assert!(packaged.contains("libcuda1 550.1-1") && packaged.ends_with("apt-get purge libcuda1"), "{packaged}");
    }

    #[test]
    fn room_is_counted_by_volume() {
        let room = |root: u64, temporary: (&str, u64)| {
            let (mount, free) = temporary;
            let seen = format!("{FRESH}free=/ / {root}\nfree=/var/tmp {mount} {free}\n");
            let seen = Seen::parse(&seen);
            check_space(101, &seen, &stages(&seen, &wanted()), None)
        };
        let gib = 1024 * 1024;
        assert_eq!(room(14 * gib, ("/", 14 * gib)), Ok(()));
        let message = room(12 * gib, ("/", 12 * gib)).unwrap_err();
        assert_eq!(
            message,
            "container 101 has 12.0 GiB free on /, and 13.3 GiB are needed; make it larger: pct resize 101 rootfs +2G; the \
             driver alone: gpu-handoff container setup 101 --driver-only"
        );
        assert_eq!(room(12 * gib, ("/var/tmp", 3 * gib)), Ok(()));
        let message = room(12 * gib, ("/var/tmp", gib)).unwrap_err();
        assert!(message.contains("has 1.0 GiB free on /var/tmp, and 2.3 GiB are needed"), "{message}");
        // As the index has it; and the driver alone fits in the 8 GB that Proxmox makes a root by default.
        let seen = Seen::parse(&format!("{FRESH}free=/ / {}\nfree=/var/tmp / {}\n", 7 * gib, 7 * gib));
        let all = stages(&seen, &wanted());
        let small = Some(Room { download: gib, installed: 2 * gib });
        assert_eq!(check_space(101, &seen, &all, small), Ok(()));
        assert!(
            sizes(&seen, &all, small).is_some_and(|text| text.starts_with("6.3 GiB on /, where 7.0 GiB are free: "))
        );
        let only_driver = Wanted { cuda: Toolkit::None, ..wanted() };
        assert_eq!(check_space(101, &seen, &stages(&seen, &only_driver), None), Ok(()));
        // Nothing to do needs no room.
        let full = Seen::parse(&format!("{FRESH}{DRIVER}{CUDA}free=/ / 0\nfree=/var/tmp / 0\n"));
        assert_eq!(check_space(101, &full, &stages(&full, &wanted()), None), Ok(()));
    }

    #[test]
    fn a_toolkit_is_judged_before_anything_is_downloaded() {
        let with = |driver: &str, package: &str| {
            check_toolkit(&Wanted { driver: driver.into(), cuda: Toolkit::Package(package.into()), repo: None })
        };
        assert_eq!(with("580.95.05", "cuda-toolkit-12-8"), Ok(None));
        assert!(with("560.35.03", "cuda-toolkit-12-8").unwrap().is_some_and(|w| w.contains("drivers from 570.26 on")));
        assert!(
            with("570.86.16", "cuda-toolkit-13-0").unwrap_err().to_string().contains("needs driver 580.65.06 or newer")
        );
        assert!(with("580.95.05", "cuda-toolkit").unwrap().is_some_and(|w| w.contains("not checked")));
        assert!(with("580.95.05", "cuda-drivers").is_err());
        let bad_mirror = Wanted { repo: Some("/srv/x".into()), ..wanted() };
        assert!(check_toolkit(&bad_mirror).unwrap_err().to_string().starts_with("cuda.repo"));
    }
}
