#!/bin/bash
# The framebuffer console: off a screen before the card is unbound from under it, back as it was when the card is home;
# not touched where there is none, and told where it cannot come back.
# lab: --timeout 400
# lab: --modeset 1 --timeout 400
# lab: --gpus 2 --modeset 1 --driver-version 580.95.05 --timeout 400
# lab: --gpus 2 --modeset 1 --driver-version 580.105.08 --timeout 400
# lab: --firmware ovmf --timeout 400
# lab: --firmware ovmf --modeset 1 --timeout 400
# lab: --firmware ovmf --gpus 2 --modeset 1 --driver-version 580.105.08 --timeout 400
# lab: --firmware ovmf --gpus 2 --home nouveau --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

# Every text console with whether it is on; not by number, which changes.
consoles() {
    local console
    for console in /sys/class/vtconsole/*; do echo "$(<"$console/name") $(<"$console/bind")"; done | sort
}
screens() { # the cards with a framebuffer of their driver's
    local f
    for f in "${functions[@]}"; do [ ! -d "$pci/$f/graphics" ] || echo "$f"; done
}
# What the kernel itself says of the console since the last call.
seen=0
switched() {
    local all
    all=$(dmesg | sed -n 's/.*Console: switching to //p')
    tail -n "+$((seen + 1))" <<<"$all"
    seen=$(wc -l <<<"$all")
}
silent_on_consoles() { # silent_on_consoles TEXT: the last call did nothing to them
    ok "$1 says nothing of a console" not grep -q 'console' <<<"$err"
}

if [ "$LAB_FIRMWARE $LAB_HOME" = 'ovmf nvidia' ] && [ "$LAB_GPUS$LAB_MODESET" = 1 ]; then
    case=firmware
elif [ "$LAB_GPUS $LAB_HOME $LAB_DRIVER" = '2 nvidia 580.95.05' ]; then
    case=unloaded # nvidia_drm, which comes back for the other card at once
elif [ "$LAB_GPUS $LAB_FIRMWARE" = '2 seabios' ]; then
    case=left # to the kernel: the VGA console, in whose place fbcon could be attached, is gone
elif [ "$LAB_GPUS" = 2 ]; then
    case=unbound
elif [ "$LAB_MODESET" = 1 ]; then
    case=unloaded
else
    case=headless
fi
echo "# $case"

# Somebody has configured that the display function may sleep.
echo auto >$pci/$slot1.0/power/control
echo 1 >$pci/$slot1.0/d3cold_allowed
echo 1 >$pci/$slot1.1/d3cold_allowed
power() {
    local f
    for f in $slot1.0 $slot1.1; do echo "$f $(<"$pci/$f/power/control") $(<"$pci/$f/d3cold_allowed")"; done
}
power_at_home=$(power)

remember_home
at_home=$(snapshot)
consoles_at_home=$(consoles) screens_at_home=$(screens)
case $case in
    headless) is 'screens' '' "$screens_at_home" ;;
    firmware) is 'consoles on a framebuffer' 1 "$(console_name)" ;;
    *)
        ok 'card 1 has a screen' grep -q "$slot1.0" <<<"$screens_at_home"
        ok 'the console is on it' grep -q 'frame buffer device 1' <<<"$consoles_at_home"
        ;;
esac
switched >/dev/null

for trip in 1 2; do
    works "trip $trip: qm start" qm start 111
    said=$err
    in_vm "trip $trip" $slot1 111
    is "trip $trip: d3cold_allowed with the VM" '0 0' \
        "$(<$pci/$slot1.0/d3cold_allowed) $(<$pci/$slot1.1/d3cold_allowed)"
    says "trip $trip" 'power/control=on d3cold_allowed=0'
    switches=$(switched)
    case $case in
        headless)
            silent_on_consoles "trip $trip"
            is "trip $trip: switches" '' "$switches"
            ;;
        unloaded) ok "trip $trip: no console detach" not grep -q 'console detach' <<<"$said" ;;
        left)
            ok "trip $trip: no console detach" not grep -q 'console detach' <<<"$said"
            is "trip $trip: consoles with the VM" 0 "$(grep -c 'frame buffer device 1' <<<"$(consoles)")"
            ;;
        unbound)
            says "trip $trip" 'console detach, unbind' 'console attach'
            same "trip $trip: switches" $'colour dummy device\ncolour frame buffer device' \
                "$(sed 's/ [0-9]*x[0-9]*$//' <<<"$switches")"
            # The host's other screen has it meanwhile.
            same "trip $trip: consoles with the VM" "$consoles_at_home" "$(consoles)"
            is "trip $trip: screens with the VM" "$slot2.0" "$(screens)"
            ;;
        firmware)
            if [ "$trip" = 1 ]; then
                says "trip $trip" "$slot1.0 has the screen that the firmware set up" 'before the next boot'
            else
                ok "trip $trip: nothing left to tell" not grep -q firmware <<<"$said"
            fi
            ok "trip $trip: no console detach" not grep -q 'console detach' <<<"$said"
            is "trip $trip: consoles on a framebuffer" 0 "$(console_name)"
            ;;
    esac
    works "trip $trip: qm stop" qm stop 111
    untouched "trip $trip: as before" "$at_home"
    is_home "trip $trip"
    same "trip $trip: power as before" "$power_at_home" "$(power)"
    case $case in
        headless) silent_on_consoles "trip $trip: qm stop" ;;
        # It is gone until the next boot, as was told.
        firmware) is "trip $trip: consoles on a framebuffer" 0 "$(console_name)" ;;
        *)
            same "trip $trip: consoles as before" "$consoles_at_home" "$(consoles)"
            same "trip $trip: screens as before" "$screens_at_home" "$(screens)"
            ;;
    esac
    switched >/dev/null
done

# ---- who had no console gets none ----
if [ "$case" = unbound ]; then
    for console in /sys/class/vtconsole/*; do
        ! grep -q 'frame buffer' "$console/name" || echo 0 >"$console/bind"
    done
    dark=$(consoles)
    works 'dark: pre-start' $hook 111 pre-start
    silent_on_consoles 'dark: pre-start'
    same 'dark: consoles with the VM' "$dark" "$(consoles)"
    works 'dark: post-stop' $hook 111 post-stop
    silent_on_consoles 'dark: post-stop'
    untouched 'dark: as before' "$at_home"
fi
finish
