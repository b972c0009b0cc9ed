//! What handoffs add up to since counting began: by direction and result, and how long they and their phases took. Beside
//! the history, which forgets what is old: what it says would go down again.
//!
//! Pure. A file that is lost or not understood begins again at nothing, which who reads counters takes for a restart.

use super::history::{RESULTS, SCHEMA, result};
use serde_json::{Value, json};

pub const DIRECTIONS: [&str; 2] = ["vfio", "home"];

/// Of the classes that times are counted in, in milliseconds: up to and including so many. One more is for the rest.
pub const BOUNDS: [u64; 10] = [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000];

/// What one phase took in one direction, of [`DIRECTIONS`]; the whole has no phase.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times {
    pub direction: usize,
    pub phase: String,
    /// How often each class was met.
    pub classes: [u64; BOUNDS.len() + 1],
    pub ms: u64,
}

impl Times {
    pub fn direction(&self) -> &'static str {
        DIRECTIONS.get(self.direction).copied().unwrap_or_default()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// By direction and result; with refusals.
    pub handoffs: [[u64; RESULTS.len()]; DIRECTIONS.len()],
    /// What was refused took no time worth counting.
    pub times: Vec<Times>,
}

impl Counters {
    pub fn parse(bytes: &[u8]) -> Counters {
        let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let mut counters = Counters::default();
        if value.get("schema").and_then(Value::as_u64) != Some(SCHEMA) {
            return counters;
        }
        for (way, counts) in DIRECTIONS.iter().zip(&mut counters.handoffs) {
            let _ = fill(counts, value.get("handoffs").and_then(|all| all.get(way)));
        }
        for one in list(value.get("times")) {
            // Another version's classes are others.
            let numbers = &mut [0; BOUNDS.len() + 2];
            if let (Some(direction), Some(phase), Some(())) =
                (direction(one), one.get("phase").and_then(Value::as_str), fill(numbers, one.get("counts")))
            {
                let [ms, classes @ ..] = *numbers;
                counters.with(direction, phase, |times| (times.ms, times.classes) = (ms, classes));
            }
        }
        counters
    }

    pub fn to_json(&self) -> String {
        let time = |times: &Times| {
            let counts = [&[times.ms], times.classes.as_slice()].concat();
            json!({"direction": times.direction(), "phase": times.phase, "counts": counts})
        };
        let times: Vec<Value> = self.times.iter().map(time).collect();
        let [vfio, home] = self.handoffs.map(|counts| json!(counts));
        format!("{}\n", json!({"schema": SCHEMA, "handoffs": {"vfio": vfio, "home": home}, "times": times}))
    }

    /// One handoff more, as it stands in the history.
    pub fn add(&mut self, entry: &Value) {
        let Some(direction) = direction(entry) else { return };
        let results = self.handoffs.get_mut(direction).into_iter().flatten();
        let met = results.zip(RESULTS).find(|(_, known)| *known == result(entry));
        met.into_iter().for_each(|(count, _)| *count += 1);
        let phases = list(entry.get("phases"));
        if !phases.is_empty() {
            self.met(direction, "", entry);
        }
        for phase in phases {
            let text = |name: &str| phase.get(name).and_then(Value::as_str).unwrap_or_default();
            // The way back of one that failed is a way home.
            self.met(if text("way") == "back" { 1 } else { direction }, text("name"), phase);
        }
    }

    fn met(&mut self, direction: usize, phase: &str, took: &Value) {
        let ms = took.get("ms").and_then(Value::as_u64).unwrap_or(0);
        let class = BOUNDS.iter().take_while(|bound| ms > **bound).count();
        self.with(direction, phase, |times| {
            times.classes.iter_mut().skip(class).take(1).for_each(|count| *count += 1);
            times.ms += ms;
        });
    }

    fn with(&mut self, direction: usize, phase: &str, change: impl FnOnce(&mut Times)) {
        let is_it = |times: &&mut Times| times.direction == direction && times.phase == phase;
        if let Some(times) = self.times.iter_mut().find(is_it) {
            return change(times);
        }
        let mut times = Times { direction, phase: phase.to_string(), ..Times::default() };
        change(&mut times);
        self.times.push(times);
    }
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn direction(value: &Value) -> Option<usize> {
    let word = value.get("direction")?.as_str()?;
    DIRECTIONS.iter().position(|known| *known == word)
}

/// All of it or nothing; no more than can be added to for as long as anybody lives.
fn fill(numbers: &mut [u64], values: Option<&Value>) -> Option<()> {
    const MOST: u64 = 1 << 52;
    let values = list(values);
    if values.len() != numbers.len() || !values.iter().all(|value| value.as_u64().is_some_and(|number| number < MOST)) {
        return None;
    }
    numbers.iter_mut().zip(values).for_each(|(number, value)| *number = value.as_u64().unwrap_or(0));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(direction: &str, exit: u8, phases: &[(&str, u64, &str)]) -> Value {
        let ms: u64 = phases.iter().map(|(_, ms, _)| ms).sum();
        let phases: Vec<Value> =
            phases.iter().map(|(name, ms, way)| json!({"name": name, "ms": ms, "way": way})).collect();
        json!({"schema": 1, "direction": direction, "vmid": 111, "exit": exit, "ms": ms, "phases": phases})
    }

    fn times(direction: usize, phase: &str, pairs: &[(usize, u64)], ms: u64) -> Times {
        let mut times = Times { direction, phase: phase.to_string(), ms, ..Times::default() };
        pairs.iter().for_each(|(class, count)| times.classes[*class] = *count);
        times
    }

    #[test]
    fn a_handoff_and_its_phases() {
        let mut counters = Counters::default();
        counters.add(&entry("vfio", 0, &[("check", 50, "there"), ("bind", 51, "there")]));
        counters.add(&entry("vfio", 1, &[("check", 60_001, "there"), ("bind", 7, "back")]));
        counters.add(&entry("vfio", 3, &[]));
        counters.add(&entry("vfio", 2, &[]));
        assert_eq!(counters.handoffs, [[1, 1, 2, 0, 0], [0; 5]]);
        let expected = [
            times(0, "", &[(2, 1), (10, 1)], 60_109),
            times(0, "check", &[(0, 1), (10, 1)], 60_051),
            times(0, "bind", &[(1, 1)], 51),
            times(1, "bind", &[(0, 1)], 7),
        ];
        assert_eq!(counters.times, expected);
        assert_eq!(Counters::parse(counters.to_json().as_bytes()), counters);
    }

    #[test]
    fn what_is_not_understood_is_nothing() {
        for text in ["", "{", "[]", "7", "{}", r#"{"schema":2,"handoffs":{"vfio":[1,1,1,1,1]}}"#, "\0\0\0"] {
            assert_eq!(Counters::parse(text.as_bytes()), Counters::default(), "{text}");
        }
        let text = r#"{"schema":1,"handoffs":{"vfio":[1,-1,1,1,1],"home":[2,0,0,0,1],"up":[1,1,1,1,1]},"times":[7,
            {"direction":"vfio","phase":"check","counts":7},
            {"direction":"vfio","phase":"bind","counts":[1,2]},
            {"direction":"up","phase":"bind","counts":[5,1,0,0,0,0,0,0,0,0,0,0]},
            {"direction":"home","phase":"bind","counts":[18446744073709551615,0,0,0,0,0,0,0,0,0,0,1]},
            {"direction":"home","phase":"check","counts":[4503599627370496,0,0,0,0,0,0,0,0,0,0,1]},
            {"direction":"home","phase":"wait","counts":[5,0,0,0,0,0,0,0,0,0,0,"x"]},
            {"direction":"home","phase":"release","counts":[5,1,0,0,0,0,0,0,0,0,0,0]}]}"#;
        let counters = Counters::parse(text.as_bytes());
        assert_eq!(counters.handoffs, [[0; 5], [2, 0, 0, 0, 1]]);
        assert_eq!(counters.times, [times(1, "release", &[(0, 1)], 5)]);
        assert_eq!(Counters::parse(br#"{"schema":1,"handoffs":7,"times":{}}"#), Counters::default());
    }
}
