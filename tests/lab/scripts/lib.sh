# Helpers for scripts that run in the lab. Sourced, not run.
# shellcheck shell=bash disable=SC2034 # used by the scripts

failures=0
slot1=0000:01:00
slot2=0000:02:00
pci=/sys/bus/pci/devices

ok() { # ok TEXT COMMAND…: the command must succeed
    local text=$1
    shift
    if "$@"; then echo "ok: $text"; else
        echo "FAIL: $text ($*)"
        failures=$((failures + 1))
    fi
}
is() { # is TEXT WANT HAVE
    if [ "$2" = "$3" ]; then echo "ok: $1 is $2"; else
        echo "FAIL: $1: wanted '$2', got '$3'"
        failures=$((failures + 1))
    fi
}
finish() {
    [ "$failures" = 0 ] || echo "$failures check(s) FAILED"
    [ "$failures" = 0 ]
    exit
}
not() { ! "$@"; }

driver_of() {
    local link
    link=$(readlink "$pci/$1/driver") || { echo none; return; }
    echo "${link##*/}"
}
state_of() { awk '/^State:/ { print $2 }' "/proc/$1/status" 2>/dev/null; }
has_gone() { [ ! -e "/proc/$1" ] || [ "$(state_of "$1")" = Z ]; }

within() { # within SECONDS COMMAND…: becomes true in time
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# The bare writes. Each may block for ever: call them through `bg` where so.
unbind() { echo "$1" >"$pci/$1/driver/unbind"; }
override() { echo "$2" >"$pci/$1/driver_override"; }
probe() { echo "$1" >/sys/bus/pci/drivers_probe; }

bg() { # bg COMMAND…: in the background, pid in $job
    "$@" </dev/null >/dev/null 2>&1 &
    job=$!
    disown
}
hold() { # hold NODE: keep it open from a process of its own, pid in $holder
    perl -e 'open F, "<", shift or exit 9; open O, ">", "/run/held" or exit 9; close O; sleep 10000' "$1" &
    holder=$!
    within 10 test -e /run/held || { echo "FAIL: cannot hold $1" && failures=$((failures + 1)); }
    rm -f /run/held
}
# attach ID: a process that has nvidiactl open and a card attached to it, as CUDA has: "100" is bus 1, device 0. Its pid in
# $holder; in $attached the errno, 0 if it worked.
attach() {
    perl -e 'open F, "+<", "/dev/nvidiactl" or exit 9;
        my $id = pack "L", hex shift;
        my $errno = defined ioctl(F, 0xC00446D4, $id) ? 0 : 0 + $!;
        open O, ">", "/run/attached" or exit 9; print O $errno; close O;
        rename "/run/attached", "/run/held";
        sleep 10000' "$1" &
    holder=$!
    within 10 test -e /run/held || { echo "FAIL: cannot attach $1" && failures=$((failures + 1)); }
    attached=$(cat /run/held)
    rm -f /run/held
}
# doing PID: whether it computes or not, looked at for two seconds
doing() {
    local before
    ticks() { awk '{ print $14 + $15 }' "/proc/$1/stat" 2>/dev/null || echo 0; }
    before=$(ticks "$1")
    sleep 2
    [ $(($(ticks "$1") - before)) -gt 20 ] && echo spins || echo sleeps
}
release() {
    kill -KILL "$holder" 2>/dev/null
    wait "$holder" 2>/dev/null
}

drm_name() {
    local card
    for card in "$pci/$1/drm"/card*; do
        [ ! -e "$card" ] || echo "${card##*/}"
    done
}
console_name() { cat /sys/class/vtconsole/vtcon*/name | grep -c 'frame buffer'; }
unload_stack() { rmmod nvidia_uvm && rmmod nvidia_drm && rmmod nvidia_modeset && rmmod nvidia; }
load_stack() { modprobe nvidia_drm && modprobe nvidia_uvm; }

to_vfio() { # to_vfio SLOT, which nobody uses
    local f
    for f in "$1.0" "$1.1"; do
        override "$f" vfio-pci
        [ "$(driver_of "$f")" = none ] || unbind "$f"
        probe "$f"
    done
}
to_host() { # to_host SLOT DISPLAY-DRIVER
    unbind "$1.0"
    unbind "$1.1"
    override "$1.0" "$2"
    override "$1.1" snd_hda_intel
    modprobe "$2"
    [ "$(driver_of "$1.0")" != none ] || probe "$1.0"
    probe "$1.1"
    override "$1.0" ''
    override "$1.1" ''
}
