//! VM configurations (`/etc/pve/qemu-server/ID.conf`), read as `PVE::QemuServer::parse_vm_config` reads them.
//!
//! Only the current VM counts: pending changes and snapshots describe other ones.

use super::pci_id::{PciId, Written};
use super::property::{self, Key, Shape};
use super::{guest, perl, perl::quoted};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt;

/// The settings of a VM that matter for handing it a GPU.
#[derive(Debug, Default, PartialEq)]
pub struct VmConfig {
    /// By the number of the `hostpciN` line.
    pub hostpci: BTreeMap<u32, Hostpci>,
    /// Why Proxmox keeps others off this VM. Empty, which to Proxmox is not locked, if written as `""`.
    pub lock: Option<String>,
    pub hookscript: Option<String>,
    pub template: bool,
    /// Only this type of machine has PCI Express (`machine`).
    pub is_q35: bool,
    /// Lines that look like one of the above but that Proxmox drops. Other complaints are left to it.
    pub warnings: Vec<Dropped>,
    /// Of those lines the ones that name devices all the same: a later Proxmox may take what this one's options do not
    /// have, and then it gives them to the VM.
    pub doubtful: BTreeMap<u32, Doubtful>,
    /// What QEMU is told beside all that: `args`.
    pub args: Passed,
}

/// A line that Proxmox drops.
#[derive(Debug, PartialEq)]
pub struct Dropped {
    pub is_hostpci: bool,
    /// Its number in the file.
    pub line: usize,
    /// What stands there, in quotes.
    pub text: String,
    pub reason: String,
}

impl Dropped {
    /// `line 3 'hostpci0: x' is ignored: there is no …`
    pub fn told(&self, what: &str) -> String {
        format!("line {} {} is {what}: {}", self.line, self.text, self.reason)
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.told("ignored"))
    }
}

/// A `hostpciN` line that is refused here.
#[derive(Debug, PartialEq)]
pub struct Doubtful {
    pub line: Hostpci,
    /// The number of that line in the file.
    pub number: usize,
    /// The line with what is understood of it, to be set instead; none when that is nothing, or has no number.
    pub instead: Option<String>,
}

/// Devices that QEMU itself is told to pass through: Proxmox knows nothing of them, and nobody gives them to vfio-pci.
#[derive(Debug, Default, PartialEq)]
pub struct Passed {
    pub ids: Vec<PciId>,
    /// What may name others and cannot be read.
    pub unread: Vec<String>,
}

/// What one `hostpciN` line passes through. Proxmox accepts neither and both of `ids` and `mapping`
/// here and refuses them when the VM starts.
#[derive(Debug, PartialEq)]
pub struct Hostpci {
    pub raw: String,
    /// All of them are passed through together.
    pub ids: Vec<Written>,
    /// Name of a cluster-wide resource mapping.
    pub mapping: Option<String>,
    pub driver: Driver,
    /// Type of the mediated device to create on the addressed one.
    pub mdev: Option<String>,
}

/// What Proxmox does to the device before QEMU gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Binds it to vfio-pci and resets it.
    Vfio,
    /// Nothing: it is left on the driver it has.
    Keep,
}

const HOSTPCI: &[Key] = &[
    Key::new("host", Shape::Text(is_id_list)).bare(),
    Key::new("mapping", Shape::Text(property::is_config_id)),
    Key::new("driver", Shape::Text(|value| matches!(value, b"vfio" | b"keep"))),
    Key::new("mdev", Shape::Text(|value| !value.iter().any(|byte| b"/.:".contains(byte)))),
    Key::new("romfile", Shape::Text(|value| !value.contains(&b';'))),
    Key::new("rombar", Shape::Boolean),
    Key::new("pcie", Shape::Boolean),
    Key::new("x-vga", Shape::Boolean),
    Key::new("legacy-igd", Shape::Boolean),
    Key::new("vendor-id", Shape::Text(is_hex_id)),
    Key::new("device-id", Shape::Text(is_hex_id)),
    Key::new("sub-vendor-id", Shape::Text(is_hex_id)),
    Key::new("sub-device-id", Shape::Text(is_hex_id)),
];

/// Reads what is written; never fails, as Proxmox starts a VM whose configuration it can read in part.
pub fn parse(bytes: &[u8]) -> VmConfig {
    let mut config = VmConfig::default();
    for (number, line) in perl::lines(bytes).take_while(|(_, line)| !is_section_header(line)) {
        if let Some(machine) = line.strip_prefix(b"machine:") {
            config.is_q35 = perl::text(machine).contains("q35");
        }
        if looks_like_ours(line)
            && let Err(reason) = config.read(line)
        {
            config.doubtful.extend(Doubtful::read(line, number));
            config.warnings.push(Dropped {
                is_hostpci: line.starts_with(b"hostpci"),
                line: number,
                text: quoted(line).to_string(),
                reason: format!("{reason:#}"),
            });
        }
    }
    config
}

impl VmConfig {
    /// What to set a `hostpciN` to that is to name this device. With `pcie=1` Proxmox starts q35 machines only ("q35 machine
    /// model is not enabled", `PVE::QemuServer::PCI`).
    pub fn hostpci_of(&self, device: &dyn fmt::Display) -> String {
        format!("{device}{}", if self.is_q35 { ",pcie=1" } else { "" })
    }

    /// As if all of its lines could be set again as they are: for who proposes others like them.
    #[must_use]
    pub fn fitted(mut self) -> VmConfig {
        let is_q35 = self.is_q35;
        let fit = |raw: &mut String| *raw = fitting(is_q35, raw);
        self.hostpci.values_mut().for_each(|line| fit(&mut line.raw));
        for doubtful in self.doubtful.values_mut() {
            fit(&mut doubtful.line.raw);
            doubtful.instead.iter_mut().for_each(fit);
        }
        self
    }

    /// A line that is refused leaves an earlier one with the same key in force.
    fn read(&mut self, line: &[u8]) -> Result<()> {
        if guest::is_snapstate(line) {
            return Ok(());
        }
        let (key, value) = perl::split_once(line, b':').context("there is no ':'")?;
        let value = guest::value(value).context("there is no value")?;
        ensure!(!value.contains(&b'\r'), "there is a carriage return in it");

        match key {
            b"args" => self.args = Passed::parse(&perl::text(value)),
            b"lock" => self.lock = Some(perl::text(unquote(value))),
            b"hookscript" => {
                ensure!(guest::is_volume_id(value), "a hookscript is STORAGE:snippets/NAME");
                self.hookscript = Some(perl::text(value));
            }
            b"template" => self.template = property::boolean(value).context("it is neither yes nor no")?,
            key => {
                let index = hostpci_index(key).with_context(|| format!("there is no setting {}", quoted(key)))?;
                self.hostpci.insert(index, Hostpci::parse(value)?);
            }
        }
        Ok(())
    }
}

/// What a `hostpciN` may be set to that is like this one: without `pcie=1` where the machine would not start with it.
pub fn fitting(is_q35: bool, raw: &str) -> String {
    raw.split(',').filter(|part| is_q35 || *part != "pcie=1").collect::<Vec<_>>().join(",")
}

impl Hostpci {
    fn parse(value: &[u8]) -> Result<Hostpci> {
        let options = property::parse(HOSTPCI, value)?;
        Ok(Hostpci {
            raw: perl::text(value),
            ids: options.text("host").iter().flat_map(|ids| ids.split(';')).filter_map(Written::parse).collect(),
            mapping: options.text("mapping"),
            driver: match options.get("driver") {
                Some(b"keep") => Driver::Keep,
                _ => Driver::Vfio,
            },
            mdev: options.text("mdev"),
        })
    }

    pub fn addresses(&self) -> impl Iterator<Item = PciId> {
        self.ids.iter().map(|written| written.id.clone())
    }
}

impl Doubtful {
    /// By its number, which may be one that Proxmox does not have yet.
    fn read(line: &[u8], number: usize) -> Option<(u32, Doubtful)> {
        let text = perl::text(line);
        let (key, value) = text.split_once(':')?;
        let digits = key.strip_prefix("hostpci")?;
        let index: u32 = digits.parse().ok().filter(|index: &u32| index.to_string() == digits)?;
        let value = value.trim();
        let parts = || value.split(',').map(|part| part.split_once('=').unwrap_or(("host", part)));
        let of = |name: &str| parts().find(|(key, _)| *key == name).map(|(_, value)| value);
        let ids: Vec<Written> =
            of("host").into_iter().flat_map(|ids| ids.split(';')).filter_map(Written::parse).collect();
        let mapping = of("mapping").filter(|name| property::is_config_id(name.as_bytes())).map(String::from);
        if ids.is_empty() && mapping.is_none() {
            return None;
        }
        let known = value.split(',').filter(|part| !part.contains('=') || is_known_option(part));
        let known = known.collect::<Vec<_>>().join(",");
        let is_good =
            known != value && hostpci_index(key.as_bytes()).is_some() && Hostpci::parse(known.as_bytes()).is_ok();
        let line = Hostpci {
            raw: value.to_string(),
            ids,
            mapping,
            driver: if of("driver") == Some("keep") { Driver::Keep } else { Driver::Vfio },
            mdev: of("mdev").map(String::from),
        };
        Some((index, Doubtful { line, number, instead: is_good.then_some(known) }))
    }
}

/// One `key=value` that Proxmox takes; the ones that it must have besides are not asked for.
fn is_known_option(part: &str) -> bool {
    property::parse(HOSTPCI, part.as_bytes()).is_ok()
}

impl Passed {
    /// `-device vfio-pci,host=01:00.0,multifunction=on`, or as QEMU's JSON, in quotes or not.
    fn parse(text: &str) -> Passed {
        Passed::of(words(text))
    }

    /// Of QEMU's arguments, each as QEMU has it.
    pub fn of(words: impl IntoIterator<Item = String>) -> Passed {
        let mut passed = Passed::default();
        for word in words {
            // A file of such options, and a device's option that is set from elsewhere.
            if word.contains("readconfig") || sets_host(&word) {
                passed.unread.push(word);
                continue;
            }
            if !word.contains("vfio-pci") {
                continue;
            }
            let json: Option<serde_json::Value> = serde_json::from_str(&word).ok();
            let option = |name: &str| match &json {
                Some(json) => json.get(name).and_then(|value| value.as_str()).map(str::to_string),
                None => word.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('=').map(str::to_string)),
            };
            let address = option("host")
                .or_else(|| option("sysfsdev").and_then(|path| path.rsplit('/').next().map(str::to_string)));
            match address.as_deref().and_then(qemu_address) {
                Some(id) => passed.ids.push(id),
                None => passed.unread.push(word),
            }
        }
        passed
    }
}

/// `-set device.hostpci0.host=01:00.0`
fn sets_host(word: &str) -> bool {
    let option = word.strip_prefix("device.").and_then(|rest| rest.split_once('=')).map(|(name, _)| name);
    option.is_some_and(|name| name.ends_with(".host") || name.ends_with(".sysfsdev"))
}

/// As a shell splits them (Text::ParseWords in Proxmox).
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            Some(end) if c == end => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            _ if c == '\\' && quote != Some('\'') => word.extend(chars.next()),
            _ => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// `[DOMAIN:]BUS:SLOT.FUNCTION` as QEMU reads it: hexadecimal, with or without zeros before it.
fn qemu_address(text: &str) -> Option<PciId> {
    let (slot, function) = text.split_once('.')?;
    let mut parts: Vec<u32> = slot.split(':').map(|part| u32::from_str_radix(part, 16).ok()).collect::<Option<_>>()?;
    if parts.len() == 2 {
        parts.insert(0, 0);
    }
    let [domain, bus, device] = parts[..] else { return None };
    PciId::parse(&format!("{domain:04x}:{bus:02x}:{device:02x}.{:x}", u32::from_str_radix(function, 16).ok()?))
}

/// Tells our lines, and those that were probably meant to be, from the many others. These cost nothing
/// more, since most VMs have no GPU and should not pay for being asked.
fn looks_like_ours(line: &[u8]) -> bool {
    const OURS: [&[u8]; 5] = [b"hostpci", b"lock", b"hookscript", b"template", b"args"];
    const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
    let line = perl::trim_start(line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line));
    OURS.iter().any(|start| line.get(..start.len()).is_some_and(|text| text.eq_ignore_ascii_case(start)))
}

/// Any `[…]`, also of a name that Proxmox does not know: it then skips what follows.
fn is_section_header(line: &[u8]) -> bool {
    line.first() == Some(&b'[') && perl::trim_end(line).strip_suffix(b"]").is_some_and(|inside| !inside.contains(&b']'))
}

/// `hostpci0` to `hostpci15` (`$MAX_HOSTPCI_DEVICES`), without leading zeros: Proxmox knows each by its name.
fn hostpci_index(key: &[u8]) -> Option<u32> {
    match key.strip_prefix(b"hostpci")? {
        [digit @ b'0'..=b'9'] => Some(u32::from(digit - b'0')),
        [b'1', digit @ b'0'..=b'5'] => Some(10 + u32::from(digit - b'0')),
        _ => None,
    }
}

fn unquote(value: &[u8]) -> &[u8] {
    match value {
        [b'"', inside @ .., b'"'] => inside,
        _ => value,
    }
}

fn is_id_list(value: &[u8]) -> bool {
    std::str::from_utf8(value).is_ok_and(|value| value.split(';').all(|id| PciId::parse(id).is_some()))
}

fn is_hex_id(value: &[u8]) -> bool {
    matches!(value, [b'0', b'x', digits @ ..] if digits.len() == 4 && digits.iter().all(u8::is_ascii_hexdigit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxmox::{noise, pci_id};

    fn ids(config: &str) -> Vec<String> {
        parse(config.as_bytes()).hostpci.into_values().flat_map(|line| line.ids).map(|id| id.text).collect()
    }

    #[test]
    fn a_refused_line_leaves_the_earlier_one() {
        let config = parse(b"hostpci0: 01:00\nhostpci0: 0X:00\nlock: backup\nlock:\ntemplate: 1\ntemplate: maybe\n");
        assert_eq!(config.hostpci[&0].ids, [Written::parse("01:00").unwrap()]);
        assert_eq!(config.lock.as_deref(), Some("backup"));
        assert!(config.template);
        assert_eq!(config.warnings.len(), 3);
        assert_eq!(
            config.warnings[0].to_string(),
            "line 2 'hostpci0: 0X:00' is ignored: option 'host' cannot be '0X:00'"
        );
    }

    #[test]
    fn any_closed_bracket_ends_the_main_section() {
        for header in ["[PENDING]", "[]", "[a b]\t\r", "[special:x]", "[\r]"] {
            assert!(ids(&format!("{header}\nhostpci0: 01:00\n")).is_empty(), "{header}");
        }
        for line in ["[snap]]", "[[snap]]", "[snap", " [snap]", "[snap] x", "[]]", "#[snap]"] {
            assert_eq!(ids(&format!("{line}\nhostpci0: 01:00\n")), ["01:00"], "{line}");
        }
    }

    #[test]
    fn keys_are_known_by_their_exact_name() {
        for key in ["hostpci", "hostpci16", "hostpci00", "hostpci01", "Hostpci0", "hostpci0 ", " hostpci0", "hostpci٣"]
        {
            assert!(ids(&format!("{key}: 01:00\n")).is_empty(), "{key}");
        }
        assert_eq!(ids("hostpci15:01:00"), ["01:00"]);
    }

    #[test]
    fn a_carriage_return_counts_as_a_blank_only_at_the_ends() {
        assert_eq!(ids("hostpci0:\r01:00\r\n"), ["01:00"]);
        assert!(parse(b"hostpci0: mdev=a\rb\n").hostpci.is_empty());
        assert!(parse(b"hostpci0: \r\n").hostpci.is_empty());
        assert_eq!(parse(b"hostpci0: \r \n").hostpci[&0].raw, " ");
    }

    #[test]
    fn quotes_belong_to_a_lock_only() {
        assert_eq!(parse(b"lock: \"\"").lock.as_deref(), Some(""));
        assert_eq!(parse(b"lock: \"").lock.as_deref(), Some("\""));
        assert!(ids("hostpci0: \"01:00\"").is_empty());
    }

    #[test]
    fn a_snapstate_at_the_end_makes_a_line_disappear_silently() {
        let config = parse(b"hostpci0: romfile=snapstate:delete\nlock snapstate: prepare\n");
        assert_eq!(config, VmConfig::default());
    }

    #[test]
    fn what_a_later_proxmox_may_take() {
        let doubtful = |config: &str| {
            parse(config.as_bytes())
                .doubtful
                .into_iter()
                .map(|(n, d)| (n, d.line.ids.into_iter().map(|id| id.text).collect::<Vec<_>>().join(";"), d.instead))
                .collect::<Vec<_>>()
        };
        let is = |config: &str, number: u32, ids: &str, instead: Option<&str>| {
            assert_eq!(doubtful(config), [(number, ids.to_string(), instead.map(str::to_string))], "{config}");
        };
        is("hostpci0: 0000:01:00,pcie=1,newkey=1", 0, "0000:01:00", Some("0000:01:00,pcie=1"));
        is("hostpci1: newkey=a,host=01:00.0;01:00.1", 1, "01:00.0;01:00.1", Some("host=01:00.0;01:00.1"));
        is("hostpci0: 01:00,driver=other", 0, "01:00", Some("01:00"));
        is("hostpci16: 01:00", 16, "01:00", None);
        assert_eq!(parse(b"hostpci0: 01:00,driver=keep,x=1").doubtful[&0].line.driver, Driver::Keep);
        assert_eq!(parse(b"hostpci0: mapping=gpu,x=1").doubtful[&0].line.mapping.as_deref(), Some("gpu"));
        for config in [
            "hostpci0: 01:00",
            "hostpci0: 0G:00",
            "Hostpci0: 01:00",
            "hostpci00: 01:00",
            "#hostpci0: 01:00,x=1",
            "[snap]\nhostpci0: 01:00,x=1",
        ] {
            assert_eq!(doubtful(config), [], "{config}");
        }
    }

    #[test]
    fn what_qemu_itself_is_told() {
        let passed = |args: &str| {
            let config = parse(format!("args: {args}\n").as_bytes());
            let ids = config.args.ids.iter().map(|id| format!("{}.{}", id.slot_name(), id.function.unwrap_or(9)));
            (ids.collect::<Vec<_>>().join(" "), config.args.unread.len())
        };
        for (args, ids, unread) in [
            (
                "-device vfio-pci,host=01:00.0,multifunction=on -device vfio-pci,host=0000:01:00.1",
                "0000:01:00.0 0000:01:00.1",
                0,
            ),
            ("-device 'vfio-pci,host=1:0.0,x-vga=on'", "0000:01:00.0", 0),
            ("-device vfio-pci-nohotplug,sysfsdev=/sys/bus/pci/devices/0000:0A:00.0", "0000:0a:00.0", 0),
            (r#"-device '{"driver": "vfio-pci", "host": "0000:01:00.0"}'"#, "0000:01:00.0", 0),
            (r#"-device {\"driver\":\"vfio-pci\",\"host\":\"0000:01:00.0\"}"#, "0000:01:00.0", 0),
            ("-device vfio-pci,id=x", "", 1),
            ("-readconfig /etc/vm.cfg", "", 1),
            ("-set device.hostpci0.host=01:00.0 -set device.vga.host=x", "", 2),
            ("-set device.hostpci0.x-vga=on", "", 0),
            ("-cpu host,kvm=off -device virtio-net-pci,host=01:00.0", "", 0),
        ] {
            assert_eq!(passed(args), (ids.to_string(), unread), "{args}");
        }
        assert_eq!(parse(b"[snap]\nargs: -device vfio-pci,host=01:00.0\n").args, Passed::default());
    }

    #[test]
    fn a_line_that_is_proposed_fits_the_machine() {
        let lines = "hostpci0: 01:00,pcie=1,x-vga=1\nhostpci1: pcie=1,mapping=gpu,new=1\n";
        for (machine, first, second) in
            [("pc", "01:00,x-vga=1", "mapping=gpu"), ("q35", "01:00,pcie=1,x-vga=1", "pcie=1,mapping=gpu")]
        {
            let fitted = parse(format!("machine: {machine}\n{lines}").as_bytes()).fitted();
            assert_eq!(fitted.hostpci[&0].raw, first);
            assert_eq!(fitted.doubtful[&1].instead.as_deref(), Some(second));
        }
    }

    #[test]
    fn survives_any_bytes() {
        let seed = b"args: -device 'vfio-pci,host=01:00.0'\nhostpci0: pcie=1,0000:01:00.0;01:00.1,mdev=x\r\nlock: \"a\"\nhookscript: local:a\n[s]\n";
        noise::mutations(seed, |bytes| {
            let config = parse(bytes);
            for id in config.hostpci.values().flat_map(|line| &line.ids).map(|id| &id.text) {
                assert!(id.bytes().all(|byte| pci_id::is_hex(&byte) || b":.".contains(&byte)), "{id}");
            }
            for line in config.hostpci.values() {
                assert_eq!(line.addresses().count(), line.ids.len());
            }
            assert!(config.hostpci.keys().all(|&index| index < 16));
        });
    }
}
