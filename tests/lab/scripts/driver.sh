#!/bin/bash
# A fresh host: installing the package installs the driver, a kernel upgrade has it built for the new kernel, what fails
# there is made good at boot, and afterwards there is no trace.
# lab: --timeout 1800
# lab-deb
# lab-compiled
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

export DEBIAN_FRONTEND=noninteractive
installer=NVIDIA-Linux-x86_64-$LAB_DRIVER.run
cache=/var/cache/gpu-handoff
second=$(basename /opt/lab/kernel/linux-image-*.deb)
second=${second#linux-image-} second=${second%%_*}

# What the package, the driver or the host's preparation may change, but for the second kernel, which is not there at
# first; of the initramfs what is in it, not its bytes; of the kernel's own modules, which take long to read, their size and
# time.
traces() {
    find "/lib/modules/$first/kernel" -name '*.ko*' -printf '%p %s %T@\n' | sort
    find /etc/modules-load.d /etc/modprobe.d /etc/udev /etc/systemd/system /etc/kernel /lib/udev/rules.d /usr/sbin \
        /usr/bin/nvidia* /usr/lib/x86_64-linux-gnu/lib{cuda,nvidia}* "/lib/modules/$first" /var/cache/gpu-handoff \
        /usr/share/gpu-handoff /usr/share/bash-completion /var/lib/vz /var/lib/gpu-handoff /etc/gpu-handoff \
        -type f,l ! -name 'modules.*.bin' ! -path "/lib/modules/*/kernel/*.ko*" -exec sha256sum {} + 2>/dev/null | sort -k2
    lsinitramfs "/boot/initrd.img-$first" | grep -E 'modprobe.d|modules-load.d' | sort
}
version_for() { modinfo -k "$1" -F version nvidia 2>/dev/null; }
setup_error() {
    gpu-handoff --status --json | tr -d '\n' | sed -n 's/.*"setup": *{[^}]*"error": *\(null\|"[^"]*"\).*/\1/p'
}
# next KERNEL STAGE: after the reboot
next() {
    [ "$failures" = 0 ] || finish
    echo "$2" >/root/stage
    lab-reboot "$1"
}

fresh() {
    # Compiled natively for this; with "compile" it is compiled here, which takes minutes: in make test-package.
    [ "$how" != compile ] || rm -rf /var/tmp/lab-compiled
    first=$(uname -r)
    echo "$first" >/root/first
    unload_stack
    rm -f /dev/nvidia* "/lib/modules/$first"/updates/lab/nvidia*.ko /usr/sbin/gpu-handoff $hook
    depmod
    for id in 100 111; do sed -i '/^hookscript:/d' "$guests/$id.conf"; done
    mkdir -p $cache
    cp "/opt/lab/nvidia/$installer" $cache/
    update-initramfs -c -k all >/dev/null 2>&1
    traces >/root/before

    works 'apt-get install' apt-get -q -y install /opt/lab/gpu-handoff_*.deb
    is 'the driver on the disk' "$LAB_DRIVER" "$(version_for "$first")"
    ok 'its libraries' test -e "/usr/lib/x86_64-linux-gnu/libcuda.so.$LAB_DRIVER"
    ok 'it was not loaded in the middle of that' test ! -d /sys/module/nvidia
    ok 'what was set up is remembered' grep -q "\"$LAB_DRIVER\"" /var/lib/gpu-handoff/driver.json
    is 'nothing went wrong' null "$(setup_error)"
    works 'enable' gpu-handoff enable 111

    works 'a second kernel' dpkg -i /opt/lab/kernel/*.deb
    is 'the driver for it' "$LAB_DRIVER" "$(version_for "$second")"
    ok 'an initramfs for it' test -s "/boot/initrd.img-$second"
    ok 'still nothing was loaded' test ! -d /sys/module/nvidia
    next "$second" upgraded
}

# With the kernel hook's driver.
upgraded() {
    is 'the kernel' "$second" "$(uname -r)"
    is 'at home' nvidia "$(driver_of $slot1.0)"
    is 'nvidia-smi' "$LAB_DRIVER" "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader)"
    remember_home
    works 'qm start' qm start 111
    in_vm 'with the VM' $slot1 111
    works 'qm stop' qm stop 111
    is_home 'after the VM'

    # ---- the other kernel's package is configured again, and the driver does not build ----
    rm "/lib/modules/$first"/kernel/drivers/video/nvidia*.ko "/boot/initrd.img-$first"
    touch /etc/lab-fail-build
    works 'a kernel for which nothing builds' dpkg-reconfigure "linux-image-$first"
    is 'every package is configured' '' "$(dpkg --audit)"
    ok 'it has an initramfs' test -s "/boot/initrd.img-$first"
    is 'but no driver' '' "$(version_for "$first")"
    ok 'the status tells why' grep -q "$first" <<<"$(setup_error)"
    is 'the host keeps its driver' nvidia "$(driver_of $slot1.0)"
    rm /etc/lab-fail-build
    next "$first" repaired
}

# By the unit that runs at boot.
repaired() {
    is 'the kernel' "$first" "$(uname -r)"
    is 'the driver for it' "$LAB_DRIVER" "$(version_for "$first")"
    is 'nothing is left to do' null "$(setup_error)"
    is 'at home' nvidia "$(driver_of $slot1.0)"
    is 'nvidia-smi' "$LAB_DRIVER" "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader)"

    works 'disable' gpu-handoff disable 111
    works 'setup driver --undo' gpu-handoff setup driver --undo
    works 'apt-get purge' apt-get -q -y purge gpu-handoff
    same 'as it was before' "$(cat /root/before)" "$(traces)"
    is 'nothing for the second kernel' '' "$(version_for "$second")"
}

how=${1-}
first=$(cat /root/first 2>/dev/null)
case $(cat /root/stage 2>/dev/null) in
    '') fresh ;;
    *) "$(cat /root/stage)" ;;
esac
finish
