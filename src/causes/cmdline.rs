//! On the kernel's command line: as it was booted with, and in the files that it comes from.

use super::cause::{Cause, Effect, keeps_away, replace, without};
use super::facts::{Facts, Function, Words};
use super::ids::{addresses, is_keeper, split_ids};
use crate::modprobe::{files, module};
use crate::sys::Kernel;

pub const BOOTED: &str = "/proc/cmdline";

const GRUB: &str = "/etc/default/grub";
const GRUB_DIRECTORY: &str = "/etc/default/grub.d";
const UPDATE_GRUB: &str = "update-grub";

/// Of systemd-boot as Proxmox uses it.
const CMDLINE: &str = "/etc/kernel/cmdline";
const BOOT_TOOL: &str = "proxmox-boot-tool refresh";

/// Of systemd-boot as systemd has it.
const ENTRIES: [&str; 4] =
    ["/boot/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries", "/loader/entries"];

pub fn read(kernel: &dyn Kernel) -> Vec<Words> {
    let mut found = vec![words(BOOTED, 1, &kernel.text(BOOTED).unwrap_or_default(), None)];
    let mut add = |path: &str, then, is_meant: &dyn Fn(&str) -> Option<String>| {
        let text = kernel.text(path).unwrap_or_default();
        found.extend(
            text.lines().enumerate().filter_map(|(at, line)| Some(words(path, at + 1, &is_meant(line)?, Some(then)))),
        );
    };
    let by_boot_tool = kernel.exists("/etc/kernel/proxmox-boot-uuids");
    let then = if by_boot_tool { BOOT_TOOL } else { UPDATE_GRUB };
    add(GRUB, then, &grub);
    for path in files(kernel, &[GRUB_DIRECTORY], &[".cfg"]) {
        add(&path, then, &grub);
    }
    add(CMDLINE, BOOT_TOOL, &|line| Some(line.to_string()));
    for directory in ENTRIES {
        for path in files(kernel, &[directory], &[".conf"]) {
            add(&path, "true", &|line| Some(line.trim_start().strip_prefix("options")?.to_string()));
        }
    }
    found
}

/// What a line of GRUB's configuration adds: `GRUB_CMDLINE_LINUX_DEFAULT="quiet …"`.
fn grub(line: &str) -> Option<String> {
    let (name, value) = line.trim_start().split_once('=')?;
    name.starts_with("GRUB_CMDLINE_LINUX").then(|| value.to_string())
}

fn words(path: &str, line: usize, text: &str, then: Option<&'static str>) -> Words {
    let split = text.split(|c: char| c.is_whitespace() || c == '"' || c == '\'').filter(|word| !word.is_empty());
    Words { path: path.to_string(), line, words: split.map(str::to_string).collect(), then }
}

pub fn find(facts: &Facts) -> Vec<Cause> {
    let mut found = Vec::new();
    let (booted, files) =
        facts.command_lines.split_first().map_or((&[][..], &[][..]), |(first, rest)| (&first.words[..], rest));
    // Where a word comes from is where it can be taken out.
    let mut explained = Vec::new();
    for line in files {
        for word in &line.words {
            let Some(meaning) = meaning(facts, word) else { continue };
            let is_booted = booted.contains(word);
            if is_booted {
                explained.push(word);
            }
            let place = format!("{}:{}", line.path, line.line);
            let then = line.then.filter(|then| *then != "true").map_or_else(String::new, |then| format!(" && {then}"));
            let remedy = format!("{}{then}", replace(&line.path, line.line, word, &meaning.rest));
            let when = if is_booted { "" } else { " from the next boot on" };
            found.push(meaning.cause(place, word, when, remedy));
        }
    }
    for word in booted.iter().filter(|word| !explained.contains(word)) {
        if let Some(meaning) = meaning(facts, word) {
            let remedy = by_hand(&meaning.rest);
            found.push(meaning.cause(BOOTED.to_string(), word, "", remedy));
        }
    }
    found
}

/// What to do about a word of which it is not known where it comes from, so that only this is left of it.
pub fn by_hand(rest: &str) -> String {
    let what = if rest.is_empty() { "leave it out of".to_string() } else { format!("leave only {rest} of it in") };
    format!(
        "{what} what the boot loader has as the kernel's command line (GRUB: {GRUB}, then {UPDATE_GRUB}; systemd-boot: \
         {CMDLINE}, then {BOOT_TOOL})"
    )
}

struct Meaning {
    id: &'static str,
    effect: Effect,
    does: String,
    /// What is to stay of the word.
    rest: String,
}

impl Meaning {
    fn cause(&self, place: String, word: &str, when: &str, remedy: String) -> Cause {
        let does = format!("{}{when}", self.does);
        Cause { id: self.id, effect: self.effect, place, text: word.to_string(), does, remedy }
    }
}

fn meaning(facts: &Facts, word: &str) -> Option<Meaning> {
    let (key, value) = word.split_once('=')?;
    let rest_of = |rest: String| if rest.is_empty() { rest } else { format!("{key}={rest}") };
    match module(key).as_str() {
        "modprobe.blacklist" | "module_blacklist" | "rd.driver.blacklist" | "rdblacklist" => {
            let (blocked, rest): (Vec<&str>, Vec<&str>) = value.split(',').partition(|name| facts.needs(name));
            // Of all of it the driver itself matters most.
            let most = blocked.iter().min_by_key(|name| name.len())?;
            let does = without(most, if key.starts_with("rd") { " in the initramfs" } else { "" });
            Some(Meaning { id: "blacklist", effect: keeps_away(most), does, rest: rest_of(rest.join(",")) })
        }
        key => {
            let (keeper, parameter) = key.split_once('.')?;
            if !is_keeper(keeper) || !matches!(parameter, "ids" | "hide") {
                return None;
            }
            if parameter == "hide" {
                // (01:00.0)(0000:01:00.1)
                let is_named = |one: &&Function| one.short().is_some_and(|address| value.contains(&address));
                let taken: Vec<_> = facts.functions.iter().filter(is_named).collect();
                let does = format!("gives {} to {keeper} at boot", addresses(&taken));
                return (!taken.is_empty()).then(|| Meaning {
                    id: "static-ids",
                    effect: Effect::Takes,
                    does,
                    rest: String::new(),
                });
            }
            let (taken, rest) = split_ids(value, &facts.functions);
            let does = format!("gives {} to {} at boot", addresses(&taken), keeper.replace('_', "-"));
            (!taken.is_empty()).then(|| Meaning { id: "static-ids", effect: Effect::Takes, does, rest: rest_of(rest) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    fn found(lines: &[(&str, &str)]) -> Vec<Cause> {
        let then = |path: &str| (path != BOOTED).then_some(UPDATE_GRUB);
        let command_lines = lines.iter().map(|(path, text)| words(path, 1, text, then(path))).collect();
        find(&Facts { command_lines, ..facts() })
    }

    #[test]
    fn words_that_keep_away_or_take() {
        for (word, id) in [
            ("modprobe.blacklist=nouveau,nvidiafb,nvidia", "blacklist"),
            ("module_blacklist=nvidia_drm", "blacklist"),
            ("module-blacklist=nvidia-uvm", "blacklist"),
            ("rd.driver.blacklist=nvidia", "blacklist"),
            ("vfio-pci.ids=10de:2684,10de:22ba", "static-ids"),
            ("vfio_pci.ids=10de:ffffffff:ffffffff:ffffffff:00030000:ffff00ff", "static-ids"),
            ("pci-stub.ids=10de:2684", "static-ids"),
            ("xen-pciback.hide=(01:00.0)", "static-ids"),
        ] {
            let causes = found(&[(BOOTED, &format!("root=/dev/sda {word} quiet"))]);
            assert_eq!(causes.iter().map(|one| (one.id, one.text.as_str())).collect::<Vec<_>>(), [(id, word)]);
        }
        for word in [
            "modprobe.blacklist=nouveau,nvidiafb",
            "vfio-pci.ids=8086:1572",
            "nvidia-drm.modeset=1",
            "quiet",
            "vfio-pci.disable_vga=1",
        ] {
            assert!(found(&[(BOOTED, word)]).is_empty(), "{word}");
        }
    }

    #[test]
    fn it_is_told_where_a_word_comes_from_and_only_there() {
        let word = "modprobe.blacklist=nouveau,nvidia";
        let causes = found(&[(BOOTED, word), (GRUB, word), ("/etc/default/grub.d/x.cfg", "vfio-pci.ids=10de:2684")]);
        assert_eq!(causes.len(), 2);
        assert_eq!(causes[0].place, "/etc/default/grub:1");
        assert_eq!(
            causes[0].remedy,
            "sed -i '1s|\\<modprobe\\.blacklist=nouveau,nvidia\\>|modprobe.blacklist=nouveau|' /etc/default/grub && update-grub"
        );
        assert!(causes[1].does.ends_with("from the next boot on"), "{}", causes[1].does);
        assert_eq!(
            causes[1].remedy,
            "sed -i '1s|\\<vfio-pci\\.ids=10de:2684\\>||' /etc/default/grub.d/x.cfg && update-grub"
        );
        assert_eq!(grub("# GRUB_CMDLINE_LINUX=x"), None);
        assert_eq!(grub("GRUB_CMDLINE_LINUX=\"x y\"").as_deref(), Some("\"x y\""));
    }
}
