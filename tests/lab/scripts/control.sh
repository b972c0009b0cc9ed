#!/bin/bash
# Who has /dev/nvidiactl open may use any card, and nothing outside the driver says which. Whoever works on card 2 all day is
# in nobody's way when a VM wants card 1, as long as the driver has not started that card.
# lab: --gpus 2 --timeout 400
# lab: --driver genuine --gpus 2 --modeset 0 --timeout 600
# lab-build: failpoints
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
irqs() { # irqs SLOT: the numbers of the interrupts that a card may have
    ls "$pci/$1.0/msi_irqs" 2>/dev/null || cat "$pci/$1.0/irq"
}
has_interrupt() { # has_interrupt SLOT: yes or no
    local irq
    for irq in $(irqs "$1"); do
        if grep -qE "^ *$irq:.*[ ,]nvidia(,|$)" /proc/interrupts; then echo yes && return; fi
    done
    echo no
}
cards() { echo "$(has_interrupt $slot1) $(has_interrupt $slot2)"; }

# ---- what the driver does ----
is 'nobody: cards with an interrupt' 'no no' "$(cards)"
hold /dev/nvidiactl
is 'nvidiactl open: cards with an interrupt' 'no no' "$(cards)"
release
hold "/dev/nvidia$(minor_of $slot2)"
is 'card 2 open: cards with an interrupt' 'no yes' "$(cards)"
release
attach 100
is 'card 1 attached' 0 "$attached"
is 'card 1 attached: cards with an interrupt' 'yes no' "$(cards)"
release
have_none() { [ "$(cards)" = 'no no' ]; }
ok 'nobody any more: no card has an interrupt' within 5 have_none

# ---- somebody works on card 2 and has nvidiactl open, as CUDA has ----
start_user "/dev/nvidia$(minor_of $slot2)"
marks=$(module_marks)
hold /dev/nvidiactl
control=$holder
works 'nvidiactl open: pre-start' $hook 111 pre-start
in_no_vm 'nvidiactl open' $slot1
still_works 'nvidiactl open, away'
works 'nvidiactl open: post-stop' $hook 111 post-stop
still_works 'nvidiactl open, home'
kill "$control"
within 10 has_gone "$control"
same 'nvidiactl open: as before' "$at_home" "$(snapshot)"

# ---- somebody has card 1 attached: only the driver knows ----
attach 100
call $hook 111 pre-start
exits 'attached' 3
one_line 'attached'
says 'attached' "PID $holder (perl" 'has /dev/nvidiactl open' 'has started this card'
still_works 'attached'
untouched 'attached' "$at_home"
release
attach 200
works 'the other card attached: pre-start' $hook 111 pre-start
in_no_vm 'the other card attached' $slot1
works 'the other card attached: post-stop' $hook 111 post-stop
release
end_user
is_home 'in the end'
finish
