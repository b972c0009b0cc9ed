use super::doctor::{findings, fires, fires_of, fixed, hooked, silent, well, well_but};
use super::*;

// doctor: VMs and their settings

const VM: &str = "/etc/pve/qemu-server/111.conf";

/// A card that is with the host, and this configuration of VM 111, after its name.
fn vm(lines: &str) -> Host {
    Host::new()
        .card("0000:01:00", "nvidia", "snd_hda_intel")
        .file("usr/sbin/gpu-handoff", "")
        .link("var/lib/vz/snippets/gpu-handoff", "usr/sbin/gpu-handoff")
        .vm(111, lines)
}

const HOOK: &str = "hookscript: local:snippets/gpu-handoff";

#[track_caller]
fn is_at(id: &str, host: &Host, line: u32, words: &[&str]) {
    fires_at(id, host, &format!("{VM}:{line}"), words);
}

#[track_caller]
fn fires_at(id: &str, host: &Host, place: &str, words: &[&str]) {
    assert_eq!(fires(id, host, place, words)["guest"], 111);
}

#[test]
fn a_vm_without_the_hookscript() {
    let host = vm("hostpci0: 0000:01:00");
    fires("vm-no-hook", &host, &format!("{VM}:2"), &["warning", "VM 111 takes 0000:01:00", "gpu-handoff enable 111"]);
    let host = super::starts::with_program(host, "usr/sbin/qm", "set");
    fixed("vm-no-hook", &host);
    let other = vm("hostpci0: 0000:01:00\nhookscript: local:snippets/mine.sh").file("var/lib/vz/snippets/mine.sh", "");
    is_at("vm-no-hook", &other, 3, &["it has local:snippets/mine.sh", "chain-hookscript"]);
    silent("vm-no-hook", &well());
    silent("vm-no-hook", &vm("hostpci0: 0000:01:00").config(r#"{"gpus":{"0000:01:00":{"home":"vfio-pci"}}}"#));
    silent("vm-no-hook", &vm("hostpci0: 0000:01:00\ntemplate: 1"));
    silent("vm-no-hook", &vm("memory: 512"));
}

#[test]
fn a_hookscript_without_a_card() {
    fires(
        "vm-hook-no-card",
        &vm(HOOK),
        &format!("{VM}:2"),
        &["warning", "names no device yet", "qm set 111 --hostpci0 0000:01:00"],
    );
    fixed("vm-hook-no-card", &vm(HOOK));
    silent("vm-hook-no-card", &well());
}

#[test]
fn an_address_that_shifted() {
    let host = || {
        Host::new()
            .card("0000:02:00", "nvidia", "snd_hda_intel")
            .function("0000:01:00.0", "010802", "144d:a808", "nvme", 14)
            .vm(111, &format!("{HOOK}\nhostpci0: 0000:01:00,pcie=1\nmachine: q35"))
    };
    let told = host().config(r#"{"gpus":{"0000:01:00":{"home":"nvidia"}}}"#);
    let words = [
        "\"severity\":\"error\"",
        "VM 111 would not be started: hostpci0 names 0000:01:00",
        "qm set 111 --hostpci0 0000:02:00,pcie=1",
    ];
    fires("vm-other-device", &told, &format!("{VM}:3"), &words);
    fires_at("vm-other-device", &host(), &format!("{VM}:3"), &["\"severity\":\"warning\""]);
    silent("vm-other-device", &well());
    // The start is refused in the same words, but for one.
    let remedy = fires_of("vm-other-device", &told, "doctor 111")["remedy"].as_str().unwrap().to_string();
    assert!(told.run("111 pre-start").err.contains(&remedy));
    let line = remedy.split(": ").nth(1).unwrap().split("; ").next().unwrap();
    doctor::type_there(&told, line);
    silent("vm-other-device", &told);
}

#[test]
fn a_device_that_is_not_there() {
    let host = vm(&format!("{HOOK}\nhostpci0: 0000:09:00"));
    fires("vm-device-absent", &host, &format!("{VM}:3"), &["error", "there is no such device"]);
    let remedy = fires_of("vm-device-absent", &host, "doctor")["remedy"].as_str().unwrap().to_string();
    doctor::type_there(&host, remedy.split_once(": ").unwrap().1);
    silent("vm-device-absent", &host);
    silent("vm-mapping", &vm(&format!("{HOOK}\nhostpci0: 0000:09:00")));
}

#[test]
fn mappings() {
    let pci = "gpu\n\tmap id=10de:2684,iommugroup=1,node=pve,path=0000:01:00\n";
    let host = vm(&format!("{HOOK}\nhostpci0: mapping=gpu")).file("etc/pve/mapping/pci.cfg", pci);
    silent("vm-mapping", &host);
    let host = host.file("etc/pve/mapping/pci.cfg", &pci.replace("2684", "2204"));
    let words = ["error", "mapping=gpu", "(10de:2684 != 10de:2204)", "pvesh get /cluster/mapping/pci/gpu"];
    fires("vm-mapping", &host, &format!("{VM}:3"), &words);
    let other = host.file("etc/pve/mapping/pci.cfg", &pci.replace("=pve", "=pve2"));
    is_at("vm-mapping", &other, 3, &["pvesh get /cluster/mapping/pci"]);
    silent("vm-mapping", &well());
}

#[test]
fn lines_that_proxmox_drops_or_not() {
    let host = vm(&format!("{HOOK}\nhostpci0: 0000:01:00,newkey=1"));
    let words =
        ["warning", "there is no option 'newkey'", "Proxmox may understand it", "qm set 111 --hostpci0 '0000:01:00'"];
    fires("vm-line-not-understood", &host, &format!("{VM}:3"), &words);
    fixed("vm-line-not-understood", &host);
    for (written, right) in [("0000:0A:00", "0000:0a:00"), ("1:0.0", "01:00.0")] {
        let host = vm(&format!("{HOOK}\nhostpci0: {written}"));
        is_at("vm-line-not-understood", &host, 3, &[&format!("qm set 111 --hostpci0 {right}")]);
        fixed("vm-line-not-understood", &host);
    }
    is_at("vm-line-not-understood", &vm("hostpci0: nonsense"), 2, &["see that line: qm config 111"]);
    silent("vm-line-not-understood", &vm("hostpci0: 01:00"));
    // Advice does not go against the machine.
    let pcie = vm(&format!("{HOOK}\nhostpci0: 0000:01:00,pcie=1,newkey=1"));
    is_at("vm-line-not-understood", &pcie, 3, &["qm set 111 --hostpci0 '0000:01:00'"]);
}

#[test]
fn cards_that_args_pass() {
    let host = vm("args: -device vfio-pci,host=01:00.0,multifunction=on -device vfio-pci,host=01:00.1");
    fires(
        "vm-args",
        &host,
        &format!("{VM}:2"),
        &["warning", "passes 0000:01:00 by args", "qm set 111 --hostpci0 0000:01:00, and take it out of args"],
    );
    is_at("vm-args", &vm("args: -readconfig /root/x"), 2, &["cannot be read", "--hostpci0 0000:01:00"]);
    silent("vm-args", &vm("args: -cpu host"));
}

#[test]
fn one_function_of_several() {
    let host = vm(&format!("{HOOK}\nhostpci0: 0000:01:00.0,x-vga=1"));
    let words = [
        "warning",
        "only 0000:01:00.0 of 0000:01:00, without 0000:01:00.1",
        "qm set 111 --hostpci0 0000:01:00,x-vga=1",
    ];
    fires("vm-one-function", &host, &format!("{VM}:3"), &words);
    fixed("vm-one-function", &host);
    silent("vm-one-function", &well());
    silent("vm-one-function", &vm("hostpci0: 0000:01:00.0\nhostpci1: 01:00.1"));
    silent("vm-one-function", &vm("hostpci0: 0000:01:00.0;0000:01:00.1"));
}

#[test]
fn a_card_that_nobody_makes_ready() {
    let host = vm("hostpci0: 0000:01:00,driver=keep");
    fires("vm-keep", &host, &format!("{VM}:2"), &["warning", "qm set 111 --hostpci0 0000:01:00"]);
    fixed("vm-keep", &host);
    silent("vm-keep", &vm("hostpci0: 0000:01:00,driver=vfio"));
    let other = vm("hostpci0: 0000:05:00,driver=keep").function("0000:05:00.0", "010802", "144d:a808", "nvme", 5);
    silent("vm-keep", &other);
}

#[test]
fn two_vms_at_boot() {
    let two = |first: &str, second: &str| hooked(well_but(first), 112, second);
    let host = two("onboot: 1\n", "onboot: 1\n");
    let finding =
        fires("vm-same-card-at-boot", &host, "/etc/pve/qemu-server/112.conf:8", &["warning", "VM 111 and VM 112"]);
    assert_eq!(finding["guest"], 112);
    fixed("vm-same-card-at-boot", &host);
    silent("vm-same-card-at-boot", &two("onboot: 1\n", "onboot: 0\n"));
    silent("vm-same-card-at-boot", &two("onboot: 1\n", ""));
}

#[test]
fn high_availability_and_clusters() {
    let ha = |text: &str| well().file("etc/pve/ha/resources.cfg", text);
    let words = ["warning", "HA tries other nodes", "ha-manager remove vm:111"];
    fires("vm-ha", &ha("vm: 111\n\tstate started\n"), "/etc/pve/ha/resources.cfg", &words);
    silent("vm-ha", &ha("vm: 112\n\tstate started\n"));
    let cluster =
        well().file("etc/pve/corosync.conf", "").file("etc/pve/nodes/pve/x", "").file("etc/pve/nodes/pve2/x", "");
    fires("vm-not-on-all-nodes", &cluster, "/etc/pve/corosync.conf", &["note", ", on pve2\""]);
    silent("vm-not-on-all-nodes", &well());
}

#[test]
fn a_start_that_would_be_refused() {
    let used = |host: Host| {
        let host = host.file(&format!("{}/drm/card0/dev", device("0000:01:00.0")), NULL_NUMBER);
        host.process(PID, "ollama", "/system.slice/docker-0123456789ab.scope", &[NULL])
    };
    let words = ["warning", "VM 111: as things are it would not start now", "it is in use", "docker stop"];
    let finding = fires("vm-would-not-start", &used(well()), &format!("{VM}:7"), &words);
    assert!(used(well()).run("plan 111").err.contains(finding["remedy"].as_str().unwrap()));
    fires(
        "vm-would-not-start",
        &used(vm("hostpci0: 0000:01:00")),
        &format!("{VM}:2"),
        &["with the hookscript it would not start"],
    );
    silent("vm-would-not-start", &well());
    // One that runs has its card.
    silent("vm-would-not-start", &used(well()).running(111, PID + 1));
    // That VMs take turns is no mistake.
    let other = hooked(used(well()), 112, "").record("vm-112", "0000:01:00", "away", "nvidia").running(112, PID + 1);
    silent("vm-would-not-start", &other);
    // Of several alike one is enough.
    let both = findings(&used(hooked(well(), 112, "")), "doctor");
    assert_eq!(both.len(), 1, "{both:#?}");
    fires_of("vm-would-not-start", &used(hooked(well(), 112, "")), "doctor 112");
}

// Settings

#[test]
fn pcie_without_pci_express() {
    let host = || vm(&format!("{HOOK}\nhostpci0: 0000:01:00,pcie=1"));
    let words = ["error", "its machine is i440fx, the default", "or: qm set 111 --hostpci0 0000:01:00"];
    fires("vm-pcie-needs-q35", &host(), &format!("{VM}:3"), &words);
    fixed("vm-pcie-needs-q35", &host());
    let other = host();
    doctor::type_there(&other, "qm set 111 --hostpci0 0000:01:00");
    silent("vm-pcie-needs-q35", &other);
    for machine in ["q35", "pc-q35-9.0", "type=q35,viommu=intel"] {
        silent("vm-pcie-needs-q35", &vm(&format!("hostpci0: 0000:01:00,pcie=1\nmachine: {machine}")));
    }
    silent("vm-pcie-needs-q35", &vm("hostpci0: 0000:01:00,pcie=0"));
    silent("vm-pcie-needs-q35", &vm("hostpci0: 0000:01:00"));
}

#[test]
fn displays_and_firmware() {
    let host = vm("hostpci0: 0000:01:00,x-vga=1\nvga: qxl\nbios: ovmf");
    fires("vm-vga-ignored", &host, &format!("{VM}:3"), &["note", "vga: qxl"]);
    fixed("vm-vga-ignored", &host);
    silent("vm-vga-ignored", &vm("hostpci0: 0000:01:00,x-vga=1\nvga: none"));
    silent("vm-vga-ignored", &vm("hostpci0: 0000:01:00\nvga: qxl"));
    fires("vm-bios", &vm("hostpci0: 0000:01:00,x-vga=1"), &format!("{VM}:2"), &["note", "SeaBIOS"]);
    silent("vm-bios", &host);
    silent("vm-bios", &vm("hostpci0: 0000:01:00"));
}

#[test]
fn disks_and_files_that_are_missing() {
    let host = vm("hostpci0: 0000:01:00\nbios: ovmf\nscsi0: tank:vm-111-disk-0,size=32G");
    fires("vm-efi-without-disk", &host, &format!("{VM}:3"), &["note", "qm set 111 --efidisk0 tank:1,efitype=4m"]);
    fixed("vm-efi-without-disk", &host);
    silent("vm-efi-without-disk", &vm("hostpci0: 0000:01:00"));
    let host = vm("hostpci0: 0000:01:00,romfile=gpu.rom,x-vga=1");
    fires(
        "vm-romfile-missing",
        &host,
        &format!("{VM}:2"),
        &["error", "no /usr/share/kvm/gpu.rom", "qm set 111 --hostpci0 0000:01:00,x-vga=1"],
    );
    fixed("vm-romfile-missing", &host);
    silent("vm-romfile-missing", &vm("hostpci0: 0000:01:00,romfile=gpu.rom").file("usr/share/kvm/gpu.rom", ""));
}

#[test]
fn memory_that_does_not_fit() {
    let host = |mib: u64| well().file("proc/meminfo", &format!("MemTotal:       {} kB\n", mib * 1024));
    let place = format!("{VM}:9");
    fires("vm-memory", &host(4095), &place, &["\"severity\":\"error\"", "VM 111 has 4096 MiB, and the host 4095"]);
    fixed("vm-memory", &host(4095));
    fires("vm-memory", &host(5119), &place, &["\"severity\":\"warning\"", "leaves it less than 1024"]);
    silent("vm-memory", &host(5120));
    let two = |first: &str| hooked(well_but(first), 112, "onboot: 1\n").file("proc/meminfo", "MemTotal: 7340032 kB\n");
    let finding = fires(
        "vm-memory",
        &two("onboot: 1\n"),
        "/etc/pve/qemu-server/112.conf:10",
        &["\"severity\":\"warning\"", "want 8192 MiB"],
    );
    assert_eq!(finding["guest"], 112);
    silent("vm-memory", &two(""));
    // Not ours to judge.
    silent(
        "vm-memory",
        &Host::new().card("0000:01:00", "nvidia", "x").vm(112, "").file("proc/meminfo", "MemTotal: 1 kB\n"),
    );
}

#[test]
fn a_balloon_and_a_processor() {
    is_at("vm-balloon", &well_but("balloon: 2048\n"), 8, &["warning"]);
    fires("vm-balloon", &well_but("balloon: 2048\n"), &format!("{VM}:8"), &["qm set 111 --balloon 0"]);
    fixed("vm-balloon", &well_but("balloon: 2048\n"));
    silent("vm-balloon", &well_but("balloon: 0\n"));
    silent("vm-balloon", &well_but("balloon: 4096\n"));
    fires("vm-cpu", &vm("hostpci0: 0000:01:00\ncpu: x86-64-v2-AES"), &format!("{VM}:3"), &["note", "x86-64-v2-AES"]);
    fixed("vm-cpu", &vm("hostpci0: 0000:01:00\ncpu: x86-64-v2-AES"));
    is_at_file("vm-cpu", &vm("hostpci0: 0000:01:00"), &["kvm64"]);
    silent("vm-cpu", &vm("hostpci0: 0000:01:00\ncpu: cputype=host,flags=+aes"));
}

#[track_caller]
fn is_at_file(id: &str, host: &Host, words: &[&str]) {
    fires_at(id, host, VM, words);
}
