#!/bin/bash
# shellcheck disable=SC2012,SC2086,SC2317 # plain names; called by name
# Two cards: what one does must not touch the other.
# Run with: tests/lab/run --gpus 2 scripts/selftest-two.sh
# shellcheck source=lib.sh
. "${0%/*}/lib.sh"

minor_of() { awk '/Device Minor/ { print $3 }' "/proc/driver/nvidia/gpus/$1.0/information"; }
ok 'VM 112 is there' grep -q 'hostpci0: 0000:02:00' /etc/pve/qemu-server/112.conf
ok 'two IOMMU groups' test "$(readlink -f $pci/$slot1.0/iommu_group)" != "$(readlink -f $pci/$slot2.0/iommu_group)"

hold /dev/nvidia0
bg unbind $slot2.0
ok "card 2 goes although card 1's node is open" within 5 has_gone $job
bg unbind $slot1.0
sleep 1
is 'card 1 itself' S "$(state_of $job)"
release
ok 'until closed' within 10 has_gone $job

probe $slot2.0
probe $slot1.0
is 'minors have swapped: card 2' 0 "$(minor_of $slot2)"
is 'minors have swapped: card 1' 1 "$(minor_of $slot1)"

attach 200
bg unbind $slot1.0
ok 'card 2 is attached to an nvidiactl: card 1 goes' within 10 has_gone $job
bg unbind $slot2.0
sleep 1
is 'card 2 itself' S "$(state_of $job)"
release
ok 'until closed' within 10 has_gone $job
probe $slot1.0
probe $slot2.0

to_vfio $slot2
is 'card 2' vfio-pci "$(driver_of $slot2.0)"
is 'card 1' nvidia "$(driver_of $slot1.0)"
ok 'the stack can be unloaded' unload_stack
ok 'and loaded with one card on vfio' load_stack
is 'card 2' vfio-pci "$(driver_of $slot2.0)"
to_vfio_1() { unload_stack && to_vfio $slot1; }
ok 'both on vfio' to_vfio_1
ok 'nvidia refuses to load' not modprobe nvidia
finish
