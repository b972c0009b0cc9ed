use super::*;
use std::time::{Duration, Instant};

// Functions beside GPU and audio

/// A card with a USB-C port; the driver of the USB controller is built into the kernel, as in Proxmox's.
fn turing() -> Host {
    host()
        .function("0000:01:00.2", "0c0330", "10de:1ad6", "xhci_hcd", 1)
        .without("sys/bus/pci/drivers/xhci_hcd/module")
        .function("0000:01:00.3", "0c8000", "10de:1ad7", "nvidia-gpu", 1)
}

#[test]
fn usb_and_ucsi_move_with_their_card() {
    let lines = [
        "0000:01:00 host -> VM 111",
        "  prepare   driver_override=vfio-pci .0 .1 .2 .3",
        "  release   unload nvidia, unbind from snd_hda_intel .1, unbind from xhci_hcd .2, unbind from nvidia-gpu .3",
        "  bind      bind to vfio-pci .0 .1 .2 .3",
    ];
    plans(&turing(), "plan 111", &lines);
    // Also when the VM lists the GPU alone.
    plans(&turing().vm(111, "hostpci0: 0000:01:00.0,pcie=1"), "plan 111", &lines);
}

#[test]
fn usb_and_ucsi_come_home_with_their_card() {
    let homes = [
        ("nvidia", Some("nvidia")),
        ("snd_hda_intel", Some("snd_hda_intel")),
        ("xhci_hcd", None),
        ("nvidia-gpu", Some("i2c_nvidia_gpu")),
    ];
    let functions: Vec<Value> = (0..)
        .zip(homes)
        .map(|(n, (driver, module))| {
            json!({"slot": "0000:01:00", "address": format!("0000:01:00.{n}"), "driver": driver, "module": module})
        })
        .collect();
    let record = json!({"schema": 1, "progress": "away", "functions": functions, "modules": ["nvidia"]});
    let host = settled()
        .function("0000:01:00.2", "0c0330", "10de:1ad6", "vfio-pci", 1)
        .function("0000:01:00.3", "0c8000", "10de:1ad7", "vfio-pci", 1)
        .driver("snd_hda_intel")
        .driver("xhci_hcd")
        .file("run/gpu-handoff/vm-111", &record.to_string());
    let run = host.run("reconcile --dry-run");
    let binds: Vec<&str> = run.out.lines().filter(|line| line.starts_with("  bind ")).collect();
    assert_eq!(
        binds,
        [
            // Nothing to load for what is built in.
            "  bind      load nvidia i2c_nvidia_gpu, bind to nvidia .0, bind to snd_hda_intel .1, bind to xhci_hcd .2, \
             bind to nvidia-gpu .3",
        ],
        "{}",
        run.err
    );
}

/// The kernel lets an I2C adapter go only when nobody has it open: unbinding would wait.
#[test]
fn somebody_uses_the_ucsi_controller() {
    let host = turing().file(&format!("{}/i2c-7/i2c-dev/i2c-7/dev", device("0000:01:00.3")), NULL_NUMBER).process(
        PID,
        "i2cdump",
        "/user.slice/session-3.scope",
        &[NULL],
    );
    let message = format!(
        "0000:01:00 was not touched, it is in use: PID {PID} (i2cdump, session-3.scope) has /dev/i2c-7 open; {}type: \
         kill {PID}; qm start 111",
        would("policy.process \"kill\"")
    );
    refuses(&host, "111 pre-start", 3, &message);
}

// A card that has fallen off the bus

const GONE: &str = "0000:01:00.0 does not answer, it has fallen off the bus (its configuration space reads ff); power the \
                    host off and on again; or, once nothing uses the card: echo 1 | tee \
                    /sys/bus/pci/devices/0000:01:00.*/remove, then: echo 1 > /sys/bus/pci/rescan, and if it reads ff \
                    still, only a power cycle helps";

#[test]
fn a_card_that_fell_off_the_bus() {
    let fallen = || host().answers("0000:01:00.0", &[0xff; 64]);
    let message = format!("0000:01:00 was not touched: {GONE}");
    refuses(&fallen(), "111 pre-start", 3, &message);
    refuses(&fallen(), "to-vfio", 3, &message);
    // Before whatever else there is to say no to.
    refuses(&fallen().without("sys/bus/pci/drivers/vfio-pci").without("sys/module/vfio_pci"), "to-vfio", 3, &message);
    // It may just have woken up for this.
    let asleep = fallen().file(&format!("{}/power_state", device("0000:01:00.0")), "D3cold\n");
    refuses(&asleep, "111 pre-start", 3, &message);
    for (what, bytes) in [("a card", &[0xde, 0x10, 0x84, 0x26, 0xff][..]), ("no right to read", &[])] {
        accepts(&settled().answers("0000:01:00.0", bytes), what);
    }
}

/// NVIDIA's driver never comes back when it is asked about such a card, and keeps its lock meanwhile.
#[test]
fn a_card_that_fell_off_the_bus_is_not_asked_about() {
    let information = "proc/driver/nvidia/gpus/0000:01:00.0/information";
    let host = |bytes: &[u8]| host().answers("0000:01:00.0", bytes).silent(information);
    for verb in ["--status", "doctor", "111 pre-start"] {
        let begin = Instant::now();
        let run = host(&[0xff; 64]).run(verb);
        assert!(!(run.err + &run.out).contains("busy") && begin.elapsed() < Duration::from_secs(2), "{verb}");
    }
    // One that answers on its bus is.
    assert!(host(&[0xde, 0x10, 0x84, 0x26]).run("--status").out.contains("busy"));
}

#[test]
fn a_card_that_fell_off_the_bus_goes_home_as_far_as_it_gets() {
    let host = settled().record("vm-111", "0000:01:00", "away", "nvidia").answers("0000:01:00.0", &[0xff; 64]);
    let run = host.run("111 post-stop");
    assert_eq!(run.code, Some(1), "{}", run.err);
    let told = told(&run);
    assert!(told.contains(&format!("warning: {GONE}; going home as far as it gets")), "{}", run.err);
    assert!(told.last().unwrap().starts_with("error: 0000:01:00 is stranded: "), "{}", run.err);
    assert_eq!(host.own_file("vm-111")["progress"], json!("returning"));
    // The driver might look at it for ever: it stays with vfio-pci, until it answers again.
    assert!(!told.iter().any(|line| line.contains("load ") || line.contains("unbind")), "{}", run.err);
    let plan = host.run("to-home --dry-run").out;
    assert!(!plan.contains("bind"), "{plan}");
    let plan = host.answers("0000:01:00.0", &[0xde, 0x10, 0x84, 0x26]).run("to-home --dry-run").out;
    assert!(plan.contains("unbind from vfio-pci .0"), "{plan}");
}

// The console

const DUMMY: &str = "sys/class/vtconsole/vtcon0/name";

/// The steps of a plan that name it, each with its phase and what comes right after it.
fn around(host: &Host, call: &str, words: &str) -> Vec<String> {
    let run = host.run(call);
    assert_eq!(run.code, Some(0), "{}", run.err);
    let each = |line: &str| {
        let (phase, steps) = line.split_at(line.len().min(12));
        steps.split(", ").map(|step| format!("{}{step}", phase.trim_start())).collect::<Vec<_>>()
    };
    let lines: Vec<String> = run.out.lines().skip(1).flat_map(each).chain(["the end".to_string()]).collect();
    lines.windows(2).filter(|pair| pair[0].contains(words)).map(|pair| pair.join(" | ")).collect()
}

#[test]
fn the_console_on_a_card_that_is_unbound() {
    let two = || host().card("0000:02:00", "nvidia", "");
    let detach = "release   console detach | release   unbind from nvidia .0";
    let one_screen = two().screen("0000:01:00.0", "fb0");
    assert_eq!(around(&one_screen, "plan 111", "console"), [detach]);
    // Another screen has it meanwhile.
    let two_screens = two().screen("0000:01:00.0", "fb0").screen("0000:02:00.0", "fb1");
    assert_eq!(around(&two_screens, "plan 111", "console"), [detach, "complete  console attach | the end"]);
    // Numbers mean nothing.
    let renamed = two()
        .screen("0000:01:00.0", "fb1")
        .file("sys/class/vtconsole/vtcon1/name", "(M) dummy device\n")
        .file("sys/class/vtconsole/vtcon4/name", "(M) frame buffer device\n")
        .file("sys/class/vtconsole/vtcon4/bind", "1\n");
    assert_eq!(around(&renamed, "plan 111", "console"), [detach]);
    // The screen that the firmware began on is preferred to the first.
    let second = two().screen("0000:02:00.0", "fb0").screen("0000:01:00.0", "fb1");
    let second = second.file("sys/class/graphics/fb1/device/boot_vga", "1\n");
    assert_eq!(around(&second, "plan 111", "console"), [detach, "complete  console attach | the end"]);
}

#[test]
fn consoles_that_are_left_alone() {
    let two = || host().card("0000:02:00", "nvidia", "");
    for (what, host) in [
        ("no screen", two()),
        ("the module goes, and the console with it", host().screen("0000:01:00.0", "fb0")),
        ("the screen is another card's", two().screen("0000:02:00.0", "fb0")),
        ("it is on the first screen", two().screen("0000:02:00.0", "fb0").screen("0000:01:00.0", "fb1")),
        ("it could not be attached again", two().screen("0000:01:00.0", "fb0").file(DUMMY, "(M) dummy device\n")),
        ("off already", two().screen("0000:01:00.0", "fb0").file("sys/class/vtconsole/vtcon1/bind", "0\n")),
    ] {
        assert_eq!(around(&host, "plan 111", "console"), NOTHING, "{what}");
    }
}

/// What was on is on again, what was not is not touched.
#[test]
fn the_console_comes_back() {
    for console in [json!(true), json!(false), Value::Null] {
        let host = settled().record("vm-111", "0000:01:00", "away", "nvidia");
        let mut record = host.own_file("vm-111");
        record["console"] = console.clone();
        let host = host.file("run/gpu-handoff/vm-111", &record.to_string());
        let expected = ["complete  console attach | clear     clear driver_override .0 .1".to_string()];
        let expected = if console == json!(true) { &expected[..] } else { &[] };
        assert_eq!(around(&host, "reconcile --dry-run", "console"), expected, "{console}");
    }
}

/// The write is made, read back, and told; who comes home knows of it.
#[test]
fn the_console_is_attached_and_read_back() {
    let host = host().screen("0000:01:00.0", "fb0").file("sys/class/vtconsole/vtcon1/bind", "0\n");
    let host = host.record("vm-112", "0000:01:00", "returning", "nvidia");
    let mut record = host.own_file("vm-112");
    record["console"] = json!(true);
    let host = host.file("run/gpu-handoff/vm-112", &record.to_string());
    let run = host.run("reconcile");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(told(&run).contains(&"  complete N ms  console attach".to_string()), "{}", run.err);
    assert_eq!(fs::read_to_string(host.path("sys/class/vtconsole/vtcon1/bind")).unwrap(), "1");
}

#[test]
fn a_screen_of_the_firmwares_is_told() {
    let bar = "0x00000000c0000000 0x00000000c0ffffff 0x0000000000042208\n";
    let iomem = |range: &str| format!("c0000000-c10fffff : PCI Bus 0000:01\n    {range} : BOOTFB\n");
    let note = "  note: 0000:01:00.0 has the screen that the firmware set up; vfio-pci takes it, and its console cannot come \
                back before the next boot";
    let with = |range: &str| {
        let host = host().file(&format!("{}/resource", device("0000:01:00.0")), bar);
        let host = host.file("proc/iomem", &iomem(range));
        told(&host.run("111 pre-start")).contains(&note.to_string())
    };
    assert!(with("c0000000-c03e7fff"));
    for elsewhere in ["d0000000-d03e7fff", "c0f00000-c1300000", "00000000-00000000"] {
        assert!(!with(elsewhere), "{elsewhere}");
    }
    // Where nothing moves, nothing goes.
    let host = settled().file(&format!("{}/resource", device("0000:01:00.0")), bar);
    assert_eq!(host.file("proc/iomem", &iomem("c0000000-c03e7fff")).run("111 pre-start"), ready());
    // Nor where only its sound moves.
    let host = Host::new().card("0000:01:00", "vfio-pci", "snd_hda_intel").vm(111, "hostpci0: 0000:01:00");
    let host = host.file(&format!("{}/resource", device("0000:01:00.0")), bar);
    let run = host.file("proc/iomem", &iomem("c0000000-c03e7fff")).run("111 pre-start");
    assert!(run.err.contains("  check") && !run.err.contains("  note: "), "{}", run.err);
}

// Sleep

#[test]
fn what_moves_is_kept_awake() {
    let host = || host().power("0000:01:00.0", "auto", "1").power("0000:01:00.1", "on", "0");
    let wake = "prepare   power/control=on d3cold_allowed=0 .0 | prepare   driver_override=vfio-pci .0 .1";
    assert_eq!(around(&host(), "plan 111", "power/control"), [wake]);
    // The way there fails in a tree: all is as before.
    let host = host();
    assert_eq!(host.run("111 pre-start").code, Some(1));
    for (attribute, value) in [("power/control", "auto"), ("d3cold_allowed", "1")] {
        let path = host.path(&format!("{}/{attribute}", device("0000:01:00.0")));
        assert_eq!(fs::read_to_string(path).unwrap(), value);
    }
}

#[test]
fn what_might_sleep_may_sleep_again() {
    let host = settled().power("0000:01:00.0", "auto", "0").power("0000:01:00.1", "auto", "0");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia");
    let mut record = host.own_file("vm-111");
    record["functions"][0]["power"] = json!({"control": "auto", "d3cold_allowed": "1"});
    // A record of an earlier version says nothing of the other function: then nothing is changed that could not be undone.
    let host = host.file("run/gpu-handoff/vm-111", &record.to_string());
    assert_eq!(
        around(&host, "reconcile --dry-run", "power/control"),
        [
            "release   power/control=on .0 | release   remove_id 10de:22ba 10de:2684",
            "clear     power/control=auto d3cold_allowed=1 .0 | clear     clear driver_override .0 .1",
        ]
    );
}
