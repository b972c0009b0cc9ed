#!/bin/bash
# Killed with SIGKILL before and after every step of both directions: the next run
# converges, and so does nobody's run, because the worker that outlives its handoff
# puts it right. Asked to end with SIGTERM, the way there is undone.
# lab: --timeout 900
# lab-genuine: --timeout 1350
# lab-build: failpoints
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)

# As Proxmox does around a hook: a VM whose lock is held is being started.
guest_lock() { exec 8>/var/lock/qemu-server/lock-111.conf && flock 8; }
guest_unlock() { exec 8>&-; }
# killed_at POINT PHASE [VARIABLE=1]: false when the handoff has no such step
killed_at() {
    local point=$1 phase=$2
    shift 2
    call env "GPU_HANDOFF_TEST_KILL=$point" "$@" $hook 111 "$phase"
    [ "$rc" = 137 ]
}
same_as_home() { [ "$(snapshot)" = "$at_home" ]; }
converged() { # converged TEXT
    same "$1: as before" "$at_home" "$(snapshot)"
    is "$1: owner" 'host null' "$(status $slot1 owner.kind owner.vmid)"
}

steps=0
for point in before after; do
    # ---- towards the VM ----
    for ((n = 1; ; n++)); do
        killed_at "$point:$n" pre-start GPU_HANDOFF_TEST_ALONE=1 || break
        text="pre-start killed $point step $n"
        steps=$((steps + 1))
        if ((n % 2)); then
            works "$text: post-stop" $hook 111 post-stop
        else
            guest_lock
            works "$text: pre-start again" $hook 111 pre-start
            in_no_vm "$text" $slot1
            works "$text: post-stop" $hook 111 post-stop
            guest_unlock
        fi
        converged "$text"
    done
    is "pre-start not killed any more at $point:$n: exit code" 0 "$rc"
    in_no_vm "pre-start not killed any more" $slot1

    # ---- home ----
    for ((n = 1; ; n++)); do
        [ "$n" = 1 ] || works 'the way there' $hook 111 pre-start
        killed_at "$point:$n" post-stop GPU_HANDOFF_TEST_ALONE=1 || break
        text="post-stop killed $point step $n"
        steps=$((steps + 1))
        if ((n % 2)); then
            works "$text: post-stop again" $hook 111 post-stop
        else
            guest_lock
            works "$text: pre-start" $hook 111 pre-start
            in_no_vm "$text" $slot1
            works "$text: post-stop" $hook 111 post-stop
            guest_unlock
        fi
        converged "$text"
    done
    is "post-stop not killed any more at $point:$n: exit code" 0 "$rc"
    converged 'post-stop not killed any more'

    # ---- nobody comes: the worker's last act ----
    for ((n = 1; ; n += 3)); do
        killed_at "$point:$n" pre-start || break
        ok "pre-start killed $point step $n: home by itself" within 20 same_as_home
    done
    works 'home from the run that was not killed' $hook 111 post-stop
    for ((n = 2; ; n += 3)); do
        works 'the way there' $hook 111 pre-start
        killed_at "$point:$n" post-stop || break
        ok "post-stop killed $point step $n: home by itself" within 20 same_as_home
    done
    converged 'in the end'
done
# Two overrides, four modules, an unbind and two probes there; as many back.
ok "$steps steps were killed, at least 30" [ "$steps" -ge 30 ]

# ---- asked to end ----
for n in 1 3 6 8; do
    call env "GPU_HANDOFF_TEST_TERM=before:$n" $hook 111 pre-start
    exits "SIGTERM before step $n of pre-start" 1
    says "SIGTERM before step $n of pre-start" 'asked to end' 'back where it was'
    quick "SIGTERM before step $n of pre-start" 5000
    converged "SIGTERM before step $n of pre-start"
done
works 'the way there' $hook 111 pre-start
works 'SIGTERM on the way home' env GPU_HANDOFF_TEST_TERM=before:3 $hook 111 post-stop
converged 'SIGTERM on the way home'
finish
