#!/bin/bash
# NVIDIA's own driver where it is at its worst: its global lock is held, somebody is inside open(), a DRM device is left
# behind by a card that is away, a remove of somebody else's hangs. All is refused in time, with nothing touched.
# lab: --driver genuine --gpus 2 --modeset 0 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

nvshim=/sys/module/nvshim/parameters
remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"

# start_card: somebody opens card 1 and is inside open() until it is started
start_card() {
    local before
    before=$(cat /sys/module/nvidia/refcnt)
    echo 600000 >$nvshim/stall_ms
    bg perl -e 'open F, "<", "/dev/nvidia0" or exit 1; sleep 1000'
    opener=$job
    counted() { [ "$(cat /sys/module/nvidia/refcnt)" -gt "$before" ]; }
    ok 'a program is inside open()' within 20 counted
    is 'and has no descriptor' 0 "$(find "/proc/$opener/fd" -lname '/dev/nvidia*' | wc -l)"
}
is_started() { echo 0 >$nvshim/stall_ms; }

# ---- the driver's lock is held, for minutes: whatever reads its /proc waits for it ----
echo '{"time":{"handoff_s":6}}' >"$config"
start_card
works 'lock held: --status' gpu-handoff --status
quick 'lock held: --status' 6000
call $hook 111 pre-start
exits 'lock held: pre-start' 3
quick 'lock held: pre-start' 7500
one_line 'lock held: pre-start'
ok 'lock held: nobody is said to be stranded' not grep -q stranded <<<"$err"
call gpu-handoff reconcile
quick 'lock held: reconcile' 12000
ok 'lock held: all the while' not has_gone "$opener"
is_started
ok 'the lock is free' within 30 has_gone "$opener"
untouched 'lock held' "$at_home"
echo '{}' >"$config"

# ---- somebody is inside open(), and then has it: unbinding would have waited for ever ----
echo Y >$nvshim/stall_ok
start_card
call $hook 111 pre-start
exits 'opening' 3
is_started
ok 'opening: it has the card in the end' within 20 has_open "$opener" /dev/nvidia0
untouched 'opening' "$at_home"
kill -KILL "$opener"
within 10 has_gone "$opener"
echo N >$nvshim/stall_ok
works 'nobody opens it any more: pre-start' $hook 111 pre-start
works 'nobody opens it any more: post-stop' $hook 111 post-stop
is_home 'after the lock'

# ---- card 1 is away and its DRM device is still there: who has that open is named, or is in nobody's way ----
left=/dev/dri/$(drm_name $slot1.0)
works 'left behind: pre-start 111' $hook 111 pre-start
if [ -c "$left" ]; then
    hold "$left"
    call $hook 112 pre-start
    if [ "$rc" = 0 ]; then
        in_no_vm 'left behind' $slot2
    else
        exits 'left behind: pre-start 112' 3
        says 'left behind: pre-start 112' "PID $holder" "$left"
        is 'left behind: card 2' 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
    fi
    release
fi
works 'left behind: post-stop 112' $hook 112 post-stop
works 'left behind: post-stop 111' $hook 111 post-stop
is_home 'after the DRM device'

# ---- what the status names is there ----
hold "$left"
named=$(status $slot1 users.0.via)
ok "the status names a node that is there: $named" test -c "$named"
release

# ---- a remove of somebody else's hangs ----
hold /dev/nvidia0
bg unbind $slot1.0
stuck=$job
refused() { [ "$rc" = 3 ] || [ "$rc" = 4 ]; }
says_so() { dmesg | grep -q 'with non-zero usage count'; }
ok 'a remove hangs' within 20 says_so
works 'a remove hangs: --status' timeout 20 gpu-handoff --status
ok "a remove hangs: --status does not say that nothing is the matter" grep -qi 'hang\|wedged\|stuck\|remov\|unbind\|unbound' <<<"$out$err"
for command in "gpu-handoff to-vfio $slot1" "$hook 111 pre-start"; do
    # shellcheck disable=SC2086 # words
    call timeout 30 $command
    ok "a remove hangs: $command is refused ($rc)" refused
    one_line "a remove hangs: $command"
    is "a remove hangs: $command: the audio function" snd_hda_intel "$(driver_of $slot1.1)"
done
is 'a remove hangs: overrides' '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
works 'a remove hangs: the other card' $hook 112 pre-start
works 'a remove hangs: the other card, home' $hook 112 post-stop
release
ok 'it came back when its user ended' within 20 has_gone "$stuck"
probe $slot1.0
works 'afterwards: pre-start' $hook 111 pre-start
works 'afterwards: post-stop' $hook 111 post-stop
is_home 'afterwards'
finish
