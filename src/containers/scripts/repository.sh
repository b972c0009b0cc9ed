#!/bin/sh
# Lets apt know NVIDIA's repository, or a mirror of it. See ../inside.rs.
#   repository.sh KEYRING-PACKAGE URL
set -e
keyring=/var/tmp/gpu-handoff/$1 url=$2
ours=/etc/apt/sources.list.d/gpu-handoff-cuda.sources
export DEBIAN_FRONTEND=noninteractive

dpkg --force-confdef --force-confold -i "$keyring"

# The package's own lists name NVIDIA's site. Where that is not what is wanted they are set aside in dpkg's way, so
# that an update of the package does not bring them back.
lists=$(dpkg -L cuda-keyring | grep -E '^/etc/apt/sources\.list\.d/[^/]*\.(list|sources)$' || true)
for list in $lists; do
    if grep -qsF -- "$url" "$list" "$list.disabled"; then
        dpkg-divert --quiet --local --rename --divert "$list.disabled" --remove "$list"
        rm -f "$ours"
        found=yes
    else
        dpkg-divert --quiet --local --rename --divert "$list.disabled" --add "$list"
    fi
done
if [ -z "$found" ]; then
    key=$(dpkg -L cuda-keyring | grep -E '^/usr/share/keyrings/[^/]*\.gpg$' | head -n 1)
    cat >"$ours.new" <<END
# Written by gpu-handoff: cuda.repo in /etc/gpu-handoff/config.json on the host.
Types: deb
URIs: $url
Suites: /
Signed-By: ${key:?the keyring package has no key}
END
    mv "$ours.new" "$ours"
fi
rm -rf /var/tmp/gpu-handoff
