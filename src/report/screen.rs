//! What `--status` shows to people. All but what others wrote, such as a cause or a process, fits into 80 columns.

use super::history::way;
use super::pinned::Pinned;
use super::status::{Gpu, Has, Status};
use super::zone::Zone;
use crate::handoff::kept::history::result;
use crate::handoff::kept::owed;
use crate::handoff::plan::policy;
use crate::story::printable;
use serde_json::Value;
use std::fmt::Write;

const COLUMNS: usize = 80;

/// Before what a line has to say.
const MARGIN: usize = 10;

/// Times are told in this zone.
pub fn to_text(status: &Status, zone: &Zone) -> String {
    let mut text = String::new();
    let unseen = if status.sees_all { "that could not be seen" } else { "only root may see that" };
    for gpu in &status.gpus {
        write_gpu(&mut text, gpu, status.driver.as_deref(), unseen, zone);
    }
    if status.gpus.is_empty() {
        text.push_str("no NVIDIA GPU in this host\n");
    }
    if status.reboot_required {
        text.push_str("reboot required: the host preparation takes effect with the next boot\n");
    }
    if let Some(why) = &status.setup_error {
        text.push_str(&format!("set-up is not done: {why}; try again: gpu-handoff setup pending\n"));
    }
    text
}

/// `unseen`: why it is not known who uses it.
fn write_gpu(text: &mut String, gpu: &Gpu, version: Option<&str>, unseen: &str, zone: &Zone) {
    text.push_str(&cut(&format!("{}  {}", gpu.slot.id, owner(gpu, zone))));
    if let Some(name) = &gpu.name {
        text.push_str(&line("card", name));
    }
    write_functions(text, gpu, version);
    let mut add = |line: String| text.push_str(&line);
    if !gpu.mappings.is_empty() {
        add(wrapped("mapping", &gpu.mappings.join(", ")));
    }
    gpu.claims.iter().for_each(|claim| add(line("guest", &claim.to_string())));
    match &gpu.users {
        Some(users) if users.is_empty() && matches!(gpu.has, Has::Host | Has::Manual | Has::None) => {
            add(line("used by", "nobody: it is not in use"));
        }
        Some(users) => users.iter().for_each(|user| add(line("used by", &user.to_string()))),
        None if gpu.is_blind => add(line("used by", "unknown: the NVIDIA driver is busy and does not answer")),
        None => add(line("used by", &format!("unknown: {unseen}"))),
    }
    gpu.pinned.iter().flat_map(Pinned::lines).for_each(|what| add(wrapped("pinned", &what)));
    if let Some(wedged) = &gpu.wedged {
        add(wrapped("wedged", &wedged.to_string()));
    }
    if let Some(foreign) = &gpu.foreign {
        add(wrapped("wedged", &foreign.to_string()));
    }
    if !gpu.owed.is_empty() {
        let when = if gpu.has.has_it() { " when it is home" } else { "" };
        add(wrapped("owed", &format!("{}{when}", owed::to_text(&gpu.owed))));
    }
    if let Some(dri) = &gpu.dri {
        add(wrapped("nodes", dri));
    }
    gpu.causes.iter().for_each(|cause| add(line("cause", cause)));
    if let Some(remedy) = remedy(gpu) {
        add(line("remedy", &remedy));
    }
    if let Some(last) = &gpu.last {
        add(wrapped("last", &describe_last(last)));
    }
}

/// `VM 111 (win11) since 2026-11-20 21:04:11`
fn owner(gpu: &Gpu, zone: &Zone) -> String {
    let name = |id: u32| {
        let claim = gpu.claims.iter().find(|claim| claim.is_of_vm(id));
        claim.map(|claim| claim.name_in(30)).unwrap_or_default()
    };
    let owner = match (gpu.has, gpu.has.vmid()) {
        (Has::Vm(id), _) => format!("VM {id}{}", name(id)),
        (has, Some(id)) => format!("{} (VM {id})", has.word()),
        (has, None) => has.word().to_string(),
    };
    let since = gpu.since.as_ref().map_or_else(String::new, |time| format!(" since {}", zone.local(time)));
    format!("{owner}{}", printable(&since))
}

fn write_functions(text: &mut String, gpu: &Gpu, version: Option<&str>) {
    let driver = |driver: Option<&str>| match (driver, version) {
        (Some("nvidia"), Some(version)) => format!("nvidia {version}"),
        (driver, _) => driver.unwrap_or("no driver").to_string(),
    };
    let drivers: Vec<String> = gpu.slot.functions.iter().map(|one| driver(one.driver.as_deref())).collect();
    let width = drivers.iter().map(|driver| driver.chars().count()).max().unwrap_or(0).max(13);
    for ((function, home), driver) in gpu.slot.functions.iter().zip(&gpu.homes).zip(&drivers) {
        let is_away = function.driver != *home;
        let away = if is_away { format!("  home {}", home.as_deref().unwrap_or("no driver")) } else { String::new() };
        let group = function.iommu_group.map_or_else(|| "no group".to_string(), |group| format!("group {group}"));
        text.push_str(&cut(&format!(
            "  .{:x}  {:<8} {:04x}:{:04x}  {group:<9}  {driver:<width$}{away}",
            function.address.function,
            function.kind(),
            function.vendor,
            function.device,
        )));
    }
}

/// What to type; none when all is as it should be, or will be by itself.
fn remedy(gpu: &Gpu) -> Option<String> {
    let slot = gpu.slot.id;
    match gpu.has {
        Has::Wedged(_) => Some(of_wedged(gpu)),
        Has::Stranded(_) => Some(format!("gpu-handoff to-home {slot}")),
        Has::Host | Has::None if !gpu.owed.is_empty() => Some("gpu-handoff reconcile".to_string()),
        _ => None,
    }
}

/// Nobody can end the call itself.
fn of_wedged(gpu: &Gpu) -> String {
    let mut commands = policy::commands(gpu.users.as_deref().unwrap_or_default());
    commands.push("if the call never ends: reboot".to_string());
    commands.join("; ")
}

fn line(name: &str, what: &str) -> String {
    let mut line = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(line, "  {name:<7}  {what}");
    line
}

/// Of words that nobody types: what does not fit goes on below.
fn wrapped(name: &str, what: &str) -> String {
    let mut text = format!("  {name:<7} ");
    let mut column = text.len();
    for word in what.split(' ') {
        let width = word.chars().count() + 1;
        if column > MARGIN && column + width > COLUMNS {
            let _ = write!(text, "\n{:MARGIN$}", "");
            column = MARGIN;
        }
        let _ = write!(text, " {word}");
        column += width;
    }
    text + "\n"
}

/// At most so wide, and ended.
pub(super) fn cut(line: &str) -> String {
    let line = line.trim_end();
    match line.char_indices().nth(COLUMNS) {
        Some(_) => format!("{}…\n", line.chars().take(COLUMNS - 1).collect::<String>()),
        None => format!("{line}\n"),
    }
}

/// `host -> VM 111 in 84 ms (check 10, release 20; back: clear 54), failed`
fn describe_last(last: &Value) -> String {
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0);
    let word = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).unwrap_or("?").to_string();
    let phases = last.get("phases").and_then(Value::as_array).into_iter().flatten();
    let (back, there): (Vec<_>, Vec<_>) = phases.partition(|phase| word(phase, "way") == "back");
    let listed = |phases: Vec<&Value>| {
        let each: Vec<String> =
            phases.iter().map(|one| format!("{} {}", word(one, "name"), number(one, "ms"))).collect();
        each.join(", ")
    };
    let back = if back.is_empty() { String::new() } else { format!("; back: {}", listed(back)) };
    let end = if number(last, "exit") == 0 { String::new() } else { format!(", {}", result(last)) };
    format!("{} in {} ms ({}{back}){end}", way(last), number(last, "ms"), listed(there))
}
