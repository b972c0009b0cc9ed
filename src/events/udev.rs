//! udev tells of NVIDIA's modules and GPUs coming and going (udev/60-gpu-handoff.rules).
//!
//! udev waits for its helpers, lets them mount nothing and ends what they leave behind. So only missing device nodes are
//! made here; all else is for [`settle`], in a unit of its own, and of many events one asks for that.

use super::notes::Notes;
use super::settle;
use crate::App;
use crate::exit::{Exit, Result};
use crate::gpu::nodes;
use crate::handoff::way::reconcile::make_nodes;
use crate::systemd;
use std::time::Duration;

const UNIT_FILES: [&str; 3] = [
    "/etc/systemd/system/gpu-handoff-settle@.service",
    "/usr/lib/systemd/system/gpu-handoff-settle@.service",
    "/lib/systemd/system/gpu-handoff-settle@.service",
];

/// Making a node takes microseconds.
const NODE: Duration = Duration::from_secs(1);

/// # Errors
/// When a device node could not be made, or nobody could be asked to do the rest.
pub fn run(app: &App) -> Result<()> {
    if !concerns_us(&|name| std::env::var(name).unwrap_or_default()) {
        return Ok(());
    }
    app.kernel.end_with_this_run();
    let made = make_nodes(app.kernel, &app.story, &nodes::missing(app.kernel), NODE);
    let notes = Notes::of(app.kernel);
    if !notes.event().map_err(|error| not_asked(&error.to_string()))? {
        return made;
    }
    // A unit for each: one that is about to end would otherwise keep this event from being seen to. The package brings one
    // that may do little more than it has to.
    let number = std::process::id();
    let asked = match UNIT_FILES.iter().any(|file| app.kernel.exists(file)) {
        true => systemd::start(app.kernel, &format!("gpu-handoff-settle@{number}.service")),
        false => systemd::run_later(app.kernel, &format!("gpu-handoff-settle-{number}"), &[settle::VERB]),
    };
    if let Err(error) = asked {
        notes.heed_event();
        return Err(not_asked(&error.to_string()));
    }
    made
}

fn not_asked(problem: &str) -> Exit {
    Exit::failed(format!("containers were not looked at after a device event: {problem}; type: gpu-handoff settle"))
}

/// Whether a GPU, or a module that device nodes belong to, has come. `value` is a property of the event.
fn concerns_us(value: &dyn Fn(&str) -> String) -> bool {
    let hex = |text: &str| u32::from_str_radix(text, 16).ok();
    match (value("SUBSYSTEM").as_str(), value("ACTION").as_str()) {
        ("module", "add") => {
            value("DEVPATH").strip_prefix("/module/").is_some_and(|module| nodes::MODULES.contains(&module))
        }
        ("pci", action @ ("add" | "bind")) => {
            // As in `30000`, and `10DE:2684`.
            let is_display = hex(&value("PCI_CLASS")).is_some_and(|class| matches!(class >> 8, 0x0300 | 0x0302));
            let is_nvidia = value("PCI_ID").split_once(':').is_some_and(|(vendor, _)| hex(vendor) == Some(0x10de));
            is_display && is_nvidia && (action == "add" || value("DRIVER") == "nvidia")
        }
        // What has gone leaves nothing to be made.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_to() {
        let gpu = "DEVPATH=/devices/x PCI_SLOT_NAME=0000:01:00.0 PCI_CLASS=30000 PCI_ID=10DE:2684";
        let concerns = |event: String| {
            let value = |name: &str| {
                let found = event.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
                found.unwrap_or_default().to_string()
            };
            concerns_us(&value)
        };
        for event in [
            "ACTION=add SUBSYSTEM=module DEVPATH=/module/nvidia".to_string(),
            "ACTION=add SUBSYSTEM=module DEVPATH=/module/nvidia_uvm".to_string(),
            format!("ACTION=add SUBSYSTEM=pci {gpu}"),
            format!("ACTION=bind SUBSYSTEM=pci DRIVER=nvidia {gpu}"),
            format!("ACTION=bind SUBSYSTEM=pci DRIVER=nvidia {gpu}").replace("30000", "30200"),
        ] {
            assert!(concerns(event.clone()), "{event}");
        }
        for event in [
            String::new(),
            "ACTION=remove SUBSYSTEM=module DEVPATH=/module/nvidia".to_string(),
            "ACTION=add SUBSYSTEM=module DEVPATH=/module/nvidiafb".to_string(),
            "ACTION=add SUBSYSTEM=module DEVPATH=/module/nouveau".to_string(),
            "ACTION=add SUBSYSTEM=drm DEVPATH=/module/nvidia".to_string(),
            format!("ACTION=bind SUBSYSTEM=pci DRIVER=vfio-pci {gpu}"),
            format!("ACTION=unbind SUBSYSTEM=pci {gpu}"),
            format!("ACTION=add SUBSYSTEM=pci {gpu}").replace("10DE", "1002"),
            format!("ACTION=add SUBSYSTEM=pci {gpu}").replace("30000", "40300"),
            format!("ACTION=add SUBSYSTEM=pci {gpu}").replace("30000", ""),
        ] {
            assert!(!concerns(event.clone()), "{event}");
        }
    }
}
