use super::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, ExitStatus};
use std::time::{Duration, Instant};

// The status again and again

const LIMIT: Duration = Duration::from_secs(30);

struct Watcher {
    child: Child,
    out: BufReader<ChildStdout>,
}

fn watch(host: &Host, call: &str) -> Watcher {
    let mut child = host.command(call).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    Watcher { child, out }
}

impl Watcher {
    /// The first line that begins like this, of those to come.
    fn line(&mut self, beginning: &str) -> String {
        let mut line = String::new();
        while self.out.read_line(&mut line).unwrap() > 0 && !line.starts_with(beginning) {
            line.clear();
        }
        line.trim_end().to_string()
    }

    fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "it goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As this program writes: nobody sees half of it.
fn left(host: Host) -> Host {
    let host = host.record("new-111", "0000:01:00", "returning", "nouveau");
    fs::rename(host.path("run/gpu-handoff/new-111"), host.path("run/gpu-handoff/vm-111")).unwrap();
    host
}

#[test]
fn what_changes_is_shown_and_nothing_else() {
    let host = host().record("vm-112", "0000:41:00", "away", "nvidia");
    let before = host.snapshot();
    let mut watcher = watch(&host, "--status --watch");
    assert_eq!(watcher.line("0000:"), "0000:01:00  host");
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(host.snapshot().changes_since(&before), NOTHING);
    let host = left(host);
    // The very next.
    assert_eq!(watcher.line("0000:"), "0000:01:00  stranded (VM 111)");
    let host = host.without("run/gpu-handoff/vm-111");
    assert_eq!(watcher.line("0000:"), "0000:01:00  host");
    // What is in no file of ours.
    let _host = host.card("0000:42:00", "vfio-pci", "vfio-pci");
    assert_eq!(watcher.line("0000:42"), "0000:42:00  none");
    let pid = Pid::from_raw(i32::try_from(watcher.child.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    assert_eq!(watcher.ended().code(), Some(0));
}

#[test]
fn for_programs_a_document_on_each_line() {
    let host = host();
    let mut watcher = watch(&host, "status --watch --json");
    let owner = |line: String| {
        let document: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(tree::schema::mistakes("status", &document), [""; 0]);
        document["gpus"][0]["owner"]["kind"].as_str().unwrap().to_string()
    };
    assert_eq!(owner(watcher.line("{")), "host");
    let _host = left(host);
    assert_eq!(owner(watcher.line("{")), "stranded");
}

#[test]
fn a_reader_that_has_gone_ends_it() {
    let host = host();
    let mut watcher = watch(&host, "--status --watch");
    watcher.line("0000:");
    let nobody = Command::new("true").stdout(Stdio::piped()).spawn().unwrap().stdout.take().unwrap();
    drop(std::mem::replace(&mut watcher.out, BufReader::new(nobody)));
    // Although there is nothing new to write.
    assert_eq!(watcher.ended().code(), Some(0));
}

/// What could not be read is told with it, and told again when it is shown again.
#[test]
fn a_mistake_is_a_line_of_it() {
    let host = host().config(r#"{"tine":1}"#);
    let mut watcher = watch(&host, "--status --watch");
    let warning = "warning: /etc/gpu-handoff/config.json: tine: unknown key; going on without it";
    assert_eq!(watcher.line("warning"), warning);
    let _host = left(host);
    assert_eq!(watcher.line("warning"), warning);
}

#[test]
fn what_does_not_go_together() {
    let message = "--check and --watch exclude each other; see gpu-handoff --help";
    assert_eq!(host().run("--status --check --watch"), refusal(2, message));
}
