//! One step of a handoff: what it asks of the kernel and how to see that it holds.

use crate::address::{Address, SlotId};
use crate::gpu::inventory::read_override;
use crate::gpu::power::Power;
use crate::gpu::{console, containers, nodes};
use crate::handoff::kept::wedge::Call;
use crate::sys::{ActError, Action, Kernel};
use std::fmt;
use std::time::Duration;

const REMOVE_ID: &str = "/sys/bus/pci/drivers/vfio-pci/remove_id";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// By modprobe in one call, in this order.
    Load {
        modules: Vec<String>,
    },
    Unload {
        module: String,
    },
    /// None clears the override.
    Override {
        address: Address,
        driver: Option<String>,
    },
    Unbind {
        address: Address,
        driver: String,
    },
    /// Lets the kernel bind the function to the driver that its override names.
    Probe {
        address: Address,
        driver: String,
    },
    /// Takes one dynamic id from vfio-pci, as often as it is there.
    RemoveId {
        vendor: u16,
        device: u16,
    },
    /// Makes the NVIDIA driver's device nodes that are missing or wrong.
    MakeNodes,
    /// Keeps a container from opening the GPU while it changes hands.
    Freeze {
        ctid: u32,
    },
    Thaw {
        ctid: u32,
    },
    /// Sets what decides whether a function may sleep.
    Power {
        address: Address,
        power: Power,
    },
    /// Puts the framebuffer console on a screen, or takes it off every screen.
    Console {
        attach: bool,
    },
}

impl Step {
    /// What to ask of the kernel, in order.
    pub fn actions(&self, kernel: &dyn Kernel) -> Vec<Action> {
        let write = |path: String, data: &str| vec![Action::Write { path, data: data.to_string() }];
        match self {
            Step::Load { modules } => vec![Action::Load { modules: modules.clone() }],
            Step::Unload { module } => vec![Action::Unload { module: module.clone() }],
            // Only a newline clears: an empty write(2) never reaches the kernel.
            Step::Override { address, driver } => {
                write(address.attribute("driver_override"), driver.as_deref().unwrap_or("\n"))
            }
            Step::Unbind { address, driver } => {
                write(format!("/sys/bus/pci/drivers/{driver}/unbind"), &address.to_string())
            }
            Step::Probe { address, .. } => write("/sys/bus/pci/drivers_probe".to_string(), &address.to_string()),
            Step::RemoveId { vendor, device } => write(REMOVE_ID.to_string(), &format!("{vendor:04x} {device:04x}")),
            Step::MakeNodes => nodes::missing(kernel).into_iter().map(Action::MakeNode).collect(),
            Step::Freeze { ctid } => write(containers::freezer(*ctid), "1"),
            Step::Thaw { ctid } => write(containers::freezer(*ctid), "0"),
            Step::Power { address, power } => {
                let unlike = power.unlike(&Power::read(kernel, *address));
                let to_write = |(name, value): (&str, &str)| write(address.attribute(name), value);
                unlike.values().flat_map(to_write).collect()
            }
            Step::Console { attach } => match console::bind_attribute(kernel) {
                Some(path) => write(path, if *attach { "1" } else { "0" }),
                None => Vec::new(),
            },
        }
    }

    /// Whether the machine is as this step wants it: before the step a reason to skip it, after it the proof.
    ///
    /// # Errors
    /// [`ActError::Stuck`] when even looking took longer than `limit`.
    pub fn holds(&self, kernel: &dyn Kernel, limit: Duration) -> Result<bool, ActError> {
        let driver_of = |address: &Address| kernel.link_name(&address.attribute("driver")).ok();
        Ok(match self {
            Step::Load { modules } => modules.iter().all(|module| is_live(kernel, module)),
            Step::Unload { module } => !kernel.exists(&format!("/sys/module/{module}")),
            Step::Override { address, driver } => read_override(kernel, *address, limit)? == *driver,
            // Another driver may have taken it at once: what that one is, the next step sees.
            Step::Unbind { address, driver } => driver_of(address).as_deref() != Some(driver),
            Step::Probe { address, driver } => driver_of(address).as_deref() == Some(driver),
            // The kernel has no list of dynamic ids: asking to remove one is how to see that there is none.
            Step::RemoveId { .. } => !kernel.exists(REMOVE_ID),
            Step::MakeNodes => nodes::missing(kernel).is_empty(),
            // One that has ended meanwhile opens nothing, and needs no thawing.
            // Having asked for it is not enough.
            Step::Freeze { ctid } => containers::is_frozen(kernel, *ctid),
            Step::Thaw { ctid } => kernel.text(&containers::freezer(*ctid)).is_none_or(|text| text == "0"),
            Step::Power { address, power } => power.unlike(&Power::read(kernel, *address)).is_empty(),
            // One that went with its framebuffer comes back with it, by itself: all there is where it cannot be done by
            // hand.
            Step::Console { attach: true } if !console::can_attach(kernel) => true,
            // Where somebody has all consoles locked they are left as they are.
            Step::Console { attach } => {
                !console::is_attached(kernel, limit).is_ok_and(|is| is.is_some_and(|is| is != *attach))
            }
        })
    }

    /// Of a handoff's time, the part that this step may take.
    pub fn share(&self, handoff: Duration) -> Duration {
        match self {
            // Each is milliseconds of work, unless the kernel's lock on the device is held by something stuck.
            Step::Override { .. }
            | Step::RemoveId { .. }
            | Step::MakeNodes
            | Step::Freeze { .. }
            | Step::Thaw { .. }
            | Step::Console { .. } => handoff / 6,
            // Waking up from D3cold takes a GPU seconds.
            Step::Power { .. } => handoff / 3,
            Step::Unbind { .. } | Step::Unload { .. } => handoff / 3,
            // Starting a GPU takes the driver seconds.
            Step::Load { .. } | Step::Probe { .. } => handoff * 2 / 3,
        }
    }

    /// The slot that this step is about; none when it is about all of them.
    pub fn slot(&self) -> Option<SlotId> {
        match self {
            Step::Override { address, .. }
            | Step::Unbind { address, .. }
            | Step::Probe { address, .. }
            | Step::Power { address, .. } => Some(address.slot),
            Step::Load { .. }
            | Step::Unload { .. }
            | Step::RemoveId { .. }
            | Step::MakeNodes
            | Step::Freeze { .. }
            | Step::Thaw { .. }
            | Step::Console { .. } => None,
        }
    }

    /// What is kept of it, beside its words, for whoever finds it under way still.
    pub fn call(&self) -> Call {
        match self {
            Step::Load { modules } => Call::Load(modules.clone()),
            Step::Unbind { driver, .. } => Call::Unbind { driver: driver.clone() },
            Step::Freeze { ctid } => Call::Freeze(*ctid),
            Step::Unload { .. }
            | Step::Override { .. }
            | Step::Probe { .. }
            | Step::RemoveId { .. }
            | Step::MakeNodes
            | Step::Thaw { .. }
            | Step::Power { .. }
            | Step::Console { .. } => Call::Other,
        }
    }

    /// Neighbours with the same verb are told in one go: `unload nvidia_uvm nvidia`.
    pub fn verb(&self) -> String {
        match self {
            Step::Load { .. } => "load".to_string(),
            Step::Unload { .. } => "unload".to_string(),
            Step::Override { driver: Some(driver), .. } => format!("driver_override={driver}"),
            Step::Override { driver: None, .. } => "clear driver_override".to_string(),
            Step::Unbind { driver, .. } => format!("unbind from {driver}"),
            Step::Probe { driver, .. } => format!("bind to {driver}"),
            Step::RemoveId { .. } => "remove_id".to_string(),
            Step::MakeNodes => "device nodes".to_string(),
            Step::Freeze { .. } => "freeze container".to_string(),
            Step::Thaw { .. } => "thaw container".to_string(),
            Step::Power { power, .. } => {
                let values: Vec<String> = power.values().map(|(name, value)| format!("{name}={value}")).collect();
                values.join(" ")
            }
            Step::Console { attach: true } => "console attach".to_string(),
            Step::Console { attach: false } => "console detach".to_string(),
        }
    }

    /// What the verb is about; nothing when the verb says it all. `only` is the slot that the title names.
    pub fn object(&self, only: Option<SlotId>) -> String {
        match self {
            Step::Load { modules } => modules.join(" "),
            Step::Unload { module } => module.clone(),
            Step::Override { address, .. }
            | Step::Unbind { address, .. }
            | Step::Probe { address, .. }
            | Step::Power { address, .. } => address.below(only),
            Step::RemoveId { vendor, device } => format!("{vendor:04x}:{device:04x}"),
            Step::MakeNodes | Step::Console { .. } => String::new(),
            Step::Freeze { ctid } | Step::Thaw { ctid } => ctid.to_string(),
        }
    }
}

/// Not one that is just coming or going; what is built into the kernel has no state.
fn is_live(kernel: &dyn Kernel, module: &str) -> bool {
    let directory = format!("/sys/module/{module}");
    kernel.exists(&directory) && kernel.text(&format!("{directory}/initstate")).is_none_or(|state| state == "live")
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (verb, object) = (self.verb(), self.object(None));
        if object.is_empty() { f.write_str(&verb) } else { write!(f, "{verb} {object}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn a_module_is_loaded_once_it_is_live() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-live-{}", std::process::id()));
        let (kernel, limit) = (Linux::at(root.clone()), Duration::from_secs(20));
        let modules = ["nvidia", "nvidia_uvm"].map(str::to_string);
        let folders = modules.clone().map(|module| root.join(format!("sys/module/{module}")));
        folders.iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
        let load = Step::Load { modules: modules.to_vec() };
        let holds = |state: Option<&str>| {
            let file = folders[1].join("initstate");
            state.map_or_else(|| drop(std::fs::remove_file(&file)), |state| std::fs::write(&file, state).unwrap());
            load.holds(&kernel, limit).unwrap()
        };
        let found = [holds(None), holds(Some("live\n")), holds(Some("coming\n")), holds(Some("going\n"))];
        std::fs::remove_dir_all(&folders[0]).unwrap();
        let one_lacks = holds(Some("live\n"));
        let unloaded = modules.map(|module| Step::Unload { module }.holds(&kernel, limit).unwrap());
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!((found, one_lacks), ([true, true, false, false], false));
        assert_eq!(unloaded, [true, false]);
    }

    #[test]
    fn a_console_that_cannot_be_attached_by_hand_is_none_to_wait_for() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-consoles-{}", std::process::id()));
        let name = |console: &str, name: &str| {
            let folder = root.join(format!("sys/class/vtconsole/{console}"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("name"), name).unwrap();
            std::fs::write(folder.join("bind"), "0\n").unwrap();
        };
        let holds = |attach| {
            let kernel = Linux::at(root.clone());
            Step::Console { attach }.holds(&kernel, Duration::from_secs(20)).unwrap()
        };
        name("vtcon0", "(M) dummy device\n");
        name("vtcon1", "(M) frame buffer device\n");
        let by_the_kernel = [holds(true), holds(false)];
        name("vtcon0", "(S) dummy device\n");
        let by_hand = [holds(true), holds(false)];
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!((by_the_kernel, by_hand), ([true, true], [false, true]));
    }

    #[test]
    fn a_step_may_take_a_part_of_a_handoffs_time() {
        let address: Address = "0000:01:00.0".parse().unwrap();
        let seconds = |step: Step| step.share(Duration::from_secs(60)).as_secs();
        assert_eq!(seconds(Step::Load { modules: Vec::new() }), 40);
        assert_eq!(seconds(Step::Unbind { address, driver: "nvidia".to_string() }), 20);
        assert_eq!(seconds(Step::Power { address, power: Power::default() }), 20);
        assert_eq!(seconds(Step::Override { address, driver: None }), 10);
    }
}
