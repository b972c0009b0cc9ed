//! A line of `/proc/PID/maps`, as far as it tells which file is mapped where.

/// A mapped file.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapped<'a> {
    start: u64,
    end: u64,
    /// Device number of the file system, inode and path: the same for every mapping of the file. They do not tell
    /// whether it is a device: the path is that of another namespace, a node can lie in any file system.
    pub file: &'a [u8],
}

impl<'a> Mapped<'a> {
    /// `7f12a0000000-7f12a0001000 rw-s 00000000 00:06 312    /dev/nvidia0`. None when no file is mapped there, or when
    /// it is no such line. What a path may contain decides nothing: a newline in it is written as `\012`.
    pub fn parse(line: &'a [u8]) -> Option<Mapped<'a>> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let (start, end) = std::str::from_utf8(fields.next()?).ok()?.split_once('-')?;
        let (start, end) = (address(start)?, address(end)?);
        let file = fields.nth(2)?;
        let inode = file.split(|byte| *byte == b' ').nth(1)?;
        (inode.iter().all(u8::is_ascii_digit) && inode.iter().any(|digit| *digit != b'0')).then_some(Mapped {
            start,
            end,
            file,
        })
    }

    /// Its name in `/proc/PID/map_files`: there addresses are not padded with zeros.
    pub fn name(&self) -> String {
        format!("{:x}-{:x}", self.start, self.end)
    }
}

fn address(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok().filter(|_| !text.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<(String, String)> {
        let mapped = Mapped::parse(line.as_bytes())?;
        Some((mapped.name(), String::from_utf8_lossy(mapped.file).into_owned()))
    }

    #[test]
    fn a_mapped_file() {
        for (line, name, file) in [
            (
                "7f12a0000000-7f12a0001000 rw-s 00000000 00:06 312                        /dev/nvidia0",
                "7f12a0000000-7f12a0001000",
                "00:06 312                        /dev/nvidia0",
            ),
            ("00400000-00401000 r-xp 00001000 fd:01 17 /bin/a b", "400000-401000", "fd:01 17 /bin/a b"),
            (
                "7f00-8000 rw-s 00000000 00:2e 9 /run/my\\012gpu (deleted)",
                "7f00-8000",
                "00:2e 9 /run/my\\012gpu (deleted)",
            ),
            ("7f00-8000 rw-s 00000000 00:01 2065 ", "7f00-8000", "00:01 2065 "),
            ("7f00-8000 rw-s 00000000 00:01 2065", "7f00-8000", "00:01 2065"),
            (
                "7f00-8000 rw-s 00000000 00:0f 10 anon_inode:[vfio-device]",
                "7f00-8000",
                "00:0f 10 anon_inode:[vfio-device]",
            ),
        ] {
            assert_eq!(parse(line), Some((name.to_string(), file.to_string())), "{line}");
        }
    }

    #[test]
    fn no_file() {
        for line in [
            "",
            " ",
            "7f00-8000",
            "7f00-8000 rw-p 00000000",
            "7f00-8000 rw-p 00000000 00:00",
            "7f00-8000 rw-p 00000000 00:00 0",
            "7f00-8000 rw-p 00000000 00:00 0 ",
            "55d0-56d0 rw-p 00000000 00:00 0                                  [heap]",
            "7f00 rw-s 00000000 00:06 312 /dev/nvidia0",
            "7f00-+8000 rw-s 00000000 00:06 312 /dev/nvidia0",
            "../../1-2 rw-s 00000000 00:06 312 /dev/nvidia0",
            "7f00-8000 rw-s 00000000 00:06 x /dev/nvidia0",
            "7f00-8000 rw-s 00000000 00:06  /dev/nvidia0",
            "10000000000000000-20000000000000000 rw-s 00000000 00:06 312 /dev/nvidia0",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
