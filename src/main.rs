//! Who calls: Proxmox, or a person.

#![deny(unsafe_code)]
#![no_main]

use gpu_handoff::exit::Exit;
use gpu_handoff::sys::{self, Linux};
use gpu_handoff::{App, cli};
use std::ffi::c_int;

/// What the C library calls. Rust's own start would read the process's map of memory first, for a better word on a stack that
/// overflows: that is a quarter of what a start costs that finds nothing to do.
#[allow(unsafe_code, reason = "there is one main, and it has the type that the C library wants")]
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    sys::begin();
    // Not the C library's return: what is to be written is written by this.
    std::process::exit(c_int::from(run()))
}

/// The exit code; whoever works for this run, and its locks, are gone by then.
fn run() -> u8 {
    let linux = Linux::from_environment();
    let app = App::new(&linux);
    let refused = linux.refuse_mixture().map_err(Exit::usage);
    let call = refused.and_then(|()| cli::parse(std::env::args_os().skip(1)));
    let done = call.and_then(|call| cli::run(&app, &call));
    match done {
        Ok(()) => 0,
        Err(exit) => {
            app.story.error(&exit.to_string());
            exit.code as u8
        }
    }
}
