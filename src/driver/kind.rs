//! Open or proprietary modules: by the generation of the GPUs, which is told from their device ids. Pure.

use super::flags::{KIND, TWO_KINDS, is_from};
use crate::config::Module;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Open,
    Proprietary,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Open => "open",
            Kind::Proprietary => "proprietary",
        }
    }

    pub fn from_name(name: &str) -> Option<Kind> {
        [Kind::Open, Kind::Proprietary].into_iter().find(|kind| kind.name() == name)
    }

    /// Of an installer, with its sources.
    pub fn folder(self) -> &'static str {
        match self {
            Kind::Open => "kernel-open",
            Kind::Proprietary => "kernel",
        }
    }
}

/// The first device id of a generation, and what its GPUs can run with.
struct Generation {
    first: u16,
    name: &'static str,
    /// The first driver, where an older one is about.
    since: Option<&'static str>,
    /// The first driver that no longer has it.
    until: Option<&'static str>,
    kinds: &'static [Kind],
}

const BOTH: &[Kind] = &[Kind::Open, Kind::Proprietary];

const GENERATIONS: &[Generation] = &[
    Generation { first: 0, name: "Kepler or older", since: None, until: Some("475"), kinds: &[Kind::Proprietary] },
    Generation {
        first: 0x1340,
        name: "Maxwell to Volta",
        since: None,
        until: Some("581"),
        kinds: &[Kind::Proprietary],
    },
    Generation { first: 0x1e00, name: "Turing to Hopper", since: Some("410"), until: None, kinds: BOTH },
    Generation { first: 0x2900, name: "Blackwell or newer", since: Some("570"), until: None, kinds: &[Kind::Open] },
];

fn generation(device: u16) -> &'static Generation {
    GENERATIONS.iter().rev().find(|generation| generation.first <= device).unwrap_or(&GENERATIONS[0])
}

/// Why modules of this kind and version are none for a GPU.
fn objection(device: u16, version: &str, kind: Kind) -> Option<String> {
    let generation = generation(device);
    let card = format!("the GPU with id 10de:{device:04x} ({})", generation.name);
    if generation.until.is_some_and(|first_without| is_from(version, first_without)) {
        return Some(format!("driver {version} no longer has {card}; take an older branch"));
    }
    if let Some(first) = generation.since.filter(|first| !is_from(version, first)) {
        return Some(format!("driver {version} has not got {card} yet; take {first} or newer"));
    }
    (!generation.kinds.contains(&kind)).then(|| format!("driver {version} has no {} modules for {card}", kind.name()))
}

/// The kind of modules that serves most of these GPUs; none where the driver has only one. The others are ignored, as the
/// driver does.
///
/// # Errors
/// When none of them is served.
pub fn choose(devices: &[u16], version: &str, wish: Module) -> Result<Option<Kind>, String> {
    let kinds: &[Kind] = match wish {
        _ if !is_from(version, TWO_KINDS) => &[Kind::Proprietary],
        Module::Open => &[Kind::Open],
        Module::Proprietary => &[Kind::Proprietary],
        // NVIDIA's own choice is open where it can be, from 560 on; before, the open ones were young.
        Module::Auto if is_from(version, KIND) => BOTH,
        Module::Auto => &[Kind::Proprietary, Kind::Open],
    };
    let served = |kind: Kind| devices.iter().filter(|device| objection(**device, version, kind).is_none()).count();
    let mut best = kinds[0];
    for kind in kinds {
        if served(*kind) > served(best) {
            best = *kind;
        }
    }
    if served(best) == 0
        && let Some(why) = devices.first().and_then(|device| objection(*device, version, best))
    {
        return Err(why);
    }
    Ok(is_from(version, TWO_KINDS).then_some(best))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASCAL: u16 = 0x1b80;
    const ADA: u16 = 0x2684;
    const BLACKWELL: u16 = 0x2b85;

    #[test]
    fn the_kind_that_each_generation_gets() {
        for (devices, version, wish, kind) in [
            (&[ADA][..], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[ADA], "550.90.07", Module::Auto, Some(Kind::Proprietary)),
            (&[ADA], "580.95.05", Module::Proprietary, Some(Kind::Proprietary)),
            (&[ADA], "470.256.02", Module::Auto, None),
            (&[PASCAL], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[PASCAL, PASCAL], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[PASCAL, ADA], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[BLACKWELL], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x1db4], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[0x1e02], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x2330], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x1180], "470.256.02", Module::Auto, None),
            // A card that only VMs use is no reason against a driver for the other.
            (&[0x1287, ADA], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[PASCAL, ADA, BLACKWELL], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[PASCAL, BLACKWELL], "580.95.05", Module::Proprietary, Some(Kind::Proprietary)),
        ] {
            assert_eq!(choose(devices, version, wish), Ok(kind), "{devices:x?} {version}");
        }
    }

    #[test]
    fn what_no_driver_can_do_is_said_with_the_card() {
        for (devices, version, wish, why) in [
            (&[PASCAL][..], "590.44.01", Module::Auto, "driver 590.44.01 no longer has the GPU with id 10de:1b80"),
            (&[BLACKWELL], "550.90.07", Module::Auto, "take 570 or newer"),
            (
                &[BLACKWELL],
                "580.95.05",
                Module::Proprietary,
                "has no proprietary modules for the GPU with id 10de:2b85",
            ),
            (&[PASCAL], "580.95.05", Module::Open, "has no open modules"),
        ] {
            let said = choose(devices, version, wish).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }
}
