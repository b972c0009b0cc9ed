use super::setup_driver::executable;
use super::*;

// setup vfio: what keeps the driver away or takes the card, and the advice about it, which is followed here

/// One card, and everything that is read by name.
fn on(driver: &str) -> Host {
    let host = Host::new().file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    match driver {
        "vfio-pci" => {
            let host = host.card("0000:01:00", driver, driver);
            let host = host.file(&format!("{}/driver_override", device("0000:01:00.0")), "vfio-pci\n");
            host.file(&format!("{}/driver_override", device("0000:01:00.1")), "vfio-pci\n")
        }
        "" => host.card("0000:01:00", driver, "snd_hda_intel"),
        _ => host.card("0000:01:00", driver, "snd_hda_intel").file("proc/driver/nvidia/version", "x 580.95.05 y\n"),
    }
}

/// What a dry run found, without the word before it.
fn found(host: &Host) -> Vec<String> {
    let run = host.run("setup vfio --dry-run");
    assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
    run.out.lines().filter_map(|line| line.strip_prefix("  found     ")).map(str::to_string).collect()
}

/// The same words are told by the real run; and each piece of advice, followed, ends what it is about.
#[track_caller]
fn explains(host: Host, places: &[&str]) -> Host {
    let before = host.snapshot();
    let lines = found(&host);
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let causes: Vec<&String> = lines.iter().filter(|line| line.contains("; to take it out: ")).collect();
    let told: Vec<&str> = causes.iter().map(|line| line.split_once(": ").unwrap().0).collect();
    assert_eq!(told, places, "{lines:#?}");
    assert!(lines.contains(&"when that is fixed: update-initramfs -u -k all, then reboot the host".to_string()));
    let run = host.run("setup vfio");
    for line in &lines {
        assert!(run.err.contains(&format!("gpu-handoff: warning: {line}\n")), "{}", run.err);
    }
    let root = host.path("");
    let root = root.to_str().unwrap().trim_end_matches('/');
    for cause in causes {
        let advice = cause.split_once("; to take it out: ").unwrap().1;
        let (first, then) = advice.split_once(" && ").unwrap_or((advice, ""));
        assert!(["", "update-grub", "proxmox-boot-tool refresh"].contains(&then), "{advice}");
        let here = ["etc", "run", "usr", "lib", "root"].iter().fold(first.to_string(), |line, folder| {
            line.replace(&format!(" /{folder}/"), &format!(" {root}/{folder}/"))
        });
        if let Some(folder) = first.strip_prefix("ln -s /dev/null /") {
            fs::create_dir_all(host.path(folder).parent().unwrap()).unwrap();
        }
        let done = Command::new("/bin/bash").arg("-c").arg(&here).status().unwrap();
        assert!(done.success(), "{here}");
    }
    let left = found(&host);
    assert!(left.iter().all(|line| !line.contains("to take it out")), "{left:#?}");
    host
}

#[test]
fn bound_per_device_at_boot() {
    let driverctl = on("vfio-pci")
        .file("etc/driverctl.d/0000:01:00.0", "vfio-pci\n")
        .file("etc/driverctl.d/pci-0000:01:00.1", "vfio-pci\n")
        .file("etc/driverctl.d/pci-0000:03:00.0", "vfio-pci\n");
    let lines = found(&driverctl);
    assert_eq!(lines[0], "0000:01:00 is on vfio-pci, and no handoff put it there: the host does not have it");
    let places = ["/etc/driverctl.d/0000:01:00.0:1", "/etc/driverctl.d/pci-0000:01:00.1:1"];
    let fixed = explains(driverctl, &places);
    // The card is where it was until the host is booted again, and that is not left unsaid.
    assert_eq!(found(&fixed).len(), 2);
    assert!(found(&fixed)[1].starts_with("nothing that acts at boot explains that"));
    let rule = "# mine\nSUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", ATTR{driver_override}=\"vfio-pci\"\n";
    let path = "etc/udev/rules.d/10-vfio-bind.rules";
    explains(on("vfio-pci").file(path, rule), &["/etc/udev/rules.d/10-vfio-bind.rules:2"]);
    explains(
        on("vfio-pci").file(&format!("usr/lib/{}", &path[4..]), rule),
        &["/usr/lib/udev/rules.d/10-vfio-bind.rules:2"],
    );
    let masked = on("vfio-pci").file(&format!("usr/lib/{}", &path[4..]), rule).file(path, "");
    assert_eq!(found(&masked).len(), 2);
}

#[test]
fn bound_by_a_script() {
    let bind = "#!/bin/sh\necho vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override\n";
    let early = "etc/initramfs-tools/scripts/init-top/vfio.sh";
    let host = on("vfio-pci").file(early, bind);
    let lines = found(&host);
    assert!(lines[1].starts_with("/etc/initramfs-tools/scripts/init-top/vfio.sh:2: "), "{lines:#?}");
    assert!(lines[1].ends_with("; to take it out: mv /etc/initramfs-tools/scripts/init-top/vfio.sh /root/"));
    fs::create_dir_all(host.path("root")).unwrap();
    explains(host, &["/etc/initramfs-tools/scripts/init-top/vfio.sh:2"]);
    // By modprobe, whenever vfio-pci is loaded.
    let host = executable(on("vfio-pci"), "usr/local/bin/vfio-pci-override.sh", bind)
        .file("etc/modprobe.d/vfio.conf", "install vfio-pci /usr/local/bin/vfio-pci-override.sh\n");
    explains(host, &["/etc/modprobe.d/vfio.conf:1"]);
    // Whatever stands between it and the next command.
    let host = executable(on("vfio-pci"), "usr/local/bin/vfio-pci-override.sh", bind).file(
        "etc/modprobe.d/vfio.conf",
        "install vfio-pci /usr/local/bin/vfio-pci-override.sh; /sbin/modprobe --ignore-install vfio-pci\ninstall\n",
    );
    explains(host, &["/etc/modprobe.d/vfio.conf:1"]);
    // By a unit of the administrator's that is enabled.
    let unit = "[Service]\nExecStart=/usr/local/sbin/bind-gpu\n";
    let host =
        executable(on("vfio-pci"), "usr/local/sbin/bind-gpu", bind).file("etc/systemd/system/bind-gpu.service", unit);
    assert!(found(&host)[1].starts_with("nothing that acts at boot explains that"), "it is not enabled");
    let host =
        host.link("etc/systemd/system/multi-user.target.wants/bind-gpu.service", "etc/systemd/system/bind-gpu.service");
    let lines = found(&host);
    assert!(lines[1].starts_with("/etc/systemd/system/bind-gpu.service:2: "), "{lines:#?}");
    assert!(lines[1].ends_with("; to take it out: systemctl disable bind-gpu.service"), "{lines:#?}");
    explains(
        on("vfio-pci").file("etc/initramfs-tools/modules", "# x\nvfio\nvfio_pci ids=10de:2684,10de:22ba\n"),
        &["/etc/initramfs-tools/modules:3"],
    );
}

#[test]
fn blocked_on_the_command_line() {
    for word in ["modprobe.blacklist=nouveau,nvidiafb,nvidia", "module_blacklist=nvidia"] {
        let host = on("").file("proc/cmdline", &format!("root=/dev/sda quiet {word}\n"));
        let lines = found(&host);
        assert_eq!(lines[0], "0000:01:00 has no driver");
        assert!(lines[1].starts_with(&format!("/proc/cmdline: {word} keeps nvidia from being loaded")), "{lines:#?}");
    }
    let grub = "GRUB_TIMEOUT=5\n# GRUB_CMDLINE_LINUX_DEFAULT=\"module_blacklist=nvidia\"\n\
                GRUB_CMDLINE_LINUX_DEFAULT=\"quiet modprobe.blacklist=nouveau,nvidia vfio-pci.ids=10de:2684,8086:1572\"\n";
    let host = on("").file("etc/default/grub", grub);
    let host = explains(host, &["/etc/default/grub:3"; 2]);
    let left = fs::read_to_string(host.path("etc/default/grub")).unwrap();
    assert!(left.contains("\"quiet modprobe.blacklist=nouveau vfio-pci.ids=8086:1572\""), "{left}");
    let cmdline = "root=ZFS=rpool/ROOT/pve-1 boot=zfs vfio-pci.ids=10de:2684,10de:22ba\n";
    explains(on("").file("etc/kernel/cmdline", cmdline), &["/etc/kernel/cmdline:1"]);
    explains(on("").file("etc/default/grub.d/vfio.cfg", grub), &["/etc/default/grub.d/vfio.cfg:3"; 2]);
}

#[test]
fn blocked_by_modprobes_configuration() {
    let all = "alias nvidia off\nalias nvidia_drm off\nblacklist nvidia_drm\nblacklist nvidia_uvm\nblacklist nvidia_modeset\n\
               install nvidia /bin/false\n";
    let places: Vec<String> = (1..=6).map(|line| format!("/etc/modprobe.d/blacklist-nvidia.conf:{line}")).collect();
    let places: Vec<&str> = places.iter().map(String::as_str).collect();
    explains(on("").file("etc/modprobe.d/blacklist-nvidia.conf", all), &places);
    // While the driver runs all the same: from the next boot on it will not.
    explains(on("nvidia").file("etc/modprobe.d/x.conf", "blacklist nvidia_drm\n"), &["/etc/modprobe.d/x.conf:1"]);
    for directory in ["run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d"] {
        let host = on("").file(&format!("{directory}/x.conf"), "install nvidia /bin/false\n");
        let host = explains(host, &[&format!("/{directory}/x.conf:1")]);
        let hidden =
            host.without(&format!("{directory}/x.conf")).file(&format!("{directory}/y.conf"), "blacklist nvidia\n");
        assert_eq!(found(&hidden.file("etc/modprobe.d/y.conf", "")), NOTHING, "{directory}: hidden by one of its name");
    }
    let debians = "install nvidia modprobe -i nvidia-current $CMDLINE_OPTS\nalias char-major-195* nvidia\n\
                   alias pci:v000010DEd*sv*sd*bc03sc00i00* nvidia\nblacklist nouveau\n";
    assert_eq!(found(&on("nvidia").file("etc/modprobe.d/nvidia.conf", debians)), NOTHING);
}

#[test]
fn given_to_vfio_by_ids() {
    let vfio = "options vfio-pci ids=10de:2684,10de:22ba disable_vga=1\nsoftdep nvidia pre: vfio-pci\nsoftdep snd_hda_intel \\\n pre: vfio-pci\n";
    let places = ["/etc/modprobe.d/vfio.conf:1", "/etc/modprobe.d/vfio.conf:2", "/etc/modprobe.d/vfio.conf:3"];
    explains(on("vfio-pci").file("etc/modprobe.d/vfio.conf", vfio), &places);
    // Of a card that is not in this host, or of another maker.
    let others = "options vfio-pci ids=10de:1b80,8086:1572\nsoftdep nvidia pre: vfio-pci\n";
    assert_eq!(found(&on("nvidia").file("etc/modprobe.d/vfio.conf", others)), NOTHING);
}

#[test]
fn removed_by_a_rule() {
    let rule = "ACTION==\"add\", SUBSYSTEM==\"pci\", ATTR{vendor}==\"0x10de\", ATTR{class}==\"0x03[0-9]*\", ATTR{remove}=\"1\"\n";
    let host = Host::new().file("usr/lib/udev/rules.d/50-remove-nvidia.rules", rule);
    let lines = found(&host);
    assert!(lines[0].contains("has the kernel forget an NVIDIA card at once"), "{lines:#?}");
    explains(host, &["/usr/lib/udev/rules.d/50-remove-nvidia.rules:1"]);
}

#[test]
fn nothing_is_said_of_what_is_wished_or_ours() {
    let vfio = "options vfio-pci ids=10de:2684,10de:22ba\nblacklist nvidia\n";
    for home in ["vfio-pci", "none"] {
        let host = on(if home == "none" { "" } else { home }).file("etc/modprobe.d/vfio.conf", vfio);
        assert_eq!(found(&host.config(&format!(r#"{{"gpus":{{"01:00":{{"home":"{home}"}}}}}}"#))), NOTHING, "{home}");
    }
    let host = on("nvidia");
    host.run("setup vfio");
    assert_eq!(found(&host), NOTHING);
    let away = on("vfio-pci").record("vm-111", "0000:01:00", "away", "nvidia");
    assert_eq!(found(&away), NOTHING);
}

#[test]
fn whoever_takes_cards_first_is_kept_away() {
    let dep = "lib/modules/6.12.48-1-pve/modules.dep";
    let host = Host::new().card("0000:01:00", "NovaCore", "snd_hda_intel").file(dep, "updates/dkms/nvidia.ko:\n");
    // Its driver is called otherwise than its module.
    let host = host
        .without("sys/bus/pci/drivers/NovaCore/module")
        .link("sys/bus/pci/drivers/NovaCore/module", "sys/module/nova_core");
    host.run("setup vfio");
    let text = fs::read_to_string(host.path("etc/modprobe.d/gpu-handoff.conf")).unwrap();
    assert!(text.ends_with("\nblacklist nouveau\nblacklist nova_core\nblacklist nova_drm\n"), "{text}");
    let host = Host::new().card("0000:01:00", "newcomer", "snd_hda_intel").file(dep, "updates/dkms/nvidia.ko:\n");
    host.run("setup vfio");
    let read = |host: &Host| fs::read_to_string(host.path("etc/modprobe.d/gpu-handoff.conf")).unwrap();
    assert!(read(&host).ends_with("blacklist newcomer\n"), "{}", read(&host));
    // It shows no longer, and is kept away all the same.
    let address = device("0000:01:00.0");
    let host = host.without(&format!("{address}/driver"));
    assert!(host.run("setup vfio").err.contains("nothing to do"));
    assert!(read(&host).ends_with("blacklist newcomer\n"), "{}", read(&host));
}

/// Where people look first: the card's state, and the call that is to bring it home.
#[test]
fn told_wherever_the_card_is_asked_for() {
    let file = "/etc/driverctl.d/0000:01:00.0";
    let cause =
        format!("{file}:1: vfio-pci gives 0000:01:00.0 to vfio-pci at boot (driverctl); to take it out: rm {file}");
    let host = || on("vfio-pci").file(file.trim_start_matches('/'), "vfio-pci\n");
    assert_eq!(status(&host())["gpus"][0]["causes"], json!([cause]));
    assert!(host().run("--status").out.contains(&format!("  cause    {cause}\n")));
    let then = "when that is fixed: update-initramfs -u -k all, then reboot the host";
    let line = "0000:01:00 is at home on vfio-pci: no handoff of ours put it there, nothing to do";
    plans(&host(), "to-nvidia --dry-run", &[line, &format!("  found     {cause}"), &format!("  found     {then}")]);
    let run = host().run("to-nvidia");
    assert_eq!(told(&run), [line.to_string(), format!("warning: {cause}"), format!("warning: {then}")]);

    // One that is kept from its driver, and those that are as they are to be.
    let blocked = on("").file("proc/cmdline", "quiet module_blacklist=nvidia\n");
    assert!(
        status(&blocked)["gpus"][0]["causes"][0]
            .as_str()
            .unwrap()
            .starts_with("/proc/cmdline: module_blacklist=nvidia")
    );
    let wished = host().config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#);
    let unexplained = on("vfio-pci");
    let at_home = on("nvidia").file("proc/cmdline", "quiet module_blacklist=nvidia\n");
    let by_hand = host().record("manual-0000:01:00", "0000:01:00", "away", "nvidia");
    for host in [wished, unexplained, at_home, by_hand] {
        assert_eq!(status(&host)["gpus"][0]["causes"], json!([]));
    }
}
