//! Patterns as udev and kmod match them: `*`, `?`, `[0-9]`, and several after `|`.

/// Whether any of several patterns fits.
pub fn any(patterns: &str, text: &str) -> bool {
    patterns.split('|').any(|pattern| fits(pattern.as_bytes(), text.as_bytes()))
}

pub fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => (0..=text.len()).any(|at| fits(rest, &text[at..])),
        [b'?', rest @ ..] => !text.is_empty() && fits(rest, &text[1..]),
        [b'[', rest @ ..] => {
            let Some(end) = rest.iter().skip(1).position(|byte| *byte == b']').map(|at| at + 1) else { return false };
            let (set, rest) = (&rest[..end], &rest[end + 1..]);
            text.split_first().is_some_and(|(byte, text)| is_in(set, *byte) && fits(rest, text))
        }
        [byte, rest @ ..] => text.first() == Some(byte) && fits(rest, &text[1..]),
    }
}

fn is_in(set: &[u8], byte: u8) -> bool {
    let (is_not, set) = match set {
        [b'!' | b'^', rest @ ..] => (true, rest),
        _ => (false, set),
    };
    let mut at = 0;
    let mut found = false;
    while at < set.len() {
        if let [from, b'-', to, ..] = set[at..] {
            found |= (from..=to).contains(&byte);
            at += 3;
        } else {
            found |= set[at] == byte;
            at += 1;
        }
    }
    found != is_not
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, is_fit) in [
            ("0x03[0-9]*", "0x030000", true),
            ("0x03[0-9]*", "0x040300", false),
            ("0x0300??|0x0302??", "0x030200", true),
            ("0000:01:00.*", "0000:01:00.1", true),
            ("[!a]b", "cb", true),
            ("[!a]b", "ab", false),
            ("*", "", true),
            ("a[", "a", false),
            ("", "", true),
        ] {
            assert_eq!(any(pattern, text), is_fit, "{pattern} {text}");
        }
    }
}
