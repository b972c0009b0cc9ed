#!/bin/bash
# nvidia_drm with modeset=1. Some drivers hold every card with it, so that
# unbinding one would wait for ever; later ones let a card go.
# lab: --gpus 2 --modeset 1 --driver-version 580.95.05 --timeout 400
# lab: --gpus 2 --modeset 1 --driver-version 580.105.08 --timeout 400
# lab: --modeset 1 --timeout 400
# lab-genuine: --gpus 2 --modeset 1 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

drm_mark() { stat -c %i /sys/module/nvidia_drm 2>/dev/null; }

is 'modeset' Y "$(cat /sys/module/nvidia_drm/parameters/modeset)"
remember_home
at_home=$(snapshot)
names() { echo "$(drm_name $slot1.0)" "$(drm_name $slot2.0)"; }
named=$(names)
[ "$LAB_GPUS" = 1 ] || marks=$(module_marks)
drm=$(drm_mark)

for trip in 1 2; do
    works "trip $trip: pre-start" timeout 120 $hook 111 pre-start
    in_no_vm "trip $trip" $slot1
    if [ "$LAB_GPUS" = 2 ]; then
        is "trip $trip: card 2" nvidia "$(driver_of $slot2.0)"
        ok "trip $trip: card 2 has its DRM device" test -n "$(drm_name $slot2.0)"
        same "trip $trip: nvidia was not loaded anew" "$marks" "$(module_marks)"
        if [ "$LAB_DRIVER" != 580.105.08 ]; then
            ok "trip $trip: nvidia_drm was loaded anew" test "$(drm_mark)" != "$drm"
            says "trip $trip" 'unload nvidia_drm' 'load nvidia_drm'
        else
            is "trip $trip: nvidia_drm stayed" "$drm" "$(drm_mark)"
        fi
        drm=$(drm_mark)
    fi
    works "trip $trip: post-stop" timeout 120 $hook 111 post-stop
    untouched "trip $trip: as before" "$at_home"
    is_home "trip $trip"
    ok "trip $trip: card 1 has its DRM device" test -n "$(drm_name $slot1.0)"
    is "trip $trip: both by the same name" "$named" "$(names)"
    if [ "$LAB_GPUS" = 2 ]; then
        if [ "$LAB_DRIVER" != 580.105.08 ]; then
            # For the names.
            ok "trip $trip: nvidia was loaded anew on the way home" test "$(module_marks)" != "$marks"
            marks=$(module_marks)
        else
            same "trip $trip: nvidia was not loaded anew on the way home" "$marks" "$(module_marks)"
        fi
    fi
    is "trip $trip: modeset" Y "$(cat /sys/module/nvidia_drm/parameters/modeset)"
    drm=$(drm_mark)
done
works 'qm start' qm start 111
in_vm 'with the VM' $slot1 111
works 'qm stop' qm stop 111
is_home 'after the VM'
# NVIDIA's own has no display to put one on.
[ "$LAB_STACK" = genuine ] || ok 'a console on the cards' within 10 test "$(console_name)" = 1
finish
