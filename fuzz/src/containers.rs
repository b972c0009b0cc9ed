//! What becomes of a container's configuration, whatever is in it, and what is on record about it.

use crate::{assert_one_line, parts};
use gpu_handoff::containers::Style;
use gpu_handoff::containers::edit::{self, Change};
use gpu_handoff::containers::line::Line;
use gpu_handoff::containers::record::Attachment;
use gpu_handoff::containers::rules::{Facts, Gpu, Need, needs};
use gpu_handoff::proxmox::ct;
use gpu_handoff::sys::DeviceNumber;

/// Attached in one style, then in the other, and detached: the bytes are those from before.
pub fn attach(data: &[u8]) {
    let (mut bytes, mut ours, mut newline): (Vec<u8>, Vec<Line>, bool) = (data.to_vec(), Vec::new(), false);
    let before = ct::parse(data);
    // Of what is large only the time counts, and that is the same for each.
    let styles = if data.len() > 16 * 1024 { &[Style::Mount][..] } else { &[Style::Mount, Style::Dev] };
    for style in styles.iter().copied() {
        let needs = wanted(511, style);
        let Ok(change) = Change::attach(&bytes, &ours, &needs) else { return };
        (bytes, newline) = change.apply(&bytes, newline);
        ours = change.ours;
        assert!(Change::attach(&bytes, &ours, &needs).expect("as before").is_nothing());
        let after = ct::parse(&bytes);
        assert_eq!(
            (after.lock, after.template, after.unprivileged),
            (before.lock.clone(), before.template, before.unprivileged)
        );
        assert!(before.dev.iter().all(|(digits, dev)| after.dev.get(digits) == Some(dev)));
        assert!(after.raw_lxc.starts_with(&before.raw_lxc));
        assert!(edit::changed(&bytes, &ours).is_empty());
    }
    assert_eq!(Change::detach(&bytes, &ours).apply(&bytes, newline).0, data);
}

/// A record, then the configuration that it is about: only whole lines are ever taken out.
pub fn attachment(data: &[u8]) {
    let [text, bytes] = parts(data);
    let record = match Attachment::parse(text) {
        Ok(record) => record,
        Err(error) => return assert_one_line(&format!("{error:#}")),
    };
    assert_eq!(Attachment::parse(record.to_json().as_bytes()).expect("was written"), record);
    let refreshed = Change::refresh(bytes, &record.lines, &wanted(509, record.style));
    for change in [Change::detach(bytes, &record.lines)].into_iter().chain(refreshed) {
        let (new, _) = change.apply(bytes, record.newline);
        assert_eq!(change.is_nothing(), new == bytes);
        assert_one_line(&change.summary());
    }
    let (detached, _) = Change::detach(bytes, &record.lines).apply(bytes, false);
    let mut before = bytes.split(|byte| *byte == b'\n');
    let kept = detached.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    for line in kept {
        assert!(before.any(|other| other == line));
    }
}

fn wanted(uvm: u64, style: Style) -> Vec<Need> {
    let drm = vec![("renderD128".to_string(), DeviceNumber { major: 226, minor: 128 })];
    let gpus = vec![Gpu { slot: "0000:01:00".parse().expect("a slot"), minor: 0, drm }];
    let facts = Facts { gpus, are_all: true, uvm: Some(uvm), has_modeset: true, caps: None, mode: 0o666 };
    needs(&facts, style, true)
}
