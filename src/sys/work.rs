//! What the worker does: each request may block in the kernel.

use super::action::{ActError, Action, Node};
use super::device::DeviceNumber;
use super::expendable::Request;
use super::{inside, program, tree};
use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// How often a counter is looked at that others change meanwhile.
const WEIGHINGS: usize = 20;

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// May block for as long as the kernel likes.
///
/// # Errors
/// What the kernel or the program said.
pub fn carry_out(root: &Path, request: &Request) -> Result<Vec<u8>, ActError> {
    match request {
        Request::Act(action) => act(root, action).map(|()| Vec::new()),
        Request::Read(path) => fs::read(below(root, path)).map_err(ActError::Os),
        Request::ReadHead(path, length) => read_head(&below(root, path), *length).map_err(ActError::Os),
        Request::TryOpen(path) => {
            let open = fs::OpenOptions::new().read(true).write(true).open(below(root, path));
            open.map(|_| Vec::new()).map_err(ActError::Os)
        }
        Request::Weigh(node, counter) => {
            let weight = weigh(&below(root, node), &below(root, counter)).map_err(ActError::Os)?;
            Ok(weight.to_string().into_bytes())
        }
        Request::TryClaim(path) => {
            let open = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(below(root, path));
            open.map(|_| Vec::new()).map_err(ActError::Os)
        }
        Request::Inside(pid, path) => {
            let found = inside::device(root, *pid, path).map_err(ActError::Os)?;
            Ok(found.map_or_else(Vec::new, |device| DeviceNumber::of(device).to_string().into_bytes()))
        }
        Request::LinkInside(pid, path) => {
            let found = inside::link(root, *pid, path).map_err(ActError::Os)?;
            Ok(found.map_or_else(Vec::new, OsStringExt::into_vec))
        }
    }
}

fn act(root: &Path, action: &Action) -> Result<(), ActError> {
    match action {
        Action::Write { path, data } => write_attribute(root, path, data).map_err(ActError::Os),
        Action::Load { modules } => {
            let mut programs = ["/usr/sbin/modprobe", "/sbin/modprobe"].iter().map(|path| below(root, path));
            let Some(program) = programs.find(|path| path.exists()) else {
                return Err(ActError::Program("modprobe is not installed".to_string()));
            };
            let arguments: Vec<&str> = ["-a", "--"].into_iter().chain(modules.iter().map(String::as_str)).collect();
            program::run(&program, &arguments, None).map(|_| ())
        }
        Action::Unload { .. } | Action::MakeNode(_) | Action::Pin { .. } if root != Path::new("/") => {
            Err(ActError::Program("not done under GPU_HANDOFF_ROOT".to_string()))
        }
        Action::Unload { module } => unload(module).map_err(ActError::Os),
        Action::MakeNode(node) => make_node(&below(root, &node.path), node).map_err(ActError::Os),
        Action::Pin { pid, thread, cpus } => pin(*pid, *thread, cpus).map_err(ActError::Os),
    }
}

/// Others open and close it as well: what is seen twice in a row counts.
fn weigh(node: &Path, counter: &Path) -> io::Result<u64> {
    let count = || -> io::Result<u64> {
        let text = fs::read_to_string(counter)?;
        text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
    };
    let mut before = None;
    for _ in 0..WEIGHINGS {
        let without = count()?;
        let open = fs::OpenOptions::new().read(true).write(true).open(node)?;
        let weight = count()?.checked_sub(without).filter(|weight| *weight > 0);
        drop(open);
        if let Some(weight) = weight.filter(|_| weight == before) {
            return Ok(weight);
        }
        before = weight;
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// One read(2) of no more than that, as the kernel reads no further then either.
fn read_head(path: &Path, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = fs::File::open(path)?.read(&mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Never creates: a missing attribute must stay an error, also in a tree of files.
fn write_attribute(root: &Path, path: &str, data: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(below(root, path))?;
    // However it got into the tree: a write there is a change to the machine.
    if root != Path::new("/") && tree::is_open_in_the_kernel(&file) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // One write(2): sysfs takes each as a whole value.
    let written = file.write(data.as_bytes())?;
    if written == data.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
}

fn unload(module: &str) -> io::Result<()> {
    let name = CString::new(module)?;
    nix::kmod::delete_module(&name, nix::kmod::DeleteModuleFlags::O_NONBLOCK)?;
    Ok(())
}

fn pin(pid: i32, thread: i32, cpus: &[u32]) -> io::Result<()> {
    // It may have ended since, and its number be somebody else's.
    if !Path::new(&format!("/proc/{pid}/task/{thread}")).exists() {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(usize::try_from(*cpu).unwrap_or(usize::MAX))?;
    }
    Ok(sched_setaffinity(Pid::from_raw(thread), &set)?)
}

/// Made beside the final name and renamed, so that nobody finds the path without a node or with a wrong mode. A handoff
/// and device events may make the same node at the same time: each has a name of its own for it.
fn make_node(path: &Path, node: &Node) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.gpu-handoff-{}", std::process::id()));
    let _ = fs::remove_file(&beside);
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    mknod(&beside, SFlag::S_IFCHR, Mode::empty(), makedev(node.number.major, node.number.minor))?;
    std::os::unix::fs::chown(&beside, Some(node.uid), Some(node.gid))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(node.mode))?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn allowed(child: &Child) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_string()
    }

    #[test]
    fn a_thread_is_pinned_and_no_other_process_s() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let mut other = Command::new("sleep").arg("100").spawn().unwrap();
        let id = |child: &Child| i32::try_from(child.id()).unwrap();
        let before = allowed(&other);
        let last: u32 = before.rsplit([',', '-']).next().unwrap().parse().unwrap();
        let pin = |pid: i32, thread: i32, cpus: &[u32]| {
            let action = Action::Pin { pid, thread, cpus: cpus.to_vec() };
            carry_out(Path::new("/"), &Request::Act(action)).map_err(|error| error.errno())
        };
        let done = pin(id(&child), id(&child), &[last]);
        let (seen, of_another) = (allowed(&child), pin(id(&child), id(&other), &[last]));
        let of_none = [&[][..], &[1023], &[8191]].map(|cpus| pin(id(&child), id(&child), cpus));
        let (kept, untouched) = (allowed(&child), allowed(&other));
        child.kill().and_then(|()| child.wait()).unwrap();
        other.kill().and_then(|()| other.wait()).unwrap();
        assert_eq!((done, of_another), (Ok(Vec::new()), Err(Some(libc::ESRCH))));
        assert_eq!(of_none, [const { Err(Some(libc::EINVAL)) }; 3]);
        assert_eq!((seen, kept, untouched), (last.to_string(), last.to_string(), before));
    }

    #[test]
    fn no_thread_of_this_machine_is_a_tree_s() {
        let action = Action::Pin { pid: 1, thread: 1, cpus: vec![0] };
        let answer = carry_out(Path::new("/nowhere"), &Request::Act(action));
        assert!(matches!(answer, Err(ActError::Program(words)) if words.contains("GPU_HANDOFF_ROOT")));
    }

    /// Only root makes nodes.
    #[test]
    fn a_node_has_its_number_owner_and_mode() {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let root = std::env::temp_dir().join(format!("gpu-handoff-node-{}", std::process::id()));
        let number = DeviceNumber { major: 1, minor: 3 };
        let path = root.join("dev/nvidia0");
        let node = Node { path: "/dev/nvidia0".to_string(), number, mode: 0o640, uid: 0, gid: 44 };
        let made = [make_node(&path, &node), make_node(&path, &node)];
        let meta = fs::metadata(&path);
        let names = fs::read_dir(root.join("dev")).map(|names| names.count());
        let _ = fs::remove_dir_all(&root);
        if made.iter().any(|made| made.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))) {
            return;
        }
        let meta = meta.unwrap();
        assert!(made.iter().all(Result::is_ok) && meta.file_type().is_char_device());
        assert_eq!((DeviceNumber::of(meta.rdev()), meta.mode() & 0o777, meta.gid()), (number, 0o640, 44));
        assert_eq!(names.unwrap(), 1);
    }

    #[test]
    fn a_counter_that_does_not_move_weighs_nothing() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-weigh-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let (node, counter) = (root.join("node"), root.join("counter"));
        fs::write(&node, "").unwrap();
        fs::write(&counter, "7\n").unwrap();
        let weight = weigh(&node, &counter).map_err(|error| error.kind());
        fs::remove_dir_all(root).unwrap();
        assert_eq!(weight, Err(io::ErrorKind::WouldBlock));
    }
}
