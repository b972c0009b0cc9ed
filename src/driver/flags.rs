//! What an installer is told, so that it asks nothing. Pure. The options are those of nvidia-installer's option_table.h,
//! versions 470 to 590.

use super::kind::Kind;
use crate::gpu::nvidia::Version;

/// From 515 on an installer has modules in the plural, and two kinds of them.
pub const TWO_KINDS: &str = "515.0";
/// The kind has an option of its own, until then it is the folder with its sources.
pub const KIND: &str = "560.0";
/// Nothing is loaded when that is said.
pub const SKIP_LOAD: &str = "550.0";

const ALWAYS: [&str; 4] = ["--silent", "--no-nouveau-check", "--no-x-check", "--no-check-for-alternate-installs"];

/// What makes the modules ones that a kernel under Secure Boot takes: where dkms keeps its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub secret: &'static str,
    pub public: &'static str,
}

/// Only what a container can have.
pub fn container(version: &str) -> Vec<String> {
    let modules = if is_from(version, TWO_KINDS) { "--no-kernel-modules" } else { "--no-kernel-module" };
    told(&[modules])
}

/// All of it, for the running kernel. The modules are loaded by whoever called, when nobody is in the way.
pub fn host(version: &str, kind: Option<Kind>, dkms: bool, key: Option<&Key>) -> Vec<String> {
    let mut flags = told(&[if dkms { "--dkms" } else { "--no-dkms" }]);
    add_modules(&mut flags, version, kind, key);
    flags
}

/// Only the modules, for a kernel that need not run.
pub fn kernel(version: &str, release: &str, kind: Option<Kind>, key: Option<&Key>) -> Vec<String> {
    let mut flags = told(&["--no-dkms", "-K", "-k", release]);
    add_modules(&mut flags, version, kind, key);
    flags
}

fn told(more: &[&str]) -> Vec<String> {
    ALWAYS.iter().chain(more).map(|flag| (*flag).to_string()).collect()
}

fn add_modules(flags: &mut Vec<String>, version: &str, kind: Option<Kind>, key: Option<&Key>) {
    if is_from(version, SKIP_LOAD) {
        flags.push("--skip-module-load".to_string());
    }
    if let Some(kind) = kind
        && is_from(version, TWO_KINDS)
    {
        flags.push(if is_from(version, KIND) {
            format!("--kernel-module-type={}", kind.name())
        } else {
            format!("--kernel-module-build-directory={}", kind.folder())
        });
    }
    if let Some(key) = key {
        flags.push(format!("--module-signing-secret-key={}", key.secret));
        flags.push(format!("--module-signing-public-key={}", key.public));
    }
}

pub fn is_from(version: &str, first: &str) -> bool {
    version.parse::<Version>().ok() >= first.parse().ok()
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
        for (version, kind, dkms, key, more) in [
            ("580.95.05", Some(Kind::Open), false, None, "--no-dkms --skip-module-load --kernel-module-type=open"),
            ("580.95.05", None, true, None, "--dkms --skip-module-load"),
            (
                "550.90.07",
                Some(Kind::Proprietary),
                false,
                None,
                "--no-dkms --skip-module-load --kernel-module-build-directory=kernel",
            ),
            ("535.183.01", Some(Kind::Open), false, None, "--no-dkms --kernel-module-build-directory=kernel-open"),
            ("470.256.02", Some(Kind::Proprietary), false, None, "--no-dkms"),
            (
                "590.44.01",
                None,
                false,
                Some(&key),
                "--no-dkms --skip-module-load --module-signing-secret-key=/a --module-signing-public-key=/b",
            ),
        ] {
            assert_eq!(host(version, kind, dkms, key).join(" "), format!("{always} {more}"));
        }
        assert_eq!(
            kernel("580.95.05", "6.8.12-4-pve", Some(Kind::Proprietary), None).join(" "),
            format!("{always} --no-dkms -K -k 6.8.12-4-pve --skip-module-load --kernel-module-type=proprietary")
        );
    }
}
