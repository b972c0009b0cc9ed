#!/bin/bash
# NVIDIA's own driver: cards go to VMs and come home, twenty times, with nvidia_drm's modeset as it is set and then the
# other way round. Each time all is as it was before: every node by name and number, DRM devices included, what the
# modules count as in use, and with two cards whoever has the other one open.
# lab: --driver genuine --modeset 0 --timeout 900
# lab: --driver genuine --gpus 2 --modeset 1 --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

counts() { grep -H . /sys/module/nvidia{,_modeset,_drm,_uvm}/refcnt; }
drm_names() {
    local slot
    udevadm settle
    for slot in "${functions[@]}"; do echo "$slot $(ls "$pci/$slot/drm" 2>/dev/null | paste -sd' ')"; done
    ls -R /dev/dri
}
minors() { grep -H 'Device Minor' /proc/driver/nvidia/gpus/*/information; }
everything() {
    snapshot
    counts
    drm_names
    drm_devices
    minors
}

trip=0 took=0
one() { # one VMID: there and back, every fifth time with QEMU
    local slot=0000:0$(($1 - 110)):00
    trip=$((trip + 1))
    if [ $((trip % 5)) = 1 ]; then
        works "trip $trip: qm start $1" qm start "$1"
        in_vm "trip $trip" "$slot" "$1"
        [ -z "${user_pid-}" ] || still_works "trip $trip, away"
        works "trip $trip: qm stop $1" qm stop "$1"
    else
        works "trip $trip: pre-start $1" $hook "$1" pre-start
        took=$((took + ms))
        in_no_vm "trip $trip" "$slot"
        works "trip $trip: post-stop $1" $hook "$1" post-stop
        took=$((took + ms))
    fi
    [ -z "${user_pid-}" ] || still_works "trip $trip, home"
    if [ -z "${user_pid-}" ] || [ "$modeset" = 0 ]; then
        same "trip $trip: everything" "$before" "$(everything)"
        return
    fi
    # nvidia_drm had to go meanwhile and makes devices in the order in which nvidia got the cards. As long as somebody
    # uses the other one nvidia cannot be loaded anew, and the names are exchanged; nothing else may be, and it is told.
    same "trip $trip: everything but the names" "$(exchanged "$before")" "$(everything)"
    [ $((trip % 5)) = 1 ] || says "trip $trip" "$slot1.0 has card1 renderD129 in /dev/dri, where it had card0 renderD128" \
        "PID $user_pid (perl," "gpu-handoff to-vfio $slot1 && gpu-handoff to-nvidia $slot1"
    is "trip $trip: the status says so, too" "$slot1.0 has card1 renderD129 in /dev/dri, where it had card0 renderD128" \
        "$(status $slot1 dri)"
}
# exchanged TEXT: what everything printed, with the cards' names in /dev/dri changed for one another
exchanged() { sed '/^0000:0[12]:00.0 card/ { s/card0 controlD64 renderD128/A/; s/card1 controlD65 renderD129/card0 controlD64 renderD128/; s/A$/card1 controlD65 renderD129/ }' <<<"$1"; }
both() { # both VMID VMID: away in this order, home in this order
    local vm
    trip=$((trip + 1))
    for vm in 111 112; do works "trip $trip: pre-start $vm" $hook $vm pre-start; done
    in_no_vm "trip $trip" $slot1
    in_no_vm "trip $trip" $slot2
    for vm; do works "trip $trip: post-stop $vm" $hook "$vm" post-stop; done
    same "trip $trip, home in the order $*: everything" "$before" "$(everything)"
}

for modeset in $LAB_MODESET $((1 - LAB_MODESET)); do
    echo "# modeset=$modeset"
    if [ "$modeset" != "$LAB_MODESET" ]; then
        ok 'the stack can be unloaded' unload_stack
        sed -i "s/modeset=$LAB_MODESET/modeset=$modeset/" /etc/modprobe.d/lab.conf
        ok 'and loaded' load_stack
        within 10 test -e /dev/dri/card0
        udevadm settle
    fi
    is 'modeset' "$([ "$modeset" = 1 ] && echo Y || echo N)" "$(cat /sys/module/nvidia_drm/parameters/modeset)"
    before=$(everything) at_home=$before
    trip=0 took=0
    if [ "$LAB_GPUS" = 1 ]; then
        for _ in {1..10}; do one 111; done
    else
        for _ in {1..3}; do both 111 112 && both 112 111; done
        start_user "/dev/nvidia$(minor_of $slot2)"
        marks=$(module_marks) before=$(everything)
        for _ in {1..4}; do one 111; done
        end_user
        if [ "$modeset" = 1 ]; then
            # What was told helps when it is typed.
            works 'then: to-vfio' gpu-handoff to-vfio $slot1
            works 'and: to-nvidia' gpu-handoff to-nvidia $slot1
            before=$at_home
            same 'all names are back' "$before" "$(everything)"
            is 'and the status has nothing to say' null "$(status $slot1 dri)"
        fi
    fi
    echo "# modeset=$modeset: $trip trips, the hooks took $took ms"
done
finish
