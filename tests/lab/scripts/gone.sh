#!/bin/bash
# A card that fell off the bus: its configuration space reads ones, because the port above it passes nothing on.
# lab: --timeout 400
# lab: --driver genuine --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

port=$(basename "$(readlink -f "$pci/$slot1.0/..")")
bus=$(setpci -s "$port" SECONDARY_BUS)
fall() { setpci -s "$port" SECONDARY_BUS=f0 SUBORDINATE_BUS=f0; }
return_() { setpci -s "$port" SECONDARY_BUS="$bus" SUBORDINATE_BUS="$bus"; }
first_bytes() { od -An -tx1 -N4 "$pci/$slot1.0/config" | tr -d ' '; }

remember_home
before=$(snapshot)
fall
is 'its first bytes' ffffffff "$(first_bytes)"
call $hook 111 pre-start
exits 'pre-start' 3
one_line 'pre-start'
says 'pre-start' "$slot1 was not touched: $slot1.0 does not answer" 'rescan' 'power cycle'
quick 'pre-start' 2000
call gpu-handoff plan 111
exits 'plan' 3
# The driver would look for the end of a list of capabilities that has none.
for verb in --status doctor 'doctor 111'; do
    # shellcheck disable=SC2086 # the words of a call
    call gpu-handoff $verb
    quick "$verb" 5000
    ok "$verb leaves nobody behind" not pgrep -x gpu-handoff
done
untouched 'a card that is gone' "$before"
return_
is 'its first bytes' 34121111 "$(first_bytes)"
is_home 'back on the bus'

# ---- it falls while a VM has it ----
works 'pre-start' $hook 111 pre-start
fall
call $hook 111 post-stop
says 'post-stop' "$slot1.0 does not answer" 'going home as far as it gets'
return_
works 'to-nvidia' gpu-handoff to-nvidia
is_home 'home in the end'
finish
