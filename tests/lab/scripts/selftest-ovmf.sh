#!/bin/bash
# shellcheck disable=SC2086 # plain names
# The firmware's screen on card 1, and what takes it away.
# Run with: tests/lab/run --firmware ovmf scripts/selftest-ovmf.sh
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${0%/*}/lib.sh"

in_iomem() { grep -A9 ": $slot1.0\$" /proc/iomem | grep -qE ': (BOOTFB|efifb)$'; }

is 'consoles on a framebuffer' 1 "$(console_name)"
ok 'it lies in the memory of card 1' in_iomem
ok "nvidia is loaded again under the firmware's console" unload_stack
ok 'and has the card again' load_stack
is 'display' nvidia "$(driver_of $slot1.0)"
is 'consoles on a framebuffer' 1 "$(console_name)"
unload_stack
to_vfio $slot1
is 'display' vfio-pci "$(driver_of $slot1.0)"
is 'vfio-pci took it away: consoles on a framebuffer' 0 "$(console_name)"
ok 'it is in nobody'\''s memory' not in_iomem
finish
