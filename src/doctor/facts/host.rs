//! How the host boots, what modprobe and the kernel were told, and what the kernel's log has of the cards.

use crate::App;
use crate::address::Address;
use crate::causes::{self, Cause, Words};
use crate::config::Config;
use crate::gpu::Slot;
use crate::handoff::plan::facts::{Availability, vfio_pci};
use crate::handoff::way::elsewhere::{self, Elsewhere};
use crate::modprobe::{self, DIRECTORIES, Line, logical_lines};
use crate::setup::bootloader::{Bootloader, Loader};
use crate::setup::{conflicts, vfio};
use crate::sys::Kernel;
use crate::trouble::Trouble;
use std::time::{Duration, SystemTime};

pub struct Host {
    pub release: String,
    /// Those that have modules.
    pub kernels: Vec<String>,
    pub loader: Loader,
    /// What the kernel was booted with comes first.
    pub command_lines: Vec<Words>,
    pub causes: Vec<Cause>,
    pub elsewhere: Vec<Elsewhere>,
    /// Of all of modprobe's files, ours included.
    pub directives: Vec<Line>,
    /// `/etc/modules` and the like, a module a line: path, line and name.
    pub modules: Vec<(String, usize, String)>,
    /// Lines of files that modprobe does not read.
    pub unread: Vec<Line>,
    /// A file that hides a package's of the same name, and the package's.
    pub hidden: Vec<(String, String)>,
    pub renamed: Option<(String, Trouble)>,
    /// Why no device is in an IOMMU group, and what to do; none when some are.
    pub iommu: Option<Trouble>,
    pub vfio: Availability,
    /// The initramfs of this kernel, and the newest file that it has a copy of, where that is newer.
    pub initramfs: Option<(String, String)>,
    pub initramfs_pending: bool,
    /// Of this boot, as far as it is about cards, their driver or vfio.
    pub log: Vec<String>,
    /// The firmware's framebuffer lies in this card's memory.
    pub screen: Option<Address>,
}

impl Host {
    /// `is_whole`: with the kernel's log, which a program has to be asked for.
    pub fn read(app: &App, config: &Config, slots: &[Slot], is_whole: bool) -> Host {
        let kernel = app.kernel;
        let facts = causes::Facts::read(kernel, config);
        let causes = facts.causes();
        let release = kernel.text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let bootloader = Bootloader::read(kernel).ok();
        let groups = kernel.list("/sys/kernel/iommu_groups");
        let iommu = bootloader.as_ref().filter(|_| groups.is_empty() && !slots.is_empty());
        Host {
            loader: bootloader.as_ref().map_or(Loader::Unknown, Bootloader::kind),
            iommu: iommu.and_then(|bootloader| vfio::iommu(kernel, bootloader, vfio::Wish::default())),
            command_lines: facts.command_lines,
            elsewhere: elsewhere::find(kernel, &app.store, config, !causes.is_empty()),
            causes,
            directives: modprobe::read(kernel),
            modules: modules(kernel),
            unread: unread(kernel),
            hidden: hidden(kernel),
            renamed: conflicts::renamed(kernel),
            vfio: vfio_pci(kernel),
            kernels: kernel.list("/lib/modules"),
            initramfs: initramfs(app, &release),
            initramfs_pending: kernel.exists(vfio::PENDING),
            log: if slots.is_empty() || !is_whole { Vec::new() } else { log(app) },
            screen: screen(kernel, slots),
            release,
        }
    }

    /// What the kernel was booted with.
    pub fn booted(&self) -> &[String] {
        self.command_lines.first().map_or(&[], |line| &line.words)
    }

    /// The files that the command line comes from.
    pub fn command_files(&self) -> &[Words] {
        self.command_lines.split_first().map_or(&[], |(_, files)| files)
    }
}

fn modules(kernel: &dyn Kernel) -> Vec<(String, usize, String)> {
    let directories = ["/etc/modules-load.d", "/run/modules-load.d", "/usr/lib/modules-load.d"];
    let mut files = modprobe::files(kernel, &directories, &[".conf"]);
    files.insert(0, "/etc/modules".to_string());
    let mut found: Vec<(String, usize, String)> = Vec::new();
    for path in files {
        // Debian has the first as a link among the others.
        if path.ends_with("/modules.conf") && kernel.link_name(&path).is_ok() {
            continue;
        }
        let text = kernel.text(&path).unwrap_or_default();
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with(['#', ';']));
        found.extend(lines.map(|(at, line)| {
            let name = line.split_whitespace().next().unwrap_or_default();
            (path.clone(), at, modprobe::module(name))
        }));
    }
    found
}

/// Directives about graphics or vfio in files whose names modprobe does not look at.
fn unread(kernel: &dyn Kernel) -> Vec<Line> {
    let names = kernel.list(DIRECTORIES[0]).into_iter();
    let others = names.filter(|name| !name.ends_with(".conf") && !name.ends_with(".alias"));
    let lines = others.flat_map(|name| {
        let path = format!("{}/{name}", DIRECTORIES[0]);
        modprobe::parse(&path, &kernel.text(&path).unwrap_or_default())
    });
    let is_about = |line: &Line| {
        let is_directive = line.words.first().is_some_and(|word| {
            ["options", "blacklist", "install", "alias", "softdep", "remove"].contains(&word.as_str())
        });
        let names = ["nvidia", "nouveau", "vfio", "nova"];
        is_directive && line.words.get(1).is_some_and(|name| names.iter().any(|start| name.starts_with(start)))
    };
    lines.filter(is_about).collect()
}

fn hidden(kernel: &dyn Kernel) -> Vec<(String, String)> {
    let (first, packages) = (DIRECTORIES[0], &DIRECTORIES[3..4]);
    let mut found = Vec::new();
    for name in kernel.list(first).into_iter().filter(|name| name.ends_with(".conf")) {
        for directory in packages {
            let (ours, theirs) = (format!("{first}/{name}"), format!("{directory}/{name}"));
            let is_about = |path: &str| {
                let text = kernel.text(path).unwrap_or_default();
                let mut lines = logical_lines(&text).into_iter();
                lines.any(|(_, _, line)| ["nvidia", "nouveau", "vfio"].iter().any(|word| line.contains(word)))
            };
            if kernel.exists(&theirs) && is_about(&theirs) {
                found.push((ours.clone(), theirs));
            }
        }
    }
    found
}

fn initramfs(app: &App, release: &str) -> Option<(String, String)> {
    let kernel = app.kernel;
    let path = format!("/boot/initrd.img-{release}");
    let made = modified(app, &path)?;
    let mut copied: Vec<String> = modprobe::files(kernel, &COPIED, &[".conf"]);
    copied.push("/etc/initramfs-tools/modules".to_string());
    let stages = kernel.list("/etc/initramfs-tools/scripts").into_iter();
    for folder in stages.map(|stage| format!("scripts/{stage}")).chain(["hooks".to_string()]) {
        let folder = format!("/etc/initramfs-tools/{folder}");
        copied.extend(kernel.list(&folder).into_iter().map(|name| format!("{folder}/{name}")));
    }
    let newest = copied.into_iter().filter_map(|path| Some((modified(app, &path)?, path))).max();
    let newer = newest.filter(|(at, _)| *at > made).map(|(_, path)| path);
    // What was taken out of it no longer has a time of its own.
    let [folder, _] = COPIED;
    let is_other = || modified(app, folder).is_some_and(|at| at > made + AT_ONCE);
    let newer = newer.or_else(|| is_other().then(|| format!("the last change in {folder}")));
    Some((path, newer?))
}

/// Of the directories of modprobe's, those that it has: initramfs-tools copies the first, kmod's hook there the second.
const COPIED: [&str; 2] = ["/etc/modprobe.d", "/lib/modprobe.d"];

/// Whoever makes a file and then the initramfs may still tidy up.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Beside those the kernel says thousands of things.
const TELLING: &str =
    "NVRM|nvidia|vfio|nterrupt remapping|IRQ remapping|BAR [0-9]|rejected|[Ll]ockdown|D3cold|firmware load";

/// Lines are filtered where they come from: there may be more of them than a program's words are kept of.
fn log(app: &App) -> Vec<String> {
    let script = "exec 2>/dev/null; \"$1\" --notime | \"$2\" -aE \"$3\" | \"$4\" -n 400";
    let programs = ["/usr/bin/dmesg", "/usr/bin/grep", "/usr/bin/tail"];
    if !programs.iter().all(|program| app.kernel.exists(program)) {
        return Vec::new();
    }
    let [dmesg, grep, tail] = programs.map(|program| app.kernel.path(program).to_string_lossy().into_owned());
    let said = app.kernel.program("/bin/sh", &["-c", script, "sh", &dmesg, &grep, TELLING, &tail], PATIENCE);
    said.unwrap_or_default().lines().map(str::to_string).collect()
}

const PATIENCE: Duration = Duration::from_secs(5);

/// `  d0000000-d07fffff : BOOTFB`, which only root is told, within a card's memory.
fn screen(kernel: &dyn Kernel, slots: &[Slot]) -> Option<Address> {
    let range = |text: &str| {
        let (first, last) = text.trim().split_once('-')?;
        Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(last, 16).ok()?))
    };
    let text = kernel.text("/proc/iomem")?;
    let names = ["BOOTFB", "efifb", "simplefb", "simple-framebuffer", "vesafb"];
    let lines = text.lines().filter_map(|line| line.split_once(" : "));
    let mut framebuffers = lines.filter(|(_, name)| names.contains(&name.trim()));
    let (first, last) = framebuffers.find_map(|(at, _)| range(at)).filter(|(_, last)| *last > 0)?;
    let has_it = |address: &Address| {
        let bars = kernel.text(&address.attribute("resource")).unwrap_or_default();
        bars.lines().any(|line| {
            let mut words = line.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
            matches!((words.next(), words.next()), (Some(Ok(begin)), Some(Ok(end))) if begin <= first && last <= end)
        })
    };
    slots.iter().filter_map(Slot::gpu).map(|gpu| gpu.address).find(has_it)
}

/// When a file was changed last.
fn modified(app: &App, path: &str) -> Option<SystemTime> {
    std::fs::metadata(app.kernel.path(path)).ok()?.modified().ok()
}
