#!/bin/bash
# The real hang: a process has the GPU open, the look for it is blinded, and unbinding
# does not come back. The hook does, within its time box; the lock is free; the other
# card works; and where the driver lets go in the end, the card comes home by itself.
# From 595.45.04 on it does not for a card that was attached to an nvidiactl.
# lab: --gpus 2 --driver genuine --timeout 400
# lab: --gpus 2 --driver-version 580.95.05 --timeout 400
# lab: --gpus 2 --driver-version 595.45.04 --modeset 0 --timeout 400
# lab-build: failpoints
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

budget=6
mkdir -p "${config%/*}"
echo "{\"time\":{\"handoff_s\":$budget}}" >"$config"
remember_home
export GPU_HANDOFF_TEST_BLIND=1
minor=$(minor_of $slot1)

for round in 1 2; do
    # The second round shows that all of it can happen again; and what never ends.
    forever=
    if [ $round = 2 ] && [[ $LAB_DRIVER == 595.* ]]; then
        forever=1
        attach 100
    else
        hold "/dev/nvidia$minor"
    fi

    # ---- the hook's pipe ends when the hook does ----
    begin=${EPOCHREALTIME/./}
    { $hook 111 pre-start </dev/null; echo "exit $?"; } 2>&1 | cat >/run/hook.out
    ms=$(((${EPOCHREALTIME/./} - begin) / 1000))
    is 'the hook' 'exit 4' "$(tail -n 1 /run/hook.out)"
    quick 'the hook, until its pipe ended,' $((budget * 1000 + 1000))
    err=$(</run/hook.out)
    says 'the hook' "$slot1 is wedged and left alone" "unbind from nvidia $slot1.0" 'PID '
    ok 'the lock is free' flock -n "$records/lock" true
    is 'owner in the status' 'wedged 111' "$(status $slot1 owner.kind owner.vmid)"
    is 'step in the status' "unbind from nvidia $slot1.0" "$(status $slot1 wedged.step)"
    stuck=$(status $slot1 wedged.pid)
    is 'state of the process in the status' S "$(state_of "$stuck")"
    kill -TERM "$stuck"
    is 'after a SIGTERM, which would make the driver compute instead of sleep, it' sleeps "$(doing "$stuck")"
    is 'descriptors of the stuck process but its own' 0 \
        "$(find "/proc/$stuck/fd" -lname '*lock*' -o -lname '/run/hook.out' | wc -l)"

    # ---- refused at once ----
    for phase in pre-start post-stop; do
        call $hook 111 $phase
        exits "$phase again" 4
        says "$phase again" "$slot1 is wedged and left alone"
        quick "$phase again" 1500
    done
    call gpu-handoff to-nvidia $slot1
    exits 'to-nvidia' 4

    # ---- the other card ----
    works 'the other card: qm start' qm start 112
    in_vm 'the other card' $slot2 112
    works 'the other card: qm stop' qm stop 112
    is 'the other card: drivers' 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
    is 'still wedged' 'wedged 111' "$(status $slot1 owner.kind owner.vmid)"

    # ---- the node is closed ----
    release
    if [ -n "$forever" ]; then
        sleep 5
        is 'this driver never lets go of such a card' S "$(state_of "$stuck")"
        call $hook 111 pre-start
        exits 'pre-start after the node was closed' 4
        quick 'pre-start after the node was closed' 1500
        works 'the other card: by hand' gpu-handoff to-vfio $slot2
        works 'the other card: home' gpu-handoff to-nvidia $slot2
        is 'the other card: drivers' 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
        break
    fi
    home_again() { [ -z "$(kept)" ] && [ "$(all_of driver_of)" = "$home_drivers" ]; }
    ok 'home by itself' within 20 home_again
    is_home "home by itself, round $round"
done
finish
