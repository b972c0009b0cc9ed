#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# A driver whose wait may never end.
# Run with: tests/lab/run --driver-version 595.45.04 scripts/selftest-wedge.sh
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

is 'version' 595.45.04 "$(cat /sys/module/nvidia/version)"
is "modeset's default" Y "$(cat /sys/module/nvidia_drm/parameters/modeset)"
ok 'a console on the card' within 10 test "$(console_name)" = 1
hold /dev/nvidia0
bg unbind $slot1.0
sleep 1
is 'unbind with an open node' S "$(state_of $job)"
ok 'the DRM device has gone before the wait' test -z "$(drm_name $slot1.0)"
ok 'a new open finds no GPU' not head -c0 /dev/nvidia0
release
ok 'it ends when the node is closed' within 10 has_gone $job
probe $slot1.0
ok 'the DRM device is back' within 5 test -n "$(drm_name $slot1.0)"

attach 100
bg unbind $slot1.0
sleep 1
is 'unbind with a card attached to an nvidiactl' S "$(state_of $job)"
release
sleep 5
is 'after its holder has died it is still in' S "$(state_of $job)"
ok 'the proc entry stays' test -e /proc/driver/nvidia/gpus/$slot1.0
finish
