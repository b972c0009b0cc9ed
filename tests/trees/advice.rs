use super::*;

// What messages say to type works when it is typed

/// What a refusal ends with: all that must be typed, in order.
fn to_type(run: &Run) -> Vec<String> {
    let (_, line) = run.err.trim_end().split_once("type: ").unwrap_or_else(|| panic!("{}", run.err));
    line.split("; ").map(str::to_string).collect()
}

/// As if this had been typed on the host, where it ends processes.
fn type_it(host: &Host, command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let cgroup = match words[..] {
        ["kill", ref pids @ ..] => {
            for pid in pids {
                fs::remove_dir_all(host.path(&format!("proc/{pid}"))).unwrap();
            }
            return;
        }
        ["pct", "shutdown", id] => format!("0::/lxc/{id}/"),
        ["qm", "shutdown", id] => format!("0::/qemu.slice/{id}.scope"),
        ["systemctl", "stop", unit] => format!("0::/system.slice/{unit}\n"),
        ["systemctl", "--user", _, "stop", unit] => format!("/user@1000.service/app.slice/{unit}\n"),
        ["docker", "stop", id] => format!("/docker-{id}"),
        ["udevadm", "settle"] => "/systemd-udevd.service/udev".to_string(),
        _ => panic!("{command}"),
    };
    let processes = fs::read_dir(host.path("proc")).unwrap().map(|entry| entry.unwrap().path());
    let is_in = |process: &std::path::PathBuf| {
        fs::read_to_string(process.join("cgroup")).is_ok_and(|text| text.contains(&cgroup))
    };
    let ended: Vec<_> = processes.filter(is_in).collect();
    assert!(!ended.is_empty(), "{command}");
    ended.iter().for_each(|process| fs::remove_dir_all(process).unwrap());
}

/// Every kind of user at once: one line ends them all, and the start that it ends with is accepted.
#[test]
fn one_line_makes_way_for_a_start() {
    let users = || {
        let id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        let user = "/user.slice/user-1000.slice/user@1000.service/app.slice/ollama.service";
        let host = with_drm_node(host())
            .config(r#"{"time":{"handoff_s":1},"policy":{"nvidia_services":"refuse"}}"#)
            .process(PID, "ollama", "/system.slice/ollama.service", &[NULL])
            .process(PID + 1, "ffmpeg", "/lxc/101/ns/system.slice/jellyfin.service", &[NULL])
            .process(PID + 2, "cuda", "/user.slice/user-0.slice/session-3.scope", &[NULL])
            .process(PID + 3, "cuda", "/", &[NULL])
            .process(PID + 4, "kvm", "/qemu.slice/112.scope", &[NULL]);
        host.process(PID + 5, "vllm", &format!("/system.slice/docker-{id}.scope"), &[NULL])
            .process(PID + 6, "ollama", user, &[NULL])
            .process(PID + 7, "nvidia-persiste", "/system.slice/nvidia-persistenced.service", &[NULL])
            .process(PID + 8, "(udev-worker)", "/system.slice/systemd-udevd.service/udev", &[NULL])
    };
    let ending = [
        "pct shutdown 101",
        "qm shutdown 112",
        "kill 5000003 5000004",
        "docker stop 0123456789ab",
        "systemctl --user --machine=1000@.host stop ollama.service",
        "udevadm settle",
        "systemctl stop ollama.service",
        "systemctl stop nvidia-persistenced.service",
    ];
    for (call, last) in [("plan 111", "qm start 111"), ("to-vfio --dry-run", "gpu-handoff to-vfio 0000:01:00")] {
        let host = users();
        let run = host.run(call);
        assert_eq!(run.code, Some(3), "{}", run.err);
        let commands = to_type(&run);
        assert_eq!(commands[..ending.len()], ending, "{}", run.err);
        assert_eq!(commands[ending.len()..], [last]);
        assert!(!run.err.contains("policy."), "no policy ends a VM: {}", run.err);
        ending.iter().for_each(|command| type_it(&host, command));
        assert_eq!(host.run(call).code, Some(0));
    }
}

/// The policy that is named does it, and whoever must be told in words comes before what is typed.
#[test]
fn a_policy_that_is_named_does_it() {
    let users = || {
        with_drm_node(host())
            .process(PID, "ollama", "/system.slice/ollama.service", &[NULL])
            .process(PID + 1, "ffmpeg", "/lxc/101/ns", &[NULL])
            .process(PID + 2, "cuda", "/job.scope", &[NULL])
    };
    let run = users().config(r#"{"policy":{"containers":{"101":"leave"}}}"#).run("plan 111");
    let keys = "; policy.containers.101 \"stop\", policy.process \"kill\", policy.unit \"stop\" in \
                /etc/gpu-handoff/config.json would end that by itself; type: ";
    assert!(run.err.contains(keys), "{}", run.err);
    let by_policy = r#"{"policy":{"containers":{"101":"stop"},"process":"kill","unit":"stop"}}"#;
    assert_eq!(users().config(by_policy).run("plan 111").code, Some(0));
    let pod = with_drm_node(host()).process(PID, "x", "/kubepods.slice/kubepods-pod1.slice/x.scope", &[NULL]);
    let told =
        "open; delete its pod: kubectl get pods --all-namespaces tells which there are; then type: qm start 111\n";
    let run = pod.run("plan 111");
    assert!(run.err.ends_with(told), "{}", run.err);
    // For a backup no other key than that of backups would do.
    let backup = users().vm(111, "lock: backup\nhostpci0: 01:00").run("plan 111");
    assert!(!backup.err.contains("would end that"), "{}", backup.err);
}
