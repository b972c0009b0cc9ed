//! What an installer's log tells: why it failed, and how far it is. Pure.

/// Lines that are quoted at most.
const QUOTED: usize = 3;

/// What follows from something else, or is no reason to fail.
const NOISE: [&str; 6] = [
    "ERROR: Installation has failed",
    "ERROR: An error occurred while performing the step",
    "ERROR: Failed to execute",
    "ERROR: The kernel module failed to build",
    "ERROR: Unable to build the",
    "ERROR: Failed to run",
];

/// What the compiler, the linker or the disk said, first of all, else the last thing that the installer itself says of it.
/// Empty when nothing tells.
pub fn causes(log: &str) -> Vec<String> {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let is_compilers = |line: &&&str| {
        [": error:", ": fatal error:", "internal compiler error", "undefined reference to"]
            .iter()
            .any(|sign| line.contains(sign))
            || line.starts_with("cc1: ")
    };
    let is_modposts = |line: &&&str| line.contains("modpost:") && !line.starts_with("WARNING");
    let is_disks = |line: &&&str| {
        ["No space left on device", "Cannot allocate memory", "Killed signal terminated program"]
            .iter()
            .any(|sign| line.contains(sign))
    };
    let is_installers =
        |line: &&&str| line.starts_with("ERROR: ") && !NOISE.iter().any(|noise| line.starts_with(noise));
    // What went wrong first is what the rest follows from.
    let first = |is: &dyn Fn(&&&str) -> bool| {
        let mut found: Vec<String> = Vec::new();
        for line in lines.iter().filter(is) {
            let line = without_folder(line);
            if found.len() < QUOTED && !found.contains(&line) {
                found.push(line);
            }
        }
        found
    };
    for is in [&is_disks as &dyn Fn(&&&str) -> bool, &is_compilers, &is_modposts] {
        let found = first(is);
        if !found.is_empty() {
            return found;
        }
    }
    lines.iter().rfind(is_installers).map(|line| (*line).to_string()).into_iter().collect()
}

/// Without where an installer unpacked itself: `nvidia/nv-pci.c:12:3: error: …`.
fn without_folder(line: &str) -> String {
    let (place, rest) = line.split_at(line.find(": ").unwrap_or(0));
    let folder = ["/kernel-open/", "/kernel/"].iter().find_map(|folder| Some(place.find(folder)? + folder.len()));
    folder.map_or_else(|| line.to_string(), |at| format!("{}{rest}", &place[at..]))
}

/// How many files of the modules are compiled, and the last; none while nothing is.
pub fn progress(log: &str) -> Option<String> {
    let compiled = || log.lines().filter_map(|line| line.trim_start().strip_prefix("CC [M] "));
    let last = compiled().next_back()?;
    let number = compiled().count();
    Some(format!("{number} files compiled, {}", last.trim().rsplit('/').next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_and_not_what_follows() {
        let compiler = "   CC [M]  /tmp/selfgz1/NVIDIA-Linux-x86_64-550.163.01/kernel-open/nvidia/nv-pci.o\n\
            \x20  /tmp/selfgz1/NVIDIA-Linux-x86_64-550.163.01/kernel-open/nvidia/nv-pci.c: In function 'nv_resize':\n\
            \x20  /tmp/selfgz1/NVIDIA-Linux-x86_64-550.163.01/kernel-open/nvidia/nv-pci.c:180:9: error: too few arguments to function 'pci_resize_resource'\n\
            \x20  make[3]: *** [scripts/Makefile.build:229: nvidia/nv-pci.o] Error 1\n\
            \x20  make: *** [Makefile:115: modules] Error 2\n-> Error.\n\
            ERROR: An error occurred while performing the step: \"Building kernel modules\". See /var/log/x for details.\n\
            ERROR: Installation has failed.  Please see the file '/var/log/x' for details.\n";
        assert_eq!(
            causes(compiler),
            ["nvidia/nv-pci.c:180:9: error: too few arguments to function 'pci_resize_resource'"]
        );
        let modpost = "ERROR: modpost: \"pci_x\" [/a/kernel/nvidia.ko] undefined!\nmake: *** Error 1\nERROR: Installation has failed. x\n";
        assert_eq!(causes(modpost), ["ERROR: modpost: \"pci_x\" [/a/kernel/nvidia.ko] undefined!"]);
        let header =
            "/a/kernel/nvidia/x.c:3:10: fatal error: linux/y.h: No such file or directory\ncompilation terminated.";
        assert_eq!(causes(header), ["nvidia/x.c:3:10: fatal error: linux/y.h: No such file or directory"]);
        let full =
            "ERROR: Unable to create 'x' for copying (No space left on device)\nERROR: Installation has failed. x";
        assert_eq!(causes(full), ["ERROR: Unable to create 'x' for copying (No space left on device)"]);
        let own = "ERROR: Failed to execute `systemctl daemon-reload`: x\nERROR: Unable to find the kernel source tree\nERROR: Installation has failed. x";
        assert_eq!(causes(own), ["ERROR: Unable to find the kernel source tree"]);
        assert!(causes("-> done\nmake: *** Error 1\n").is_empty());
        let many: String = (0..9).map(|number| format!("x.c:{number}: error: y\nx.c:{number}: error: y\n")).collect();
        assert_eq!(causes(&many), ["x.c:0: error: y", "x.c:1: error: y", "x.c:2: error: y"]);
    }

    #[test]
    fn how_far_it_is() {
        assert_eq!(progress("-> Building\n"), None);
        assert_eq!(
            progress("     CC [M]  a/nv.o\n  LD x\n   CC [M]  /tmp/x/nv-pci.o\n").as_deref(),
            Some("2 files compiled, nv-pci.o")
        );
    }
}
