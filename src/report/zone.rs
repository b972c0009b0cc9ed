//! The host's time zone, so that the table of past handoffs reads like Proxmox's task log. Here by hand, for glibc's own
//! brings half of its character sets along.

use crate::utc::{unix_time, utc};
use std::fs;
use std::path::{Path, PathBuf};

/// What `/etc/localtime` has, a file as in tzfile(5); empty where it is UTC or not understood.
#[derive(Default)]
pub struct Zone(pub Vec<u8>);

impl Zone {
    /// `named` is what TZ says; `path` puts a path below whatever root there is.
    pub fn read(named: Option<&str>, path: impl Fn(&str) -> PathBuf) -> Zone {
        let read = |file: &Path| fs::read(file).map(Zone).unwrap_or_default();
        match named.map(|name| name.trim_start_matches(':')).filter(|name| !name.is_empty()) {
            Some(name) => read(&path(&format!("/usr/share/zoneinfo/{name}"))),
            None => read(&path("/etc/localtime")),
        }
    }

    /// `2026-11-20 13:00:00`; a time in UTC keeps its Z.
    pub fn local(&self, time: &str) -> String {
        let local = || {
            let seconds = unix_time(time)?;
            let local = utc(seconds.checked_add_signed(self.offset(seconds)?)?);
            Some(local.trim_end_matches('Z').replace('T', " "))
        };
        local().unwrap_or_else(|| time.to_string())
    }

    /// East of Greenwich, in seconds.
    fn offset(&self, at: u64) -> Option<i64> {
        let number = |at: usize| Some(u32::from_be_bytes(*self.0.get(at..)?.first_chunk()?));
        let counts = |header: usize| {
            let counts: Option<Vec<usize>> = (0..6).map(|n| Some(number(header + 20 + 4 * n)? as usize)).collect();
            counts.filter(|_| self.0.get(header..).is_some_and(|rest| rest.starts_with(b"TZif")))
        };
        // What comes first is for those who know times of 32 bits only.
        let [universal, standard, leaps, times, kinds, letters] = counts(0)?[..] else { return None };
        let header = 44 + 5 * times + 6 * kinds + letters + 8 * leaps + standard + universal;
        let times = *counts(header)?.get(3)?;
        let first = header + 44;
        let begins = |n: usize| Some(i64::from_be_bytes(*self.0.get(first + 8 * n..)?.first_chunk()?));
        let begun = (0..times).take_while(|n| begins(*n).is_some_and(|begin| begin <= at as i64)).count();
        // After the last change that is listed a rule at the end goes on, which is not read here. Debian lists all to 2037.
        let rule = self.0.iter().rev().skip(1).take_while(|byte| **byte != b'\n');
        if begun == times && rule.filter(|byte| **byte == b',').count() > 0 {
            return None;
        }
        let kind = if begun == 0 { 0 } else { *self.0.get(first + 8 * times + begun - 1)? };
        Some(i64::from(number(first + 9 * times + 6 * usize::from(kind))? as i32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As zic makes it: UTC+1, and UTC+2 from one moment to another.
    fn zone(rule: &str) -> Zone {
        let mut file = Vec::new();
        for (width, times) in [(4, 0_u32), (8, 2)] {
            file.extend(*b"TZif2");
            file.extend([0; 15]);
            for count in [0, 0, 0, times, 2, 8] {
                file.extend(u32::to_be_bytes(count));
            }
            for time in [1_774_746_000_u64, 1_792_890_000].iter().take(times as usize) {
                file.extend(&time.to_be_bytes()[8 - width..]);
            }
            file.extend(&[1, 0][..times as usize]);
            for (offset, index) in [(3600_u32, 0), (7200, 4)] {
                file.extend(offset.to_be_bytes());
                file.extend([u8::from(index > 0), index]);
            }
            file.extend(*b"CET\0CES\0");
        }
        file.extend(format!("\n{rule}\n").bytes());
        Zone(file)
    }

    #[test]
    fn winter_and_summer() {
        let berlin = zone("CET-1");
        for (time, local) in [
            ("2026-03-29T00:59:59Z", "2026-03-29 01:59:59"),
            ("2026-03-29T01:00:00Z", "2026-03-29 03:00:00"),
            ("2026-10-25T00:59:59Z", "2026-10-25 02:59:59"),
            ("2026-10-25T01:00:00Z", "2026-10-25 02:00:00"),
            ("2026-12-31T23:30:00Z", "2027-01-01 00:30:00"),
        ] {
            assert_eq!(berlin.local(time), local);
        }
        // What comes after the last change is not known then.
        let rule = zone("CET-1CEST,M3.5.0,M10.5.0/3");
        assert_eq!(rule.local("2026-10-25T00:59:59Z"), "2026-10-25 02:59:59");
        assert_eq!(rule.local("2026-10-25T01:00:00Z"), "2026-10-25T01:00:00Z");
    }

    #[test]
    fn what_is_no_time_and_no_zone() {
        for time in ["", "yesterday", "2026-11-20", "2026-11-20T12:00:00+01:00", "0000-01-01T00:00:00Z"] {
            assert_eq!(zone("CET-1").local(time), time);
        }
        for length in [0, 4, 44, 100, 110, 126] {
            let Zone(file) = zone("CET-1");
            let time = "2026-11-20T12:00:00Z";
            assert_eq!(Zone(file[..length].to_vec()).local(time), time, "{length}");
        }
        assert_eq!(Zone(vec![0xff; 400]).local("2026-11-20T12:00:00Z"), "2026-11-20T12:00:00Z");
    }

    #[test]
    fn there_and_back() {
        for seconds in [0, 951_782_399, 951_782_400, 1_709_164_800, 1_795_176_000, 4_107_542_399] {
            assert_eq!(super::unix_time(&utc(seconds)), Some(seconds));
        }
    }
}
