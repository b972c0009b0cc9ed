//! What processes share, so that it is read, or counted, once: tables of descriptors, and open files.

use super::device::DeviceNumber;
use super::kcmp;
use super::process::OpenDevice;
use crate::sorted;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A table with fewer descriptors than this is read faster than it is compared.
pub const LARGE: usize = 256;

/// Large tables that were read, in the kernel's order, each by one process that has it, and what is open in it.
#[derive(Default)]
pub struct Tables {
    read: Vec<(i32, Vec<OpenDevice>)>,
}

impl Tables {
    /// What is open in the table of this process or thread, if it was read for another one.
    pub fn same_as(&self, owner: i32) -> Option<Vec<OpenDevice>> {
        Some(self.read.get(self.place(owner).ok()?)?.1.clone())
    }

    pub fn add(&mut self, owner: i32, open: &[OpenDevice]) {
        if let Err(place) = self.place(owner) {
            self.read.insert(place, (owner, open.to_vec()));
        }
    }

    fn place(&self, owner: i32) -> Result<usize, usize> {
        self.read.binary_search_by(|(other, _)| kcmp::tables(*other, owner).unwrap_or(Ordering::Less))
    }
}

/// Open files of each device, in the kernel's order: each by one process and the descriptor that it has for it.
#[derive(Default)]
pub struct Files {
    of: BTreeMap<DeviceNumber, Vec<(i32, i32)>>,
}

impl Files {
    /// `compare`: the kernel can tell whether it is one that is known already.
    pub fn add(&mut self, number: DeviceNumber, file: (i32, i32), compare: bool) {
        let known = self.of.entry(number).or_default();
        if !compare {
            return known.push(file);
        }
        let place = known.binary_search_by(|other| kcmp::files(*other, file).unwrap_or(Ordering::Less));
        if let Err(place) = place {
            known.insert(place, file);
        }
    }

    pub fn counts(&self) -> BTreeMap<DeviceNumber, u64> {
        sorted::map(self.of.iter().map(|(number, files)| (*number, files.len() as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::How;
    use std::sync::mpsc::channel;

    /// Threads have their process's table, a child has its own.
    #[test]
    fn a_table_that_was_read_is_known_by_whoever_shares_it() {
        let own = i32::try_from(std::process::id()).unwrap();
        if kcmp::tables(own, own).is_none() {
            return; // a kernel without it
        }
        let device = |minor| OpenDevice { number: DeviceNumber { major: 195, minor }, how: How::Open };
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let other = i32::try_from(child.id()).unwrap();
        let (tell, told) = channel();
        let (end, ended) = channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = ended.recv();
        });
        let thread_id = told.recv().unwrap();
        let mut tables = Tables::default();
        let before = tables.same_as(own);
        tables.add(own, &[device(0)]);
        let of_child = tables.same_as(other);
        tables.add(other, &[device(1)]);
        tables.add(thread_id, &[device(2)]);
        let found = [own, thread_id, other].map(|owner| tables.same_as(owner));
        drop(end);
        thread.join().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((before, of_child), (None, None));
        assert_eq!(found, [Some(vec![device(0)]), Some(vec![device(0)]), Some(vec![device(1)])]);
    }
}
