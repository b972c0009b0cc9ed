#!/bin/bash
# Packs what differs from run to run into a tar that the initramfs unpacks
# over the guest's root. All state comes in the environment, see ../run.
#   payload.sh OUTPUT MODULES SCRIPT [ARG…]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

output=$1 modules=$2 script=$(realpath -- "$3")
shift 3
stage=$(mktemp -d "${output%/*}/stage.XXXXXX")
trap 'rm -rf "$stage"' EXIT
cp -a "$modules/tree/." "$stage"
cd "$stage"

# ---- the driver's version: over the padded text in the modules' .modinfo ----
# shellcheck disable=SC2016 # perl's variables
[ "$LAB_STACK" = genuine ] || find usr/lib/modules -path '*/updates/lab/nvidia*.ko' -print0 |
    xargs -0 perl -0777 -pi -e 's/LAB-DRIVER-VERSION/pack "a18", $ENV{LAB_DRIVER}/ge'

# ---- the lab's own programs ----
mkdir -p opt/lab etc/systemd/system
for f in lab-boot lab-check lab-script; do
    install -m 755 "$LAB_SRC/guest/$f" "opt/lab/$f"
done
cp "$LAB_SRC"/guest/*.{service,target} etc/systemd/system/
mkdir -p etc/systemd/system/multi-user.target.wants
ln -s ../lab-boot.service etc/systemd/system/multi-user.target.wants/
ln -s lab.target etc/systemd/system/default.target
printf '%s=%s\n' LAB_HOME "$LAB_HOME" LAB_GPUS "$LAB_GPUS" LAB_DRIVER "$LAB_DRIVER" LAB_STACK "$LAB_STACK" \
    LAB_NAMES "$LAB_NAMES" \
    LAB_MODESET "$LAB_MODESET" LAB_FIRMWARE "$LAB_FIRMWARE" LAB_LIMIT "$LAB_LIMIT" >opt/lab/settings

# ---- a quick boot: nothing that waits for a network or the clock ----
mkdir -p etc/systemd/system-generators etc/systemd/system/systemd-udev-trigger.service.d
while read -r unit; do
    case $unit in
        '#'*) ;;
        *-generator) ln -s /dev/null "etc/systemd/system-generators/$unit" ;;
        *) ln -s /dev/null "etc/systemd/system/$unit" ;;
    esac
done <"$LAB_SRC/guest/masked"
cp "$LAB_SRC/guest/coldplug.conf" etc/systemd/system/systemd-udev-trigger.service.d/
mkdir -p etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\n' >etc/systemd/journald.conf.d/lab.conf
echo pve1 >etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 pve1\n' >etc/hosts
echo 0123456789abcdef0123456789abcdef >etc/machine-id
: >etc/fstab
# An initramfs that is made here is never booted: with the configuration, but hardly a module or a program, it takes a
# quarter of the time.
mkdir -p etc/initramfs-tools/conf.d usr/share/initramfs-tools/hooks
printf '%s\n' MODULES=list BUSYBOX=n COMPRESSLEVEL=1 >etc/initramfs-tools/conf.d/quick
: >usr/share/initramfs-tools/hooks/udev

# ---- drivers ----
mkdir -p etc/modprobe.d etc/modules-load.d
echo 'blacklist nvidiafb' >etc/modprobe.d/pve-blacklist.conf
printf 'vfio\nvfio_iommu_type1\nvfio_pci\n' >etc/modules-load.d/vfio.conf
{
    case $LAB_HOME in
        nvidia) echo 'blacklist nouveau' ;;
        nouveau) echo 'blacklist nvidia' ;;
        none) printf 'blacklist %s\n' nvidia nouveau ;;
        vfio)
            printf 'blacklist %s\n' nvidia nouveau
            echo 'options vfio-pci ids=10de:2684,10de:22ba'
            echo 'softdep snd_hda_intel pre: vfio-pci'
            ;;
    esac
    # Emulated SVM inside emulation: the nested QEMU is better off without.
    printf 'blacklist %s\n' kvm_amd kvm_intel
    # Nothing here needs them, and emulation makes loading them slow.
    printf 'blacklist %s\n' aesni_intel ghash_clmulni_intel sha1_ssse3 sha256_ssse3 \
        sha512_ssse3 rapl i2c_i801 lpc_ich iTCO_wdt psmouse pcspkr joydev ahci vga16fb
    [ -z "$LAB_MODESET" ] || echo "options nvidia-drm modeset=$LAB_MODESET"
} >etc/modprobe.d/lab.conf

# ---- what a Proxmox host has ----
mkdir -p etc/pve/nodes/pve1/{qemu-server,lxc} etc/pve/mapping var/lib/vz/snippets usr/sbin
ln -s nodes/pve1 etc/pve/local
ln -s nodes/pve1/qemu-server etc/pve/qemu-server
ln -s nodes/pve1/lxc etc/pve/lxc
vm_conf() { # vm_conf ID NAME [HOSTPCI]
    {
        echo 'boot: '
        echo 'cores: 1'
        echo 'hookscript: local:snippets/gpu-handoff'
        [ -z "${3-}" ] || echo "hostpci0: $3"
        printf '%s\n' 'machine: q35' 'memory: 64' "name: $2" 'ostype: l26' 'vga: none'
    } >"etc/pve/nodes/pve1/qemu-server/$1.conf"
}
vm_conf 100 plain
vm_conf 111 gpu-one 0000:01:00,pcie=1,x-vga=1
[ "$LAB_GPUS" -lt 2 ] || vm_conf 112 gpu-two 0000:02:00,pcie=1,x-vga=1
chmod 640 etc/pve/nodes/pve1/qemu-server/*.conf
install -m 755 "$LAB_SRC"/guest/{qm,pct,lab-ct,lab-reboot} usr/sbin/
cp "$LAB_SRC/guest/proxmox.pl" opt/lab/
mkdir -p usr/share/lxc/hooks usr/share/lxc/config/{common,userns}.conf.d
ln -s /usr/sbin/pct usr/share/lxc/pve-container-stop-wrapper
for phase in pre-start autodev post-stop; do
    ln -s /usr/sbin/pct "usr/share/lxc/hooks/lxc-pve-${phase/-/}-hook"
    echo "lxc.hook.$phase = /usr/share/lxc/hooks/lxc-pve-${phase/-/}-hook"
done >usr/share/lxc/config/common.conf.d/01-pve.conf
# Unprivileged: everything but what is denied.
printf 'lxc.cgroup2.devices.%s\n' 'deny =' 'allow =' 'allow = a' >usr/share/lxc/config/userns.conf.d/01-pve.conf

# ---- what NVIDIA has for download ----
cp -r "$LAB_NVIDIA" opt/lab/nvidia

# ---- the binary, as a user would have it ----
install -m 755 "$LAB_BINARY" usr/sbin/gpu-handoff
ln -s /usr/sbin/gpu-handoff var/lib/vz/snippets/gpu-handoff

[ -z "$LAB_DEB" ] || cp "$LAB_DEB" opt/lab/

# ---- the script, with its folder when that is ours ----
mkdir -p opt/lab/scripts
case $script in
    "$LAB_SRC"/*) cp -rL "${script%/*}/." opt/lab/scripts/ ;;
    *) cp -L "$script" opt/lab/scripts/ ;;
esac
target=/opt/lab/scripts/${script##*/}
chmod 755 ".$target"
command=("$target" "$@")
magic=$(head -c 4 "$script" | tr -d '\0')
case $magic in
    '#!'* | $'\x7fELF') ;;
    *) command=(/bin/bash "${command[@]}") ;;
esac
# A file of its own: systemd's quoting would change arguments.
{
    echo '#!/bin/bash'
    printf 'exec /opt/lab/lab-script'
    printf ' %q' "${command[@]}"
    echo
} >opt/lab/lab-script-start
chmod 755 opt/lab/lab-script-start

tar -cf "$output" --owner=0 --group=0 --numeric-owner -C "$stage" .
