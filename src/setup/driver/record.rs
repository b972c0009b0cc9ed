//! The driver that was set up by this program: `/var/lib/gpu-handoff/driver.json`. Without it there is nothing to build for
//! a new kernel, and nothing to take back.

use crate::driver::flavour::Flavour;
use crate::gpu::nvidia::Version;
use crate::json::put;
use crate::setup::kept::document;
use crate::sys::Kernel;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Held by an installer while it runs, also when the run that started it is gone.
pub const LOCK: &str = "/run/gpu-handoff/driver.lock";

pub const PATH: &str = "/var/lib/gpu-handoff/driver.json";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Installation {
    pub installed: Option<Installed>,
    /// This version was about to be installed, and whether it is, is not known.
    pub began: Option<String>,
    /// Versions whose installer is in the cache because this program put it there.
    pub copies: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    pub version: String,
    /// Of the installer.
    pub sha256: String,
    pub flavour: Option<Flavour>,
    pub dkms: bool,
    /// Kernels that its modules were built for.
    pub kernels: Vec<String>,
}

/// # Errors
/// Names the file when it cannot be read or understood.
pub fn read(kernel: &dyn Kernel) -> Result<Option<Installation>> {
    document::read(kernel, PATH)?.map(|value| Installation::from_json(&value).context(PATH)).transpose()
}

/// # Errors
/// Names the file that could not be written.
pub fn write(linux: &dyn Kernel, record: &Installation) -> Result<()> {
    document::write(linux, PATH, record.to_json())
}

/// # Errors
/// Names the file that could not be removed.
pub fn remove(linux: &dyn Kernel) -> Result<()> {
    document::remove(linux, PATH)
}

impl Installation {
    pub fn to_json(&self) -> Value {
        let mut value = json!({"version": null, "began": self.began, "copies": self.copies});
        if let Some(installed) = &self.installed {
            put(&mut value, "version", installed.version.clone());
            put(&mut value, "sha256", installed.sha256.clone());
            put(&mut value, "module", installed.flavour.map(Flavour::name));
            put(&mut value, "dkms", installed.dkms);
            put(&mut value, "kernels", installed.kernels.clone());
        }
        value
    }

    /// # Errors
    /// Names the key that is wrong.
    pub fn from_json(value: &Value) -> Result<Installation> {
        let installed = match document::string(value, "version")? {
            None => None,
            Some(version) => Some(Installed {
                version,
                sha256: document::string(value, "sha256")?.context("sha256: not a string")?,
                flavour: match document::string(value, "module")? {
                    None => None,
                    Some(name) => match Flavour::from_name(&name) {
                        None => bail!("module: neither open nor proprietary"),
                        flavour => flavour,
                    },
                },
                dkms: value.get("dkms").and_then(Value::as_bool).context("dkms: not a flag")?,
                kernels: document::strings(value, "kernels")?,
            }),
        };
        let (began, copies) = (document::string(value, "began")?, document::strings(value, "copies")?);
        let record = Installation { installed, began, copies };
        record.check()?;
        Ok(record)
    }

    /// All of these become parts of paths.
    fn check(&self) -> Result<()> {
        let versions = self.installed.iter().map(|one| &one.version).chain(&self.began).chain(&self.copies);
        for version in versions {
            let is_plain = version.bytes().all(|b| b.is_ascii_digit() || b == b'.');
            if !is_plain || version.parse::<Version>().is_err() {
                bail!("{version:?} is no version");
            }
        }
        match self.installed.iter().flat_map(|one| &one.kernels).find(|release| !is_release(release)) {
            Some(release) => bail!("kernels: {release:?} is no kernel"),
            None => Ok(()),
        }
    }
}

/// As it may stand below /lib/modules.
pub fn is_release(release: &str) -> bool {
    let is_word = release.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-_~".contains(&b));
    is_word && !release.is_empty() && !release.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let full = Installation {
            installed: Some(Installed {
                version: "580.95.05".to_string(),
                sha256: "00".repeat(32),
                flavour: Some(Flavour::Open),
                dkms: false,
                kernels: vec!["6.8.12-4-pve".to_string()],
            }),
            began: Some("590.44.01".to_string()),
            copies: vec!["580.95.05".to_string()],
        };
        let first = Installation { began: Some("580.95.05".to_string()), ..Installation::default() };
        for record in [full, first, Installation::default()] {
            assert_eq!(Installation::from_json(&record.to_json()).unwrap(), record);
        }
        for wrong in [
            json!({"version": 1}),
            json!({"version": "1.2"}),
            json!({"copies": 3}),
            json!({"copies": [3]}),
            json!({"copies": ["1.2/../x"]}),
        ] {
            assert!(Installation::from_json(&wrong).is_err(), "{wrong}");
        }
    }
}
