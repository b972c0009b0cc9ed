#!/bin/bash
# The stand-in installer really builds, a second kernel can be installed, and the guest reboots into it.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${0%/*}/lib.sh"
# shellcheck source=/dev/null
. /opt/lab/settings

installer=/opt/lab/nvidia/NVIDIA-Linux-x86_64-$LAB_DRIVER.run
installer() { TMPDIR=/var/tmp sh "$installer" --silent "$@" >/run/installer.out 2>&1; }
second=$(echo /opt/lab/kernel/linux-image-*.deb)
second=${second#*/linux-image-}
second=${second%%_*}
took() { echo "took $((SECONDS - begin)) s: $*"; }
to_vfio_from_stack() { unload_stack && to_vfio $slot1; }
begin=0

if [ ! -e /root/first ]; then
    uname -r >/root/first
    first=$(uname -r)

    # ---- installed: what the payload brought goes first ----
    hold /dev/nvidia0
    ok 'in use: refused' not installer
    ok 'in use: says so' grep -q "ERROR: An NVIDIA kernel module 'nvidia' appears to be" /run/installer.out
    ok 'in use: nothing was unloaded' test -d /sys/module/nvidia_uvm
    release
    rm "/lib/modules/$first"/updates/lab/nvidia*.ko
    depmod
    ok 'there is no nvidia' not modinfo nvidia
    ok 'nothing to install modules on: refused' not installer -K -k "$first"
    begin=$SECONDS
    ok 'built, installed and loaded' installer
    took 'the installer'
    cat /run/installer.out
    is 'the version' "$LAB_DRIVER" "$(cat /sys/module/nvidia/version)"
    is 'where modprobe finds it' "/lib/modules/$first/kernel/drivers/video/nvidia.ko" "$(modprobe -S "$first" --show-depends nvidia | cut -d' ' -f2)"
    ok 'the others load' modprobe -a nvidia_drm nvidia_uvm
    is 'nvidia-smi' "$LAB_DRIVER" "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader)"

    # ---- a kernel upgrade ----
    ok 'the second kernel is not there' test ! -e "/lib/modules/$second"
    ok 'no reboot into it' not lab-reboot "$second"
    begin=$SECONDS
    ok 'the second kernel is installed' dpkg -i /opt/lab/kernel/*.deb
    took 'dpkg'
    ok 'it has an initramfs' test -s "/boot/initrd.img-$second"
    begin=$SECONDS
    ok 'modules for it' installer -K -k "$second" --skip-module-load
    took 'modules only'
    ok 'the old ones are loaded still' test -d /sys/module/nvidia_uvm
    [ "$failures" = 0 ] || finish
    lab-reboot "$second"
fi

is 'the kernel' "$second" "$(uname -r)"
ok 'nothing is at home but what udev loads' test ! -d /sys/module/nvidia_uvm
is 'the display function' nvidia "$(driver_of $slot1.0)"
ok 'the others load' modprobe -a nvidia_drm nvidia_uvm
is 'the version' "$LAB_DRIVER" "$(cat /sys/module/nvidia_uvm/version)"
ok 'away from here' to_vfio_from_stack
is 'the display function' vfio-pci "$(driver_of $slot1.0)"
ok 'uninstalled' nvidia-uninstall
ok 'from both kernels' test -z "$(find /lib/modules -path '*/kernel/drivers/video/nvidia*')"
finish
