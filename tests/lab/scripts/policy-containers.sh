#!/bin/bash
# Containers that use the card are refused, or stopped and started again; those that could use it are frozen meanwhile.
# lab: --timeout 400
# lab-genuine: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"
mount='lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file'
policy() { printf '{"policy":%s,"time":{"stop_s":40}}\n' "$1" >"$config"; }
# Without a fork: it lasts for a moment.
is_frozen() { local now='' && { read -r now <"/sys/fs/cgroup/lxc/$1/cgroup.freeze"; } 2>/dev/null && [ "$now" = 1 ]; }
runs() { [ "$(pct status "$1")" = 'status: running' ]; }
user_of() { pgrep -f "sleep 10$1"; }
has_card() { has_open "$(user_of "$1" | head -n 1)" /dev/nvidia0 2>/dev/null; }
# A container whose init has a program that keeps the card open.
busy_container() { # busy_container CTID
    lab-ct create "$1" 'lxc.cgroup2.devices.allow: c 195:* rwm' "$mount"
    printf '#!/bin/sh\necho $$ >/dev/user\nexec 3</dev/nvidia0\nexec sleep 10%s\n' "$1" >"/var/lib/lab-ct/$1/etc/rc.local"
    chmod 755 "/var/lib/lab-ct/$1/etc/rc.local"
    pct start "$1" >/dev/null 2>&1
    ok "container $1 has the card" within 20 has_card "$1"
}
# Notes which of these were ever frozen, until the file is gone.
watch_freezers() {
    : >/run/frozen
    : >/run/watching
    while [ -e /run/watching ]; do
        for id in "$@"; do ! is_frozen "$id" || echo "$id" >>/run/frozen; done
    done
}

busy_container 101
lab-ct create 102 "$mount"
lab-ct create 103 'dev0: /dev/nvidia0'
pct start 102 >/dev/null 2>&1
pct start 103 >/dev/null 2>&1
ok 'idle containers run' runs 102
ok 'idle containers run, one with dev0' runs 103

# ---- by default it keeps the card ----
sleep 3 # or it would be waited for, as one that has only just begun
call $hook 111 pre-start
exits 'refused' 3
quick 'refused' 2000
says 'refused' "PID $(user_of 101) (sleep, container 101) has /dev/nvidia0 open" 'pct shutdown 101'
untouched 'refused' "$at_home"
policy '{"container":"stop","containers":{"101":"leave"}}'
call $hook 111 pre-start
exits 'left alone' 3
untouched 'left alone' "$at_home"

# ---- it is stopped, and runs again when the card is home ----
policy '{"containers":{"101":"stop","103":"leave"}}'
works 'plan' gpu-handoff plan 111
for line in 'stop  .*stop container 101' 'release  .*freeze container 102' 'release  .*thaw container 102'; do
    ok "the plan says: $line" grep -q "$line" /run/call.out
done
ok 'the plan leaves container 103 alone' not grep -q 'container 103' /run/call.out
watch_freezers 102 103 &
watching=$!
works 'stopped: qm start' qm start 111
rm /run/watching
wait $watching
says 'stopped' 'freeze container 102, ' 'thaw container 102'
in_vm 'stopped' $slot1 111
ok 'stopped: container 101' not runs 101
is 'frozen meanwhile' 102 "$(sort -u /run/frozen)"
ok 'thawed again' not is_frozen 102
works 'stopped: qm stop' qm stop 111
is_home 'stopped'
ok 'stopped: container 101 runs again' within 40 runs 101
ok 'stopped: and has the card' within 20 has_card 101

# ---- asked to let go, in the container ----
policy '{"containers":{"101":{"release":["/bin/sh","-c","kill $(cat /dev/user)"]}}}'
sleep 3 # or it would be waited for, as one that has only just begun
works 'asked: pre-start' $hook 111 pre-start
says 'asked' '  ask ' 'ms  container 101'
in_no_vm 'asked' $slot1
ok 'asked: container 101 runs on' runs 101
works 'asked: post-stop' $hook 111 post-stop
is_home 'asked'
pct stop 101 >/dev/null 2>&1
pct start 101 >/dev/null 2>&1
ok 'asked: container 101 has the card again' within 20 has_card 101
policy '{"containers":{"101":"stop","103":"leave"}}'

# ---- under HA the commands only queue what they are asked for ----
mkdir -p /run/pve
echo 3 >/run/pve/ha-managed-101
works 'HA: pre-start' $hook 111 pre-start
ok 'HA: container 101 is down' not runs 101
in_no_vm 'HA' $slot1
works 'HA: post-stop' $hook 111 post-stop
is_home 'HA'
ok 'HA: container 101 runs again' within 60 runs 101
ok 'HA: nothing waits to be started' within 30 test ! -e $records/to-start
rm /run/pve/ha-managed-101

# ---- killed while a container is frozen ----
pct stop 101 >/dev/null 2>&1
$hook 111 pre-start </dev/null >/dev/null 2>&1 &
job=$!
until is_frozen 102 || has_gone $job; do :; done
kill -KILL $job 2>/dev/null
wait $job 2>/dev/null
ok 'killed: thawed by itself' within 20 not is_frozen 102
ok 'killed: home by itself' within 30 test ! -e $records/vm-111
is_home 'killed'
ok 'container 102 still runs' runs 102
finish
