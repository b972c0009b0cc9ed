#!/bin/bash
# Two cards of the same kind: what happens to one must not touch the other.
# lab: --gpus 2 --timeout 400
# lab-genuine: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
is 'two equal cards' "$(cat $pci/$slot1.0/device)" "$(cat $pci/$slot2.0/device)"
marks=$(module_marks)
start_user "/dev/nvidia$(minor_of $slot2)"

for trip in 1 2 3; do
    works "trip $trip: qm start" qm start 111
    in_vm "trip $trip" $slot1 111
    still_works "trip $trip, away"
    if [ "$trip" = 2 ]; then
        # Proxmox's own way of binding leaves an id that would take the twin, too.
        echo '10de 2684' >$vfio_driver/new_id
        is 'the twin keeps its driver' nvidia "$(driver_of $slot2.0)"
    fi
    works "trip $trip: qm stop" qm stop 111
    still_works "trip $trip, back"
    is_home "trip $trip"
done
is "card 2's user in the status" "$user_pid /dev/nvidia$(minor_of $slot2)" "$(status $slot2 users.0.pid users.0.via)"
is "it is no user of card 1" MISSING "$(status $slot1 users.0.pid)"
call $hook 112 pre-start
exits 'card 2 itself is in use' 3
says 'card 2' $slot2 "PID $user_pid" perl
end_user

# ---- both cards away, and home in either order ----
for order in '111 112' '112 111'; do
    works "$order: qm start 111" qm start 111
    works "$order: qm start 112" qm start 112
    in_vm "$order" $slot1 111
    in_vm "$order" $slot2 112
    read -r first second <<<"$order"
    works "$order: qm stop $first" qm stop "$first"
    slot=0000:0$((second - 110)):00
    is "$order: $slot stays with VM $second" "vm $second vfio-pci" "$(status $slot owner.kind owner.vmid functions.0.driver)"
    slot=0000:0$((first - 110)):00
    is "$order: $slot is home" 'host null nvidia' "$(status $slot owner.kind owner.vmid functions.0.driver)"
    ok "$order: /dev/nvidia0 opens for the one that is home" opens /dev/nvidia0
    works "$order: qm stop $second" qm stop "$second"
    is_home "$order"
done

# ---- the administrator's own ids in vfio-pci ----
echo 'options vfio-pci ids=10de:2684' >/etc/modprobe.d/static.conf
rmmod vfio_pci && modprobe vfio-pci
same 'a static id takes no card that has a driver' "$home_drivers" "$(all_of driver_of)"
works 'static: qm start' qm start 111
in_vm 'static' $slot1 111
works 'static: qm stop' qm stop 111
same 'static: drivers' "$home_drivers" "$(all_of driver_of)"
same 'static: modules' "$home_modules" "$(modules)"
is 'static: overrides' '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
said=$({ echo '10de 2684' >$vfio_driver/new_id; } 2>&1)
is 'static: the id is still there' 'File exists' "${said##*: }"
has_no_id 'static: no id for the audio function' 22ba
finish
