//! What set-up keeps in `/var/lib/gpu-handoff`: JSON documents of our own, replaced whole.

use crate::json::put;
use crate::sys::Kernel;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::ErrorKind;

const SCHEMA: u64 = 1;

/// # Errors
/// Names the file when it cannot be read, is no document, or is one that this version does not know.
pub fn read(kernel: &dyn Kernel, path: &'static str) -> Result<Option<Value>> {
    match kernel.read(path) {
        Ok(bytes) => parse(&bytes).map(Some).context(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(path),
    }
}

/// # Errors
/// When the text is no document, or one of a schema that this version does not know.
pub fn parse(bytes: &[u8]) -> Result<Value> {
    let value: Value = serde_json::from_slice(bytes)?;
    match value.get("schema").and_then(Value::as_u64) {
        Some(SCHEMA) => Ok(value),
        Some(schema) => bail!("schema {schema}: written by a newer gpu-handoff; install that version again"),
        None => bail!("schema: not a number"),
    }
}

/// # Errors
/// Names the file that could not be written; the old one is still whole.
pub fn write(kernel: &dyn Kernel, path: &'static str, mut value: Value) -> Result<()> {
    put(&mut value, "schema", SCHEMA);
    kernel.write_file(path, format!("{value}\n").as_bytes(), 0o644).context(path)
}

/// # Errors
/// Names the file that could not be removed.
pub fn remove(kernel: &dyn Kernel, path: &'static str) -> Result<()> {
    kernel.remove_file(path).context(path)
}

/// The strings of a list; none when there is no list.
///
/// # Errors
/// Names the key when something else is there.
pub fn strings(value: &Value, key: &str) -> Result<Vec<String>> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            { items.iter().map(|item| item.as_str().map(str::to_string)).collect::<Option<_>>() }
                .with_context(|| format!("{key}: not a list of strings"))
        }
        Some(_) => bail!("{key}: not a list of strings"),
    }
}

/// # Errors
/// Names the key when something else than a string or null is there.
pub fn string(value: &Value, key: &str) -> Result<Option<String>> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => bail!("{key}: not a string"),
    }
}
