//! Commands that run when the host boots: in the initramfs, from units and tables of jobs, by modprobe; and driverctl's
//! overrides.

use super::cause::{Cause, Effect, take_out};
use super::facts::{Facts, Function, Script, ScriptKind};
use super::ids;
use crate::modprobe::{files, logical_lines};
use crate::sys::Kernel;

const DRIVERCTL: &str = "/etc/driverctl.d";

const INITRAMFS: [&str; 4] = [
    "/etc/initramfs-tools/scripts",
    "/usr/share/initramfs-tools/scripts",
    "/usr/lib/dracut/modules.d",
    "/etc/dracut/modules.d",
];
const INITRAMFS_FLAT: [&str; 2] = ["/etc/initramfs-tools/hooks", "/etc/dracut.conf.d"];
const INITRAMFS_MODULES: [&str; 2] = ["/etc/initramfs-tools/modules", "/usr/share/initramfs-tools/modules"];
const UNITS: &str = "/etc/systemd/system";
const JOBS: [&str; 3] = ["/etc/rc.local", "/etc/crontab", "/var/spool/cron/crontabs/root"];
const JOBS_DIRECTORY: &str = "/etc/cron.d";

/// Nobody writes longer ones to bind a card.
const LONG: usize = 64 * 1024;

pub fn read(kernel: &dyn Kernel) -> Vec<Script> {
    let mut found: Vec<Script> = Vec::new();
    let text = |path: &str| kernel.text(path).filter(|text| text.len() <= LONG);
    let mut add = |path: String, kind: ScriptKind| {
        if let Some(text) = text(&path)
            && !found.iter().any(|script| script.path == path)
        {
            found.push(Script { path, text, kind });
        }
    };
    for directory in INITRAMFS {
        for stage in kernel.list(directory) {
            let stage = format!("{directory}/{stage}");
            for name in kernel.list(&stage) {
                add(format!("{stage}/{name}"), ScriptKind::Initramfs);
            }
        }
    }
    for directory in INITRAMFS_FLAT {
        for name in kernel.list(directory) {
            add(format!("{directory}/{name}"), ScriptKind::Initramfs);
        }
    }
    for path in INITRAMFS_MODULES {
        add(path.to_string(), ScriptKind::InitramfsModules);
    }
    for unit in units(kernel) {
        add(unit, ScriptKind::Boot);
    }
    for path in JOBS.iter().map(ToString::to_string).chain(files(kernel, &[JOBS_DIRECTORY], &[""])) {
        add(path, ScriptKind::Boot);
    }
    // What those name, and what modprobe is told to run.
    let mut named: Vec<String> = found
        .iter()
        .filter(|script| script.kind == ScriptKind::Boot)
        .flat_map(|script| programs(&script.text))
        .collect();
    for line in
        crate::modprobe::read(kernel).iter().filter(|line| line.words.first().is_some_and(|word| word == "install"))
    {
        named.extend(programs(&line.words().into_iter().skip(2).collect::<Vec<_>>().join(" ")));
    }
    for path in named.into_iter().filter(|path| !path.ends_with("/modprobe") && !path.ends_with("/gpu-handoff")) {
        if let Some(text) = text(&path).filter(|text| text.starts_with("#!"))
            && !found.iter().any(|script| script.path == path)
        {
            found.push(Script { path, text, kind: ScriptKind::Named });
        }
    }
    found
}

/// The administrator's own units that something starts.
fn units(kernel: &dyn Kernel) -> Vec<String> {
    let names = kernel.list(UNITS);
    let is_wanted = |name: &String| {
        { names.iter().filter(|other| other.ends_with(".wants") || other.ends_with(".requires")) }
            .any(|folder| kernel.list(&format!("{UNITS}/{folder}")).contains(name))
    };
    let own = names.iter().filter(|name| name.ends_with(".service") && is_wanted(name));
    own.map(|name| format!("{UNITS}/{name}")).collect()
}

/// The script that a command calls by its path.
pub fn called<'a>(scripts: &'a [Script], command: &[&str]) -> Option<&'a Script> {
    let named = programs(&command.join(" "));
    scripts.iter().find(|script| named.contains(&script.path))
}

/// Absolute paths in a text.
fn programs(text: &str) -> Vec<String> {
    let is_end = |c: char| c.is_whitespace() || matches!(c, '=' | '"' | '\'' | ';' | '&' | '|' | '<' | '>' | '(' | ')');
    let paths = text.split(is_end).map(|word| word.trim_start_matches(['-', '@', '+', '!', ':']));
    let is_program = |word: &&str| {
        word.starts_with('/') && !["/sys/", "/dev/", "/proc/"].iter().any(|folder| word.starts_with(folder))
    };
    paths.filter(is_program).map(str::to_string).collect()
}

pub fn overrides(kernel: &dyn Kernel) -> Vec<(String, String, String)> {
    let names = kernel.list(DRIVERCTL);
    let one = |name: String| {
        let path = format!("{DRIVERCTL}/{name}");
        let driver = kernel.text(&path)?.trim().to_string();
        // Other buses have theirs before the address.
        Some((path, name.trim_start_matches("pci-").to_string(), driver))
    };
    names.into_iter().filter_map(one).collect()
}

pub fn find(facts: &Facts) -> Vec<Cause> {
    let mut found: Vec<Cause> = facts.overrides.iter().filter_map(|one| driverctl(facts, one)).collect();
    for script in &facts.scripts {
        found.extend(match script.kind {
            ScriptKind::InitramfsModules => modules(facts, script),
            ScriptKind::Initramfs | ScriptKind::Boot => commands(facts, script).into_iter().collect(),
            ScriptKind::Named => Vec::new(),
        });
    }
    found
}

fn driverctl(facts: &Facts, (path, address, driver): &(String, String, String)) -> Option<Cause> {
    let function =
        facts.functions.iter().find(|function| function.address.is_some_and(|own| address.parse() == Ok(own)))?;
    let is_meant = facts.needs(driver) || (!function.is_gpu() && !ids::is_keeper(driver));
    (!is_meant).then(|| Cause {
        id: "driverctl",
        effect: Effect::Takes,
        place: format!("{path}:1"),
        text: driver.clone(),
        does: format!("gives {address} to {driver} at boot (driverctl)"),
        remedy: match facts.has_driverctl {
            // It has another driver at once.
            true => format!("driverctl --noprobe unset-override {address}"),
            false => format!("rm {path}"),
        },
    })
}

/// `vfio_pci ids=10de:2684` among the modules of the initramfs.
fn modules(facts: &Facts, script: &Script) -> Vec<Cause> {
    let lines = logical_lines(&script.text).into_iter();
    lines
        .filter_map(|(first, last, text)| {
            let words: Vec<&str> = text.split_whitespace().collect();
            let (name, options) = words.split_first().filter(|(name, _)| ids::is_keeper(name))?;
            let list = options.iter().find_map(|option| option.strip_prefix("ids="))?;
            let (taken, _) = ids::split_ids(list, &facts.functions);
            (!taken.is_empty()).then(|| Cause {
                id: "static-ids",
                effect: Effect::Takes,
                place: format!("{}:{first}", script.path),
                text: words.join(" "),
                does: format!("gives {} to {name} in the initramfs", ids::addresses(&taken)),
                remedy: take_out(&script.path, first, last),
            })
        })
        .collect()
}

fn commands(facts: &Facts, script: &Script) -> Option<Cause> {
    let cause = |line: usize, text: &str, does: &str, remedy: String| Cause {
        id: "bound-at-boot",
        effect: Effect::Takes,
        place: format!("{}:{line}", script.path),
        text: text.trim().to_string(),
        does: does.to_string(),
        remedy,
    };
    let path = &script.path;
    if let Some(line) = binds(&script.text, &facts.functions) {
        let text = script.text.lines().nth(line - 1).unwrap_or_default();
        if script.kind == ScriptKind::Initramfs {
            return Some(cause(line, text, "gives the card to vfio-pci in the initramfs", format!("mv {path} /root/")));
        }
        return Some(cause(line, text, "gives the card to vfio-pci at boot", at_boot(path, line)));
    }
    if script.kind != ScriptKind::Boot {
        return None;
    }
    let lines = script.text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#'));
    for (at, line) in lines {
        let named = programs(line);
        let runs = facts.scripts.iter().find(|other| other.kind == ScriptKind::Named && named.contains(&other.path));
        if let Some(other) = runs.filter(|other| binds(&other.text, &facts.functions).is_some()) {
            let does = format!("gives the card to vfio-pci at boot, by {}", other.path);
            return Some(cause(at + 1, line, &does, at_boot(path, at + 1)));
        }
    }
    None
}

fn at_boot(path: &str, line: usize) -> String {
    match path.strip_prefix(UNITS) {
        Some(unit) => format!("systemctl disable {}", unit.trim_start_matches('/')),
        None => take_out(path, line, line),
    }
}

/// The line with which commands give one of these functions to vfio-pci; none when they are about other devices.
pub fn binds(text: &str, functions: &[Function]) -> Option<usize> {
    if !names_one(text, functions) {
        return None;
    }
    let does = |line: &str| {
        let is_write = ["driver_override", "vfio-pci/bind", "vfio-pci/new_id", "driverctl", "vfio-pci-bind"]
            .iter()
            .any(|word| line.contains(word));
        let ids = ["vfio-pci ids=", "vfio_pci ids="].iter().any(|word| line.contains(word));
        (is_write || ids) && !line.trim_start().starts_with('#')
    };
    // Reading one, or clearing it, gives nobody anything.
    if !text.contains("vfio") {
        return None;
    }
    text.lines().position(does).map(|at| at + 1)
}

/// Commands that name no device at all are about whichever they find.
fn names_one(text: &str, functions: &[Function]) -> bool {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let code = lines.collect::<Vec<_>>().join("\n").to_ascii_lowercase();
    let is_named = |function: &Function| {
        let short = function.short().unwrap_or_default();
        let slot = short.split('.').next().unwrap_or_default();
        let id = |between: &str| format!("{:04x}{between}{:04x}", function.vendor, function.device);
        code.contains(slot) || code.contains(&id(":")) || code.contains(&id(" "))
    };
    functions.iter().any(is_named) || !names_any(&code)
}

/// `01:00.0` anywhere, or `10de:2684`.
fn names_any(code: &str) -> bool {
    let are_hexadecimal = |digits: &[&u8]| digits.iter().all(|digit| digit.is_ascii_hexdigit());
    let is_address = |text: &[u8]| match text {
        [a, b, b':', c, d, b'.', function] => are_hexadecimal(&[a, b, c, d]) && function.is_ascii_digit(),
        _ => false,
    };
    let is_id = |text: &[u8]| match text {
        [a, b, c, d, b':' | b' ', e, f, g, h] => are_hexadecimal(&[a, b, c, d, e, f, g, h]),
        _ => false,
    };
    let bytes = code.as_bytes();
    bytes.windows(7).any(is_address) || bytes.windows(9).any(is_id)
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    #[test]
    fn commands_that_give_the_card_away_and_others() {
        for (text, line) in [
            ("#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n", 2),
            (
                "#!/bin/sh\nDEVS=\"0000:01:00.0 0000:01:00.1\"\nfor d in $DEVS; do\n echo vfio-pci >/sys/bus/pci/devices/$d/driver_override\ndone\n",
                4,
            ),
            (
                "A=\"01:00.0\"\nfor dev in 0000:\"$A\"; do echo vfio-pci > /sys/bus/pci/devices/$dev/driver_override; done",
                2,
            ),
            ("for i in /sys/bus/pci/devices/*/boot_vga; do echo vfio-pci >\"$(dirname $i)/driver_override\"; done", 1),
            ("echo 10de 2684 >/sys/bus/pci/drivers/vfio-pci/new_id", 1),
            ("modprobe vfio-pci ids=10de:2684", 1),
            ("driverctl set-override 0000:01:00.0 vfio-pci", 1),
        ] {
            assert_eq!(binds(text, &facts().functions), Some(line), "{text}");
        }
        for text in [
            "#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:03:00.0/driver_override\n",
            "echo 8086 1572 >/sys/bus/pci/drivers/vfio-pci/new_id",
            "# echo vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n",
            "modprobe vfio-pci",
            "cat /sys/bus/pci/devices/0000:01:00.0/driver_override",
        ] {
            assert_eq!(binds(text, &facts().functions), None, "{text}");
        }
    }

    #[test]
    fn whatever_runs_them() {
        let bind = "#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n";
        let script = |path: &str, text: &str, kind| Script { path: path.to_string(), text: text.to_string(), kind };
        let found = |scripts: Vec<Script>| {
            let causes = find(&Facts { scripts, ..facts() });
            causes.into_iter().map(|one| (one.place, one.remedy)).collect::<Vec<_>>()
        };
        let pair = |place: &str, remedy: &str| vec![(place.to_string(), remedy.to_string())];
        let early = "/etc/initramfs-tools/scripts/init-top/vfio.sh";
        assert_eq!(
            found(vec![script(early, bind, ScriptKind::Initramfs)]),
            pair(&format!("{early}:2"), &format!("mv {early} /root/"))
        );
        let unit = "/etc/systemd/system/vfio.service";
        let text = "[Service]\nExecStart=-/usr/local/bin/bind.sh now\n";
        let both =
            vec![script(unit, text, ScriptKind::Boot), script("/usr/local/bin/bind.sh", bind, ScriptKind::Named)];
        assert_eq!(found(both), pair(&format!("{unit}:2"), "systemctl disable vfio.service"));
        let modules = "/etc/initramfs-tools/modules";
        let text = "# x\nvfio\nvfio_pci ids=10de:2684,10de:22ba\n";
        assert_eq!(
            found(vec![script(modules, text, ScriptKind::InitramfsModules)]),
            pair(&format!("{modules}:3"), &format!("sed -i '3s/^/# /' {modules}"))
        );
        let job = "/etc/cron.d/x";
        let text = "@reboot root driverctl set-override 0000:01:00.0 vfio-pci\n";
        assert_eq!(
            found(vec![script(job, text, ScriptKind::Boot)]),
            pair("/etc/cron.d/x:1", "sed -i '1s/^/# /' /etc/cron.d/x")
        );
    }

    #[test]
    fn an_override_of_driverctls() {
        let found = |address: &str, driver: &str, has_driverctl| {
            let one = (format!("/etc/driverctl.d/{address}"), address.to_string(), driver.to_string());
            let causes = find(&Facts { overrides: vec![one], has_driverctl, ..facts() });
            causes.into_iter().map(|one| one.remedy).collect::<Vec<_>>()
        };
        assert_eq!(found("0000:01:00.0", "vfio-pci", true), ["driverctl --noprobe unset-override 0000:01:00.0"]);
        assert_eq!(found("0000:01:00.1", "vfio-pci", false), ["rm /etc/driverctl.d/0000:01:00.1"]);
        assert_eq!(found("0000:01:00.0", "nouveau", false).len(), 1);
        assert!(found("0000:01:00.0", "nvidia", true).is_empty());
        assert!(found("0000:01:00.1", "snd_hda_intel", true).is_empty());
        assert!(found("0000:03:00.0", "vfio-pci", true).is_empty());
    }
}
