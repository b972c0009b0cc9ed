//! What the C library says when it finds itself wrong, in one line here: its own wants translations, and those a fiftieth of
//! the program. A linker takes from an archive only what nobody has defined before.

/// It ends the program either way (Linux Standard Base, baselib-assert-fail-1).
#[unsafe(no_mangle)]
extern "C" fn __assert_fail() -> ! {
    std::process::abort()
}
