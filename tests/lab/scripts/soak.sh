#!/bin/bash
# Random operations on two cards with random kills, beside a container and a service that
# are stopped for one and a container that is frozen; whatever happens, and whoever is
# killed, the keeper brings everything home, and it alone.
#   soak.sh [OPERATIONS [SEED]]
# lab: --gpus 2 --timeout 900
# lab-genuine: --gpus 2 --timeout 1200
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

operations=${1:-12}
RANDOM=${2:-20261120}
echo "# $operations operations, seed ${2:-20261120}"
mkdir -p "${config%/*}"
printf '{"policy":{"container":"refuse","unit":"stop","containers":{"101":"stop"}},"time":{"stop_s":30}}\n' >"$config"
remember_home
at_home=$(snapshot)
stranded=0 frozen=0 stopped=0 lost=0 kills=0
guest 112 "$slot2,pcie=1"
with_keeper

node=/dev/nvidia$(minor_of $slot1)
mount="lxc.mount.entry: $node ${node#/} none bind,optional,create=file"
lab-ct create 101 'lxc.cgroup2.devices.allow: c 195:* rwm' "$mount"
printf '#!/bin/sh\nexec 3<%s\nexec sleep 10101\n' "$node" >/var/lib/lab-ct/101/etc/rc.local
chmod 755 /var/lib/lab-ct/101/etc/rc.local
lab-ct create 102 "$mount"
cat >/run/systemd/system/soak-user.service <<END
[Service]
ExecStart=/usr/bin/perl -e 'open F, "<", shift or exit 9; sleep 10000' $node
END
systemctl daemon-reload
pct start 101 >/dev/null 2>&1
pct start 102 >/dev/null 2>&1
systemctl start soak-user
runs() { [ "$(pct status "$1")" = 'status: running' ]; }
all_run() { runs 101 && runs 102 && systemctl --quiet is-active soak-user; }
who_runs() { echo "# 101 $(pct status 101), 102 $(pct status 102), soak-user $(systemctl is-active soak-user)"; }
none_frozen() { ! grep -qsx 1 /sys/fs/cgroup/lxc/10[12]/cgroup.freeze; }
ok 'all of them run' within 30 all_run

pick() {
    local words=("$@")
    picked=${words[RANDOM % $#]}
}
# Mostly what has something to do as things are, or few kills would hit a handoff; now and
# then anything at all.
pick_operation() { # pick_operation VMID SLOT
    local leave=("qm start $1" "qm start $1" "gpu-handoff to-vfio $2")
    local come=("gpu-handoff to-nvidia $2" 'gpu-handoff reconcile' "qm start $1" 'sleep 5')
    if ((RANDOM % 5 == 0)); then pick "${leave[@]}" "${come[@]}" "qm stop $1"
    elif runs_in_qemu "$1"; then picked="qm stop $1"
    elif is_home_now "$2"; then pick "${leave[@]}"
    else pick "${come[@]}"; fi
}
# Handoffs and their workers, which have the same name, in ${pids[@]}. Without a fork, or
# the handoff would be over before it is found.
find_handoffs() {
    local directory name
    pids=()
    for directory in /proc/[0-9]*; do
        { read -r name <"$directory/comm"; } 2>/dev/null || continue
        [ "$name" != gpu-handoff ] || pids+=("${directory##*/}")
    done
    [ "${#pids[@]}" -gt 0 ]
}
# Either may be hit, or all of them: the keeper, too.
kill_some() {
    find_handoffs || return 0
    kills=$((kills + 1))
    if ((RANDOM % 3)); then kill -KILL "${pids[RANDOM % ${#pids[@]}]}" 2>/dev/null
    else kill -KILL "${pids[@]}" 2>/dev/null; fi
    return 0
}
runs_in_qemu() { [ "$(qm status "$1")" = 'status: running' ]; }
is_home_now() { [ "$(driver_of "$1.0") $(driver_of "$1.1")" = 'nvidia snd_hda_intel' ]; }
is_as_before() { [ "$(snapshot)" = "$at_home" ]; }
record_of() { grep -lsF "$1" "$records"/vm-* "$records"/manual-*; }

for ((i = 1; i <= operations; i++)); do
    if ((RANDOM % 2)); then card=$slot1 vm=111; else card=$slot2 vm=112; fi
    pick_operation $vm "$card"
    operation=$picked
    timeout 240 $operation </dev/null >/run/soak.out 2>&1 &
    job=$!
    killed=
    if ((RANDOM % 2)); then
        # From when a handoff is at it: most of an operation is Proxmox's own.
        within 3 find_handoffs || true
        printf -v after '0.%03d' $((RANDOM % 500))
        sleep "$after"
        kill_some
        killed=" (SIGKILL after $after s)"
    fi
    code=0
    wait $job || code=$?
    ok "operation $i, $operation$killed: ends" [ "$code" != 124 ]
    for card in $slot1 $slot2; do
        if ! is_home_now $card && [ -z "$(record_of $card)" ] && ! is_home_now $card; then
            lost=$((lost + 1)) failures=$((failures + 1))
            echo "FAIL: operation $i, $operation$killed: lost: $(all_of driver_of | paste -sd" ")"
        fi
    done
    echo "# $i: $operation$killed -> $code; $(all_of driver_of | paste -sd" "); $(kept | cut -c1-60 | paste -sd" ")"
    if ((i % 10 == 0)) || [ "$i" = "$operations" ]; then
        qm stop 111 >/dev/null 2>&1
        qm stop 112 >/dev/null 2>&1
        # By hand lasts until the opposite call.
        for card in $slot1 $slot2; do
            [ ! -e "$records/manual-$card" ] || gpu-handoff to-nvidia $card >/dev/null 2>&1
        done
        within 120 is_as_before || stranded=$((stranded + 1))
        within 120 all_run || { stopped=$((stopped + 1)) && who_runs; }
        none_frozen || frozen=$((frozen + 1))
        same "after $i operations: as before" "$at_home" "$(snapshot)"
    fi
done
echo "soak: $operations operations, $kills kills, $stranded stranded, $frozen frozen, $stopped left stopped, $lost lost"
is 'stranded, frozen, left stopped, lost' '0 0 0 0' "$stranded $frozen $stopped $lost"
is_home 'in the end'
finish
