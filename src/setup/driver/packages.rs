//! Packages of the distribution: those that hold another NVIDIA driver, and those that an installer needs. Pure.

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
}
