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

install_missing() {
    "$REPO/tests/install-missing" build lab || broken "the lab cannot be built here"
}
