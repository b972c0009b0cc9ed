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

# ---- modules, with the guest's own compiler and headers ----
src=/root/lab-modules
rm -rf "${root:?}$src"
cp -r modules "$root$src"
log=$image/modules.log
if ! chroot "$root" make -j"$(nproc)" -C "/lib/modules/$kernel/build" M="$src" modules >"$log" 2>&1; then
    cat "$log" >&2
    broken "the stub modules do not build"
fi
chroot "$root" /bin/sh -c "strip --strip-debug $src/*.ko"

# updates/ comes before kernel/ for depmod: the stub nouveau hides the real one.
updates=usr/lib/modules/$kernel/updates/lab
rm -rf "${root:?}/$updates"
mkdir -p "$root/$updates"
cp "$root$src"/*.ko "$root/$updates"
chroot "$root" depmod "$kernel"
mkdir -p "$new/tree/$updates"
cp "$root/$updates"/*.ko "$new/tree/$updates"
cp "$root/usr/lib/modules/$kernel"/modules.* "$new/tree/usr/lib/modules/$kernel"

# ---- initramfs: the disk's drivers, fakeid, and our own init ----
ird=$new/initrd.d
mkdir -p "$ird"/{bin,dev,proc,sys,root,modules}
cp "$root/usr/bin/busybox" "$ird/bin/busybox"
install -m 755 guest/initrd-init "$ird/init"
chroot "$root" modprobe -S "$kernel" -a --show-depends ext4 virtio_blk |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
    while read -r ko; do
        name=$(basename "$ko" .xz)
        case $ko in
            *.xz) xz -dc "$root$ko" >"$ird/modules/$name" ;;
            *) cp "$root$ko" "$ird/modules/$name" ;;
        esac
        printf '%s\n' "$name" >>"$ird/modules/order"
    done
cp "$root$src/fakeid.ko" "$ird/modules/"
# The guest's busybox packs it: cpio need not be on this machine.
rm -rf "${root:?}/root/initrd.d"
cp -r "$ird" "$root/root/initrd.d"
chroot "$root" /bin/sh -c 'cd /root/initrd.d && find . | busybox cpio -o -H newc 2>/dev/null' >"$new/initrd"
rm -rf "$ird" "${root:?}/root/initrd.d" "${root:?}$src"

rm -rf "$image"/modules-????????????
mv -T "$new" "$out"
printf '%s\n' "$out"
