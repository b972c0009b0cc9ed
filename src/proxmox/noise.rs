//! Random changes to bytes, the same ones in every run, to show that a parser survives them.

/// Calls `check` with a few thousand variations of `seed`.
pub fn mutations(seed: &[u8], check: impl Fn(&[u8])) {
    const TASTY: &[u8] = b"\n\r\t\x0b\x0c \0[]:;,=.#\"0159afAFxz-_\xa0\xc3\xff";
    let mut random = Xorshift(0x9e37_79b9_7f4a_7c15);
    for _ in 0..5000 {
        let mut bytes = seed.to_vec();
        for _ in 0..=random.below(8) {
            let at = random.below(bytes.len() + 1);
            match random.below(5) {
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(..at),
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 if at < bytes.len() => bytes[at] = random.below(256) as u8,
                _ => bytes.insert(at, TASTY[random.below(TASTY.len())]),
            }
        }
        check(&bytes);
    }
}

struct Xorshift(u64);

impl Xorshift {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
