//! What Proxmox wrote. What was read, written as Proxmox writes it, must be read as the same.

use crate::{assert_one_line, is_lossy};
use gpu_handoff::address::SlotId;
use gpu_handoff::proxmox::pci_id::PciId;
use gpu_handoff::proxmox::property::{self, Key, Shape};
use gpu_handoff::proxmox::{ct as containers, mapping as mappings, vm as machines};
use std::fmt::Write;

pub fn vm(data: &[u8]) {
    let config = machines::parse(data);
    for warning in config.warnings.iter().map(ToString::to_string) {
        assert_one_line(&warning);
        assert!(warning.len() < 2000, "{warning}");
    }
    for (index, line) in &config.hostpci {
        assert!(*index < 16);
        for id in line.ids.iter().map(|id| &id.text) {
            assert!(id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b':' | b'.')), "{id}");
        }
        assert_eq!(line.addresses().count(), line.ids.len());
        assert!(line.mapping.as_ref().is_none_or(|name| property::is_config_id(name.as_bytes())));
        if !is_lossy(&line.raw) {
            let again = machines::parse(format!("hostpci{index}: {}\n", line.raw).as_bytes());
            assert_eq!(again.hostpci.get(index), Some(line));
        }
    }
    assert_eq!(machines::parse(&[data, b"\n"].concat()), config);
    assert_eq!(machines::parse(&[data, b"\n[other]\ntemplate: 1\nhostpci3: 01:00\nlock: x\n"].concat()), config);
}

pub fn ct(data: &[u8]) {
    let config = containers::parse(data);
    for (digits, dev) in &config.dev {
        assert!(!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()), "{digits}");
        let Some(device) = &dev.device else { continue };
        assert!(device.path.starts_with("/dev/") && !device.path.split('/').any(|part| matches!(part, "." | "..")));
        assert!(device.mode.as_ref().is_none_or(|mode| mode.len() == 4));
        assert!(device.uid.is_none_or(|uid| uid >= 0) && device.gid.is_none_or(|gid| gid >= 0));
    }
    assert!(config.devices_allow().count() + config.mount_entries().count() <= config.raw_lxc.len());
    let mut text = String::new();
    for (key, value) in &config.raw_lxc {
        let _ = writeln!(text, "{key}: {value}");
    }
    for (digits, dev) in &config.dev {
        let _ = writeln!(text, "dev{digits}: {}", dev.raw);
    }
    if !is_lossy(&text) {
        let again = containers::parse(text.as_bytes());
        assert_eq!(again.raw_lxc, config.raw_lxc);
        assert_eq!(again.dev, config.dev);
    }
    let other = b"\n[other]\nunprivileged: 1\ntemplate: 1\nlock: x\nlxc.mount.entry: y\ndev7: /dev/null\n";
    assert_eq!(containers::parse(&[data, other].concat()), config);
}

pub fn mapping(data: &[u8]) {
    let read = mappings::parse(data);
    let mut text = String::new();
    for (name, nodes) in &read {
        assert!(property::is_config_id(name.as_bytes()), "{name}");
        assert!(!nodes.is_empty() && nodes.values().all(|entries| !entries.is_empty()));
        let _ = writeln!(text, "{name}");
        let mut mdev = false;
        for (node, entries) in nodes {
            for entry in entries {
                assert!(entry.id.bytes().all(|b| b.is_ascii_hexdigit() || b == b':'), "{}", entry.id);
                let _ = write!(text, "\tmap id={},node={node},path={}", entry.id, entry.path);
                if let Some(group) = entry.iommugroup {
                    let _ = write!(text, ",iommugroup={group}");
                }
                if let Some(id) = &entry.subsystem_id {
                    let _ = write!(text, ",subsystem-id={id}");
                }
                text.push('\n');
                mdev = entry.mdev;
            }
        }
        text.push_str(if mdev { "\tmdev 1\n\n" } else { "\n" });
    }
    if !is_lossy(&text) {
        assert_eq!(mappings::parse(text.as_bytes()), read);
    }
}

pub fn pci_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(id) = PciId::parse(text) else { return };
    assert!(id.function.is_none_or(|function| function < 16));
    assert_eq!(id.slot_name().parse::<SlotId>().ok(), id.slot());
    assert_eq!(PciId::parse(&id.to_string()), Some(id));
}

pub fn property(data: &[u8]) {
    const SCHEMA: &[Key] = &[
        Key::new("host", Shape::Text(|value| !value.contains(&b'!'))).bare(),
        Key::new("flag", Shape::Boolean),
        Key::new("n", Shape::Integer { minimum: -5 }),
        Key::new("any", Shape::Text(|_| true)),
    ];
    let name_is_fine = property::is_config_id(data);
    assert!(!name_is_fine || (data.len() > 1 && data.is_ascii()));
    match property::parse(SCHEMA, data) {
        Ok(values) => {
            assert!(values.integer("n").is_none_or(|n| n >= -5));
            assert_eq!(values.boolean("flag").is_some(), values.get("flag").is_some());
            let mut text = Vec::new();
            for name in ["any", "n", "flag", "host"] {
                if let Some(value) = values.get(name) {
                    assert!(!value.is_empty() && !value.contains(&b','));
                    text.extend_from_slice(&[name.as_bytes(), b"=", value, b","].concat());
                }
            }
            let again = property::parse(SCHEMA, &text).expect("what was read can be written and read again");
            for name in ["host", "flag", "n", "any"] {
                assert_eq!(again.get(name), values.get(name), "{name}");
            }
        }
        Err(error) => assert_one_line(&format!("{error:#}")),
    }
}
