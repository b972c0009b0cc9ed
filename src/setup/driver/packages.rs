//! Packages of the distribution: those that hold another NVIDIA driver, and those that an installer needs. Pure.

use crate::trouble::Trouble;

/// Names, or beginnings of names that end in `*`: NVIDIA's driver as Debian, Ubuntu and NVIDIA's own repository cut it up.
const DRIVER: &[&str] = &[
    "cuda-drivers*",
    "firmware-nvidia-gsp*",
    "firmware-nvidia-tesla*",
    "libcuda1*",
    "libcudadebugger1",
    "libegl-nvidia*",
    "libegl1-nvidia*",
    "libgl1-nvidia*",
    "libgles-nvidia*",
    "libglx-nvidia*",
    "libnvcuvid1",
    "libnvidia-*",
    "libnvoptix1",
    "linux-modules-nvidia-*",
    "linux-objects-nvidia-*",
    "nvidia-alternative*",
    "nvidia-compute-utils*",
    "nvidia-dkms*",
    "nvidia-driver*",
    "nvidia-egl-*",
    "nvidia-firmware*",
    "nvidia-headless*",
    "nvidia-kernel-*",
    "nvidia-legacy-*",
    "nvidia-modprobe",
    "nvidia-open*",
    "nvidia-opencl-*",
    "nvidia-persistenced",
    "nvidia-powerd",
    "nvidia-settings",
    "nvidia-smi",
    "nvidia-suspend-common",
    "nvidia-tesla*",
    "nvidia-utils*",
    "nvidia-vdpau-driver",
    "nvidia-vgpu-*",
    "nvidia-vulkan-*",
    "xserver-xorg-video-nvidia*",
];

/// For containers of another kind, and not of the driver.
const OTHERS: &[&str] = &["libnvidia-container*", "libnvidia-egl-wayland*", "libnvidia-egl-gbm*", "libnvidia-ml-dev*"];

/// Of what `dpkg-query -W -f '${Package} ${db:Status-Status}\n'` says, those that hold a driver: such as are installed
/// in part or whole, and such as left only their configuration.
pub fn drivers(said: &str) -> (Vec<String>, Vec<String>) {
    let mut found = (Vec::new(), Vec::new());
    for (name, state) in said.lines().filter_map(|line| line.split_once(' ')) {
        if is_driver(name) {
            match state.trim() {
                "not-installed" => {}
                "config-files" => found.1.push(name.to_string()),
                _ => found.0.push(name.to_string()),
            }
        }
    }
    found
}

fn is_driver(name: &str) -> bool {
    let is_among = |patterns: &[&str]| {
        patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == *pattern,
        })
    };
    is_among(DRIVER) && !is_among(OTHERS)
}

/// The package with a kernel's headers: Proxmox's kernels have their own.
pub fn headers(release: &str) -> String {
    let family = if release.ends_with("-pve") { "proxmox-headers" } else { "linux-headers" };
    format!("{family}-{release}")
}

/// The packages of libglvnd that an installer calls essential (its library_is_optional names the one that is not), each
/// with a library of it.
const LIBGLVND: [(&str, &str); 4] = [
    ("libglvnd0", "libGLdispatch.so.0"),
    ("libgl1", "libGL.so.1"),
    ("libglx0", "libGLX.so.0"),
    ("libegl1", "libEGL.so.1"),
];

/// Those that are missing where others are there: an installer finds that out when the old driver is gone, and gives up.
/// None of them is fine, it brings its own. `said` as for [`drivers`].
pub fn missing_libglvnd(said: &str, libraries: &[String]) -> Vec<String> {
    let is_installed = |name: &str| said.lines().any(|line| line == format!("{name} installed"));
    let is_there = |file: &str| libraries.iter().any(|library| library == file);
    let by_package = LIBGLVND.iter().any(|(name, _)| is_installed(name));
    let has = |(name, file): &(&str, &str)| if by_package { is_installed(name) } else { is_there(file) };
    if !LIBGLVND.iter().any(has) {
        return Vec::new();
    }
    LIBGLVND.iter().filter(|one| !has(one)).map(|(name, _)| (*name).to_string()).collect()
}

/// The series of Proxmox's kernels whose headers are kept up to date: `6.14` of `proxmox-headers-6.14`.
pub fn header_series(said: &str) -> Vec<String> {
    let installed = said.lines().filter_map(|line| line.strip_suffix(" installed"));
    let series = installed
        .filter_map(|name| name.strip_prefix("proxmox-headers-").or_else(|| name.strip_prefix("pve-headers-")));
    series.filter(|series| series.bytes().all(|b| b.is_ascii_digit() || b == b'.')).map(str::to_string).collect()
}

/// When the headers follow another series than the kernel that runs: the next kernel would have none, and no driver.
pub fn other_series(release: &str, series: &[String]) -> Option<Trouble> {
    let mut numbers = release.strip_suffix("-pve")?.split(['.', '-']);
    let running = format!("{}.{}", numbers.next()?, numbers.next()?);
    let is_followed = series.is_empty() || series.contains(&running);
    (!is_followed).then(|| {
        let what = format!(
            "the packages with kernel headers follow {}, and kernel {release} runs: its next update would come without \
             headers, and so without a driver",
            series.join(" and ")
        );
        Trouble::new(what, format!("apt-get install proxmox-headers-{running}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_driver_and_what_is_not() {
        let said = "libc6 installed\nnvidia-driver installed\nlibcuda1 half-configured\nnvidia-smi not-installed\n\
                    nvidia-kernel-dkms config-files\nnvidia-container-toolkit installed\nlibnvidia-container1 installed\n\
                    libnvidia-ml1 unpacked\nfirmware-nvidia-graphics installed\ncuda-toolkit-12-8 installed\n";
        let (there, left) = drivers(said);
        assert_eq!(there, ["nvidia-driver", "libcuda1", "libnvidia-ml1"]);
        assert_eq!(left, ["nvidia-kernel-dkms"]);
    }

    #[test]
    fn headers_of_either_family() {
        assert_eq!(headers("6.8.12-4-pve"), "proxmox-headers-6.8.12-4-pve");
        assert_eq!(headers("6.12.43+deb13-amd64"), "linux-headers-6.12.43+deb13-amd64");
    }

    #[test]
    fn libglvnd_is_there_whole_or_not_at_all() {
        let files = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let all = files(&["libGL.so.1", "libGLX.so.0", "libEGL.so.1", "libGLdispatch.so.0", "libc.so.6"]);
        assert!(missing_libglvnd("", &[]).is_empty() && missing_libglvnd("", &all).is_empty());
        assert_eq!(missing_libglvnd("", &files(&["libGL.so.1", "libGLX.so.0", "libGLdispatch.so.0"])), ["libegl1"]);
        // Files of an installer that came before: it takes them with it.
        assert_eq!(
            missing_libglvnd("libglvnd0 installed\nlibegl1 config-files\n", &all),
            ["libgl1", "libglx0", "libegl1"]
        );
        assert!(missing_libglvnd("libglvnd0 not-installed\n", &all).is_empty());
        assert_eq!(missing_libglvnd("", &files(&["libOpenGL.so.0"])), Vec::<String>::new());
    }

    #[test]
    fn headers_of_the_series_that_runs() {
        let said = "proxmox-headers-6.8 installed\nproxmox-headers-6.8.12-4-pve installed\nproxmox-headers-6.14 config-files\n";
        assert_eq!(header_series(said), ["6.8"]);
        let told = other_series("6.14.11-4-pve", &header_series(said)).unwrap().to_string();
        assert!(told.ends_with("apt-get install proxmox-headers-6.14"), "{told}");
        assert_eq!(other_series("6.8.12-4-pve", &header_series(said)), None);
        assert_eq!(other_series("6.14.11-4-pve", &[]), None);
        assert_eq!(other_series("6.12.48+deb13-amd64", &header_series(said)), None);
    }
}
