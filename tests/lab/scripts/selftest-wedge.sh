#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# A driver whose wait never ends.
# Run with: tests/lab/run --driver-version 595.45.04 scripts/selftest-wedge.sh
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

is 'version' 595.45.04 "$(cat /sys/module/nvidia/version)"
is "modeset's default" Y "$(cat /sys/module/nvidia_drm/parameters/modeset)"
ok 'a console on the card' within 10 test "$(console_name)" = 1
hold /dev/nvidia0
bg unbind $slot1.0
sleep 1
is 'unbind with an open node' D "$(state_of $job)"
ok 'the DRM device has gone before the wait' test -z "$(drm_name $slot1.0)"
ok 'a new open finds no GPU' not head -c0 /dev/nvidia0
release
sleep 5
is 'after its holder has died it is still in' D "$(state_of $job)"
ok 'the proc entry stays' test -e /proc/driver/nvidia/gpus/$slot1.0
finish
