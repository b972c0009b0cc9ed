#!/bin/bash
# Builds NVIDIA's own kernel modules, of version LAB_DRIVER, for the image in $1, from Debian's package of their source;
# puts them in the place of the stubs among the modules in $2, and prints the folder with that tree. Called with the
# build lock held. Nothing of NVIDIA's is kept but under LAB_CACHE.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

image=$1 modules=$2
root=$image/root
kernel=$(cat "$image/kernel")

case $LAB_DRIVER in
    550.*) suite=trixie ;;
    535.*) suite=bookworm ;;
    555.*) suite=experimental ;;
    *) broken "--driver genuine: $LAB_DRIVER is not in Debian's archive; trixie has 550.163.01 (the default)," \
        "bookworm 535.261.03, experimental 555.58.02" ;;
esac
# The modules' source, and the configuration with which Debian loads them.
packages=(nvidia-open-kernel-dkms nvidia-open-kernel-support)

# fetch FOLDER: the packages, by apt's own means and with its checks, but without this machine's lists, sources, hooks
# and installed packages.
fetch() {
    local mirror keyring d=$1
    { read -r mirror && read -r keyring; } < <("$LAB_SRC/../mirror") || return 1
    mkdir -p "$d"/{state/lists,cache/archives}/partial
    echo "deb ${keyring:+[signed-by=$keyring] }$mirror $suite contrib" >"$d/sources.list"
    : >"$d/status"
    apt-config dump | grep -v '^Dir\|Post-Invoke\|Pre-Invoke\|Pre-Install-Pkgs' >"$d/apt.conf"
    cat >>"$d/apt.conf" <<EOF
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::SourceList "$d/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "$d/state";
Dir::State::Status "$d/status";
Dir::Cache "$d/cache";
Acquire::Languages "none";
Acquire::Retries "2";
APT::Architecture "amd64";
APT::Sandbox::User "root";
EOF
    (
        cd "$d"
        export APT_CONFIG=$d/apt.conf
        apt-get -qq -o APT::Update::Error-Mode=any update && apt-get -qq download "${packages[@]}"
    ) >&2
}

# build SOURCES OUTPUT: with the guest's own compiler and headers, but not in the guest
build() {
    local src=/root/lab-genuine name log=$LAB_CACHE/genuine.log
    rm -rf "${root:?}$src"
    mv "$1" "$root$src"
    # Trixie's kernel took over a newer form of this function, which a driver of that age does not know.
    if grep -A1 'pci_resize_resource(' "$root/lib/modules/$kernel/source/include/linux/pci.h" | grep -q exclude_bars; then
        sed -i 's/(pci_dev, NV_GPU_BAR1, requested_size)/(pci_dev, NV_GPU_BAR1, requested_size, 0)/' "$root$src/nvidia/nv-pci.c"
    fi
    # Without what is for debuggers, all that follows has a tenth to read and write.
    chroot "$root" /bin/sh -c "strip --strip-debug $src/*/*.o_binary"
    chroot "$root" make -j"$(nproc)" -C "$src" modules KERNEL_UNAME="$kernel" NV_EXCLUDE_KERNEL_MODULES=nvidia-peermem \
        KCFLAGS=-g0 CONFIG_DEBUG_INFO_BTF_MODULES= >"$log" 2>&1 || {
        grep -m 20 -A 5 'error:\|Error ' "$log" >&2 || tail -n 20 "$log" >&2
        rm -rf "${root:?}$src"
        broken "--driver genuine: $LAB_DRIVER does not build for $kernel; all of it is in $log"
    }
    for name in nvidia nvidia-modeset nvidia-drm nvidia-uvm; do
        chroot "$root" strip --strip-debug -o "$src/lab.ko" "$src/$name.ko"
        cp "$root$src/lab.ko" "$2/$name.ko"
    done
    rm -rf "${root:?}$src"
}

# ---- the driver: by what it is built of, with and how, not by the image, which is made anew more often ----
key=$({
    declare -f fetch build
    cat "$root/lib/modules/$kernel/build/Module.symvers"
    readlink "$root/usr/bin/gcc"
} | sha256sum | cut -c1-12)
driver=${LAB_GENUINE:-$LAB_CACHE}/genuine-$LAB_DRIVER-$key
if [ ! -e "$driver/nvidia.ko" ]; then
    say "building NVIDIA's own driver $LAB_DRIVER, about five minutes of processor time"
    new=$driver.new
    rm -rf "${driver%/*}"/genuine-*.new
    mkdir -p "$new"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    fetch "$work" || broken "--driver genuine: cannot fetch ${packages[*]} ($suite, contrib) from Debian's archive (see" \
        "above); without it there is only --driver stub, the default"
    for deb in "$work"/*.deb; do
        version=$(dpkg-deb -f "$deb" Version)
        [[ $version == "$LAB_DRIVER"-* ]] || broken "--driver genuine: Debian's $suite has $version, not $LAB_DRIVER"
        dpkg-deb -x "$deb" "$work"
    done
    build "$work"/usr/src/* "$new"
    cp "$work"/etc/nvidia/current-open/nvidia-{modprobe,blacklists-nouveau,options}.conf "$new/"
    mv -T "$new" "$driver"
fi

# ---- the tree: as the stubs', but with these instead ----
out=$modules/${driver##*/}-$LAB_NAMES
if [ ! -e "$out" ]; then
    new=$out.new
    # depmod wants to see all modules of the kernel; links are enough.
    base=$root/root/lab-depmod
    rm -rf "$new" "$base"
    mkdir -p "$base/usr/lib/modules" "$new/tree/usr/lib/modules/$kernel"
    ln -s usr/lib "$base/lib"
    cp -al "$root/usr/lib/modules/$kernel" "$base/usr/lib/modules/"
    lib=$base/usr/lib/modules/$kernel
    rm -rf "$lib/updates"
    rm -f "$lib"/modules.{alias,dep,softdep,symbols,weakdep,devname,builtin.alias}{,.bin}
    cp -a "$modules/tree/usr/lib/modules/$kernel/updates" "$lib/"
    case $LAB_NAMES in
        nvidia) cp "$driver"/*.ko "$lib/updates/lab/" ;;
        debian)
            # As dkms.conf and nvidia-alternative have it.
            rm "$lib"/updates/lab/nvidia*.ko
            mkdir -p "$lib/updates/dkms" "$new/tree/etc/modprobe.d"
            for ko in "$driver"/*.ko; do
                name=${ko##*/nvidia}
                cp "$ko" "$lib/updates/dkms/nvidia-current-open$name"
            done
            cp "$driver/nvidia-modprobe.conf" "$new/tree/etc/modprobe.d/nvidia.conf"
            cp "$driver"/nvidia-{blacklists-nouveau,options}.conf "$new/tree/etc/modprobe.d/"
            ;;
    esac
    chroot "$root" depmod -b "${base#"$root"}" "$kernel"
    cp -r "$lib/updates" "$lib"/modules.* "$new/tree/usr/lib/modules/$kernel/"
    rm -rf "$base"
    mv -T "$new" "$out"
fi
printf '%s\n' "$out"
