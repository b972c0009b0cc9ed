use super::starts::with_program;
use super::*;

// setup vfio

const LOAD: &str = "etc/modules-load.d/gpu-handoff.conf";
const MODPROBE: &str = "etc/modprobe.d/gpu-handoff.conf";
const GRUB: &str = "etc/default/grub.d/gpu-handoff.cfg";
const CMDLINE: &str = "etc/kernel/cmdline";
const LOADER: &str = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// An Intel host that boots by GRUB, its IOMMU on.
fn host() -> Host {
    let host = Host::new()
        .file("proc/cpuinfo", "vendor_id\t: GenuineIntel\n")
        .file("sys/kernel/iommu_groups/0/type", "DMA-FQ\n")
        .file("etc/modprobe.d/pve-blacklist.conf", "blacklist nvidiafb\n")
        .file("boot/grub/grub.cfg", "")
        .file("etc/default/grub", "GRUB_CMDLINE_LINUX_DEFAULT=quiet\n");
    with_program(with_program(host, "usr/sbin/update-initramfs", "prepare"), "usr/sbin/update-grub", "prepare")
}

/// The same, but with Proxmox's systemd-boot.
fn with_systemd_boot(host: Host) -> Host {
    let info: String = "systemd-boot 257".chars().flat_map(|c| [c, '\0']).collect();
    let host = host.file(LOADER, &info).file(CMDLINE, "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n");
    with_program(host.file("etc/kernel/proxmox-boot-uuids", "ABCD-1234\n"), "usr/sbin/proxmox-boot-tool", "prepare")
}

fn read(host: &Host, path: &str) -> String {
    fs::read_to_string(host.path(path)).unwrap()
}

fn calls(host: &Host) -> Vec<String> {
    fs::read_to_string(host.path("calls")).unwrap_or_default().lines().map(str::to_string).collect()
}

#[track_caller]
fn works(host: &Host, call: &str) -> String {
    let run = host.run(call);
    assert_eq!((run.code, run.out.as_str()), (Some(0), ""), "{call}: {}", run.err);
    run.err
}

/// What is left on the host, but for the calls that were noted and the wish to be rebooted.
fn traces(host: &Host, before: &tree::Snapshot) -> Vec<String> {
    let all = host.snapshot().changes_since(before);
    let ours = |line: &&String| {
        !["calls", "run/reboot-required", "boot/grub/grub.cfg", "etc/modules-load.d", "etc/default/grub.d", "var"]
            .iter()
            .any(|path| line.contains(path))
    };
    all.iter().filter(ours).cloned().collect()
}

#[test]
fn there_once_and_back() {
    let host = host();
    let before = host.snapshot();
    let plan = "setup vfio\n  write     /etc/modules-load.d/gpu-handoff.conf\n  write     \
                /etc/modprobe.d/gpu-handoff.conf\n  run       /usr/sbin/update-initramfs -u -k all\n";
    assert_eq!(host.run("setup vfio --dry-run").out, plan);
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let told = works(&host, "setup vfio");
    assert!(told.replace("gpu-handoff: ", "").starts_with(plan), "laid beside its dry run: {told}");
    assert!(told.contains("the IOMMU is on\n") && told.contains("reboot the host when you can"), "{told}");
    assert!(read(&host, LOAD).ends_with("\nvfio\nvfio_iommu_type1\nvfio_pci\n"));
    assert!(read(&host, MODPROBE).contains("\nblacklist nvidiafb\n") && !read(&host, MODPROBE).contains("nouveau"));
    assert_eq!(calls(&host), ["update-initramfs -u -k all"]);
    assert_eq!(read(&host, "run/reboot-required.pkgs"), "gpu-handoff\n");
    let prepared = host.snapshot();
    assert!(works(&host, "setup vfio").contains("nothing to do"));
    assert_eq!(host.snapshot().changes_since(&prepared), NOTHING, "the second time");
    works(&host, "setup vfio --undo");
    assert_eq!(calls(&host).len(), 2);
    assert_eq!(traces(&host, &before), NOTHING);
    assert!(!host.path(LOAD).exists());
    assert!(works(&host, "setup vfio --undo").contains("nothing to do"));
}

#[test]
fn nouveau_is_kept_away_once_there_is_an_nvidia_driver() {
    let dep = "lib/modules/6.12.48-1-pve/modules.dep";
    let host = host().file(dep, "updates/dkms/nvidia-drm.ko: x\nkernel/drivers/video/fbdev/nvidia/nvidiafb.ko:\n");
    works(&host, "setup vfio");
    assert!(!read(&host, MODPROBE).contains("nouveau"));
    let configured = host.config(r#"{"driver":{"runfile":"/root/NVIDIA-Linux-x86_64-580.95.05.run"}}"#);
    assert!(
        configured
            .run("setup vfio --dry-run")
            .out
            .starts_with("setup vfio\n  write     /etc/modprobe.d/gpu-handoff.conf\n")
    );
    let plain = configured.without("etc/gpu-handoff/config.json");
    assert!(plain.run("setup vfio --dry-run").out.starts_with("setup vfio\n  nothing to do"));
    // As Debian's packages call it, and as NVIDIA's installer does.
    let debians = plain.file(dep, "updates/dkms/nvidia-current-open.ko.xz: x\n");
    assert!(
        debians
            .run("setup vfio --dry-run")
            .out
            .starts_with("setup vfio\n  write     /etc/modprobe.d/gpu-handoff.conf\n")
    );
    let host = debians.file(dep, "updates/dkms/nvidia.ko.zst:\n");
    works(&host, "setup vfio");
    assert!(read(&host, MODPROBE).contains("\nblacklist nouveau\n"));
    assert_eq!(calls(&host).len(), 2);
    let host = host.config(r#"{"gpus":{"01:00":{"home":"nouveau"}}}"#);
    works(&host, "setup vfio");
    let text = read(&host, MODPROBE);
    assert!(!text.contains("nouveau") && text.contains("\nblacklist nova_core\n"), "{text}");
}

#[test]
fn an_initramfs_that_was_not_renewed_is_renewed_next_time() {
    let host = host().file("fails", "");
    let message = "/usr/sbin/update-initramfs -u -k all: no space left on device; try again when that is fixed";
    let run = host.run("setup vfio");
    assert_eq!(run.code, Some(1));
    assert!(run.err.ends_with(&format!("gpu-handoff: error: {message}\n")), "{}", run.err);
    let host = host.without("fails");
    works(&host, "setup vfio");
    assert_eq!(calls(&host), ["update-initramfs -u -k all"; 2]);
    assert!(works(&host, "setup vfio").contains("nothing to do"));
}

#[test]
fn grub_by_a_file_of_ours() {
    let host = host();
    let before = host.snapshot();
    works(&host, "setup vfio");
    assert!(!host.path(GRUB).exists(), "not unless asked");
    works(&host, "setup vfio --cmdline");
    let line = "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on iommu=pt\"\n";
    assert!(read(&host, GRUB).ends_with(line));
    assert!(read(&host, "boot/grub/grub.cfg").contains("quiet intel_iommu=on iommu=pt\n"));
    assert!(works(&host, "setup vfio --cmdline").contains("nothing to do"));
    works(&host, "setup vfio --undo");
    assert_eq!(traces(&host, &before), NOTHING);
    assert!(read(&host, "boot/grub/grub.cfg").contains("quiet\n"));
}

#[test]
fn a_command_line_that_the_bootloader_does_not_take_is_taken_back() {
    let host = host().file("deaf", "");
    let run = host.run("setup vfio --cmdline");
    let message = "gpu-handoff: error: /usr/sbin/update-grub did not put intel_iommu=on iommu=pt into \
                   /boot/grub/grub.cfg; the kernel's command line is as it was\n";
    assert_eq!(run.code, Some(1));
    assert!(run.err.ends_with(message), "{}", run.err);
    assert!(!host.path(GRUB).exists());
    let host = host.without("deaf");
    works(&host, "setup vfio --cmdline");
    assert!(host.path(GRUB).exists());
}

#[test]
fn systemd_boot_in_its_own_line() {
    let host = with_systemd_boot(host());
    let before = host.snapshot();
    let plan = host.run("setup vfio --cmdline --dry-run").out;
    assert!(plan.contains("\n  edit      /etc/kernel/cmdline: add intel_iommu=on iommu=pt\n"), "{plan}");
    assert!(plan.ends_with("\n  run       /usr/sbin/proxmox-boot-tool refresh\n"), "{plan}");
    let told = works(&host, "setup vfio --cmdline");
    assert!(told.contains("gpu-handoff:   run       /usr/sbin/proxmox-boot-tool refresh\n"), "{told}");
    assert_eq!(read(&host, CMDLINE), "root=ZFS=rpool/ROOT/pve-1 boot=zfs intel_iommu=on iommu=pt\n");
    assert_eq!(calls(&host), ["update-initramfs -u -k all", "proxmox-boot-tool refresh"]);
    assert!(works(&host, "setup vfio --cmdline").contains("nothing to do"));
    works(&host, "setup vfio --undo");
    assert_eq!(traces(&host, &before), NOTHING);
    assert!(!host.path("var/lib/gpu-handoff/cmdline.json").exists());
}

#[test]
fn files_of_others_are_left_alone_and_told_of() {
    let host = host()
        .card("0000:01:00", "vfio-pci", "vfio-pci")
        .file("etc/modprobe.d/vfio.conf", "options vfio-pci ids=10de:2684,10de:22ba\n")
        .file("etc/modprobe.d/mine.conf", "blacklist nvidia\n")
        .file("etc/modprobe.d/pve-blacklist.conf.bak", "blacklist nvidiafb\n");
    let told = works(&host, "setup vfio");
    for words in [
        "warning: 0000:01:00 is on vfio-pci, and no handoff put it there",
        "warning: /etc/modprobe.d/vfio.conf:1: options vfio-pci ids=10de:2684,10de:22ba gives 0000:01:00.0 0000:01:00.1 to ",
        "warning: /etc/modprobe.d/mine.conf:1: blacklist nvidia keeps nvidia from being loaded at boot, ",
        "warning: /etc/modprobe.d/pve-blacklist.conf.bak was Proxmox's pve-blacklist.conf, ",
    ] {
        assert!(told.contains(words), "{told}");
    }
    let theirs = host.file(MODPROBE, "options nvidia x=1\n");
    let message = "nothing was changed: /etc/modprobe.d/gpu-handoff.conf is not ours, it has not the first line that ours \
                   begin with; give it another name";
    refuses(&theirs, "setup vfio", 3, message);
    refuses(&theirs, "setup vfio --undo", 3, message);
}

#[test]
fn a_mistake_in_the_configuration_keeps_nothing_from_being_undone() {
    let host = host();
    works(&host, "setup vfio");
    let host = host.config("{");
    assert_eq!(host.run("setup vfio").code, Some(2));
    works(&host, "setup vfio --undo");
    assert!(!host.path(LOAD).exists() && !host.path(MODPROBE).exists());
}

#[test]
fn an_iommu_that_is_off_is_told_of() {
    let host = host().without("sys/kernel/iommu_groups");
    assert!(works(&host, "setup vfio").contains("the kernel use it: gpu-handoff setup vfio --cmdline\n"));
    assert!(
        works(&host, "setup vfio --cmdline").contains("the IOMMU is off: if it still is after a reboot, turn on VT-d")
    );
    let unknown = host.without("usr/sbin/update-grub").without(GRUB);
    let message = "nothing was changed: it is not known how this machine boots (neither GRUB nor Proxmox's systemd-boot was \
                   found); add to the kernel's command line yourself: intel_iommu=on iommu=pt";
    refuses(&unknown, "setup vfio --cmdline", 3, message);
}
