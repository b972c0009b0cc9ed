//! `--report`: one text with all that a helper would ask for, to attach to a report.

use super::facts::Facts;
use super::finding::Finding;
use super::redact::redact;
use crate::App;
use crate::config;
use crate::exit::{Exit, Result};
use crate::handoff::kept::history::History;
use crate::proxmox::cluster::NODES;
use crate::report::status::Status;
use crate::report::zone::Zone;
use crate::report::{history, screen};
use crate::sorted;
use std::io::Write;

/// Handoffs that are told.
const LAST: usize = 20;

/// Of a guest's configuration only this: the rest is nobody's business.
const SETTINGS: [&str; 22] = [
    "affinity",
    "arch",
    "args",
    "balloon",
    "bios",
    "cores",
    "cpu",
    "dev",
    "efidisk0",
    "features",
    "hookscript",
    "hostpci",
    "hugepages",
    "lock",
    "lxc.",
    "machine",
    "memory",
    "numa",
    "onboot",
    "ostype",
    "template",
    "vga",
];
const MORE: [&str; 3] = ["unprivileged", "sockets", "startup"];

/// # Errors
/// When the file is there already, or cannot be written.
pub fn run(app: &App, facts: &Facts, findings: &[Finding], to: Option<&str>) -> Result<String> {
    let text = redact(&text(app, facts, findings), &names(app, facts));
    let Some(to) = to else { return Ok(text) };
    // Where the caller is means nothing to who reads below a root.
    let path = std::path::absolute(to).unwrap_or_else(|_| to.into()).to_string_lossy().into_owned();
    let written = app.kernel.create_file(&path, 0o600).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => Exit::usage(format!("{to} is there already: name another file")),
        _ => Exit::failed(format!("{to}: {error}")),
    })?;
    Ok(format!("written to {to}, without addresses and names of the network; look at it before you give it away\n"))
}

fn names(app: &App, facts: &Facts) -> Vec<String> {
    let host = app.kernel.text("/proc/sys/kernel/hostname").unwrap_or_default();
    // A node that was taken out of the cluster leaves its folder behind.
    let mut names = app.kernel.list(NODES);
    names.extend(facts.guests.nodes.iter().map(|(name, _)| name.clone()));
    names.extend(host.split('.').next().map(str::to_string));
    names.retain(|name| !name.is_empty());
    names.push(host);
    names
}

fn text(app: &App, facts: &Facts, findings: &[Finding]) -> String {
    let kernel = app.kernel;
    let read = |path: &str| kernel.text(path).unwrap_or_else(|| "not there".to_string());
    let mut text = String::new();
    let mut part = |title: &str, body: &str| text.push_str(&format!("== {title}\n{}\n\n", body.trim_end()));
    part("findings", &super::text::to_text(facts, findings));
    part("versions", &versions(app, facts));
    let status = Status::read(kernel, &app.store, nix::unistd::geteuid().is_root());
    part("status", &screen::to_text(&status.without_names(), &Zone::default()));
    part(config::PATH, &read(config::PATH));
    part(config::CLUSTER, &read(config::CLUSTER));
    part("kernel command line", &read("/proc/cmdline"));
    let directives = facts.host.directives.iter().map(|line| format!("{}: {}\n", line.place, line.words.join(" ")));
    part("modprobe, in its order", &directives.collect::<String>());
    part("IOMMU groups of the cards", &groups(facts));
    for vm in &facts.guests.vms {
        if vm.has_hook || !vm.listed.is_empty() {
            part(&vm.path, &settings(&vm.settings));
        }
    }
    for container in facts.guests.containers.iter().filter(|one| one.has_nvidia) {
        part(&container.path, &settings(&container.settings));
    }
    part("last handoffs", &past(app));
    part("kernel log of this boot: the driver, vfio, BARs", &facts.host.log.join("\n"));
    text
}

fn settings(all: &[super::facts::guests::Setting]) -> String {
    let is_told = |key: &str| {
        SETTINGS.iter().chain(&MORE).any(|name| {
            key.strip_prefix(name).is_some_and(|rest| name.ends_with('.') || rest.bytes().all(|b| b.is_ascii_digit()))
        })
    };
    all.iter().filter(|one| is_told(&one.key)).map(|one| format!("{}: {}\n", one.key, one.value)).collect()
}

fn versions(app: &App, facts: &Facts) -> String {
    let driver = &facts.driver;
    let or = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_string());
    let libraries: Vec<String> = driver.libraries.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let proxmox = app.kernel.text("/usr/share/doc/pve-manager/VERSION").or_else(|| pve_version(app));
    format!(
        "gpu-handoff {}\nProxmox VE {}\nkernel {}\nnvidia loaded {}{}\nnvidia on the disk {}\nlibraries {}\nfirmware {}\n",
        env!("CARGO_PKG_VERSION"),
        or(&proxmox),
        driver.release,
        or(&driver.loaded),
        if driver.is_open { " (open modules)" } else { "" },
        or(&driver.on_disk),
        libraries.join(" "),
        driver.firmware.join(" "),
    )
}

/// Of the package, as dpkg has it.
fn pve_version(app: &App) -> Option<String> {
    let status = app.kernel.text("/var/lib/dpkg/status")?;
    let lines = status.split("\n\n").find(|one| one.starts_with("Package: pve-manager\n"))?;
    lines.lines().find_map(|line| line.strip_prefix("Version: ")).map(str::to_string)
}

fn groups(facts: &Facts) -> String {
    let all = facts.functions().chain(facts.strangers.iter().map(|(_, function)| function));
    let line = |one: &crate::gpu::Function| {
        let group = one.iommu_group.map_or_else(|| "none".to_string(), |group| group.to_string());
        let driver = one.driver.as_deref().unwrap_or("no driver");
        format!(
            "{} {:04x}:{:04x} class {:06x} group {group} {driver}\n",
            one.address, one.vendor, one.device, one.class
        )
    };
    sorted::set(all.map(line)).into_iter().collect()
}

fn past(app: &App) -> String {
    let Some(Ok(mut past)) = app.store.history().map(History::read) else { return String::new() };
    history::choose(&mut past, None, Some(LAST));
    history::to_text(&past, &Zone::read(Some("UTC"), |path| app.kernel.path(path)))
}
