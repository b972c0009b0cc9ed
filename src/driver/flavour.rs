//! Open or proprietary modules, or none at all: by the generation of the GPUs, which is told from their device ids, and by
//! NVIDIA's own list where the installer carries one. Pure.

use super::supported::List;
use crate::config::Module;
use crate::gpu::nvidia::Version;
use crate::trouble::Trouble;

/// From then on an installer has two flavours of modules.
pub const TWO_FLAVOURS: &str = "515";
/// NVIDIA's own choice is open where it can be, from then on; before, the open ones were young.
const OPEN_FIRST: &str = "560";

/// Whether a version of the driver is `first` or a later one.
pub fn is_from(version: &str, first: &str) -> bool {
    version.parse::<Version>().ok() >= first.parse().ok()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    Open,
    Proprietary,
}

impl Flavour {
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Open => "open",
            Flavour::Proprietary => "proprietary",
        }
    }

    pub fn from_name(name: &str) -> Option<Flavour> {
        [Flavour::Open, Flavour::Proprietary].into_iter().find(|flavour| flavour.name() == name)
    }

    /// Of an installer, with its sources.
    pub fn folder(self) -> &'static str {
        match self {
            Flavour::Open => "kernel-open",
            Flavour::Proprietary => "kernel",
        }
    }
}

/// GPUs that a driver treats alike. Their ids come in several ranges.
struct Generation {
    ranges: &'static [(u16, u16)],
    name: &'static str,
    /// The first driver, where an older one is about.
    since: Option<&'static str>,
    /// The last branch that has it.
    last: Option<&'static str>,
    flavours: &'static [Flavour],
}

const PROPRIETARY: &[Flavour] = &[Flavour::Proprietary];
const OPEN: &[Flavour] = &[Flavour::Open];
const BOTH: &[Flavour] = &[Flavour::Open, Flavour::Proprietary];

/// From NVIDIA's lists of legacy GPUs and of supported ones in the READMEs of 390 to 590; the ranges are those of pci.ids.
const GENERATIONS: &[Generation] = &[
    Generation {
        ranges: &[
            (0x06c0, 0x06ff),
            (0x0dc0, 0x0dff),
            (0x0e22, 0x0e3f),
            (0x0f00, 0x0f1f),
            (0x1040, 0x10bf),
            (0x1140, 0x117f),
            (0x1200, 0x127f),
        ],
        name: "Fermi",
        since: None,
        last: Some("390"),
        flavours: PROPRIETARY,
    },
    Generation {
        ranges: &[(0x0fc0, 0x103f), (0x1180, 0x11ff), (0x1280, 0x133f)],
        name: "Kepler",
        since: None,
        last: Some("470"),
        flavours: PROPRIETARY,
    },
    Generation {
        ranges: &[(0x1340, 0x1dff)],
        name: "Maxwell, Pascal or Volta",
        since: None,
        last: Some("580"),
        flavours: PROPRIETARY,
    },
    Generation { ranges: &[(0x1e00, 0x1f7f)], name: "Turing", since: Some("410"), last: None, flavours: BOTH },
    Generation {
        ranges: &[(0x1f80, 0x1fff), (0x2180, 0x21ff)],
        name: "Turing",
        since: Some("418"),
        last: None,
        flavours: BOTH,
    },
    Generation { ranges: &[(0x2000, 0x217f)], name: "Ampere", since: Some("450.80"), last: None, flavours: BOTH },
    Generation {
        ranges: &[(0x2200, 0x22ff), (0x2400, 0x25ff)],
        name: "Ampere",
        since: Some("455"),
        last: None,
        flavours: BOTH,
    },
    Generation { ranges: &[(0x2300, 0x23ff)], name: "Hopper", since: Some("520"), last: None, flavours: BOTH },
    Generation { ranges: &[(0x2600, 0x28ff)], name: "Ada", since: Some("520"), last: None, flavours: BOTH },
    Generation {
        ranges: &[(0x2900, 0xffff)],
        name: "Blackwell or newer",
        since: Some("570"),
        last: None,
        flavours: OPEN,
    },
];

/// The rest.
const OLDEST: Generation = Generation {
    ranges: &[(0, 0x133f)],
    name: "older than Fermi",
    since: None,
    last: Some("340"),
    flavours: PROPRIETARY,
};

fn generation(device: u16) -> &'static Generation {
    let is_in = |one: &&Generation| one.ranges.iter().any(|(first, last)| (*first..=*last).contains(&device));
    GENERATIONS.iter().find(is_in).unwrap_or(&OLDEST)
}

fn is_after(version: &str, branch: &str) -> bool {
    let major = |text: &str| text.split('.').next().and_then(|number| number.parse::<u32>().ok());
    major(version) > major(branch)
}

/// Why modules of this flavour and version are none for a GPU.
pub fn objection(device: u16, version: &str, flavour: Flavour, list: Option<&List>) -> Option<Trouble> {
    let generation = generation(device);
    let card = format!("the GPU with id 10de:{device:04x} ({})", generation.name);
    let gone = |branch: &str| {
        let what = format!("driver {version} no longer has {card}");
        Trouble::new(what, format!("the newest branch that has it is {branch}"))
    };
    let listed = list.map(|list| list.0.get(&device));
    if let Some(Some(branch)) = listed.flatten().map(|entry| &entry.legacy) {
        return Some(gone(branch.trim_end_matches(".xx")));
    }
    if let Some(branch) = generation.last.filter(|branch| is_after(version, branch)) {
        return Some(gone(branch));
    }
    if let Some(first) = generation.since.filter(|first| !is_from(version, first)) {
        let what = format!("driver {version} has not got {card} yet");
        return Some(Trouble::new(what, format!("take {first} or newer")));
    }
    if listed == Some(None) {
        return Some(Trouble::new(
            format!("driver {version} has not got {card}: it is not in the list of GPUs that its installer carries"),
            "take a newer one",
        ));
    }
    let has_flavour = match (flavour, listed.flatten()) {
        (Flavour::Open, Some(entry)) => entry.open,
        _ => generation.flavours.contains(&flavour),
    };
    (!has_flavour).then(|| format!("driver {version} has no {} modules for {card}", flavour.name()).into())
}

/// The flavour of modules that serves most of these GPUs; none where the driver has only one. The others are ignored, as the
/// driver does.
///
/// # Errors
/// When none of them is served.
pub fn choose(devices: &[u16], version: &str, wish: Module, list: Option<&List>) -> Result<Option<Flavour>, String> {
    let flavours: &[Flavour] = match wish {
        _ if !is_from(version, TWO_FLAVOURS) => PROPRIETARY,
        Module::Open => OPEN,
        Module::Proprietary => PROPRIETARY,
        Module::Auto if is_from(version, OPEN_FIRST) => BOTH,
        Module::Auto => &[Flavour::Proprietary, Flavour::Open],
    };
    let served = |flavour: Flavour| {
        devices.iter().filter(|device| objection(**device, version, flavour, list).is_none()).count()
    };
    // The first of those that serve most.
    let best = flavours.iter().copied().rev().max_by_key(|flavour| served(*flavour));
    let Some(best) = best else { return Ok(None) };
    if served(best) == 0
        && let Some(why) = devices.first().and_then(|device| objection(*device, version, best, list))
    {
        return Err(why.to_string());
    }
    Ok(is_from(version, TWO_FLAVOURS).then_some(best))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASCAL: u16 = 0x1b80;
    const ADA: u16 = 0x2684;
    const BLACKWELL: u16 = 0x2b85;

    #[test]
    fn the_flavour_that_each_generation_gets() {
        for (devices, version, wish, flavour) in [
            (&[ADA][..], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[ADA], "550.90.07", Module::Auto, Some(Flavour::Proprietary)),
            (&[ADA], "580.95.05", Module::Proprietary, Some(Flavour::Proprietary)),
            (&[ADA], "520.56.06", Module::Auto, Some(Flavour::Proprietary)),
            (&[0x2204], "470.256.02", Module::Auto, None),
            (&[PASCAL], "580.95.05", Module::Auto, Some(Flavour::Proprietary)),
            (&[PASCAL, PASCAL], "580.95.05", Module::Auto, Some(Flavour::Proprietary)),
            (&[PASCAL, ADA], "580.95.05", Module::Auto, Some(Flavour::Proprietary)),
            (&[BLACKWELL], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[0x1db4], "580.95.05", Module::Auto, Some(Flavour::Proprietary)),
            (&[0x1e02], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[0x2330], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[0x1180], "470.256.02", Module::Auto, None),
            // A card that only VMs use is no reason against a driver for the other.
            (&[0x1287, ADA], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[PASCAL, ADA, BLACKWELL], "580.95.05", Module::Auto, Some(Flavour::Open)),
            (&[PASCAL, BLACKWELL], "580.95.05", Module::Proprietary, Some(Flavour::Proprietary)),
        ] {
            assert_eq!(choose(devices, version, wish, None), Ok(flavour), "{devices:x?} {version}");
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
            (&[ADA], "470.256.02", Module::Auto, "(Ada) yet; take 520 or newer"),
            (&[ADA], "515.105.01", Module::Auto, "(Ada) yet; take 520 or newer"),
            (&[0x2330], "515.105.01", Module::Auto, "(Hopper) yet; take 520 or newer"),
            (&[0x2204], "450.51.05", Module::Auto, "(Ampere) yet; take 455 or newer"),
            (&[0x1180], "510.108.03", Module::Auto, "(Kepler); the newest branch that has it is 470"),
            (&[0x1287], "580.95.05", Module::Auto, "(Kepler); the newest branch that has it is 470"),
            (&[0x06cd], "470.256.02", Module::Auto, "(Fermi); the newest branch that has it is 390"),
            (&[0x1200], "418.113", Module::Auto, "(Fermi); the newest branch that has it is 390"),
            (&[0x0a20], "390.157", Module::Auto, "(older than Fermi); the newest branch that has it is 340"),
        ] {
            let said = choose(devices, version, wish, None).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn nvidias_own_list_knows_better() {
        use super::super::supported::Device;
        let device = |legacy: Option<&str>, open| Device { legacy: legacy.map(str::to_string), open };
        let list = List(
            [(ADA, device(None, true)), (PASCAL, device(Some("575.xx"), false)), (0x2204, device(None, false))].into(),
        );
        let choose = |id: u16, wish| choose(&[id], "580.95.05", wish, Some(&list));
        assert_eq!(choose(ADA, Module::Auto), Ok(Some(Flavour::Open)));
        assert_eq!(choose(0x2204, Module::Auto), Ok(Some(Flavour::Proprietary)));
        assert!(choose(0x2204, Module::Open).unwrap_err().contains("has no open modules"));
        assert!(choose(PASCAL, Module::Auto).unwrap_err().ends_with("the newest branch that has it is 575"));
        assert!(
            choose(0x2206, Module::Auto).unwrap_err().contains("not in the list of GPUs that its installer carries")
        );
    }
}
