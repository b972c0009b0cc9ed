use super::attach::{BEFORE, CONFIG, RECORD, config, container, minor, mode, ready, record, two_cards, uvm};
use super::*;
use gpu_handoff::App;
use gpu_handoff::containers::attach;
use gpu_handoff::handoff::kept::store::{self, Store};
use gpu_handoff::story::Story;
use gpu_handoff::sys::{Files, Linux};

// What brings the lines up to the numbers of now: no verb of its own, sync and device events do it

fn refreshed(host: &Host) -> Result<bool, String> {
    let kernel = Linux::at(host.path(""));
    let store = Store::at(kernel.path(store::DIRECTORY));
    let app = App { kernel: &kernel, store, story: Story::silent() };
    assert_eq!(
        attach::attached(&app),
        if host.path(RECORD).exists() && host.path(CONFIG).exists() { vec![101] } else { vec![] }
    );
    attach::refresh(&app, 101).map_err(|exit| format!("{} {exit}", exit.code as u8))
}

/// No change, and not even a lock taken.
#[track_caller]
fn needs_no_refresh(host: &Host) {
    let before = host.snapshot();
    assert_eq!(refreshed(host), Ok(false));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
}

#[test]
fn another_major_after_a_handoff() {
    needs_no_refresh(&ready());
    for bytes in [BEFORE, "arch: amd64"] {
        let host = container(ready(), bytes);
        host.run("container attach 101");
        let attached = config(&host);
        needs_no_refresh(&host);
        let host = uvm(host, "509 nvidia-uvm");
        let later = format!("{attached}lxc.mount.entry: /mnt mnt none bind\n");
        let host = container(host, &later);
        assert_eq!(refreshed(&host), Ok(true));
        assert_eq!(config(&host), later.replace("511:*", "509:*"));
        assert_eq!(mode(host.path(CONFIG)), 0o640);
        needs_no_refresh(&host);
        let host = container(host, &attached.replace("511:*", "509:*"));
        assert_eq!(host.run("container detach 101").code, Some(0));
        assert_eq!(config(&host), bytes);
        needs_no_refresh(&host);
    }
}

#[test]
fn another_minor_after_a_handoff() {
    for style in ["mount", "dev"] {
        let host = two_cards();
        host.run(&format!("container attach 101 --gpu 01:00 --style {style}"));
        let attached = config(&host);
        let host = minor(minor(host, "0000:01:00", "1"), "0000:02:00", "0");
        assert_eq!(refreshed(&host), Ok(true));
        assert_eq!(config(&host), attached.replace("nvidia0", "nvidia1").replace("195:0", "195:1"));
        host.run("container detach 101");
        assert_eq!(config(&host), BEFORE);
    }
}

/// Both numbers are on record, the old one is in the configuration: the next refresh goes on from there.
#[test]
fn a_refresh_that_was_killed_between_record_and_configuration() {
    for (style, new) in [("mount", "lxc.cgroup2.devices.allow: c 195:1 rwm"), ("dev", "dev0: /dev/nvidia1,mode=0666")] {
        let host = two_cards();
        host.run(&format!("container attach 101 --gpu 01:00 --style {style}"));
        let attached = config(&host);
        let mut both = record(&host);
        both["unfinished"] = json!(true);
        both["lines"].as_array_mut().unwrap().push(json!({"for": "0000:01:00", "line": new}));
        let killed = |host: Host| host.file(RECORD, &both.to_string());
        let host = killed(minor(minor(host, "0000:01:00", "1"), "0000:02:00", "0"));
        assert_eq!(refreshed(&host), Ok(true));
        assert_eq!(config(&host), attached.replace("nvidia0", "nvidia1").replace("195:0", "195:1"));
        assert_eq!(record(&host).get("unfinished"), None);
        let host = killed(container(host, &attached));
        let told = host.run("container detach 101").err;
        assert!(!told.contains("somebody"), "{told}");
        assert_eq!(config(&host), BEFORE);
    }
}

/// Minors are given anew: a container must not find another's GPU under the name that its own had.
#[test]
fn a_minor_that_is_another_gpus_by_now() {
    for style in ["mount", "dev"] {
        let host = two_cards();
        host.run(&format!("container attach 101 --gpu 01:00 --style {style}"));
        let attached = config(&host);
        let driver = format!("{}/driver", device("0000:01:00.0"));
        let host = host.without(&driver).without("proc/driver/nvidia/gpus/0000:01:00.0");
        needs_no_refresh(&host);
        let host = minor(host, "0000:02:00", "0");
        assert_eq!(refreshed(&host), Ok(true));
        let is_of_gpu = |line: &&str| line.contains("nvidia0") || line.contains("195:0 ");
        let left: String = attached.lines().filter(|line| !is_of_gpu(line)).map(|line| format!("{line}\n")).collect();
        assert_eq!(config(&host), left);
        needs_no_refresh(&host);
        let host = minor(host.link(&driver, "sys/bus/pci/drivers/nvidia"), "0000:01:00", "1");
        assert_eq!(refreshed(&host), Ok(true));
        let back = config(&host);
        assert!(back.contains("/dev/nvidia1") && !back.contains("/dev/nvidia0"), "{back}");
        needs_no_refresh(&host);
        host.run("container detach 101");
        assert_eq!(config(&host), BEFORE);
    }
}

#[test]
fn nothing_is_refreshed_while_nobody_knows_the_numbers() {
    let attached = || {
        let host = ready();
        host.run("container attach 101");
        host
    };
    needs_no_refresh(&uvm(attached(), "195 nvidia-frontend"));
    needs_no_refresh(&uvm(attached(), "509 nvidia-uvm").without("proc/driver"));
    needs_no_refresh(&uvm(attached(), "509 nvidia-uvm").without(CONFIG));
    // Another container by now.
    needs_no_refresh(&container(uvm(attached(), "509 nvidia-uvm"), BEFORE));
}

#[test]
fn what_keeps_a_container_from_being_refreshed() {
    let host = ready();
    host.run("container attach 101");
    let locked = config(&host).replace("arch: amd64\nhostname", "lock: backup\nhostname");
    let host = uvm(container(host, &locked), "509 nvidia-uvm");
    let before = host.snapshot();
    let refused = refreshed(&host).unwrap_err();
    assert!(refused.starts_with("3 container 101 is locked (backup) and was not touched"), "{refused}");
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let host = host.file(RECORD, "{");
    let refused = refreshed(&host).unwrap_err();
    assert!(refused.starts_with("1 container 101 was not touched: the record"), "{refused}");
}
