#!/bin/bash
# Builds the stub modules and the initramfs for the image in $1 and prints the
# folder they are in. Called with the build lock held.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

image=$1
root=$image/root
kernel=$(cat "$image/kernel")

cd "$LAB_SRC"
key=$(hash_of modules/* guest/initrd-init host/modules.sh)
out=$image/modules-$key
if [ -e "$out/initrd" ]; then
    printf '%s\n' "$out"
    exit
fi
say "building the stub modules"
new=$out.new
rm -rf "$image"/modules-*.new
mkdir -p "$new"

src=/root/lab-modules
log=$image/modules.log
: >"$log"
build() { # build KERNEL FILE…: with the guest's own compiler and headers
    local kernel=$1
    shift
    rm -rf "${root:?}$src"
    mkdir "$root$src"
    cp "$@" "$root$src"
    # Nothing for debuggers: making it and taking it out again is half of the time.
    chroot "$root" make -j"$(nproc)" -C "/lib/modules/$kernel/build" M="$src" KCFLAGS=-g0 CONFIG_DEBUG_INFO_BTF_MODULES= \
        modules >>"$log" 2>&1 || {
        cat "$log" >&2
        broken "the stub modules do not build"
    }
    chroot "$root" /bin/sh -c "strip --strip-debug $src/*.ko"
}
# initramfs KERNEL FILE: the disk's drivers, fakeid (and nvshim), and our own init
initramfs() {
    local ird=$new/initrd.d ko name
    mkdir -p "$ird"/{bin,dev,proc,sys,root,modules}
    cp "$root/usr/bin/busybox" "$ird/bin/busybox"
    install -m 755 guest/initrd-init "$ird/init"
    chroot "$root" modprobe -S "$1" -a --show-depends ext4 virtio_blk |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
        while read -r ko; do
            name=$(basename "$ko" .xz)
            case $ko in
                *.xz) xz -dc "$root$ko" >"$ird/modules/$name" ;;
                *) cp "$root$ko" "$ird/modules/$name" ;;
            esac
            printf '%s\n' "$name" >>"$ird/modules/order"
        done
    for name in fakeid nvshim; do
        [ ! -e "$root$src/$name.ko" ] || cp "$root$src/$name.ko" "$ird/modules/"
    done
    # The guest's busybox packs it: cpio need not be on this machine.
    rm -rf "${root:?}/root/initrd.d"
    cp -r "$ird" "$root/root/initrd.d"
    chroot "$root" /bin/sh -c 'cd /root/initrd.d && find . | busybox cpio -o -H newc 2>/dev/null' >"$2"
    rm -rf "$ird" "${root:?}/root/initrd.d"
}

# ---- the second kernel: all that it gets from us is fakeid ----
second=$(cat "$image/kernel2")
mkdir "$new/second"
echo 'obj-m := fakeid.o' >"$new/second/Kbuild"
build "$second" "$new/second/Kbuild" modules/fakeid.c
rm -r "$new/second"
chroot "$root" depmod "$second"
initramfs "$second" "$new/initrd2"

# ---- the first: updates/ comes before kernel/ for depmod, the stub nouveau hides the real one ----
build "$kernel" modules/*
updates=usr/lib/modules/$kernel/updates/lab
rm -rf "${root:?}/$updates"
mkdir -p "$root/$updates"
cp "$root$src"/*.ko "$root/$updates"
chroot "$root" depmod "$kernel"
mkdir -p "$new/tree/$updates"
cp "$root/$updates"/*.ko "$new/tree/$updates"
cp "$root/usr/lib/modules/$kernel"/modules.* "$new/tree/usr/lib/modules/$kernel"
initramfs "$kernel" "$new/initrd"
rm -rf "${root:?}$src"

rm -rf "$image"/modules-????????????
mv -T "$new" "$out"
printf '%s\n' "$out"
