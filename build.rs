//! A release ends where it panics, so nobody ever unwinds its stack: the tables for that are an eighth of the binary.

fn main() {
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=src/no-unwinding.ld");
    if is_release {
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{folder}/src/no-unwinding.ld");
    }
}
