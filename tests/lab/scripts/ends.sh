#!/bin/bash
# Starts that are given up, ends that nobody asked for, reboots, backups: afterwards a card
# is with a VM that runs, or at home.
# lab: --gpus 2 --timeout 600
# lab-genuine: --gpus 2 --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
is_as_before() { [ "$(snapshot)" = "$at_home" ]; }
comes_home() { # comes_home TEXT: by itself
    ok "$1: comes home by itself" within 20 is_as_before
    same "$1: as before" "$at_home" "$(snapshot)"
}
# Which start of the link it is: binding again makes another one.
mark() { stat -c %i "$vfio_driver/$1.0"; }
watchers() { systemctl list-units --all --plain --no-legend 'gpu-handoff-watch-*' | awk '{ print $1, $3 }'; }
no_watcher() { [ -z "$(watchers)" ]; }
a_watcher() { watchers | grep -q ' active$'; }

# sample VMID: in the background, looks at Proxmox's lock and at the card until the VM's
# record has come and gone; then, in /run/sample, the milliseconds from the last look that
# saw the lock held to the first that saw the card leave vfio-pci, and that saw it home.
sample() {
    local inode locks now held=0 seen='' left='' end=$((SECONDS + 60))
    : >>"/var/lock/qemu-server/lock-$1.conf"
    inode=$(stat -c %i "/var/lock/qemu-server/lock-$1.conf")
    rm -f /run/sample
    {
        while [ $SECONDS -lt $end ]; do
            read -r -d '' locks </proc/locks
            now=${EPOCHREALTIME/./}
            [[ $locks != *":$inode "* ]] || held=$now
            if [ -e "$vfio_driver/$slot1.0" ]; then
                seen=1
            elif [ -n "$seen" ]; then
                left=${left:-$now}
                [ -e "$records/vm-$1" ] || break
            fi
            read -r -t 0.02 <>/run/sample-nobody
        done
        echo "$(((${left:-0} - held) / 1000)) $(((now - held) / 1000))" >/run/sample.new
        mv /run/sample.new /run/sample
    } &
    sampler=$!
}
mkfifo /run/sample-nobody
# given_up TEXT VMID COMMAND…: a start that fails after pre-start
given_up() {
    local text=$1 id=$2 left home
    shift 2
    sample "$id"
    call "$@"
    wait $sampler
    read -r left home </run/sample
    echo "# $text: the card left vfio-pci $left ms after the lock's release and was home after $home ms"
    ok "$text: not before the lock's release" [ "$left" -ge 0 ]
    ok "$text: home within 5 s of it" [ "$home" -lt 5000 ]
    comes_home "$text"
}

# ---- what the watcher costs a start ----
guest_lock() { exec 8>/var/lock/qemu-server/lock-111.conf && flock 8; }
guest_unlock() { exec 8>&-; }
plain=100000 watched=100000
for _ in 1 2 3 4; do
    works 'pre-start by hand' $hook 111 pre-start
    [ "$ms" -ge $plain ] || plain=$ms
    works 'post-stop by hand' $hook 111 post-stop
    guest_lock
    works 'pre-start under the lock' $hook 111 pre-start 8>&-
    [ "$ms" -ge $watched ] || watched=$ms
    works 'post-stop under the lock' $hook 111 post-stop 8>&-
    guest_unlock
done
echo "# pre-start, the fastest of 4: $plain ms, $watched ms with a watcher"
ok 'watchers end when there is nothing to watch' within 10 no_watcher

# ---- starts that fail after pre-start ----
guest 113 "$slot1,pcie=1"
sed -i 's/^machine: q35/machine: pc/' $guests/113.conf
given_up 'refused by Proxmox' 113 qm start 113
is 'refused by Proxmox: exit code' 255 "$rc"
says 'refused by Proxmox' 'is on vfio-pci, ready for VM 113' 'q35 machine model is not enabled'

guest 113 "$slot1,pcie=1"
sed -i 's/^name: .*/name: lab,no-such-option=1/' $guests/113.conf
given_up 'QEMU fails' 113 qm start 113
says 'QEMU fails' 'start failed: QEMU exited with code 1'

# Proxmox waits 5 s for its reservations, with the card on vfio-pci meanwhile, and then as
# long again to take them back.
no_reservations() {
    flock /run/qemu-server/pci-id-reservations.lock sleep 1000 &
    reserver=$!
}
reservations() {
    pkill -P $reserver
    wait $reserver
} 2>/dev/null
guest 113 "$slot1,pcie=1"
no_reservations
given_up 'a slow failure' 113 qm start 113
reservations
says 'a slow failure' "can't lock file"
ok 'a slow failure took its time' [ "$ms" -gt 5000 ]
ok 'no watcher is left' within 10 no_watcher

# ---- given up, and started again at once ----
sed -i 's/^machine: q35/machine: pc/' $guests/113.conf
call qm start 113
guest 113 "$slot1,pcie=1"
works 'started again at once' qm start 113
sleep 3
in_vm 'started again at once' $slot1 113
works 'started again at once: stop' qm stop 113
is_home 'started again at once'
sed -i 's/^machine: q35/machine: pc/' $guests/113.conf
call qm start 113
works 'another VM at once' qm start 111
sleep 3
in_vm 'another VM at once' $slot1 111
works 'another VM at once: stop' qm stop 111
is_home 'another VM at once'

# ---- nobody watches: the watcher was killed ----
guest 113 "$slot1,pcie=1"
no_reservations
bg qm start 113
ok 'it is being started' within 10 grep -q '"away"' $records/vm-113
ok 'it is watched' within 10 a_watcher
systemctl kill --signal=KILL 'gpu-handoff-watch-113-*'
ok 'that start is given up' within 30 has_gone "$job"
reservations
in_no_vm 'without a watcher' $slot1
is 'without a watcher: owner' 'stranded 113' "$(status $slot1 owner.kind owner.vmid)"
works 'without a watcher: reconcile' gpu-handoff reconcile
is_home 'without a watcher: reconcile'

# ---- a hook that was called by hand is nobody's start ----
works 'pre-start by hand' $hook 111 pre-start
is 'pre-start by hand: watchers' '' "$(watchers)"
by_hand=$(snapshot)
sleep 10
untouched '10 s later' "$by_hand"
works 'post-stop by hand' $hook 111 post-stop
is_home 'by hand'

# ---- ends that nobody asked for ----
works 'to be killed: qm start' qm start 111
ok 'a running VM has no watcher' within 10 no_watcher
kill -KILL "$(cat /run/qemu-server/111.pid)"
comes_home 'QEMU was killed'
works 'to end by itself: qm start' qm start 111
works 'ends by itself' qm guest-poweroff 111
comes_home 'the guest shut down'

# ---- reboots ----
works 'to be rebooted: qm start' qm start 111
before=$(mark $slot1) pid=$(cat /run/qemu-server/111.pid)
works 'qm reboot' qm reboot 111
says 'qm reboot' 'stays on vfio-pci: VM 111 reboots'
in_vm 'rebooted' $slot1 111
ok 'rebooted: another QEMU' [ "$(cat /run/qemu-server/111.pid)" != "$pid" ]
is 'rebooted: the card was not bound again' "$before" "$(mark $slot1)"
ok 'rebooted: no watcher is left' within 10 no_watcher
in_vm 'rebooted, and left with it' $slot1 111
# The change waits for the reboot, and Proxmox does not start such a VM.
works 'a change that is pending' qm set 111 --machine pc
given_up 'rebooted, and the start fails' 111 qm reboot 111
sed -i 's/^machine: pc/machine: q35/' $guests/111.conf
works 'to lose its card: qm start' qm start 111
works 'hostpci0 is removed' qm set 111 --delete hostpci0
works 'rebooted without its card' qm reboot 111
is 'rebooted without its card' 'status: running' "$(qm status 111)"
is_home 'rebooted without its card'
works 'qm stop' qm stop 111
guest 114 "$slot1,pcie=1" "$slot2,pcie=1"
works 'to lose one of two: qm start' qm start 114
in_vm 'with two cards' $slot2 114
before=$(mark $slot1)
works 'hostpci1 is removed' qm set 114 --delete hostpci1
works 'rebooted with one of two' qm reboot 114
in_vm 'rebooted with one of two' $slot1 114
is 'rebooted with one of two: it was not bound again' "$before" "$(mark $slot1)"
is 'rebooted with one of two: the other' 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
is 'rebooted with one of two: its owner' 'host null' "$(status $slot2 owner.kind owner.vmid)"
works 'qm stop' qm stop 114
is_home 'after one of two'

# ---- backups of a stopped VM ----
guest 111 "$slot1,pcie=1,x-vga=1"
policy() { mkdir -p /etc/gpu-handoff && echo "{\"policy\":{\"backup\":\"$1\"}}" >$config; }
backs_up() { # backs_up TEXT: the VM takes the card for it and gives it back
    works "$1: backup" qm backup 111
    says "$1" "$slot1 host -> VM 111" 'is home after'
    is_home "$1"
}
backs_up 'nobody uses it'
works 'nobody uses it: plan' gpu-handoff plan 111
policy policy
backs_up 'policy.backup=policy'
policy refuse
call qm backup 111
is 'policy.backup=refuse: exit code' 255 "$rc"
says 'policy.backup=refuse' 'is only started for a backup' 'policy.backup is refuse' 'failed: exit code 3'
untouched 'policy.backup=refuse' "$at_home"
policy idle
hold "/dev/nvidia$(minor_of $slot1)"
call qm backup 111
is 'somebody uses it: exit code' 255 "$rc"
says 'somebody uses it' "PID $holder" 'only to be started for a backup' 'failed: exit code 3'
untouched 'somebody uses it' "$at_home"
release
rm $config
is 'the backup has let go of the VM' '' "$(qm config 111 | grep '^lock')"
is_home 'in the end'
ok 'no watcher is left in the end' within 10 no_watcher
finish
