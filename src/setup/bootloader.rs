//! The kernel's command line, which only the bootloader can change: GRUB by a file of ours, systemd-boot as Proxmox uses
//! it by `/etc/kernel/cmdline`, which has to be edited in place. Edited only when asked for, and kept as it was before.

use super::ours::{LIMIT, MARK, Wish, own};
use crate::App;
use crate::exit::{Exit, Result};
use crate::sys::Kernel;
use serde_json::{Value, json};
use std::io::{self};

/// Read after /etc/default/grub by grub-mkconfig, as Debian patches it.
const GRUB_FILE: &str = "/etc/default/grub.d/gpu-handoff.cfg";
const GRUB_RESULT: &str = "/boot/grub/grub.cfg";
const UPDATE_GRUB: &str = "/usr/sbin/update-grub";

/// Its first line is the command line.
const CMDLINE: &str = "/etc/kernel/cmdline";
const BOOT_TOOL: &str = "/usr/sbin/proxmox-boot-tool";
/// There where proxmox-boot-tool keeps the boot partitions, with either loader.
const BOOT_UUIDS: &str = "/etc/kernel/proxmox-boot-uuids";
/// Which loader booted this system, in UTF-16 (systemd's Boot Loader Interface).
const LOADER_INFO: &str = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// What /etc/kernel/cmdline was, and what we made of it.
const KEPT: &str = "/var/lib/gpu-handoff/cmdline.json";
const SCHEMA: u64 = 1;

/// While the bootloader may not have what the file says.
const PENDING: &str = "/var/lib/gpu-handoff/bootloader-pending";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    Grub,
    SystemdBoot,
    Unknown,
}

#[derive(Debug)]
pub struct Bootloader {
    kind: Loader,
    /// proxmox-boot-tool carries changes to where it boots from.
    by_boot_tool: bool,
    /// What the kernel was booted with.
    booted: Vec<String>,
    is_intel: bool,
    /// Our file for GRUB.
    grub: Option<String>,
    cmdline: Option<String>,
    kept: Option<Kept>,
    is_pending: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Kept {
    before: String,
    after: String,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Edit {
    change: Option<Change>,
    /// The program that carries it to where the machine boots from.
    program: &'static str,
    arguments: &'static [&'static str],
    /// What must be in GRUB's own configuration afterwards.
    expected: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    WriteGrub(String),
    RemoveGrub,
    Edit(Kept),
    Restore(String),
}

impl Bootloader {
    /// # Errors
    /// When a file of ours is somebody else's, or cannot be read.
    pub fn read(kernel: &dyn Kernel) -> Result<Bootloader> {
        let info = kernel.read(LOADER_INFO).unwrap_or_default();
        let info: String = info.iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect();
        let kind = if info.contains("systemd-boot") && kernel.exists(CMDLINE) && kernel.exists(BOOT_UUIDS) {
            Loader::SystemdBoot
        } else if !info.contains("systemd-boot") && kernel.exists(UPDATE_GRUB) {
            Loader::Grub
        } else {
            Loader::Unknown
        };
        let cpus = kernel.text("/proc/cpuinfo").unwrap_or_default();
        let cmdline = match kernel.read(CMDLINE).map(String::from_utf8) {
            Ok(Ok(text)) => Some(text),
            _ => None,
        };
        Ok(Bootloader {
            kind,
            by_boot_tool: kernel.exists(BOOT_UUIDS),
            booted: words(&kernel.text("/proc/cmdline").unwrap_or_default()),
            is_intel: cpus.contains("GenuineIntel"),
            grub: own(kernel, GRUB_FILE)?,
            cmdline,
            kept: kernel.read(KEPT).ok().map(|bytes| Kept::parse(&bytes)).transpose()?,
            is_pending: kernel.exists(PENDING),
        })
    }

    /// What boots this host, as far as that is known.
    pub fn kind(&self) -> Loader {
        self.kind
    }

    /// On AMD the IOMMU is on by default; `pt` leaves the host's own devices untranslated.
    fn wanted(&self) -> Vec<&'static str> {
        if self.is_intel { vec!["intel_iommu=on", "iommu=pt"] } else { vec!["iommu=pt"] }
    }

    /// Whether the kernel was booted with all that is wanted.
    pub fn has_all(&self) -> bool {
        self.wanted().iter().all(|word| self.booted.iter().any(|booted| booted == word))
    }

    /// Pure.
    ///
    /// # Errors
    /// When it is not known how this machine boots.
    pub fn plan(&self, wish: Wish) -> Result<Option<Edit>> {
        let change = if wish.undo {
            self.undo()
        } else if wish.cmdline {
            self.change()?
        } else {
            None
        };
        if change.is_none() && !self.is_pending {
            return Ok(None);
        }
        let expected = match &change {
            Some(Change::WriteGrub(_)) if !self.by_boot_tool => self.missing(),
            _ => Vec::new(),
        };
        let (program, arguments): (_, &[&str]) =
            if self.by_boot_tool { (BOOT_TOOL, &["refresh"]) } else { (UPDATE_GRUB, &[]) };
        Ok(Some(Edit { change, program, arguments, expected }))
    }

    fn change(&self) -> Result<Option<Change>> {
        let missing = self.missing();
        match self.kind {
            Loader::Grub if missing.is_empty() => Ok(None),
            Loader::Grub => {
                let line =
                    format!("{MARK}GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {}\"\n", missing.join(" "));
                Ok((self.grub.as_ref() != Some(&line)).then_some(Change::WriteGrub(line)))
            }
            Loader::SystemdBoot => {
                let before = self.cmdline.clone().unwrap_or_default();
                let (first, rest) = before.split_once('\n').map_or((before.as_str(), None), |(a, b)| (a, Some(b)));
                let there = words(first);
                let missing: Vec<&str> =
                    self.wanted().into_iter().filter(|word| !there.iter().any(|other| other == word)).collect();
                if missing.is_empty() {
                    return Ok(None);
                }
                let rest = rest.map(|rest| format!("\n{rest}")).unwrap_or_default();
                let after = format!("{} {}{rest}", first.trim_end(), missing.join(" "));
                // Some of it may be ours already, from a time when less was wanted.
                let before = self.without_ours().unwrap_or(before);
                Ok(Some(Change::Edit(Kept { before, after })))
            }
            Loader::Unknown if self.has_all() => Ok(None),
            Loader::Unknown => Err(Exit::refused(format!(
                "nothing was changed: it is not known how this machine boots (neither GRUB nor Proxmox's systemd-boot was \
                 found); add to the kernel's command line yourself: {}",
                self.wanted().join(" ")
            ))),
        }
    }

    /// What nobody else put on the command line.
    fn missing(&self) -> Vec<String> {
        let ours = self.grub.as_deref().map(words_of_ours).unwrap_or_default();
        let is_others =
            |word: &&str| self.booted.iter().any(|other| other == word) && !ours.iter().any(|our| our == word);
        self.wanted().into_iter().filter(|word| !is_others(word)).map(str::to_string).collect()
    }

    fn undo(&self) -> Option<Change> {
        if self.grub.is_some() {
            return Some(Change::RemoveGrub);
        }
        self.without_ours().map(Change::Restore)
    }

    /// The command line of systemd-boot as it would be without us; none when nothing of ours is on it.
    fn without_ours(&self) -> Option<String> {
        let (kept, now) = (self.kept.as_ref()?, self.cmdline.as_ref()?);
        if *now == kept.after {
            return Some(kept.before.clone());
        }
        // Somebody went on from there: only our words go.
        let before = words(&kept.before);
        let ours: Vec<String> = words(&kept.after).into_iter().filter(|word| !before.contains(word)).collect();
        let (first, rest) = now.split_once('\n').unwrap_or((now, ""));
        let left: Vec<&str> = first.split(' ').filter(|word| !ours.iter().any(|our| our == word)).collect();
        Some(format!("{}\n{rest}", left.join(" ")))
    }
}

impl Kept {
    fn to_json(&self) -> String {
        json!({"schema": SCHEMA, "before": self.before, "after": self.after}).to_string()
    }

    fn parse(bytes: &[u8]) -> Result<Kept> {
        let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let text = |key: &str| Some(value.get(key)?.as_str()?.to_string());
        match (value.get("schema").and_then(Value::as_u64), text("before"), text("after")) {
            (Some(SCHEMA), Some(before), Some(after)) => Ok(Kept { before, after }),
            _ => Err(Exit::failed(format!("{KEPT} is not understood; a newer version may have written it"))),
        }
    }
}

impl Edit {
    pub fn to_text(&self) -> String {
        let run = format!("run       {} {}", self.program, self.arguments.join(" "));
        let what = match &self.change {
            Some(Change::WriteGrub(_)) => format!("write     {GRUB_FILE}\n"),
            Some(Change::RemoveGrub) => format!("remove    {GRUB_FILE}\n"),
            Some(Change::Edit(kept)) => {
                let (before, after) = (words(&kept.before), words(&kept.after));
                let new: Vec<&str> = after.iter().filter(|word| !before.contains(word)).map(String::as_str).collect();
                format!("edit      {CMDLINE}: add {}\n", new.join(" "))
            }
            Some(Change::Restore(_)) => format!("restore   {CMDLINE}\n"),
            None => String::new(),
        };
        format!("{what}{}", run.trim_end())
    }
}

/// # Errors
/// What could not be done. A command line that the bootloader does not take is taken back.
pub fn carry_out(app: &App, edit: &Edit) -> Result<()> {
    write(app, PENDING, "")?;
    match &edit.change {
        Some(Change::WriteGrub(text)) => write(app, GRUB_FILE, text)?,
        Some(Change::RemoveGrub) => remove(app, GRUB_FILE)?,
        Some(Change::Edit(kept)) => {
            // Before the file: whoever is killed in between can still undo it.
            write(app, KEPT, &kept.to_json())?;
            write(app, CMDLINE, &kept.after)?;
        }
        Some(Change::Restore(text)) => {
            write(app, CMDLINE, text)?;
            remove(app, KEPT)?;
        }
        None => {}
    }
    if let Err(why) = refresh(app, edit) {
        let taken_back = match &edit.change {
            Some(Change::WriteGrub(_)) => remove(app, GRUB_FILE).and_then(|()| run(app, edit)),
            Some(Change::Edit(kept)) => {
                write(app, CMDLINE, &kept.before).and_then(|()| remove(app, KEPT)).and_then(|()| run(app, edit))
            }
            _ => return Err(why),
        };
        let now = match taken_back {
            Ok(()) => "the kernel's command line is as it was".to_string(),
            Err(error) => format!("and taking it back failed too: {error}"),
        };
        if taken_back_is_done(app) {
            remove(app, PENDING)?;
        }
        return Err(Exit::failed(why.trouble.and(&now)));
    }
    remove(app, PENDING)
}

/// Nothing of ours is left that the bootloader would have to be told of.
fn taken_back_is_done(app: &App) -> bool {
    !app.kernel.exists(GRUB_FILE) && !app.kernel.exists(KEPT)
}

fn refresh(app: &App, edit: &Edit) -> Result<()> {
    run(app, edit)?;
    if edit.expected.is_empty() {
        return Ok(());
    }
    let result = app.kernel.text(GRUB_RESULT).unwrap_or_default();
    let is_kernel = |line: &&str| line.trim_start().starts_with("linux");
    let boots = |line: &str| edit.expected.iter().all(|word| line.split_whitespace().any(|other| other == word));
    if result.lines().filter(is_kernel).any(boots) {
        return Ok(());
    }
    Err(Exit::failed(format!("{} did not put {} into {GRUB_RESULT}", edit.program, edit.expected.join(" "))))
}

fn run(app: &App, edit: &Edit) -> Result<()> {
    let told = |error| Exit::failed(format!("{} {}: {error}", edit.program, edit.arguments.join(" ")));
    app.kernel.program(edit.program, edit.arguments, LIMIT).map(|_| ()).map_err(told)
}

fn write(app: &App, path: &str, text: &str) -> Result<()> {
    app.kernel.write_file(path, text.as_bytes(), 0o644).map_err(|error| failed(path, &error))
}

fn remove(app: &App, path: &str) -> Result<()> {
    app.kernel.remove_file(path).map_err(|error| failed(path, &error))
}

fn failed(path: &str, error: &io::Error) -> Exit {
    Exit::failed(format!("{path}: {error}"))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

/// What our file adds: `…="$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on iommu=pt"`.
fn words_of_ours(file: &str) -> Vec<String> {
    words(file.rsplit_once("$GRUB_CMDLINE_LINUX_DEFAULT").map_or("", |(_, rest)| rest.trim_end().trim_end_matches('"')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Wish = Wish { cmdline: true, undo: false, defer: false };
    const UNDO: Wish = Wish { cmdline: false, undo: true, defer: false };

    fn on(kind: Loader, booted: &str) -> Bootloader {
        Bootloader {
            kind,
            by_boot_tool: kind == Loader::SystemdBoot,
            booted: words(booted),
            is_intel: true,
            grub: None,
            cmdline: (kind == Loader::SystemdBoot).then(|| "root=ZFS=rpool boot=zfs\n".to_string()),
            kept: None,
            is_pending: false,
        }
    }

    #[test]
    fn grub_gets_a_file_of_ours() {
        let grub = on(Loader::Grub, "root=/dev/sda quiet");
        assert_eq!(grub.plan(Wish { cmdline: false, undo: false, defer: false }), Ok(None));
        let edit = grub.plan(ASKED).unwrap().unwrap();
        let Some(Change::WriteGrub(text)) = edit.change else { panic!("{edit:?}") };
        assert!(
            text.ends_with("\nGRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on iommu=pt\"\n")
        );
        assert_eq!(edit.expected, ["intel_iommu=on", "iommu=pt"]);
        assert_eq!(words_of_ours(&text), ["intel_iommu=on", "iommu=pt"]);
        // Booted with it or not: the file is as it should be.
        for booted in ["root=/dev/sda", "root=/dev/sda intel_iommu=on iommu=pt"] {
            let there = Bootloader { grub: Some(text.clone()), ..on(Loader::Grub, booted) };
            assert_eq!(there.plan(ASKED), Ok(None), "{booted}");
            assert_eq!(there.plan(UNDO).unwrap().unwrap().change, Some(Change::RemoveGrub));
        }
        // What the administrator wrote is not written again.
        let partly = on(Loader::Grub, "root=/dev/sda intel_iommu=on");
        assert_eq!(partly.plan(ASKED).unwrap().unwrap().expected, ["iommu=pt"]);
        assert_eq!(on(Loader::Grub, "iommu=pt intel_iommu=on").plan(ASKED), Ok(None));
        assert_eq!(grub.plan(UNDO), Ok(None));
    }

    #[test]
    fn the_one_line_of_systemd_boot_is_kept_as_it_was() {
        let loader = on(Loader::SystemdBoot, "");
        let edit = loader.plan(ASKED).unwrap().unwrap();
        assert_eq!((edit.program, edit.arguments), (BOOT_TOOL, &["refresh"][..]));
        let Some(Change::Edit(kept)) = edit.change else { panic!("{edit:?}") };
        assert_eq!(kept.after, "root=ZFS=rpool boot=zfs intel_iommu=on iommu=pt\n");
        assert_eq!(Kept::parse(kept.to_json().as_bytes()), Ok(kept.clone()));
        let edited = |now: &str| Bootloader {
            cmdline: Some(now.to_string()),
            kept: Some(kept.clone()),
            ..on(Loader::SystemdBoot, "")
        };
        assert_eq!(edited(&kept.after).plan(ASKED), Ok(None));
        let back = edited(&kept.after).plan(UNDO).unwrap().unwrap();
        assert_eq!(back.change, Some(Change::Restore(kept.before.clone())));
        let later = edited("root=ZFS=rpool boot=zfs intel_iommu=on iommu=pt quiet\n").plan(UNDO).unwrap().unwrap();
        assert_eq!(later.change, Some(Change::Restore("root=ZFS=rpool boot=zfs quiet\n".to_string())));
    }

    #[test]
    fn what_is_not_known_is_left_to_the_administrator() {
        let refused = on(Loader::Unknown, "").plan(ASKED).unwrap_err();
        assert!(refused.to_string().ends_with(": intel_iommu=on iommu=pt"), "{refused}");
        assert_eq!(on(Loader::Unknown, "intel_iommu=on iommu=pt").plan(ASKED), Ok(None));
        assert_eq!(on(Loader::Unknown, "").plan(UNDO), Ok(None));
        let amd = Bootloader { is_intel: false, ..on(Loader::Grub, "") };
        assert_eq!(amd.plan(ASKED).unwrap().unwrap().expected, ["iommu=pt"]);
    }

    #[test]
    fn what_was_killed_half_way_is_finished() {
        let killed = Bootloader { is_pending: true, ..on(Loader::Grub, "") };
        let edit = killed.plan(UNDO).unwrap().unwrap();
        assert_eq!((edit.change, edit.program), (None, UPDATE_GRUB));
    }
}
