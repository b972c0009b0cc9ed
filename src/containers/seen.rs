//! What a look into a container found. Pure; whoever is root in there may have written any of it.

use std::collections::BTreeMap;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// `ID` and `VERSION_ID` of os-release.
    pub os: (String, String),
    pub os_name: String,
    /// Versions of libcuda and of libnvidia-ml, of which there may be more than one after an accident.
    pub libcuda: Vec<String>,
    pub libnvidia_ml: Vec<String>,
    pub has_smi: bool,
    /// An installation of the driver was begun and not ended.
    pub is_installing: bool,
    /// Files of a run that did not end.
    pub has_leftovers: bool,
    /// dpkg was interrupted.
    pub is_broken: bool,
    /// Installed packages among those that matter, with their versions.
    pub packages: BTreeMap<String, String>,
    /// apt knows the repository.
    pub knows_repository: bool,
    /// The releases that there is an nvcc of.
    pub nvcc: Vec<String>,
    /// Docker with NVIDIA's runtime is there, and that is not told to leave cgroups alone.
    pub docker_sets_cgroups: bool,
    /// Its C library is musl, for which NVIDIA makes nothing.
    pub has_musl: bool,
    /// Without it the installer gives up although it installs no module.
    pub lacks_modprobe: bool,
    /// NVIDIA's nodes that can be opened.
    pub nodes: Vec<String>,
    /// Mount point and free KiB of what `/` and `/var/tmp` are on.
    pub root: Option<(String, u64)>,
    pub temporary: Option<(String, u64)>,
}

impl Seen {
    pub fn parse(text: &str) -> Seen {
        let mut seen = Seen::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let value: String = value.chars().filter(|c| !c.is_control()).take(200).collect();
            let mut words = value.split_whitespace();
            match name {
                "os" => seen.os.0 = value,
                "os_version" => seen.os.1 = value,
                "os_name" => seen.os_name = value,
                "libcuda" => add(&mut seen.libcuda, value),
                "libnvidia-ml" => add(&mut seen.libnvidia_ml, value),
                "smi" => seen.has_smi = true,
                "installing" => seen.is_installing = true,
                "leftovers" => seen.has_leftovers = true,
                "broken" => seen.is_broken = true,
                "package" => {
                    if let (Some(package), Some(version), Some("installed")) =
                        (words.next(), words.next(), words.next())
                        && is_package(package)
                    {
                        seen.packages.insert(package.to_string(), version.to_string());
                    }
                }
                "repository" => seen.knows_repository = true,
                "nvcc" => add(&mut seen.nvcc, value),
                "docker" => seen.docker_sets_cgroups = true,
                "libc" => seen.has_musl = value == "musl",
                "lacks" => seen.lacks_modprobe |= value == "modprobe",
                "node" => seen.nodes.push(value),
                "free" => {
                    let of = words.next().map(str::to_string);
                    if let (Some(mount), Some(Ok(kib))) = (words.next(), words.next().map(str::parse)) {
                        let free = Some((mount.to_string(), kib));
                        if of.as_deref() == Some("/") { seen.root = free } else { seen.temporary = free }
                    }
                }
                _ => {}
            }
        }
        seen
    }

    /// The version of the driver's libraries; none when there is none, or not all of one.
    pub fn driver(&self) -> Option<&str> {
        let [version] = self.libcuda.as_slice() else { return None };
        let is_whole = !self.is_installing && self.has_smi && self.libnvidia_ml == self.libcuda;
        is_whole.then_some(version)
    }

    /// Packages of the distribution that are parts of a driver.
    pub fn driver_packages(&self) -> Vec<String> {
        let is_driver = |name: &str| {
            matches!(name, "libcuda1" | "libnvidia-ml1" | "nvidia-smi")
                || name.starts_with("libnvidia-compute-")
                || name.starts_with("nvidia-utils-")
        };
        let packages = self.packages.iter().filter(|(name, _)| is_driver(name));
        packages.map(|(name, version)| format!("{name} {version}")).collect()
    }

    pub fn has_node(&self, path: &str) -> bool {
        self.nodes.iter().any(|node| node == path)
    }
}

/// As Debian names them. They get into commands that somebody may type on the host.
fn is_package(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.starts_with(is_plain) && name.chars().all(|c| is_plain(c) || "+.-:".contains(c))
}

fn add(versions: &mut Vec<String>, version: String) {
    if !versions.contains(&version) {
        versions.push(version);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "os=debian\nos_version=13\nos_name=Debian GNU/Linux 13 (trixie)\nlibcuda=580.95.05\n\
        libnvidia-ml=580.95.05\nlibcuda=580.95.05\nsmi=yes\nnode=/dev/nvidia0\nnode=/dev/nvidiactl\n\
        package=cuda-keyring 1.1-1 installed\npackage=cuda-toolkit-12-8 12.8.1-1 unpacked\n\
        package=libcuda1 550.1 installed\nrepository=yes\nnvcc=12.8\nfree=/ / 20000000\nfree=/var/tmp /var/tmp 1000\n";

    #[test]
    fn all_that_is_told() {
        let seen = Seen::parse(ALL);
        assert_eq!(seen.os, ("debian".to_string(), "13".to_string()));
        assert_eq!(seen.driver(), Some("580.95.05"));
        assert_eq!(seen.packages["cuda-keyring"], "1.1-1");
        assert!(!seen.packages.contains_key("cuda-toolkit-12-8"));
        assert_eq!(seen.driver_packages(), ["libcuda1 550.1"]);
        assert!(seen.knows_repository && !seen.is_broken && !seen.has_leftovers);
        assert!(seen.has_node("/dev/nvidia0") && !seen.has_node("/dev/nvidia"));
        assert_eq!(seen.root, Some(("/".to_string(), 20_000_000)));
        assert_eq!(seen.temporary, Some(("/var/tmp".to_string(), 1000)));
    }

    #[test]
    fn half_a_driver_is_none() {
        for line in ["installing=yes", "libcuda=570.26", "libnvidia-ml=570.26"] {
            assert_eq!(Seen::parse(&format!("{ALL}{line}\n")).driver(), None, "{line}");
        }
        assert_eq!(Seen::parse(&ALL.replace("smi=yes\n", "")).driver(), None);
        assert_eq!(Seen::parse(""), Seen::default());
    }

    #[test]
    fn what_cannot_be_a_package_is_none() {
        for name in ["nvidia-smi;reboot", "nvidia-utils-$(id)", "-o=x", "libcuda1&", "Nvidia-smi", "nvidia-utils-'x"] {
            assert!(Seen::parse(&format!("package={name} 1.0 installed\n")).packages.is_empty(), "{name}");
        }
        let good = Seen::parse("package=libcuda1:amd64 1 installed\npackage=nvidia-utils-5.1+b 1 installed\n");
        assert_eq!(good.packages.len(), 2);
    }

    #[test]
    fn what_a_container_says_cannot_break_a_line() {
        let seen = Seen::parse("os=a\x1b[31mb\0c\rx\nfree=/ / many\nnonsense\n=\nfree=\n");
        assert_eq!(seen.os.0, "a[31mbcx");
        assert_eq!(seen.root, None);
    }
}
