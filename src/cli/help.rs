//! What `--help`, `VERB --help` and a call without a verb print, and which verb somebody meant: all from the one table.

use super::flags::Argument;
use super::verbs::{Heading, VERBS, Verb};

const WIDTH: usize = 80;

const ABOUT: &str =
    "gpu-handoff: an NVIDIA GPU goes to a Proxmox VM when that VM starts and comes\nhome when it stops\n";

const HOOK: &str = "
Called by Proxmox, for VMs and containers:
  gpu-handoff ID PHASE
      the hookscript: pre-start, post-start, pre-stop, post-stop
";

const END: &str = "
gpu-handoff VERB --help has all flags of a verb and an example. --quiet leaves
only warnings and errors. A SLOT is written like 0000:01:00 or 01:00; it may be
left out when there is one GPU.
";

const CODES: &str = "
Exit codes:
  0  done, or nothing to do
  1  failed: towards a VM the GPU is back where it was, towards home it is
     stranded
  2  bad usage, unknown guest, mistake in the configuration, no SLOT with
     several GPUs
  3  refused, nothing was touched
  4  the time box was overrun, or the slot is wedged
  5  another handoff, or what Proxmox does with the container, did not end in
     time
";

/// Of everything, or of the verbs that `topic` names or begins.
pub(super) fn help(topic: &str) -> String {
    if topic.is_empty() {
        let groups =
            [("Every day", Heading::Everyday), ("Containers", Heading::Container), ("The host", Heading::Host)];
        let groups: String = groups.iter().map(|(title, kind)| format!("\n{title}:\n{}", list(*kind))).collect();
        return [ABOUT, &groups, HOOK, END, CODES].concat();
    }
    VERBS.iter().filter(|verb| verb.is_about(topic)).map(one).collect::<Vec<_>>().join("\n")
}

/// For somebody who has not said what to do.
pub(super) fn everyday() -> String {
    [
        ABOUT,
        "\n",
        &list(Heading::Everyday),
        "\ngpu-handoff --help lists the others, gpu-handoff VERB --help explains one.\n",
    ]
    .concat()
}

impl Verb {
    fn is_about(&self, topic: &str) -> bool {
        self.names
            .iter()
            .any(|name| name.strip_prefix(topic).is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')))
    }

    /// The arguments without those that are a long flag.
    fn positional(&self) -> String {
        let usages = self.arguments.iter().map(Argument::usage);
        let short: Vec<String> = usages.filter(|usage| !usage.starts_with("[--")).collect();
        short.join(" ")
    }
}

fn list(kind: Heading) -> String {
    let mut text = String::new();
    for verb in VERBS.iter().filter(|verb| verb.kind == kind) {
        wrap(&mut text, "  gpu-handoff ", &format!("{} {}", verb.name(), verb.positional()));
        wrap(&mut text, "      ", verb.about);
    }
    text
}

fn one(verb: &Verb) -> String {
    let mut text = "Usage:\n".to_string();
    wrap(&mut text, "  gpu-handoff ", &format!("{} {}", verb.name(), verb.usage()));
    if let [_, others @ ..] = verb.names
        && !others.is_empty()
    {
        wrap(&mut text, "  also: ", &others.join(", "));
    }
    text.push('\n');
    let mut paragraph = [verb.about, ". ", verb.more].concat();
    paragraph[..1].make_ascii_uppercase();
    wrap(&mut text, "", &paragraph);
    text.push_str("\nOptions:\n");
    for flag in verb.all_flags() {
        wrap(&mut text, "  ", &flag.usage());
        wrap(&mut text, "      ", flag.about);
    }
    text + "\nExample:\n  gpu-handoff " + verb.example + "\n"
}

/// In lines of at most 80 columns, those after the first one indented.
fn wrap(text: &mut String, first: &str, words: &str) {
    text.push_str(first);
    let mut column = first.len();
    let indent = if first.is_empty() { "" } else { "      " };
    for (n, word) in words.split_whitespace().enumerate() {
        if n > 0 && column + 1 + word.len() > WIDTH {
            text.push('\n');
            text.push_str(indent);
            column = indent.len();
        } else if n > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += word.len();
    }
    text.push('\n');
}

/// The name that somebody may have meant by a word: of a verb, of its first or last word, or of a flag.
pub(super) fn meant(typed: &str, flags: impl Iterator<Item = String>) -> Option<String> {
    let mut near: Option<(usize, String)> = None;
    let mut consider = |piece: &str, name: &str| {
        let distance = distance(typed, piece);
        // Of a short word little is left when two letters are wrong.
        if distance * 3 <= typed.len() && distance <= 2 && near.as_ref().is_none_or(|(least, _)| distance < *least) {
            near = Some((distance, name.to_string()));
        }
    };
    if typed.starts_with("--") {
        flags.for_each(|flag| consider(&flag, &flag));
    }
    for name in VERBS.iter().filter(|verb| verb.kind != Heading::Internal).flat_map(|verb| verb.names) {
        consider(name, name);
        if let Some((first, last)) = name.split_once(' ') {
            consider(first, first);
            consider(last, name);
        }
    }
    near.map(|(_, name)| name)
}

/// How many letters must be changed, put in, left out or swapped with the next; dashes in front and case count for nothing.
fn distance(a: &str, b: &str) -> usize {
    let letters = |word: &str| word.trim_start_matches('-').to_ascii_lowercase().into_bytes();
    let (a, b) = (letters(a), letters(b));
    // How far apart the first letters of each are: a row for as many of `a`, a column for as many of `b`.
    let mut rows: Vec<Vec<usize>> = Vec::new();
    for i in 0..=a.len() {
        let mut row: Vec<usize> = Vec::new();
        for j in 0..=b.len() {
            let back = |of: usize, rows_up: usize, columns: usize| {
                let row = if rows_up == 0 { Some(&row) } else { rows.get(i.checked_sub(rows_up)?) };
                Some(of + row?.get(j.checked_sub(columns)?)?)
            };
            let letter = |of: &[u8], n: usize, back: usize| of.get(n.checked_sub(back)?).copied();
            let is_same = letter(&a, i, 1) == letter(&b, j, 1);
            let is_swapped = letter(&a, i, 1) == letter(&b, j, 2) && letter(&a, i, 2) == letter(&b, j, 1);
            let ways = [
                back(usize::from(!is_same), 1, 1),
                back(1, 1, 0),
                back(1, 0, 1),
                if is_swapped { back(1, 2, 2) } else { None },
            ];
            row.push(ways.into_iter().flatten().min().unwrap_or(0));
        }
        rows.push(row);
    }
    rows.last().and_then(|row| row.last()).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::call::Call;
    use super::super::flags::{Flag, Term, Value};
    use super::super::parse::parsed;
    use super::super::verbs::flags;
    use super::*;

    #[test]
    fn every_verb_is_explained() {
        let all = help("");
        for verb in VERBS {
            for name in verb.names {
                let topic = verb.names[0];
                let text = help(name);
                assert!(text.starts_with(&format!("Usage:\n  gpu-handoff {topic}")), "{name}: {text}");
                assert!(text.contains(name) && text.contains("\nExample:\n  gpu-handoff "), "{name}: {text}");
            }
            let is_listed = all.contains(&format!("\n  gpu-handoff {}", verb.names[0]));
            assert_eq!(is_listed, verb.kind != Heading::Internal, "{}", verb.names[0]);
            // What the example shows is understood, and is this verb.
            let shown = parsed(verb.example).unwrap_or_else(|problem| panic!("{}: {problem}", verb.example));
            assert!(!matches!(shown.call, Call::Everyday | Call::Hook { .. }), "{}", verb.example);
            assert!(verb.names.iter().any(|name| verb.example.starts_with(name)), "{}", verb.example);
        }
    }

    #[test]
    fn a_verb_explained() {
        assert_eq!(
            help("to-nvidia"),
            "Usage:\n  gpu-handoff to-home [SLOT|--gpu SLOT] [--dry-run]\n  also: to-nvidia, to_nvidia, handoff nvidia\n\n\
             Bring a GPU home by hand, whatever its home is.\n\n\
             Options:\n  --gpu SLOT\n      which GPU\n  --dry-run\n      print what would be done, and change nothing\n\
             \x20 --quiet\n      only warnings and errors\n\nExample:\n  gpu-handoff to-home 01:00\n"
        );
        assert_eq!(help("container").matches("Usage:").count(), 5);
        assert_eq!(help("contain"), "");
    }

    /// With a word for each value, the usage line is understood with each flag; of a choice with each of its values.
    #[test]
    fn every_flag_is_understood_with_its_verb() {
        let word = |value: Value| match value {
            Value::OneOf(values) => values.to_vec(),
            Value::Slot => vec!["01:00"],
            Value::Verb => vec!["plan"],
            Value::Vmid | Value::Ctid | Value::Id | Value::Number => vec!["5"],
            Value::Kernel | Value::Finding | Value::File | Value::Storage | Value::Word(_) => vec!["x"],
        };
        for verb in VERBS.iter().filter(|verb| !verb.names.contains(&"help")) {
            let needed = verb.arguments.iter().filter_map(|argument| match argument {
                Argument::Needs([Term::Value(value), ..]) => Some(word(*value)[0]),
                _ => None,
            });
            let call = needed.fold(verb.names[0].to_string(), |call, word| format!("{call} {word}"));
            parsed(&call).unwrap_or_else(|problem| panic!("{call}: {problem}"));
            for flag in verb.all_flags() {
                let flagged = match (flag.name, flag.value) {
                    // Alone they say too little, or too much.
                    ("all", _) => vec![format!("{} --all", verb.names[0])],
                    ("dry-run", _) if verb.names[0] == "doctor" => vec!["doctor --fix --dry-run".to_string()],
                    ("to", _) => vec!["doctor --report --to x".to_string()],
                    (_, None) => vec![format!("{call} {}", flag.spelled())],
                    (_, Some(value)) => {
                        word(value).iter().map(|word| format!("{call} {} {word}", flag.spelled())).collect()
                    }
                };
                for call in flagged {
                    parsed(&call).unwrap_or_else(|problem| panic!("{call}: {problem}"));
                }
            }
        }
    }

    #[test]
    fn nothing_is_wider_than_a_terminal() {
        let verbs = VERBS.iter().map(|verb| help(verb.names[0]));
        for line in
            verbs.chain([help(""), everyday()]).flat_map(|text| text.lines().map(String::from).collect::<Vec<_>>())
        {
            assert!(line.len() <= WIDTH && line == line.trim_end(), "{line}");
        }
    }

    #[test]
    fn the_everyday_verbs() {
        let text = everyday();
        let calls: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("  gpu-handoff ")).collect();
        assert_eq!(
            calls,
            [
                "--status",
                "doctor [ID]",
                "history [VMID] [-n NUMBER]",
                "plan VMID",
                "switch VMID",
                "enable ID",
                "disable ID",
                "to-vfio [SLOT|--gpu SLOT]",
                "to-home [SLOT|--gpu SLOT]"
            ]
        );
    }

    #[test]
    fn what_was_meant() {
        for (typed, name) in [
            ("stauts", "--status"),
            ("to-nvida", "to-nvidia"),
            ("to-hom", "to-home"),
            ("Status", "--status"),
            ("version", "--version"),
            ("-v", "-V"),
            ("hepl", "--help"),
            ("containr", "container"),
            ("attach", "container attach"),
            ("--dryrun", "--dry-run"),
        ] {
            assert_eq!(meant(typed, flags().map(Flag::spelled)).as_deref(), Some(name), "{typed}");
        }
        // Internal ones are suggested to nobody, and a guess that is none is worse than none.
        for typed in ["udef", "frobnicate", "list", "-x", "", "x", "on"] {
            assert_eq!(meant(typed, std::iter::empty()), None, "{typed}");
        }
    }

    #[test]
    fn letters_apart() {
        for (a, b, apart) in
            [("", "", 0), ("ab", "", 2), ("ab", "ba", 1), ("abc", "ac", 1), ("--A", "a", 0), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(a, b), apart, "{a} {b}");
        }
    }
}
