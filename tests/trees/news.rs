use super::*;

// News, by Proxmox's notifications

const BOOK: &str = "var/lib/gpu-handoff/news.json";
const ALL: &str = r#"{"notify":{"about":["stranded","wedged","owed","driver"]}}"#;

/// A Proxmox that has notifications, and somebody who wants them.
fn wanting(host: Host) -> Host {
    owed::with_systemd(host)
        .file("usr/bin/perl", include_str!("programs/perl"))
        .file("usr/share/perl5/PVE/Notify.pm", include_str!("programs/Notify.pm"))
        .file("usr/share/pve-manager/templates/default/vzdump-subject.txt.hbs", "")
        .file("proc/sys/kernel/hostname", "pve1.example.org\n")
        .file("proc/sys/kernel/osrelease", "6.14.8-2-pve\n")
        .file("run/calls", "")
        .config(ALL)
}

/// What was handed over since the last time: severity, template, data and fields.
fn sent(host: &Host) -> Vec<Value> {
    let text = fs::read_to_string(host.path("run/sent")).unwrap_or_default();
    let _ = fs::remove_file(host.path("run/sent"));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn reasons(host: &Host) -> Vec<String> {
    sent(host).iter().map(|one| one[3]["reason"].as_str().unwrap().to_string()).collect()
}

/// What was put off is to be told by now.
fn later(host: &Host) {
    let mut book: Value = serde_json::from_slice(&fs::read(host.path(BOOK)).unwrap()).unwrap();
    for told in book["told"].as_array_mut().unwrap() {
        told["again"] = json!(1);
    }
    fs::write(host.path(BOOK), book.to_string()).unwrap();
}

fn wedged() -> Host {
    wanting(settled().wedged("0000:01:00", PID).alive(PID))
}

fn stranded() -> Host {
    wanting(host().record("vm-111", "0000:01:00", "returning", "nouveau"))
}

#[track_caller]
fn tells(host: &Host) -> Vec<String> {
    let run = host.run("notify");
    assert_eq!(run.code, Some(0), "{}", run.err);
    reasons(host)
}

#[test]
fn a_wedge_is_told_once() {
    let host = wedged();
    let run = host.run("notify");
    let err = "gpu-handoff: told: 0000:01:00 is wedged\n".to_string();
    assert_eq!(run, Run { code: Some(0), out: String::new(), err });
    let title = "pve1: 0000:01:00 is wedged";
    let message = format!("{title}\n\ngpu-handoff --status says what to type.");
    let fields = json!({"type": "gpu-handoff", "hostname": "pve1", "reason": "wedged", "slot": "0000:01:00"});
    assert_eq!(sent(&host), [json!(["error", "gpu-handoff", {"title": title, "message": message}, fields])]);
    assert_eq!(host.run("notify"), Run { code: Some(0), out: String::new(), err: String::new() });
    assert_eq!(sent(&host), [Value::Null; 0]);
    // For a day.
    later(&host);
    assert_eq!(tells(&host), ["wedged"]);
    // It is over, and nothing is left of it; and it comes back.
    let host = host.without("run/gpu-handoff/wedged-0000:01:00");
    assert_eq!(tells(&host), [""; 0]);
    assert!(!host.path(BOOK).exists());
    assert_eq!(tells(&host.wedged("0000:01:00", PID)), ["wedged"]);
}

#[test]
fn what_may_pass_by_itself_is_told_later() {
    let host = stranded();
    assert_eq!(tells(&host), [""; 0]);
    later(&host);
    assert_eq!(tells(&host), ["stranded"]);
    let start = r#"{"schema":1,"entries":[{"what":{"unit":"x.service"},"slots":["0000:01:00"]}]}"#;
    let host = wanting(super::host()).file("run/gpu-handoff/to-start", start);
    assert_eq!(tells(&host), [""; 0]);
    later(&host);
    host.run("notify");
    let news = sent(&host);
    assert_eq!((&news[0][0], &news[0][3]["reason"]), (&json!("warning"), &json!("owed")));
    assert_eq!(news[0][2]["title"], "pve1: 0000:01:00 is owed: start x.service");
}

/// The last error is what an administrator wants to know, and none of it becomes part of a program.
#[test]
fn the_error_is_told_as_it_is() {
    let error = "it's \"over\"; $(reboot) `x` @{[ die 1 ]} {{title}} \\ für";
    let last = json!({"schema": 1, "direction": "home", "exit": 1, "error": error}).to_string();
    let host = stranded().file("run/gpu-handoff/last-0000:01:00", &last);
    host.run("notify");
    later(&host);
    host.run("notify");
    let news = sent(&host);
    let message = format!("pve1: 0000:01:00 is stranded\n\n{error}\ngpu-handoff --status says what to type.");
    assert_eq!(news[0][2]["message"].as_str(), Some(message.as_str()));
}

#[test]
fn only_what_is_wanted() {
    let host = stranded().config(r#"{"notify":{"about":["wedged","owed"]}}"#);
    assert_eq!(tells(&host), [""; 0]);
    assert!(!host.path(BOOK).exists());
    let message = "notify.about is not set in /etc/gpu-handoff/config.json: nothing is told";
    for config in ["{}", r#"{"notify":{"about":[]}}"#] {
        assert_eq!(wedged().config(config).run("notify"), refusal(2, message), "{config}");
    }
}

#[test]
fn a_kernel_without_the_driver() {
    let modules = |host: Host, release: &str| {
        host.file(&format!("lib/modules/{release}/modules.dep"), "updates/dkms/nvidia.ko:\n")
    };
    let bare = || wanting(Host::new().card("0000:01:00", "", "snd_hda_intel"));
    let said = r#"{"gpus":{"01:00":{"home":"nvidia"}},"notify":{"about":["driver"]}}"#;
    for (host, expected) in [
        (modules(bare(), "6.8.12-4-pve"), &["driver"][..]),
        (bare().config(said), &["driver"]),
        (bare().file("var/lib/gpu-handoff/driver.json", DRIVER), &["driver"]),
        // Nobody ever had it there.
        (bare(), &[]),
        (modules(modules(bare(), "6.8.12-4-pve"), "6.14.8-2-pve"), &[]),
        (modules(bare(), "6.8.12-4-pve").config(&said.replace(r#""nvidia""#, r#""vfio-pci""#)), &[]),
        (modules(wanting(super::host()), "6.8.12-4-pve"), &[]),
    ] {
        host.run("notify");
        let news = sent(&host);
        let reasons: Vec<&str> = news.iter().map(|one| one[3]["reason"].as_str().unwrap()).collect();
        assert_eq!(reasons, expected);
        for one in news {
            assert_eq!(one[2]["title"], "pve1: kernel 6.14.8-2-pve has no nvidia module");
            assert_eq!(one[3].get("slot"), None);
        }
        assert_eq!(tells(&host), [""; 0]);
    }
}

const DRIVER: &str = r#"{"schema":1,"version":"550.163.01","sha256":"00","module":"open","dkms":false,"kernels":[],"copies":[],"began":null}"#;

/// Before Proxmox had files of them, the texts themselves were handed over.
#[test]
fn a_proxmox_without_templates() {
    let host = wedged().without("usr/share/pve-manager");
    host.run("notify");
    assert_eq!(sent(&host)[0].as_array().unwrap()[..3], [json!("error"), json!("{{title}}"), json!("{{message}}")]);
}

#[test]
fn a_host_that_has_no_notifications() {
    let host = wedged().without("usr/share/perl5/PVE/Notify.pm");
    assert_eq!(host.run("notify"), Run { code: Some(0), out: String::new(), err: String::new() });
    host.run("reconcile");
    assert!(!owed::calls(&host).iter().any(|call| call.contains("notify")));
    let message = "this host has no notifications: there is no /usr/share/perl5/PVE/Notify.pm";
    assert_eq!(host.run("notify --test"), refusal(1, message));
}

#[test]
fn what_proxmox_does_not_take_is_tried_again_later() {
    let host = wedged().file("lacks-template", "");
    let message = "not told: 0000:01:00 is wedged: could not load template 'gpu-handoff'";
    assert_eq!(host.run("notify"), refusal(1, message));
    let host = host.without("lacks-template");
    assert_eq!(tells(&host), [""; 0], "not at once");
    later(&host);
    assert_eq!(tells(&host), ["wedged"]);
}

#[test]
fn a_test() {
    let host = wanting(host()).config("{}");
    let taken =
        "gpu-handoff: Proxmox has taken it; who gets it is in the web interface, under Datacenter, Notifications\n";
    let expected = |err: String| Run { code: Some(0), out: String::new(), err };
    assert_eq!(host.run("notify --test"), expected(taken.to_string()));
    let news = sent(&host);
    assert_eq!((&news[0][0], &news[0][2]["title"]), (&json!("info"), &json!("pve1: a test of gpu-handoff")));
    assert_eq!(news[0][3], json!({"type": "gpu-handoff", "hostname": "pve1", "reason": "test"}));
    assert!(!host.path(BOOK).exists());
    let host = host.file("no-mail", "");
    let warning = "gpu-handoff: warning: could not notify via target mail-to-root\n";
    assert_eq!(host.run("notify --test"), expected(format!("{warning}{taken}")));
    let host = host.file("lacks-template", "");
    let message = "Proxmox did not take it: could not load template 'gpu-handoff'";
    assert_eq!(host.run("notify --test"), refusal(1, message));
}

/// Whoever ends has a unit look, and waits for nothing.
#[test]
fn who_has_a_unit_look() {
    let asked = |host: &Host| {
        let calls = owed::calls(host);
        let is_it =
            |call: &&String| call.contains("--unit=gpu-handoff-notify-") && call.ends_with("gpu-handoff notify");
        (0..40).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            owed::calls(host).iter().any(|call| is_it(&call)) || calls.iter().any(|call| is_it(&call))
        })
    };
    let fine = || wanting(settled().record("vm-111", "0000:01:00", "away", "nvidia").running(111, PID + 4));
    let plain = || wanting(host().vm(112, "cores: 2"));
    let told = r#"{"schema":1,"told":[{"what":"wedged 0000:01:00","again":AGAIN}]}"#;
    for (host, call, expected) in [
        (wanting(settled()), "111 pre-start", true),
        (wanting(host()), "reconcile", true),
        (wanting(settled()), "to-vfio", true),
        (wedged(), "reconcile --owed", true),
        (fine(), "reconcile --owed", false),
        (fine().file(BOOK, &told.replace("AGAIN", "7")), "reconcile --owed", true),
        (wedged().file(BOOK, &told.replace("AGAIN", &soon())), "reconcile --owed", false),
        (plain(), "112 pre-start", false),
        (plain(), "112 post-stop", false),
        (plain(), "--status", false),
        (plain(), "notify --test", false),
        (wanting(settled()).config("{}"), "111 pre-start", false),
    ] {
        host.run(call);
        assert_eq!(asked(&host), expected, "{call}: {:?}", owed::calls(&host));
        assert_eq!(sent(&host).is_empty(), call != "notify --test", "{call}");
    }
}

/// In an hour.
fn soon() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    (now.as_secs() + 3600).to_string()
}
