#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# A real QEMU opens the card through VFIO, and a real container runs.
# Run with: tests/lab/run scripts/selftest-qemu.sh
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

unload_stack
to_vfio $slot1
is 'display' vfio-pci "$(driver_of $slot1.0)"
is 'audio' vfio-pci "$(driver_of $slot1.1)"
group=/dev/vfio/$(basename "$(readlink $pci/$slot1.0/iommu_group)")
ok 'the group has a node' within 5 test -c "$group"
qemu-system-x86_64 -accel tcg -machine q35 -m 64 -nodefaults -nographic -S \
    -device vfio-pci,host=01:00.0 -device vfio-pci,host=01:00.1 </dev/null >/run/qemu.log 2>&1 &
vm=$!
# The group alone is not enough: QEMU opens the devices after it.
has_devices() { [ "$(find "/proc/$vm/fd" -lname '*vfio-device*' | wc -l)" = 2 ]; }
ok 'QEMU has opened both functions' within 60 has_devices
ok 'the group is busy' grep -q 'Device or resource busy' <(bash -c "exec 3<>$group" 2>&1)
bg unbind $slot1.0
sleep 2
ok 'unbinding from vfio-pci waits for QEMU' not has_gone $job
kill -KILL $vm
wait $vm 2>/dev/null
ok 'and ends with it' within 20 has_gone $job
cat /run/qemu.log

echo '# LXC'
mkdir -p /var/lib/lxc/101/rootfs/{bin,proc,sys,dev,run}
cp /bin/busybox /var/lib/lxc/101/rootfs/bin/
printf '%s\n' 'lxc.rootfs.path = /var/lib/lxc/101/rootfs' 'lxc.uts.name = ct' \
    'lxc.apparmor.profile = unconfined' 'lxc.mount.auto = proc sys' \
    'lxc.cgroup2.devices.allow = c 195:* rwm' \
    'lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind,optional,create=file' \
    'lxc.init.cmd = /bin/busybox sleep 1000' >/var/lib/lxc/101/config
ok 'lxc-start' timeout 60 lxc-start -n 101 -L /run/ct.log -o /run/ct.log
ok 'it runs' within 10 sh -c 'lxc-info -n 101 -s | grep -q RUNNING'
ok 'it has the node' lxc-attach -n 101 -- /bin/busybox test -c /dev/nvidia0
lxc-stop -n 101 -k
cat /run/ct.log
finish
