//! Property strings, `key=value,key=value` with at most one key that may be left out, as read by
//! `PVE::JSONSchema::parse_property_string`. What keys there are is the caller's schema.

use super::perl::{self, quoted};
use anyhow::{Context, Result, bail, ensure};

/// One key of a schema; a schema is a slice of them.
#[derive(Clone, Copy)]
pub struct Key {
    name: &'static str,
    kind: Shape,
    bare: bool,
    required: bool,
}

/// What a value must look like.
#[derive(Clone, Copy)]
pub enum Shape {
    /// 1, on, yes, true, 0, off, no or false, in any case.
    Boolean,
    Integer {
        minimum: i64,
    },
    /// Whatever the function accepts.
    Text(fn(&[u8]) -> bool),
}

impl Key {
    pub const fn new(name: &'static str, kind: Shape) -> Key {
        Key { name, kind, bare: false, required: false }
    }

    /// Makes this the key that may be left out, in any position of the string.
    pub const fn bare(self) -> Key {
        Key { bare: true, ..self }
    }

    pub const fn required(self) -> Key {
        Key { required: true, ..self }
    }

    fn accepts(&self, value: &[u8]) -> bool {
        match self.kind {
            Shape::Boolean => boolean(value).is_some(),
            Shape::Integer { minimum } => integer(value).is_some_and(|number| number >= minimum),
            Shape::Text(accepts) => accepts(value),
        }
    }
}

/// The values of a property string that its schema accepted.
#[derive(Debug)]
pub struct Values<'a>(Vec<(&'static str, &'a [u8])>);

impl<'a> Values<'a> {
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.0.iter().find(|(key, _)| *key == name).map(|&(_, value)| value)
    }

    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(perl::text)
    }

    pub fn boolean(&self, name: &str) -> Option<bool> {
        self.get(name).and_then(boolean)
    }

    pub fn integer(&self, name: &str) -> Option<i64> {
        self.get(name).and_then(integer)
    }
}

/// Reads a property string, which is part of one line. Refused as a whole if any part is refused.
pub fn parse<'a>(schema: &[Key], string: &'a [u8]) -> Result<Values<'a>> {
    let mut values = Values(Vec::with_capacity(schema.len()));
    let mut bare_seen = false;

    for part in string.split(|&byte| byte == b',') {
        if perl::trim(part).is_empty() {
            continue;
        }
        let (key, value) = match perl::split_once(part, b'=') {
            None => {
                let key = schema.iter().find(|key| key.bare);
                let key = key.with_context(|| format!("{} is no KEY=VALUE", quoted(part)))?;
                ensure!(!bare_seen, "{} and another value both stand for '{}'", quoted(part), key.name);
                bare_seen = true;
                // Perl asks whether the earlier value is true, and the text 0 is not.
                values.0.retain(|&entry| entry != (key.name, b"0"));
                (key, part)
            }
            Some((name, value)) => {
                ensure!(!name.is_empty() && !value.is_empty(), "{} is no KEY=VALUE", quoted(part));
                let key = schema.iter().find(|key| key.name.as_bytes() == name);
                (key.with_context(|| format!("there is no option {}", quoted(name)))?, value)
            }
        };
        ensure!(values.get(key.name).is_none(), "option '{}' is given twice", key.name);
        values.0.push((key.name, value));
    }

    // Only now: a value that was replaced above did not have to be valid.
    for key in schema {
        match values.get(key.name) {
            Some(value) if !key.accepts(value) => {
                bail!("option '{}' cannot be {}", key.name, quoted(value))
            }
            None if key.required => bail!("option '{}' is missing", key.name),
            _ => {}
        }
    }
    Ok(values)
}

/// `PVE::JSONSchema::parse_boolean`.
pub fn boolean(value: &[u8]) -> Option<bool> {
    let is_one_of = |words: [&[u8]; 4]| words.iter().any(|word| value.eq_ignore_ascii_case(word));
    if is_one_of([b"1", b"on", b"yes", b"true"]) {
        Some(true)
    } else if is_one_of([b"0", b"off", b"no", b"false"]) {
        Some(false)
    } else {
        None
    }
}

/// `pve-configid`: how mappings may be named.
pub fn is_config_id(name: &[u8]) -> bool {
    match name {
        [first, rest @ ..] => {
            let in_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-".contains(byte);
            first.is_ascii_alphabetic() && !rest.is_empty() && rest.iter().all(in_name)
        }
        [] => false,
    }
}

/// `PVE::JSONSchema::is_integer`: of any length, so what does not fit is the nearest that does.
fn integer(value: &[u8]) -> Option<i64> {
    let (negative, digits) = match value {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0i64, |number, digit| {
        let digit = i64::from(char::from(*digit).to_digit(10)?);
        let number = number.saturating_mul(10);
        Some(if negative { number.saturating_sub(digit) } else { number.saturating_add(digit) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &[Key] = &[
        Key::new("host", Shape::Text(|value| !value.contains(&b'0'))).bare(),
        Key::new("flag", Shape::Boolean),
        Key::new("n", Shape::Integer { minimum: 0 }),
    ];

    fn host(string: &str) -> Option<String> {
        parse(SCHEMA, string.as_bytes()).ok()?.text("host")
    }

    #[test]
    fn the_bare_value_may_stand_anywhere_but_once() {
        for string in ["x", "flag=1,x", "x,flag=off", "n=1,x,flag=On", ",x,, \t,", "host=x"] {
            assert_eq!(host(string).as_deref(), Some("x"), "{string}");
        }
        for string in ["x,y", "x,host=y", "host=x,y", "host=x,host=x"] {
            assert!(parse(SCHEMA, string.as_bytes()).is_err(), "{string}");
        }
    }

    #[test]
    fn a_bare_value_replaces_a_zero_as_in_perl() {
        assert_eq!(host("host=0,x").as_deref(), Some("x"));
        assert!(parse(SCHEMA, b"x,host=0").is_err());
        assert!(parse(SCHEMA, b"0,x").is_err());
    }

    #[test]
    fn nothing_at_all_is_fine_unless_a_key_is_required() {
        assert!(parse(SCHEMA, b" ").is_ok());
        assert!(parse(&[SCHEMA[1].required()], b",").is_err());
        assert!(parse(&[SCHEMA[1]], b"x").is_err());
    }

    #[test]
    fn keys_and_values_are_taken_literally() {
        for string in
            ["flag =1", "flag= 1", " flag=1", "flag=", "=1", "=", "FLAG=1", "flag=2", "other=1", "n=1.0", "n=-1"]
        {
            assert!(parse(SCHEMA, string.as_bytes()).is_err(), "{string}");
        }
        assert_eq!(host("host==a=b").as_deref(), Some("=a=b"));
    }

    #[test]
    fn config_ids() {
        for good in ["ab", "A-", "a_", "z0-9_Z"] {
            assert!(is_config_id(good.as_bytes()), "{good}");
        }
        for bad in ["", "a", "3a", "-a", "_a", "a.b", "a b", "é1"] {
            assert!(!is_config_id(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn integers() {
        for (text, number) in [("+44", 44), ("0044", 44), ("-0", 0), ("99999999999999999999", i64::MAX)] {
            assert_eq!(integer(text.as_bytes()), Some(number), "{text}");
        }
        for text in ["", "+", "-", "1.5", "1e3", "0x1", " 1", "--1", "9223372036854775808x"] {
            assert_eq!(integer(text.as_bytes()), None, "{text}");
        }
    }
}
