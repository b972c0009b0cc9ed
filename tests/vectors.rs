//! Checks the parsers against what Proxmox VE's own parsers made of the same files.
//!
//! The folder is `tests/fixtures/vectors`, or the one that the environment variable VECTORS names.

#![allow(
    clippy::disallowed_methods,
    clippy::too_many_lines,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr
)]

use gpu_handoff::containers::Style;
use gpu_handoff::containers::edit::Change;
use gpu_handoff::containers::rules::{Facts, Gpu, Need, needs};
use gpu_handoff::proxmox::{ct, mapping, vm};
use gpu_handoff::sys::DeviceNumber;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

/// One kind of file: its folder there, how its names end, how we read it, and what must come of editing it.
struct Kind {
    folder: &'static str,
    ending: &'static str,
    read: fn(&[u8]) -> Outcome,
    edit: fn(&[u8]) -> Vec<String>,
}

const KINDS: &[Kind] = &[
    Kind { folder: "vm", ending: "conf", read: read_vm, edit: |_| Vec::new() },
    Kind { folder: "ct", ending: "conf", read: read_ct, edit: edit_ct },
    Kind { folder: "mapping", ending: "cfg", read: read_mapping, edit: |_| Vec::new() },
];

/// What we made of a file.
struct Outcome {
    /// To be compared, field by field, with the fields of the same names in the expectation.
    fields: Map<String, Value>,
    /// Whether the expectation may not have other fields than these.
    complete: bool,
    /// How many warnings we gave, where Proxmox's were counted.
    warnings: Option<usize>,
}

fn main() -> ExitCode {
    let root = env::var_os("VECTORS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vectors"), PathBuf::from);
    let (mut checked, mut failed) = (0, 0);
    for kind in KINDS {
        let tally = kind.check(&root.join(kind.folder));
        println!("vectors: {} {} files checked, {} disagree{}", kind.folder, tally.files, tally.failed, tally.note());
        checked += tally.files;
        failed += tally.failed;
    }
    if checked == 0 {
        println!("vectors: no file found in {}", root.display());
        failed += 1;
    }
    println!("vectors: {} passed, {failed} failed", checked.saturating_sub(failed));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(Default)]
struct Tally {
    files: usize,
    failed: usize,
    warnings_counted: usize,
    warnings_agree: usize,
}

impl Tally {
    /// We leave complaints about other people's lines to Proxmox, so this only informs.
    fn note(&self) -> String {
        match self.warnings_counted {
            0 => String::new(),
            counted => format!(" (as many warnings as Proxmox in {} of {counted})", self.warnings_agree),
        }
    }
}

impl Kind {
    fn check(&self, folder: &Path) -> Tally {
        let mut tally = Tally::default();
        let inputs = match self.inputs(folder) {
            Ok(inputs) => inputs,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return tally,
            Err(error) => {
                println!("{}: {error}", folder.display());
                tally.failed += 1;
                return tally;
            }
        };
        for input in inputs {
            tally.files += 1;
            let complaints = self.check_file(&input, &mut tally).unwrap_or_else(|error| vec![error]);
            tally.failed += usize::from(!complaints.is_empty());
            for complaint in complaints {
                println!("{}: {complaint}", input.display());
            }
        }
        tally
    }

    fn inputs(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let mut inputs = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == self.ending) {
                inputs.push(path);
            }
        }
        inputs.sort();
        Ok(inputs)
    }

    fn check_file(&self, input: &Path, tally: &mut Tally) -> Result<Vec<String>, String> {
        let bytes = fs::read(input).map_err(|error| error.to_string())?;
        let expectation = input.with_extension("json");
        let expected = fs::read(&expectation)
            .map_err(|error| error.to_string())
            .and_then(|bytes| serde_json::from_slice::<Map<_, _>>(&bytes).map_err(|error| error.to_string()))
            .map_err(|error| format!("{}: {error}", expectation.display()))?;

        let got = (self.read)(&bytes);
        if let Some(warnings) = got.warnings {
            tally.warnings_counted += 1;
            tally.warnings_agree += usize::from(expected.get("warnings") == Some(&json!(warnings)));
        }
        let mut complaints = got.differences(&expected);
        complaints.extend((self.edit)(&bytes));
        Ok(complaints)
    }
}

impl Outcome {
    fn differences(&self, expected: &Map<String, Value>) -> Vec<String> {
        let unknown = expected.keys().filter(|field| self.complete && !self.fields.contains_key(*field));
        self.fields
            .keys()
            .chain(unknown)
            .filter(|field| self.fields.get(*field) != expected.get(*field))
            .map(|field| {
                let show = |value: Option<&Value>| value.map_or("nothing".into(), Value::to_string);
                let (want, got) = (show(expected.get(field)), show(self.fields.get(field)));
                format!("{field}\n  expected {want}\n  got      {got}")
            })
            .collect()
    }
}

fn read_vm(bytes: &[u8]) -> Outcome {
    let config = vm::parse(bytes);
    let hostpci = config.hostpci.iter().map(|(index, line)| {
        let driver = match line.driver {
            vm::Driver::Vfio => "vfio",
            vm::Driver::Keep => "keep",
        };
        let ids: Vec<&str> = line.ids.iter().map(|id| id.text.as_str()).collect();
        let value = json!({
            "raw": line.raw, "ids": ids, "mapping": line.mapping, "driver": driver, "mdev": line.mdev,
        });
        (index.to_string(), value)
    });
    Outcome {
        fields: fields([
            ("hostpci", Value::Object(hostpci.collect())),
            ("lock", json!(config.lock)),
            ("hookscript", json!(config.hookscript)),
            ("template", json!(config.template)),
        ]),
        complete: false,
        warnings: Some(config.warnings.len()),
    }
}

fn read_ct(bytes: &[u8]) -> Outcome {
    let config = ct::parse(bytes);
    let dev = config.dev.iter().map(|(digits, dev)| {
        let device = dev.device.as_ref();
        let value = json!({
            "raw": dev.raw,
            "valid": device.is_some(),
            "path": device.map(|device| &device.path),
            "mode": device.and_then(|device| device.mode.as_ref()),
            "uid": device.and_then(|device| device.uid),
            "gid": device.and_then(|device| device.gid),
            "deny_write": device.is_some_and(|device| device.deny_write),
        });
        (digits.clone(), value)
    });
    Outcome {
        fields: fields([
            ("dev", Value::Object(dev.collect())),
            ("devices_allow", config.devices_allow().collect()),
            ("mount_entries", config.mount_entries().collect()),
            ("raw_lxc_in_order", json!(config.raw_lxc)),
            ("unprivileged", json!(config.unprivileged)),
            ("template", json!(config.template)),
            ("lock", json!(config.lock)),
            ("hookscript", json!(config.hookscript)),
        ]),
        complete: false,
        warnings: None,
    }
}

/// After attach only what was added differs, and after detach nothing does. By the edit itself: a lock or a template,
/// which attach refuses, changes nothing about that.
fn edit_ct(bytes: &[u8]) -> Vec<String> {
    let styles = [(Style::Mount, false), (Style::Mount, true), (Style::Dev, false), (Style::Dev, true)];
    styles.into_iter().flat_map(|(style, dri)| edited(bytes, style, &needs(&facts(), style, dri))).collect()
}

fn edited(bytes: &[u8], style: Style, needs: &[Need]) -> Vec<String> {
    let Ok(change) = Change::attach(bytes, &[], needs) else { return vec![format!("{style:?}: too many devices")] };
    let text = String::from_utf8_lossy(bytes);
    let (attached, newline) = change.apply(bytes, false);
    let (detached, _) = Change::detach(&attached, &change.ours).apply(&attached, newline);
    let mut complaints = Vec::new();
    let mut check = |is_so: bool, what: &str| {
        if !is_so {
            complaints.push(format!("{style:?}: {what}"));
        }
    };
    check(detached == bytes, "other bytes after attach and detach");
    // A node that the file gives already, by itself or with its directory, is not given again.
    let names = |path: &str| text.contains(&format!("entry: {path} ")) || text.contains(&format!(": {path}\n"));
    let is_there = |path: String| names(&path) || path.rsplit_once('/').is_some_and(|(directory, _)| names(directory));
    let is_all_there = needs.iter().filter_map(Need::path).all(is_there);
    check(attached.len() > bytes.len() || is_all_there, "nothing was added");
    let again = Change::attach(&attached, &change.ours, needs);
    check(again.is_ok_and(|again| again.is_nothing()), "attached twice is not attached once");
    let fields = |bytes: &[u8]| read_ct(bytes).fields;
    let (mut expected, got) = (fields(bytes), fields(&attached));
    for line in &change.ours {
        let value = json!(line.value);
        match line.key.as_str() {
            "lxc.cgroup2.devices.allow" => push(&mut expected, "devices_allow", value),
            "lxc.mount.entry" => push(&mut expected, "mount_entries", value),
            // Checked to be a device; what else stands there is as the parser reads it.
            dev => {
                let number = dev.trim_start_matches("dev");
                let new = got["dev"].get(number).cloned().unwrap_or_default();
                check(new["valid"] == json!(true) && new["raw"] == value, "a device that cannot be read");
                check(expected["dev"].get(number).is_none(), "a device that was there before");
                expected["dev"][number] = new;
            }
        }
        if line.key.starts_with("lxc.") {
            push(&mut expected, "raw_lxc_in_order", json!([line.key, line.value]));
        }
    }
    for (field, value) in &got {
        check(expected[field] == *value, &format!("{field} is {value} after attach"));
    }
    complaints
}

fn push(fields: &mut Map<String, Value>, name: &str, value: Value) {
    fields[name].as_array_mut().expect("a list").push(value);
}

/// A host with one card, and numbers that no vector uses.
fn facts() -> Facts {
    let drm = vec![("card7".to_string(), DeviceNumber { major: 226, minor: 7 })];
    let gpus = vec![Gpu { slot: "0000:01:00".parse().expect("a slot"), minor: 0, drm }];
    let caps = Some((237, vec!["nvidia-cap1".to_string()]));
    Facts { gpus, are_all: true, uvm: Some(499), has_modeset: true, caps, mode: 0o666 }
}

fn read_mapping(bytes: &[u8]) -> Outcome {
    let entry = |entry: mapping::Entry| {
        json!({
            "path": entry.path, "id": entry.id, "iommugroup": entry.iommugroup, "mdev": entry.mdev,
        })
    };
    let mappings = mapping::parse(bytes).into_iter().map(|(name, nodes)| {
        let nodes = nodes.into_iter().map(|(node, entries)| (node, entries.into_iter().map(entry).collect::<Value>()));
        (name, Value::Object(nodes.collect()))
    });
    Outcome { fields: mappings.collect(), complete: true, warnings: None }
}

fn fields<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
}
