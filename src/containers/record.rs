//! What of a container's configuration is ours: `/var/lib/gpu-handoff/containers/ID.json`.
//!
//! Not in `/run`: what stands in the configuration outlives a reboot. Written before the configuration is, so that no
//! line of ours is ever there without being on record; a line on record that is not there does no harm.

use super::Style;
use super::line::Line;
use super::rules::LineKind;
use crate::address::{self, SlotId};
use crate::json::put;
use crate::sorted;
use crate::sys::Kernel;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::ErrorKind;

const SCHEMA: u64 = 1;

const DIRECTORY: &str = "/var/lib/gpu-handoff/containers";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub style: Style,
    pub slots: Vec<SlotId>,
    pub dri: bool,
    pub lines: Vec<Line>,
    /// The file did not end with a newline, and got one.
    pub newline: bool,
    /// The configuration is being written: some of these lines are not there yet, or any more.
    pub unfinished: bool,
}

pub fn path(ctid: u32) -> String {
    format!("{DIRECTORY}/{ctid}.json")
}

/// Every container with a record, sorted.
pub fn all(kernel: &dyn Kernel) -> Vec<u32> {
    let names = kernel.list(DIRECTORY);
    let mut ids: Vec<u32> = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
    sorted::sort(&mut ids);
    ids
}

/// # Errors
/// Names the file when it cannot be read or understood.
pub fn read(kernel: &dyn Kernel, ctid: u32) -> Result<Option<Attachment>> {
    let path = path(ctid);
    match kernel.read(&path) {
        Ok(bytes) => Attachment::parse(&bytes).map(Some).context(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(path),
    }
}

/// # Errors
/// Names the file that could not be written; the old one is still whole.
pub fn write(kernel: &dyn Kernel, ctid: u32, record: &Attachment) -> Result<()> {
    let path = path(ctid);
    kernel.write_file(&path, record.to_json().as_bytes(), 0o644).context(path)
}

/// # Errors
/// Names the file that could not be removed.
pub fn remove(kernel: &dyn Kernel, ctid: u32) -> Result<()> {
    let path = path(ctid);
    kernel.remove_file(&path).context(path)
}

impl Attachment {
    pub fn to_json(&self) -> String {
        let lines: Vec<Value> =
            self.lines.iter().map(|line| json!({"for": line.what, "line": line.to_string()})).collect();
        let mut document = json!({
            "schema": SCHEMA,
            "style": style_word(self.style),
            "slots": address::to_json(&self.slots),
            "dri": self.dri,
            "lines": lines,
            "newline": self.newline,
        });
        if self.unfinished {
            put(&mut document, "unfinished", true);
        }
        format!("{document}\n")
    }

    /// # Errors
    /// When the text is not a record, or one of a schema that this version does not know.
    pub fn parse(bytes: &[u8]) -> Result<Attachment> {
        let value: Value = serde_json::from_slice(bytes)?;
        match value.get("schema").and_then(Value::as_u64) {
            Some(SCHEMA) => {}
            Some(schema) => bail!("schema {schema}: written by a newer gpu-handoff; install that version again"),
            None => bail!("schema: not a number"),
        }
        let style = text(&value, "style")?;
        let style = [Style::Mount, Style::Dev].into_iter().find(|known| style_word(*known) == style);
        let list = |name: &str| value.get(name).and_then(Value::as_array).with_context(|| format!("{name}: no list"));
        let slots = value.get("slots").context("slots: no list")?;
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).with_context(|| format!("{name}: not a flag"));
        Ok(Attachment {
            style: style.context("style: neither mount nor dev")?,
            slots: address::from_json(slots).with_context(|| format!("slots: {slots} is no list of slots"))?,
            dri: flag("dri")?,
            lines: list("lines")?.iter().map(parse_line).collect::<Result<_>>()?,
            newline: flag("newline")?,
            unfinished: value.get("unfinished").and_then(Value::as_bool).unwrap_or(false),
        })
    }
}

/// Only what this program writes: a line that is taken out of somebody's configuration must be one.
fn parse_line(value: &Value) -> Result<Line> {
    let (what, line) = (text(value, "for")?, text(value, "line")?);
    let (key, value) = line.split_once(": ").unwrap_or_default();
    let is_plain = !value.is_empty() && value.trim() == value && !value.contains(char::is_control);
    if LineKind::of(key).is_none() || !is_plain {
        bail!("line: {line:?} is not understood");
    }
    Ok(Line { what: what.to_string(), key: key.to_string(), value: value.to_string() })
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value.get(name).and_then(Value::as_str).with_context(|| format!("{name}: not a string"))
}

pub fn style_word(style: Style) -> &'static str {
    match style {
        Style::Mount => "mount",
        Style::Dev => "dev",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Attachment {
        let line = |what: &str, key: &str, value: &str| Line {
            what: what.to_string(),
            key: key.to_string(),
            value: value.to_string(),
        };
        Attachment {
            style: Style::Mount,
            slots: vec!["0000:01:00".parse().unwrap()],
            dri: true,
            lines: vec![
                line("nvidia", "lxc.cgroup2.devices.allow", "c 195:* rwm"),
                line("nvidiactl", "dev3", "/dev/nvidiactl,mode=0666"),
            ],
            newline: true,
            unfinished: true,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(Attachment::parse(record().to_json().as_bytes()).unwrap(), record());
    }

    #[test]
    fn what_is_not_understood_is_refused_and_named() {
        let problem = |text: &str| format!("{:#}", Attachment::parse(text.as_bytes()).unwrap_err());
        let json = record().to_json();
        assert!(problem(&json.replace(r#""schema":1"#, r#""schema":2"#)).starts_with("schema 2: written by a newer"));
        assert!(problem(&json.replace("mount\"", "glue\"")).contains("style: neither"));
        for (ours, odd) in [
            ("dev3: ", "rootfs: "),
            ("dev3: ", "dev3:"),
            ("c 195:* rwm", ""),
            ("c 195:* rwm", "c 195:* rwm\\ntemplate: 1"),
            ("c 195:* rwm", " c 195:* rwm"),
        ] {
            assert!(problem(&json.replace(ours, odd)).contains("is not understood"), "{odd}");
        }
        assert!(problem("{}").contains("schema"));
        assert!(problem("").contains("EOF"));
    }
}
