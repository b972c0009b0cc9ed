# Paths and small helpers shared by the lab's build steps. Sourced, not run.
# shellcheck shell=bash

LAB_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO=$(cd "$LAB_SRC/../.." && pwd)
LAB_OUT=$REPO/target/lab
# LAB_CACHE lets several work trees share one image.
LAB_CACHE=$(realpath -m "${LAB_CACHE:-$LAB_OUT/cache}")
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

# modprobe_conf HOME: prints what modprobe is told on a host where HOME has the card
modprobe_conf() {
    case $1 in
        nvidia) echo 'blacklist nouveau' ;;
        nouveau) echo 'blacklist nvidia' ;;
        none) printf 'blacklist %s\n' nvidia nouveau ;;
        vfio)
            printf 'blacklist %s\n' nvidia nouveau
            echo 'options vfio-pci ids=10de:2684,10de:22ba'
            echo 'softdep snd_hda_intel pre: vfio-pci'
            ;;
    esac
    # Emulated SVM inside emulation: the nested QEMU is better off without.
    printf 'blacklist %s\n' kvm_amd kvm_intel
    # Nothing here needs them, and emulation makes loading them slow.
    printf 'blacklist %s\n' aesni_intel ghash_clmulni_intel sha1_ssse3 sha256_ssse3 \
        sha512_ssse3 rapl i2c_i801 lpc_ich iTCO_wdt psmouse pcspkr joydev ahci vga16fb
    [ -z "$LAB_MODESET" ] || echo "options nvidia-drm modeset=$LAB_MODESET"
}
