//! `gpu-handoff history`: past handoffs, a line each, the newest last. Reads only.

use super::zone::Zone;
use crate::gpu::inventory::VFIO_PCI;
use crate::handoff::kept::history::{Past, result};
use serde_json::Value;
use std::fmt::Write;

/// Only those of this VM, and the newest of them.
pub fn choose(past: &mut Past, vmid: Option<u32>, count: Option<usize>) {
    let is_of = |entry: &Value, vmid: u32| entry.get("vmid").and_then(Value::as_u64) == Some(vmid.into());
    past.entries.retain(|entry| vmid.is_none_or(|vmid| is_of(entry, vmid)));
    let older = past.entries.len().saturating_sub(count.unwrap_or(usize::MAX));
    past.entries.drain(..older);
}

/// One JSON object per line, as it is kept.
pub fn to_json(past: &Past) -> String {
    past.entries.iter().fold(String::new(), |text, entry| text + &format!("{entry}\n"))
}

pub fn to_text(past: &Past, zone: &Zone) -> String {
    let rows: Vec<[String; 6]> = past.entries.iter().map(|entry| row(entry, zone)).collect();
    if rows.is_empty() {
        return "no handoff yet\n".to_string();
    }
    let widths = rows.iter().fold([0; 6], |widths: [usize; 6], row| {
        let mut cells = row.iter().map(|cell| cell.chars().count());
        widths.map(|width| width.max(cells.next().unwrap_or(0)))
    });
    let mut text = String::new();
    for [time, way, slots, ms, result, reason] in &rows {
        let [a, b, c, d, e, _] = widths;
        let line = format!("{time:<a$}  {way:<b$}  {slots:<c$}  {ms:>d$} ms  {result:<e$}  {reason}");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn row(entry: &Value, zone: &Zone) -> [String; 6] {
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default().to_string();
    let slots = entry.get("slots").and_then(Value::as_array).into_iter().flatten();
    let slots: Vec<&str> = slots.filter_map(Value::as_str).collect();
    let slots = if slots.is_empty() { "-".to_string() } else { slots.join(" ") };
    let ms = entry.get("ms").and_then(Value::as_u64).unwrap_or(0).to_string();
    [zone.local(&text("time")), way(entry), slots, ms, result(entry).to_string(), text("reason")]
        .map(|cell| one_line(&cell))
}

/// `VM 111 -> host`
pub fn way(entry: &Value) -> String {
    let who = entry.get("vmid").and_then(Value::as_u64).map_or_else(|| VFIO_PCI.to_string(), |id| format!("VM {id}"));
    match entry.get("direction").and_then(Value::as_str) {
        Some("home") => format!("{who} -> host"),
        _ => format!("host -> {who}"),
    }
}

/// A reason may quote what others wrote.
fn one_line(cell: &str) -> String {
    cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn past() -> Past {
        let entries = vec![
            json!({"schema": 1, "time": "2026-11-20T12:00:00Z", "direction": "vfio", "vmid": 111,
                "slots": ["0000:01:00", "0000:02:00"], "exit": 0, "ms": 1318,
                "phases": [{"name": "check", "ms": 9}], "reason": null}),
            json!({"schema": 1, "time": "2026-11-20T13:00:00Z", "direction": "home", "vmid": null,
                "slots": ["0000:01:00"], "exit": 4, "ms": 60017, "phases": [], "reason": "is\nstranded"}),
            json!({"schema": 1, "direction": "vfio", "vmid": 9, "slots": [], "exit": 3, "more": 1}),
        ];
        Past { entries, problems: Vec::new() }
    }

    #[test]
    fn for_people() {
        assert_eq!(
            to_text(&past(), &Zone::default()),
            "2026-11-20T12:00:00Z  host -> VM 111    0000:01:00 0000:02:00   1318 ms  done\n\
             2026-11-20T13:00:00Z  vfio-pci -> host  0000:01:00             60017 ms  overrun  is?stranded\n                      \
             host -> VM 9      -                          0 ms  refused\n"
        );
        assert_eq!(to_text(&Past::default(), &Zone::default()), "no handoff yet\n");
    }

    #[test]
    fn only_some() {
        for (vmid, count, chosen) in [
            (None, None, &[0, 1, 2][..]),
            (None, Some(2), &[1, 2]),
            (None, Some(0), &[]),
            (None, Some(9), &[0, 1, 2]),
            (Some(111), None, &[0]),
            (Some(111), Some(1), &[0]),
            (Some(112), None, &[]),
        ] {
            let mut some = past();
            choose(&mut some, vmid, count);
            let expected: Vec<Value> = chosen.iter().map(|n| past().entries[*n].clone()).collect();
            assert_eq!(some.entries, expected, "{vmid:?} {count:?}");
        }
    }

    #[test]
    fn for_programs() {
        let text = to_json(&past());
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines, past().entries);
        assert_eq!(to_json(&Past::default()), "");
    }
}
