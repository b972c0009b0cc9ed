//! The completion for bash.

use crate::words::{LIST, firsts, halves, options, places, second, seconds, verbs};
use gpu_handoff::cli::{Flag, Value, Verb};

const HEAD: &str = "# bash completion for gpu-handoff. Written by dev/generate from the table of verbs: make generate.

# Prints what may stand for $1, a word of the usage lines.
_gpu_handoff_list() {
    local root file vendor class
    ";

const FIND: &str = r#"}

_gpu_handoff() {
    local line=${COMP_LINE:0:COMP_POINT} current='' previous='' words word is_value='' typed='' verb='' place=0 offers=''
    # Not COMP_WORDS: colons part words there, and a slot has some.
    read -ra words <<<"$line"
    if [[ $line != *[[:space:]] ]]; then
        current=${words[-1]}
        unset 'words[-1]'
    fi
    for word in "${words[@]:1}"; do
        previous=''
        if [ -n "$is_value" ]; then
            is_value=''
            continue
        fi
        case $word in
"#;

const OFFER: &str = r#"    esac
    if [[ $current == --*=* ]]; then
        previous=${current%%=*}
        current=${current#*=}
    fi
    case $previous in
"#;

const TAIL: &str = r#"    esac
    mapfile -t COMPREPLY < <(compgen -W "$offers" -- "$current" | sort -u)
    # Readline replaces only what stands behind the last colon.
    local before=${current%"${current##*:}"}
    if [[ $COMP_WORDBREAKS == *:* ]]; then COMPREPLY=("${COMPREPLY[@]#"$before"}"); fi
}
complete -F _gpu_handoff gpu-handoff
"#;

pub fn script() -> String {
    let options = options();
    let spelled: Vec<String> = options.iter().map(|(flag, _)| flag.spelled()).collect();
    let mut text = format!("{HEAD}{LIST}\n{FIND}            {})\n", spelled.join(" | "));
    text += "                is_value=yes\n                previous=$word\n                continue\n                ;;\n        esac\n";
    text += "        if [ -n \"$verb\" ]; then\n            [[ $word == -* ]] || place=$((place + 1))\n            continue\n        fi\n";
    text += "        case $typed$word in\n";
    for verb in verbs() {
        text += &format!("            {}) verb='{}' typed='' ;;\n", patterns(verb), verb.names[0]);
    }
    text += "            -*) ;;\n            *) typed+=\"$word \" ;;\n        esac\n    done\n";
    text += "    case $verb$typed in\n";
    let first: Vec<&str> = firsts().iter().map(|(first, _)| *first).collect();
    text += &format!("        '') offers='{}' ;;\n", first.join(" "));
    for half in halves() {
        let seconds: Vec<&str> = seconds(half).iter().filter_map(|verb| second(verb, half)).collect();
        text += &format!("        '{half} ') offers='{}' ;;\n", seconds.join(" "));
    }
    for verb in verbs() {
        text += &of_verb(verb);
    }
    text += OFFER;
    for (flag, value) in options {
        let offers = match value {
            Value::OneOf(values) => format!("offers='{}'", values.join(" ")),
            // Not by a list of words: a name may have in it what a shell would run.
            Value::File => "mapfile -t COMPREPLY < <(compgen -f -- \"$current\") && return".to_string(),
            Value::Number => "offers=''".to_string(),
            _ => format!("offers=$(_gpu_handoff_list {})", value.name()),
        };
        text += &format!("        {}) {offers} ;;\n", flag.spelled());
    }
    text + TAIL
}

fn patterns(verb: &Verb) -> String {
    let names: Vec<String> = verb.names.iter().map(|name| format!("'{name}'")).collect();
    names.join(" | ")
}

fn of_verb(verb: &Verb) -> String {
    let flags: Vec<String> = verb.all_flags().map(Flag::spelled).collect();
    let mut text = format!("        '{}')\n            offers='{}'\n", verb.names[0], flags.join(" "));
    let (places, several) = places(verb);
    if !places.is_empty() {
        text += "            case $place in\n";
        for (n, value) in places.iter().enumerate() {
            let at = if several && n + 1 == places.len() { "*".to_string() } else { n.to_string() };
            let more = match value {
                Value::Verb => firsts().iter().map(|(first, _)| *first).collect::<Vec<_>>().join(" "),
                value => format!("$(_gpu_handoff_list {})", value.name()),
            };
            text += &format!("                {at}) offers+=\" {more}\" ;;\n");
        }
        text += "            esac\n";
    }
    text + "            ;;\n"
}
