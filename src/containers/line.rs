//! A line of a container's configuration that is ours, and where it stands. Pure.

use super::rules::{LineKind, Need};
use crate::proxmox::ct;
use crate::sorted;
use std::fmt;
use std::ops::Range;

/// As Proxmox itself writes it: `key: value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What it is for: [`Need::what`].
    pub what: String,
    pub key: String,
    pub value: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.value)
    }
}

impl Line {
    pub(super) fn kind(&self) -> Option<LineKind> {
        LineKind::of(&self.key)
    }

    pub(super) fn is_for(&self, need: &Need) -> bool {
        self.what == need.what && self.kind() == Some(need.kind)
    }

    fn is(&self, (key, value): (&[u8], &[u8])) -> bool {
        self.key.as_bytes() == key && self.value.as_bytes() == value
    }
}

/// Where each of these stands, without its newline. The last such line is ours: we write to the end.
pub(super) fn find(bytes: &[u8], wanted: &[&Line]) -> Vec<Option<Range<usize>>> {
    let mut found = vec![None; wanted.len()];
    for range in lines(ct::main_section(bytes)) {
        let Some(setting) = bytes.get(range.clone()).and_then(ct::setting) else { continue };
        for (place, _) in found.iter_mut().zip(wanted).filter(|(_, line)| line.is(setting)) {
            *place = Some(range.clone());
        }
    }
    found
}

/// The lines that stand there, each once, in the order of the file: where, and which of `wanted` it is.
pub(super) fn places(bytes: &[u8], wanted: &[&Line]) -> Vec<(Range<usize>, usize)> {
    let found = find(bytes, wanted).into_iter().enumerate();
    let mut places: Vec<(Range<usize>, usize)> = found.filter_map(|(at, range)| Some((range?, at))).collect();
    sorted::sort_by_key(&mut places, |(range, at)| (range.start, *at));
    places.dedup_by_key(|(range, _)| range.start);
    places
}

/// Those that are there.
pub fn present<'a>(bytes: &[u8], recorded: &'a [Line]) -> Vec<&'a Line> {
    let all: Vec<&Line> = recorded.iter().collect();
    all.iter().zip(find(bytes, &all)).filter(|(_, found)| found.is_some()).map(|(line, _)| *line).collect()
}

/// Each line of these bytes, without its newline.
pub(super) fn lines(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut begin = 0;
    bytes.split(|byte| *byte == b'\n').map(move |line| {
        let range = begin..begin + line.len();
        begin = range.end + 1;
        range
    })
}
