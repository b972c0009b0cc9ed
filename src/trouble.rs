//! What is wrong and what to type about it: apart from where it is found to where it is told, in one line or in two.

use crate::address::Address;
use std::fmt;
use std::ops::Deref;

/// In a box, or each of the many results would be as large as all its words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble(Box<Words>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// What it means for whom: `0000:01:00 was not touched`. May be empty.
    title: String,
    /// Which device or guest, what is wrong with it, who holds it.
    pub what: String,
    /// What to type or to do; empty where there is nothing to say.
    pub remedy: String,
    /// What stands between the two in one line.
    joint: &'static str,
    /// Of the machine, where others come upon the same.
    pub about: Option<About>,
}

impl Deref for Trouble {
    type Target = Words;

    fn deref(&self) -> &Words {
        &self.0
    }
}

/// What keeps a card from a VM, whoever asks: the words differ with who does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// How the function itself is.
    Function(Address),
    /// One that shares the IOMMU group.
    Neighbour(Address),
    /// What the host has behind the function.
    Behind(Address),
    /// That the kernel lacks vfio-pci.
    VfioPci,
}

impl Trouble {
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Trouble {
        let (what, remedy) = (what.into(), remedy.into());
        Trouble(Box::new(Words { title: String::new(), what, remedy, joint: "; ", about: None }))
    }

    /// Where a sentence reads better with other words between the two.
    #[must_use]
    pub fn joined(mut self, joint: &'static str) -> Trouble {
        self.0.joint = joint;
        self
    }

    #[must_use]
    pub fn about(mut self, about: About) -> Trouble {
        self.0.about = Some(about);
        self
    }

    /// With what it means for somebody before it, and before what was there.
    #[must_use]
    pub fn of(mut self, whom: &str) -> Trouble {
        self.0.title = if self.title.is_empty() { whom.to_string() } else { format!("{whom}: {}", self.title) };
        self
    }

    /// For whom it goes without saying.
    #[must_use]
    pub fn untitled(mut self) -> Trouble {
        self.0.title.clear();
        self
    }

    /// All but what to do about it.
    pub fn found(&self) -> String {
        if self.title.is_empty() { self.what.clone() } else { format!("{}: {}", self.title, self.what) }
    }

    /// With one more thing to do, or to know, after all the others.
    #[must_use]
    pub fn and(mut self, more: &str) -> Trouble {
        if self.remedy.is_empty() {
            self.0.joint = "; ";
        } else {
            self.0.remedy.push_str("; ");
        }
        self.0.remedy.push_str(more);
        self
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.found())?;
        if self.remedy.is_empty() {
            return Ok(());
        }
        f.write_str(self.joint)?;
        f.write_str(&self.remedy)
    }
}

impl From<String> for Trouble {
    fn from(what: String) -> Trouble {
        Trouble::new(what, "")
    }
}

impl From<&str> for Trouble {
    fn from(what: &str) -> Trouble {
        Trouble::new(what, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_both() {
        let both = Trouble::new("the disk is on it; and in use", "umount /mnt");
        assert_eq!(both.to_string(), "the disk is on it; and in use; umount /mnt");
        assert_eq!(Trouble::from("busy").to_string(), "busy");
        assert_eq!(Trouble::from("busy".to_string()), Trouble::new("busy", ""));
        assert_eq!(both.joined(", so ").to_string(), "the disk is on it; and in use, so umount /mnt");
        assert_eq!(Trouble::from("busy").joined(", so ").to_string(), "busy");
    }

    #[test]
    fn what_is_put_around_it_leaves_the_two_apart() {
        let told = Trouble::new("no group", "turn it on").joined(": ").about(About::VfioPci);
        let told = told.of("it was not touched").of("mapping=gpu").and("then again").and("a backup fails");
        assert_eq!(told.found(), "mapping=gpu: it was not touched: no group");
        assert_eq!(told.remedy, "turn it on; then again; a backup fails");
        assert_eq!(
            (&told.to_string(), told.about),
            (&format!("{}: {}", told.found(), told.remedy), Some(About::VfioPci))
        );
        assert_eq!(told.untitled().to_string(), "no group: turn it on; then again; a backup fails");
        assert_eq!(Trouble::from("busy").joined(": ").and("then again").to_string(), "busy; then again");
    }
}
