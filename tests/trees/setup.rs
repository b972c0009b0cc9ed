use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, Instant};

// container setup, container sync, container check

/// What a look into a fresh container finds.
const FRESH: &str = "os=debian\nos_version=13\nos_name=Debian GNU/Linux 13 (trixie)\nfree=/ / 20000000\n\
    free=/var/tmp / 20000000\n";
const DRIVER: &str = "libcuda=580.95.05\nlibnvidia-ml=580.95.05\nsmi=yes\n";
const CUDA: &str = "repository=yes\npackage=cuda-keyring 1.1-1 installed\nnvcc=12.8\n\
    package=cuda-toolkit-12-8 12.8.1-1 installed\n";

const CACHE: &str = "var/cache/gpu-handoff";
const NAME: &str = "NVIDIA-Linux-x86_64-580.95.05.run";
const INSTALLER: &str = "#!/bin/sh\ntargetdir=\"NVIDIA-Linux-x86_64-580.95.05\"\nexit\n";
const CT_CONFIG: &str = "arch: amd64\nostype: debian\nrootfs: local:101/a.raw\n";

/// The end of its arguments says where to and from where; below the root, the web is a directory.
const CURL: &str = "#!/bin/sh\nroot=${0%/usr/bin/curl}\nfor last; do to=$before; before=$last; done\n\
    while [ \"$1\" != --output ]; do shift; done\n\
    echo \"curl ${last##*/}\" >>\"$root/calls\"\n\
    [ ! -s \"$2\" ] || { echo 'curl: (33) server has no ranges' >&2; exit 33; }\n\
    cat \"$root/web/${last##*/}\" >\"$2\" 2>/dev/null && exit 0\n\
    echo 'curl: (6) Could not resolve host: mirror' >&2\nexit 6\n";

/// The host has driver 580.95.05 and its installer, and container 101 runs.
fn ready() -> Host {
    let host = Host::new()
        .card("0000:01:00", "nvidia", "snd_hda_intel")
        .file("proc/devices", "Character devices:\n195 nvidia\n511 nvidia-uvm\nBlock devices:\n")
        .file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Device Minor: \t 0\n")
        .file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
        .file("etc/pve/local/x", "")
        .file(&format!("{CACHE}/{NAME}"), INSTALLER)
        .file("web/cuda-keyring_1.1-1_all.deb", "a keyring\n")
        .file("web/Packages", &index(&["cuda-toolkit-13-0", "cuda-toolkit-13-1"]))
        .file("usr/sbin/pct", include_str!("programs/pct-setup"))
        .file("usr/bin/curl", CURL)
        .file("calls", "");
    for program in ["usr/sbin/pct", "usr/bin/curl"] {
        fs::set_permissions(host.path(program), fs::Permissions::from_mode(0o755)).unwrap();
    }
    symlink("/usr/bin/sha256sum", host.path("usr/bin/sha256sum")).unwrap();
    fs::create_dir_all(host.path("dev")).unwrap();
    symlink(NULL, host.path("dev/nvidia0")).unwrap();
    running(host, 101, FRESH)
}

/// Of a repository with these packages.
fn index(names: &[&str]) -> String {
    let package =
        |name: &&str| format!("Package: {name}\nVersion: 1.0-1\nSize: 3000000000\nInstalled-Size: 6500000\n\n");
    names.iter().map(package).collect()
}

/// A container that runs, and what a look into it finds.
fn running(host: Host, ctid: u32, inside: &str) -> Host {
    host.file(&format!("etc/pve/lxc/{ctid}.conf"), CT_CONFIG)
        .file(&format!("sys/fs/cgroup/lxc/{ctid}/cgroup.events"), "populated 1\n")
        .file(&format!("inside-{ctid}"), inside)
}

fn stopped(host: Host, ctid: u32) -> Host {
    host.file(&format!("sys/fs/cgroup/lxc/{ctid}/cgroup.events"), "populated 0\n")
}

/// What pct was asked for since the last time, and what curl was.
fn calls(host: &Host) -> Vec<String> {
    let calls = fs::read_to_string(host.path("calls")).unwrap();
    fs::write(host.path("calls"), "").unwrap();
    calls.lines().filter(|call| !call.ends_with(" look")).map(str::to_string).collect()
}

/// The last line of its standard error, without the name before it.
fn last_line(run: &Run) -> &str {
    run.err.lines().last().unwrap_or_default().strip_prefix("gpu-handoff: ").unwrap_or_default()
}

/// Refused or failed in these words, and neither the container nor its configuration was touched.
#[track_caller]
fn says_no(host: &Host, code: i32, words: &str) {
    let before = fs::read(host.path("etc/pve/lxc/101.conf")).unwrap();
    let run = host.run("container setup 101");
    assert_eq!(run.code, Some(code), "{}", run.err);
    assert!(last_line(&run).contains(words), "{}", run.err);
    assert_eq!(fs::read(host.path("etc/pve/lxc/101.conf")).unwrap(), before);
    let touched: Vec<String> = calls(host).into_iter().filter(|call| !call.starts_with("curl")).collect();
    assert_eq!(touched, NOTHING);
}

#[test]
fn set_up_and_again() {
    let host = ready();
    let dry = host.run("container setup 101 --dry-run");
    assert_eq!(dry.code, Some(0), "{}", dry.err);
    let steps: Vec<&str> = dry.out.lines().filter(|line| !line.contains("lxc.") && !line.contains(" make ")).collect();
    assert_eq!(
        steps,
        [
            "container 101 gets 0000:01:00",
            "  restart   container 101, so that it gets the device nodes",
            "  install   driver 580.95.05, without kernel modules",
            "  add       the CUDA repository https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/",
            "  install   cuda-toolkit-13-0",
            "  take      13.3 GiB on /, where 19.1 GiB are free: the driver about 1.0 GiB, and 2.3 GiB while it is installed; \
             cuda-toolkit-13-0 up to 10.0 GiB",
        ]
    );
    assert_eq!(calls(&host), NOTHING);
    let run = host.run("container setup 101");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(last_line(&run), "container 101: has driver 580.95.05 and cuda-toolkit-13-0");
    assert_eq!(
        calls(&host),
        [
            "curl Packages",
            "curl cuda-keyring_1.1-1_all.deb",
            "101 reboot",
            "101 clean",
            "101 push",
            "101 driver",
            "101 clean",
            "101 push",
            "101 repository",
            "101 toolkit",
            "101 smi"
        ]
    );
    assert!(
        fs::read_to_string(host.path("var/log/gpu-handoff/container-101.log")).unwrap().contains("installing driver")
    );
    let sizes = "gpu-handoff: container 101: takes up to 12.3 GiB on /, where 19.1 GiB are free: the driver about 1.0 GiB, and \
                 2.3 GiB while it is installed; cuda-toolkit-13-0 6.2 GiB, and 2.8 GiB to download\n";
    assert!(run.err.contains(sizes), "{}", run.err);
    // Nothing of the keyring is kept on the host.
    assert_eq!(fs::read_dir(host.path(CACHE)).unwrap().count(), 1);

    let run = host.run("container setup 101");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(last_line(&run), "container 101: has driver 580.95.05 and cuda-toolkit-13-0; nothing was to be done");
    assert_eq!(calls(&host), ["101 smi"]);
    let dry = host.run("container setup 101 --dry-run");
    assert!(dry.out.ends_with("  nothing to do\n") || dry.out.contains(" make "), "{}", dry.out);
}

#[test]
fn every_node_that_cuda_needs_must_open() {
    let host = running(ready(), 101, &format!("{FRESH}{DRIVER}{CUDA}node=/dev/nvidia0\n"));
    symlink(NULL, host.path("dev/nvidia-uvm")).unwrap();
    let dry = host.run("container setup 101 --dry-run").out;
    assert!(dry.contains("  restart   container 101, so that it gets the device nodes\n"), "{dry}");
    assert_eq!(host.run("container setup 101").code, Some(0));
    assert_eq!(calls(&host), ["101 reboot", "101 smi"]);
    assert_eq!(host.run("container setup 101").code, Some(0));
    assert_eq!(calls(&host), ["101 smi"]);
    let dry = host.run("container setup 101 --dry-run").out;
    assert!(!dry.contains("restart"), "{dry}");
    // It is given them, and they do not open.
    let host = running_inside(host, 101, &format!("{FRESH}{DRIVER}{CUDA}node=/dev/nvidia0\n"));
    let dry = host.run("container setup 101 --dry-run").out;
    assert!(dry.contains("restart"), "{dry}");
}

#[test]
fn it_goes_on_where_it_was_interrupted() {
    let node = "node=/dev/nvidia0\n";
    let half = running(ready(), 101, &format!("{FRESH}{node}{DRIVER}{CUDA}installing=yes\nleftovers=yes\n"));
    assert_eq!(half.run("container setup 101").code, Some(0));
    assert_eq!(calls(&half), ["101 clean", "101 push", "101 driver", "101 smi"]);
    let broken = running(half, 101, &format!("{FRESH}{node}{DRIVER}{CUDA}broken=yes\n").replace("nvcc=12.8\n", ""));
    let broken = broken.file("web/Packages", &index(&["cuda-toolkit-12-8"]));
    assert_eq!(broken.run("container setup 101").code, Some(0));
    assert_eq!(calls(&broken), ["curl Packages", "101 repair", "101 toolkit", "101 smi"]);
    let left = running(broken, 101, &format!("{FRESH}{node}{DRIVER}{CUDA}leftovers=yes\n"));
    assert_eq!(left.run("container setup 101").code, Some(0));
    assert_eq!(calls(&left), ["101 clean", "101 smi"]);
}

#[test]
fn what_cannot_be_set_up_is_not_touched() {
    says_no(
        &ready().without(&format!("{CACHE}/{NAME}")),
        3,
        "no installer of driver 580.95.05, which the host has: copy NVIDIA",
    );
    says_no(&ready().config(r#"{"driver":{"runfile":"/nowhere.run"}}"#), 3, "driver.runfile: there is no /nowhere.run");
    let other = INSTALLER.replace("580.95.05", "570.86.16");
    let by_name = ready().file("root/NVIDIA-Linux-x86_64-570.86.16.run", &other);
    let by_name = by_name.config(r#"{"driver":{"runfile":"/root/NVIDIA-Linux-x86_64-570.86.16.run"}}"#);
    says_no(&by_name, 3, "wrong installer version: it is 570.86.16, wanted is 580.95.05");
    let by_header = ready().file(&format!("{CACHE}/{NAME}"), &other);
    says_no(&by_header, 3, "wrong installer version: it is 570.86.16, wanted is 580.95.05");
    let nonsense = ready().file("root/x", "\u{7f}ELF").config(r#"{"driver":{"runfile":"/root/x"}}"#);
    says_no(&nonsense, 3, "/root/x is no installer of NVIDIA's driver");
    let toolkit = r#"{"cuda":{"package":"cuda-toolkit-14-0"}}"#;
    says_no(&ready().config(toolkit), 3, "cuda-toolkit-14-0 needs driver 610.43.02 or newer, the host has 580.95.05");
    says_no(&ready().config(r#"{"cuda":{"package":"cuda-drivers"}}"#), 2, "cuda-drivers brings a driver along");
    says_no(
        &ready().config(r#"{"cuda":{"repo":"/srv/cuda"}}"#),
        2,
        "cuda.repo: /srv/cuda is no http, https or file URL",
    );
    let fedora = running(ready(), 101, "os=fedora\nos_version=42\nos_name=Fedora Linux 42\n");
    says_no(&fedora, 3, "container 101 has Fedora Linux 42, which NVIDIA's CUDA repository is not set up for here");
    let full = running(ready(), 101, &FRESH.replace("20000000", "10485760"));
    says_no(&full, 3, "container 101 has 10.0 GiB free on /, and 12.3 GiB are needed");
    let packaged = running(ready(), 101, &format!("{FRESH}package=libcuda1 550.1-1 installed\n"));
    says_no(&packaged, 3, "container 101 has a driver from packages (libcuda1 550.1-1)");
    says_no(&ready().file("proc/driver/nvidia/version", ""), 3, "the host's NVIDIA driver is not loaded");
    says_no(&ready().file("fails-look", "lxc-attach: no\n"), 1, "container 101 cannot be looked into");
    says_no(&ready().file("etc/pve/lxc/101.conf", &format!("{CT_CONFIG}template: 1\n")), 3, "template");
    says_no(&ready().file("etc/pve/lxc/101.conf", &format!("{CT_CONFIG}lock: backup\n")), 3, "backup");
}

#[test]
fn whom_it_does_not_know() {
    let host = ready().vm(111, "hostpci0: 0000:01:00");
    for call in ["container setup 111", "container check 111", "container sync 111"] {
        let run = host.run(call);
        assert_ne!(run.code, Some(0), "{call}");
        assert!(last_line(&run).contains("111 is a VM, no"), "{call}: {}", run.err);
    }
    assert_eq!(host.run("container setup 999").code, Some(2));
    assert_eq!(host.run("container check 999").code, Some(2));
    assert_eq!(calls(&host), NOTHING);
}

#[test]
fn a_vm_has_the_gpu() {
    let host =
        ready().without("proc/driver/nvidia/version").without("proc/driver/nvidia/gpus/0000:01:00.0/information");
    let host = host.without("sys/devices/pci0000:00/0000:01:00.0/driver").vm(111, "hostpci0: 0000:01:00");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID);
    says_no(&host, 3, "VM 111 has it");
}

#[test]
fn one_that_was_stopped_is_stopped_again_when_it_cannot_be_set_up() {
    let host = stopped(running(ready(), 101, "os=alpine\nos_version=3.22\nos_name=Alpine\n"), 101);
    let run = host.run("container setup 101");
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(last_line(&run).contains("container 101 has Alpine"), "{}", run.err);
    assert_eq!(calls(&host), ["101 start", "101 shutdown"]);
    assert_eq!(fs::read_to_string(host.path("etc/pve/lxc/101.conf")).unwrap(), CT_CONFIG);

    let host = stopped(ready(), 101);
    let dry = host.run("container setup 101 --dry-run").out;
    assert!(dry.contains("  start     container 101, and again with the device nodes\n"), "{dry}");
    let toolkit = "  install   the CUDA toolkit that fits driver 580.95.05, if it is not there\n";
    assert!(dry.contains(toolkit), "{dry}");
    assert_eq!(calls(&host), NOTHING);
    assert_eq!(host.run("container setup 101").code, Some(0));
    assert_eq!(calls(&host)[..4], ["101 start", "curl Packages", "curl cuda-keyring_1.1-1_all.deb", "101 reboot"]);
}

fn sha256(text: &str) -> String {
    let file = std::env::temp_dir().join(format!("gpu-handoff-sum-{}", std::process::id()));
    fs::write(&file, text).unwrap();
    let said = Command::new("/usr/bin/sha256sum").arg(&file).output().unwrap().stdout;
    fs::remove_file(file).unwrap();
    String::from_utf8(said).unwrap().split(' ').next().unwrap().to_string()
}

#[test]
fn an_installer_from_the_network_must_have_the_right_sum() {
    let with = |web: &str, sum: &str, name: &str| {
        let host = ready().without(&format!("{CACHE}/{NAME}")).file(&format!("web/{name}"), web);
        host.config(&format!(r#"{{"driver":{{"runfile_url":"https://mirror/{name}"{sum}}}}}"#))
    };
    let right = format!(r#","sha256":"{}""#, sha256(INSTALLER));
    says_no(&with(INSTALLER, "", NAME), 2, "driver.runfile_url needs driver.sha256");
    says_no(&with(INSTALLER, r#","sha256":"xy""#, NAME), 2, "driver.sha256: xy is no SHA-256 sum");
    says_no(
        &with(INSTALLER, &right, "NVIDIA-Linux-x86_64-570.86.16.run"),
        3,
        "wrong installer version: it is 570.86.16",
    );
    let wrong = with("something else\n", &right, NAME);
    says_no(&wrong, 1, "checksum mismatch");
    assert_eq!(fs::read_dir(wrong.path(CACHE)).unwrap().count(), 0, "the next run begins anew");
    says_no(&ready().without("web"), 1, "/debian13/x86_64/Packages failed: curl: (6) Could not resolve host: mirror");
    says_no(
        &ready().without("web/cuda-keyring_1.1-1_all.deb"),
        1,
        "cuda-keyring_1.1-1_all.deb failed: curl: (6) Could not resolve host: mirror",
    );
    let nothing = with(INSTALLER, &right, NAME).without(&format!("web/{NAME}"));
    says_no(
        &nothing,
        1,
        "failed: curl: (6) Could not resolve host: mirror (log: /var/log/gpu-handoff/container-101.log)",
    );

    let good = with(INSTALLER, &right, NAME);
    let run = good.run("container setup 101");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert_eq!(calls(&good)[..2], ["curl Packages".to_string(), format!("curl {NAME}")]);
    assert!(good.path(&format!("{CACHE}/{NAME}")).exists());
    let begun = with(INSTALLER, &right, NAME).file(&format!("{CACHE}/{NAME}.part"), "the beginn");
    let run = begun.run("container setup 101");
    assert_eq!(run.code, Some(0), "from a server without ranges it comes from the start: {}", run.err);
    let local = ready().config(&format!(r#"{{"driver":{{"sha256":"{}"}}}}"#, "0".repeat(64)));
    says_no(&local, 1, "checksum mismatch");
}

#[test]
fn what_fails_inside_is_told_in_its_own_words() {
    let host =
        ready().file("fails-toolkit", "Reading package lists...\nE: Unable to locate package cuda-toolkit-13-0\n");
    let run = host.run("container setup 101");
    assert_eq!(run.code, Some(1));
    assert_eq!(
        last_line(&run),
        "error: container 101: installing cuda-toolkit-13-0 failed: E: Unable to locate package cuda-toolkit-13-0 (log: \
         /var/log/gpu-handoff/container-101.log)"
    );
    let log = fs::read_to_string(host.path("var/log/gpu-handoff/container-101.log")).unwrap();
    assert!(log.contains("Reading package lists..."), "{log}");
}

#[test]
fn what_is_told_cannot_command_a_terminal() {
    let run = ready().file("fails-smi", "\u{1b}]0;x\u{7}no\n").run("container setup 101");
    assert_eq!(last_line(&run), "error: container 101: nvidia-smi does not work: ?]0;x?no");
}

#[test]
fn asked_to_end_it_ends_what_it_runs() {
    let slow = "#!/bin/sh\ntrap 'rm -f \"$root/busy\"; exit 1' TERM\nroot=${0%/usr/sbin/pct}\n\
        case \"$*\" in *'look.sh REPOSITORY'*) exec cat \"$root/inside-101\" ;; esac\n\
        : >\"$root/busy\"\nwhile :; do sleep 0.05; done\n";
    let host = ready().file("usr/sbin/pct", slow);
    let mut run = host.command("container setup 101").stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !host.path("busy").exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let second = host.run("container setup 101");
    assert_eq!((second.code, last_line(&second)), (Some(5), "error: container 101 is being set up by another run"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = io::read_to_string(run.stderr.take().unwrap()).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(1));
    assert!(output.ends_with("was interrupted; the same call goes on from there\n"), "{output}");
    assert!(!host.path("busy").exists());
}

#[test]
fn one_that_never_stops_talking_is_ended_all_the_same() {
    let host = ready().file(
        "usr/sbin/pct",
        "#!/bin/sh\nroot=${0%/usr/sbin/pct}\n\
         case \"$*\" in *'look.sh REPOSITORY'*) exec cat \"$root/inside-101\" ;; esac\n: >\"$root/busy\"\nexec yes\n",
    );
    let mut run = host.command("container setup 101").stderr(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !host.path("busy").exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    let mut ended = run.try_wait().unwrap();
    while ended.is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
        ended = run.try_wait().unwrap();
    }
    let _ = run.kill();
    assert_eq!(ended.and_then(|status| status.code()), Some(1));
}

/// Containers 101 to 104 are attached; their drivers are of another version, of the host's, none, and not to be seen.
fn four() -> Host {
    let mut host = ready();
    let other = DRIVER.replace("580.95.05", "570.86.16");
    let node = "node=/dev/nvidia0\n";
    for (ctid, inside) in [(101, other.as_str()), (102, DRIVER), (103, ""), (104, DRIVER)] {
        host = running(host, ctid, &format!("{FRESH}{node}{inside}"));
        assert_eq!(host.run(&format!("container attach {ctid}")).code, Some(0));
    }
    stopped(host, 104)
}

#[test]
fn containers_are_brought_to_the_hosts_version() {
    let host = four();
    let dry = host.run("container sync --all --dry-run");
    assert_eq!(
        dry.out,
        "container 101: install   driver 580.95.05 in place of 570.86.16, without kernel modules\n\
         container 102: has driver 580.95.05 already\n\
         container 103: has no driver: gpu-handoff container setup 103 installs it\n\
         container 104: is stopped: gpu-handoff container sync 104 once it runs\n"
    );
    assert_eq!(calls(&host), NOTHING);
    let run = host.run("container sync --all");
    assert_eq!(run.code, Some(1), "{}", run.err);
    let stopped = "container 104 is stopped: gpu-handoff container sync 104 once it runs";
    assert!(run.err.contains(stopped), "{}", run.err);
    assert_eq!(last_line(&run), "error: 1 of 4 containers are not in step with the host: 104");
    assert_eq!(calls(&host), ["101 clean", "101 push", "101 driver", "101 smi"]);
    assert!(run.err.contains("container 101: has driver 580.95.05\n"), "{}", run.err);
    let run = host.run("container sync 104");
    assert_eq!((run.code, last_line(&run)), (Some(1), format!("error: {stopped}").as_str()));
    let host = host.without("var/lib/gpu-handoff/containers/104.json");
    assert_eq!(host.run("container sync --all").code, Some(0));
    assert_eq!(calls(&host), NOTHING);
}

#[test]
fn one_that_fails_keeps_none_of_the_others_back() {
    let other = DRIVER.replace("580.95.05", "570.86.16");
    let host = running(four(), 103, &format!("{FRESH}{other}package=libcuda1 550.1-1 installed\n"));
    let host = running(host, 102, &format!("{FRESH}{other}"));
    let host = running(host, 101, &format!("{FRESH}{other}package=libcuda1 550.1-1 installed\n"));
    // Their rules are as they were attached.
    for ctid in [101, 102, 103] {
        assert_eq!(host.run(&format!("container attach {ctid}")).code, Some(0));
    }
    let run = host.run("container sync --all");
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert_eq!(last_line(&run), "error: 3 of 4 containers are not in step with the host: 101, 103, 104");
    assert_eq!(calls(&host), ["102 clean", "102 push", "102 driver", "102 smi"]);
}

#[test]
fn checked() {
    let host = four();
    let rules = "rules     for nvidia 195, nvidia-uvm 511";
    let run = host.run("container check 102");
    assert_eq!(
        run.out,
        format!(
            "container 102\n  attached  by this host\n  {rules}\n  nodes     /dev/nvidia0\n  driver    580.95.05, as on the \
             host\n  cuda      no cuda-toolkit-13-0 (gpu-handoff container setup 102 installs it)\n"
        )
    );
    assert_eq!(run.code, Some(0), "{}", run.err);
    let run = host.run("container check 101");
    assert_eq!(run.code, Some(1));
    let wanted = "  driver    570.86.16, the host has 580.95.05: gpu-handoff container sync 101\n";
    assert!(run.out.contains(wanted), "{}", run.out);
    assert_eq!(last_line(&run), "error: not as it should be: container 101: driver");
    let run = host.run("container check 104");
    assert_eq!(run.code, Some(0), "{}", run.err);
    assert!(run.out.contains("  state     stopped: what is inside shows only when it runs (pct start 104)\n"));
    let run = host.run("container check --all");
    assert_eq!(run.code, Some(1));
    assert_eq!(last_line(&run), "error: not as it should be: container 101: driver; container 103: driver");
    // Another major since then, and a node that does not open.
    let host = host.file("proc/devices", "Character devices:\n195 nvidia\n508 nvidia-uvm\n");
    let host = running_inside(host, 102, &format!("{FRESH}{DRIVER}"));
    let run = host.run("container check 102");
    assert!(
        run.out.contains("rules     none for nvidia-uvm 508: gpu-handoff container attach 102, then pct reboot 102\n")
    );
    assert!(run.out.contains("nodes     /dev/nvidia0 cannot be opened: pct reboot 102\n"), "{}", run.out);
    assert_eq!(calls(&host), NOTHING);
    let none = ready().run("container check --all");
    assert_eq!(
        (none.code, none.out.as_str()),
        (Some(0), "no container was given a GPU: gpu-handoff container setup CTID\n")
    );
}

#[test]
fn checked_while_a_vm_has_the_gpu() {
    let host = four();
    assert_eq!(host.run("container check 102").code, Some(0));
    let looked = |host: &Host| fs::read_to_string(host.path("looked")).unwrap();
    assert!(looked(&host).ends_with(" cuda-toolkit /dev/nvidia0\n"), "{}", looked(&host));
    let host = host.without("proc/driver/nvidia/version").without("proc/driver/nvidia/gpus/0000:01:00.0/information");
    let host = host.without("sys/devices/pci0000:00/0000:01:00.0/driver").vm(111, "hostpci0: 0000:01:00");
    let host = host.record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID);
    let host = running_inside(host, 102, &format!("{FRESH}{DRIVER}"));
    let run = host.run("container check 102");
    assert!(run.out.contains("  nodes     none on the host now; 0000:01:00: VM 111 has it\n"), "{}", run.out);
    assert_eq!(run.code, Some(0), "{}", run.out);
    assert!(looked(&host).ends_with(" cuda-toolkit\n"), "a dead node is left alone: {}", looked(&host));
}

/// Which toolkit there is for the driver and the distribution is known before anything is changed inside.
#[test]
fn the_toolkit_that_is_there() {
    let none = ready().file("web/Packages", &index(&["cuda-toolkit-12-8", "cuda-nvcc-13-0"]));
    let none = none.config(r#"{"cuda":{"package":"cuda-toolkit-13-0"}}"#);
    says_no(
        &none,
        3,
        "debian13/x86_64/ has no cuda-toolkit-13-0; it has cuda-toolkit-12-8; name one of these in cuda.package (driver \
         580.95.05), or the driver alone: gpu-handoff container setup 101 --driver-only; nothing was touched",
    );
    let html = ready().file("web/Packages", "<html>not found</html>\n");
    says_no(&html, 1, "Packages is no index of a repository; nothing was touched");
    let old =
        ready().file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.16  Tue\n");
    says_no(&old, 3, "begins with CUDA 13.0, which needs driver 580.65.06; install a newer driver on the host, or");
    // Another release than was expected: the newest that fits of those there are.
    let other = ready().file("web/Packages", &index(&["cuda-toolkit-12-6", "cuda-toolkit-12-9", "cuda-toolkit-13-1"]));
    let run = other.run("container setup 101");
    assert_eq!(last_line(&run), "container 101: has driver 580.95.05 and cuda-toolkit-12-9");
    // One that is there and runs stays the only one.
    let there = running(ready(), 101, &format!("{FRESH}{DRIVER}{CUDA}node=/dev/nvidia0\n")).without("web");
    let run = there.run("container setup 101");
    assert_eq!(last_line(&run), "container 101: has driver 580.95.05 and cuda-toolkit-12-8; nothing was to be done");
}

#[test]
fn the_driver_alone() {
    let fedora = "os=fedora\nos_version=42\nos_name=Fedora Linux 42\nfree=/ / 7000000\nfree=/var/tmp / 7000000\n";
    let host = running(ready(), 101, fedora).without("web");
    let dry = host.run("container setup 101 --driver-only --dry-run").out;
    assert!(dry.contains("  take      3.3 GiB on /, where 6.7 GiB are free: "), "{dry}");
    assert!(!dry.contains("cuda") && !dry.contains("CUDA"), "{dry}");
    let run = host.run("container setup 101 --driver-only");
    assert_eq!((run.code, last_line(&run)), (Some(0), "container 101: has driver 580.95.05"));
    assert_eq!(calls(&host), ["101 reboot", "101 clean", "101 push", "101 driver", "101 smi"]);
    for (inside, words) in [
        (format!("{fedora}lacks=modprobe\n"), "has no modprobe, which NVIDIA's installer wants"),
        (format!("{fedora}libc=musl\n"), "whose C library is musl"),
    ] {
        let run = running(ready(), 101, &inside).run("container setup 101 --driver-only");
        assert_eq!(run.code, Some(3));
        assert!(last_line(&run).contains(words), "{}", run.err);
    }
    let run = host.run("container attach 101 --driver-only");
    assert_eq!(
        (run.code, last_line(&run)),
        (Some(2), "error: --driver-only goes with container setup; see gpu-handoff --help")
    );
}

/// Only what a look finds changes.
fn running_inside(host: Host, ctid: u32, inside: &str) -> Host {
    host.file(&format!("inside-{ctid}"), inside)
}
