#!/bin/bash
# Packs what all runs in a machine like this have over the guest's root: the initramfs unpacks it. The same bytes from
# the same files, for a saved state is found by them. All state comes in the environment, see ../run.
#   base.sh OUTPUT
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

output=$1
stage=$(mktemp -d "${output%/*}/stage.XXXXXX")
trap 'rm -rf "$stage"' EXIT
chmod 755 "$stage"
cd "$stage"

# ---- the lab's own programs ----
mkdir -p opt/lab etc/systemd/system
for f in lab-boot lab-check lab-payload lab-script; do
    install -m 755 "$LAB_SRC/guest/$f" "opt/lab/$f"
done
cp "$LAB_SRC"/guest/*.{service,target} etc/systemd/system/
mkdir -p etc/systemd/system/multi-user.target.wants
ln -s ../lab-boot.service etc/systemd/system/multi-user.target.wants/
ln -s lab.target etc/systemd/system/default.target

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
# The lab loads the driver of the card when a run's own modules are there. vfio-pci has to be first.
case $LAB_HOME in
    vfio) modprobe_conf vfio ;;
    *) LAB_MODESET='' modprobe_conf none ;;
esac >etc/modprobe.d/lab.conf

tar -cf "$output" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$stage" .
