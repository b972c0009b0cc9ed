//! Lines of ours in a container's configuration: which to add, replace and take out, and the bytes with that done. All
//! other bytes stay as they are. Pure.

use super::line::{Line, lines, places, present};
use super::rules::{LineKind, Need};
use super::there::{Numbers, is_like, matches, missing};
use crate::proxmox::ct::{self};
use crate::story::row;
use std::ops::Range;

/// More devices than there are numbers for.
#[derive(Debug, PartialEq, Eq)]
pub struct TooManyDevices;

/// What becomes of a configuration.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub remove: Vec<Line>,
    /// The old one and the new one, in its place.
    pub replace: Vec<(Line, Line)>,
    pub add: Vec<Line>,
    /// Of the lines that are there then, those that are ours.
    pub ours: Vec<Line>,
}

impl Change {
    /// The container gets what it needs: what somebody else wrote stays theirs, what of ours it needs no more goes.
    ///
    /// # Errors
    /// When there are not enough numbers for its devices.
    pub fn attach(bytes: &[u8], recorded: &[Line], needs: &[Need]) -> Result<Change, TooManyDevices> {
        let ours = present(bytes, recorded);
        let others = without(bytes, &ours);
        let missing = missing(&others, needs);
        let matched = matches(&ours, &missing);
        let mut change = Change::default();
        let mut numbers = Numbers::of(&others, &ours);
        for (need, old) in missing.iter().zip(&matched) {
            change.want(need, old.and_then(|at| ours.get(at).copied()), &mut numbers)?;
        }
        let is_left = |at: &usize| !matched.contains(&Some(*at));
        change.remove = lines_at(&ours, is_left).collect();
        Ok(change)
    }

    /// What is there of ours gets the numbers of now. What somebody took out stays out.
    ///
    /// # Errors
    /// When there are not enough numbers for its devices.
    pub fn refresh(bytes: &[u8], recorded: &[Line], needs: &[Need]) -> Result<Change, TooManyDevices> {
        let ours = present(bytes, recorded);
        let mut change = Change { ours: recorded.to_vec(), ..Change::default() };
        if ours.is_empty() {
            return Ok(change);
        }
        let others = without(bytes, &ours);
        let missing = missing(&others, needs);
        let all: Vec<&Line> = recorded.iter().collect();
        let matched = matches(&all, &missing);
        let mut numbers = Numbers::of(&others, &ours);
        change.ours.clear();
        for (need, old) in missing.iter().zip(&matched) {
            match old.and_then(|at| all.get(at).copied()) {
                Some(old) if !ours.contains(&old) => change.ours.push(old.clone()),
                old => change.want(need, old, &mut numbers)?,
            }
        }
        let is_left = |at: &usize| !matched.contains(&Some(*at));
        change.ours.extend(lines_at(&all, is_left));
        Ok(change)
    }

    /// While a GPU of its is away, what is there of ours and has become another GPU's goes: these are what the others
    /// need. It is added again when the GPU is back.
    pub fn withdraw(bytes: &[u8], recorded: &[Line], others: &[Need]) -> Change {
        let present = present(bytes, recorded);
        let is_theirs = |line: &&Line| {
            let is_it = |need: &Need| Some(need.kind) == line.kind() && need.value == line.value;
            others.iter().any(|need| is_it(need) && need.what != line.what) && present.contains(line)
        };
        let (remove, ours): (Vec<&Line>, Vec<&Line>) = recorded.iter().partition(is_theirs);
        Change { remove: cloned(&remove), ours: cloned(&ours), ..Change::default() }
    }

    /// All that is ours goes.
    pub fn detach(bytes: &[u8], recorded: &[Line]) -> Change {
        Change { remove: cloned(&present(bytes, recorded)), ..Change::default() }
    }

    fn want(&mut self, need: &Need, old: Option<&Line>, numbers: &mut Numbers) -> Result<(), TooManyDevices> {
        let key = match (need.kind, old) {
            (LineKind::Rule, _) => "lxc.cgroup2.devices.allow".to_string(),
            (LineKind::Mount, _) => "lxc.mount.entry".to_string(),
            (LineKind::Dev, Some(old)) => old.key.clone(),
            (LineKind::Dev, None) => format!("dev{}", numbers.next().ok_or(TooManyDevices)?),
        };
        let line = Line { what: need.what.clone(), key, value: need.value.clone() };
        match old {
            Some(old) if old.value == line.value => {}
            Some(old) => self.replace.push((old.clone(), line.clone())),
            None => self.add.push(line.clone()),
        }
        self.ours.push(line);
        Ok(())
    }

    pub fn adds_node(&self) -> bool {
        let is_node = |line: &&Line| matches!(line.kind(), Some(LineKind::Dev | LineKind::Mount));
        self.add.iter().filter(is_node).any(|line| line.value.starts_with("/dev/nvidia"))
    }

    pub fn is_nothing(&self) -> bool {
        self.remove.is_empty() && self.replace.is_empty() && self.add.is_empty()
    }

    /// A line each, as in the plan of a handoff.
    pub fn to_text(&self) -> String {
        let told = |verb: &str, line: &Line| format!("  {}\n", row(verb, line));
        let removed = self.remove.iter().map(|line| told("remove", line));
        let replaced = self.replace.iter().map(|(old, new)| format!("{}{}", told("replace", old), told("by", new)));
        let added = self.add.iter().map(|line| told("add", line));
        removed.chain(replaced).chain(added).collect()
    }

    /// `9 lines added, 1 replaced`
    pub fn summary(&self) -> String {
        let counts = [(self.add.len(), "added"), (self.replace.len(), "replaced"), (self.remove.len(), "removed")];
        let counts = counts.into_iter().filter(|(n, _)| *n > 0).enumerate();
        let parts = counts.map(|(at, (n, how))| match (at, n) {
            (0, 1) => format!("1 line {how}"),
            (0, _) => format!("{n} lines {how}"),
            _ => format!("{n} {how}"),
        });
        parts.collect::<Vec<_>>().join(", ")
    }

    /// The configuration with this done, and whether a newline at its end is ours: it was (`newline`), or it is now.
    pub fn apply(&self, bytes: &[u8], newline: bool) -> (Vec<u8>, bool) {
        let mut bytes = bytes.to_vec();
        self.put_in_place(&mut bytes);
        let was_end = self.take_out(&mut bytes);
        if self.ours.is_empty() && newline && was_end && bytes.last() == Some(&b'\n') {
            bytes.pop();
            return (bytes, false);
        }
        let added = self.append(&mut bytes);
        (bytes, newline || added)
    }

    /// All are looked up first: a new line may be like an old one.
    fn put_in_place(&self, bytes: &mut Vec<u8>) {
        let old: Vec<&Line> = self.replace.iter().map(|(old, _)| old).collect();
        for (range, at) in places(bytes, &old).into_iter().rev() {
            let new = self.replace.get(at).map(|(_, new)| new.to_string());
            bytes.splice(range, new.unwrap_or_default().into_bytes());
        }
    }

    /// Whether what was taken out was the end of the file, as it is where we wrote it.
    fn take_out(&self, bytes: &mut Vec<u8>) -> bool {
        let wanted: Vec<&Line> = self.remove.iter().collect();
        let places = places(bytes, &wanted);
        let first = places.first().map(|(range, _)| range.start);
        for (range, _) in places.into_iter().rev() {
            let end = bytes.len().min(range.end + 1);
            bytes.drain(range.start..end);
        }
        first == Some(bytes.len())
    }

    /// After the last line of the main section that is not blank. Whether that needed a newline first.
    fn append(&self, bytes: &mut Vec<u8>) -> bool {
        if self.add.is_empty() {
            return false;
        }
        let is_blank = |range: &Range<usize>| bytes.get(range.clone()).is_some_and(ct::is_blank);
        let last = lines(ct::main_section(bytes)).filter(|range| !is_blank(range)).last();
        let end = last.map_or(0, |range| range.end + 1);
        let added = end > bytes.len();
        if added {
            bytes.push(b'\n');
        }
        let text: String = self.add.iter().map(|line| format!("{line}\n")).collect();
        bytes.splice(end..end, text.into_bytes());
        added
    }
}

/// Recorded lines that are not there as they were written although something like them is: somebody changed them.
pub fn changed<'a>(bytes: &[u8], recorded: &'a [Line]) -> Vec<&'a Line> {
    let ours = present(bytes, recorded);
    let others = ct::parse(&without(bytes, &ours));
    recorded.iter().filter(|line| !ours.contains(line) && is_like(&others, line)).collect()
}

/// The configuration without these lines, of those that are there.
pub fn without_ours(bytes: &[u8], recorded: &[Line]) -> Vec<u8> {
    without(bytes, &present(bytes, recorded))
}

fn without(bytes: &[u8], lines: &[&Line]) -> Vec<u8> {
    Change { remove: cloned(lines), ..Change::default() }.apply(bytes, false).0
}

/// Of those whose place `is_it`.
fn lines_at(lines: &[&Line], is_it: impl Fn(&usize) -> bool) -> impl Iterator<Item = Line> {
    (0..).zip(lines).filter(move |(at, _)| is_it(at)).map(|(_, line)| (*line).clone())
}

fn cloned(lines: &[&Line]) -> Vec<Line> {
    lines.iter().map(|line| (*line).clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::Style;
    use crate::containers::rules::{Facts, Gpu, needs};
    use crate::proxmox::noise;

    fn facts(uvm: u64, minor: u64) -> Facts {
        let gpus = vec![Gpu { slot: "0000:01:00".parse().unwrap(), minor, drm: Vec::new() }];
        Facts { gpus, are_all: true, uvm: Some(uvm), has_modeset: true, caps: None, mode: 0o666 }
    }

    fn wanted(style: Style) -> Vec<Need> {
        needs(&facts(511, 0), style, false)
    }

    /// What attach leaves in the file, and in the record: lines and newline.
    fn attached(bytes: &[u8], style: Style) -> (Vec<u8>, Vec<Line>, bool) {
        let change = Change::attach(bytes, &[], &wanted(style)).unwrap();
        let (new, newline) = change.apply(bytes, false);
        (new, change.ours, newline)
    }

    fn detached(bytes: &[u8], lines: &[Line], newline: bool) -> Vec<u8> {
        Change::detach(bytes, lines).apply(bytes, newline && changed(bytes, lines).is_empty()).0
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// As Proxmox writes a configuration that it has read: comments, keys in order, then its `lxc.*` lines as they were.
    fn rewritten(bytes: &[u8]) -> Vec<u8> {
        let main = ct::main_section(bytes);
        let (mut comments, mut keys, mut raw) = (Vec::new(), Vec::new(), Vec::new());
        for line in main.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match (line, ct::setting(line)) {
                ([b'#', ..], _) => comments.extend_from_slice(&[line, b"\n"].concat()),
                (_, Some((key, value))) if key.starts_with(b"lxc.") => {
                    raw.extend_from_slice(&[key, b": ", value, b"\n"].concat());
                }
                (_, Some((key, value))) => keys.push([key, b": ", value, b"\n"].concat()),
                _ => {}
            }
        }
        keys.sort();
        [comments, keys.concat(), raw, bytes[main.len()..].to_vec()].concat()
    }

    const PLAIN: &str = "# a comment\nunprivileged: 1\narch: amd64\ndev2: /dev/ttyUSB0\n";
    const SNAPSHOT: &str = "\n[pve:pending]\nmemory: 1\n\n[snap]\narch: amd64\nlxc.mount.entry: /a b none bind\n";

    #[test]
    fn lines_are_added_at_the_end_of_the_main_section() {
        let bytes = format!("{PLAIN}{SNAPSHOT}");
        let (new, ours, newline) = attached(bytes.as_bytes(), Style::Dev);
        let added = "dev3: /dev/nvidia0,mode=0666\ndev4: /dev/nvidiactl,mode=0666\ndev5: /dev/nvidia-uvm,mode=0666\n\
                     dev6: /dev/nvidia-uvm-tools,mode=0666\ndev7: /dev/nvidia-modeset,mode=0666\n";
        assert_eq!(text(&new), format!("{PLAIN}{added}{SNAPSHOT}"));
        assert_eq!((ours.len(), newline), (5, false));
    }

    #[test]
    fn what_was_there_before_comes_back() {
        let files = [
            "",
            "\n",
            "\n\n",
            "a: b",
            "a: b\n",
            "a: b\n\n",
            "a: b\n  ",
            "a: b\r\nc: d\r\n",
            "a: b\r\nc: d\r",
            "a: b\rc: d",
            "\u{feff}a: b",
            "a: b\0c\n",
            "#only\n",
            "#only",
            "[snap]\na: b",
            "[snap]",
            "\n[snap]",
            "a: b\n[snap]",
            "a: b\n\n \n[pve:pending]\ndelete: dev0",
            "a: b\n[no header\nc: d",
            "dev0: /dev/ttyS0\n",
        ];
        for bytes in files {
            for style in [Style::Mount, Style::Dev] {
                let (new, lines, newline) = attached(bytes.as_bytes(), style);
                assert_ne!(new, bytes.as_bytes(), "{bytes:?}");
                assert!(present(&new, &lines).len() == lines.len(), "{bytes:?}");
                assert!(Change::attach(&new, &lines, &wanted(style)).unwrap().is_nothing(), "{bytes:?}");
                assert_eq!(text(&detached(&new, &lines, newline)), bytes, "{style:?}");
            }
        }
    }

    #[test]
    fn what_was_there_before_comes_back_whatever_it_was() {
        let seed = format!(
            "{PLAIN}lxc.cgroup2.devices.allow = c 195:* rwm\nlxc.mount.entry: /dev/nvidia0 dev/nvidia0 x\n{SNAPSHOT}"
        );
        let (mount, dev) = (wanted(Style::Mount), wanted(Style::Dev));
        noise::mutations(seed.as_bytes(), |bytes| {
            // One style after the other, which takes back what it finds.
            let (first, second) = if bytes.len() % 2 == 0 { (&mount, &dev) } else { (&dev, &mount) };
            let change = Change::attach(bytes, &[], first).unwrap();
            let (new, newline) = change.apply(bytes, false);
            assert_eq!(detached(&new, &change.ours, newline), bytes);
            let change = Change::attach(&new, &change.ours, second).unwrap();
            let (new, newline) = change.apply(&new, newline);
            assert_eq!(detached(&new, &change.ours, newline), bytes);
        });
    }

    #[test]
    fn ours_are_found_after_proxmox_wrote_the_file_anew() {
        for end in ["", SNAPSHOT] {
            for style in [Style::Mount, Style::Dev] {
                let bytes = format!("{PLAIN}lxc.apparmor.profile=x\nname: z\n{end}");
                let (new, lines, newline) = attached(bytes.as_bytes(), style);
                let new = rewritten(&new);
                assert!(Change::attach(&new, &lines, &wanted(style)).unwrap().is_nothing());
                assert_eq!(text(&detached(&new, &lines, newline)), text(&rewritten(bytes.as_bytes())));
            }
        }
    }

    #[test]
    fn what_somebody_else_wrote_is_theirs() {
        let theirs =
            "lxc.cgroup2.devices.allow =  c  195:*\trwm\nlxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind 0 0\n";
        let (new, lines, newline) = attached(theirs.as_bytes(), Style::Mount);
        assert_eq!(lines.len(), wanted(Style::Mount).len() - 2);
        assert_eq!(text(&detached(&new, &lines, newline)), theirs);
        // Also in the other way, and without leave to write: it would be given twice.
        for style in [Style::Mount, Style::Dev] {
            for theirs in [
                "dev0: path=/dev/nvidia0,mode=0600\ndev1: /dev/nvidiactl,deny-write=1\n",
                "lxc.mount.entry: /dev dev none bind\n",
                "lxc.mount.entry: /dev/nvidiactl dev/nvidiactl none bind\nlxc.mount.entry: /srv/x dev//nvidia0 none bind\n",
                "mp0: /dev/nvidia0,mp=/dev/nvidia0\nmp1: /dev/nvidiactl,mp=/dev/nvidiactl\n",
                "arch: amd64\n[pve:pending]\ndev0: /dev/nvidia0\ndev1: /dev/nvidiactl\n",
            ] {
                let lines = attached(theirs.as_bytes(), style).1;
                let is_again =
                    |line: &Line| ["/dev/nvidia0", "/dev/nvidiactl"].iter().any(|node| line.value.starts_with(node));
                assert!(!lines.iter().any(is_again), "{theirs}");
                assert!(theirs.contains("/dev dev") != lines.iter().any(|line| line.value.contains("/dev/nvidia-uvm")));
            }
        }
        let deleted = attached(b"dev0: /dev/nvidia0\n[pve:pending]\ndelete: dev0\n", Style::Mount).1;
        assert!(deleted.iter().any(|line| line.value.starts_with("/dev/nvidia0 ")));
        // What is denied afterwards is not there.
        let denied = format!("{theirs}lxc.cgroup2.devices.deny: a\n");
        let (new, lines, newline) = attached(denied.as_bytes(), Style::Mount);
        assert_eq!(lines.len(), wanted(Style::Mount).len() - 1);
        assert_eq!(text(&detached(&new, &lines, newline)), denied);
    }

    #[test]
    fn numbers_of_devices() {
        let first =
            |bytes: &str| attached(bytes.as_bytes(), Style::Dev).1.iter().map(|l| l.key.clone()).collect::<Vec<_>>();
        assert_eq!(first("")[0], "dev0");
        assert_eq!(first("dev0: /a\ndev7: x\n")[0], "dev8");
        assert_eq!(first("dev1: /a\n[pve:pending]\ndev9: /b\n[snap]\ndev20: /c\n")[0], "dev10");
        assert_eq!(first("dev252: /a\ndev1: /b\n"), ["dev253", "dev254", "dev255", "dev0", "dev2"]);
        assert_eq!(first("dev256: /a\ndev1000: /b\n")[0], "dev0");
        let full: String = (0..252).map(|number| format!("dev{number}: /dev/a\n")).collect();
        assert_eq!(Change::attach(full.as_bytes(), &[], &wanted(Style::Dev)), Err(TooManyDevices));
        assert!(Change::attach(full.as_bytes(), &[], &wanted(Style::Mount)).is_ok());
    }

    #[test]
    fn new_numbers_take_the_place_of_the_old() {
        for style in [Style::Mount, Style::Dev] {
            let (old, lines, _) = attached(PLAIN.as_bytes(), style);
            let old = [&old[..], b"name: later\n"].concat();
            let needs = needs(&facts(509, 1), style, false);
            for change in [Change::refresh(&old, &lines, &needs), Change::attach(&old, &lines, &needs)] {
                let change = change.unwrap();
                assert!(change.add.is_empty() && change.remove.is_empty());
                let (new, _) = change.apply(&old, false);
                let expected = text(&old).replace("511:", "509:").replace("nvidia0", "nvidia1");
                assert_eq!(text(&new), expected);
                assert!(present(&new, &change.ours).len() == change.ours.len());
                assert_eq!(text(&detached(&new, &change.ours, false)), format!("{PLAIN}name: later\n"));
            }
            assert!(Change::refresh(&old, &lines, &wanted(style)).unwrap().is_nothing());
        }
        // What was one line's number is the other's now.
        let line = |what: &str, number| Line {
            what: what.to_string(),
            key: "lxc.cgroup2.devices.allow".to_string(),
            value: format!("c {number}:* rwm"),
        };
        let swapped = [line("nvidia-uvm", 195), line("nvidia", 511)];
        let bytes = format!("{}\n{}\n", swapped[0], swapped[1]);
        let change = Change::refresh(bytes.as_bytes(), &swapped, &wanted(Style::Mount)[..2]).unwrap();
        assert_eq!(text(&change.apply(bytes.as_bytes(), false).0), format!("{}\n{}\n", swapped[1], swapped[0]));
    }

    /// A line that somebody took out stays out, one that they changed stays as it is, and what is new is added.
    #[test]
    fn a_refresh_respects_what_somebody_did() {
        let (bytes, lines, _) = attached(PLAIN.as_bytes(), Style::Mount);
        let entry = "lxc.mount.entry: /dev/nvidia-modeset dev/nvidia-modeset none bind,optional,create=file\n";
        let edited = text(&bytes).replace(entry, "").replace("511:*", "511:0");
        let later = Facts { caps: Some((236, Vec::new())), ..facts(509, 0) };
        let change = Change::refresh(edited.as_bytes(), &lines, &needs(&later, Style::Mount, false)).unwrap();
        let added: Vec<String> = change.add.iter().map(ToString::to_string).collect();
        assert_eq!(added[0], "lxc.cgroup2.devices.allow: c 236:* rwm");
        assert_eq!((change.add.len(), change.replace.len(), change.remove.len()), (2, 0, 0));
        // Nothing of ours is there any more: somebody made another container of it.
        let change = Change::refresh(PLAIN.as_bytes(), &lines, &needs(&later, Style::Mount, false)).unwrap();
        assert!(change.is_nothing());
    }

    /// From all GPUs to one of several, and the newcomer stays out of reach.
    #[test]
    fn another_gpu_in_the_host() {
        let (bytes, lines, _) = attached(PLAIN.as_bytes(), Style::Mount);
        let needs = needs(&Facts { are_all: false, ..facts(511, 0) }, Style::Mount, false);
        let change = Change::attach(&bytes, &lines, &needs).unwrap();
        let (new, _) = change.apply(&bytes, false);
        let rules: Vec<String> = ct::parse(&new).devices_allow().map(str::to_string).collect();
        assert_eq!(rules, ["c 511:* rwm", "c 195:0 rwm", "c 195:255 rwm", "c 195:254 rwm"]);
        assert_eq!(text(&detached(&new, &change.ours, false)), PLAIN);
    }

    #[test]
    fn what_somebody_changed_is_left_and_told() {
        let (bytes, lines, newline) = attached(b"arch: amd64", Style::Mount);
        assert!(newline);
        let edited =
            text(&bytes).replace("/dev/nvidia0 dev/nvidia0 none bind,", "/dev/nvidia0 dev/nvidia0 none rbind,");
        let changed: Vec<&str> = changed(edited.as_bytes(), &lines).iter().map(|line| line.what.as_str()).collect();
        assert_eq!(changed, ["0000:01:00"]);
        let left = "arch: amd64\nlxc.mount.entry: /dev/nvidia0 dev/nvidia0 none rbind,optional,create=file\n";
        assert_eq!(text(&detached(edited.as_bytes(), &lines, newline)), left);
        // What is ours besides is nobody's change of it.
        let both = [&lines[..], &[Line { value: "c 195:0 rwm".to_string(), ..lines[0].clone() }]].concat();
        assert!(super::changed(&bytes, &both).is_empty());
        // What is not there at all was taken out.
        assert!(super::changed(b"arch: amd64", &lines).is_empty());
    }

    #[test]
    fn a_newline_is_taken_back_only_where_it_is_the_end() {
        let (bytes, lines, newline) = attached(b"arch: amd64", Style::Dev);
        let later = [&bytes[..], b"name: later\n"].concat();
        assert_eq!(text(&detached(&later, &lines, newline)), "arch: amd64\nname: later\n");
        assert_eq!(text(&detached(b"arch: amd64\n", &lines, newline)), "arch: amd64\n");
    }

    #[test]
    fn how_a_change_is_told() {
        let (bytes, lines, _) = attached(b"", Style::Mount);
        let summary = |change: Change| change.summary();
        assert_eq!(summary(Change::detach(&bytes, &lines)), "7 lines removed");
        assert_eq!(summary(Change::detach(&bytes, &lines[..1])), "1 line removed");
        let needs = needs(&facts(509, 0), Style::Dev, false);
        assert_eq!(summary(Change::attach(&bytes, &lines, &needs).unwrap()), "5 lines added, 7 removed");
    }
}
