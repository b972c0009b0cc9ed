#!/bin/bash
# Checks the lab's stand-in `pct` against what Proxmox VE is known to do, around real
# LXC, with a hookscript of its own: tests/lab/run --timeout 1200 PATH-OF-THIS. Some
# thirty starts of containers take their time in an emulator.
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

W=/run/pct-selftest # notes of the hook, and what it is told to do
conf=/etc/pve/lxc
mkdir -p $W
: >$W/log
cat >/var/lib/vz/snippets/note <<'END'
#!/bin/bash
# what it sees, in one line; then what the test asks for
W=/run/pct-selftest id=$1 phase=$2 lock=free
flock -n "/run/lock/lxc/pve-config-$id.lock" true || lock=held
echo "$phase id=$id argc=$# lc=$LC_ALL lock=$lock target=${LXC_TARGET-none} ns=$(readlink /proc/self/ns/mnt)" \
    "file=$(grep -c . "/var/lib/lxc/$id/config")" >>$W/log
echo "out $phase"
echo "err $phase" >&2
[ ! -e $W/do-$phase ] || . $W/do-$phase
END
chmod 755 /var/lib/vz/snippets/note

log() { cut -d' ' -f1 $W/log | paste -sd' '; }
phases() { # phases TEXT PHASE…: since the last call
    is "$1: phases" "${*:2}" "$(log)"
    : >$W/log
}
of() { sed -n "s/^$1 .* $2=\([^ ]*\).*/\1/p" $W/log; } # of PHASE FIELD
tell() { echo "$2" >"$W/do-$1"; }                      # tell PHASE COMMANDS
forget() { rm -f $W/do-*; }
init_of() { lxc-info -n "$1" -p -H 2>/dev/null; }
status_of() { pct status "$1"; }
runs() { [ "$(status_of "$1")" = 'status: running' ]; }
stopped() { [ "$(status_of "$1")" = 'status: stopped' ]; }
fails() { # fails TEXT MESSAGE COMMAND…: with 255, and this is the end of what it says
    call "${@:3}"
    exits "$1" 255
    is "$1: message" "$2" "$(tail -n 1 <<<"$err")"
}
inside() { pct exec "$1" -- sh -c "$2"; }
opens_inside() { inside "$1" "exec 3<$2" 2>/dev/null; }
config_of() { # config_of ID LINE…: what it is created with, then these
    lab-ct destroy "$1"
    lab-ct create "$@"
    sed -i 's/gpu-handoff/note/' "$conf/$1.conf"
}
took() { echo "    | $1 took $ms ms"; }

# ---- no container, a stopped one ----
call pct status 999
exits 'an unknown one' 2
is 'an unknown one: message' "Configuration file 'nodes/pve1/lxc/999.conf' does not exist" "$err"
devices=('dev0: /dev/nvidia0,mode=0600,uid=5,gid=6' 'dev1: /dev/nvidia-modeset,deny-write=1'
    'lxc.mount.entry: /dev/nvidiactl dev/nvidiactl none bind,optional,create=file'
    'lxc.environment: FIRST=1'
    'lxc.mount.entry: /dev/late dev/late none bind,optional,create=file')
config_of 101 "${devices[@]}"
config_of 102 --unprivileged "${devices[@]}"
is 'status of a stopped one' 'status: stopped' "$(status_of 101)"
fails 'stop of a stopped one' 'CT 101 not running' pct stop 101
fails 'shutdown of a stopped one' 'CT 101 not running' pct shutdown 101
fails 'reboot of a stopped one' 'VM 101 not running' pct reboot 101
fails 'exec in a stopped one' "container '101' not running!" pct exec 101 -- true
phases 'none of that'
ok 'pct list' grep -Eq '^102 +stopped +ct102' <(pct list)

# ---- start ----
call pct start 101
took 'pct start'
exits start 0
same 'start: standard output' $'out pre-start\nout post-start' "$out"
same 'start: standard error' $'err pre-start\nerr post-start' "$err"
is 'the lock in pre-start and post-start' 'held held' "$(of pre-start lock) $(of post-start lock)"
is 'arguments and locale' '2 C' "$(of pre-start argc) $(of pre-start lc)"
not_empty=$(of pre-start file)
ok "LXC's file is there before pre-start" test "${not_empty:-0}" -gt 10
phases start pre-start post-start
is 'status of a running one' 'status: running' "$(status_of 101)"
is 'the unit' active "$(systemctl is-active pve-container@101)"
fails 'another start' 'CT 101 already running' pct start 101
phases 'another start'
pid=$(init_of 101)
is 'cgroup' 0::/lxc/101/ns "$(cat "/proc/$pid/cgroup")"
ok "the monitor's cgroup" test -d /sys/fs/cgroup/lxc.monitor/101
frozen() { grep -qx "frozen $1" /sys/fs/cgroup/lxc/101/cgroup.events; }
echo 1 >/sys/fs/cgroup/lxc/101/cgroup.freeze
ok 'it can be frozen' within 10 frozen 1
echo 0 >/sys/fs/cgroup/lxc/101/cgroup.freeze
ok 'and thawed' within 10 frozen 0
is 'raw keys, in their order' 'lxc.mount.entry lxc.environment lxc.mount.entry' \
    "$(sed -n '/^lxc.mount.entry/,$s/ .*//p' /var/lib/lxc/101/config | paste -sd' ')"
call pct exec 101 -- sh -c "tr '\\0' '\\n' </proc/1/environ | grep FIRST; exit 7"
is 'exec' '7 FIRST=1' "$rc $out"

# ---- devices ----
works 'start of the unprivileged one' pct start 102
took 'pct start, of an unprivileged one and with lxc-monitord there,'
: >$W/log
is 'its root is' 100000 "$(stat -c %u "/proc/$(init_of 102)")"
for id in 101 102; do
    is "$id: dev0" '600 5:6 c3:0' "$(inside $id "stat -c '%a %u:%g %t:%T' /dev/nvidia0")"
    ok "$id: dev0 opens" opens_inside $id /dev/nvidia0
    ok "$id: dev1 opens" opens_inside $id /dev/nvidia-modeset
    ok "$id: a mount entry of a node that is there" inside $id 'test -c /dev/nvidiactl'
    ok "$id: an optional one of a node that is not" not inside $id 'test -c /dev/late'
done
ok '101: deny-write' not inside 101 'exec 3>/dev/nvidia-modeset' 2>/dev/null
ok '101: a mount entry alone does not open' not opens_inside 101 /dev/nvidiactl
ok '101: a node may be made' inside 101 'mknod /dev/mine c 195 255'
ok '101: but not opened' not opens_inside 101 /dev/mine
ok '102: a mount entry alone opens' opens_inside 102 /dev/nvidiactl
ok '102: no node may be made' not inside 102 'mknod /dev/mine c 195 255' 2>/dev/null
for id in 101 102; do
    works "$id: hotplug of a device" pct set $id --dev2 /dev/nvidia-uvm,mode=0644
    ok "$id: it opens" opens_inside $id /dev/nvidia-uvm
    is "$id: and is in the configuration" 'dev2: /dev/nvidia-uvm,mode=0644' "$(grep dev2 $conf/$id.conf)"
done
call pct set 101 --hookscript local:snippets/absent
exits 'outside of a task the exit code is an errno: a hookscript that is not there' 2
fails 'a device that is not there' 'Device /dev/absent does not exist' pct set 101 --dev3 /dev/absent

# ---- stop ----
tell post-stop "pct status 101 >$W/status 2>&1; sleep 3; touch $W/over"
call pct stop 101
took 'pct stop, of which post-stop 3 s,'
exits stop 0
ok 'it waits for post-stop' test -e $W/over
same 'in post-stop it counts as running, without a process' \
    $'unable to get PID for CT 101 (not running?)\nstatus: running' "$(cat $W/status)"
is 'the lock in pre-stop and post-stop' 'held held' "$(of pre-stop lock) $(of post-stop lock)"
is "post-stop has LXC's environment" stop "$(of post-stop target)"
ok 'and a mount namespace of its own' test "$(of post-stop ns)" != "$(of pre-stop ns)"
same 'what post-stop writes is in no task log' $'out pre-stop|err pre-stop' "$out|$err"
ok "nor in LXC's" not grep -q 'err post-stop' /run/pve/ct-101.stderr
phases stop pre-stop post-stop
ok 'stopped' stopped 101
tell post-stop "for n in {1..15}; do echo \$n >&2; sleep 0.3; done; touch $W/written"
call pct shutdown 102
took 'pct shutdown'
exits shutdown 0
is 'after a shutdown' 'status: stopped' "$(status_of 102)"
phases shutdown pre-stop post-stop
ok 'a post-stop that writes more often than LXC reads comes to its end' test -e $W/written
forget

# ---- a guest that ignores it; reboot ----
works start pct start 101
: >$W/log
touch /var/lib/lab-ct/101/etc/ignores-shutdown
call pct shutdown 101 --timeout 2
is 'an ignored shutdown' '255 container did not stop' "$rc $(tail -n 1 <<<"$err")"
phases 'an ignored shutdown' pre-stop
works 'with forceStop' pct shutdown 101 --timeout 2 --forceStop 1
phases 'with forceStop' pre-stop post-stop
rm /var/lib/lab-ct/101/etc/ignores-shutdown
works start pct start 101
: >$W/log
before=$(init_of 101)
works reboot pct reboot 101
took 'pct reboot'
phases reboot pre-stop post-stop pre-start post-start
ok 'another init' test "$(init_of 101)" != "$before"

# ---- from inside ----
before=$(init_of 101)
again() { local now; now=$(init_of 101) && [ -n "$now" ] && [ "$now" != "$before" ]; }
inside 101 'reboot -f' >/dev/null 2>&1
ok 'a reboot from inside' within 60 again
phases 'a reboot from inside'
inside 101 'poweroff -f' >/dev/null 2>&1
noted() { grep -q "^$1 " $W/log; }
ok 'an end from inside' within 60 noted post-stop
is 'the lock is not held then' free "$(of post-stop lock)"
phases 'an end from inside' post-stop
within 30 stopped 101

# ---- past Proxmox ----
works 'systemctl start' systemctl start pve-container@101
ok 'systemctl start' within 30 inside 101 true
phases 'systemctl start'
works 'systemctl stop' systemctl stop pve-container@101
phases 'systemctl stop' post-stop

# ---- starts that fail ----
tell pre-start 'exit 3'
fails 'pre-start fails' "hookscript error for 101 on pre-start: command '/var/lib/vz/snippets/note 101 pre-start' failed: exit code 3" \
    pct start 101
phases 'pre-start fails' pre-start
tell pre-start 'mknod -m 666 /dev/late c 1 3'
works 'a node made in pre-start' pct start 101
ok 'comes with an optional mount entry' inside 101 'test -c /dev/late'
works stop pct stop 101
rm -f /dev/late
sed -i 's|^dev0: .*|dev0: /dev/late|' $conf/101.conf
: >$W/log
fails 'and is too late for dev[n]' 'Device /dev/late does not exist' pct start 101
phases 'and is too late for dev[n]'
forget
rm -f /dev/late
config_of 101 'lxc.mount.entry: /nowhere mnt none bind'
call pct start 101
is 'LXC cannot start it' "255 startup for container '101' failed" "$rc $(tail -n 1 <<<"$err")"
ok 'LXC says why' grep -q 'mount_entry.*nowhere' <<<"$err"
ok 'post-stop comes after all' within 30 noted post-stop
phases 'LXC cannot start it' pre-start post-stop
config_of 101 'dev0: /dev/nvidia0'
works 'a node that is given once' pct start 101
works 'stop' pct stop 101
config_of 101 'dev0: /dev/nvidia0' 'lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file'
: >$W/log
call pct start 101
is 'a node that is given twice' "255 startup for container '101' failed" "$rc $(tail -n 1 <<<"$err")"
# Why it died LXC tells only whoever debugs it.
ok 'its autodev hook dies' grep -q 'Failed to run autodev hooks' /run/pve/ct-101.stderr
ok 'post-stop comes after all' within 30 noted post-stop
within 30 stopped 101
: >$W/log
for type in unmanaged nixos; do
    config_of 101 'dev0: /dev/nvidia0'
    sed -i "s/^ostype: .*/ostype: $type/" $conf/101.conf
    fails "dev[n] of a privileged one, $type" 'Device /dev/nvidia0 does not exist' pct start 101
    phases "dev[n] of a privileged one, $type"
done
config_of 102 --unprivileged 'dev0: /dev/nvidia0'
sed -i 's/^ostype: .*/ostype: unmanaged/' $conf/102.conf
works 'dev[n] of an unprivileged one, unmanaged' pct start 102
works 'stop' pct stop 102
: >$W/log
config_of 101

# ---- pmxcfs without quorum, and gone ----
lab-pve no-quorum
call pct set 101 --onboot 1
is 'set without quorum' \
    "2 unable to open file '/etc/pve/nodes/pve1/lxc/101.conf.tmp.PID' - Permission denied" \
    "$rc $(sed 's/tmp\.[0-9]*/tmp.PID/' <<<"$err")"
call pct start 101
says 'start without quorum' 'cluster not ready - no quorum?'
lab-pve quorum
lab-pve down
call pct status 101
exits 'pmxcfs is gone' 111
lab-pve up
phases 'neither'

# ---- locks ----
(exec 9>>/run/lock/lxc/pve-config-101.lock && flock 9 && exec sleep 1000) &
holder=$!
sleep 1
call pct set 101 --onboot 1
is 'outside of a task: a lock that is held' '4 trying to acquire lock...' "$rc $(head -n 1 <<<"$err")"
fails 'the lock is held' "can't lock file '/run/lock/lxc/pve-config-101.lock' - got timeout" pct start 101
kill $holder
wait
echo 'lock: backup' >>$conf/101.conf
fails 'lock: backup' 'CT is locked (backup)' pct start 101
fails 'set with lock: backup' 'CT is locked (backup)' pct set 101 --onboot 1
phases 'lock: backup'
works 'skiplock' pct start 101 --skiplock 1
works 'unlock' pct unlock 101
fails 'unlock' 'no lock found trying to remove any lock' pct unlock 101

# ---- pending changes, snapshots ----
cat >>$conf/101.conf <<'END'

[before]
cores: 2
lxc.environment: OLD=1
END
works 'set while it runs' pct set 101 --memory 96 --onboot yes --delete swap
same 'what waits and what does not' $'memory: 64\nonboot: 1\nswap: 0\n[pve:pending]\ndelete: swap\nmemory: 96\n[before]' \
    "$(grep -E '^(memory|onboot|swap|delete|\[)' $conf/101.conf)"
is 'pct config' 'memory: 96' "$(pct config 101 | grep -E '^(memory|swap)')"
is 'pct config --current' 'memory: 64 swap: 0' "$(pct config 101 --current | grep -E '^(memory|swap)' | paste -sd' ')"
works stop pct stop 101
took 'pct stop'
is 'applied when it ends' 'memory: 96' "$(grep -E '^(memory|swap|\[pve)' $conf/101.conf)"
same 'the snapshot is as it was' $'[before]\ncores: 2\nlxc.environment: OLD=1' "$(sed -n '/^\[before/,$p' $conf/101.conf)"
fails 'a raw key' '400 unable to parse option' sh -c 'pct set 101 --lxc.cap.drop x 2>&1 | sed -n 2p >&2; exit 255'

# ---- HA: a request is not the deed ----
: >$W/log
echo 4 >/run/pve/ha-managed-101
call pct start 101
is 'start under HA' '0 Requesting HA start for CT 101' "$rc $out"
ok 'it does not run yet' stopped 101
phases 'start under HA'
ok 'it runs later' within 60 noted post-start
phases 'later' pre-start post-start
call pct shutdown 101
is 'shutdown under HA' '0 Requesting HA stop for CT 101' "$rc $out"
ok 'it still runs' runs 101
ok 'it is stopped later' within 60 noted post-stop
phases 'later' pre-stop post-stop
within 30 stopped 101
rm /run/pve/ha-managed-101
lab-ct destroy 101
ok 'destroyed' test ! -e $conf/101.conf
finish
