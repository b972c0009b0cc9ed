#!/bin/bash
# NVIDIA's own driver with the files named and loaded as Debian's packages do it: nvidia-current-open.ko, which modprobe
# finds by its install lines. It is found, loaded, unloaded and set up as any other.
# lab-genuine: --names debian --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

ok "there is no file of NVIDIA's own name" not modinfo -n nvidia 2>/dev/null
is 'the driver' "$LAB_DRIVER" "$(modinfo -F version nvidia-current-open)"
remember_home

for trip in 1 2; do
    works "trip $trip: qm start" qm start 111
    in_vm "trip $trip" $slot1 111
    works "trip $trip: qm stop" qm stop 111
    is_home "trip $trip"
done

# ---- set-up sees the driver, whether it is loaded or not ----
for when in 'at home' 'away'; do
    works "$when: setup vfio --dry-run" gpu-handoff setup vfio --dry-run
    ok "$when: setup vfio would keep nvidia off the card at boot" grep -q '^ *write .*/etc/modprobe.d/gpu-handoff.conf' <<<"$out"
    call gpu-handoff setup driver --dry-run
    ok "$when: setup driver sees the installed one" grep -qF "$LAB_DRIVER" <<<"$out$err"
    [ "$when" = away ] || works 'to-vfio' gpu-handoff to-vfio
done
works 'to-nvidia' gpu-handoff to-nvidia
is_home 'to-nvidia'

# ---- and what it writes agrees with these files: the card goes and comes ----
works 'setup vfio' gpu-handoff setup vfio
works 'with it: qm start' qm start 111
in_vm 'with it' $slot1 111
works 'with it: qm stop' qm stop 111
is_home 'with it'
works 'setup vfio --undo' gpu-handoff setup vfio --undo
finish
