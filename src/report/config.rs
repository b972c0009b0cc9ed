//! `gpu-handoff config show`: what holds, and who says so. Reads only.

use crate::config::Holding;
use crate::story::printable;

pub fn to_text(keys: &[Holding]) -> String {
    let line = |(key, value, who_says): &Holding| {
        let value = value.as_str().map_or_else(|| value.to_string(), printable);
        format!("{key:<24} {value:<12} {}\n", who_says.unwrap_or("default"))
    };
    keys.iter().map(line).collect()
}
