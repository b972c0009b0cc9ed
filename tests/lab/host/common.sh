# Paths and small helpers shared by the lab's build steps. Sourced, not run.
# shellcheck shell=bash

LAB_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO=$(cd "$LAB_SRC/../.." && pwd)
LAB_OUT=$REPO/target/lab
# LAB_CACHE lets several work trees share one image.
LAB_CACHE=${LAB_CACHE:-$LAB_OUT/cache}
say() { printf 'lab: %s\n' "$*" >&2; }

# 125: the lab itself is not as promised; never a script's own result.
broken() { say "$*"; exit 125; }

# Hash of the named files' names and contents, relative to the lab's folder.
hash_of() {
    (cd "$LAB_SRC" && sha256sum "$@") | sha256sum | cut -c1-12
}

# of_image IMAGE NAME: fills `program` with how a program of the image's root is called on this machine, with its own
# libraries: nothing has to be installed here, and nothing that is gets in the way.
of_image() {
    local root=$1/root
    # shellcheck disable=SC2034 # for the caller
    program=("$root/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
        --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/$2")
}

install_missing() {
    "$REPO/tests/install-missing" build lab || broken "the lab cannot be built here"
}
