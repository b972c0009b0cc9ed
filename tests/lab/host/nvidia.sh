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

# ---- packages ----
repo=$new/repos/debian13/x86_64
mkdir -p "$repo"
package() { # package NAME VERSION ARCHITECTURE FIELD…: from $new/tree, which it empties
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
gpg --batch --quiet --passphrase '' --quick-generate-key 'The lab <lab@example.org>' ed25519 sign never >&2

tree=$new/tree
mkdir -p "$tree"/{usr/share/keyrings,etc/apt/sources.list.d,etc/apt/preferences.d,DEBIAN}
gpg --batch --export >"$tree/usr/share/keyrings/cuda-archive-keyring.gpg"
echo 'deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg]' \
    'https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/ /' \
    >"$tree/etc/apt/sources.list.d/cuda-debian13-x86_64.list"
printf '%s\n' 'Package: nsight-compute' 'Pin: origin *ubuntu.com*' 'Pin-Priority: -1' \
    >"$tree/etc/apt/preferences.d/cuda-repository-pin-600"
(cd "$tree" && find etc -type f -printf '/%p\n') >"$tree/DEBIAN/conffiles"
package cuda-keyring 1.1-1 all

mkdir -p "$tree/usr/local/cuda-12.8/bin"
cat >"$tree/usr/local/cuda-12.8/bin/nvcc" <<'END'
#!/bin/sh
[ "$1" = --version ] || { echo "nvcc fatal   : No input files specified; use option --help for more information" >&2 && exit 1; }
echo 'nvcc: NVIDIA (R) Cuda compiler driver'
echo 'Cuda compilation tools, release 12.8, V12.8.93'
END
chmod 755 "$tree/usr/local/cuda-12.8/bin/nvcc"
package cuda-nvcc-12-8 12.8.93-1 amd64

# While /etc/lab-slow is there its configuration takes 5 s.
mkdir -p "$tree/DEBIAN"
cat >"$tree/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
[ ! -e /etc/lab-slow ] || sleep 5
ln -sfn cuda-12.8 /usr/local/cuda
END
chmod 755 "$tree/DEBIAN/postinst"
package cuda-toolkit-12-8 12.8.1-1 amd64 'Depends: cuda-nvcc-12-8 (>= 12.8.93)'

# One that wants a driver from packages.
package cuda-drivers 570.86.15-1 amd64
package cuda-samples-12-8 12.8.1-1 amd64 'Depends: cuda-drivers'

cd "$repo"
for deb in *.deb; do
    dpkg-deb --field "$deb"
    printf '%s\n' "Filename: ./$deb" "Size: $(stat -c %s "$deb")" "SHA256: $(sha256sum "$deb" | cut -d' ' -f1)" ''
done >Packages
{
    printf '%s\n' 'Origin: NVIDIA' 'Label: NVIDIA CUDA' 'Architecture: amd64' "Date: $(date -Ru)" 'SHA256:'
    echo " $(sha256sum Packages | cut -d' ' -f1) $(stat -c %s Packages) Packages"
} >Release
gpg --batch --quiet --clearsign --output InRelease Release
mv -T "$new" "$out"
printf '%s\n' "$out"
