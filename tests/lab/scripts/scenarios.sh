#!/bin/bash
# The stories of tests/scenarios.txt, which the simulated kernel plays as well: what it
# claims, the real one confirms. Plays those that fit this boot.
# lab: --driver-version 580.105.08 --modeset 0 --timeout 400
# lab: --gpus 2 --driver-version 580.95.05 --modeset 1 --timeout 400
# lab: --gpus 2 --driver-version 595.45.04 --modeset 1 --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
homes=$LAB_HOME
[ "$LAB_GPUS" = 1 ] || homes+=+$LAB_HOME
here="$homes $LAB_DRIVER $LAB_MODESET"

slots_of() { # slots_of CARDS: 1,2 are two slots
    local card
    for card in ${1//,/ }; do echo "0000:0$card:00"; done
}
# The hook's own exit code stands in what qm says of a start that failed.
hook_code() { [[ $err =~ 'failed: exit code '([0-9]+) ]] && rc=${BASH_REMATCH[1]}; }
happen() {
    local slots
    case $1 in
        start | abort)
            mapfile -t slots < <(slots_of "$3")
            guest "$2" "${slots[@]}"
            ;;&
        start) call qm start "$2" && hook_code ;;
        stop) call qm stop "$2" ;;
        # From a shell of its own, which is gone when the start has been given up.
        abort) call bash -c "$hook $2 pre-start; exit \$?" ;;
        to-vfio | to-nvidia) call gpu-handoff "$1" "$(slots_of "$2")" ;;
        reconcile) call gpu-handoff reconcile ;;
        occupy) hold "/dev/nvidia$(minor_of "$(slots_of "$2")")" && rc=0 ;;
        vacate) release && rc=0 || rc=0 ;;
        *) rc="nobody knows how to $1" ;;
    esac
}
drivers() {
    local f of=()
    for f in "${functions[@]}"; do of+=("$(driver_of "$f")"); done
    echo "${of[*]}" | sed 's/\bnone\b/-/g'
}

played=0 name=''
while IFS= read -r line <&9; do
    case $line in
        '' | '#'*) continue ;;
        '  '*)
            [ -n "$name" ] || continue
            moment=${line%% = *} expected=${line#* = }
            # shellcheck disable=SC2086 # words
            happen $moment
            is "$name:$moment" "$expected" "$rc: $(drivers)"
            [ "$rc: $(drivers)" = "$expected" ] || sed 's/^/    | /' /run/call.err
            ;;
        *)
            [ -z "$name" ] || is_home "$name, in the end"
            name=
            [ "${line#* }" = "$here" ] || continue
            name=${line%% *}
            played=$((played + 1))
            ;;
    esac
done 9<"${0%/*}/scenarios.txt"
[ -z "$name" ] || is_home "$name, in the end"
ok "$played stories were played on '$here'" [ "$played" -gt 0 ]
finish
