//! Who calls: Proxmox, or a person.

#![forbid(unsafe_code)]

use gpu_handoff::exit::Exit;
use gpu_handoff::sys::Linux;
use gpu_handoff::{App, cli};
use std::process::ExitCode;

fn main() -> ExitCode {
    let linux = Linux::from_environment();
    let app = App::new(&linux);
    let refused = linux.refuse_mixture().map_err(Exit::usage);
    let call = refused.and_then(|()| cli::parse(std::env::args_os().skip(1)));
    let done = call.and_then(|call| cli::run(&app, &call));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => {
            app.story.error(&exit.message);
            ExitCode::from(exit.code as u8)
        }
    }
}
