#!/bin/bash
# Everything that can say no says so before anything is touched.
# lab: --gpus 2 --timeout 400
# lab-genuine: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"

# refuses TEXT CODE WORDS… : the last call did, in one line, touching nothing
refuses() {
    local text=$1
    exits "$text" "$2"
    is "$text: standard output" '' "$out"
    one_line "$text"
    shift 2
    says "$text" "$@"
    untouched "$text" "$at_home"
}
hook_() { call $hook "$1" pre-start; }

# ---- what the guest's configuration says ----
hook_ 999
refuses 'unknown VM' 2 'no guest 999'
guest 113 '0000:09:00,pcie=1'
hook_ 113
refuses 'absent device' 3 'VM 113' hostpci0 0000:09:00
guest 113 'mapping=gpu,pcie=1'
printf 'gpu\n\tmap id=10de:2204,iommugroup=6,node=pve1,path=0000:01:00\n' >/etc/pve/mapping/pci.cfg
hook_ 113
refuses 'mapping' 3 'VM 113' hostpci0 mapping=gpu 'does not match'
for line in '0000:01:00,driver=keep' '0000:01:00,mdev=nvidia-63'; do
    guest 113 "$line"
    for phase in pre-start post-start pre-stop post-stop; do
        call $hook 113 "$phase"
        exits "$line: $phase" 0
        silent "$line: $phase"
    done
    untouched "$line" "$at_home"
done

# ---- the command line ----
call gpu-handoff to-vfio
refuses 'to-vfio with two cards' 2 $slot1 $slot2
call gpu-handoff to-vfio 09:00
refuses 'to-vfio of an absent card' 3 0000:09:00
call gpu-handoff to-vfio nonsense
refuses 'to-vfio nonsense' 2 nonsense
call gpu-handoff frobnicate
refuses 'unknown verb' 2 frobnicate

# ---- our configuration: a person must fix it, a VM starts all the same ----
echo '{"time":{"lock_s":"soon"}}' >$config
call gpu-handoff to-vfio $slot1
refuses 'broken configuration' 2 $config time.lock_s
echo '{"policy":{"procces":"kill"}}' >$config
call gpu-handoff to-nvidia $slot1
refuses 'unknown key' 2 $config policy.procces
echo '{' >$config
call gpu-handoff to-vfio $slot1
refuses 'no JSON' 2 $config
call $hook 100 pre-start
exits 'VM without a card, broken configuration' 0
silent 'VM without a card, broken configuration'
works 'pre-start, broken configuration' $hook 111 pre-start
says 'pre-start, broken configuration' "warning: $config" defaults
in_no_vm 'broken configuration' $slot1
works 'post-stop, broken configuration' $hook 111 post-stop
says 'post-stop, broken configuration' "warning: $config" defaults
is_home 'broken configuration'

# ---- one lock ----
echo '{"time":{"lock_s":0.5}}' >$config
lock_for() { # lock_for SECONDS: somebody else has the lock
    flock --no-fork $records/lock sleep "$1" &
    holder=$!
    within 10 not flock --nonblock $records/lock true
}
lock_for 1000
hook_ 111
refuses 'the lock is taken' 5 'another handoff'
quick 'the lock is taken' 5000
ok 'it waited' test "$ms" -ge 500
call gpu-handoff to-vfio $slot2
refuses 'the lock is taken, by hand' 5 'another handoff'
call $hook 100 pre-start
exits 'the lock is taken, VM without a card' 0
works 'the lock is taken, status' gpu-handoff --status --json
release
rm $config
lock_for 2
works 'the lock becomes free in time' $hook 111 pre-start
in_no_vm 'the lock becomes free in time' $slot1
wait "$holder"
works 'post-stop' $hook 111 post-stop
is_home 'after waiting'

# ---- a record that cannot be read is never written over: it may know where the card is at home ----
for garbage in 'garbage' '{"schema":2}'; do
    echo "$garbage" >$records/vm-111
    broken=$(snapshot)
    call $hook 111 post-stop
    exits "$garbage, at home: post-stop" 1
    says "$garbage, at home: post-stop" $records/vm-111
    one_line "$garbage, at home: post-stop"
    untouched "$garbage, at home: post-stop" "$broken"
    call $hook 100 pre-start
    exits "$garbage: VM without a card" 0
    silent "$garbage: VM without a card"
    call $hook 111 pre-start
    exits "$garbage, at home: pre-start" 3
    says "$garbage, at home: pre-start" $slot1 $records/vm-111 'remove that file'
    untouched "$garbage, at home: pre-start" "$broken"
    rm $records/vm-111
    works "$garbage, removed: pre-start" $hook 111 pre-start
    in_no_vm "$garbage, removed: pre-start" $slot1

    cp $records/vm-111 /run/record
    echo "$garbage" >$records/vm-111
    broken=$(snapshot)
    call $hook 111 pre-start
    exits "$garbage, away: pre-start" 3
    says "$garbage, away: pre-start" $slot1 $records/vm-111
    untouched "$garbage, away: pre-start" "$broken"
    call $hook 111 post-stop
    exits "$garbage, away: post-stop" 1
    says "$garbage, away: post-stop" $records/vm-111
    untouched "$garbage, away: post-stop" "$broken"
    call gpu-handoff to-nvidia $slot1
    ok "$garbage, away: to-nvidia does not claim success" test "$rc" != 0
    says "$garbage, away: to-nvidia" $records/vm-111
    untouched "$garbage, away: to-nvidia" "$broken"
    mv /run/record $records/vm-111
    works "$garbage, fixed: post-stop" $hook 111 post-stop
    is_home "$garbage, fixed"
done

# ---- another VM has the card ----
guest 113 '0000:01:00,pcie=1'
works 'qm start 111' qm start 111
at_home=$(snapshot)
hook_ 113
refuses 'another VM has it' 3 $slot1 'VM 111' 'qm shutdown 111'
call gpu-handoff to-nvidia $slot1
refuses 'to-nvidia with the VM running' 3 $slot1 'VM 111' 'qm shutdown 111'
call gpu-handoff to-vfio $slot1
refuses 'to-vfio with the VM running' 3 $slot1 'VM 111'
is 'VM 111 still runs' 'status: running' "$(qm status 111)"
is 'and has the card' 'vm 111' "$(status $slot1 owner.kind owner.vmid)"
works 'qm stop 111' qm stop 111
is_home 'after VM 111'
at_home=$(snapshot)

# ---- no vfio-pci ----
rmmod vfio_pci
lists=/lib/modules/$(uname -r)
cp "$lists/modules.dep" /run/modules.dep
file=$(find "$lists/kernel" -name 'vfio-pci.ko*')
mv "$file" /run/
sed -i '/vfio-pci\.ko/d' "$lists/modules.dep"
at_home=$(snapshot)
hook_ 111
refuses 'no vfio-pci' 3 $slot1 vfio-pci modules
mv "/run/${file##*/}" "$file"
cp /run/modules.dep "$lists/modules.dep"
works 'vfio-pci is loaded when it is there but not loaded' $hook 111 pre-start
in_no_vm 'vfio-pci is back' $slot1
works 'post-stop' $hook 111 post-stop
is_home 'in the end'
finish
