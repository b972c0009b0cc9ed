//! Patterns as udev and kmod match them: `*`, `?`, `[0-9]`, and several after `|`.

/// Whether any of several patterns fits.
pub fn any(patterns: &str, text: &str) -> bool {
    patterns.split('|').any(|pattern| fits(pattern.as_bytes(), text.as_bytes()))
}

pub fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => ends(text).any(|text| fits(rest, text)),
        [b'?', rest @ ..] => text.split_first().is_some_and(|(_, text)| fits(rest, text)),
        [b'[', rest @ ..] => {
            let end = rest.iter().skip(1).position(|byte| *byte == b']').map(|at| at + 1);
            let Some((set, [_, rest @ ..])) = end.map(|end| rest.split_at(end)) else { return false };
            text.split_first().is_some_and(|(byte, text)| is_in(set, *byte) && fits(rest, text))
        }
        [byte, rest @ ..] => text.split_first().is_some_and(|(first, text)| first == byte && fits(rest, text)),
    }
}

/// The text, and what is left of it after each byte more.
fn ends(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    (0..=text.len()).filter_map(|at| text.get(at..))
}

fn is_in(set: &[u8], byte: u8) -> bool {
    let (is_not, mut set) = match set {
        [b'!' | b'^', rest @ ..] => (true, rest),
        _ => (false, set),
    };
    let mut found = false;
    while let [one, rest @ ..] = set {
        (found, set) = match rest {
            [b'-', to, rest @ ..] => (found || (*one..=*to).contains(&byte), rest),
            _ => (found || *one == byte, rest),
        };
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
