//! What the configurations of VMs and containers have in common.

use super::perl;
use crate::exit::Exit;
use crate::story::printable;
use crate::sys::Kernel;
use crate::trouble::Trouble;
use nix::libc;

const RESTART: &str = "systemctl restart pve-cluster";

/// What is wrong when nothing is known of any guest.
pub fn down() -> Trouble {
    Trouble::new("there is nothing in /etc/pve: Proxmox's cluster file system is down", RESTART)
}

/// Whether Proxmox's cluster file system is not there: then the files of guests that exist are not, either.
pub fn is_down(kernel: &dyn Kernel) -> bool {
    !kernel.exists("/etc/pve/lxc") && !kernel.exists("/etc/pve/qemu-server")
}

/// Why a file of it could not be read.
pub fn unreadable(path: &str, error: &std::io::Error) -> Exit {
    // What is mounted there has no process behind it any more.
    match error.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => {
            Exit::failed(Trouble::new(format!("{path}: {error}: Proxmox's cluster file system has died"), RESTART))
        }
        _ => Exit::failed(format!("{path}: {error}")),
    }
}

/// The node of the cluster that has this guest; the folders in /etc/pve are those of all nodes.
pub fn node_of(kernel: &dyn Kernel, id: u32) -> Option<String> {
    let has_it = |node: &String| {
        ["lxc", "qemu-server"].iter().any(|kind| kernel.exists(&format!("/etc/pve/nodes/{node}/{kind}/{id}.conf")))
    };
    kernel.list("/etc/pve/nodes").into_iter().find(has_it)
}

/// The value of a `key: value` line, given what follows the colon: `\s*(.+?)\s*$`.
///
/// The expression wants one character at least, so of a value of blanks the last blank remains.
pub fn value(after_colon: &[u8]) -> Option<&[u8]> {
    match perl::trim(after_colon) {
        b"" => after_colon.last_chunk::<1>().map(|blank| &blank[..]),
        value => Some(value),
    }
}

/// What a guest is called: `name` of a VM, `hostname` of a container, up to the first section.
pub fn name(bytes: &[u8], key: &str) -> Option<String> {
    let lines = perl::lines(bytes).map(|(_, line)| line).take_while(|line| !line.starts_with(b"["));
    let values = lines.filter_map(|line| value(line.strip_prefix(key.as_bytes())?.strip_prefix(b":")?));
    values.last().map(|name| printable(&perl::text(name)))
}

/// Whether Proxmox takes this line as the state of a snapshot operation, whatever its key is: it
/// looks for `snapstate:\s*(prepare|delete)\s*$` anywhere, and drops the result for the main section.
pub fn is_snapstate(line: &[u8]) -> bool {
    let line = perl::trim_end(line);
    [b"prepare".as_slice(), b"delete"]
        .iter()
        .filter_map(|state| line.strip_suffix(*state))
        .any(|rest| perl::trim_end(rest).ends_with(b"snapstate:"))
}

/// `PVE::Storage::Plugin::parse_volume_id`: `STORAGE:VOLUME`.
pub fn is_volume_id(value: &[u8]) -> bool {
    let Some((storage, volume)) = perl::split_once(value, b':') else {
        return false;
    };
    match storage {
        [first, middle @ .., last] => {
            first.is_ascii_alphabetic()
                && middle.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
                && last.is_ascii_alphanumeric()
                && !volume.is_empty()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_guest() {
        let text = b"#name: x\nname: win11 \nnames: y\nhostname: z\n[before]\nname: old\n";
        assert_eq!(name(text, "name").as_deref(), Some("win11"));
        assert_eq!(name(text, "hostname").as_deref(), Some("z"));
        assert_eq!(name(b"memory: 64\n", "name"), None);
    }

    #[test]
    fn a_value_of_blanks_keeps_the_last_one() {
        assert_eq!(value(b""), None);
        assert_eq!(value(b" \t"), Some(b"\t".as_slice()));
        assert_eq!(value(b"  x y\r"), Some(b"x y".as_slice()));
    }

    #[test]
    fn snapstate_counts_at_the_end_of_any_line() {
        assert!(is_snapstate(b"lock: snapstate:\tdelete \r"));
        assert!(is_snapstate(b"xsnapstate:prepare"));
        assert!(!is_snapstate(b"snapstate: deleted"));
        assert!(!is_snapstate(b"snapstate : delete"));
        assert!(!is_snapstate(b"snapstate: Delete"));
    }

    #[test]
    fn volume_ids() {
        for good in ["local:snippets/a", "LOCAL:x", "a.-_b: ", "ab::"] {
            assert!(is_volume_id(good.as_bytes()), "{good}");
        }
        for bad in ["", "local", "local:", "l:x", "1a:x", "a-:x", "a b:x", "/a:x", ":x"] {
            assert!(!is_volume_id(bad.as_bytes()), "{bad}");
        }
    }
}
