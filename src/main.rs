//! Who calls: Proxmox, or a person.

#![forbid(unsafe_code)]

use gpu_handoff::{App, cli};
use std::process::ExitCode;

fn main() -> ExitCode {
    let app = App::from_environment();
    let done = cli::parse(std::env::args_os().skip(1)).and_then(|call| cli::run(&app, &call));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            app.story.error(&stop.message);
            ExitCode::from(stop.code as u8)
        }
    }
}
