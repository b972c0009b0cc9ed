//! The mutants, as `cargo mutants --list --json` tells them.

use serde_json::Value;
use std::fs;
use std::io;
use std::path::Path;

/// A line and a column, both from 1 on; columns are characters.
pub type Position = (usize, usize);

#[derive(Debug, Clone)]
pub struct Mutant {
    /// By which it is switched on, from 1 on.
    pub number: usize,
    pub file: String,
    pub genre: String,
    pub start: Position,
    pub end: Position,
    pub replacement: String,
    /// What the function returns, as it is written.
    pub returns: String,
    /// As cargo-mutants names it, without line and column, which change with every edit.
    pub name: String,
}

/// # Errors
/// When the list cannot be read, or is not one.
pub fn read(path: &Path) -> io::Result<Vec<Mutant>> {
    let list: Value = serde_json::from_slice(&fs::read(path)?)?;
    let mutants = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let read = mutants.iter().zip(1..).map(|(value, number)| mutant(value, number));
    read.collect::<Option<_>>().ok_or_else(|| io::Error::other("not what cargo mutants --list --json used to tell"))
}

fn mutant(value: &Value, number: usize) -> Option<Mutant> {
    let text = |key: &str| Some(value.get(key)?.as_str()?.to_string());
    let position = |which: &str| {
        let position = value.get("span")?.get(which)?;
        let part = |key: &str| usize::try_from(position.get(key)?.as_u64()?).ok();
        Some((part("line")?, part("column")?))
    };
    let (file, start) = (text("file")?, position("start")?);
    let name = text("name")?.replacen(&format!("{file}:{}:{}: ", start.0, start.1), &format!("{file}: "), 1);
    let returns = value.get("function").and_then(|function| function.get("return_type")).and_then(Value::as_str);
    Some(Mutant {
        number,
        genre: text("genre")?,
        end: position("end")?,
        replacement: text("replacement")?,
        returns: returns.unwrap_or_default().to_string(),
        file,
        start,
        name,
    })
}
