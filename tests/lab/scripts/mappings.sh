#!/bin/bash
# Cards by the name of a resource mapping: alternatives, one taken, both in the same second, one stale.
# lab: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
map() { # map SLOT [ID]: an entry that says of the card what Proxmox sees
    local f=$pci/$1.0 subsystem=''
    [ ! -e "$f/subsystem_vendor" ] ||
        subsystem=",subsystem-id=$(sed 's/0x//' "$f/subsystem_vendor"):$(sed 's/0x//' "$f/subsystem_device")"
    printf '\tmap id=%s,iommugroup=%s,node=%s,path=%s%s\n' "${2:-$(sed 's/0x//' "$f/vendor"):$(sed 's/0x//' "$f/device")}" \
        "$(basename "$(readlink "$f/iommu_group")")" "$(hostname)" "$1" "$subsystem"
}
mkdir -p /etc/pve/mapping
{ echo gpu && map $slot1 && map $slot2 && echo && echo one && map $slot2; } >/etc/pve/mapping/pci.cfg
for vmid in 111 112; do guest $vmid 'mapping=gpu'; done
guest 113 'mapping=one'

# ---- one alternative ----
works 'one: qm start' qm start 113
in_vm 'one' $slot2 113
ok 'one: status names the mapping' grep -q '^  mapping  gpu, one$' <(gpu-handoff --status)

# ---- the first that is free ----
works 'the first: qm start' qm start 111
in_vm 'the first' $slot1 111
call qm start 112
is 'none is free: exit code' 255 "$rc"
says 'none is free' 'of which none is free' "VM 111 has it"
works 'the first: qm stop' qm stop 111
works 'one: qm stop' qm stop 113
is_home 'both'

# ---- one is taken ----
works 'taken: qm start' qm start 111
works 'taken: the other' qm start 112
in_vm 'taken, VM 111' $slot1 111
in_vm 'taken, VM 112' $slot2 112
works 'taken: qm stop' qm stop 111
works 'taken: qm stop' qm stop 112
is_home 'taken'

# ---- both in the same second ----
slot_in_vm() { # slot_in_vm VMID: what its QEMU was given
    tr '\0' '\n' <"/proc/$(</run/qemu-server/"$1".pid)/cmdline" | sed -n 's/.*host=\([0-9a-f:]*\)\.0,.*/\1/p'
}
for round in 1 2 3 4 5; do
    starts=()
    for vmid in 111 112; do
        qm start $vmid </dev/null >/run/start-$vmid.out 2>&1 &
        starts+=($!)
    done
    for start in "${starts[@]}"; do
        code=0
        wait "$start" || code=$?
        is "same second, round $round: exit code" 0 $code
        [ $code = 0 ] || sed 's/^/    | /' /run/start-11?.out
    done
    first=$(slot_in_vm 111) second=$(slot_in_vm 112)
    is "same second, round $round: both cards" "$slot1 $slot2" "$(printf '%s\n' "$first" "$second" | sort | paste -sd' ')"
    # Whoever has looked after the start has put the records right.
    recorded() { grep -q "$first" $records/vm-111 && grep -q "$second" $records/vm-112; }
    ok "same second, round $round: on record" within 10 recorded
    works 'same second: qm stop' qm stop 111
    works 'same second: qm stop' qm stop 112
    is_home "same second, round $round"
done

# ---- one is stale ----
{ echo gpu && map $slot1 && map $slot2 10de:1234; } >/etc/pve/mapping/pci.cfg
call $hook 111 pre-start
exits 'stale' 3
says 'stale' 'Proxmox refuses' "'id' does not match for 'gpu'"
untouched 'stale' "$at_home"
finish
