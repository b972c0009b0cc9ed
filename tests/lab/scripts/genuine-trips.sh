#!/bin/bash
# NVIDIA's own driver: cards go to VMs and come home, twenty times, with nvidia_drm's modeset as it is set and then the
# other way round. Each time all is as it was before: every node by name and number, DRM devices included, what the
# modules count as in use, and with two cards whoever has the other one open.
# lab: --driver genuine --modeset 0 --timeout 900
# lab: --driver genuine --gpus 2 --modeset 1 --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

counts() { grep -H . /sys/module/nvidia{,_modeset,_drm,_uvm}/refcnt; }
# Names, numbers and parents of DRM devices. A node that nobody made, or that is another card's now, is a difference.
drm_nodes() {
    local slot node
    for slot in "${functions[@]}"; do
        for node in "$pci/$slot/drm"/*; do
            [ ! -e "$node/dev" ] || echo "$slot ${node##*/} $(<"$node/dev") $(stat -c %t:%T "/dev/dri/${node##*/}")"
        done
    done
    ls -R /dev/dri
}
minors() { grep -H 'Device Minor' /proc/driver/nvidia/gpus/*/information; }
everything() {
    snapshot
    counts
    drm_nodes
    minors
}

# A program that has card 2 open, and says whether it still works: ioctl 218 asks the driver how its open went.
start_user() {
    coproc user {
        exec perl -e '
            $| = 1;
            sysopen F, shift, 2 or die "$!";
            print "ready\n";
            while (<STDIN>) { my $a = pack "L2", 9, 9; print defined ioctl(F, 0xC00846DA, $a) && unpack("L", $a) == 0 ? "works\n" : "$!\n" }' "$1"
    }
    # shellcheck disable=SC2154 # coproc sets it
    user_pid=$user_PID
    read -r -t 20 -u "${user[0]}" user_said
    is "a program uses $1" ready "$user_said"
}
still_works() { # still_works TEXT
    user_said=
    echo >&"${user[1]}" && read -r -t 20 -u "${user[0]}" user_said
    is "$1: the program on card 2" works "$user_said"
    is "$1: card 2" 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
    is "$1: nvidia was not loaded anew" "$mark" "$(stat -c %i /sys/module/nvidia)"
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
    same "trip $trip: everything" "$before" "$(everything)"
}
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
    mark=$(stat -c %i /sys/module/nvidia)
    before=$(everything)
    trip=0 took=0
    if [ "$LAB_GPUS" = 1 ]; then
        for _ in {1..10}; do one 111; done
    else
        for _ in {1..3}; do both 111 112 && both 112 111; done
        start_user "/dev/nvidia$(minor_of $slot2)"
        mark=$(stat -c %i /sys/module/nvidia) before=$(everything)
        for _ in {1..4}; do one 111; done
        kill "$user_pid"
        wait "$user_pid" 2>/dev/null
        user_pid=''
    fi
    echo "# modeset=$modeset: $trip trips, the hooks took $took ms"
done
finish
