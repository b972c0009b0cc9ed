//! The completion for fish.

use crate::words::{LIST, firsts, halves, options, places, second, seconds, verbs};
use gpu_handoff::cli::{Flag, Value, Verb};

const HEAD: &str = "# fish completion for gpu-handoff. Written by dev/generate from the table of verbs: make generate.

# Prints what may stand for $argv[1], a word of the usage lines.
function __gpu_handoff_list
    sh -c ";

const WORDS: &str = r#" sh $argv[1]
end

# The words so far, without flags and their values.
function __gpu_handoff_words
    set -l is_value no
    for word in (commandline -opc)[2..]
        if test $is_value = yes
            set is_value no
            continue
        end
        switch $word
"#;

const IS: &str = r#"            case '-*'
            case '*'
                echo $word
        end
    end
end

# Whether these are the words so far.
function __gpu_handoff_after
    test "$(__gpu_handoff_words)" = "$argv"
end

# Whether one of the verbs $argv[2..] is there, and $argv[1] words stand behind it: all, one number, or one and a plus.
function __gpu_handoff_in
    set -l words (__gpu_handoff_words)
    for name in $argv[2..]
        set -l length (count (string split ' ' -- $name))
        test "$words[1..$length]" = $name; or continue
        set -l behind (math (count $words) - $length)
        switch $argv[1]
            case all
                return 0
            case '*+'
                test $behind -ge (string trim -c + -- $argv[1])
                return
            case '*'
                test $behind = $argv[1]
                return
        end
    end
    return 1
end

complete -c gpu-handoff -f
"#;

pub fn script() -> String {
    let mut text = format!("{HEAD}{}{WORDS}", quoted(LIST));
    let spelled: Vec<String> = options().iter().map(|(flag, _)| flag.spelled()).collect();
    text += &format!("            case {}\n                set is_value yes\n", spelled.join(" "));
    let dashed = verbs().flat_map(|verb| verb.names).copied().filter(|name| name.starts_with('-'));
    text += &format!("            case {}\n                echo $word\n", dashed.collect::<Vec<_>>().join(" "));
    text += IS;
    let offer = |after: &str, word: &str, about: &str| {
        format!("complete -c gpu-handoff -n '__gpu_handoff_after {after}' -a {word} -d {}\n", quoted(about))
    };
    text += &firsts().iter().map(|(first, about)| offer("", first, about)).collect::<String>();
    for half in halves() {
        let seconds = seconds(half);
        text +=
            &seconds.iter().filter_map(|verb| Some(offer(half, second(verb, half)?, verb.about))).collect::<String>();
    }
    text + &verbs().map(of_verb).collect::<String>()
}

fn of_verb(verb: &Verb) -> String {
    let names: Vec<String> = verb.names.iter().map(|name| format!("\"{name}\"")).collect();
    let line = |place: &str| format!("complete -c gpu-handoff -n '__gpu_handoff_in {place} {}'", names.join(" "));
    let (places, several) = places(verb);
    let mut text = String::new();
    for (n, value) in places.iter().enumerate() {
        let plus = if several && n + 1 == places.len() { "+" } else { "" };
        text += &format!("{} -a {}\n", line(&format!("{n}{plus}")), found(*value));
    }
    for flag in verb.all_flags() {
        text += &format!("{} {}\n", line("all"), of_flag(flag));
    }
    text
}

fn of_flag(flag: &Flag) -> String {
    let dash = if flag.name.len() == 1 { "-s" } else { "-l" };
    let value = match flag.value {
        None => String::new(),
        Some(Value::File) => " -r -F".to_string(),
        Some(Value::Number) => " -x".to_string(),
        Some(value) => format!(" -x -a {}", found(value)),
    };
    format!("{dash} {}{value} -d {}", flag.name, quoted(flag.about))
}

fn found(value: Value) -> String {
    match value {
        Value::OneOf(values) => quoted(&values.join(" ")),
        Value::Verb => quoted(&firsts().iter().map(|(first, _)| *first).collect::<Vec<_>>().join(" ")),
        value => format!("'(__gpu_handoff_list {})'", value.name()),
    }
}

/// Between single quotes, where fish knows a backslash.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}
