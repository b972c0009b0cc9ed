use super::*;
use std::time::{Duration, Instant};

// The NVIDIA driver: busy, or stuck in a call that is none of ours

const INFORMATION: &str = "proc/driver/nvidia/gpus/0000:01:00.0/information";

/// The driver has its lock for as long as the host is there.
fn busy() -> Host {
    host().silent(INFORMATION)
}

const BUSY: &str = "the NVIDIA driver is busy, somebody has it start or reset a GPU (/proc/driver/nvidia/gpus did not \
                    answer within 2 s)";

/// What took no longer than one look that nobody answers, with time to spare on a slow machine.
fn in_time<T>(what: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let done = what();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    done
}

#[test]
fn a_busy_driver_is_not_waited_for() {
    let again = "so who uses the card is not known; when that is over, ";
    for (call, then) in [
        ("plan 111", "start VM 111 again: qm start 111"),
        ("111 pre-start", "start VM 111 again: qm start 111"),
        ("to-vfio", "try again: gpu-handoff to-vfio 0000:01:00"),
    ] {
        let message = format!("0000:01:00 was not touched: {BUSY}, {again}{then}");
        in_time(|| refuses_now(&busy(), call, 3, &message));
    }
    // Whoever is inside open() has no descriptor yet.
    let opener = busy()
        .process(PID, "python3", "/lxc/101/ns", &[])
        .file(&format!("proc/{PID}/stack"), "[<0>] rm_init_adapter+0x0\n[<0>] nv_open_device+0x1c/0x90 [nvidia]\n");
    let message = BUSY.replace("somebody has", "PID 5000001 (python3) has");
    let message = format!("0000:01:00 was not touched: {message}, {again}start VM 111 again: qm start 111");
    in_time(|| refuses_now(&opener, "111 pre-start", 3, &message));
}

#[test]
fn the_status_of_a_busy_driver() {
    let host = busy().card("0000:02:00", "nvidia", "").silent(&INFORMATION.replace(":01:", ":02:"));
    let Run { code, out, err } = in_time(|| host.run("--status"));
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let unknown = "  used by  unknown: the NVIDIA driver is busy and does not answer\n";
    assert_eq!(out.matches(unknown).count(), 2, "{out}");
    assert!(out.contains("0000:01:00  host\n"), "{out}");
    let status: Value = serde_json::from_str(&in_time(|| host.run("--status --json")).out).unwrap();
    assert_eq!((&status["gpus"][0]["users"], &status["gpus"][1]["users"]), (&Value::Null, &Value::Null));
}

#[test]
fn reconcile_while_the_driver_is_busy() {
    let run = in_time(|| busy().run("reconcile"));
    let warning = format!(
        "gpu-handoff: warning: {BUSY}: nobody has looked whether /dev/nvidia0 and the like are there; when that is over: \
         gpu-handoff reconcile\n"
    );
    assert_eq!((run.code, run.err.as_str()), (Some(0), warning.as_str()));
}

/// The driver link is gone, and the driver still has the GPU.
fn removing() -> Host {
    host().file(INFORMATION, "Device Minor: \t 0\n").without(&format!("{}/driver", device("0000:01:00.0")))
}

#[test]
fn a_remove_that_hangs_and_is_none_of_ours() {
    let message = |who: &str| {
        format!(
            "0000:01:00 is wedged and left alone: unbind from nvidia 0000:01:00.0 does not come back, which gpu-handoff \
             did not ask for: {who}; until that ends nobody can have the card, and if it never does, only a reboot frees \
             it; other cards keep working"
        )
    };
    let unknown = "the driver still lists it in /proc/driver/nvidia/gpus";
    for call in ["111 pre-start", "to-vfio"] {
        refuses(&removing(), call, 4, &message(unknown));
    }
    let stack = "[<0>] os_delay+0x5a/0xa0 [nvidia]\n[<0>] nv_pci_remove+0x19c/0x390 [nvidia]\n";
    let known = removing().process(PID, "bash", "/user.slice/session-3.scope", &[]);
    let known = known.file(&format!("proc/{PID}/stack"), stack);
    refuses(&known, "111 pre-start", 4, &message("PID 5000001 (bash) is in it"));
    let gpu = &status(&known)["gpus"][0];
    assert_eq!(gpu["owner"], json!({"kind": "wedged", "vmid": null}));
    let wedged = json!({"step": "unbind from nvidia 0000:01:00.0", "pid": PID, "start": null, "since": null});
    assert_eq!(gpu["wedged"], wedged);
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let screen = words(&removing().run("--status").out);
    assert!(screen.contains(&format!("which gpu-handoff did not ask for: {unknown}")), "{screen}");
    // Nobody is in the middle of anything here.
    let none = removing().without("proc/driver/nvidia/gpus/0000:01:00.0");
    assert_eq!(status(&none)["gpus"][0]["owner"]["kind"], "none");
}

/// A card that is with a VM leaves its DRM nodes behind, and who has one open keeps nvidia_drm from being unloaded.
#[test]
fn a_node_that_a_card_left_behind() {
    let host = host()
        .card("0000:02:00", "vfio-pci", "vfio-pci")
        .file(&format!("{}/drm/card1/dev", device("0000:02:00.0")), NULL_NUMBER)
        .file("sys/module/nvidia_drm/parameters/modeset", "N\n")
        .link("sys/module/nvidia/holders/nvidia_drm", "sys/module/nvidia_drm")
        .process(PID, "ffmpeg", "/lxc/101/ns", &[NULL]);
    refuses(
        &host,
        "111 pre-start",
        3,
        &format!(
            "0000:01:00 was not touched, it is in use: PID 5000001 (ffmpeg, container 101) has /dev/dri/card1 open; {}type: \
             pct shutdown 101; qm start 111",
            would("policy.container \"stop\"")
        ),
    );
    assert_eq!(status(&host)["gpus"][0]["users"], users(json!([])));
}
