#!/bin/bash
# Two handoffs at once: with two cards they take turns, with one card one wins and the
# other is refused, told who has it.
# lab: --gpus 2 --timeout 400
# lab-genuine: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home

# at_once COMMAND COMMAND: exit codes in ${codes[@]}, standard error in /run/at-once.N
at_once() {
    local n=0 command pids=()
    for command; do
        n=$((n + 1))
        $command </dev/null >/dev/null 2>"/run/at-once.$n" &
        pids+=($!)
    done
    codes=()
    for n in "${pids[@]}"; do
        wait "$n" && codes+=(0) || codes+=($?)
    done
}

for round in 1 2; do
    # ---- two cards ----
    at_once 'qm start 111' 'qm start 112'
    is "round $round, two cards: exit codes of qm start" '0 0' "${codes[*]}"
    in_vm "round $round, VM 111" $slot1 111
    in_vm "round $round, VM 112" $slot2 112
    at_once 'qm stop 112' 'qm stop 111'
    is "round $round, two cards: exit codes of qm stop" '0 0' "${codes[*]}"
    is_home "round $round, two cards"
done

# ---- one card ----
guest 113 $slot1
for round in 1 2 3; do
    at_once 'qm start 111' 'qm start 113'
    if [ "${codes[0]}" = 0 ]; then winner=111 loser=113 n=2; else winner=113 loser=111 n=1; fi
    is "round $round, one card: exit codes" '0 255' "$(printf '%s\n' "${codes[@]}" | sort -n | xargs)"
    in_vm "round $round, the winner" $slot1 $winner
    err=$(<"/run/at-once.$n")
    says "round $round, the loser" "VM $winner has it" 'failed: exit code 3'
    is "round $round, the loser" 'status: stopped' "$(qm status $loser)"
    works "round $round, qm stop" qm stop $winner
    is_home "round $round, one card"
done

# ---- hooks by hand, without Proxmox's locks ----
at_once "$hook 111 pre-start" "$hook 112 pre-start"
is 'two cards by hand: exit codes' '0 0' "${codes[*]}"
at_once "$hook 111 post-stop" "$hook 112 post-stop"
is 'two cards by hand, home: exit codes' '0 0' "${codes[*]}"
at_once "$hook 111 pre-start" "$hook 113 pre-start"
is 'one card by hand: exit codes' '0 3' "$(printf '%s\n' "${codes[@]}" | sort -n | xargs)"
if [ "${codes[0]}" = 0 ]; then winner=111 n=2; else winner=113 n=1; fi
err=$(<"/run/at-once.$n")
says 'one card by hand, the loser' "VM $winner has it"
works 'one card by hand, home' $hook $winner post-stop
is_home 'in the end'
finish
