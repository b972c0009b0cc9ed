#!/bin/bash
# Home is where a card was, whatever that is.
# lab: --home nouveau --timeout 400
# lab: --home none --timeout 400
# lab: --home vfio --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

case $LAB_HOME in
    nouveau) display=nouveau audio=snd_hda_intel owner='host null' ;;
    none) display=none audio=snd_hda_intel owner='none null' ;;
    vfio) display=vfio-pci audio=vfio-pci owner='none null' ;;
    *) echo "FAIL: no such case: $LAB_HOME" && exit 1 ;;
esac
same 'home' "$slot1.0 $display"$'\n'"$slot1.1 $audio" "$(all_of driver_of)"
is 'owner' "$owner" "$(status $slot1 owner.kind owner.vmid)"
remember_home
at_home=$(snapshot)

works 'qm start' qm start 111
in_vm "with the VM" $slot1 111
is 'home in the status' "${display/none/null} $audio" "$(status $slot1 functions.0.home functions.1.home)"
if [ "$LAB_HOME" = vfio ]; then
    same 'nothing moved' "$home_drivers" "$(all_of driver_of)"
    is 'overrides' '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
fi
works 'qm stop' qm stop 111
untouched 'after the VM' "$at_home"
is 'owner after the VM' "$owner" "$(status $slot1 owner.kind owner.vmid)"
[ "$LAB_HOME" != nouveau ] || ok 'a DRM device after the VM' test -n "$(drm_name $slot1.0)"
[ "$LAB_HOME" = vfio ] || is_home 'after the VM'

works 'to-vfio' gpu-handoff to-vfio
works 'to-nvidia means home' gpu-handoff to-nvidia
untouched 'by hand and back' "$at_home"

if [ "$LAB_HOME" = vfio ]; then
    # The administrator's own ids: vfio-pci must still take the card by them.
    for f in "${functions[@]}"; do unbind "$f"; done
    same 'unbound' "$slot1.0 none"$'\n'"$slot1.1 none" "$(all_of driver_of)"
    for f in "${functions[@]}"; do probe "$f"; done
    same 'static ids are still there' "$home_drivers" "$(all_of driver_of)"
fi
finish
