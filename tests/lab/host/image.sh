#!/bin/bash
# Builds the guest's root tree and disk from Debian's archive and prints the
# folder they are in. Called with the build lock held.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

SUITE=trixie

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
# Without docker-clean's hook: it deletes packages that are still needed.
"${alone[@]}" mmdebstrap --quiet --variant=minbase --include="$packages" \
    --aptopt='#clear DPkg::Post-Invoke' --aptopt='#clear APT::Update::Post-Invoke' \
    ${keyring:+--keyring="$keyring"} "$SUITE" "$new/root" "$mirror" >&2 </dev/null

mapfile -t kernels < <(ls "$new/root/lib/modules")
[ "${#kernels[@]}" -eq 1 ] || broken "the image has ${#kernels[@]} kernels, not one"
printf '%s\n' "${kernels[0]}" >"$new/kernel"
cp "$new/root/boot/vmlinuz-${kernels[0]}" "$new/vmlinuz"

# No journal and no checksums: the disk is thrown away after each run.
PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -E lazy_itable_init=1 \
    -L lab -d "$new/root" "$new/disk.img" 6G >/dev/null
mv -T "$new" "$image"
printf '%s\n' "$image"
