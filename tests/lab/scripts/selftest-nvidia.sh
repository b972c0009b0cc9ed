#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# The stack at home, and a card in use under a driver whose wait ends.
# Run with: tests/lab/run scripts/selftest-nvidia.sh
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

echo '# at the start'
is 'holders of nvidia' 'nvidia_modeset nvidia_uvm ' "$(ls /sys/module/nvidia/holders | sort | tr '\n' ' ')"
is 'holders of nvidia_modeset' nvidia_drm "$(ls /sys/module/nvidia_modeset/holders)"
is 'modinfo version' 580.95.05 "$(modinfo -F version nvidia)"
is 'names of major 195' 'nvidia nvidia-modeset nvidiactl ' "$(awk '$1 == 195 { print $2 }' /proc/devices | sort | tr '\n' ' ')"
ok 'DeviceFileMode' grep -qx 'DeviceFileMode: 438' /proc/driver/nvidia/params
ok 'a DRM device' test -e "/dev/dri/$(drm_name $slot1.0)"
is 'modeset' N "$(cat /sys/module/nvidia_drm/parameters/modeset)"
mknod /root/nvidia7 c 195 7
is 'a node without a GPU' 'No such device' "$(head -c0 /root/nvidia7 2>&1 | sed "s/.*: //")"

echo '# in use'
hold /dev/nvidia-uvm
ok 'rmmod nvidia_uvm refuses' not rmmod nvidia_uvm
ok 'the reason is EAGAIN' grep -q 'Resource temporarily unavailable\|in use' <(rmmod -v nvidia_uvm 2>&1)
release
ok 'rmmod nvidia names its users' grep -q 'in use by:.*nvidia_' <(rmmod nvidia 2>&1)

drm=$(drm_name $slot1.0)
hold /dev/nvidia0
bg unbind $slot1.0
sleep 1
is 'unbind with an open node waits' 'S, sleeps' "$(state_of $job), $(doing $job)"
is 'its driver link meanwhile' none "$(driver_of $slot1.0)"
ok 'the kernel says why' grep -q 'non-zero usage count' <(dmesg)
kill -KILL $job
is 'a signal makes it compute' spins "$(doing $job)"
ok 'and ends nothing' not has_gone $job
release
ok 'it ends when the node is closed' within 10 has_gone $job
ok 'the proc entry has gone' not test -e /proc/driver/nvidia/gpus/$slot1.0
is 'a node of an unbound GPU' 'No such device' "$(head -c0 /dev/nvidia0 2>&1 | sed "s/.*: //")"
is 'it leaves its DRM device behind' "$drm" "$(drm_name $slot1.0)"
rmmod nvidia_drm && modprobe nvidia_drm
is 'until nvidia_drm is loaded anew' '' "$(drm_name $slot1.0)"
probe $slot1.0
is 'driver after drivers_probe' nvidia "$(driver_of $slot1.0)"
is 'nvidia_drm does not see it come' '' "$(drm_name $slot1.0)"
rmmod nvidia_drm && modprobe nvidia_drm
is 'until nvidia_drm is loaded anew' "$drm" "$(drm_name $slot1.0)"

echo '# only a mapping'
perl -e '
    open F, "<", "/dev/nvidia0" or die;
    syscall(9, 0, 4096, 1, 1, fileno F, 0) > 0 or die "mmap: $!";
    close F; open O, ">", "/run/held"; close O; sleep 10000' &
holder=$!
ok 'a mapping' within 10 test -e /run/held
rm -f /run/held
ok 'no descriptor' not grep -q nvidia <(ls -l /proc/$holder/fd)
ok 'it is seen in map_files' grep -q /dev/nvidia0 <(ls -l /proc/$holder/map_files)
bg unbind $slot1.0
sleep 1
is 'unbind with a mapping' S "$(state_of $job)"
release
ok 'it ends with the mapping' within 10 has_gone $job
probe $slot1.0

echo '# nvidiactl'
hold /dev/nvidiactl
bg unbind $slot1.0
ok 'unbind does not wait for an open nvidiactl' within 10 has_gone $job
release
probe $slot1.0
attach 100
is 'a card is attached to it: errno' 0 "$attached"
bg unbind $slot1.0
sleep 1
is 'unbind with a card attached' S "$(state_of $job)"
release
ok 'it ends when nvidiactl is closed' within 10 has_gone $job
probe $slot1.0

echo '# a card is being started'
echo 600000 >/sys/module/nvshim/parameters/stall_ms
bg perl -e 'open F, "<", "/dev/nvidia0"; exit !$!{EIO}'
opener=$job
counted() { [ "$(cat /sys/module/nvidia/refcnt)" = 3 ]; }
ok 'who is inside open counts' within 10 counted
is 'but has no descriptor' 0 "$(find /proc/$opener/fd -lname '/dev/nvidia*' | wc -l)"
bg cat /proc/driver/nvidia/gpus/$slot1.0/information
sleep 2
ok 'the driver tells nothing of its cards meanwhile' not has_gone $job
echo 0 >/sys/module/nvshim/parameters/stall_ms
ok 'but afterwards' within 10 has_gone $job

echo '# round trip'
for round in 1 2; do
    ok "unloading ($round)" unload_stack
    ok 'nodes survive' test -c /dev/nvidia0
    to_vfio $slot1
    is 'display' vfio-pci "$(driver_of $slot1.0)"
    is 'audio' vfio-pci "$(driver_of $slot1.1)"
    ok 'nvidia refuses to load' grep -q 'No such device' <(modprobe nvidia 2>&1)
    ok 'and says why' grep -q 'NVRM: No NVIDIA devices probed.' <(dmesg)
    ok 'opening the dead node fails' not cat /dev/nvidia0 2>/dev/null
    ok 'nvidia is not loaded' not test -d /sys/module/nvidia
    to_host $slot1 nvidia
    load_stack
    is 'display' nvidia "$(driver_of $slot1.0)"
    is 'audio' snd_hda_intel "$(driver_of $slot1.1)"
    is 'override' '(null)' "$(cat $pci/$slot1.0/driver_override)"
    ok 'the node works' timeout 5 head -c0 /dev/nvidia0
done
finish
