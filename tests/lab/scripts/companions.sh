#!/bin/bash
# A VM's USB controller and disk go with its card, and come home after it where the policy says so; a disk that the host uses
# keeps the VM from starting.
# lab-env: LAB_OTHERS=1
# lab: --timeout 500
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
mkdir -p "${config%/*}"
of_class() { grep -lx "$1" $pci/*/class | sed 's|.*/\([^/]*\)/class|\1|' | head -n 1; }
usb=$(of_class 0x0c0330) nvme=$(of_class 0x010802)
policy() { printf '{"policy":%s}\n' "$1" >"$config"; }
on() { [ "$(driver_of "$1")" = "$2" ]; }
id_of() { echo "$(<"$pci/$1/vendor")" "$(<"$pci/$1/device")" | sed 's/0x//g'; }
others_are_home() { # others_are_home TEXT
    is "$1: USB controller" xhci_hcd "$(driver_of "$usb")"
    is "$1: disk" nvme "$(driver_of "$nvme")"
    ok "$1: the disk is there" within 10 test -b /dev/nvme0n1
    is "$1: override" '(null)' "$(override_of "$usb")"
    is "$1: override of the disk" '(null)' "$(override_of "$nvme")"
}
no_ids() { # no_ids TEXT: none is left in vfio-pci
    local one
    for one in "$usb" "$nvme"; do
        ok "$1: no id of $one" not bash -c "echo '$(id_of "$one")' >$vfio_driver/remove_id" 2>/dev/null
    done
}

ok 'USB controller at home' within 20 on "$usb" xhci_hcd
ok 'disk at home' within 20 on "$nvme" nvme
qm set 111 --hostpci1 "$usb,pcie=1" --hostpci2 "$nvme,pcie=1" >/dev/null

# ---- by default they stay where Proxmox put them ----
works 'left: qm start' qm start 111
in_vm 'left' $slot1 111
ok 'left: nothing of them on record' not grep -q '"others"' $records/vm-111
works 'left: qm stop' qm stop 111
is_home 'left'
is 'left: USB controller' vfio-pci "$(driver_of "$usb")"
for one in "$usb" "$nvme"; do
    id_of "$one" >$vfio_driver/remove_id
    unbind "$one"
    probe "$one"
done
others_are_home 'by hand'

# ---- they come home ----
policy '{"others":"home"}'
for round in 1 2 3; do
    works "home $round: qm start" qm start 111
    in_vm "home $round" $slot1 111
    is "home $round: USB controller with the VM" vfio-pci "$(driver_of "$usb")"
    is "home $round: disk with the VM" vfio-pci "$(driver_of "$nvme")"
    ok "home $round: on record" grep -q "$nvme" $records/vm-111
    works "home $round: qm stop" qm stop 111
    is_home "home $round"
    others_are_home "home $round"
    no_ids "home $round"
done

# ---- QEMU dies, and no post-stop comes ----
works 'killed: qm start' qm start 111
pkill -STOP qmeventd
kill -KILL "$(</var/run/qemu-server/111.pid)"
works 'killed: reconcile' gpu-handoff reconcile
pkill -CONT qmeventd
ok 'killed: no record' within 60 test ! -e $records/vm-111
is_home 'killed'
others_are_home 'killed'
no_ids 'killed'

# ---- a start that ends before Proxmox takes them ----
works 'given up: pre-start' $hook 111 pre-start
others_are_home 'given up, before'
works 'given up: post-stop' $hook 111 post-stop
is_home 'given up'
others_are_home 'given up'

# ---- what the host uses ----
mkswap -q /dev/nvme0n1 && swapon /dev/nvme0n1
at_home=$(snapshot)
call $hook 111 pre-start
exits 'in use' 3
says 'in use' 'VM 111 was not started: ' "the disk nvme0n1 is on $nvme and is swapped to" 'swapoff /dev/nvme0n1' 'qm start 111'
untouched 'in use' "$at_home"
call gpu-handoff plan 111
exits 'in use: plan' 3
policy '{}'
works 'in use, by default: plan' gpu-handoff plan 111
says 'in use, by default' 'warning: VM 111 takes from the host what it uses: the disk nvme0n1'
swapoff /dev/nvme0n1
qm set 111 --delete hostpci1,hostpci2 >/dev/null
finish
