#!/bin/bash
# Builds what stands in for NVIDIA's downloads (see ../README.md, section "nvidia") and prints the folder it is in:
# installers of the driver, and a signed repository with CUDA. Called with the build lock held.
#   nvidia.sh VERSION…    of the driver
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

cd "$LAB_SRC"
key=$(hash_of nvidia/* modules/* host/nvidia.sh)
mapfile -t versions < <(printf '%s\n' "$@" | sort -u)
out=$LAB_CACHE/nvidia-$key-$(IFS=_ && echo "${versions[*]}")
if [ -e "$out/repos" ]; then
    printf '%s\n' "$out"
    exit
fi
say "building installers and packages"
new=$out.new
rm -rf "$new"
mkdir -p "$new"

# ---- installers: NVIDIA's makeself hands what it does not know itself to nvidia-installer, Debian's refuses it ----
header=$new/header.sh
sed '/^    -\*)$/,/;;$/c\    -*) break ;;' /usr/share/makeself/makeself-header.sh >"$header"
for version in "${versions[@]}"; do
    name=NVIDIA-Linux-x86_64-$version
    mkdir "$new/$name"
    cp nvidia/* "$new/$name/"
    mkdir "$new/$name/kernel"
    # Every file in C costs ten seconds when the guest compiles it: the first module is made of one, and the two that
    # only nvidia-modeset's and nvidia-drm's users would miss are empty ones.
    cat modules/nvidia_main.c modules/nvidia_proc.c >"$new/$name/kernel/nvidia.c"
    cp modules/nvidia_uvm.c "$new/$name/kernel/nvidia-uvm.c"
    cp modules/nvidia_stub.h "$new/$name/kernel/"
    for module in nvidia-modeset nvidia-drm; do
        printf '%s\n' '.section .modinfo, "a"' '.asciz "license=GPL"' '.asciz "version=LAB-DRIVER-VERSION"' \
            '.data' '.quad nvs_version' >"$new/$name/kernel/$module.S"
    done
    echo '.section .modinfo; .asciz "softdep=pre: nvidia-modeset"' >>"$new/$name/kernel/nvidia-drm.S"
    echo 'obj-m := nvidia.o nvidia-uvm.o nvidia-modeset.o nvidia-drm.o' >"$new/$name/kernel/Kbuild"
    sed -i "s/LAB-DRIVER-VERSION/$version/" "$new/$name"/kernel/*.[hS]
    echo "$version" >"$new/$name/VERSION"
    makeself --header "$header" --quiet "$new/$name" "$new/$name.run" \
        "NVIDIA Accelerated Graphics Driver for Linux-x86_64 $version" ./nvidia-installer >&2
    rm -rf "${new:?}/$name"
done
rm "$header"

# ---- packages: a repository for each distribution, with the releases that NVIDIA's has ----
package() { # package NAME VERSION ARCHITECTURE FIELD…: from $new/tree, which it empties, to $repo
    local name=$1 version=$2 architecture=$3
    shift 3
    mkdir -p "$new/tree/DEBIAN"
    printf '%s\n' "Package: $name" "Version: $version" "Architecture: $architecture" \
        'Maintainer: The lab <lab@example.org>' "$@" 'Description: stands in for a package of NVIDIA' \
        >"$new/tree/DEBIAN/control"
    chmod -R u=rwX,go=rX "$new/tree"
    dpkg-deb --root-owner-group -Zgzip --build "$new/tree" "$repo/${name}_${version}_$architecture.deb" >/dev/null
    rm -rf "$new/tree"
}

GNUPGHOME=$(mktemp -d)
export GNUPGHOME
trap 'gpgconf --kill all; rm -rf "$GNUPGHOME"' EXIT
key() { # key NAME OPTION…: one to sign with
    gpg --batch --quiet "${@:3}" --passphrase '' --quick-generate-key "$1 <$1@example.org>" "$2" sign never >&2
}
key lab ed25519
# That of the older distributions has a signature of its own by SHA-1: Debian 13's apt takes it no more.
key old rsa2048 --cert-digest-algo SHA1

keyring() { # keyring DISTRIBUTION KEY
    local tree=$new/tree
    mkdir -p "$tree"/{usr/share/keyrings,etc/apt/sources.list.d,etc/apt/preferences.d,DEBIAN}
    gpg --batch --export "$2@example.org" >"$tree/usr/share/keyrings/cuda-archive-keyring.gpg"
    echo 'deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg]' \
        "https://developer.download.nvidia.com/compute/cuda/repos/$1/x86_64/ /" \
        >"$tree/etc/apt/sources.list.d/cuda-$1-x86_64.list"
    printf '%s\n' 'Package: nsight-compute' 'Pin: origin *ubuntu.com*' 'Pin-Priority: -1' \
        >"$tree/etc/apt/preferences.d/cuda-repository-pin-600"
    (cd "$tree" && find etc -type f -printf '/%p\n') >"$tree/DEBIAN/conffiles"
    package cuda-keyring 1.1-1 all
}

toolkit() { # toolkit MAJOR.MINOR
    local release=$1 name=${1/./-} tree=$new/tree
    mkdir -p "$tree/usr/local/cuda-$release/bin"
    cat >"$tree/usr/local/cuda-$release/bin/nvcc" <<END
#!/bin/sh
[ "\$1" = --version ] || { echo "nvcc fatal   : No input files specified; use option --help for more information" >&2 && exit 1; }
echo 'nvcc: NVIDIA (R) Cuda compiler driver'
echo 'Cuda compilation tools, release $release, V$release.93'
END
    chmod 755 "$tree/usr/local/cuda-$release/bin/nvcc"
    package "cuda-nvcc-$name" "$release.93-1" amd64 'Installed-Size: 300000'
    # While /etc/lab-slow is there its configuration takes 5 s.
    mkdir -p "$tree/DEBIAN"
    cat >"$tree/DEBIAN/postinst" <<END
#!/bin/sh
set -e
[ ! -e /etc/lab-slow ] || sleep 5
ln -sfn cuda-$release /usr/local/cuda
END
    chmod 755 "$tree/DEBIAN/postinst"
    # As large as the genuine one with all that it depends on.
    package "cuda-toolkit-$name" "$release.1-1" amd64 'Installed-Size: 6200000' "Depends: cuda-nvcc-$name (>= $release.93)"
    # One that wants a driver from packages.
    package "cuda-samples-$name" "$release.1-1" amd64 'Depends: cuda-drivers'
}

repository() { # repository DISTRIBUTION KEY RELEASE…
    local deb release
    repo=$new/repos/$1/x86_64
    mkdir -p "$repo"
    keyring "$1" "$2"
    for release in "${@:3}"; do toolkit "$release"; done
    package cuda-drivers 570.86.15-1 amd64
    (
        cd "$repo"
        for deb in *.deb; do
            dpkg-deb --field "$deb"
            printf '%s\n' "Filename: ./$deb" "Size: $(stat -c %s "$deb")" "SHA256: $(sha256sum "$deb" | cut -d' ' -f1)" ''
        done >Packages
        gzip -kn Packages
        {
            printf '%s\n' 'Origin: NVIDIA' 'Label: NVIDIA CUDA' 'Architecture: amd64' "Date: $(date -Ru)" 'SHA256:'
            sha256sum Packages Packages.gz | while read -r sum file; do echo " $sum $(stat -c %s "$file") $file"; done
        } >Release
        gpg --batch --quiet --local-user "$2@example.org" --clearsign --output InRelease Release
        gpg --batch --quiet --local-user "$2@example.org" --armor --detach-sign --output Release.gpg Release
    )
}
repository debian13 lab 13.0 13.1
repository debian12 old 12.8 13.0
repository ubuntu2204 old 12.0 12.8
repository ubuntu2404 old 12.5 13.0

mv -T "$new" "$out"
printf '%s\n' "$out"
