#!/bin/bash
# One card goes to a VM and comes home, many times and in every way that
# Proxmox or a person can ask for it.
# lab: --timeout 400
# lab-genuine: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

same 'home' "$slot1.0 nvidia"$'\n'"$slot1.1 snd_hda_intel" "$(all_of driver_of)"
remember_home
at_home=$(snapshot)
is_home 'before'
works 'history of nothing' gpu-handoff history
is 'history of nothing' 'no handoff yet' "$out"
past() { gpu-handoff history --json; }

# ---- Proxmox starts and stops the VM ----
for trip in {1..20}; do
    if [ "$trip" = 7 ]; then
        # What a start without this hook leaves behind: ids that vfio-pci keeps.
        echo '10de 2684' >$vfio_driver/new_id
        echo '10de 22ba' >$vfio_driver/new_id
        same 'ids registered while the card is at home' "$home_drivers" "$(all_of driver_of)"
    fi
    works "trip $trip: qm start" qm start 111
    started=$ms
    in_vm "trip $trip" $slot1 111
    works "trip $trip: qm stop" qm stop 111
    echo "# trip $trip: qm start $started ms, qm stop $ms ms"
    is_home "trip $trip"
done

# ---- each of them is in the history, in order ----
expected=$(for trip in {1..20}; do printf '%s\n' '"direction":"vfio","exit":0' '"direction":"home","exit":0'; done)
same 'history of the trips' "$expected" "$(past | sed -n 's/^{\("direction":"[a-z]*","exit":[0-9]*\),.*"vmid":111}$/\1/p')"
is 'history: phases of the last' 'wait release bind clear' \
    "$(past | tail -n 1 | grep -o '"name":"[a-z]*"' | cut -d'"' -f4 | grep -vx complete | paste -sd' ')"
works 'history' gpu-handoff history
is 'history: lines' 40 "$(wc -l <<<"$out")"
is 'history: the last' "VM 111 -> host $slot1 done" "$(awk 'END { sub(/^[0-9-]+ /, ""); print $2, $3, $4, $5, $6, $NF }' <<<"$out")"

# ---- the hook by hand: each direction twice, the second time for nothing ----
works 'pre-start' $hook 111 pre-start
is 'pre-start: standard output' '' "$out"
says 'pre-start' "$slot1" 'VM 111' 'unload nvidia_' ' ms'
in_no_vm 'pre-start' $slot1
away=$(snapshot)
works 'pre-start again' $hook 111 pre-start
quick 'pre-start again' 2000
untouched 'pre-start again' "$away"
works 'post-stop' $hook 111 post-stop
is 'post-stop: standard output' '' "$out"
says 'post-stop' "$slot1" 'VM 111' ' ms'
is_home 'post-stop'
works 'post-stop again' $hook 111 post-stop
quick 'post-stop again' 2000
silent 'post-stop again'
untouched 'post-stop again' "$at_home"

# ---- what the hook has nothing to do with ----
for call in '111 post-start' '111 pre-stop' '111 no-such-phase' \
    '100 pre-start' '100 post-start' '100 pre-stop' '100 post-stop' '100 no-such-phase'; do
    # shellcheck disable=SC2086 # two words
    works "$call" $hook $call
    silent "$call"
    quick "$call" 2000
done
untouched 'silent phases' "$at_home"

# ---- a person, in every spelling ----
spellings=("to-vfio|to-nvidia" "to_vfio $slot1|to_nvidia $slot1" "handoff vfio|handoff nvidia" "to-vfio 01:00|to-nvidia 01:00.0")
for pair in "${spellings[@]}"; do
    there=${pair%|*} back=${pair#*|}
    # shellcheck disable=SC2086 # words
    works "$there" gpu-handoff $there
    is "$there: standard output" '' "$out"
    in_no_vm "$there" $slot1
    is "$there: owner" 'manual null' "$(status $slot1 owner.kind owner.vmid)"
    # shellcheck disable=SC2086
    works "$there again" gpu-handoff $there
    # shellcheck disable=SC2086
    works "$back" gpu-handoff $back
    is "$back: standard output" '' "$out"
    is_home "$back"
done
works 'to-nvidia at home' gpu-handoff to-nvidia
untouched 'to-nvidia at home' "$at_home"

# ---- what a person gave to vfio-pci stays there, whatever a VM does ----
works 'to-vfio' gpu-handoff to-vfio
by_hand=$(snapshot)
works 'qm start while by hand' qm start 111
in_vm 'by hand' $slot1 111
works 'qm stop while by hand' qm stop 111
is 'by hand, after the VM: owner' 'manual null' "$(status $slot1 owner.kind owner.vmid)"
untouched 'by hand, after the VM' "$by_hand"
works 'to-nvidia' gpu-handoff to-nvidia
is_home 'to-nvidia after the VM'

# ---- the status names what it promises ----
missing=$(status $slot1 owner.kind owner.vmid functions.0.address functions.0.class functions.0.id \
    functions.0.driver functions.0.home functions.0.override functions.0.iommu_group functions.1.address \
    users wedged last.direction last.vmid last.exit last.ms last.phases.0.name last.phases.0.ms)
same 'no field is missing' '' "$(grep MISSING <<<"$missing")"
is 'card in the status' "$slot1.0 030000 10de:2684 nvidia nvidia null" \
    "$(status $slot1 functions.0.address functions.0.class functions.0.id functions.0.driver functions.0.home functions.0.override)"
is 'last handoff in the status' 'home null 0' "$(status $slot1 last.direction last.vmid last.exit)"

# ---- what was refused is in the history, what was only asked about is not ----
before=$(past)
works 'plan' gpu-handoff plan 111
works 'to-vfio --dry-run' gpu-handoff to-vfio --dry-run
works 'to-nvidia at home' gpu-handoff to-nvidia
same 'history of no handoff' "$before" "$(past)"
hold /dev/nvidia0
call qm start 111
release
ok 'qm start while busy fails' [ "$rc" != 0 ]
is 'history while busy: new lines' 1 "$(past | tail -n +$(($(wc -l <<<"$before") + 1)) | wc -l)"
refused=$(past | tail -n 1)
ok 'history while busy: exit code' grep -q '"direction":"vfio","exit":3,' <<<"$refused"
ok 'history while busy: who' grep -q "PID $holder (perl" <<<"$refused"
is 'history while busy: for people' "refused" "$(gpu-handoff history | awk 'END { sub(/^[0-9-]+ /, ""); print $9 }')"
is 'mode of the history' '644 755' "$(stat -c %a /var/lib/gpu-handoff/history.jsonl /var/lib/gpu-handoff | paste -sd' ')"
finish
