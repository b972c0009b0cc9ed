#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# The other homes; $1 is the one given to --home, "nvidia" only needs lab-check.
# Run with: tests/lab/run --home HOME scripts/selftest-home.sh HOME
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

case $1 in
    nouveau)
        ok 'a console on the card' within 10 test "$(console_name)" = 1
        exec 5<>"/dev/dri/$(drm_name $slot1.0)"
        ok 'an open DRM node keeps the module' not rmmod nouveau
        exec 5>&-
        to_vfio $slot1
        is 'display' vfio-pci "$(driver_of $slot1.0)"
        # A second card keeps the console.
        is 'consoles on a framebuffer' "$([ -e $pci/$slot2.0 ] && echo 1 || echo 0)" "$(console_name)"
        to_host $slot1 nouveau
        is 'display' nouveau "$(driver_of $slot1.0)"
        ok 'the console is back' within 10 test "$(console_name)" = 1
        ok 'nouveau can be unloaded under its console' rmmod nouveau
        ;;
    none)
        to_vfio $slot1
        is 'display' vfio-pci "$(driver_of $slot1.0)"
        unbind $slot1.0
        is 'display' none "$(driver_of $slot1.0)"
        ;;
    vfio)
        is 'override' '(null)' "$(cat $pci/$slot1.0/driver_override)"
        ok 'configured in modprobe.d' grep -q 'options vfio-pci ids=' /etc/modprobe.d/lab.conf
        ;;
esac
finish
