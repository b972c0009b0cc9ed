//! Which version of the driver a running container has, by its libcuda. Seen from outside: nothing is run in it.

use crate::gpu::containers;
use crate::gpu::nvidia::Version;
use crate::sys::Kernel;
use std::time::Duration;

/// Where NVIDIA's installer puts its libraries, by distribution.
const FOLDERS: [&str; 3] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"];

/// For a link, unless the container mounted something there that does not answer.
const LOOK: Duration = Duration::from_secs(1);

/// None for one that does not run, has no driver, or does not answer.
pub fn driver(kernel: &dyn Kernel, ctid: u32) -> Option<String> {
    let init = containers::init(kernel, ctid)?;
    for folder in FOLDERS {
        let target = kernel.link_name_inside(init, &format!("{folder}/libcuda.so.1"), LOOK).ok()?;
        if let Some(version) = target.as_deref().and_then(version) {
            return Some(version.to_string());
        }
    }
    None
}

/// Whoever is root in there may have given the file any name.
fn version(name: &str) -> Option<&str> {
    let is_one = |version: &&str| {
        version.len() < 20 && version.contains('.') && !version.contains(|c: char| c != '.' && !c.is_ascii_digit())
    };
    let version = name.strip_prefix("libcuda.so.").filter(is_one)?;
    version.parse::<Version>().ok().map(|_| version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_the_name_of_the_library() {
        assert_eq!(version("libcuda.so.550.163.01"), Some("550.163.01"));
        assert_eq!(version("libcuda.so.570.26"), Some("570.26"));
        for name in [
            "libcuda.so.1",
            "libcuda.so",
            "libcudart.so.12.8",
            "libcuda.so.5.x",
            "libcuda.so.550.1.2.x",
            "libcuda.so.1.2.3.4.5.6.7.8.9.10",
        ] {
            assert_eq!(version(name), None, "{name}");
        }
    }
}
