#!/bin/bash
# Random operations with random kills; whatever happens, the card is never lost, and a
# stopped VM and one more run bring it home.
#   soak.sh [OPERATIONS [SEED]]
# lab: --timeout 600
# lab-genuine: --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

operations=${1:-20}
RANDOM=${2:-20261120}
echo "# $operations operations, seed ${2:-20261120}"
remember_home
at_home=$(snapshot)
stranded=0 lost=0 kills=0

pick() {
    local words=("$@")
    picked=${words[RANDOM % $#]}
}
# Mostly what has something to do as things are, or few kills would hit a handoff; now and
# then anything at all.
pick_operation() {
    local leave=('qm start 111' 'qm start 111' "$hook 111 pre-start" 'gpu-handoff to-vfio')
    local come=("$hook 111 post-stop" 'gpu-handoff to-nvidia' 'gpu-handoff reconcile' 'qm start 111')
    if ((RANDOM % 5 == 0)); then pick "${leave[@]}" "${come[@]}" 'qm stop 111'
    elif runs_in_qemu; then picked='qm stop 111'
    elif is_at_home; then pick "${leave[@]}"
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
# Either may be hit, or both.
kill_some() {
    find_handoffs || return 0
    kills=$((kills + 1))
    if ((RANDOM % 3)); then kill -KILL "${pids[RANDOM % ${#pids[@]}]}" 2>/dev/null
    else kill -KILL "${pids[@]}" 2>/dev/null; fi
    return 0
}
runs_in_qemu() { [ "$(qm status 111)" = 'status: running' ]; }
is_at_home() { [ "$(all_of driver_of)" = "$home_drivers" ]; }
nobody_at_it() { ! pgrep -x gpu-handoff >/dev/null; }

for ((i = 1; i <= operations; i++)); do
    pick_operation
    operation=$picked
    timeout 120 $operation </dev/null >/run/soak.out 2>&1 &
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
    # What outlives a killed run is done before it counts.
    within 20 nobody_at_it || { echo "FAIL: somebody still works after operation $i" && failures=$((failures + 1)); }
    kept=$(kept)
    if [ -z "$kept" ] && ! is_at_home; then
        lost=$((lost + 1))
        echo "FAIL: operation $i, $operation$killed: lost: $(all_of driver_of | xargs)"
        failures=$((failures + 1))
    fi
    echo "# $i: $operation$killed -> $code; $(all_of driver_of | xargs); ${kept:-no record}"
    if ((i % 10 == 0)) || [ "$i" = "$operations" ]; then
        qm stop 111 >/dev/null 2>&1
        gpu-handoff reconcile >/dev/null 2>&1
        gpu-handoff to-nvidia >/dev/null 2>&1
        [ "$(snapshot)" = "$at_home" ] || stranded=$((stranded + 1))
        same "after $i operations: as before" "$at_home" "$(snapshot)"
    fi
done
echo "soak: $operations operations, $kills kills, $stranded stranded, $lost lost"
is 'stranded and lost' '0 0' "$stranded $lost"
is_home 'in the end'
finish
