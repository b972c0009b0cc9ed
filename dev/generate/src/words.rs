//! What all three shells need to know: who takes which words, and how a shell finds what may be meant by one.

use gpu_handoff::cli::{Argument, Flag, Heading, Term, VERBS, Value, Verb};
use std::collections::BTreeMap;

/// A script of sh's that prints what may stand for `$1`, a word of the usage lines.
pub const LIST: &str = r#"root=${GPU_HANDOFF_ROOT-}
    case $1 in
        SLOT)
            for file in "$root"/sys/bus/pci/devices/*; do
                { read -r vendor <"$file/vendor" && read -r class <"$file/class"; } || continue
                file=${file##*/}
                case $vendor$class in 0x10de0x03*) echo "${file%.*}" ;; esac
            done 2>/dev/null | sort -u
            ;;
        VMID) set -- "$root"/etc/pve/qemu-server/*.conf ;;
        CTID) set -- "$root"/etc/pve/lxc/*.conf ;;
        ID) set -- "$root"/etc/pve/qemu-server/*.conf "$root"/etc/pve/lxc/*.conf ;;
        KERNEL) set -- "$root"/lib/modules/* ;;
        FINDING) gpu-handoff doctor --explain all 2>/dev/null | sed -n "s/^\([a-z0-9-]*\)  .*/\1/p" ;;
        STORAGE) sed -n "s/^[a-z]*: *//p" "$root"/etc/pve/storage.cfg 2>/dev/null ;;
    esac
    # What has been printed already leaves only its word, which is no number.
    for file in "$@"; do
        file=${file##*/}
        case $file in [0-9]*) echo "${file%.conf}" ;; esac
    done"#;

/// What is typed: all but what runs by itself.
pub fn verbs() -> impl Iterator<Item = &'static Verb> {
    VERBS.iter().filter(|verb| verb.kind != Heading::Internal)
}

/// The first words of verbs, each with what it is about.
pub fn firsts() -> Vec<(&'static str, String)> {
    let mut firsts: Vec<(&str, String)> = Vec::new();
    for verb in verbs() {
        match verb.names[0].split_once(' ') {
            None => firsts.push((verb.names[0], verb.about.to_string())),
            Some((first, _)) if firsts.iter().any(|(known, _)| *known == first) => {}
            Some((first, _)) => {
                let seconds: Vec<&str> = seconds(first).iter().map(|verb| verb.names[0]).collect();
                firsts.push((first, seconds.join(", ")));
            }
        }
    }
    firsts
}

/// First words that are no verb yet.
pub fn halves() -> Vec<&'static str> {
    firsts().iter().map(|(first, _)| *first).filter(|first| !seconds(first).is_empty()).collect()
}

/// The verbs of two words that begin with this one.
pub fn seconds(first: &str) -> Vec<&'static Verb> {
    verbs().filter(|verb| second(verb, first).is_some()).collect()
}

pub fn second(verb: &Verb, first: &str) -> Option<&'static str> {
    verb.names[0].strip_prefix(first)?.strip_prefix(' ')
}

/// What may stand at each place after the verb, and whether the last may stand there again and again.
pub fn places(verb: &Verb) -> (Vec<Value>, bool) {
    let value = |argument: &'static Argument| {
        argument.terms().iter().find_map(|term| if let Term::Value(value) = term { Some(*value) } else { None })
    };
    let is_several = |argument: &&Argument| matches!(argument, Argument::Several(_));
    let several = verb.arguments.iter().filter(is_several).any(|argument| value(argument).is_some());
    (verb.arguments.iter().filter_map(value).collect(), several)
}

/// Every flag that has a value, once.
pub fn options() -> Vec<(&'static Flag, Value)> {
    let all = verbs().flat_map(Verb::all_flags).filter_map(|flag| Some((flag.name, (flag, flag.value?))));
    all.collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Between single quotes, for sh and its like.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
