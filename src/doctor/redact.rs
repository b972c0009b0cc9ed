//! A report goes to strangers: without addresses of the network, and without names of hosts. Pure.

/// `names` are this host's and its neighbours'.
pub fn redact(text: &str, names: &[String]) -> String {
    let mut found = String::new();
    for line in text.split_inclusive('\n') {
        let mut rest = line;
        while let Some(at) = rest.find(is_in_word) {
            found.push_str(&rest[..at]);
            let end = rest[at..].find(|c| !is_in_word(c)).map_or(rest.len(), |length| at + length);
            found.push_str(&word(&rest[at..end], names));
            rest = &rest[end..];
        }
        found.push_str(rest);
    }
    found
}

/// What addresses and names are made of.
fn is_in_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '-' | '_')
}

fn word(word: &str, names: &[String]) -> String {
    // What ends a sentence or begins a value is none of it.
    let plain = word.trim_matches(['.', ':', '-']);
    let Some(at) = word.find(plain).filter(|_| !plain.is_empty()) else { return word.to_string() };
    let (before, after) = (&word[..at], &word[at + plain.len()..]);
    let is_v6_end = plain.len() < word.len() && is_v6(word.trim_end_matches(['.', '-']));
    if is_v6_end {
        return "IPV6".to_string();
    }
    let kept = if is_mac(plain) {
        "MAC".to_string()
    } else if is_v4(plain) {
        "IPV4".to_string()
    } else if is_v6(plain) {
        "IPV6".to_string()
    } else if let Some((address, port)) = plain.rsplit_once(':').filter(|(address, _)| is_v4(address)) {
        let _ = address;
        format!("IPV4:{port}")
    } else {
        name(plain, names)
    };
    format!("{before}{kept}{after}")
}

/// A host's name, or one within it: `pve1.example.org`.
fn name(word: &str, names: &[String]) -> String {
    let is_it = |part: &str| names.iter().any(|name| name.eq_ignore_ascii_case(part));
    // Proxmox's own folder and kernels have the name that many give their first host.
    let is_alone = is_it(word) && word != "pve";
    let is_file = ["conf", "cfg", "json", "list"].iter().any(|end| word.ends_with(&format!(".{end}")));
    let is_within = |first: &str| is_it(first) && word.contains('.') && !is_file;
    if is_alone || word.split('.').next().is_some_and(is_within) {
        return "HOST".to_string();
    }
    word.to_string()
}

fn is_v4(word: &str) -> bool {
    let parts: Vec<&str> = word.split('.').collect();
    let is_part = |part: &&str| {
        !part.is_empty()
            && part.len() <= 3
            && part.bytes().all(|b| b.is_ascii_digit())
            && part.parse::<u16>().is_ok_and(|n| n < 256)
    };
    parts.len() == 4 && parts.iter().all(is_part)
}

/// Six pairs of digits, with either sign between them.
fn is_mac(word: &str) -> bool {
    [':', '-'].iter().any(|sign| {
        let parts: Vec<&str> = word.split(*sign).collect();
        parts.len() == 6 && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
    })
}

/// With `::`, or of eight groups: PCI addresses and ids have fewer.
fn is_v6(word: &str) -> bool {
    let groups: Vec<&str> = word.split(':').collect();
    let is_group = |group: &&str| group.len() <= 4 && group.bytes().all(|b| b.is_ascii_hexdigit());
    let has_digits = word.bytes().any(|b| b.is_ascii_hexdigit());
    has_digits && groups.iter().all(is_group) && groups.len() <= 8 && (word.contains("::") || groups.len() == 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_go_and_all_else_stays() {
        let names = ["pve".to_string(), "pve2".to_string()];
        for (text, is) in [
            ("net0: virtio=BC:24:11:2E:55:F3,bridge=vmbr0", "net0: virtio=MAC,bridge=vmbr0"),
            ("ip=192.168.1.17/24,gw=192.168.1.1", "ip=IPV4/24,gw=IPV4"),
            ("10.0.0.5:3128 and 10.0.0.5.", "IPV4:3128 and IPV4."),
            ("fe80::1 2001:db8:0:0:1:2:3:4 ::1", "IPV6 IPV6 IPV6"),
            ("fd00::", "IPV6"),
            ("pve kernel: x, pve2.example.org pve.lan", "pve kernel: x, HOST HOST"),
            ("/etc/pve/nodes/pve2/x 6.8.12-4-pve pve.cfg", "/etc/pve/nodes/HOST/x 6.8.12-4-pve pve.cfg"),
        ] {
            assert_eq!(redact(text, &names), is);
        }
        for text in [
            "0000:01:00.0 10de:2684 10de:2684:1043:88e2 0000:01:00",
            "580.95.05 6.8.12-4-pve 1.2.3.4.5 300.1.1.1",
            "c 195:* rwm 511:0 12:30:45",
            "PVE::QemuServer::PCI",
            "pcie_acs_override=downstream,multifunction\n\n  x",
        ] {
            let names = ["node7".to_string()];
            assert_eq!(redact(text, &names), text);
        }
    }
}
