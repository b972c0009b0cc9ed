//! Who has a GPU open, and how each lets go of it.

pub use super::devices::{Devices, Reach};
pub use super::place::{Ends, Place, is_service};
use crate::story::printable;
use crate::sys::{DeviceNumber, Hidden, How, Kernel, Process, Sight, Sought, User};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// How long to wait before looking once more whether anything changes.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// At the latest after so long whoever is waited for is looked at again: not everything makes itself heard.
const LOOK_AGAIN_LATER: Duration = Duration::from_millis(100);

/// A process of that age may be one that looks at a new device and is gone.
const YOUNG: Duration = Duration::from_secs(3);

/// A look has at least this long: what is left of a time box may be too little, and then nobody would know.
const LEAST: Duration = Duration::from_millis(500);

/// So long udev's workers are waited for.
const UDEV: Duration = Duration::from_secs(10);

/// Of the clock that `/proc/PID/stat` counts with, on every architecture that Proxmox runs on.
const TICKS_PER_SECOND: u64 = 100;

/// A process that has a device of the slot open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub process: Process,
    pub command: String,
    pub number: DeviceNumber,
    /// The usual path of the device that it has open; its own path to it may be another.
    pub via: String,
    pub how: How,
    pub place: Place,
    pub ends: Ends,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "PID {} ({}", self.process.pid, self.command)?;
        match &self.place {
            Place::Container(id) => write!(f, ", container {id}")?,
            Place::Vm(id) => write!(f, ", VM {id}")?,
            Place::Unit(name) => write!(f, ", {name}")?,
            Place::Unknown => {}
        }
        let how = match self.how {
            How::Open | How::Buffer => "open",
            How::Mapped => "mapped",
            How::Ring => "in a ring of io_uring",
        };
        write!(f, ") has {} {how}", self.via)
    }
}

impl Holder {
    /// What to type to make it let go.
    pub fn remedy(&self) -> String {
        match &self.ends {
            Ends::Passes => "it ends by itself: udevadm settle".to_string(),
            Ends::Typed(command, why) if !why.is_empty() => format!("{command}: {why}"),
            Ends::Told(how) => how.clone(),
            ends => ends.command(self.process.pid).unwrap_or_default(),
        }
    }

    fn of(kernel: &dyn Kernel, user: &User, (number, via, how): (DeviceNumber, String, How)) -> Holder {
        let place = Place::of(&user.cgroup);
        let ends = Ends::of(kernel, user, &place, number);
        Holder { process: user.process, command: printable(&user.command), number, via, how, place, ends }
    }
}

/// What a look found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// By PID.
    pub holders: Vec<Holder>,
    /// So many open files there are of each device.
    pub files: BTreeMap<DeviceNumber, u64>,
    /// Devices that a process has only mapped, once for each.
    pub mapped: Vec<DeviceNumber>,
    pub hidden: Vec<Hidden>,
}

impl Devices {
    /// Who has any of them open, this process excepted; by PID, one entry each.
    ///
    /// # Errors
    /// Why that is not known.
    pub fn holders(&self, kernel: &dyn Kernel, limit: Duration) -> Result<Vec<Holder>, String> {
        Ok(self.find(kernel, limit)?.holders)
    }

    /// As [`Devices::holders`], and what else there was to see.
    ///
    /// # Errors
    /// As [`Devices::holders`].
    pub fn find(&self, kernel: &dyn Kernel, limit: Duration) -> Result<Found, String> {
        if self.is_idle(kernel) {
            return Ok(Found::default());
        }
        self.look(kernel, &Devices::sought([self]), limit)
    }

    fn look(&self, kernel: &dyn Kernel, sought: &Sought, limit: Duration) -> Result<Found, String> {
        let Sight { users, files, hidden } = kernel.look(sought, limit.max(LEAST))?;
        let only_mapped = |user: &User| {
            let has = |number, how| user.open.iter().any(|device| device.number == number && device.how == how);
            let mapped = user.open.iter().filter(|device| device.how == How::Mapped).map(|device| device.number);
            mapped.filter(|number| !has(*number, How::Open)).collect::<Vec<_>>()
        };
        Ok(Found {
            holders: self.holders_among(kernel, &users),
            files,
            mapped: users.iter().flat_map(only_mapped).collect(),
            hidden,
        })
    }

    /// Of those that a look has found.
    pub fn holders_among(&self, kernel: &dyn Kernel, users: &[User]) -> Vec<Holder> {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let others = users.iter().filter(|user| user.process.pid != own);
        others.filter_map(|user| Some(Holder::of(kernel, user, self.reason(user)?))).collect()
    }

    /// As [`Devices::find`], once those have let go that would in a moment: udev's workers, and programs that only just
    /// began, when there is nobody else. `counts`: who is meant at all.
    ///
    /// # Errors
    /// As [`Devices::holders`].
    pub fn find_lasting(
        &self,
        kernel: &dyn Kernel,
        limit: Duration,
        counts: &dyn Fn(&Holder) -> bool,
    ) -> Result<Found, String> {
        let begin = kernel.now();
        let left = || limit.saturating_sub(kernel.now().saturating_sub(begin));
        let patience = limit / 2;
        let mut found = self.find(kernel, left())?;
        loop {
            let waited = kernel.now().saturating_sub(begin);
            let meant: Vec<&Holder> = found.holders.iter().filter(|holder| counts(holder)).collect();
            let passes = |holder: &&Holder| match holder.ends {
                Ends::Passes => waited < UDEV,
                _ => is_young(kernel, holder.process),
            };
            if meant.is_empty() || waited >= patience || kernel.is_asked_to_end() || !meant.iter().all(passes) {
                return Ok(found);
            }
            let processes: Vec<Process> = meant.iter().map(|holder| holder.process).collect();
            kernel.await_any(&processes, &self.paths(), LOOK_AGAIN_LATER.min(patience - waited));
            // Only they are asked until they are through: there may be very many others.
            let among = processes.iter().map(|process| process.pid).collect();
            let sought = Sought { among, ..Devices::sought([self]) };
            let now = self.look(kernel, &sought, left())?;
            if now.holders.iter().any(|holder| processes.contains(&holder.process)) {
                continue;
            }
            found = self.find(kernel, left())?;
        }
    }

    /// As [`Devices::holders`], once nobody comes or goes any more: two looks in a row saw the same, or `limit` is over.
    /// For when somebody was stopped: what ends has its children and helpers end after it, or start anew.
    ///
    /// # Errors
    /// As [`Devices::holders`].
    pub fn lasting_holders(&self, kernel: &dyn Kernel, limit: Duration) -> Result<Vec<Holder>, String> {
        let end = kernel.now() + limit;
        let left = || end.saturating_sub(kernel.now());
        let mut before = self.holders(kernel, left())?;
        while kernel.now() < end {
            kernel.sleep(LOOK_AGAIN);
            let now = self.holders(kernel, left())?;
            if now == before {
                break;
            }
            before = now;
        }
        Ok(before)
    }
}

/// None in a tree of files, where nobody knows how long the host is up.
fn is_young(kernel: &dyn Kernel, process: Process) -> bool {
    let up = || kernel.text("/proc/uptime")?.split('.').next()?.trim().parse::<u64>().ok();
    let age = up().map(|up| up.saturating_sub(process.start / TICKS_PER_SECOND));
    process.start > 0 && age.is_some_and(|age| Duration::from_secs(age) < YOUNG)
}

/// What it is about processes that do not let themselves be looked at.
pub fn hidden(processes: &[Hidden]) -> String {
    let one = |hidden: &Hidden| format!("PID {} ({}): {}", hidden.pid, printable(&hidden.command), hidden.why);
    let mut words: Vec<String> = processes.iter().take(3).map(one).collect();
    if processes.len() > words.len() {
        words.push(format!("{} more", processes.len() - words.len()));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    fn ended_by(ends: Ends) -> Holder {
        let (process, number) = (Process { pid: 7, start: 1 }, DeviceNumber { major: 195, minor: 0 });
        let (command, via) = ("x".to_string(), "/dev/nvidia0".to_string());
        Holder { process, command, number, via, how: How::Open, place: Place::Unknown, ends }
    }

    #[test]
    fn a_remedy_is_a_command_with_its_reason_if_there_is_one() {
        let typed = |why: &str| ended_by(Ends::Typed("docker stop a".to_string(), why.to_string())).remedy();
        assert_eq!(typed(""), "docker stop a");
        assert_eq!(typed("it is restarted otherwise"), "docker stop a: it is restarted otherwise");
        assert_eq!(ended_by(Ends::Told("log out".to_string())).remedy(), "log out");
        assert_eq!(ended_by(Ends::Kill).remedy(), "kill 7");
        assert_eq!(ended_by(Ends::Passes).remedy(), "it ends by itself: udevadm settle");
    }

    #[test]
    fn a_process_is_young_for_three_seconds() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-young-{}", std::process::id()));
        std::fs::create_dir_all(root.join("proc")).unwrap();
        let kernel = Linux::at(root.clone());
        let is = |start| is_young(&kernel, Process { pid: 7, start });
        let unknown = is(9_800);
        std::fs::write(root.join("proc/uptime"), "100.25 3.00\n").unwrap();
        let found = [is(9_900), is(9_800), is(9_700), is(9_000), is(0)];
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!((unknown, found), (false, [true, true, false, false, false]));
    }
}
