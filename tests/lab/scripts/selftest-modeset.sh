#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# nvidia_drm with modeset=1; $1: "holds" or "unplugs", what the version does.
# Run with: tests/lab/run --modeset 1 [--driver-version V] scripts/selftest-modeset.sh holds|unplugs
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

is 'modeset' Y "$(cat /sys/module/nvidia_drm/parameters/modeset)"
ok 'a console on the card' within 10 test "$(console_name)" = 1
ok 'a connector' test -d "/sys/class/drm/$(drm_name $slot1.0)-HDMI-A-1"

exec 5<>"/dev/dri/$(drm_name $slot1.0)"
ok 'an open DRM node keeps nvidia_drm' not rmmod nvidia_drm
exec 5>&-

bg unbind $slot1.0
if [ "$1" = holds ]; then
    sleep 2
    is 'unbind with nobody there' S "$(state_of $job)"
    ok 'nvidia_drm can be unloaded under its console' rmmod nvidia_drm
fi
ok 'unbind comes to an end' within 10 has_gone $job
is 'consoles on a framebuffer' 0 "$(console_name)"
ok 'no DRM device' test -z "$(drm_name $slot1.0)"
probe $slot1.0
modprobe nvidia_drm
ok 'the console is back' within 10 test "$(console_name)" = 1

if [ "$1" = unplugs ]; then
    exec 5<>"/dev/dri/$(drm_name $slot1.0)"
    bg unbind $slot1.0
    ok 'unbind does not wait for an open DRM node' within 10 has_gone $job
    exec 5>&-
    probe $slot1.0
    ok 'the console is back' within 10 test "$(console_name)" = 1
fi

for round in 1 2; do
    ok "unloading with the console in use ($round)" unload_stack
    to_vfio $slot1
    is 'display' vfio-pci "$(driver_of $slot1.0)"
    to_host $slot1 nvidia
    load_stack
    ok 'the console is back' within 10 test "$(console_name)" = 1
done
ok 'a card held on console can be written to' sh -c 'echo hello >/dev/tty1'
finish
