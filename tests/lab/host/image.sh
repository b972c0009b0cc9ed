#!/bin/bash
# Builds the guest's root tree and disk from Debian's archive and prints the
# folder they are in. Called with the build lock held.
#
# The guest has one kernel; the packages of a second one lie on its disk, in
# /opt/lab/kernel. The tree has them unpacked, for modules to be built. It also
# has the emulator that boots the guest, with its firmware: see of_image.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

SUITE=trixie
SECOND=rt-amd64 # a kernel of the same release, whose modules the first refuses, and the other way round

image=$LAB_CACHE/image-$(hash_of image-packages host/image.sh)
if [ -e "$image/disk.img" ]; then
    printf '%s\n' "$image"
    exit
fi

{ read -r mirror && read -r keyring; } < <("$LAB_SRC/../mirror") || broken "without a Debian mirror there is no image"

say "building the image ($SUITE), about two minutes"
new=$image.new
rm -rf --one-file-system "$LAB_CACHE"/image-*.new
mkdir -p "$new"
packages=$(sed 's/#.*//' "$LAB_SRC/image-packages" | xargs | tr ' ' ,)
# What it mounts into the tree is for it alone: should it be killed, nobody who clears up after it finds /proc there.
alone=()
! unshare --mount true 2>/dev/null || alone=(unshare --mount)
# download FOLDER PACKAGE…: a command that lays packages there, with what they depend on and the guest has not
download() {
    # shellcheck disable=SC2016 # mmdebstrap's shell expands it
    printf 'mkdir -p "$1%s" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq -y --no-install-recommends --download-only \
        -o Dir::Cache::archives="$1%s" -o APT::Sandbox::User=root install %s' "$1" "$1" "${*:2}"
}
debs=/opt/lab/kernel
tools=/opt/lab/tools # for this machine, not for the guest
# Without docker-clean's hook: it deletes packages that are still needed.
"${alone[@]}" mmdebstrap --quiet --variant=minbase --include="$packages" \
    --aptopt='#clear DPkg::Post-Invoke' --aptopt='#clear APT::Update::Post-Invoke' \
    --customize-hook="$(download $debs "linux-image-$SECOND" "linux-headers-$SECOND")" \
    --customize-hook="$(download $tools qemu-utils ovmf)" \
    ${keyring:+--keyring="$keyring"} "$SUITE" "$new/root" "$mirror" >&2 </dev/null

mapfile -t kernels < <(ls "$new/root/lib/modules")
[ "${#kernels[@]}" -eq 1 ] || broken "the image has ${#kernels[@]} kernels, not one"
printf '%s\n' "${kernels[0]}" >"$new/kernel"
cp "$new/root/boot/vmlinuz-${kernels[0]}" "$new/vmlinuz"

# ---- the second kernel: only the modules and headers that the lab has use for, and nothing compressed, because
# unpacking is slow when it is emulated ----
keep='arch|block|crypto|lib|mm|virt|fs/(ext4|jbd2|fuse|overlayfs|autofs|efivarfs)|drivers/(acpi|block|char|i2c|iommu)'
keep+='|drivers/(media/cec|pci|platform/x86|vfio|video|virt|virtio)|drivers/gpu/drm/(display|tiny)|sound/(core|hda|pci/hda)'
debs=$new/root$debs
rm -rf "$debs"/{lock,partial} "$debs"/linux-{image,headers}-"$SECOND"_*.deb
for deb in "$debs"/*.deb; do
    dpkg-deb -R "$deb" "$new/deb"
    cd "$new/deb/usr"
    find . -path './lib/modules/*/kernel/*/*.ko*' -regextype egrep \
        ! -regex "\./lib/modules/[^/]*/kernel/(($keep)/.*|(fs|sound|drivers/gpu/drm)/[^/]*)" -delete
    find . -type f -regextype egrep -regex '\./src/[^/]*/include/.*' \
        ! -regex '\./src/[^/]*/include/(acpi|asm-generic|config|generated|linux|uapi/linux|uapi/asm-generic|vdso)/.*' -delete
    # Of these make reads none that is empty.
    find . -path './src/*/include/config/*' -empty -delete
    cd - >/dev/null
    dpkg-deb --root-owner-group -Znone -b "$new/deb" "$deb" >&2
    rm -rf "$new/deb"
done

mv "$new/root$tools" "$new/tools"

# No journal and no checksums: the disk is thrown away after each run.
PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -E lazy_itable_init=1 \
    -L lab -d "$new/root" "$new/disk.img" 6G >/dev/null

# From here on the tree is only what modules are built in, and the emulator runs from.
for deb in "$debs"/*.deb "$new/tools"/*.deb; do dpkg-deb -x "$deb" "$new/root"; done
rm -rf "$debs" "$new/tools"
kernel=$(basename "$(echo "$new"/root/usr/lib/modules/*-"$SECOND")")
printf '%s\n' "$kernel" >"$new/kernel2"
cp "$new/root/boot/vmlinuz-$kernel" "$new/vmlinuz2"
mv -T "$new" "$image"
printf '%s\n' "$image"
