//! What each node of a cluster tells the others of itself, in a small file that all of them can read. The time stands in it:
//! Proxmox's cluster file system says of no file when a node wrote it.

use crate::proxmox::cluster::NODES;
use crate::sys::Kernel;
use crate::utc::{unix_time, utc};
use serde_json::{Value, json};

const SCHEMA: u64 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// When it was told, in UTC.
    pub time: String,
    /// Of this program.
    pub version: String,
    /// The one that runs.
    pub kernel: String,
    /// The version of NVIDIA's driver that the host has loaded or, with all cards away, would load.
    pub driver: Option<String>,
    /// Guests find the hookscript where `enable` says that it is.
    pub has_hook: bool,
    pub cards: Vec<Card>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    pub slot: String,
    pub name: Option<String>,
    /// `10de:2684`, of the GPU.
    pub id: String,
    /// As in the status: `vm`, and which.
    pub owner: String,
    pub vmid: Option<u32>,
    pub since: Option<String>,
}

impl Card {
    /// A VM could have it.
    pub fn is_free(&self) -> bool {
        matches!(self.owner.as_str(), "host" | "none")
    }
}

/// Where a node's stands.
pub fn path(node: &str) -> String {
    format!("{NODES}/{node}/gpu-handoff.json")
}

impl Told {
    /// None where a node told nothing.
    ///
    /// # Errors
    /// One line, when it cannot be read or understood.
    pub fn read(kernel: &dyn Kernel, node: &str) -> Result<Option<Told>, String> {
        let path = path(node);
        match kernel.read(&path) {
            Ok(bytes) => Told::parse(&bytes).map(Some).ok_or_else(|| format!("{path} cannot be understood")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }

    /// The node may have another version of this program: what is needed is here, more may be there.
    fn parse(bytes: &[u8]) -> Option<Told> {
        let document: Value = serde_json::from_slice(bytes).ok()?;
        let time = text(&document, "time")?;
        unix_time(&time)?;
        let cards = document.get("gpus")?.as_array()?.iter().map(Card::of).collect::<Option<Vec<Card>>>()?;
        Some(Told {
            time,
            version: text(&document, "version")?,
            kernel: text(&document, "kernel").unwrap_or_default(),
            driver: text(&document, "driver"),
            has_hook: document.get("hookscript").and_then(Value::as_bool).unwrap_or(false),
            cards,
        })
    }

    pub fn to_json(&self) -> Value {
        json!({
            "schema": SCHEMA,
            "time": self.time,
            "version": self.version,
            "kernel": self.kernel,
            "driver": self.driver,
            "hookscript": self.has_hook,
            "gpus": self.cards.iter().map(Card::to_json).collect::<Vec<_>>(),
        })
    }

    /// So long ago, in seconds. A clock that is ahead of this one makes it now.
    pub fn age(&self, now: u64) -> u64 {
        now.saturating_sub(unix_time(&self.time).unwrap_or(now))
    }

    /// The same, told at that moment.
    #[must_use]
    pub fn at(self, now: u64) -> Told {
        Told { time: utc(now), ..self }
    }
}

impl Card {
    fn of(value: &Value) -> Option<Card> {
        let owner = value.get("owner")?;
        Some(Card {
            slot: text(value, "slot")?,
            name: text(value, "name"),
            id: text(value, "id")?,
            owner: text(owner, "kind")?,
            vmid: owner.get("vmid").and_then(Value::as_u64).and_then(|id| id.try_into().ok()),
            since: text(value, "since"),
        })
    }

    fn to_json(&self) -> Value {
        json!({
            "slot": self.slot,
            "name": self.name,
            "id": self.id,
            "owner": {"kind": self.owner, "vmid": self.vmid},
            "since": self.since,
        })
    }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(str::to_string)
}

/// `5 min`.
pub fn ago(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        Told {
            version: "0.1.0".to_string(),
            kernel: "6.14.8-2-pve".to_string(),
            driver: Some("550.163.01".to_string()),
            has_hook: true,
            cards: vec![Card {
                slot: "0000:01:00".to_string(),
                name: None,
                id: "10de:2684".to_string(),
                owner: "vm".to_string(),
                vmid: Some(111),
                since: None,
            }],
            ..Told::default()
        }
        .at(1_795_176_000)
    }

    #[test]
    fn what_is_told_is_read_back() {
        let told = told();
        assert_eq!(Told::parse(told.to_json().to_string().as_bytes()), Some(told.clone()));
        assert_eq!((told.age(1_795_176_061), told.age(1_795_175_000)), (61, 0));
        let ours = told.cards[0].clone();
        assert!(!ours.is_free() && Card { owner: "host".to_string(), ..ours.clone() }.is_free());
        assert!(!Card { owner: "stranded".to_string(), ..ours }.is_free());
    }

    #[test]
    fn what_another_version_tells_is_taken_as_far_as_it_goes() {
        let mut other = told().to_json();
        other["schema"] = json!(2);
        other["more"] = json!({"x": 1});
        other["gpus"][0]["owner"]["more"] = json!(1);
        assert_eq!(Told::parse(other.to_string().as_bytes()), Some(told()));
        for (key, value) in
            [("time", json!("yesterday")), ("gpus", json!([{}])), ("gpus", json!(1)), ("version", json!(1))]
        {
            let mut broken = told().to_json();
            broken[key] = value;
            assert_eq!(Told::parse(broken.to_string().as_bytes()), None, "{broken}");
        }
        for broken in ["", "{", "[]", "\0"] {
            assert_eq!(Told::parse(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn how_long_ago_in_few_words() {
        let words = [0, 59, 60, 3599, 3600, 172_799, 172_800].map(ago);
        assert_eq!(words, ["0 s", "59 s", "1 min", "59 min", "1 h", "47 h", "2 days"]);
    }
}
