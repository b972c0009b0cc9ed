//! The completion for zsh.

use crate::words::{LIST, firsts, halves, places, quoted, second, seconds, verbs};
use gpu_handoff::cli::{Flag, Value, Verb};

const HEAD: &str = "#compdef gpu-handoff
# zsh completion for gpu-handoff. Written by dev/generate from the table of verbs: make generate.

# Prints what may stand for $1, a word of the usage lines.
_gpu_handoff_list() {
    emulate -L sh
    local root file vendor class
    ";

const BEGIN: &str = r#"
}

_gpu_handoff_values() {
    local expl
    local -a values=(${(f)"$(_gpu_handoff_list $1)"})
    _wanted values expl $1 compadd -a values
}

_gpu_handoff() {
    local verb=${words[2]-}
    local -a verbs
    if ((CURRENT == 2)); then
"#;

pub fn script() -> String {
    let verb = |name: &str, about: &str| format!("            {}\n", quoted(&format!("{name}:{about}")));
    let list = |verbs: String| {
        format!("        verbs=(\n{verbs}        )\n        _describe -t verbs verb verbs\n        return\n    fi\n")
    };
    let mut text = format!("{HEAD}{LIST}{BEGIN}");
    text += &list(firsts().iter().map(|(first, about)| verb(first, about)).collect());
    for half in halves() {
        text += &format!("    if ((CURRENT == 3)) && [[ $verb == {half} ]]; then\n");
        let seconds = seconds(half);
        text += &list(seconds.iter().filter_map(|one| Some(verb(second(one, half)?, one.about))).collect());
    }
    text += &format!("    if [[ $verb == ({}) ]]; then\n", halves().join("|"));
    text += "        verb+=\" $words[3]\"\n        shift words\n        ((CURRENT--))\n    fi\n";
    text += "    shift words\n    ((CURRENT--))\n    case $verb in\n";
    for verb in verbs() {
        text += &of_verb(verb);
    }
    text + "    esac\n}\n\n_gpu_handoff \"$@\"\n"
}

fn of_verb(verb: &Verb) -> String {
    let names: Vec<String> = verb.names.iter().map(|name| quoted(name)).collect();
    let mut text = format!("        {})\n            _arguments", names.join(" | "));
    let (places, several) = places(verb);
    for (n, value) in places.iter().enumerate() {
        let at = if several && n + 1 == places.len() { "*" } else { ":" };
        text += &format!(" \\\n                {}", quoted(&format!("{at}:{}", action(*value))));
    }
    for flag in verb.all_flags() {
        text += &format!(" \\\n                {}", quoted(&of_flag(flag)));
    }
    text + "\n            ;;\n"
}

fn of_flag(flag: &Flag) -> String {
    let (name, about) = (flag.spelled(), flag.about);
    match flag.value {
        None => format!("{name}[{about}]"),
        Some(value) if name.starts_with("--") => format!("{name}=[{about}]:{}", action(value)),
        Some(value) => format!("{name}+[{about}]:{}", action(value)),
    }
}

/// What a value is called, and how to find those that there are.
fn action(value: Value) -> String {
    match value {
        Value::OneOf(values) => format!("{}:({})", values.join(" or "), values.join(" ")),
        Value::File => "FILE:_files".to_string(),
        Value::Number => "NUMBER: ".to_string(),
        Value::Verb => {
            format!("VERB:({})", firsts().iter().map(|(first, _)| *first).collect::<Vec<_>>().join(" "))
        }
        value => format!("{0}:_gpu_handoff_values {0}", value.name()),
    }
}
