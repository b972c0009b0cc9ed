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

# The mirror this machine's apt uses, so that proxies and local mirrors work.
find_mirror() {
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' | awk '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }'
}

# The Signed-By of that mirror in apt's sources, in either of their formats.
find_keyring() {
    local files=()
    mapfile -t files < <(find /etc/apt -name '*.sources' -o -name '*.list')
    perl -e '
        my $want = shift; $want =~ s{/+$}{}; local $/ = "";
        while (my $par = <>) {
            next unless $par =~ m{\Q$want\E/?(?:\s|$)};
            if ($par =~ m{^Signed-By:\s*(/\S+)}mi || $par =~ m{signed-by=(/[^\s\]]+)}i) { print $1; last }
        }' "$1" "${files[@]}"
}

mirror=${LAB_MIRROR:-$(find_mirror)}
if [ -z "$mirror" ]; then
    apt-get -qq update >&2
    mirror=$(find_mirror)
fi
[ -n "$mirror" ] || broken "found no Debian mirror in apt's sources; set LAB_MIRROR"
keyring=$(find_keyring "$mirror")

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
