#!/bin/bash
# A VM ran before it had the hookscript: Proxmox left its card on vfio-pci by new_id, and brings nothing home. enable puts
# that right, at once or when the VM stops; a start with the hook does not take vfio-pci for the card's home.
# lab: --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

at_home=$(all_of driver_of)
before() { # before TEXT: the VM is to run without the hook
    works "$1" qm set 111 --delete hookscript
    # Proxmox looks for nobody: the modules that hold the card must be away, or its unbind waits.
    rmmod nvidia_uvm nvidia_drm nvidia_modeset 2>/dev/null
}
is_left() { # is_left TEXT: with vfio-pci, nobody's override, and the ids still there
    same "$1: on vfio-pci" "$slot1.0 vfio-pci"$'\n'"$slot1.1 vfio-pci" "$(all_of driver_of)"
    is "$1: overrides" '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
}
is_right() { # is_right TEXT
    same "$1: at home" "$at_home" "$(all_of driver_of)"
    is "$1: overrides" '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
    is "$1: records" '' "$(kept)"
    for id in "$slot1.0" "$slot1.1"; do
        call sh -c "echo $(cut -c3- "$pci/$id/vendor") $(cut -c3- "$pci/$id/device") >$vfio_driver/remove_id"
        ok "$1: no id of $id is left" not test "$rc" = 0
    done
}

# ---- the VM is off ----
before 'off'
works 'off: without the hook' qm start 111
works 'off: without the hook' qm stop 111
is_left 'off'
call gpu-handoff enable 111 --dry-run
ok 'off: the way home is planned' grep -q 'where Proxmox left it' <<<"$out"
is_left 'off: only asked'
works 'off: enable' gpu-handoff enable 111
says 'off: enable' "Proxmox has left $slot1 on vfio-pci" "$slot1.0 to nvidia" "$slot1.1 to snd_hda_intel" "$slot1 is home"
is_right 'off'

# ---- the VM runs ----
before 'on'
works 'on: without the hook' qm start 111
works 'on: enable' gpu-handoff enable 111
says 'on: enable' "VM 111 runs with $slot1 since before it had the hookscript"
is_left 'on: while it runs'
works 'on: stop' qm stop 111
is_right 'on'

# ---- nobody called enable: the start finds it there, and so does the end ----
before 'set'
works 'set: without the hook' qm start 111
works 'set: without the hook' qm stop 111
works 'set' qm set 111 --hookscript local:snippets/gpu-handoff
works 'set: with the hook' qm start 111
is 'set: home in the status' 'nvidia snd_hda_intel' "$(status $slot1 functions.0.home functions.1.home)"
works 'set: stop' qm stop 111
is_right 'set'

before 'by hand'
works 'by hand: without the hook' qm start 111
works 'by hand: without the hook' qm stop 111
works 'by hand' gpu-handoff to-nvidia
is_right 'by hand'
finish
