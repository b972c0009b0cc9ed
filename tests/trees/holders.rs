use super::*;

// Who has the GPU

#[test]
fn an_unknown_module_holds_the_driver() {
    let message = "0000:01:00 was not touched: module gdrdrv holds nvidia and is none that gpu-handoff may unload; \
                   unload it first: modprobe -r gdrdrv";
    let holder = |of: &str| host().file(&format!("sys/module/{of}/holders/gdrdrv/refcnt"), "0\n");
    refuses(&holder("nvidia"), "111 pre-start", 3, message);
    refuses(&holder("nvidia"), "to-vfio", 3, message);
    let deeper = holder("nvidia_uvm").file("sys/module/nvidia/holders/nvidia_uvm/refcnt", "1\n");
    refuses(&deeper, "111 pre-start", 3, message);
}

/// Opening the card's DRM node is what makes it in use here. The kernel's link by an old name has no node in /dev.
pub fn with_drm_node(host: Host) -> Host {
    let drm = format!("{}/drm", device("0000:01:00.0"));
    let host = host.file(&format!("{drm}/card0/dev"), NULL_NUMBER);
    host.link(&format!("{drm}/controlD64"), &format!("{drm}/card0"))
}

#[test]
fn somebody_uses_the_gpu() {
    let container = would("policy.container \"stop\"");
    let unit = would("policy.unit \"stop\"");
    for (command, cgroup, who, policy, remedy) in [
        (
            "ffmpeg",
            "/lxc/101/ns/system.slice/jellyfin.service",
            "ffmpeg, container 101",
            &container,
            "pct shutdown 101",
        ),
        ("kvm", "/qemu.slice/112.scope", "kvm, VM 112", &String::new(), "qm shutdown 112"),
        ("ollama", "/system.slice/ollama.service", "ollama, ollama.service", &unit, "systemctl stop ollama.service"),
        ("python3", "/user.slice/user-0.slice/session-3.scope", "python3, session-3.scope", &kill(), "kill 5000001"),
        ("X", "/", "X", &kill(), "kill 5000001"),
    ] {
        let host = with_drm_node(host()).process(PID, command, cgroup, &["/dev/zero", NULL]);
        let busy = format!(
            "0000:01:00 was not touched, it is in use: PID 5000001 ({who}) has /dev/dri/card0 open; {policy}type: {remedy};"
        );
        refuses(&host, "111 pre-start", 3, &format!("{busy} qm start 111"));
        refuses(&host, "to-vfio", 3, &format!("{busy} gpu-handoff to-vfio 0000:01:00"));
    }
}

/// What a refusal says of the policy that would do by itself what must be typed.
pub fn would(keys: &str) -> String {
    format!("{keys} in /etc/gpu-handoff/config.json would end that by itself; ")
}

fn kill() -> String {
    would("policy.process \"kill\"")
}

#[test]
fn many_users_are_counted() {
    let mut host = with_drm_node(host());
    for pid in PID..PID + 7 {
        host = host.process(pid, "cuda", "/lxc/101/ns", &[NULL]);
    }
    let who: Vec<String> =
        (PID..PID + 5).map(|pid| format!("PID {pid} (cuda, container 101) has /dev/dri/card0 open")).collect();
    let message = format!(
        "0000:01:00 was not touched, it is in use: {}, 2 more; {}type: pct shutdown 101; qm start 111",
        who.join(", "),
        would("policy.container \"stop\"")
    );
    refuses(&host, "111 pre-start", 3, &message);
}

/// One line for somebody who uses the card in a way of his own.
fn busy(how: &str) -> String {
    let more = if how.contains("PID 5000002") { " 5000002" } else { "" };
    format!(
        "0000:01:00 was not touched, it is in use: PID 5000001 (cuda, job.scope) has {how}; {}type: kill 5000001{more}; qm \
         start 111",
        kill()
    )
}

#[test]
fn a_mapping_without_a_descriptor() {
    let process = || with_drm_node(host()).process(PID, "cuda", "/job.scope", &["/dev/zero"]);
    for (line, name) in [
        ("7f00000000-7f00001000 rw-s 00000000 00:06 312                        /dev/nvidia0", "7f00000000-7f00001000"),
        ("00400000-00401000 r--p 00000000 00:2e 7 /run/my\\012own gpu (deleted)", "400000-401000"),
        ("7f00-8000 rw-s 00000000 fd:01 8 ", "7f00-8000"),
    ] {
        let usual = |host: Host| {
            host.maps(PID, "00200000-00201000 r-xp 00000000 fd:01 17 /usr/bin/cuda", "200000-201000", "/proc/version")
        };
        let mapped = usual(process()).file(&format!("proc/{PID}/maps"), "55d0-56d0 rw-p 00000000 00:00 0 [heap]\n");
        let mapped = mapped.maps(PID, line, name, NULL);
        refuses(&mapped, "111 pre-start", 3, &busy("/dev/dri/card0 mapped"));
        if nix::unistd::geteuid().is_root() {
            assert_eq!(status(&mapped)["gpus"][0]["users"][0]["mapped"], json!(true));
        }
    }
    let both =
        with_drm_node(host()).process(PID, "cuda", "/job.scope", &[NULL]).maps(PID, "1-2 r 0 0:6 3", "1-2", NULL);
    refuses(&both, "111 pre-start", 3, &busy("/dev/dri/card0 open"));
}

#[test]
fn mappings_of_other_files() {
    let host = with_drm_node(settled())
        .process(PID, "cat", "/", &[])
        .maps(PID, "1-2 rw-s 0 00:06 3 /dev/nvidia0", "1-2", "/dev/zero")
        .maps(PID, "3-4 rw-s 0 00:06 4 /dev/nvidia0", "3-4", "/no/such/file")
        .maps(PID, "5-6 rw-s 0 00:00 0", "5-6", NULL)
        .maps(PID, "no line at all", "7-8", NULL);
    accepts(&host, "mappings");
}

/// Each file is looked at once, however many processes have it mapped.
#[test]
fn many_mappings_of_one_file() {
    let line = "1-2 rw-s 0 00:06 312 /dev/nvidia0";
    let host = with_drm_node(host())
        .process(PID, "cuda", "/job.scope", &[])
        .maps(PID, line, "1-2", NULL)
        .process(PID + 1, "cuda", "/job.scope", &[])
        .file(&format!("proc/{}/maps", PID + 1), &format!("{line}\n"));
    let message = busy("/dev/dri/card0 mapped, PID 5000002 (cuda, job.scope) has /dev/dri/card0 mapped");
    refuses(&host, "111 pre-start", 3, &message);
}

/// Reading what such a process has mapped waits, for as long as it likes. It is passed over, and others are still seen.
#[test]
fn a_process_that_does_not_let_itself_be_looked_at() {
    let host = with_drm_node(host())
        .process(PID, "cuda", "/job.scope", &[])
        .maps(PID, "1-2 rw-s 0 00:06 312 /dev/nvidia0", "1-2", NULL)
        .process(PID + 1, "stuck", "/", &[]);
    let fifo = host.path(&format!("proc/{}/maps", PID + 1));
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let begin = std::time::Instant::now();
    assert_eq!(host.run("111 pre-start"), refusal(3, &busy("/dev/dri/card0 mapped")));
    assert!(begin.elapsed() < std::time::Duration::from_secs(20));
    // It is not overlooked for what it has open.
    let host = host.process(PID + 1, "stuck", "/", &[NULL]);
    let run = host.run("111 pre-start");
    assert!(run.err.contains("PID 5000002 (stuck) has /dev/dri/card0 open"), "{}", run.err);
}

/// What it had stays with the threads that are left.
#[test]
fn a_process_whose_first_thread_has_ended() {
    let thread = PID + 1;
    let host = with_drm_node(host())
        .process(PID, "cuda", "/job.scope", &[])
        .file(&format!("proc/{PID}/task/{PID}/comm"), "cuda\n")
        .file(&format!("proc/{PID}/task/{thread}/comm"), "cuda\n")
        .process(thread, "a thread", "/job.scope", &[NULL])
        .link(&format!("proc/{PID}/task/{thread}/fd"), &format!("proc/{thread}/fd"));
    // A real /proc would not list the thread beside its process.
    let message = busy("/dev/dri/card0 open, PID 5000002 (a thread, job.scope) has /dev/dri/card0 open");
    refuses(&host, "111 pre-start", 3, &message);
}

#[test]
fn other_devices_of_the_driver_and_of_the_card() {
    let process = |host: Host| host.process(PID, "cuda", "/job.scope", &[NULL]);
    for (name, path) in [
        ("nvidia-caps", "/dev/nvidia-caps/nvidia-cap3"),
        ("nvidia-caps-imex-channels", "/dev/nvidia-caps-imex-channels/channel3"),
        ("nvidia-nvswitch", "/dev/nvidia-nvswitch3"),
    ] {
        let devices = format!("Character devices:\n  1 {name}\n\nBlock devices:\n  7 loop\n");
        refuses(&process(host().file("proc/devices", &devices)), "111 pre-start", 3, &busy(&format!("{path} open")));
    }
    let framebuffer = host().file(&format!("{}/graphics/fb0/dev", device("0000:01:00.0")), NULL_NUMBER);
    refuses(&process(framebuffer), "111 pre-start", 3, &busy("/dev/fb0 open"));
    let control = format!("{}/sound/card1/controlC1/dev", device("0000:01:00.1"));
    refuses(&process(host().file(&control, NULL_NUMBER)), "111 pre-start", 3, &busy("/dev/snd/controlC1 open"));
}

#[test]
fn other_open_devices_and_the_vm_itself_are_no_users() {
    let other = with_drm_node(settled()).process(PID, "cat", "/", &["/dev/zero", "/proc/version", "/no/such/file"]);
    accepts(&other, "another device");
    accepts(&with_drm_node(settled()).process(PID, "kvm", "/qemu.slice/111.scope", &[NULL]), "the VM itself");
}

#[test]
fn another_vm_has_the_gpu() {
    let recorded = || settled().record("vm-112", "0000:01:00", "away", "nvidia");
    let taken = || recorded().running(112, PID);
    let starting = || recorded().flock("var/lock/qemu-server/lock-112.conf");
    // Whoever asked for the start still lives.
    let asked_for = || settled().record_by(112, "0000:01:00", "nvidia", PID).alive(PID);
    let has_it = "0000:01:00 was not touched: VM 112 has it; stop that VM (qm shutdown 112), or if it does not run: \
                  gpu-handoff to-nvidia 0000:01:00; then";
    let for_vm = format!("{has_it} start VM 111 again: qm start 111");
    for host in [taken(), starting(), asked_for()] {
        refuses(&host, "111 pre-start", 3, &for_vm);
        refuses(&host, "to-vfio", 3, &format!("{has_it} try again: gpu-handoff to-vfio 0000:01:00"));
    }
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm shutdown 112";
    for host in [taken(), starting()] {
        refuses_now(&host, "to-nvidia", 3, stays);
    }
    // Of a VM's several cards each is taken.
    let second = taken().card("0000:02:00", "vfio-pci", "vfio-pci").vm(111, "hostpci0: 02:00\nhostpci1: 01:00");
    refuses(&second, "111 pre-start", 3, &for_vm);
}

#[test]
fn another_vm_has_the_gpu_told_beforehand() {
    let host = settled().record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID);
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm shutdown 112";
    refuses(&host, "to-nvidia", 3, stays);
}

/// The way out that the refusal names: a shell that lives on does not keep a card from coming home.
#[test]
fn a_start_that_was_given_up_can_be_ended_by_hand() {
    let host = settled().record_by(112, "0000:01:00", "vfio-pci", PID).alive(PID);
    assert_eq!(host.run("to-nvidia"), success("0000:01:00 is at home on vfio-pci: nothing to do"));
    assert!(!host.has_own_file("vm-112"));
}

/// What is with vfio-pci by hand may be used by a VM, and stays there when the VM stops.
#[test]
fn a_card_by_hand_serves_a_vm() {
    let host = settled().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    let by_hand = host.own_file("manual-0000:01:00");
    accepts(&host, "by hand");
    assert_eq!(host.own_file("vm-111")["functions"][0]["driver"], json!("vfio-pci"));
    assert_eq!(host.own_file("vm-111")["functions"][1]["driver"], json!("vfio-pci"));
    let stays = "0000:01:00 stays on vfio-pci, as asked by hand, until: gpu-handoff to-nvidia 0000:01:00";
    assert_eq!(host.run("111 post-stop"), success(stays));
    assert!(!host.has_own_file("vm-111"));
    assert_eq!(host.own_file("manual-0000:01:00"), by_hand);
}

#[test]
fn a_card_by_hand_that_a_vm_has() {
    let host = settled()
        .record("manual-0000:01:00", "0000:01:00", "away", "nvidia")
        .record("vm-112", "0000:01:00", "away", "vfio-pci")
        .running(112, PID);
    let stays = "0000:01:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm shutdown 112";
    refuses_now(&host, "to-nvidia", 3, stays);
}

/// The record outlived its VM: the next one takes the slot over, with the home that the record knew.
#[test]
fn a_vm_that_is_gone_has_nothing() {
    let given = || {
        let override_of = |n: u32| format!("sys/bus/pci/devices/0000:01:00.{n}/driver_override");
        settled().file(&override_of(0), "vfio-pci\n").file(&override_of(1), "vfio-pci\n")
    };
    let left = || given().record("vm-112", "0000:01:00", "away", "nvidia");
    let pid_file = format!("{PID}\n");
    let qemu = format!("proc/{PID}/cmdline");
    for (what, host) in [
        ("no pid file", left()),
        ("no such process", left().file("run/qemu-server/112.pid", &pid_file)),
        ("another program", left().file("run/qemu-server/112.pid", &pid_file).file(&qemu, "/usr/bin/tail\0-f\0")),
        ("another VM", left().running(113, PID).file("run/qemu-server/112.pid", &pid_file)),
        ("another lock", left().flock("var/lock/qemu-server/lock-113.conf")),
        ("a caller that has ended", given().record_by(112, "0000:01:00", "nvidia", PID)),
        ("a zombie", given().record_by(112, "0000:01:00", "nvidia", PID).stat(PID, 'Z', START)),
        ("a later process", given().record_by(112, "0000:01:00", "nvidia", PID).stat(PID, 'S', START + 1)),
    ] {
        accepts(&host, what);
        let inherited = host.own_file("vm-111");
        let driver = |n: usize| inherited["functions"][n]["driver"].clone();
        assert_eq!((driver(0), driver(1)), (json!("nvidia"), json!("snd_hda_intel")), "{what}");
        assert!(!host.has_own_file("vm-112"), "{what}");
    }
}

/// Until QEMU runs, only that tells a start that goes on from one that was given up.
#[test]
fn who_asked_for_it_is_on_record() {
    let caller = std::process::id();
    let host = settled().vm(112, "hostpci0: 01:00").alive(caller);
    accepts(&host, "the first");
    assert_eq!(host.own_file("vm-111")["caller"], json!({"pid": caller, "start": START}));
    assert_eq!(status(&host)["gpus"][0]["owner"], json!({"kind": "vm", "vmid": 111}));
    let message = "0000:01:00 was not touched: VM 111 has it; stop that VM (qm shutdown 111), or if it does not run: \
                   gpu-handoff to-nvidia 0000:01:00; then start VM 112 again: qm start 112";
    refuses(&host, "112 pre-start", 3, message);
    // It may try again itself.
    accepts(&host, "again");
    let host = host.without(&format!("proc/{caller}"));
    assert_eq!(status(&host)["gpus"][0]["owner"]["vmid"], Value::Null);
    assert_eq!(host.run("112 pre-start"), ready());
    assert!(!host.has_own_file("vm-111"));
}

// Who can be ended, and how

/// A session of logind's, and the card's DRM node, which it has handed to that.
fn with_session(host: Host, text: &str) -> Host {
    with_drm_node(host).file("run/systemd/sessions/2", &format!("USER=alice\nCLASS=user\n{text}DEVICES=13:64 1:3\n"))
}

const EVERYTHING: &str = r#"{"policy":{"process":"kill","unit":"stop","container":"stop"}}"#;

/// None of these would be gone for good when it is killed, or all would: neither is it advised nor done.
#[test]
fn who_is_started_again_is_not_killed() {
    let user = "/user.slice/user-1000.slice/user@1000.service";
    let id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for (pid, command, cgroup, who, why, remedy) in [
        (
            1,
            "systemd",
            "/init.scope".to_string(),
            "systemd, init.scope",
            ": it holds the screen for user alice",
            "loginctl terminate-session 2",
        ),
        (
            700,
            "systemd-logind",
            "/system.slice/systemd-logind.service".to_string(),
            "systemd-logind, systemd-logind.service",
            ": it holds the screen for user alice",
            "loginctl terminate-session 2",
        ),
        (
            PID,
            "gnome-shell",
            format!("{user}/session.slice/org.gnome.Shell@wayland.service"),
            "gnome-shell, user@1000.service",
            "",
            "systemctl --user --machine=1000@.host stop org.gnome.Shell@wayland.service",
        ),
        (
            PID,
            "ollama",
            format!("/system.slice/docker-{id}.scope"),
            &format!("ollama, docker-{id}.scope"),
            "",
            "docker stop 0123456789ab",
        ),
        (
            PID,
            "(udev-worker)",
            "/system.slice/systemd-udevd.service/udev".to_string(),
            "(udev-worker), systemd-udevd.service",
            ": it ends by itself",
            "udevadm settle",
        ),
    ] {
        for config in ["{}", EVERYTHING] {
            let host = with_session(host(), "SERVICE=login\n").config(config).process(pid, command, &cgroup, &[NULL]);
            let host = host.config(&config.replacen('{', r#"{"time":{"handoff_s":1},"#, 1).replace(",}", "}"));
            let message = format!(
                "0000:01:00 was not touched, it is in use: PID {pid} ({who}) has /dev/dri/card0 open{why}; type: {remedy}; qm \
                 start 111"
            );
            refuses(&host, "111 pre-start", 3, &message);
        }
    }
    let graphical = with_session(host(), "SERVICE=gdm-password\n").process(1, "systemd", "/init.scope", &[NULL]);
    let run = graphical.run("plan 111");
    assert!(run.err.ends_with("; type: systemctl stop display-manager.service; qm start 111\n"), "{}", run.err);
}

/// Whoever was given a cgroup names those below it as he likes: that must not have a container stopped.
#[test]
fn a_cgroup_that_is_called_like_a_containers() {
    let cgroup = "/user.slice/user-1000.slice/user@1000.service/app.slice/lxc.payload.101";
    let host = with_drm_node(host()).config(r#"{"policy":{"containers":{"101":"stop"}}}"#);
    let host = host.process(PID, "evil", cgroup, &[NULL]);
    let message = format!(
        "0000:01:00 was not touched, it is in use: PID 5000001 (evil, user@1000.service) has /dev/dri/card0 open; {}type: \
         kill 5000001; qm start 111",
        kill()
    );
    refuses(&host, "111 pre-start", 3, &message);
}

// What a look takes

/// A thread with descriptors of its own, which its process does not show.
#[test]
fn a_thread_with_its_own_descriptors() {
    let (opened, is_open) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        // SAFETY: takes a number; from here on this thread has its own copy of the table.
        assert_eq!(unsafe { nix::libc::unshare(nix::libc::CLONE_FILES) }, 0);
        let _full = fs::File::open("/dev/full").unwrap();
        opened.send(()).unwrap();
        let _ = ended.recv();
    });
    is_open.recv().unwrap();
    let own = std::process::id();
    let host = host().file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), "1:7\n");
    fs::create_dir_all(host.path("proc")).unwrap();
    std::os::unix::fs::symlink(format!("/proc/{own}"), host.path(&format!("proc/{own}"))).unwrap();
    let run = host.run("plan 111");
    end.send(()).unwrap();
    thread.join().unwrap();
    assert!(run.err.contains(&format!("PID {own} (")) && run.err.contains("has /dev/dri/card0 open"), "{run:?}");
    assert_eq!(run.code, Some(3));
}

/// A look that is not through in time is none: nothing is touched, and who takes the time is told.
#[test]
fn a_look_that_takes_too_long() {
    let mut host = with_drm_node(host()).config(r#"{"time":{"handoff_s":1.5}}"#);
    for pid in PID..PID + 12 {
        host = host.process(pid, "stuck", "/", &[]);
        nix::unistd::mkfifo(&host.path(&format!("proc/{pid}/maps")), nix::sys::stat::Mode::S_IRUSR).unwrap();
    }
    let begin = std::time::Instant::now();
    let run = host.run("111 pre-start");
    assert!(begin.elapsed() < std::time::Duration::from_secs(10));
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(
        run.err.contains("0000:01:00 was not touched: looking who uses it took longer than 0.5 s: "),
        "{}",
        run.err
    );
    assert!(run.err.contains("do not let themselves be looked at"), "{}", run.err);
    assert!(!host.has_own_file("vm-111") && !host.has_own_file("journal"));
    let driver_override = host.path(&format!("{}/driver_override", device("0000:01:00.0")));
    assert_eq!(fs::read_to_string(driver_override).unwrap(), "(null)\n");
}

/// The command line of a process whose memory is locked does not come. It is taken for what Proxmox wrote down.
#[test]
fn a_qemu_that_does_not_show_its_command_line() {
    let host = settled().card("0000:02:00", "vfio-pci", "vfio-pci").vm(112, "hostpci0: 02:00");
    let host = host.record("vm-112", "0000:02:00", "away", "nvidia").file("run/qemu-server/112.pid", "4242\n");
    let host = host.file("proc/4242/comm", "kvm\n").config(r#"{"time":{"handoff_s":3,"lock_s":1}}"#);
    nix::unistd::mkfifo(&host.path("proc/4242/cmdline"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let begin = std::time::Instant::now();
    assert_eq!(host.run("111 pre-start"), ready());
    let stays = "0000:02:00 was not touched: VM 112 has it; stop that VM and it comes home by itself: qm shutdown 112";
    assert_eq!(host.run("to-nvidia 02:00"), refusal(3, stays));
    assert!(begin.elapsed() < std::time::Duration::from_secs(15));
}

/// Each open file holds a reference on the driver's module: more of them than there are files to be seen belong to somebody
/// whom no look shows, and unbinding one of two cards would wait for him.
#[test]
fn somebody_whom_only_the_driver_knows() {
    let two = |references: &str| {
        let host = host().card("0000:02:00", "nvidia", "snd_hda_intel");
        let host = host.file("sys/module/nvidia/refcnt", references).config(r#"{"time":{"handoff_s":3}}"#);
        ["0", "1"].iter().zip(["0000:01:00.0", "0000:02:00.0"]).fold(host, |host, (minor, address)| {
            let information = format!("proc/driver/nvidia/gpus/{address}/information");
            host.file(&information, &format!("Device Minor: {minor}\n"))
        })
    };
    assert_eq!(two("0\n").run("plan 111").code, Some(0));
    let message = "0000:01:00 was not touched: nvidia has 1 open file(s) that belong to no process, such as a descriptor \
                   that was sent and not yet received, and nobody can tell whether it is 0000:01:00.0: taking that from \
                   the driver could hang; end what uses nvidia; then start VM 111 again: qm start 111";
    refuses(&two("1\n"), "111 pre-start", 3, message);
    // With one card the modules are unloaded, which says by itself that they are in use.
    let one = host().file("sys/module/nvidia/refcnt", "1\n");
    assert_eq!(one.run("plan 111").code, Some(0));
}

/// When nothing of the driver and of the sound card is open by their own count, there is nobody to look for.
#[test]
fn nobody_is_looked_for_when_nothing_is_open() {
    let control = format!("{}/sound/card1/controlC1/dev", device("0000:01:00.1"));
    let node = |host: Host| with_drm_node(host).file(&control, "116:0\n").process(PID, "cuda", "/job.scope", &[NULL]);
    let counted = |nvidia: &str, sound: &str| {
        node(host()).file("sys/module/nvidia/refcnt", nvidia).file("sys/module/snd_hda_intel/refcnt", sound)
    };
    assert_eq!(counted("0\n", "0\n").run("plan 111").code, Some(0));
    for host in [counted("1\n", "0\n"), counted("0\n", "1\n"), node(host()).file("sys/module/nvidia/refcnt", "0\n")] {
        refuses(&host, "111 pre-start", 3, &busy("/dev/dri/card0 open"));
    }
}

/// Who uses what is not looked for either when it is only told: one process that nobody could look at shows it.
#[test]
fn status_looks_for_nobody_when_nothing_is_open() {
    let two = |references: &str| {
        let host = with_drm_node(host()).card("0000:02:00", "nvidia", "snd_hda_intel");
        host.file("sys/module/nvidia/refcnt", references).process(PID, "cuda", "/job.scope", &[NULL])
    };
    assert_eq!(status(&two("0\n"))["gpus"][0]["users"], json!([]));
    assert_eq!(status(&two("1\n"))["gpus"][0]["users"][0]["pid"], json!(PID));
}

/// A function that has no node is nobody's to have open, whatever its driver counts.
#[test]
fn nobody_is_looked_for_where_there_is_no_node() {
    let host = Host::new().card("0000:01:00", "", "snd_hda_intel").vm(111, "hostpci0: 0000:01:00,pcie=1");
    let run = host.file("sys/module/snd_hda_intel/refcnt", "3\n").without("proc").run("111 pre-start");
    let unbind = "unbind from snd_hda_intel 0000:01:00.1: the kernel reported success, but nothing changed";
    assert!(run.err.contains(unbind), "nobody can look without /proc, and it was not needed: {}", run.err);
}

// What hangs on the card's other functions

/// A card with a USB function, and a disk behind that.
fn with_disk() -> Host {
    let disk = format!("{}/usb3/3-1/3-1:1.0/host8/target8:0:0/8:0:0:0/block/sdb", device("0000:01:00.2"));
    host()
        .function("0000:01:00.2", "0c0330", "10de:1ad8", "xhci_hcd", 1)
        .file(&format!("{disk}/dev"), "8:16\n")
        .file(&format!("{disk}/sdb1/dev"), "8:17\n")
}

fn taken_away(what: &str, then: &str) -> String {
    format!(
        "0000:01:00 was not touched: the disk sdb1 is on 0000:01:00.2 and {what}; {then}; then start VM 111 again: qm start 111"
    )
}

#[test]
fn a_disk_behind_the_card() {
    assert_eq!(with_disk().file("proc/mounts", "/dev/sda1 / ext4 rw 0 0\n").run("plan 111").code, Some(0));
    let holder =
        "sys/devices/pci0000:00/0000:01:00.2/usb3/3-1/3-1:1.0/host8/target8:0:0/8:0:0:0/block/sdb/sdb1/holders";
    let mapper = |host: Host| {
        host.file(&format!("{holder}/dm-0/dm/name"), "vg-data\n").file(&format!("{holder}/dm-0/dev"), "252:0\n")
    };
    let mounted = |text: &str| with_disk().file("proc/self/mountinfo", text);
    for (host, what, then) in [
        (
            with_disk().file("proc/mounts", "/dev/sdb1 /mnt/backup ext4 rw 0 0\n"),
            "is mounted at /mnt/backup",
            "unmount it: umount /mnt/backup",
        ),
        (
            mounted("36 25 8:17 / /mnt/my\\040disk rw - ext4 /dev/root rw\n"),
            "is mounted at /mnt/my disk",
            "unmount it: umount '/mnt/my disk'",
        ),
        (
            with_disk().file("proc/swaps", "Filename Type\n/dev/sdb1 partition 1 0 -2\n"),
            "is swapped to",
            "end that: swapoff /dev/sdb1",
        ),
        (
            mapper(with_disk()).file("proc/mounts", "/dev/mapper/vg-data /srv ext4 rw 0 0\n"),
            "is part of vg-data, which is mounted at /srv",
            "unmount it: umount /srv",
        ),
        (
            mapper(with_disk()),
            "is in use as vg-data",
            "take it down: vgchange -an for a volume group, cryptsetup close for an encrypted disk, or dmsetup remove vg-data",
        ),
    ] {
        refuses(&host, "111 pre-start", 3, &taken_away(what, then));
    }
    // Where it is with the VM already there is nothing to take away.
    let with_vm = settled().function("0000:01:00.2", "0c0330", "10de:1ad8", "vfio-pci", 1);
    accepts(&with_vm.file("proc/mounts", "/dev/sdb1 /mnt/backup ext4 rw 0 0\n"), "the VM's");
}

#[test]
fn a_network_behind_the_card() {
    let interface = format!("{}/net/enp1s0f2", device("0000:01:00.2"));
    let host =
        || host().function("0000:01:00.2", "020000", "8086:1521", "igb", 1).file(&format!("{interface}/address"), "");
    let default = "Iface\tDestination\nenp1s0f2\t00000000\t0101A8C0\n";
    let bridged = host().file(&format!("{interface}/upper_vmbr0/address"), "");
    for (host, what) in [
        (host().file("proc/net/route", default), "carries the default route"),
        (host().file("proc/net/route", &default.replace("00000000", "0001A8C0")), "carries a route"),
        (bridged, "is part of vmbr0"),
    ] {
        let message = format!(
            "0000:01:00 was not touched: the network interface enp1s0f2 is on 0000:01:00.2 and {what}; take it out of the \
             host's network configuration, or move that device to another card; then start VM 111 again: qm start 111"
        );
        refuses(&host, "111 pre-start", 3, &message);
    }
    assert_eq!(host().file("proc/net/route", "Iface\tDestination\neth0\t00000000\n").run("plan 111").code, Some(0));
}

// The console

/// Nothing is known of a console that somebody else has locked: it is left alone, and the card goes.
#[test]
fn a_console_that_is_locked() {
    let host = host().screen("0000:01:00.0", "fb0").config(r#"{"time":{"handoff_s":3}}"#);
    let bind = "sys/class/vtconsole/vtcon1/bind";
    let host = host.without(bind);
    nix::unistd::mkfifo(&host.path(bind), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let plan = host.run("plan 111");
    assert_eq!(plan.code, Some(0), "{}", plan.err);
    assert!(!plan.out.contains("console"), "{}", plan.out);
}
