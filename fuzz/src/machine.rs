//! A machine in memory: every path has the bytes that the fuzzer chose. Nothing on it can be changed.

use gpu_handoff::sys::{
    Act, ActError, Action, Clock, DeviceNumber, End, Files, How, Kernel, OpenDevice, Process, Programs, Read, Sight,
    Sought, User,
};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Default)]
pub struct Machine {
    files: BTreeMap<String, Vec<u8>>,
    links: BTreeMap<String, String>,
    users: Vec<User>,
}

impl Machine {
    #[must_use]
    pub fn file(mut self, path: &str, bytes: &[u8]) -> Machine {
        self.files.insert(path.to_string(), bytes.to_vec());
        self
    }

    /// A symbolic link to something of this name.
    #[must_use]
    pub fn link(mut self, path: &str, name: &str) -> Machine {
        self.links.insert(path.to_string(), name.to_string());
        self
    }

    /// A process has this device open, or only mapped.
    #[must_use]
    pub fn open(mut self, pid: i32, number: DeviceNumber, mapped: bool) -> Machine {
        let device = OpenDevice { number, how: if mapped { How::Mapped } else { How::Open } };
        if let Some(user) = self.users.iter_mut().find(|user| user.process.pid == pid) {
            user.open.push(device);
            return self;
        }
        let text = |name: &str| {
            let bytes = self.files.get(&format!("/proc/{pid}/{name}")).cloned().unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (command, cgroup) = (text("comm"), text("cgroup"));
        self.users.push(User {
            process: Process { pid, start: 1 },
            command,
            cgroup,
            is_init: false,
            open: vec![device],
        });
        self
    }

    /// A slot with an NVIDIA GPU on this driver, alone in its IOMMU group.
    #[must_use]
    pub fn gpu(self, address: &str, driver: &str) -> Machine {
        let at = |name: &str| format!("/sys/bus/pci/devices/{address}/{name}");
        self.file(&at("vendor"), b"0x10de\n")
            .file(&at("device"), b"0x2684\n")
            .file(&at("class"), b"0x030000\n")
            .file(&at("driver_override"), b"(null)\n")
            .link(&at("iommu_group"), "5")
            .link(&at("driver"), driver)
            .link(&at("driver/module"), &driver.replace('-', "_"))
            .file(&format!("/sys/bus/pci/drivers/{driver}/{address}"), b"")
            .file(&format!("/sys/kernel/iommu_groups/5/devices/{address}"), b"")
    }

    /// A line is `PATH CONTENT` or `PATH -> NAME`; in a content `\n` ends a line.
    pub fn from_text(text: &str) -> Machine {
        let mut machine = Machine::default();
        for line in text.lines() {
            machine = match line.split_once(" -> ") {
                Some((path, name)) => machine.link(path, name),
                None => {
                    let (path, content) = line.split_once(' ').unwrap_or((line, ""));
                    machine.file(path, content.replace("\\n", "\n").as_bytes())
                }
            };
        }
        machine
    }
}

/// The names right below `folder`.
fn below<'a, T>(paths: &'a BTreeMap<String, T>, folder: &'a str) -> impl Iterator<Item = &'a str> {
    let rest = move |path: &'a str| path.strip_prefix(folder)?.strip_prefix('/');
    paths
        .range(format!("{folder}/")..)
        .map_while(move |(path, _)| rest(path))
        .map(|rest| rest.split('/').next().unwrap_or_default())
        .filter(|name| !name.is_empty())
}

impl Read for Machine {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        Ok(self.files.get(path).ok_or(ErrorKind::NotFound)?.clone())
    }

    fn link_name(&self, path: &str) -> io::Result<String> {
        Ok(self.links.get(path).ok_or(ErrorKind::NotFound)?.clone())
    }

    fn list(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> =
            below(&self.files, path).chain(below(&self.links, path)).map(str::to_string).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    fn exists(&self, path: &str) -> bool {
        self.files.contains_key(path)
            || self.links.contains_key(path)
            || below(&self.files, path).next().is_some()
            || below(&self.links, path).next().is_some()
    }

    fn device_number(&self, _path: &str) -> io::Result<DeviceNumber> {
        Err(ErrorKind::NotFound.into())
    }

    /// Of every file.
    fn file_id(&self, _path: &str) -> io::Result<(DeviceNumber, u64)> {
        Ok((DeviceNumber { major: 0, minor: 0x1a }, 1234))
    }

    fn vfio_group_busy(&self, _group: u32, _limit: Duration) -> Result<bool, ActError> {
        Ok(false)
    }

    fn look(&self, _: &Sought, _: Duration) -> Result<Sight, String> {
        Ok(Sight { users: self.users.clone(), ..Sight::default() })
    }
}

impl Files for Machine {
    fn path(&self, _path: &str) -> PathBuf {
        PathBuf::from("/nonexistent")
    }

    fn is_real(&self) -> bool {
        false
    }
}

impl Act for Machine {
    fn act(&self, action: &Action, _limit: Duration) -> Result<(), ActError> {
        panic!("reading alone led to {action:?}");
    }

    fn worker(&self) -> Option<Process> {
        None
    }

    fn end(&self, _: Process, _: End) -> io::Result<()> {
        Ok(())
    }
}

impl Programs for Machine {
    fn program(&self, path: &str, _arguments: &[&str], _limit: Duration) -> Result<String, ActError> {
        Err(ActError::Program(format!("{path} is not installed")))
    }
}

impl Clock for Machine {
    fn is_asked_to_end(&self) -> bool {
        false
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn unix_time(&self) -> u64 {
        0
    }

    fn sleep(&self, _time: Duration) {}
}

impl Kernel for Machine {}
