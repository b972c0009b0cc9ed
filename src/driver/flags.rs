//! What an installer is told, so that it asks nothing. Pure.

use super::flavour::{Flavour, TWO_FLAVOURS, is_from};

/// Options that not every installer has, and the first version that has them: nvidia-installer's option_table.h, held
/// against its tags from 390.144 to 590.48.01. One that an installer does not know ends it at once.
const SINCE: &[(&str, &str)] = &[
    ("--kernel-module-build-directory", "470.42"),
    ("--no-kernel-modules", "515"),
    // Without it: dkms is not used by an installer that may not ask.
    ("--no-dkms", "520.56.06"),
    (SKIP_LOAD, "550.40.07"),
    ("--kernel-module-type", "555.42"),
];

/// Nothing is loaded when that is said; older installers try the modules on a GPU.
pub const SKIP_LOAD: &str = "--skip-module-load";

/// In all of them.
const ALWAYS: [&str; 4] = ["--silent", "--no-nouveau-check", "--no-x-check", "--no-check-for-alternate-installs"];

/// Whether an installer of this version knows an option.
pub fn has(version: &str, option: &str) -> bool {
    SINCE.iter().find(|(name, _)| *name == option).is_none_or(|(_, first)| is_from(version, first))
}

/// The first version that knows an option.
pub fn since(option: &str) -> &'static str {
    SINCE.iter().find(|(name, _)| *name == option).map_or("", |(_, first)| first)
}

/// What makes the modules ones that a kernel under Secure Boot takes: where dkms keeps its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub secret: &'static str,
    pub public: &'static str,
}

/// Only what a container can have.
pub fn container(version: &str) -> Vec<String> {
    let plural = "--no-kernel-modules";
    told(&[if has(version, plural) { plural } else { "--no-kernel-module" }])
}

/// All of it, for the running kernel. The modules are loaded by whoever called, when nobody is in the way.
pub fn host(version: &str, flavour: Option<Flavour>, dkms: bool, key: Option<&Key>) -> Vec<String> {
    let mut flags = told(dkms_flag(version, dkms));
    add_modules(&mut flags, version, flavour, key);
    flags
}

/// Only the modules, for a kernel that need not run.
pub fn kernel(version: &str, release: &str, flavour: Option<Flavour>, key: Option<&Key>) -> Vec<String> {
    let mut flags = told(&[dkms_flag(version, false), &["-K", "-k", release]].concat());
    add_modules(&mut flags, version, flavour, key);
    flags
}

fn dkms_flag(version: &str, dkms: bool) -> &'static [&'static str] {
    match dkms {
        true => &["--dkms"],
        false if has(version, "--no-dkms") => &["--no-dkms"],
        false => &[],
    }
}

fn told(more: &[&str]) -> Vec<String> {
    ALWAYS.iter().chain(more).map(|flag| (*flag).to_string()).collect()
}

fn add_modules(flags: &mut Vec<String>, version: &str, flavour: Option<Flavour>, key: Option<&Key>) {
    if has(version, SKIP_LOAD) {
        flags.push(SKIP_LOAD.to_string());
    }
    if let Some(flavour) = flavour.filter(|_| is_from(version, TWO_FLAVOURS)) {
        flags.push(match has(version, "--kernel-module-type") {
            true => format!("--kernel-module-type={}", flavour.name()),
            false => format!("--kernel-module-build-directory={}", flavour.folder()),
        });
    }
    if let Some(key) = key {
        flags.push(format!("--module-signing-secret-key={}", key.secret));
        flags.push(format!("--module-signing-public-key={}", key.public));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_for_no_modules_has_had_two_names() {
        let has = |version, flag: &str| container(version).iter().any(|one| one == flag);
        assert!(has("580.95.05", "--no-kernel-modules"));
        assert!(has("515.43.04", "--no-kernel-modules"));
        assert!(has("470.256.02", "--no-kernel-module"));
    }

    #[test]
    fn the_flags_that_an_installer_knows() {
        let always = "--silent --no-nouveau-check --no-x-check --no-check-for-alternate-installs";
        let key = Key { secret: "/a", public: "/b" };
        for (version, flavour, dkms, key, more) in [
            ("580.95.05", Some(Flavour::Open), false, None, "--no-dkms --skip-module-load --kernel-module-type=open"),
            ("580.95.05", None, true, None, "--dkms --skip-module-load"),
            (
                "550.90.07",
                Some(Flavour::Proprietary),
                false,
                None,
                "--no-dkms --skip-module-load --kernel-module-build-directory=kernel",
            ),
            ("535.183.01", Some(Flavour::Open), false, None, "--no-dkms --kernel-module-build-directory=kernel-open"),
            ("555.58.02", Some(Flavour::Open), false, None, "--no-dkms --skip-module-load --kernel-module-type=open"),
            ("545.29.06", Some(Flavour::Open), false, None, "--no-dkms --kernel-module-build-directory=kernel-open"),
            ("520.56.06", Some(Flavour::Open), false, None, "--no-dkms --kernel-module-build-directory=kernel-open"),
            ("515.105.01", Some(Flavour::Open), false, None, "--kernel-module-build-directory=kernel-open"),
            ("515.105.01", Some(Flavour::Open), true, None, "--dkms --kernel-module-build-directory=kernel-open"),
            ("510.108.03", None, false, None, ""),
            ("470.256.02", Some(Flavour::Proprietary), false, None, ""),
            ("470.256.02", None, true, None, "--dkms"),
            (
                "590.44.01",
                None,
                false,
                Some(&key),
                "--no-dkms --skip-module-load --module-signing-secret-key=/a --module-signing-public-key=/b",
            ),
        ] {
            assert_eq!(host(version, flavour, dkms, key).join(" "), format!("{always} {more}").trim_end(), "{version}");
        }
        assert_eq!(
            kernel("470.256.02", "6.1.0-1-amd64", None, None).join(" "),
            format!("{always} -K -k 6.1.0-1-amd64")
        );
        assert_eq!(
            kernel("580.95.05", "6.8.12-4-pve", Some(Flavour::Proprietary), None).join(" "),
            format!("{always} --no-dkms -K -k 6.8.12-4-pve --skip-module-load --kernel-module-type=proprietary")
        );
    }
}
