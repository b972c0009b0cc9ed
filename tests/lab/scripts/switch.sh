#!/bin/bash
# One VM after another: VM 113 takes over the card of VM 111.
#   switch.sh [TRIPS]
# lab: --timeout 1500
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
guest 113 $slot1
mkdir -p "${config%/*}"
echo '{"time":{"stop_s":20},"policy":{"vm":"shutdown"}}' >$config

# ---- there and back ----
works 'qm start' qm start 111
from=111 to=113
for ((trip = 1; trip <= ${1:-6}; trip++)); do
    works "trip $trip: qm start $to" qm start "$to"
    in_vm "trip $trip" $slot1 "$to"
    is "trip $trip: VM $from" 'status: stopped' "$(qm status "$from")"
    ok "trip $trip: no record of VM $from" test ! -e "$records/vm-$from"
    is "trip $trip: the driver was not loaded meanwhile" '' "$(modules | grep nvidia)"
    read -r from to <<<"$to $from"
done
works 'qm stop' qm stop "$from"
is_home 'after the trips'
untouched 'after the trips' "$at_home"

# ---- by hand ----
echo '{"time":{"stop_s":20}}' >$config
works 'switch: qm start' qm start 111
call qm start 113
says 'refused' 'VM 111 has it'
works 'switch' gpu-handoff switch 113
in_vm 'switch' $slot1 113
works 'switch: qm stop' qm stop 113
is_home 'switch'

# ---- locked ----
echo '{"time":{"stop_s":20},"policy":{"vm":"shutdown"}}' >$config
works 'locked: qm start' qm start 111
echo 'lock: backup' >>$guests/111.conf
call qm start 113
says 'locked' 'VM 111 has it and is locked (backup)' 'qm unlock 111'
works 'locked: qm unlock' qm unlock 111
in_vm 'locked' $slot1 111

# ---- dies meanwhile ----
(sleep 1 && kill -9 "$(</run/qemu-server/111.pid)") &
works 'dies: qm start' qm start 113
in_vm 'dies' $slot1 113
works 'dies: qm stop' qm stop 113
is_home 'dies'

# ---- two at once ----
guest 114 $slot1
works 'at once: qm start' qm start 111
qm start 113 </dev/null >/run/at-once.1 2>&1 &
first=$!
qm start 114 </dev/null >/run/at-once.2 2>&1 &
second=$!
wait $first
one=$?
wait $second
two=$?
is 'at once: exit codes' '0 255' "$(printf '%s\n' $one $two | sort -n | xargs)"
if [ $one = 0 ]; then winner=113 n=2; else winner=114 n=1; fi
in_vm 'at once, the winner' $slot1 $winner
ok 'at once, the loser is told who' grep -q "VM $winner \(takes it over\|has it\)" /run/at-once.$n
works 'at once: qm stop' qm stop $winner
is_home 'at once'
untouched 'at once' "$at_home"

# ---- and back: who was shut down runs again ----
runs() { [ "$(qm status "$1")" = 'status: running' ]; }
# It has run for a while.
is_back() { # is_back TEXT VMID
    ok "$1: VM $2 runs again" within 120 runs "$2"
    ok "$1: nothing waits to be started" within 60 test ! -e $records/to-start
    in_vm "$1" $slot1 "$2"
}
echo '{"time":{"stop_s":20},"policy":{"vm":"shutdown","vm_resume":true}}' >$config
works 'back: qm start' qm start 111
works 'back: plan' gpu-handoff plan 113
ok 'back: the plan says so' grep -q 'shut down VM 111, and start it again afterwards' <<<"$out"
works 'back: takes over' qm start 113
in_vm 'back: taken over' $slot1 113
is 'back: VM 111 meanwhile' 'status: stopped' "$(qm status 111)"
is 'back: what is owed' 'start 111' "$(status $slot1 owed.0.what owed.0.vm)"
works 'back: reboot' qm reboot 113
in_vm 'back: rebooted' $slot1 113
is 'back: VM 111 after the reboot' 'status: stopped' "$(qm status 111)"
works 'back: third' qm start 114
in_vm 'back: third' $slot1 114
works 'back: the third ends' qm stop 114
is_back 'back: the third has ended' 113
is 'back: VM 111 is not yet' 'status: stopped' "$(qm status 111)"
works 'back: the second ends' qm stop 113
is_back 'back: the second has ended' 111
is 'back: VM 113' 'status: stopped' "$(qm status 113)"
ok 'back: no record of VM 113' test ! -e $records/vm-113
ok 'back: no record of VM 114' test ! -e $records/vm-114

# ---- and back, when its lock is gone ----
with_keeper
works 'back, locked: takes over' qm start 113
echo 'lock: backup' >>$guests/111.conf
works 'back, locked: qm stop' qm stop 113
ok 'back, locked: it is kept' within 30 test -e $records/to-start
sleep 5
is 'back, locked: VM 111' 'status: stopped' "$(qm status 111)"
is 'back, locked: what is owed' 'start 111' "$(status $slot1 owed.0.what owed.0.vm)"
works 'back, locked: qm unlock' qm unlock 111
is_back 'back, locked' 111

# ---- who ends by himself stays as he is ----
works 'back: qm stop' qm stop 111
is_home 'back, at the end'
sleep 5
is 'back, at the end: VM 111' 'status: stopped' "$(qm status 111)"
finish
