//! Who Proxmox has reserved a PCI device for: `/run/qemu-server/pci-id-reservations`, read as `PVE::QemuServer::PCI` reads
//! it. A reservation counts while its QEMU runs, and before there is one until a time.

use super::running::qemu_pid;
use crate::address::Address;
use crate::sorted;
use crate::sys::Kernel;
use std::collections::BTreeMap;

const PATH: &str = "/run/qemu-server/pci-id-reservations";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reservation {
    vmid: u32,
    until: Until,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// A start is under way.
    Time(u64),
    /// The end of this QEMU.
    Pid(i32),
}

/// Whose each device is now; what was left behind is nobody's.
pub fn read(kernel: &dyn Kernel) -> BTreeMap<Address, u32> {
    let now = kernel.unix_time();
    let counts = |reservation: &Reservation| match reservation.until {
        Until::Time(time) => time > now,
        Until::Pid(pid) => qemu_pid(kernel, reservation.vmid) == Some(pid),
    };
    let all = parse(&kernel.text(PATH).unwrap_or_default()).into_iter();
    sorted::map(all.filter(|(_, reservation)| counts(reservation)).map(|(address, one)| (address, one.vmid)))
}

/// Lines that Proxmox would pass over are passed over. Of two for a device the last counts.
fn parse(text: &str) -> BTreeMap<Address, Reservation> {
    let line = |line: &str| {
        let mut words = line.split(' ');
        let (address, vmid, until) = (words.next()?, words.next()?, words.next()?);
        let until = match until.split_once(':')? {
            ("time", time) => Until::Time(time.parse().ok()?),
            ("pid", pid) => Until::Pid(pid.parse().ok()?),
            _ => return None,
        };
        let reservation = Reservation { vmid: vmid.parse().ok()?, until };
        words.next().is_none().then_some((address.parse().ok()?, reservation))
    };
    sorted::map(text.lines().filter_map(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let text = "0000:01:00.0 111 pid:4711\n0000:02:00.0 112 time:1763640000\n0000:03:00.0 113 host:1\n0000:04:00 1\n\
                    0000:05:00.0 114 pid:1 more\nx 115 pid:1\n0000:01:00.0 116 pid:4712\n";
        let found: Vec<(String, Reservation)> = parse(text).into_iter().map(|(a, r)| (a.to_string(), r)).collect();
        let expected = [
            ("0000:01:00.0".to_string(), Reservation { vmid: 116, until: Until::Pid(4712) }),
            ("0000:02:00.0".to_string(), Reservation { vmid: 112, until: Until::Time(1_763_640_000) }),
        ];
        assert_eq!(found, expected);
    }
}
