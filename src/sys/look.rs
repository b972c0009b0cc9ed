//! The parent's side of a look at all processes: a child reads, and is given up when it has no more time, or passed on to
//! the next process when one does not let itself be looked at.

use super::device::DeviceNumber;
use super::expendable::{leave_parent_behind, read_block, readable, write_block};
use super::process::{Hidden, How, OpenDevice, Process, Sight, Sought, User};
use super::progress::{At, Part, Progress};
use super::scan::{self, Errand, Identity, Told};
use super::terminate;
use crate::decimal::tenths;
use crate::sorted;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A child that gets no further for so long, and does not wait for a processor, waits for the process it looks at.
const STUCK: Duration = Duration::from_millis(200);

/// How often to ask how far a child has got.
const TICK: Duration = Duration::from_millis(50);

/// What one look has found, and what it knows of how to look.
struct Look<'a> {
    proc: PathBuf,
    sought: &'a Sought,
    begin: Instant,
    limit: Duration,
    sight: Sight,
    skip_descriptors: Vec<i32>,
    skip_mappings: Vec<i32>,
    only_mappings: bool,
    mappings_after: i32,
}

/// # Errors
/// Why it is not known who has what open, and where the time went if there was too little of it.
pub fn look(root: &Path, sought: &Sought, limit: Duration) -> Result<Sight, String> {
    let mut look = Look {
        proc: root.join("proc"),
        sought,
        begin: Instant::now(),
        limit,
        sight: Sight::default(),
        skip_descriptors: Vec::new(),
        skip_mappings: Vec::new(),
        only_mappings: false,
        mappings_after: 0,
    };
    // Each child but the last was given up for a process that it could not look at.
    while !look.with_child()? {}
    sorted::sort_by_key(&mut look.sight.users, |user| user.process.pid);
    Ok(look.sight)
}

impl Look<'_> {
    /// False when it was given up and another has to go on.
    fn with_child(&mut self) -> Result<bool, String> {
        let cannot = |error: io::Error| format!("nobody can look who uses it: {error}");
        let progress = Progress::new().map_err(cannot)?;
        let (answers, answers_out) = pipe2(OFlag::O_CLOEXEC).map_err(|error| cannot(error.into()))?;
        let mut answers = File::from(answers);
        // SAFETY: this program has one thread, so the child may do all that the parent could.
        let child = match unsafe { fork() }.map_err(|error| cannot(error.into()))? {
            ForkResult::Child => {
                leave_parent_behind(&[answers_out.as_raw_fd()]);
                // SAFETY: takes a number. A look that nobody waits for is of no use.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                self.work(answers_out.into(), &progress);
                // SAFETY: ends the child at once, without the parent's exit handlers and buffers.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => child,
        };
        drop(answers_out);
        let done = self.listen(&mut answers, child, &progress);
        if !matches!(done, Ok(true)) {
            let _ = kill(child, Signal::SIGKILL);
        }
        // One that is stuck for good cannot be waited for.
        let wait = if matches!(done, Ok(true)) { None } else { Some(WaitPidFlag::WNOHANG) };
        let _ = waitpid(child, wait);
        done
    }

    /// In the child.
    fn work(&self, mut answers: File, progress: &Progress) {
        let errand = Errand {
            sought: self.sought,
            skip_descriptors: &self.skip_descriptors,
            skip_mappings: &self.skip_mappings,
            only_mappings: self.only_mappings,
            mappings_after: self.mappings_after,
        };
        let done = scan::look(&self.proc, &errand, progress, &mut |told| write_block(&mut answers, &encode(&told)));
        let last = done.map_or_else(|problem| fields(b'X', &[&problem]), |()| fields(b'E', &[]));
        let _ = write_block(&mut answers, &last);
    }

    fn listen(&mut self, answers: &mut File, child: Pid, progress: &Progress) -> Result<bool, String> {
        let mut before: Option<(At, Instant)> = None;
        loop {
            let left = self.limit.saturating_sub(self.begin.elapsed());
            if left.is_zero() {
                return Err(self.too_late(&progress.at()));
            }
            if terminate::is_asked() {
                return Err("asked to end while looking who uses it".to_string());
            }
            if readable(answers, left.min(TICK)) {
                let block =
                    read_block(answers).map_err(|_| format!("PID {child}, which looked who uses it, was killed"))?;
                match block.split_first() {
                    Some((b'E', _)) => return Ok(true),
                    Some((b'X', problem)) => {
                        return Err(format!(
                            "nobody can look who uses it: {}",
                            String::from_utf8_lossy(problem).trim_matches('\0')
                        ));
                    }
                    _ => self.hear(&block),
                }
                continue;
            }
            let at = progress.at();
            match before {
                Some((last, since)) if last == at && since.elapsed() >= STUCK => {
                    self.pass_over(&at);
                    return Ok(false);
                }
                Some((last, _)) if last == at && is_waiting(child) => {}
                _ => before = Some((at, Instant::now())),
            }
        }
    }

    fn hear(&mut self, block: &[u8]) {
        match decode(block) {
            Some(Told::User(who, open)) => {
                let process = Process { pid: who.pid, start: who.start };
                let known = self.sight.users.iter_mut().find(|user| user.process == process);
                match known {
                    Some(user) => user.open.extend(open),
                    None => self.sight.users.push(User {
                        process,
                        command: who.command,
                        cgroup: who.cgroup,
                        is_init: who.is_init,
                        open,
                    }),
                }
            }
            Some(Told::Hidden(who, why)) => {
                self.sight.hidden.push(Hidden { pid: who.pid, command: who.command, why });
            }
            Some(Told::Files(files)) => {
                self.sight.files = files;
                self.only_mappings = true;
            }
            None => {}
        }
    }

    /// The next child leaves out what this one waited for.
    fn pass_over(&mut self, at: &At) {
        match at.part {
            Part::Descriptors => {
                self.skip_descriptors.push(at.pid);
                // From the beginning: which files are the same is known to nobody but that child.
                self.sight = Sight::default();
            }
            Part::Mappings => {
                self.skip_mappings.push(at.pid);
                self.mappings_after = at.pid;
                let why = "its memory map is locked".to_string();
                self.sight.hidden.push(Hidden { pid: at.pid, command: self.command(at.pid), why });
            }
        }
    }

    fn too_late(&self, at: &At) -> String {
        let seconds = tenths(self.limit.as_millis() as u64, 1000);
        let (worst, most) = at.worst;
        let what = match at.part {
            Part::Descriptors => "descriptors",
            Part::Mappings => "mappings",
        };
        let stuck = self.sight.hidden.len();
        let waited =
            if stuck > 0 { format!(", {stuck} of them do not let themselves be looked at") } else { String::new() };
        format!(
            "looking who uses it took longer than {seconds} s: {} processes looked at{waited}, the most of it in PID {worst} ({}) \
             with {most} {what} so far; end that, or give it more time: time.handoff_s in /etc/gpu-handoff/config.json",
            at.processes,
            self.command(worst)
        )
    }

    fn command(&self, pid: i32) -> String {
        let name = fs::read(self.proc.join(format!("{pid}/comm"))).unwrap_or_else(|_| b"?".to_vec());
        String::from_utf8_lossy(&name).trim_end_matches('\n').to_string()
    }
}

/// Not for a processor.
fn is_waiting(child: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('R'))
}

/// A kind and texts, each ended by a NUL, which none of them contains.
fn fields(kind: u8, texts: &[&str]) -> Vec<u8> {
    let mut block = vec![kind];
    for text in texts {
        block.extend(text.bytes().filter(|byte| *byte != 0));
        block.push(0);
    }
    block
}

fn encode(told: &Told) -> Vec<u8> {
    let with = |kind: u8, who: &Identity, last: &str| {
        let (pid, start) = (who.pid.to_string(), who.start.to_string());
        fields(kind, &[&pid, &start, if who.is_init { "1" } else { "" }, &who.command, &who.cgroup, last])
    };
    match told {
        Told::User(who, open) => {
            let words: Vec<String> =
                open.iter().map(|device| format!("{}{}", letter(device.how), device.number)).collect();
            with(b'U', who, &words.join(" "))
        }
        Told::Hidden(who, why) => with(b'H', who, why),
        Told::Files(files) => {
            let words: Vec<String> = files.iter().map(|(number, count)| format!("{number}={count}")).collect();
            fields(b'F', &[&words.join(" ")])
        }
    }
}

fn decode(block: &[u8]) -> Option<Told> {
    let (kind, texts) = block.split_first()?;
    let texts = String::from_utf8_lossy(texts);
    let mut texts = texts.split('\0');
    if *kind == b'F' {
        let count = |word: &str| {
            let (number, count) = word.split_once('=')?;
            Some((number.parse().ok()?, count.parse().ok()?))
        };
        return Some(Told::Files(texts.next()?.split_whitespace().filter_map(count).collect()));
    }
    let who = Identity {
        pid: texts.next()?.parse().ok()?,
        start: texts.next()?.parse().ok()?,
        is_init: texts.next()? == "1",
        command: texts.next()?.to_string(),
        cgroup: texts.next()?.to_string(),
    };
    let last = texts.next()?;
    match kind {
        b'U' => Some(Told::User(who, last.split_whitespace().filter_map(device).collect())),
        b'H' => Some(Told::Hidden(who, last.to_string())),
        _ => None,
    }
}

fn letter(how: How) -> char {
    match how {
        How::Open => 'o',
        How::Mapped => 'm',
        How::Ring => 'r',
        How::Buffer => 'b',
    }
}

fn device(word: &str) -> Option<OpenDevice> {
    let how =
        [How::Open, How::Mapped, How::Ring, How::Buffer].into_iter().find(|how| word.starts_with(letter(*how)))?;
    let number: DeviceNumber = word.get(1..)?.parse().ok()?;
    Some(OpenDevice { number, how })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::fd::{FromRawFd, OwnedFd};

    #[test]
    fn what_is_told_survives_the_pipe() {
        let number = DeviceNumber { major: 195, minor: 0 };
        let who = Identity {
            pid: 812,
            start: 4711,
            command: "a\nb".to_string(),
            cgroup: "0::/lxc/101/ns\n".to_string(),
            is_init: true,
        };
        let open = [How::Open, How::Mapped, How::Ring, How::Buffer].map(|how| OpenDevice { number, how }).to_vec();
        for told in [
            Told::User(who.clone(), open),
            Told::Hidden(who, "its mappings: EACCES".to_string()),
            Told::Files(BTreeMap::from([(number, 3)])),
        ] {
            assert_eq!(decode(&encode(&told)), Some(told));
        }
    }

    /// Whoever has looked at itself was looked at by somebody else: a child of this test.
    #[test]
    fn an_open_file_is_seen_and_counted_once() {
        let file = File::open("/dev/full").unwrap();
        let _copy = file.try_clone().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let sought = Sought { majors: vec![1], among: vec![own] };
        let sight = look(Path::new("/"), &sought, Duration::from_secs(20)).unwrap();
        let full = DeviceNumber { major: 1, minor: 7 };
        assert!(sight.users[0].open.contains(&OpenDevice { number: full, how: How::Open }), "{sight:?}");
        assert!(sight.users[0].process.start > 0);
        if super::super::kcmp::tables(own, own).is_some() {
            assert_eq!(sight.files.get(&full), Some(&1));
        }
    }

    /// It keeps a file open whose descriptor is closed. The kernel tells of it by name.
    #[test]
    fn a_file_that_a_ring_of_io_uring_has_is_seen() {
        let mut parameters = [0_u8; 120];
        // SAFETY: the kernel writes to these bytes, which are as many as it has parameters.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
        if ring < 0 {
            return; // a kernel without it, or one that lets nobody
        }
        // SAFETY: the kernel has just made it, and nobody else has it.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let file = File::open("/dev/zero").unwrap();
        let files = [file.as_raw_fd()];
        // SAFETY: 2 registers files; it reads as many descriptors as the last number says.
        let registered = unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), 2, files.as_ptr(), 1) };
        drop(file);
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", ring.as_raw_fd())).unwrap();
        if registered != 0 || !info.contains("/dev/zero") {
            return; // a kernel that does not tell where it is
        }
        let own = i32::try_from(std::process::id()).unwrap();
        let sought = Sought { majors: vec![1], among: vec![own] };
        let sight = look(Path::new("/"), &sought, Duration::from_secs(20)).unwrap();
        let zero = OpenDevice { number: DeviceNumber { major: 1, minor: 5 }, how: How::Ring };
        assert!(sight.users[0].open.contains(&zero), "{sight:?}");
    }

    #[test]
    fn no_time_and_no_processes_are_no_empty_answer() {
        let sought = Sought { majors: vec![1], among: Vec::new() };
        let problem = look(Path::new("/"), &sought, Duration::ZERO).unwrap_err();
        assert!(problem.contains("took longer than 0.0 s"), "{problem}");
        let problem = look(Path::new("/nowhere"), &sought, Duration::from_secs(20)).unwrap_err();
        assert!(problem.contains("/nowhere/proc: ENOENT"), "{problem}");
    }
}
