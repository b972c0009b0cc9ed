//! The manual page's synopsis and options, in mdoc(7): what stands between the marks.

use gpu_handoff::cli::{Argument, Flag, QUIET, Term, VERBS, Value, Verb};

const HEAD: &str = ": written by dev/generate from the table of verbs, make generate.\n";

/// The page as it is to be; none when it lacks a mark.
pub fn page(page: &str) -> Option<String> {
    let page = between(page, "Synopsis", &VERBS.iter().map(call).collect::<String>())?;
    between(&page, "Options", &options())
}

fn between(page: &str, name: &str, text: &str) -> Option<String> {
    let (begin, end) = (format!(".\\\" {name} begin"), format!(".\\\" {name} end.\n"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some([before, &begin, HEAD, text, &end, after].concat())
}

fn call(verb: &Verb) -> String {
    let arguments = verb.arguments.iter().map(|one| format!(".{}\n", argument(one)));
    format!(".Nm\n.Cm {}\n{}", verb.names[0], arguments.collect::<String>())
}

fn argument(argument: &Argument) -> String {
    let terms: Vec<String> = argument.terms().iter().map(term).collect();
    let terms = terms.join(" | ");
    match argument {
        Argument::Needs(_) => terms,
        Argument::May(_) => format!("Op {terms}"),
        Argument::Several(_) => format!("Op {terms} ..."),
    }
}

fn term(term: &Term) -> String {
    match term {
        Term::Value(one) => value(*one),
        Term::Flag(one) => flag(one),
    }
}

fn flag(flag: &Flag) -> String {
    let name = flag.spelled();
    // The macro brings the first dash.
    let name = name.strip_prefix('-').unwrap_or(&name);
    match flag.value {
        Some(one) => format!("Fl {name} {}", value(one)),
        None => format!("Fl {name}"),
    }
}

fn value(value: Value) -> String {
    match value {
        Value::OneOf(values) => format!("Cm {}", values.join(" | ")),
        value => format!("Ar {}", value.name()),
    }
}

/// Each flag once, with the verbs that it goes with.
fn options() -> String {
    let mut flags: Vec<&Flag> = Vec::new();
    for own in VERBS.iter().flat_map(Verb::all_flags) {
        if own.name != QUIET.name && flags.iter().all(|known| known.name != own.name) {
            flags.push(own);
        }
    }
    let mut text = ".Bl -tag -width Ds\n".to_string();
    for one in flags {
        let takes = |verb: &&Verb| verb.all_flags().any(|own| own.name == one.name);
        let verbs: Vec<&str> = VERBS.iter().filter(takes).map(|verb| verb.names[0]).collect();
        let verbs = verbs.join(" ,\n.Cm ");
        text += &format!(".It {}\n{}.\nWith\n.Cm {verbs} .\n", flag(one), sentence(one.about));
    }
    text + &format!(".It {}\n{}.\nWith every verb.\n.El\n", flag(&QUIET), sentence(QUIET.about))
}

fn sentence(text: &str) -> String {
    let first = text.chars().take(1).flat_map(char::to_uppercase);
    first.chain(text.chars().skip(1)).collect()
}
