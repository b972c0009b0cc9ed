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

# Debian has these in its own archive under the same names since bookworm.
install_missing() {
    local need=() pair
    for pair in mmdebstrap:mmdebstrap qemu-system-x86_64:qemu-system-x86 \
        mke2fs:e2fsprogs xz:xz-utils setpriv:util-linux flock:util-linux; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || need+=("${pair#*:}")
    done
    [ "${#need[@]}" -gt 0 ] || return 0
    say "installing ${need[*]}"
    local apt=(apt-get -qq -y --no-install-recommends install "${need[@]}")
    export DEBIAN_FRONTEND=noninteractive
    "${apt[@]}" >&2 || { apt-get -qq update >&2 && "${apt[@]}" >&2; } ||
        broken "apt-get could not install ${need[*]}"
}
