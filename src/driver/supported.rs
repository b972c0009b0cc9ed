//! NVIDIA's own list of the devices that a driver has, `supported-gpus.json`: newer installers carry it, and the GPUs that
//! the driver no longer has are in it with the branch that does.

use crate::sys::Kernel;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

const SH: &str = "/bin/sh";

/// Half a gigabyte is decompressed, up to where the list is.
const LIMIT: Duration = Duration::from_secs(180);

/// What the script that a file begins with, and what NVIDIA puts between that and the archive, fit into.
const HEAD: usize = 16 * 1024 * 1024;
/// Beginnings of archives, and what unpacks them.
const PACKERS: [(&[u8], &str); 4] = [
    (b"\xfd7zXZ\0", "/usr/bin/xz"),
    (b"\x28\xb5\x2f\xfd", "/usr/bin/zstd"),
    (b"\x1f\x8b\x08", "/usr/bin/gzip"),
    (b"BZh9", "/usr/bin/bzip2"),
];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// The newest branch that has it: `470.xx`. None when this driver does.
    pub legacy: Option<String>,
    pub open: bool,
}

/// By device id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List(pub BTreeMap<u16, Device>);

impl List {
    /// None when it is no such list, or an empty one.
    pub fn parse(bytes: &[u8]) -> Option<List> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let mut devices: BTreeMap<u16, Device> = BTreeMap::new();
        for chip in value.get("chips")?.as_array()? {
            let id = chip.get("devid")?.as_str()?;
            let id = u16::from_str_radix(id.trim_start_matches("0x").trim_start_matches("0X"), 16).ok()?;
            let features = chip.get("features").and_then(Value::as_array);
            let open = features.is_some_and(|all| all.iter().any(|one| one.as_str() == Some("kernelopen")));
            let legacy = chip.get("legacybranch").and_then(Value::as_str).map(str::to_string);
            // One id may be several cards: what one of them can, the id can.
            let device = devices.entry(id).or_insert_with(|| Device { legacy: legacy.clone(), open });
            device.open |= open;
            device.legacy = device.legacy.take().filter(|_| legacy.is_some());
        }
        (!devices.is_empty()).then_some(List(devices))
    }
}

/// What the list that an installer carries says of these device ids; none when it has no list, or cannot be looked into
/// here.
pub fn read(kernel: &dyn Kernel, installer: &str, ids: &[u16]) -> Option<List> {
    let file = kernel.path(installer);
    let (at, packer) = archive(&mut File::open(&file).ok()?)?;
    if ![packer, "/usr/bin/tar", "/usr/bin/tail"].iter().all(|program| kernel.exists(program)) {
        return None;
    }
    // A line for each device; one in any case, so that a list is told from none. The first such file is enough: without
    // that, all of the archive would be unpacked.
    let script = "exec 2>/dev/null; tail -c +\"$1\" -- \"$2\" | \"$3\" -dc | \
                  tar -xO --wildcards --occurrence=1 -f - '*supported-gpus.json' | tr -d '\\n' | tr '{' '\\n' | \
                  sed -n -e '0,/\"devid\"/{/\"devid\"/p}' -e \"$4\"";
    let wanted: Vec<String> = ids.iter().map(|id| format!("0x{id:04x}")).collect();
    let wanted = format!("/\"devid\" *: *\"\\({}\\)\"/Ip", wanted.join("\\|"));
    let (at, file, packer) = ((at + 1).to_string(), file.to_string_lossy(), kernel.path(packer));
    let arguments = ["-c", script, "sh", &at, &file, &packer.to_string_lossy(), &wanted];
    let said = kernel.program(SH, &arguments, LIMIT).ok()?;
    let entries: Vec<String> =
        said.lines().filter_map(|line| Some(format!("{{{}}}", line.split_once('}')?.0))).collect();
    List::parse(format!("{{\"chips\":[{}]}}", entries.join(",")).as_bytes())
}

/// Where the archive begins in an installer, and what unpacks it: after the lines that its script skips.
fn archive(file: &mut File) -> Option<(usize, &'static str)> {
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(HEAD as u64).read_to_end(&mut head).ok()?;
    archive_in(&head)
}

/// Pure.
fn archive_in(head: &[u8]) -> Option<(usize, &'static str)> {
    let at_line = skipped(head).and_then(|lines| {
        let mut ends = head.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        ends.nth(lines.checked_sub(2)?).map(|(at, _)| at + 1)
    })?;
    // Some have a program to unpack it, or signatures, before it.
    let rest = head.get(at_line..)?;
    let starts = PACKERS.iter().filter_map(|(magic, program)| {
        let at = rest.windows(magic.len()).position(|window| window == *magic)?;
        Some((at_line + at, *program))
    });
    starts.min_by_key(|(at, _)| *at)
}

/// `skip="1101"`: the number of the line that the archive begins with.
fn skipped(head: &[u8]) -> Option<usize> {
    head.split(|byte| *byte == b'\n').take(2000).find_map(|line| {
        let value = std::str::from_utf8(line).ok()?.strip_prefix("skip=")?;
        value.trim_matches(['"', '\'']).parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidias_list() {
        let list = List::parse(
            br#"{"chips":[
                {"devid":"0x2684","name":"NVIDIA GeForce RTX 4090","features":["dpycbob","kernelopen"]},
                {"devid":"0x1B80","name":"NVIDIA GeForce GTX 1080","features":["dpycbob"]},
                {"devid":"0x0FC6","name":"GeForce GTX 650","legacybranch":"470.xx","features":[]},
                {"devid":"0x1287","subdevid":"0x1","name":"a","legacybranch":"470.xx"},
                {"devid":"0x1287","name":"b"}]}"#,
        )
        .unwrap();
        assert_eq!(list.0[&0x2684], Device { legacy: None, open: true });
        assert_eq!(list.0[&0x1b80], Device { legacy: None, open: false });
        assert_eq!(list.0[&0x0fc6].legacy.as_deref(), Some("470.xx"));
        assert_eq!(list.0[&0x1287].legacy, None);
        for wrong in ["", "{}", r#"{"chips":[]}"#, r#"{"chips":[{"devid":4}]}"#] {
            assert_eq!(List::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn where_an_archive_begins() {
        let head = |skip: &str, rest: &[u8]| [b"#!/bin/sh\nskip=\"", skip.as_bytes(), b"\"\nexit 0\n", rest].concat();
        assert_eq!(archive_in(&head("4", b"\x1f\x8b\x08\0")), Some((26, "/usr/bin/gzip")));
        assert_eq!(archive_in(&head("4", b"xx\xfd7zXZ\0\0")), Some((28, "/usr/bin/xz")));
        assert_eq!(archive_in(&head("4", b"nothing")), None);
        assert_eq!(archive_in(&head("9", b"\x1f\x8b\x08\0")), None);
        assert_eq!(archive_in(b"#!/bin/sh\n\x1f\x8b\x08\0"), None);
    }
}
