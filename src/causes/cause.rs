//! What decides who has a card, and how it is taken out again.

use crate::modprobe;
use std::fmt;

/// After any of it was changed: the initramfs has copies.
pub const THEN: &str = "update-initramfs -u -k all, then reboot the host";

/// [`THEN`], below a list of causes.
pub fn when_fixed() -> String {
    format!("when that is fixed: {THEN}")
}

/// When none was found: Proxmox itself leaves a card so.
pub const NO_CAUSE: &str = "nothing that acts at boot explains that: a VM that ran without the hookscript leaves its card so, until the next boot";

/// What a cause does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The card is another driver's from the beginning.
    Takes,
    /// A module of the home driver is not loaded.
    KeepsAway,
    /// One that only a screen on the card needs is not.
    KeepsScreenAway,
    /// The kernel forgets the card.
    Removes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Stays the same from version to version.
    pub id: &'static str,
    pub effect: Effect,
    /// `/etc/modprobe.d/x.conf:3`
    pub place: String,
    /// What stands there.
    pub text: String,
    /// What it does, as the rest of a sentence that begins with it.
    pub does: String,
    /// What to type.
    pub remedy: String,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // Nobody's file commands a terminal.
        let text: String = self.text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        write!(f, "{}: {text} {}; to take it out: {}", self.place, self.does, self.remedy)
    }
}

/// As not having a module does.
pub fn keeps_away(module: &str) -> Effect {
    let module = modprobe::module(module);
    let is_screens = ["_drm", "_modeset"].iter().any(|end| module.ends_with(end));
    if is_screens { Effect::KeepsScreenAway } else { Effect::KeepsAway }
}

/// What not having a module means.
pub fn without(module: &str, when: &str) -> String {
    let module = modprobe::module(module);
    let what = match module.as_str() {
        name if name.ends_with("_uvm") => ", which CUDA in containers needs",
        name if name.ends_with("_drm") => ", which a screen on the card needs",
        name if name.ends_with("_modeset") => ", which nvidia_drm needs",
        _ => ", so that the card has no driver at home",
    };
    format!("keeps {module} from being loaded{when}{what}")
}

/// How a line is taken out of a file: the administrator's are commented out, a package's file is hidden by one in /etc.
pub fn take_out(path: &str, first: usize, last: usize) -> String {
    let is_packages = ["/usr/lib/", "/lib/", "/usr/share/"].iter().any(|folder| path.starts_with(folder));
    let folder = ["modprobe.d", "udev/rules.d"].into_iter().find(|folder| path.contains(&format!("/{folder}/")));
    match folder {
        Some(folder) if is_packages => {
            format!("ln -s /dev/null /etc/{folder}/{}", path.rsplit('/').next().unwrap_or_default())
        }
        _ if first == last => format!("sed -i '{first}s/^/# /' {path}"),
        _ => format!("sed -i '{first},{last}s/^/# /' {path}"),
    }
}

/// How a word of a line is replaced by what is to stay of it, which may be nothing. Not where it is a part of another:
/// `iommu=on` of `intel_iommu=on`.
pub fn replace(path: &str, line: usize, old: &str, new: &str) -> String {
    let escaped = old.replace('.', "\\.").replace('*', "\\*").replace('|', "\\|");
    let is_letter = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    let begin = if is_letter(old.chars().next()) { "\\<" } else { "" };
    let end = if is_letter(old.chars().next_back()) { "\\>" } else { "" };
    format!("sed -i '{line}s|{begin}{escaped}{end}|{new}|' {path}")
}
