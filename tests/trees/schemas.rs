use super::tree::schema::mistakes;
use super::*;

// The schemas in packaging/schemas. What each verb prints with --json is held against its own wherever a test asks for it.

const GOOD: &str = include_str!("../fixtures/config/good.jsonl");
const BAD: &str = include_str!("../fixtures/config/bad.jsonl");

/// `config check` and the schema are of one mind.
#[test]
fn a_configuration_is_right_by_both_or_by_neither() {
    let example = include_str!("../../packaging/examples/config.json");
    let cards = |host: Host, slot: &str| host.card(slot, "nvidia", "snd_hda_intel");
    let host = ["0000:01:00", "0000:41:00", "0000:0a:00", "10000:0a:1f"].into_iter().fold(Host::new(), cards);
    for (text, is_good) in [example].into_iter().chain(GOOD.lines()).map(|text| (text, true)).chain(bad()) {
        fs::create_dir_all(host.path("etc/gpu-handoff")).unwrap();
        fs::write(host.path("etc/gpu-handoff/config.json"), text).unwrap();
        let run = host.run("config check");
        assert_eq!(run.code, Some(if is_good { 0 } else { 2 }), "{text}: {}", run.err);
        let found = mistakes("config", &serde_json::from_str(text).unwrap());
        assert_eq!(found.is_empty(), is_good, "{text}: {found:?}");
    }
}

fn bad() -> impl Iterator<Item = (&'static str, bool)> {
    BAD.lines().map(|text| (text, false))
}

/// What the comparison above and those of the other tests rest upon: a wrong document does not pass for right.
#[test]
fn what_is_not_as_the_schema_says_is_found() {
    let status = status(&settled().record("vm-111", "0000:01:00", "away", "nvidia"));
    assert_eq!(mistakes("status", &status), [""; 0]);
    for (pointer, value) in [
        ("/schema", json!(2)),
        ("/gpus/0/slot", json!("01:00")),
        ("/gpus/0/owner/kind", json!("nobody")),
        ("/gpus/0/owner", json!({"kind": "host"})),
        ("/gpus/0/functions/0/iommu_group", json!("1")),
        ("/gpus/0/functions/1", json!(null)),
        ("/gpus/0/last", json!({"schema": 1})),
        ("/setup/reboot_required", json!(0)),
        ("/problems", json!({})),
        ("/problems", json!([1])),
        ("/setup", json!({"reboot_required": false, "error": null, "more": 1})),
    ] {
        let mut wrong = status.clone();
        *wrong.pointer_mut(pointer).unwrap() = value;
        assert!(!mistakes("status", &wrong).is_empty(), "{pointer}");
    }
}
