//! `gpu-handoff config show`: what holds, and who says so. Reads only.

use crate::config::PATH;
use crate::story::printable;
use serde_json::Value;

pub fn to_text(keys: &[(String, Value, bool)]) -> String {
    let line = |(key, value, is_said): &(String, Value, bool)| {
        let value = value.as_str().map_or_else(|| value.to_string(), printable);
        format!("{key:<24} {value:<12} {}\n", if *is_said { PATH } else { "default" })
    };
    keys.iter().map(line).collect()
}
