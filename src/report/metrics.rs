//! `gpu-handoff metrics`: numbers for Prometheus. Pure: from what was read to text, always in the same order.

use crate::decimal;
use crate::handoff::kept::counters::{BOUNDS, Counters, DIRECTIONS, Times};
use crate::handoff::kept::history::RESULTS;
use std::fmt::{Display, Write};
use std::time::Duration;

/// What users there are to tell apart, and what may be owed. All of them are told, so that each has a beginning at 0.
pub const USERS: [&str; 4] = ["container", "vm", "unit", "other"];
pub const OWED: [&str; 4] = ["home", "start", "thaw", "look"];

/// Two ways of writing the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    Open,
    /// Prometheus's own text format 0.0.4, which is all that node_exporter's textfile collector reads.
    Prometheus,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    pub cards: Vec<Card>,
    pub counters: Counters,
    /// Of the host, or of a container that was set up and runs.
    pub drivers: Vec<(Option<u32>, String)>,
    pub has_setup_error: bool,
    pub needs_reboot: bool,
    pub config_problems: usize,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Card {
    pub slot: String,
    pub name: String,
    pub owner: &'static str,
    pub vmid: Option<u32>,
    /// By [`USERS`]; none when that is not known.
    pub users: Option<[u64; USERS.len()]>,
    /// By [`OWED`].
    pub owed: [u64; OWED.len()],
}

impl Metrics {
    pub fn to_text(&self, format: Format) -> String {
        let mut text = Text { text: String::new(), format };
        text.family("build_info", "gauge", "The version of gpu-handoff.");
        text.sample("build_info", &[("version", env!("CARGO_PKG_VERSION"))], &1);
        self.cards(&mut text);
        self.handoffs(&mut text);
        text.family("driver_info", "gauge", "The driver that the host has loaded, and that of containers that run.");
        for (ctid, version) in &self.drivers {
            let place = if ctid.is_some() { "container" } else { "host" };
            text.sample("driver_info", &[("place", place), ("ctid", &number(*ctid)), ("version", version)], &1);
        }
        for (name, help, value) in [
            ("setup_error", "Whether set-up is not done with.", self.has_setup_error.into()),
            ("reboot_required", "Whether the host preparation waits for a boot.", self.needs_reboot.into()),
            ("config_problems", "Mistakes in the configuration.", self.config_problems),
        ] {
            text.family(name, "gauge", help);
            text.sample(name, &[], &value);
        }
        if format == Format::Open {
            text.text.push_str("# EOF\n");
        }
        text.text
    }

    fn cards(&self, text: &mut Text) {
        text.family("owner_info", "gauge", "Who has a GPU: host, vm, manual, none, moving, wedged or stranded.");
        for Card { slot, name, owner, vmid, .. } in &self.cards {
            let vmid = number(*vmid);
            text.sample("owner_info", &[("slot", slot), ("card", name), ("owner", owner), ("vmid", &vmid)], &1);
        }
        for (name, help) in [
            ("stranded", "Whether a GPU is neither at home nor with a running VM, and nobody at work on it."),
            ("wedged", "Whether a call to the kernel has not come back."),
        ] {
            text.family(name, "gauge", help);
            self.cards
                .iter()
                .for_each(|card| text.sample(name, &[("slot", &card.slot)], &u8::from(card.owner == name)));
        }
        text.family("owed", "gauge", "What is still to be done when a GPU is home.");
        for card in &self.cards {
            text.each("owed", &card.slot, ("what", &OWED), &card.owed);
        }
        text.family("users", "gauge", "Processes that use a GPU.");
        for (card, users) in self.cards.iter().filter_map(|card| Some((card, card.users.as_ref()?))) {
            text.each("users", &card.slot, ("kind", &USERS), users);
        }
    }

    fn handoffs(&self, text: &mut Text) {
        text.family("handoffs", "counter", "Handoffs and refusals.");
        for (direction, counts) in DIRECTIONS.iter().zip(self.counters.handoffs) {
            for (result, count) in RESULTS.iter().zip(counts) {
                text.sample("handoffs_total", &[("direction", direction), ("result", result)], &count);
            }
        }
        text.family("duration_seconds", "histogram", "What handoffs took that were begun.");
        for (index, direction) in DIRECTIONS.iter().enumerate() {
            let none = Times::default();
            let is_whole = |times: &&Times| times.direction == index && times.phase.is_empty();
            let times = self.counters.times.iter().find(is_whole).unwrap_or(&none);
            text.histogram("duration_seconds", &[("direction", direction)], times);
        }
        text.family("phase_duration_seconds", "histogram", "What the phases of handoffs took, and of their ways back.");
        for times in self.counters.times.iter().filter(|times| !times.phase.is_empty()) {
            let labels = [("direction", times.direction()), ("phase", times.phase.as_str())];
            text.histogram("phase_duration_seconds", &labels, times);
        }
    }
}

struct Text {
    text: String,
    format: Format,
}

// Writing to a String cannot fail.
impl Text {
    /// OpenMetrics calls the counters by what they count, Prometheus by the name of the sample.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let is_open = self.format == Format::Open;
        let total = if kind == "counter" && !is_open { "_total" } else { "" };
        let _ = write!(self.text, "# HELP gpu_handoff_{name}{total} {help}\n# TYPE gpu_handoff_{name}{total} {kind}\n");
        if is_open && name.ends_with("_seconds") {
            let _ = writeln!(self.text, "# UNIT gpu_handoff_{name} seconds");
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: &dyn Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "gpu_handoff_{name}{labels} {value}");
    }

    fn each(&mut self, name: &str, slot: &str, (label, words): (&str, &[&str]), values: &[u64]) {
        words.iter().zip(values).for_each(|(word, value)| self.sample(name, &[("slot", slot), (label, word)], value));
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], times: &Times) {
        let mut count = 0;
        let bounds = BOUNDS.iter().map(|bound| seconds(*bound)).chain(["+Inf".to_string()]);
        for (bound, class) in bounds.zip(times.classes) {
            count += class;
            self.sample(&format!("{name}_bucket"), &[labels, &[("le", &bound)]].concat(), &count);
        }
        self.sample(&format!("{name}_sum"), labels, &seconds(times.ms));
        self.sample(&format!("{name}_count"), labels, &count);
    }
}

fn number(id: Option<u32>) -> String {
    id.map(|id| id.to_string()).unwrap_or_default()
}

/// As OpenMetrics wants the bounds of a histogram: `2.5`, `1.0`.
fn seconds(ms: u64) -> String {
    let text = decimal::seconds(Duration::from_millis(ms));
    if text.contains('.') { text } else { text + ".0" }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn metrics() -> Metrics {
        let mut counters = Counters::default();
        for (exit, ms) in [(0, 340), (1, 61_000)] {
            let phases = json!([{"name": "bind", "ms": ms, "way": "there"}]);
            counters.add(&json!({"direction": "vfio", "exit": exit, "ms": ms, "phases": phases}));
        }
        let slot = |text: &str| text.to_string();
        Metrics {
            cards: vec![
                Card {
                    slot: slot("0000:01:00"),
                    name: "a \"card\" of \\ two\nlines".to_string(),
                    owner: "vm",
                    vmid: Some(111),
                    users: Some([0, 1, 0, 0]),
                    owed: [0, 2, 0, 0],
                },
                Card { slot: slot("0000:02:00"), owner: "stranded", ..Card::default() },
                Card { slot: slot("0000:03:00"), owner: "wedged", ..Card::default() },
            ],
            counters,
            drivers: vec![(None, "550.163.01".to_string()), (Some(101), "550.54.14".to_string())],
            has_setup_error: true,
            needs_reboot: false,
            config_problems: 2,
        }
    }

    #[track_caller]
    fn has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|other| other == *line), "{line}\n{text}");
        }
    }

    #[test]
    fn what_is_told_of_each() {
        let text = metrics().to_text(Format::Open);
        has(
            &text,
            &[
                r#"gpu_handoff_owner_info{slot="0000:01:00",card="a \"card\" of \\ two\nlines",owner="vm",vmid="111"} 1"#,
                r#"gpu_handoff_owner_info{slot="0000:02:00",card="",owner="stranded",vmid=""} 1"#,
                r#"gpu_handoff_stranded{slot="0000:01:00"} 0"#,
                r#"gpu_handoff_stranded{slot="0000:02:00"} 1"#,
                r#"gpu_handoff_wedged{slot="0000:02:00"} 0"#,
                r#"gpu_handoff_wedged{slot="0000:03:00"} 1"#,
                r#"gpu_handoff_owed{slot="0000:01:00",what="start"} 2"#,
                r#"gpu_handoff_users{slot="0000:01:00",kind="vm"} 1"#,
                r#"gpu_handoff_users{slot="0000:01:00",kind="other"} 0"#,
                r#"gpu_handoff_driver_info{place="host",ctid="",version="550.163.01"} 1"#,
                r#"gpu_handoff_driver_info{place="container",ctid="101",version="550.54.14"} 1"#,
                "gpu_handoff_setup_error 1",
                "gpu_handoff_reboot_required 0",
                "gpu_handoff_config_problems 2",
            ],
        );
        // What is not known is not 0.
        assert!(!text.contains(r#"gpu_handoff_users{slot="0000:02:00""#), "{text}");
    }

    #[test]
    fn counters_begin_at_nothing_and_buckets_add_up() {
        let text = metrics().to_text(Format::Open);
        has(
            &text,
            &[
                r#"gpu_handoff_handoffs_total{direction="vfio",result="done"} 1"#,
                r#"gpu_handoff_handoffs_total{direction="vfio",result="failed"} 1"#,
                r#"gpu_handoff_handoffs_total{direction="home",result="overrun"} 0"#,
                r#"gpu_handoff_duration_seconds_bucket{direction="vfio",le="0.25"} 0"#,
                r#"gpu_handoff_duration_seconds_bucket{direction="vfio",le="0.5"} 1"#,
                r#"gpu_handoff_duration_seconds_bucket{direction="vfio",le="60.0"} 1"#,
                r#"gpu_handoff_duration_seconds_bucket{direction="vfio",le="+Inf"} 2"#,
                r#"gpu_handoff_duration_seconds_sum{direction="vfio"} 61.34"#,
                r#"gpu_handoff_duration_seconds_count{direction="vfio"} 2"#,
                r#"gpu_handoff_duration_seconds_count{direction="home"} 0"#,
                r#"gpu_handoff_phase_duration_seconds_bucket{direction="vfio",phase="bind",le="1.0"} 1"#,
            ],
        );
        assert!(!text.contains("phase=\"\""), "{text}");
    }

    #[test]
    fn two_formats() {
        let (open, prometheus) = (metrics().to_text(Format::Open), metrics().to_text(Format::Prometheus));
        has(&open, &["# TYPE gpu_handoff_handoffs counter", "# UNIT gpu_handoff_duration_seconds seconds"]);
        assert!(open.ends_with("\n# EOF\n"));
        has(
            &prometheus,
            &["# TYPE gpu_handoff_handoffs_total counter", "# HELP gpu_handoff_handoffs_total Handoffs and refusals."],
        );
        let samples =
            |text: &str| text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect::<Vec<_>>();
        assert_eq!(samples(&open), samples(&prometheus));
        // Every sample is of a family with its type, and no sample is there twice.
        for text in [&open, &prometheus] {
            let mut family = String::new();
            for line in text.lines() {
                match line.strip_prefix("# TYPE ") {
                    Some(of) => family = of.split(' ').next().unwrap().to_string(),
                    None => assert!(line.starts_with('#') || line.starts_with(&family), "{line}"),
                }
            }
            let mut names: Vec<String> =
                samples(text).iter().map(|line| line.rsplit_once(' ').unwrap().0.to_string()).collect();
            names.sort();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn seconds_as_they_are_written() {
        for (ms, text) in [(0, "0.0"), (50, "0.05"), (1000, "1.0"), (10_000, "10.0"), (2500, "2.5"), (61_340, "61.34")]
        {
            assert_eq!(seconds(ms), text);
        }
    }
}
