//! Writes the manual page's synopsis and options and the completions from the table of verbs; with `--check` says which
//! file is not what the table says.

// The files of this repository, not of a host.
#![allow(clippy::disallowed_methods)]

mod bash;
mod fish;
mod man;
mod words;
mod zsh;

use std::process::ExitCode;
use std::{env, fs, io};

const MAN: &str = "packaging/man/gpu-handoff.8";

fn main() -> io::Result<ExitCode> {
    env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))?;
    let files = [
        (MAN, man::page(&fs::read_to_string(MAN)?).ok_or_else(|| io::Error::other("the page lacks a mark"))?),
        ("packaging/completion/gpu-handoff", bash::script()),
        ("packaging/completion/_gpu-handoff", zsh::script()),
        ("packaging/completion/gpu-handoff.fish", fish::script()),
    ];
    let is_check = env::args().nth(1).is_some_and(|word| word == "--check");
    let mut code = ExitCode::SUCCESS;
    for (path, wanted) in files {
        if !is_check {
            fs::write(path, wanted)?;
        } else if fs::read_to_string(path).unwrap_or_default() != wanted {
            eprintln!("{path} is not what src/cli/verbs.rs says; write it anew: make generate");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
