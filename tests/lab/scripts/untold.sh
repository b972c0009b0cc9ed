#!/bin/bash
# Ends that no phase tells of: a start that takes too long, is stopped or dies; a post-stop that is killed, or never
# comes. As long as a QEMU is there the card is left to it; afterwards it comes home by itself.
# lab: --timeout 900
# lab-genuine: --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
is_as_before() { [ "$(snapshot)" = "$at_home" ]; }
comes_home() { # comes_home TEXT: by itself, and then nobody watches any longer
    ok "$1: comes home by itself" within 120 is_as_before
    same "$1: as before" "$at_home" "$(snapshot)"
    ok "$1: no watcher is left" within 10 no_watcher
    udevadm settle # which still looks at what has come
}
no_watcher() { [ -z "$(systemctl list-units --plain --no-legend 'gpu-handoff-watch-*')" ]; }
note=/run/qemu-server/111.cleanup # Proxmox's
pid_file=/run/qemu-server/111.pid
begins() { [ -s $pid_file ] && pid=$(<$pid_file) && grep -qz "${pid_file#/run/}" "/proc/$pid/cmdline"; }
in_the_background() { "$@" </dev/null >/run/call.out 2>/run/call.err & task=$!; }
ends() { # ends TEXT CODE: what is in the background
    wait $task
    rc=$? err=$(</run/call.err)
    exits "$1" "$2"
}
# A QEMU that is slow: it stands still as soon as it is there.
start_slowly() { # start_slowly OPTION…
    in_the_background qm start 111 "$@"
    until begins || has_gone $task; do sleep 0.02; done 2>/dev/null
    ok 'QEMU begins' begins
    has_gone $task && sed 's/^/    | /' /run/call.err
    kill -STOP "$pid"
}
stays_with_qemu() { # stays_with_qemu TEXT: Proxmox is through with it, and has not said that it has started
    ok "$1: Proxmox has let go of it" flock -n /var/lock/qemu-server/lock-111.conf true
    ok "$1: its QEMU is there" begins
    ok "$1: Proxmox has not noted it" [ ! -e $note ]
    sleep 3
    in_no_vm "$1" $slot1
    is "$1: owner in the status" 'vm 111' "$(status $slot1 owner.kind owner.vmid)"
    ok "$1: it is watched" not no_watcher
}

# ---- starts ----
start_slowly --timeout 60
ends 'it takes too long' 255
says 'it takes too long' 'got timeout'
stays_with_qemu 'it takes too long'
kill -CONT "$pid"
comes_home 'it takes too long'

start_slowly
works 'Stop is pressed' qm task-stop 111
ends 'the task that was stopped' 255
stays_with_qemu 'Stop is pressed'
kill -CONT "$pid"
comes_home 'Stop is pressed'

in_the_background qm start 111
until [ -s $pid_file ] || has_gone $task; do sleep 0.02; done
kill -TERM $task
ends 'interrupted while QEMU begins' 255
# How far QEMU has come by then decides whether it ends by itself.
within 15 not begins || qm stop 111
comes_home 'interrupted while QEMU begins'

call env QM_LAB_DIES=before-note qm start 111
is 'the task dies before its note: exit code' 255 "$rc"
ok 'the task dies before its note: the VM runs' begins
sleep 3
in_vm 'the task dies before its note' $slot1 111
ok 'the task dies before its note: it is watched' not no_watcher
works 'the task dies before its note: stop' qm stop 111
comes_home 'the task dies before its note'

call env QM_LAB_DIES=before-note qm start 111
systemctl kill --signal=KILL 'gpu-handoff-watch-111-*'
ok 'nobody watches' within 10 no_watcher
kill -KILL "$(<$pid_file)"
sleep 2
works 'nobody watches: reconcile' gpu-handoff reconcile
comes_home 'nobody watches'

# ---- stops ----
killed_in_post_stop() { # killed_in_post_stop TEXT COMMAND…: while the guest's own end is seen to
    works "$1: qm start" qm start 111
    ok "$1: a VM that runs has no watcher" within 10 no_watcher
    QM_LAB_NO_WAITING=1 in_the_background qm guest-poweroff 111
    until grep -q '"returning"' $records/vm-111 || [ ! -e $records/vm-111 ]; do sleep 0.01; done 2>/dev/null
    call "${@:2}"
    ends "$1: guest-poweroff" 0
    comes_home "$1"
    rm -f $note
}
killed_in_post_stop 'qmeventd is killed' systemctl kill --signal=KILL qmeventd
systemctl reset-failed qmeventd
systemctl start qmeventd
killed_in_post_stop 'qmeventd is restarted' systemctl restart qmeventd
killed_in_post_stop 'post-stop alone is killed' pkill -KILL -f '[g]pu-handoff 111 post-stop'

works 'pmxcfs is down: qm start' qm start 111
ok 'pmxcfs is down: nobody watches a VM that runs' within 10 no_watcher
lab-pve down
kill -KILL "$(<$pid_file)"
sleep 5
in_no_vm 'pmxcfs is down' $slot1
ok 'pmxcfs is down: post-stop never came' [ -e $note ]
works 'pmxcfs is down: reconcile' gpu-handoff reconcile
lab-pve up
is_home 'pmxcfs is down'
rm -f $note

: >/run/qemu-server/force-legacy-cleanup
works 'as Proxmox did it: qm start' qm start 111
works 'as Proxmox did it: qm stop' qm stop 111
is_home 'as Proxmox did it'
rm /run/qemu-server/force-legacy-cleanup

is_home 'in the end'
finish
