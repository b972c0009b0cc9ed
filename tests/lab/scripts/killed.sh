#!/bin/bash
# A handoff that is killed anywhere is finished by whoever comes next.
# lab: --timeout 400
# lab-genuine: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)

# How long each way takes here, undisturbed, decides at which moments to kill.
there=100000 back=100000
for _ in 1 2 3; do
    works 'pre-start' $hook 111 pre-start
    [ "$ms" -ge "$there" ] || there=$ms
    works 'post-stop' $hook 111 post-stop
    [ "$ms" -ge "$back" ] || back=$ms
done
echo "# pre-start takes $there ms, post-stop $back ms"

moment() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }
# As Proxmox does around a hook: without it a VM that does not run is given up,
# and its card fetched home by what the killed handoff left behind.
guest_lock() { exec 8>/var/lock/qemu-server/lock-111.conf && flock 8; }
guest_unlock() { exec 8>&-; }
kill_after() { # kill_after MILLISECONDS COMMAND…
    local after=$1 child
    shift
    "$@" </dev/null >/dev/null 2>/run/killed.err 8>&- &
    child=$!
    disown
    sleep "$(moment "$after")"
    kill -KILL "$child" 2>/dev/null && killed=yes || killed='no, it was faster'
    within 10 has_gone "$child"
}
converged() { # converged TEXT
    same "$1: as before" "$at_home" "$(snapshot)"
    is "$1: owner" 'host null' "$(status $slot1 owner.kind owner.vmid)"
}

steps=12
for ((i = 0; i <= steps; i++)); do
    after=$((there * 11 * i / 10 / steps))
    kill_after $after $hook 111 pre-start
    text="pre-start killed after $after ms ($killed)"
    case $((i % 3)) in
        0) # the stop that follows
            works "$text: post-stop" $hook 111 post-stop ;;
        1) # the start is tried again
            guest_lock
            works "$text: pre-start again" $hook 111 pre-start
            in_no_vm "$text" $slot1
            works "$text: post-stop" $hook 111 post-stop
            guest_unlock ;;
        2) # a person fixes it; before the first write there is nothing to fix
            works "$text: to-nvidia" gpu-handoff to-nvidia ;;
    esac
    converged "$text"
done
for ((i = 0; i <= steps; i++)); do
    after=$((back * 11 * i / 10 / steps))
    call $hook 111 pre-start
    kill_after $after $hook 111 post-stop
    text="post-stop killed after $after ms ($killed)"
    case $((i % 3)) in
        0) works "$text: post-stop again" $hook 111 post-stop ;;
        1) # the VM is started instead
            guest_lock
            works "$text: pre-start" $hook 111 pre-start
            in_no_vm "$text" $slot1
            works "$text: post-stop" $hook 111 post-stop
            guest_unlock ;;
        2) works "$text: to-nvidia" gpu-handoff to-nvidia ;;
    esac
    converged "$text"
done

# ---- the same under Proxmox ----
kill_after $((there / 2)) $hook 111 pre-start
works 'pre-start killed half-way: qm start' qm start 111
in_vm 'pre-start killed half-way' $slot1 111
works 'pre-start killed half-way: qm stop' qm stop 111
converged 'pre-start killed half-way'
call $hook 111 pre-start
kill_after $((back / 2)) $hook 111 post-stop
works 'post-stop killed half-way: qm start' qm start 111
in_vm 'post-stop killed half-way' $slot1 111
works 'post-stop killed half-way: qm stop' qm stop 111
is_home 'in the end'
finish
