use super::starts::with_program;
use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, Instant};

// setup driver, setup pending; the installers are scripts that do with files below the root what real ones do

pub const CACHE: &str = "var/cache/gpu-handoff";
const RECORD: &str = "var/lib/gpu-handoff/driver.json";
pub const PENDING: &str = "var/lib/gpu-handoff/setup.pending";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
pub const RELEASE: &str = "6.8.12-4-pve";
const SECURE_BOOT: &str = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// Unloads, builds (unless `fails-build`), uninstalls, installs (unless `fails-install` names its version, or all of it
/// with `forgets-uvm`). Notes how it was called.
pub const INSTALLER: &str = include_str!("programs/installer");

/// `modinfo -k RELEASE -F version nvidia`
const MODINFO: &str = "#!/bin/sh\n\
    cat \"${0%/usr/sbin/modinfo}/lib/modules/$2/kernel/drivers/video/$(echo \"$5\" | tr _ -).ko\" 2>/dev/null\n";

/// Loads what is on the disk, unless `fails-load` has that version.
const MODPROBE: &str = include_str!("programs/modprobe-driver");

const SMI: &str = include_str!("programs/nvidia-smi");

pub fn executable(host: Host, path: &str, text: &str) -> Host {
    let host = host.file(path, text);
    fs::set_permissions(host.path(path), fs::Permissions::from_mode(0o755)).unwrap();
    host
}

pub fn with_installer(host: Host, version: &str) -> Host {
    let name = format!("{CACHE}/NVIDIA-Linux-x86_64-{version}.run");
    host.file(&name, &INSTALLER.replace("VERSION", version))
}

/// A host with all that an installer needs, and the GPU of nobody.
pub fn ready() -> Host {
    let host = Host::new()
        .function("0000:01:00.0", "030000", "10de:2684", "", 5)
        .file("proc/sys/kernel/osrelease", &format!("{RELEASE}\n"))
        .file(&format!("lib/modules/{RELEASE}/build/Makefile"), "")
        .file("lib/modules/6.14.0-1-pve/build/x", "")
        .file("var/log/x", "")
        .file("calls", "");
    let host = executable(executable(host, "usr/sbin/modinfo", MODINFO), "usr/bin/nvidia-smi", SMI);
    let depmod = "#!/bin/sh\necho \"depmod $*\" >>\"${0%/usr/sbin/depmod}/calls\"\n";
    let host = executable(executable(host, "usr/sbin/depmod", depmod), "usr/sbin/modprobe", MODPROBE)
        .file("usr/include/stdio.h", "");
    for program in ["usr/bin/gcc", "usr/bin/make"] {
        symlink("/bin/true", host.path(program)).unwrap();
    }
    fs::create_dir_all(host.path("bin")).unwrap();
    for program in ["bin/sh", "usr/bin/flock", "usr/bin/sha256sum"] {
        symlink(format!("/{program}"), host.path(program)).unwrap();
    }
    host
}

/// As [`ready`], with a driver that was set up.
pub fn with_driver() -> Host {
    let host = with_installer(ready(), "570.86.16");
    works(&host, "setup driver");
    calls(&host);
    host
}

pub fn calls(host: &Host) -> Vec<String> {
    let calls = fs::read_to_string(host.path("calls")).unwrap();
    fs::write(host.path("calls"), "").unwrap();
    calls.lines().map(str::to_string).collect()
}

pub fn there(host: &Host) -> (Vec<String>, String) {
    let mut libraries: Vec<String> = fs::read_dir(host.path(LIBRARIES))
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    libraries.sort();
    let module = fs::read_to_string(host.path(&format!("lib/modules/{RELEASE}/kernel/drivers/video/nvidia.ko")))
        .unwrap_or_default();
    (libraries, module.trim().to_string())
}

pub fn has(version: &str) -> (Vec<String>, String) {
    (vec![format!("libcuda.so.{version}")], version.to_string())
}

pub fn record(host: &Host) -> Value {
    serde_json::from_slice(&fs::read(host.path(RECORD)).unwrap()).unwrap()
}

pub fn error(host: &Host) -> Value {
    let status: Value = serde_json::from_str(&host.run("--status --json").out).unwrap();
    status["setup"]["error"].clone()
}

#[track_caller]
pub fn works(host: &Host, call: &str) -> String {
    let run = host.run(call);
    assert_eq!(run.code, Some(0), "{call}: {}", run.err);
    run.err
}

/// No in these words, and no installer was started.
#[track_caller]
pub fn says_no(host: &Host, call: &str, code: i32, words: &str) {
    let run = host.run(call);
    assert_eq!(run.code, Some(code), "{call}: {}", run.err);
    let last = run.err.lines().last().unwrap_or_default();
    assert!(last.contains(words), "{}", run.err);
    assert_eq!(calls(host), Vec::<String>::new());
}

#[test]
fn the_first_driver_and_then_nothing() {
    let host = with_installer(ready(), "580.95.05");
    let plan = "setup driver\n  install   driver 580.95.05, open modules; load it and ask nvidia-smi\n";
    assert_eq!(host.run("setup driver --dry-run").out, plan);
    assert!(calls(&host).is_empty());
    works(&host, "setup driver");
    assert_eq!(
        calls(&host),
        ["580.95.05 --silent --no-nouveau-check --no-x-check --no-check-for-alternate-installs --no-dkms \
          --skip-module-load --kernel-module-type=open"]
    );
    assert_eq!(there(&host), has("580.95.05"));
    let record = record(&host);
    assert_eq!(record["version"], "580.95.05");
    assert_eq!(record["kernels"], json!([RELEASE]));
    assert_eq!((&record["began"], &record["copies"]), (&Value::Null, &json!([])));
    assert!(works(&host, "setup driver").contains("580.95.05 is there: nothing to do"));
    assert_eq!(calls(&host), Vec::<String>::new());
}

#[test]
fn a_driver_from_elsewhere_is_kept_and_two_of_them_at_most() {
    let mut host = ready();
    for version in ["570.86.16", "580.95.05", "590.44.01"] {
        let path = format!("root/NVIDIA-Linux-x86_64-{version}.run");
        let text = INSTALLER.replace("VERSION", version);
        host = host.file(&path, &text).config(&format!(r#"{{"driver":{{"runfile":"/{path}"}}}}"#));
        works(&host, "setup driver");
        assert_eq!(there(&host), has(version));
    }
    let mut kept: Vec<String> =
        fs::read_dir(host.path(CACHE)).unwrap().map(|one| one.unwrap().file_name().into_string().unwrap()).collect();
    kept.sort();
    assert_eq!(kept, ["NVIDIA-Linux-x86_64-580.95.05.run", "NVIDIA-Linux-x86_64-590.44.01.run"]);
}

#[test]
fn what_is_missing_or_in_the_way_is_named() {
    let host = || with_installer(ready(), "580.95.05");
    says_no(&ready(), "setup driver", 3, "no NVIDIA-Linux-x86_64-VERSION.run is in /var/cache/gpu-handoff");
    let nouveau = host().file("sys/module/nouveau/refcnt", "1\n");
    says_no(&nouveau, "setup driver", 3, "nouveau is loaded");
    let bare = host();
    fs::remove_dir_all(bare.path(&format!("lib/modules/{RELEASE}/build"))).unwrap();
    fs::remove_file(bare.path("usr/bin/make")).unwrap();
    says_no(&bare, "setup driver", 3, "this is missing: apt-get install proxmox-headers-6.8.12-4-pve make ");
    let secure = host().file(SECURE_BOOT, "\u{6}\0\0\0\u{1}");
    says_no(&secure, "setup driver", 3, "Secure Boot is on and there is no key");
    let packaged = executable(host(), "usr/bin/dpkg-query", "#!/bin/sh\necho nvidia-driver installed\n");
    says_no(
        &packaged,
        "setup driver",
        3,
        "from packages: nvidia-driver; to have them purged before the new one is installed: gpu-handoff setup driver --purge",
    );
    let full = executable(host(), "usr/bin/df", "#!/bin/sh\necho x\necho x 1 1 102400 1 /\n");
    says_no(&full, "setup driver", 3, "where 100 MiB are free");
    let old = with_installer(ready(), "390.157");
    says_no(&old, "setup driver", 3, "driver 390.157 has not got the GPU with id 10de:2684");
    let wrong = host().config(r#"{"driver":{"runfile":"/root/none.run"}}"#);
    says_no(&wrong, "setup driver", 3, "none.run");
    let sum = host().config(&format!(r#"{{"driver":{{"sha256":"{}"}}}}"#, "00".repeat(32)));
    says_no(&sum, "setup driver", 1, "checksum mismatch");
    says_no(&host(), "setup driver --kernel 7.0", 2, "there is no kernel 7.0");
    says_no(&host(), "setup driver --kernel ../x", 2, "there is no kernel ../x");
}

#[test]
fn under_secure_boot_the_modules_are_signed_with_the_key_of_dkms() {
    let host = with_installer(ready(), "580.95.05")
        .file(SECURE_BOOT, "\u{6}\0\0\0\u{1}")
        .file("var/lib/dkms/mok.key", "")
        .file("var/lib/dkms/mok.pub", "");
    works(&host, "setup driver");
    let call = calls(&host).remove(0);
    assert!(
        call.ends_with(
            "--module-signing-secret-key=/var/lib/dkms/mok.key --module-signing-public-key=/var/lib/dkms/mok.pub"
        ),
        "{call}"
    );
}

#[test]
fn packages_are_purged_and_installed_when_asked() {
    let query = "#!/bin/sh\n[ -e \"${0%/usr/bin/dpkg-query}/purged\" ] || echo nvidia-driver installed\n";
    let apt = "#!/bin/sh\nroot=${0%/usr/bin/apt-get}\necho \"apt $*\" >>\"$root/calls\"\n: >\"$root/purged\"\n\
               mkdir -p \"$root/lib/modules/6.8.12-4-pve/build\"\n";
    let host = executable(with_installer(ready(), "580.95.05"), "usr/bin/dpkg-query", query);
    let host = executable(host, "usr/bin/apt-get", apt);
    fs::remove_dir_all(host.path(&format!("lib/modules/{RELEASE}/build"))).unwrap();
    works(&host, "setup driver --purge --install-deps");
    let calls = calls(&host);
    assert!(calls[0].starts_with("apt ") && calls[0].ends_with(" install proxmox-headers-6.8.12-4-pve"), "{calls:?}");
    assert!(calls[1].ends_with(" purge nvidia-driver"), "{calls:?}");
    assert!(calls[2].starts_with("580.95.05 "), "{calls:?}");
}

#[test]
fn a_build_that_fails_leaves_the_old_driver() {
    let host = with_installer(with_driver(), "580.95.05").file("fails-build", "   nv.c:1:2: error: x\n");
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("installing 580.95.05 failed: nv.c:1:2: error: x (log: "), "{}", run.err);
    assert!(run.err.trim_end().ends_with("driver 570.86.16 is there as before"), "{}", run.err);
    assert_eq!(there(&host), has("570.86.16"));
    assert_eq!(record(&host)["version"], "570.86.16");
    assert_eq!(record(&host)["began"], Value::Null);
}

#[test]
fn what_fails_after_the_old_one_is_gone_brings_it_back() {
    let host = with_installer(with_driver(), "580.95.05").file("fails-install", "580.95.05\n");
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    assert!(
        run.err.trim_end().contains("driver 580.95.05 could not be installed, 570.86.16 is there again"),
        "{}",
        run.err
    );
    assert_eq!(there(&host), has("570.86.16"));
    assert_eq!(record(&host)["version"], "570.86.16");
    // Neither: said, and the next call begins anew.
    let host = host.file("fails-install", "580.95.05\n570.86.16\n");
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("there is no driver now"), "{}", run.err);
    assert_eq!(record(&host)["began"], "580.95.05");
    fs::remove_file(host.path("fails-install")).unwrap();
    works(&host, "setup pending");
    assert_eq!(there(&host), has("580.95.05"));
}

/// Starts a set-up and waits until its installer is this far.
fn begun(host: &Host, marker: &str) -> std::process::Child {
    let _ = fs::remove_file(host.path("var/log/nvidia-installer.log"));
    let run = host.command("setup driver").stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let so_far = || {
        ["calls", "var/log/nvidia-installer.log"].map(|path| fs::read_to_string(host.path(path)).unwrap_or_default())
    };
    while !so_far().concat().contains(marker) {
        assert!(Instant::now() < end, "{:?}", so_far());
        std::thread::sleep(Duration::from_millis(10));
    }
    run
}

fn signal(run: &std::process::Child, name: &str) {
    assert!(Command::new("kill").arg(name).arg(run.id().to_string()).status().unwrap().success());
}

#[test]
fn whoever_is_asked_to_end_does_while_the_old_driver_is_whole() {
    let host = with_installer(with_driver(), "580.95.05").file("slow-build", "");
    let begin = Instant::now();
    let run = begun(&host, "580.95.05 ");
    signal(&run, "-TERM");
    let ended = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("was interrupted") && said.contains("driver 570.86.16 is there as before"), "{said}");
    assert!(begin.elapsed() < Duration::from_secs(15));
    assert_eq!(there(&host), has("570.86.16"));
}

#[test]
fn an_installer_that_has_begun_to_uninstall_is_not_ended() {
    let host = with_installer(with_driver(), "580.95.05").file("slow-install", "");
    let run = begun(&host, "Uninstalling");
    signal(&run, "-TERM");
    let ended = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(0), "{said}");
    assert!(said.contains("goes on: what it has begun must not be cut off"), "{said}");
    assert_eq!(there(&host), has("580.95.05"));
}

#[test]
fn an_installer_outlives_the_run_that_started_it_and_the_next_run_converges() {
    let host = with_installer(with_driver(), "580.95.05").file("slow-install", "");
    let mut run = begun(&host, "Uninstalling");
    signal(&run, "-KILL");
    run.wait().unwrap();
    assert_eq!(record(&host)["began"], "580.95.05");
    let meanwhile = host.run("setup driver");
    assert_eq!(meanwhile.code, Some(1));
    assert!(meanwhile.err.contains("something that an earlier run started is still at work"), "{}", meanwhile.err);
    fs::remove_file(host.path("slow-install")).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while there(&host) != has("580.95.05") {
        assert!(Instant::now() < end, "{:?}", there(&host));
        std::thread::sleep(Duration::from_millis(50));
    }
    works(&host, "setup pending");
    assert_eq!(there(&host), has("580.95.05"));
    assert_eq!((&record(&host)["version"], &record(&host)["began"]), (&json!("580.95.05"), &Value::Null));
}

#[test]
fn the_package_leaves_it_for_later_while_a_driver_is_loaded() {
    let host = with_installer(ready(), "580.95.05").file("sys/module/nouveau/refcnt", "1\n");
    says_no(&host, "setup driver --defer", 3, "because nouveau is loaded: it is after this");
    assert!(error(&host).as_str().unwrap().contains("at the next boot"));
    says_no(&host, "setup pending", 3, "nouveau is loaded");
    fs::remove_dir_all(host.path("sys/module/nouveau")).unwrap();
    works(&host, "setup pending");
    assert_eq!(there(&host), has("580.95.05"));
    assert_eq!(error(&host), Value::Null);
    assert_eq!(works(&ready(), "setup driver --defer"), "");
    assert_eq!(works(&ready(), "setup pending"), "");
}

#[test]
fn what_was_loaded_is_loaded_again_when_a_build_fails() {
    let host = with_installer(with_driver(), "580.95.05")
        .file("fails-build", "")
        .file("sys/module/nvidia_drm/refcnt", "0\n")
        .file("sys/module/nvidia/holders/nvidia_drm/x", "");
    assert_eq!(host.run("setup driver").code, Some(1));
    for module in ["nvidia", "nvidia_uvm", "nvidia_drm"] {
        assert!(host.path(&format!("sys/module/{module}")).exists(), "{module}");
    }
}

#[test]
fn a_driver_that_the_kernel_does_not_take_gives_way_to_the_old_one() {
    let host = with_installer(with_driver(), "580.95.05").file("fails-load", "580.95.05\n");
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("driver 580.95.05 cannot be loaded, 570.86.16 is there again"), "{}", run.err);
    assert!(run.err.contains("Key was rejected"), "{}", run.err);
    assert_eq!(there(&host), has("570.86.16"));
    assert_eq!((&record(&host)["version"], &record(&host)["began"]), (&json!("570.86.16"), &Value::Null));
}

#[test]
fn one_that_is_not_there_whole_counts_as_failed() {
    let host = with_installer(ready(), "580.95.05").file("forgets-uvm", "");
    let run = host.run("setup driver");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("not installed whole"), "{}", run.err);
    assert_eq!((&record(&host)["version"], &record(&host)["began"]), (&Value::Null, &json!("580.95.05")));
}

#[test]
fn nothing_is_purged_before_the_installer_is_here_and_right() {
    let query = "#!/bin/sh\necho nvidia-driver installed\n";
    let apt = "#!/bin/sh\necho \"apt $*\" >>\"${0%/usr/bin/apt-get}/calls\"\n";
    let host = executable(
        executable(with_installer(ready(), "580.95.05"), "usr/bin/dpkg-query", query),
        "usr/bin/apt-get",
        apt,
    );
    let host = host.config(&format!(r#"{{"driver":{{"sha256":"{}"}}}}"#, "00".repeat(32)));
    says_no(&host, "setup driver --purge", 1, "checksum mismatch");
    let url = r#""runfile_url":"http://x/NVIDIA-Linux-x86_64-590.44.01.run""#;
    let host = host.config(&format!(r#"{{"driver":{{{url},"sha256":"{}"}}}}"#, "00".repeat(32)));
    says_no(&host, "setup driver --purge", 1, "/usr/bin/curl is not installed");
}

#[test]
fn the_package_neither_downloads_nor_loads() {
    let url = r#""runfile_url":"http://x/NVIDIA-Linux-x86_64-590.44.01.run""#;
    let host = ready().config(&format!(r#"{{"driver":{{{url},"sha256":"{}"}}}}"#, "00".repeat(32)));
    says_no(&host, "setup driver --defer", 3, "driver 590.44.01 is not downloaded yet");
    assert!(error(&host).as_str().unwrap().contains("not downloaded yet"));
    let host = with_installer(ready(), "580.95.05");
    works(&host, "setup driver --defer");
    assert_eq!(there(&host), has("580.95.05"));
    assert!(!host.path("sys/module/nvidia").exists());
    calls(&host);
    // An upgrade of the package finds it there and says nothing of the sort.
    works(&host, "setup driver --defer");
    works(&host, "setup driver");
    works(&host, "setup driver --defer");
    assert!(calls(&host).is_empty());
    assert_eq!(error(&host), Value::Null);
}

#[test]
fn what_somebody_else_installed_is_not_taken_back() {
    // A build that failed leaves no record of a driver that was never there.
    let host = with_installer(ready(), "580.95.05").file("fails-build", "");
    assert_eq!(host.run("setup driver").code, Some(1));
    assert!(!host.path(RECORD).exists());
    let host = executable(
        with_driver(),
        "usr/bin/nvidia-uninstall",
        "#!/bin/sh\necho uninstall >>\"${0%/usr/bin/*}/calls\"\n",
    );
    fs::rename(
        host.path(&format!("{LIBRARIES}/libcuda.so.570.86.16")),
        host.path(&format!("{LIBRARIES}/libcuda.so.550.90")),
    )
    .unwrap();
    assert!(works(&host, "setup driver --undo").contains("has installed no driver that is still there"));
    assert_eq!(calls(&host), Vec::<String>::new());
    // Nor is a kernel given what is no longer there.
    let host = with_driver().file("lib/modules/6.14.0-1-pve/build/Makefile", "");
    fs::rename(
        host.path(&format!("{LIBRARIES}/libcuda.so.570.86.16")),
        host.path(&format!("{LIBRARIES}/libcuda.so.550.90")),
    )
    .unwrap();
    works(&host, "setup driver --kernel 6.14.0-1-pve");
    assert_eq!(calls(&host), Vec::<String>::new());
}

#[test]
fn an_uninstaller_that_did_nothing_is_not_believed() {
    let host = executable(with_driver(), "usr/bin/nvidia-uninstall", "#!/bin/sh\nexit 0\n");
    fs::remove_dir_all(host.path("sys/module")).unwrap();
    let run = host.run("setup driver --undo");
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("driver 570.86.16 is still there"), "{}", run.err);
    assert!(host.path(RECORD).exists());
}

#[test]
fn what_was_put_off_and_is_taken_back_is_not_done_later() {
    let host = with_installer(ready(), "580.95.05").file("sys/module/nouveau/refcnt", "1\n");
    assert_eq!(host.run("setup driver --defer").code, Some(3));
    works(&host, "setup driver --undo");
    fs::remove_dir_all(host.path("sys/module/nouveau")).unwrap();
    assert_eq!(works(&host, "setup pending"), "");
    assert!(there(&host).0.is_empty());
}

#[test]
fn a_person_is_told_and_nothing_is_kept_for_later() {
    let host = with_installer(ready(), "580.95.05").file("fails-build", "");
    assert_eq!(host.run("setup driver").code, Some(1));
    assert!(!host.path(PENDING).exists());
    assert_eq!(host.run("setup driver --defer").code, Some(1));
    assert!(error(&host).as_str().unwrap().contains("failed: "));
    fs::remove_file(host.path("fails-build")).unwrap();
    works(&host, "setup driver");
    assert!(!host.path(PENDING).exists());
}

#[test]
fn it_is_taken_back_as_it_came() {
    let uninstaller = "#!/bin/sh\nroot=${0%/usr/bin/nvidia-uninstall}\necho \"uninstall $*\" >>\"$root/calls\"\n\
                       rm -f \"$root\"/usr/lib/x86_64-linux-gnu/libcuda.so.* \"$root/lib/modules/6.8.12-4-pve/kernel/drivers/video/\"* \"$0\"\n";
    let module = "lib/modules/6.14.0-1-pve/kernel/drivers/video/nvidia-uvm.ko";
    let host = with_driver().file("lib/modules/6.14.0-1-pve/build/Makefile", "");
    works(&host, "setup driver --kernel 6.14.0-1-pve");
    calls(&host);
    let host = executable(host, "usr/bin/nvidia-uninstall", uninstaller).file(module, "");
    // Nobody unloads modules on a tree.
    fs::remove_dir_all(host.path("sys/module")).unwrap();
    assert_eq!(host.run("setup driver --undo --dry-run").out, "setup driver\n  remove    driver 570.86.16\n");
    let away = host.record("vm-111", "0000:01:00", "away", "nvidia");
    says_no(&away, "setup driver --undo", 3, "the GPU is with VM 111");
    fs::remove_file(away.path("run/gpu-handoff/vm-111")).unwrap();
    works(&away, "setup driver --undo");
    assert_eq!(calls(&away), ["uninstall --silent", "depmod 6.14.0-1-pve"]);
    assert!(!away.path(RECORD).exists() && !away.path(module).exists());
    assert!(away.path(&format!("{CACHE}/NVIDIA-Linux-x86_64-570.86.16.run")).exists(), "that is the administrator's");
    assert!(works(&away, "setup driver --undo").contains("gpu-handoff has installed no driver"));
}

#[test]
fn files_of_ours_that_nobody_understands_are_named() {
    let host = with_installer(ready(), "580.95.05").file(RECORD, r#"{"schema":2}"#);
    says_no(&host, "setup driver", 1, "driver.json: schema 2: written by a newer gpu-handoff");
    let host = with_driver().file(PENDING, "{");
    says_no(&host, "setup pending", 1, "setup.pending: EOF");
    assert!(error(&host).as_str().unwrap().contains("setup.pending: EOF"));
}

#[test]
fn all_is_vfio_and_then_the_driver() {
    let host = with_program(with_installer(ready(), "580.95.05"), "usr/sbin/update-initramfs", "prepare");
    let plan = host.run("setup all --dry-run").out;
    assert!(plan.starts_with("setup vfio\n  write     /etc/modules-load.d/gpu-handoff.conf\n"), "{plan}");
    assert!(plan.ends_with("; load it and ask nvidia-smi\n"), "{plan}");
    works(&host, "setup all");
    assert_eq!(there(&host), has("580.95.05"));
    assert!(host.path("etc/modules-load.d/gpu-handoff.conf").exists());
}
