#!/bin/bash
# Containers that were attached open the card, privileged and unprivileged, in either style; detach leaves nothing of it.
# lab: --timeout 600
# lab-genuine: --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

conf=/etc/pve/lxc
kept=/var/lib/gpu-handoff/containers
attach() { gpu-handoff container attach "$@"; }
detach() { gpu-handoff container detach "$@"; }
inside() { pct exec "$@" 2>/dev/null; }
opens_inside() { # opens_inside CTID NODE: a process in the container does, and reads it as one
    inside "$1" -- sh -c "[ -c $2 ] && exec 3<$2"
}
uses_card() { # uses_card TEXT CTID
    for node in nvidia0 nvidiactl nvidia-uvm nvidia-uvm-tools nvidia-modeset; do
        ok "$1: a process inside opens /dev/$node" opens_inside "$2" "/dev/$node"
    done
}
start() { pct start "$1" >/dev/null 2>&1; }
stop() { pct stop "$1" >/dev/null 2>&1; }
as_before() { # as_before TEXT CTID
    ok "$1: the configuration is as before" cmp "/root/$2.conf" "$conf/$2.conf"
    is "$1: its mode" 640 "$(stat -c %a "$conf/$2.conf")"
    ok "$1: nothing is on record" test ! -e "$kept/$2.json"
    is "$1: nothing is left beside it" '' "$(find $conf/ -name "$2.conf?*")"
}

lab-ct create 101 --debian
lab-ct create 102 --unprivileged --debian
# Without a newline at its end.
printf %s "$(<$conf/102.conf)" >$conf/102.conf
cp $conf/101.conf $conf/102.conf /root/

# ---- while pct has the lock, attach waits ----
is_locked() { [ -e "/run/lock/lxc/pve-config-$1.lock" ] && ! flock -n "/run/lock/lxc/pve-config-$1.lock" true; }
start 101 &
within 20 is_locked 101
works 'pct start has the lock' attach 101
says 'pct start has the lock' '7 lines added' 'runs and gets it when it starts again: pct reboot 101'
ok 'it has let go by then' not is_locked 101
wait
ok 'a container that was not attached has no card' not opens_inside 101 /dev/nvidia0

# ---- nvidia-uvm is loaded, its nodes are made ----
rmmod nvidia_uvm
rm -f /dev/nvidia-uvm /dev/nvidia-uvm-tools
works 'without nvidia-uvm' attach 102 --style dev --dry-run
ok 'without nvidia-uvm: it would be loaded' grep -q '^  load      nvidia-uvm$' /run/call.out
as_before 'only asked' 102
works 'without nvidia-uvm' attach 102 --style dev
says 'without nvidia-uvm' 'nvidia-uvm loaded' 'device nodes /dev/nvidia-uvm /dev/nvidia-uvm-tools' '5 lines added'
same 'the mode of the configuration' 640 "$(stat -c %a $conf/102.conf)"
# Proxmox keeps what it writes anew.
works 'Proxmox writes it anew' pct set 102 --swap 1
# The major may be another one now.
works 'the numbers of now' attach 101

(pct reboot 101 >/dev/null 2>&1) &
start 102
wait
uses_card 'mounts, privileged' 101
uses_card 'devices, unprivileged' 102
works 'detached while it runs' detach 101
says 'detached while it runs' '7 lines removed' 'runs and keeps it until it starts again: pct reboot 101'
as_before 'detached while it runs' 101
ok 'until then a process inside opens it' opens_inside 101 /dev/nvidia0
stop 101 &
stop 102
wait
works 'detached' detach 102
# But for what Proxmox made of it: it is sorted, and ends with a newline.
same 'detached: what Proxmox wrote is there' "$(sed 's/^swap: 0/swap: 1/' /root/102.conf)" "$(<$conf/102.conf)"
cp /root/102.conf $conf/

# ---- the other way round, and the DRM nodes ----
works 'the other style' attach 101 --style dev --dri
works 'the other style' attach 102
render=$(basename "$pci/$slot1.0"/drm/renderD*)
start 101 &
start 102
wait
uses_card 'devices, privileged' 101
ok "devices, privileged: a process inside opens /dev/dri/$render" opens_inside 101 "/dev/dri/$render"
uses_card 'mounts, unprivileged' 102
stop 101 &
stop 102
wait
for id in 101 102; do
    works 'detached' detach $id
    as_before 'detached' $id
done

# ---- nothing is lost where nothing can be written ----
mount --bind /etc/pve /etc/pve
mount -o remount,bind,ro /etc/pve
call attach 101
exits 'read-only' 3
one_line 'read-only'
says 'read-only' 'Read-only file system' 'pvecm status'
umount /etc/pve
as_before 'read-only' 101
full() { # full DIRECTORY: the attach that finds it full
    mount -t tmpfs -o size=16k full "$1"
    cp -a /root/101.conf "$1/" # mode and all
    cat /dev/zero >"$1/zero" 2>/dev/null
    call attach 101
    exits "$1 is full" 3
    one_line "$1 is full"
    says "$1 is full" 'was not touched' 'No space left on device'
    [ "$1" != $conf/ ] || as_before "$1 is full" 101
    umount "$1"
    as_before "$1 is full" 101
}
full $conf/
full $kept
finish
