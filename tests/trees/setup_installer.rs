use super::setup_driver::{self, *};
use super::*;

// setup driver and what an installer of some version is, knows and says

const TURING: &str = "10de:1e87";

/// As `ready`, with this GPU.
fn with_gpu(id: &str) -> Host {
    setup_driver::ready().file(&format!("{}/device", device("0000:01:00.0")), &format!("0x{}\n", &id[5..]))
}

/// The installer refuses whatever an installer of its version does not know.
#[test]
fn every_version_is_told_only_what_it_knows() {
    for version in [
        "450.80.02",
        "470.256.02",
        "510.108.03",
        "515.43.04",
        "515.105.01",
        "520.56.06",
        "525.147.05",
        "535.183.01",
        "545.23.06",
        "550.40.07",
        "550.163.01",
        "555.42.02",
        "560.35.03",
        "570.86.16",
        "580.95.05",
        "590.48.01",
    ] {
        let more = ["470.256.02", "515.105.01", "550.163.01", "555.42.02"].contains(&version);
        let wishes = [(false, "auto"), (true, "auto"), (false, "proprietary"), (false, "open")];
        for (dkms, module) in &wishes[..if more { 4 } else { 1 }] {
            let host = with_installer(with_gpu(TURING), version)
                .file("usr/sbin/dkms", "")
                .config(&format!(r#"{{"driver":{{"dkms":{dkms},"module":"{module}"}}}}"#));
            let host = host.file(&format!("lib/modules/{RELEASE}/build/Makefile"), "");
            works(&host, "setup driver");
            assert_eq!(there(&host), has(version));
            let told = calls(&host).remove(0);
            assert_eq!(told.contains(" --dkms"), *dkms, "{told}");
            if !dkms {
                let host = host.file("lib/modules/6.14.0-1-pve/build/Makefile", "");
                works(&host, "setup driver --kernel 6.14.0-1-pve");
            }
        }
    }
}

#[test]
fn generations_that_a_version_has_not() {
    for (id, version, words) in [
        ("10de:2684", "470.256.02", "has not got the GPU with id 10de:2684 (Ada) yet; take 520 or newer"),
        ("10de:2684", "515.105.01", "has not got the GPU with id 10de:2684 (Ada) yet; take 520 or newer"),
        (
            "10de:1180",
            "515.105.01",
            "no longer has the GPU with id 10de:1180 (Kepler); the newest branch that has it is 470",
        ),
        (
            "10de:1200",
            "470.256.02",
            "no longer has the GPU with id 10de:1200 (Fermi); the newest branch that has it is 390",
        ),
        ("10de:1b80", "590.48.01", "(Maxwell, Pascal or Volta); the newest branch that has it is 580"),
        ("10de:2b85", "565.77", "take 570 or newer"),
    ] {
        says_no(&with_installer(with_gpu(id), version), "setup driver", 3, words);
    }
    works(&with_installer(with_gpu("10de:1180"), "470.256.02"), "setup driver");
}

/// With an archive behind it, as makeself puts it there.
fn with_list(host: Host, version: &str, packer: &str, list: &str) -> Host {
    let folder = host.path("packing");
    let inside = folder.join("supported-gpus");
    fs::create_dir_all(&inside).unwrap();
    fs::write(inside.join("supported-gpus.json"), list).unwrap();
    let packed = Command::new("tar").args([packer, "-cf", "-", "-C"]).arg(&folder).arg(".").output().unwrap();
    assert!(packed.status.success());
    let text = INSTALLER.replace("VERSION", version);
    let lines = text.lines().count() + 1;
    let text = text.replace("root=${0%", &format!("skip=\"{}\"\nroot=${{0%", lines + 1));
    let mut bytes = text.into_bytes();
    bytes.extend(packed.stdout);
    let path = format!("{CACHE}/NVIDIA-Linux-x86_64-{version}.run");
    let host = host.file(&path, "");
    fs::write(host.path(&path), bytes).unwrap();
    for program in ["tar", "tail", "gzip", "xz"] {
        let _ = std::os::unix::fs::symlink(format!("/usr/bin/{program}"), host.path(&format!("usr/bin/{program}")));
    }
    host
}

#[test]
fn nvidias_own_list_in_the_installer_decides() {
    let list = r#"{"chips":[
        {"devid":"0x1B80","name":"NVIDIA GeForce GTX 1080","features":["dpycbob"]},
        {"devid":"0x1180","name":"GeForce GTX 680","legacybranch":"470.xx","features":[]},
        {"devid":"0x2684","name":"NVIDIA GeForce RTX 4090","features":["dpycbob"],"legacybranch":"575.xx"},
        {"devid":"0x1E87","subdevid":"0x1","name":"NVIDIA GeForce RTX 2080","features":["kernelopen"]}]}"#;
    for packer in ["--gzip", "--xz"] {
        let host = with_list(with_gpu("10de:2684"), "580.95.05", packer, list);
        let words = "no longer has the GPU with id 10de:2684 (Ada); the newest branch that has it is 575";
        says_no(&host, "setup driver", 3, words);
        says_no(&host, "setup driver --dry-run", 3, words);
    }
    let host = with_list(with_gpu("10de:1180"), "580.95.05", "--gzip", list);
    says_no(&host, "setup driver", 3, "the newest branch that has it is 470");
    let host = with_list(with_gpu("10de:2204"), "580.95.05", "--gzip", list);
    says_no(&host, "setup driver", 3, "it is not in the list of GPUs that its installer carries");
    let host = with_list(with_gpu(TURING), "580.95.05", "--gzip", list);
    assert!(host.run("setup driver --dry-run").out.contains("open modules"));
    works(&host, "setup driver");
    // One that cannot be unpacked here says nothing.
    let host = with_list(with_gpu("10de:2684"), "580.95.05", "--gzip", list).without("usr/bin/gzip");
    works(&host, "setup driver");
}

#[test]
fn the_vgpu_manager_is_no_driver_for_this() {
    let name = "NVIDIA-Linux-x86_64-550.90.05-vgpu-kvm";
    let text = format!("#!/bin/sh\nlabel=\"NVIDIA vGPU Manager\"\ntargetdir=\"{name}\"\necho called >>calls\n");
    let words = "is NVIDIA's vGPU manager, which cuts a card into slices for VMs";
    let cached = setup_driver::ready().file(&format!("{CACHE}/{name}.run"), &text);
    says_no(&cached, "setup driver", 3, words);
    says_no(&cached, "setup driver --dry-run", 3, words);
    for path in [format!("root/{name}.run"), "root/driver.run".to_string()] {
        let host = setup_driver::ready().file(&path, &text).config(&format!(r#"{{"driver":{{"runfile":"/{path}"}}}}"#));
        says_no(&host, "setup driver", 3, words);
    }
    // Beside a driver it is not looked at.
    works(&with_installer(cached, "580.95.05"), "setup driver");
}

#[test]
fn whoever_has_the_card_is_named() {
    let nova = || with_installer(setup_driver::ready(), "580.95.05").driver("NovaCore");
    let nova = nova()
        .link(&format!("{}/driver", device("0000:01:00.0")), "sys/bus/pci/drivers/NovaCore")
        .without("sys/bus/pci/drivers/NovaCore/module")
        .link("sys/bus/pci/drivers/NovaCore/module", "sys/module/nova_core");
    says_no(&nova, "setup driver", 3, "NovaCore (nova_core) has 0000:01:00: gpu-handoff setup vfio keeps it away");
    says_no(&nova, "setup driver --defer", 3, "because NovaCore (nova_core) has 0000:01:00: it is after this");
    let built_in = nova.without("sys/bus/pci/drivers/NovaCore/module");
    says_no(
        &built_in,
        "setup driver",
        3,
        "NovaCore has 0000:01:00 and is built into this kernel: boot a kernel without it",
    );
    let loaded = with_installer(setup_driver::ready(), "580.95.05").file("sys/module/nova_core/refcnt", "0\n");
    says_no(&loaded, "setup driver", 3, "nova_core is loaded: gpu-handoff setup vfio keeps it away");
}

#[test]
fn debians_own_driver_is_known_by_its_names() {
    let folder = format!("lib/modules/{RELEASE}/kernel/drivers/video");
    let host = || {
        with_installer(setup_driver::ready(), "580.95.05")
            .file(&format!("lib/modules/{RELEASE}/modules.dep"), "kernel/drivers/video/nvidia-current-open.ko:\n")
            .file(&format!("{folder}/nvidia-current-open.ko"), "550.163.01\n")
    };
    let packages = "#!/bin/sh\necho nvidia-open-kernel-dkms installed\n";
    let packaged = executable(host(), "usr/bin/dpkg-query", packages);
    let words =
        "another NVIDIA driver is there, nvidia-current-open 550.163.01, from packages: nvidia-open-kernel-dkms; ";
    says_no(&packaged, "setup driver", 3, words);
    says_no(&host(), "setup driver", 3, "nvidia-current-open 550.163.01, by the names that Debian's packages give it");
    // Of the wanted version it is there.
    let same = with_installer(host(), "550.163.01").without(&format!("{CACHE}/NVIDIA-Linux-x86_64-580.95.05.run"));
    let same = same.file("usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01", "").file("sys/module/nvidia/refcnt", "0\n");
    let same =
        same.file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue\n");
    assert!(works(&same, "setup driver").contains("550.163.01 is there: nothing to do"));
}

#[test]
fn an_incomplete_libglvnd_is_seen_before_the_old_driver_is_gone() {
    let lib = "usr/lib/x86_64-linux-gnu";
    let partly = |host: Host| host.file(&format!("{lib}/libGL.so.1"), "").file(&format!("{lib}/libGLX.so.0"), "");
    let host = partly(with_installer(with_driver(), "580.95.05"));
    says_no(&host, "setup driver", 3, "this is missing: apt-get install libglvnd0 libegl1 ");
    assert_eq!(record(&host)["version"], "570.86.16");
    let apt = "#!/bin/sh\nroot=${0%/usr/bin/apt-get}\necho \"apt $*\" >>\"$root/calls\"\n\
               touch \"$root/usr/lib/x86_64-linux-gnu/libEGL.so.1\" \"$root/usr/lib/x86_64-linux-gnu/libGLdispatch.so.0\"\n";
    let host = executable(host, "usr/bin/apt-get", apt);
    works(&host, "setup driver --install-deps");
    assert!(calls(&host)[0].ends_with(" install libglvnd0 libegl1"));
    assert_eq!(record(&host)["version"], "580.95.05");
}

/// A build that fails, and what the installer has in its log.
fn fails_with(log: &str) -> String {
    let host = with_installer(setup_driver::ready(), "580.95.05").file("fails-build", log);
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    run.err.lines().last().unwrap().to_string()
}

#[test]
fn the_cause_is_quoted_and_not_what_followed_from_it() {
    let error = "   /tmp/selfgz1/NVIDIA-Linux-x86_64-580.95.05/kernel-open/nvidia/nv.c:3:9: error: too few arguments\n";
    let told = fails_with(&format!("   CC [M]  nvidia/nv.o\n{error}   make[3]: *** [nv.o] Error 1\n"));
    assert_eq!(
        told,
        "gpu-handoff: error: driver: installing 580.95.05 failed: nvidia/nv.c:3:9: error: too few arguments (log: \
         /var/log/gpu-handoff/driver.log); all of it: /var/log/nvidia-installer.log"
    );
    let told = fails_with("   ERROR: modpost: \"pci_x\" [nvidia.ko] undefined!\n");
    assert!(told.contains("failed: ERROR: modpost: \"pci_x\" [nvidia.ko] undefined! (log"), "{told}");
    let told = fails_with("ERROR: Unable to find the kernel source tree for the currently running kernel.\n");
    assert!(told.contains("failed: ERROR: Unable to find the kernel source tree"), "{told}");
    assert!(!told.contains("daemon-reload"), "{told}");
}

#[test]
fn what_is_known_not_to_build_is_said_before() {
    let host = with_installer(setup_driver::ready(), "570.144").file("proc/sys/kernel/osrelease", "6.17.1-1-pve\n");
    let host = host.file("lib/modules/6.17.1-1-pve/build/Makefile", "");
    let query = "#!/bin/sh\nprintf '%s installed\\n' proxmox-headers-6.14 proxmox-headers-6.17.1-1-pve\n";
    let host = executable(host, "usr/bin/dpkg-query", query);
    let plan = host.run("setup driver --dry-run").out;
    for note in [
        "note      driver 570.144 is known not to build for kernel 6.17.1-1-pve: take 570.195.03 or newer\n",
        "note      the packages with kernel headers follow 6.14, and kernel 6.17.1-1-pve runs: ",
    ] {
        assert!(plan.contains(note), "{plan}");
    }
    assert!(works(&host, "setup driver").contains("warning: driver 570.144 is known not to build"));
}

#[test]
fn a_purge_comes_last_and_the_way_back_is_told() {
    let query = "#!/bin/sh\n[ -e \"${0%/usr/bin/dpkg-query}/purged\" ] || echo nvidia-driver installed\n";
    let apt = "#!/bin/sh\nroot=${0%/usr/bin/apt-get}\necho \"apt $*\" >>\"$root/calls\"\n\
               case $* in *' install '*) ! [ -e \"$root/fails-apt\" ] || exit 100 ;; *) : >\"$root/purged\" ;; esac\n";
    let host = || {
        let host = executable(with_installer(setup_driver::ready(), "580.95.05"), "usr/bin/dpkg-query", query);
        executable(host, "usr/bin/apt-get", apt)
    };
    let back = "comes back with: apt-get install nvidia-driver";
    assert!(host().run("setup driver --purge --dry-run").out.contains(back));
    let failing = host().file("fails-build", "x.c:1: error: y\n");
    let run = failing.run("setup driver --purge");
    assert_eq!(run.code, Some(1));
    assert!(run.err.trim_end().ends_with(back), "{}", run.err);
    // What is missing is fetched before.
    let offline = host().file("fails-apt", "").without("usr/bin/make");
    assert_eq!(offline.run("setup driver --purge --install-deps").code, Some(1));
    assert!(!offline.path("purged").exists());
}

const SYSTEMCTL: &str = "#!/bin/sh\nroot=${0%/usr/bin/systemctl}\ncase $1 in stop | start) echo \"$*\" >>\"$root/calls\" ;; esac\n\
                         [ ! -e \"$root/dies\" ] || [ \"$1\" != stop ] || kill -9 $PPID\n";
const OWED: &str = "run/gpu-handoff/setup-stopped";

/// A driver is loaded, and one of NVIDIA's services runs.
fn with_service() -> Host {
    let host = executable(with_installer(with_driver(), "580.95.05"), "usr/bin/systemctl", SYSTEMCTL);
    host.file("sys/fs/cgroup/system.slice/nvidia-persistenced.service/cgroup.events", "populated 1\n")
}

#[test]
fn services_that_were_stopped_run_again() {
    let host = with_service();
    works(&host, "setup driver");
    let all = calls(&host);
    assert_eq!(all[0], "stop --no-block -- nvidia-persistenced.service");
    assert_eq!(all.last().unwrap(), "start --no-block -- nvidia-persistenced.service");
    assert!(!host.path(OWED).exists());
    // Also when it fails.
    let host = with_service().file("fails-build", "");
    assert_eq!(host.run("setup driver").code, Some(1));
    assert_eq!(calls(&host).last().unwrap(), "start --no-block -- nvidia-persistenced.service");
}

#[test]
fn services_of_a_set_up_that_was_killed_are_started_by_reconcile() {
    for call in ["reconcile", "reconcile --owed", "setup pending", "setup driver"] {
        // Killed in the very moment in which the first is asked to stop.
        let host = with_service().file("dies", "");
        assert_eq!(host.run("setup driver").code, None);
        assert!(host.path(OWED).exists());
        assert_eq!(calls(&host), ["stop --no-block -- nvidia-persistenced.service"]);
        let host = host.without("dies").without("sys/fs/cgroup");
        let host = host.flock("run/gpu-handoff/driver.lock");
        if call.starts_with("reconcile") {
            works(&host, call);
            assert_eq!(calls(&host), NOTHING, "its installer is at work still");
        }
        let host = host.without("proc/locks");
        works(&host, call);
        assert_eq!(calls(&host)[0], "start --no-block -- nvidia-persistenced.service", "{call}");
        assert!(!host.path(OWED).exists());
        works(&host, "reconcile");
        assert_eq!(calls(&host).iter().filter(|call| call.starts_with("start")).count(), 0);
    }
}
