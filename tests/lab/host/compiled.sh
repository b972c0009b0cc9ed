#!/bin/bash
# Compiles what an installer of the stand-ins compiles, for both kernels of the image, with the guest's compiler but not
# in the guest, where it takes minutes; prints the folder with it. Called with the build lock held.
#   compiled.sh IMAGE NVIDIA VERSION    NVIDIA: the folder with the installers
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

image=$1 nvidia=$2 version=$3
root=$image/root
out=$image/compiled-$(basename "$nvidia")-$version-$(hash_of host/compiled.sh)
if [ -e "$out" ]; then
    printf '%s\n' "$out"
    exit
fi
say "compiling the stand-ins' modules"
rm -rf --one-file-system "$image"/compiled-*
src=/root/lab-installer
for n in '' 2; do
    kernel=$(cat "$image/kernel$n")
    rm -rf "${root:?}$src"
    sh "$nvidia/NVIDIA-Linux-x86_64-$version.run" --noexec --target "$root$src" >"$image/compiled.log" 2>&1
    chroot "$root" make -j"$(nproc)" -C "/lib/modules/$kernel/build" M="$src/kernel" KCFLAGS=-g0 \
        CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$image/compiled.log" 2>&1 || {
        cat "$image/compiled.log" >&2
        broken "the stand-ins' modules do not compile"
    }
    # As nvidia-installer keeps them.
    mkdir -p "$out.new/$version-$kernel"
    cp "$root$src/kernel"/*.ko "$out.new/$version-$kernel/"
done
rm -rf "${root:?}$src"
mv -T "$out.new" "$out"
printf '%s\n' "$out"
