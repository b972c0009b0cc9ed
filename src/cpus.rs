//! Lists of CPUs as the kernel writes them: `0-3,8`.

use crate::sorted;
use std::fmt;

/// The kernel is built for no more on x86.
const MOST: u32 = 8192;

/// In the order in which they are written, and none twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpus(Vec<u32>);

impl Cpus {
    /// None for what is no list, is empty, or names a CPU twice.
    pub fn parse(text: &str) -> Option<Cpus> {
        let number = |digits: &str| {
            let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|cpu: &u32| is_number && *cpu < MOST)
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() || range.clone().any(|cpu| cpus.contains(&cpu)) {
                return None;
            }
            cpus.extend(range);
        }
        Some(Cpus(cpus))
    }

    /// What an attribute of the kernel, or Proxmox, says: whatever order it has, and twice is once.
    pub fn of_set(text: &str) -> Option<Cpus> {
        let mut all = Cpus::default();
        for part in text.split(',') {
            all.add(&Cpus::parse(part.trim())?);
        }
        sorted::sort(&mut all.0);
        Some(all)
    }

    pub fn add(&mut self, others: &Cpus) {
        for cpu in &others.0 {
            if !self.0.contains(cpu) {
                self.0.push(*cpu);
            }
        }
    }

    pub fn each(&self) -> &[u32] {
        &self.0
    }

    /// That of vCPU `index`.
    pub fn of_vcpu(&self, index: u32) -> Option<Cpus> {
        Some(Cpus(vec![*self.0.get(usize::try_from(index).ok()?)?]))
    }

    /// Those that are not among others.
    pub fn without(&self, others: &Cpus) -> Cpus {
        Cpus(self.0.iter().filter(|cpu| !others.0.contains(cpu)).copied().collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whatever the order.
    pub fn is_same_as(&self, other: &Cpus) -> bool {
        self.without(other).is_empty() && other.without(self).is_empty()
    }
}

/// As they come.
impl From<Vec<u32>> for Cpus {
    fn from(all: Vec<u32>) -> Cpus {
        Cpus(all)
    }
}

/// What follows each other as a range.
impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let ranges = self.0.chunk_by(|one, next| one + 1 == *next);
        for (index, range) in ranges.enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            match range {
                [first, .., last] => write!(f, "{first}-{last}")?,
                _ => range.iter().try_for_each(|cpu| write!(f, "{cpu}"))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(text: &str) -> Cpus {
        Cpus::parse(text).unwrap()
    }

    #[test]
    fn a_list_keeps_its_order() {
        for (text, each) in
            [("0", &[0][..]), ("2-5", &[2, 3, 4, 5]), ("2,10,3,11", &[2, 10, 3, 11]), ("8191,0-1", &[8191, 0, 1])]
        {
            assert_eq!(cpus(text).each(), each);
            assert_eq!(cpus(text).to_string(), text);
        }
        assert_eq!(cpus("02,3,4-4,6").to_string(), "2-4,6");
        assert_eq!(Cpus::default().to_string(), "");
    }

    #[test]
    fn what_is_no_list() {
        for text in
            ["", " ", ",", "1,", "-1", "1-", "3-1", "+1", "1 ", "a", "0x1", "0-3,2", "1,1", "8192", "0-4294967295"]
        {
            assert_eq!(Cpus::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn sets() {
        assert_eq!(Cpus::of_set("8-9, 0-3,2").unwrap().to_string(), "0-3,8-9");
        assert_eq!(Cpus::of_set(""), None);
        assert_eq!(cpus("0-5").without(&cpus("1,3-9")).to_string(), "0,2");
        assert!(cpus("3,1-2").is_same_as(&cpus("1-3")));
        assert!(!cpus("1-2").is_same_as(&cpus("1-3")) && !cpus("1-3").is_same_as(&cpus("1-2")));
        assert_eq!(cpus("4,2").of_vcpu(1).unwrap().to_string(), "2");
        assert_eq!(cpus("4,2").of_vcpu(2), None);
    }
}
