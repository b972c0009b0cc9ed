use super::*;

// Where the time goes

/// What was told of, without the numbers, which must be there.
fn traced(run: &Run) -> Vec<String> {
    let lines = run.err.lines().filter_map(|line| line.strip_prefix("gpu-handoff: trace "));
    let what = |line: &str| {
        let (numbers, what) = line.rsplit_once(" us  ").unwrap();
        let (from, took) = numbers.split_once(" us ").unwrap();
        assert!([from, took].iter().all(|number| number.trim().parse::<u64>().is_ok()), "{line}");
        what.to_string()
    };
    lines.map(what).collect()
}

/// By the environment for one call, by a file for every hook; and not a line else.
#[test]
fn whoever_wants_to_know_is_told() {
    let write = "write vfio-pci to /sys/bus/pci/devices/0000:01:00.0/driver_override";
    let unload = "unload nvidia";
    let is_told = |run: &Run| {
        let lines = traced(run);
        let has = |what: &str| lines.iter().any(|line| line.contains(what));
        assert!(has(write) && has(unload) && has("lock ") && has("/run/gpu-handoff/vm-111"), "{}", run.err);
    };
    let asked = |host: &Host, value: &str| {
        let output = host.command("111 pre-start").env("GPU_HANDOFF_TRACE", value).output().unwrap();
        Run { code: output.status.code(), out: String::new(), err: String::from_utf8(output.stderr).unwrap() }
    };
    is_told(&asked(&host(), "1"));
    is_told(&host().file("run/gpu-handoff/trace", "").run("111 pre-start"));
    for run in [asked(&host(), "0"), host().run("111 pre-start")] {
        assert_eq!(traced(&run), [""; 0], "{}", run.err);
        assert_eq!(run.code, Some(1), "{}", run.err);
    }
}

/// A guest without a GPU has nothing to tell.
#[test]
fn a_guest_without_a_gpu_leaves_no_trace() {
    let host = host().vm(100, "net0: virtio").file("run/gpu-handoff/trace", "");
    ignores(&host, "100 pre-start");
}
