#!/bin/bash
# A card in use is refused before anything is touched, and who uses it is named.
# lab: --timeout 400
# lab: --gpus 2 --timeout 400
# lab: --driver genuine --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)

# refused VIA PID COMMAND WORD…: the hook says who has VIA open, and does nothing
refused() {
    in_use "$1" open "${@:2}"
    is "$1: owner in the status" host "$(status $slot1 owner.kind)"
}
held() { # held NODE WORD…: by a process of the host
    hold "$1"
    refused "$1" "$holder" perl "${@:2}"
    release
}

# ---- every kind of node, held by a process of the host ----
held /dev/nvidia0 'lab-script.service'
# With two cards it is for both, and in nobody's way as long as nobody uses this one: control.sh.
[ "$LAB_GPUS" = 2 ] || held /dev/nvidiactl
held /dev/nvidia-uvm
# Nobody can tell which card such a program uses; the stack cannot be unloaded under it.
card=/dev/dri/$(drm_name $slot1.0)
ok 'the card has a DRM node' test -c "$card"
held "$card"
control=$(echo "$pci/$slot1.1/sound/card"*/controlC*)
control=/dev/snd/${control##*/}
ok 'the audio function has an ALSA node' test -c "$control"
held "$control"

# ---- through Proxmox: the start fails, the task log says why ----
hold /dev/nvidia0
call qm start 111
is 'qm start fails' 255 "$rc"
says 'qm start' "PID $holder" 'on pre-start' 'exit code 3'
untouched 'qm start' "$at_home"
is 'no QEMU' 'status: stopped' "$(qm status 111)"
release

# ---- another name for the node, in namespaces of its own ----
mkdir -p /run/elsewhere
unshare --mount --pid --fork sh -c '
    mount -t tmpfs none /run/elsewhere && mknod /run/elsewhere/my-gpu c 195 0 || exit 9
    exec perl -e "open F, q(<), q(/run/elsewhere/my-gpu) or exit 9; open O, q(>), q(/run/held); sleep 10000"' &
outer=$!
ok 'a program in other namespaces has the card' within 10 test -e /run/held
rm -f /run/held
inner=$(pgrep -P "$outer")
ok 'its name for the node is not ours' test ! -e /run/elsewhere/my-gpu
refused /dev/nvidia0 "$inner" perl
kill -KILL "$inner"
wait "$outer" 2>/dev/null

# ---- a unit ----
systemd-run --quiet --unit=gpu-user --service-type=exec perl -e 'open F, "<", "/dev/nvidia0" or exit 9; sleep 10000'
pid=$(systemctl show --value -p MainPID gpu-user.service)
within 10 has_open "$pid" /dev/nvidia0
refused /dev/nvidia0 "$pid" perl gpu-user.service 'systemctl stop gpu-user.service' 'qm start 111'
is 'unit in the status' gpu-user.service "$(status $slot1 users.0.unit)"
systemctl stop gpu-user.service

# ---- a container, in cgroups named as Proxmox does ----
root=/var/lib/lxc/101/rootfs
mkdir -p $root/{bin,proc,sys,dev,run}
cp /bin/busybox $root/bin/
cat >/var/lib/lxc/101/config <<END
lxc.rootfs.path = $root
lxc.uts.name = ct
lxc.apparmor.profile = unconfined
lxc.mount.auto = proc sys
lxc.cgroup.dir.monitor = lxc.monitor/101
lxc.cgroup.dir.container = lxc/101
lxc.cgroup.dir.container.inner = ns
lxc.cgroup2.devices.allow = c 195:* rwm
lxc.mount.entry = /dev/nvidia0 dev/nvidia0 none bind,optional,create=file
lxc.init.cmd = /bin/busybox sh -c "exec 3</dev/nvidia0; exec /bin/busybox sleep 10000"
END
works 'lxc-start' timeout 60 lxc-start -n 101
init=$(lxc-info -n 101 -p -H)
ok 'the container has the card' within 10 has_open "$init" /dev/nvidia0
refused /dev/nvidia0 "$init" busybox 'container 101' 'pct shutdown 101'
is 'container in the status' 101 "$(status $slot1 users.0.ctid)"
lxc-stop -n 101 -k

# ---- several at once: each is named ----
hold /dev/nvidia0
first=$holder
hold /dev/nvidiactl
call $hook 111 pre-start
exits 'two users' 3
says 'two users' "PID $first" "PID $holder"
release
kill -KILL "$first"
wait "$first" 2>/dev/null

# ---- the other card's users are nobody's business ----
if [ "$LAB_GPUS" = 2 ]; then
    hold /dev/nvidia1
    works 'with a user of the other card: qm start' qm start 111
    in_vm 'with a user of the other card' $slot1 111
    works 'with a user of the other card: qm stop' qm stop 111
    is_home 'with a user of the other card'
    release
fi

# ---- nobody uses it any more ----
works 'qm start' qm start 111
in_vm 'with the VM' $slot1 111
works 'qm stop' qm stop 111
is_home 'after the VM'
finish
