use super::setup_driver::*;
use super::*;

// setup driver --kernel, and what setup pending does at boot

#[test]
fn a_new_kernel_gets_the_same_driver() {
    let new = "6.14.0-1-pve";
    let host = with_driver().file(&format!("lib/modules/{new}/build/Makefile"), "");
    let call = format!("setup driver --kernel {new}");
    works(&host, &call);
    assert_eq!(
        calls(&host),
        [format!(
            "570.86.16 --silent --no-nouveau-check --no-x-check --no-check-for-alternate-installs --no-dkms -K -k {new} \
             --skip-module-load --kernel-module-type=open"
        )]
    );
    assert_eq!(record(&host)["kernels"], json!([RELEASE, new]));
    works(&host, &call);
    assert_eq!(calls(&host), Vec::<String>::new());
    // Without a driver of ours it is nobody's business.
    works(&setup_driver::ready(), &call);
}

#[test]
fn kernels_with_headers_get_a_new_driver_too() {
    let new = "6.14.0-1-pve";
    let host = with_installer(with_driver(), "580.95.05").file(&format!("lib/modules/{new}/build/Makefile"), "");
    works(&host, "setup driver");
    let kernels: Vec<bool> = calls(&host).iter().map(|call| call.contains(&format!("-K -k {new}"))).collect();
    assert_eq!(kernels, [false, true]);
    assert_eq!(record(&host)["kernels"], json!([RELEASE, new]));
    assert!(!host.path(PENDING).exists());
    // One that fails is no reason to say that the driver is not there.
    let host = with_installer(host, "590.44.01").file("fails-kernel", &format!("{new}\n"));
    assert_eq!(host.run("setup driver").code, Some(1));
    assert_eq!(there(&host), has("590.44.01"));
    let pending: Value = serde_json::from_slice(&fs::read(host.path(PENDING)).unwrap()).unwrap();
    assert_eq!(pending["driver"], Value::Null);
    assert!(
        pending["kernels"][new]["why"].as_str().unwrap().contains("building 590.44.01 for kernel 6.14.0-1-pve failed")
    );
}

#[test]
fn a_kernel_that_cannot_have_it_yet_is_kept_in_mind() {
    let new = "6.14.0-1-pve";
    let host = with_driver();
    let headers = host.path(&format!("lib/modules/{new}/build/Makefile"));
    let call = format!("setup driver --kernel {new}");
    says_no(&host, &call, 3, "apt-get install proxmox-headers-6.14.0-1-pve");
    assert!(error(&host).as_str().unwrap().contains("proxmox-headers-6.14.0-1-pve"));
    assert!(host.run("--status").out.contains("set-up is not done: kernel 6.14.0-1-pve"));
    fs::write(&headers, "").unwrap();
    fs::write(host.path("fails-build"), "").unwrap();
    assert_eq!(host.run(&call).code, Some(1));
    assert!(error(&host).as_str().unwrap().contains("failed: "));
    // It is the one that runs now: at boot.
    fs::remove_file(host.path("fails-build")).unwrap();
    let host = host.file("proc/sys/kernel/osrelease", &format!("{new}\n"));
    calls(&host);
    works(&host, "setup pending");
    assert_eq!(calls(&host).len(), 1);
    assert_eq!(error(&host), Value::Null);
    assert!(!host.path(PENDING).exists());
    fs::remove_file(host.path(&format!("lib/modules/{new}/kernel/drivers/video/nvidia.ko"))).unwrap();
    // A changed installer is not run.
    let kept = host.path(&format!("{CACHE}/NVIDIA-Linux-x86_64-570.86.16.run"));
    fs::write(&kept, format!("{}\n", fs::read_to_string(&kept).unwrap())).unwrap();
    says_no(&host, &call, 3, "is not the one that was installed");
}

/// While the guests wait.
#[test]
fn at_boot_only_what_they_need_is_done_and_not_for_ever() {
    let new = "6.14.0-1-pve";
    let systemctl = "#!/bin/sh\necho starting\n";
    let host = executable(with_driver(), "usr/bin/systemctl", systemctl).file("fails-build", "");
    let host = host.file(&format!("lib/modules/{new}/build/Makefile"), "");
    assert_eq!(host.run(&format!("setup driver --kernel {new}")).code, Some(1));
    calls(&host);
    works(&host, "setup pending");
    assert_eq!(calls(&host), Vec::<String>::new(), "another kernel can wait");
    let host = host.file("proc/sys/kernel/osrelease", &format!("{new}\n"));
    fs::remove_dir_all(host.path("sys/module")).unwrap();
    for builds in [1, 1, 0] {
        host.run("setup pending");
        assert_eq!(calls(&host).len(), builds);
    }
    assert!(error(&host).as_str().unwrap().contains("failed: "));
    // By hand it is tried again.
    fs::remove_file(host.path("fails-build")).unwrap();
    works(&host, "setup driver");
    assert_eq!(error(&host), Value::Null);
}

#[test]
fn a_build_that_was_cut_off_is_begun_anew() {
    let new = "6.14.0-1-pve";
    let host = with_driver()
        .file(&format!("lib/modules/{new}/build/Makefile"), "")
        .file(&format!("lib/modules/{new}/kernel/drivers/video/nvidia.ko"), "");
    works(&host, &format!("setup driver --kernel {new}"));
    assert_eq!(calls(&host)[0], format!("depmod {new}"));
    assert_eq!(record(&host)["kernels"], json!([RELEASE, new]));
}
