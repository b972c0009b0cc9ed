//! Whether a function may sleep. Reads only.
//!
//! Binding and unbinding a function that sleeps wakes it first, and some cards do not come back from D3cold. So whatever
//! moves is kept awake: `power/control=on`, `d3cold_allowed=0`.

use crate::address::Address;
use crate::sys::Kernel;

const CONTROL: &str = "power/control";
const D3COLD: &str = "d3cold_allowed";

/// Reading its configuration space would wake it, or the port that it is behind.
pub fn sleeps(kernel: &dyn Kernel, address: Address) -> bool {
    let is = |name: &str, value: &str| kernel.text(&address.attribute(name)).as_deref() == Some(value);
    is("power/runtime_status", "suspended") || is("power_state", "D3cold") || is("power_state", "D3hot")
}

/// The attributes of a function, or what shall be written to them; none where there is no such attribute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Power {
    /// `on`, or `auto` when the function may sleep while nobody uses it.
    pub control: Option<String>,
    /// `1` when the platform may take all power from it then.
    pub d3cold_allowed: Option<String>,
}

impl Power {
    /// Reading these waits for nothing.
    pub fn read(kernel: &dyn Kernel, address: Address) -> Power {
        let read = |name: &str| kernel.text(&address.attribute(name));
        Power { control: read(CONTROL), d3cold_allowed: read(D3COLD) }
    }

    /// The same attributes, in the way that lets nothing sleep.
    #[must_use]
    pub fn awake(&self) -> Power {
        Power {
            control: self.control.as_ref().map(|_| "on".to_string()),
            d3cold_allowed: self.d3cold_allowed.as_ref().map(|_| "0".to_string()),
        }
    }

    /// What of it is otherwise `now`; what is not there now cannot be written.
    #[must_use]
    pub fn unlike(&self, now: &Power) -> Power {
        let differs = |wanted: &Option<String>, now: &Option<String>| {
            wanted.clone().filter(|wanted| now.as_ref().is_some_and(|now| now != wanted))
        };
        Power {
            control: differs(&self.control, &now.control),
            d3cold_allowed: differs(&self.d3cold_allowed, &now.d3cold_allowed),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Power::default()
    }

    /// By attribute: its name and its value.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let values = [(CONTROL, &self.control), (D3COLD, &self.d3cold_allowed)];
        values.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power(control: &str, d3cold: Option<&str>) -> Power {
        Power { control: Some(control.to_string()), d3cold_allowed: d3cold.map(str::to_string) }
    }

    #[test]
    fn only_what_is_there_and_differs_is_written() {
        let home = power("auto", Some("1"));
        assert_eq!(home.awake(), power("on", Some("0")));
        assert_eq!(
            home.awake().unlike(&power("on", Some("1"))).values().collect::<Vec<_>>(),
            [("d3cold_allowed", "0")]
        );
        assert_eq!(home.unlike(&power("on", None)).values().collect::<Vec<_>>(), [("power/control", "auto")]);
        assert!(power("on", Some("0")).unlike(&home.awake()).is_empty());
        assert!(Power::default().awake().is_empty());
    }
}
