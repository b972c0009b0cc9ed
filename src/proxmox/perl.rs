//! What Perl makes of bytes, as far as Proxmox's parsers rely on it.
//!
//! Their strings are undecoded, so `\s`, `\d` and `/i` know ASCII only: a no-break space is an
//! ordinary character.

/// `\s`. Unlike [`u8::is_ascii_whitespace`] it includes the vertical tab.
pub fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

/// Lines with their numbers, from 1. Empty lines at the end, which Perl's `split` drops, mean
/// nothing in any of the formats.
pub fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    (1..).zip(bytes.split(|&byte| byte == b'\n'))
}

/// What stands before and after the first such byte.
pub fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    match bytes.split_at_checked(bytes.iter().position(|byte| *byte == at)?)? {
        (before, [_, after @ ..]) => Some((before, after)),
        _ => None,
    }
}

pub fn trim_start(bytes: &[u8]) -> &[u8] {
    let is_kept = |byte: &u8| !is_space(byte);
    bytes.iter().position(is_kept).and_then(|start| bytes.get(start..)).unwrap_or_default()
}

pub fn trim_end(bytes: &[u8]) -> &[u8] {
    let is_kept = |byte: &u8| !is_space(byte);
    bytes.iter().rposition(is_kept).and_then(|last| bytes.get(..=last)).unwrap_or_default()
}

pub fn trim(bytes: &[u8]) -> &[u8] {
    trim_end(trim_start(bytes))
}

/// Keeps what can be kept of bytes that are not UTF-8: only free text can hold such bytes.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The bytes as they can stand in a message: on one line, without control characters, not endless.
pub fn quoted(bytes: &[u8]) -> String {
    const ENOUGH: usize = 80;
    let (shown, more) = match bytes.get(..ENOUGH) {
        Some(start) if bytes.len() > ENOUGH => (start, "…"),
        _ => (bytes, ""),
    };
    format!("'{}{more}'", text(shown).escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_are_perls() {
        assert_eq!(trim(b" \t\x0b\x0c\r\nx y\x0b "), b"x y");
        assert_eq!(trim(b"\xa0x\x85"), b"\xa0x\x85");
        assert_eq!(trim(b" \t"), b"");
    }

    #[test]
    fn messages_stay_on_one_line() {
        assert_eq!(quoted(b"a\x1b[1m\rb"), "'a\\u{1b}[1m\\rb'");
        assert!(quoted(&[b'x'; 5000]).len() < 100);
    }
}
