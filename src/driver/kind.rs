//! Open or proprietary modules: by the generation of the GPUs, which is told from their device ids. Pure.

use super::flags::is_from;
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

/// The first device id of a generation, and what its GPUs can run with. Ids have only ever gone up.
struct Generation {
    first: u16,
    name: &'static str,
    /// The first driver, where an older one is about.
    since: Option<&'static str>,
    /// The first driver that no longer has it.
    until: Option<&'static str>,
    open: bool,
    proprietary: bool,
}

const GENERATIONS: &[Generation] = &[
    Generation { first: 0, name: "Fermi or older", since: None, until: Some("391"), open: false, proprietary: true },
    Generation { first: 0x0fc0, name: "Kepler", since: None, until: Some("475"), open: false, proprietary: true },
    Generation {
        first: 0x1340,
        name: "Maxwell, Pascal or Volta",
        since: None,
        until: Some("581"),
        open: false,
        proprietary: true,
    },
    Generation {
        first: 0x1e00,
        name: "Turing, Ampere, Ada or Hopper",
        since: Some("410"),
        until: None,
        open: true,
        proprietary: true,
    },
    Generation {
        first: 0x2900,
        name: "Blackwell or newer",
        since: Some("570"),
        until: None,
        open: true,
        proprietary: false,
    },
];

fn generation(device: u16) -> &'static Generation {
    GENERATIONS.iter().rev().find(|generation| generation.first <= device).unwrap_or(&GENERATIONS[0])
}

/// The kind of modules that this driver needs for these GPUs; none where it has only one.
///
/// # Errors
/// When it has none for one of them.
pub fn choose(devices: &[u16], version: &str, wish: Module) -> Result<Option<Kind>, String> {
    let mut can = [(Kind::Open, is_from(version, "515")), (Kind::Proprietary, true)];
    for device in devices {
        let generation = generation(*device);
        let card = format!("the GPU with id 10de:{device:04x} ({})", generation.name);
        if generation.until.is_some_and(|first_without| is_from(version, first_without)) {
            return Err(format!("driver {version} no longer has {card}; take an older branch"));
        }
        if let Some(first) = generation.since.filter(|first| !is_from(version, first)) {
            return Err(format!("driver {version} has not got {card} yet; take {first} or newer"));
        }
        can[0].1 &= generation.open;
        can[1].1 &= generation.proprietary;
        let missing = match wish {
            Module::Open if !can[0].1 => Some(Kind::Open),
            Module::Proprietary if !can[1].1 => Some(Kind::Proprietary),
            _ => None,
        };
        if let Some(kind) = missing {
            return Err(format!(
                "driver.module is {}, but driver {version} has no such modules for {card}",
                kind.name()
            ));
        }
        if can.iter().all(|(_, can)| !can) {
            return Err(format!("driver {version} has no modules that suit all GPUs of this host, {card} among them"));
        }
    }
    if !is_from(version, "515") {
        return Ok(None);
    }
    let wished = match wish {
        Module::Open => Some(Kind::Open),
        Module::Proprietary => Some(Kind::Proprietary),
        Module::Auto => None,
    };
    // NVIDIA's own choice is open where it can be, from 560 on; before, the open ones were young.
    let open_first = is_from(version, "560");
    let auto = if can[0].1 && (open_first || !can[1].1) { Kind::Open } else { Kind::Proprietary };
    Ok(Some(wished.unwrap_or(auto)))
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
            (&[PASCAL, ADA], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[BLACKWELL], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x1db4], "580.95.05", Module::Auto, Some(Kind::Proprietary)),
            (&[0x1e02], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x2330], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[], "580.95.05", Module::Auto, Some(Kind::Open)),
            (&[0x1180], "470.256.02", Module::Auto, None),
        ] {
            assert_eq!(choose(devices, version, wish), Ok(kind), "{devices:x?} {version}");
        }
    }

    #[test]
    fn what_no_driver_can_do_is_said_with_the_card() {
        for (devices, version, wish, why) in [
            (&[PASCAL][..], "590.44.01", Module::Auto, "driver 590.44.01 no longer has the GPU with id 10de:1b80"),
            (&[BLACKWELL], "550.90.07", Module::Auto, "take 570 or newer"),
            (&[BLACKWELL], "580.95.05", Module::Proprietary, "driver.module is proprietary"),
            (&[PASCAL], "580.95.05", Module::Open, "driver.module is open"),
            (&[ADA], "470.256.02", Module::Open, "driver.module is open"),
            (&[PASCAL, BLACKWELL], "580.95.05", Module::Auto, "suit all GPUs of this host"),
        ] {
            let said = choose(devices, version, wish).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }
}
