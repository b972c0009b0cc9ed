#!/bin/bash
# Asks the driver, NVIDIA's own or the stub, what a handoff can notice of it, and prints KEY<tab>ANSWER lines that are
# the same from run to run. tests/lab/compare runs it on both and holds one against the other.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${0%/*}/lib.sh"
# shellcheck source=/dev/null
. /opt/lab/settings
export LC_ALL=C

slots=("$slot1")
[ "$LAB_GPUS" = 1 ] || slots+=("$slot2")
stack='nvidia nvidia_modeset nvidia_drm nvidia_uvm'

where='' # what the keys of this part begin with
put() { printf '%s%s\t%s\n' "$where" "$1" "$2"; }
refs() {
    local m said=''
    for m in $stack; do said+="$m=$(cat "/sys/module/$m/refcnt" 2>/dev/null || echo -) "; done
    echo "${said% }"
}
# delete_module(2) as a probe: what is in use says so. Called only where it must fail.
remove() { perl -e 'use Errno; my $r = syscall 176, $ARGV[0], 2048; print $r ? join(",", grep { $!{$_} } qw(EAGAIN EBUSY ENOENT EWOULDBLOCK)) || 0+$! : "gone"' "$1"; }
# errno NODE: of opening it to read, to read and write, and to write
errno() {
    perl -e '
        use Errno; use Fcntl;
        print join " ", map { sysopen(my $f, $ARGV[0], $_) ? "ok" : (grep { $!{$_} } keys %!)[0] } O_RDONLY, O_RDWR, O_WRONLY' "$1"
}
# What is done with a descriptor that this driver has no idea of.
odd() {
    perl -e '
        use Errno; use Fcntl;
        sub said { my $r = shift; defined $r && $r ne "" ? "ok" : join "|", sort grep { $!{$_} } keys %! }
        sysopen(my $f, $ARGV[0], O_RDWR) or die;
        my $arg = "\0" x 64;
        print "read ", said(scalar sysread $f, my $x, 16), ", write ", said(scalar syswrite $f, "x"),
            ", seek ", said(scalar sysseek $f, 10, 0), ", ioctl ", said(scalar ioctl $f, 0xC0404611, $arg)' "$1"
}
# names FOLDER: what is in it, in one line
names() {
    local all
    [ -d "$1" ] || { echo none; return; }
    all=("$1"/*)
    echo "${all[@]##*/}"
}
drm_of() { names "$pci/$1.0/drm"; }
minors() {
    local s
    for s in "${slots[@]}"; do
        [ ! -e "/proc/driver/nvidia/gpus/$s.0" ] || awk -v s="$s" '/Device Minor/ { printf "%s=%s ", s, $3 }' "/proc/driver/nvidia/gpus/$s.0/information"
    done
}
drms() { local s; for s in "${slots[@]}"; do printf '%s: %s; ' "$s" "$(drm_of "$s")"; done; }
quickly() { # quickly COMMAND…: whether it comes back
    timeout 20 "$@" >/run/quickly 2>&1
    case $? in
        0) echo yes ;;
        124) echo 'it hangs' ;;
        *) sed 's/.*: //' /run/quickly | head -n 1 ;;
    esac
}
said_by_driver() { dmesg | sed 's/^\[[^]]*\] *//' | grep '^NVRM:.*\(remove\|removal\|probed\|not called\)' | sort -u | tr '\n' ';'; dmesg -C; }
information() { cat "/proc/driver/nvidia/gpus/$1.0/information"; }

# rests PID: S when it is seen in that state once, as what sleeps is not all the time
rests() {
    local state
    for _ in 1 2 3 4 5 6 7 8; do
        state=$(state_of "$1")
        [ "$state" != S ] || break
        sleep 0.2
    done
    echo "$state"
}

# Whether card $1, which is being unbound, has gone or waits: the driver says that it does.
unbound_or_waits() {
    local card=$1
    bg unbind "$card"
    has_gone_or_says() { has_gone "$job" || dmesg | grep -q 'with non-zero usage count'; }
    within 60 has_gone_or_says
    has_gone "$job"
}

# waits TEXT COMMAND-THAT-HOLDS…: card 1 is unbound meanwhile
waits() {
    local text=$1 cpu
    shift
    dmesg -C
    "$@"
    if unbound_or_waits "$slot1.0"; then
        put "$text: unbind" 'comes back at once'
        release
    else
        put "$text: unbind" "waits, and $(doing "$job") in state $(rests "$job")"
        put "$text: driver link" "$(driver_of "$slot1.0")"
        put "$text: proc entry" "$(names "/proc/driver/nvidia/gpus/$slot1.0")"
        put "$text: refcounts" "$(refs)"
        put "$text: drm" "$(drms)"
        put "$text: information" "$(quickly cat "/proc/driver/nvidia/gpus/$slot1.0/information")"
        put "$text: open again" "$(timeout 30 bash -c "$(declare -f errno); errno /dev/nvidia0" || echo hangs)"
        put "$text: nvidiactl opens" "$(errno /dev/nvidiactl)"
        put "$text: driver_override can be read" "$(quickly cat "$pci/$slot1.0/driver_override")"
        put "$text: delete_module" "$(remove nvidia)"
        if [ "$LAB_GPUS" = 2 ]; then
            put "$text: card 2 opens" "$(errno /dev/nvidia1)"
        fi
        kill -TERM "$job"
        put "$text: after SIGTERM" "$(doing "$job")"
        kill -KILL "$job"
        cpu=$(doing "$job")
        put "$text: after SIGKILL" "$(has_gone "$job" && echo gone || echo there), $cpu"
        release
        put "$text: when its user ends" "$(within 30 has_gone "$job" && echo 'comes back' || echo 'stays')"
    fi
    put "$text: the driver says" "$(said_by_driver)"
    put "$text: afterwards" "$(driver_of "$slot1.0"), $(refs), drm $(drms)"
    put "$text: node afterwards" "$(errno /dev/nvidia0)"
    probe "$slot1.0"
    put "$text: after a probe" "$(driver_of "$slot1.0"), $(refs), drm $(drms), minors $(minors)"
}
drm_user() { hold "/dev/dri/$(drm_name "$slot1.0")"; }

# ---- the state after loading ----
home() {
    put refcounts "$(refs)"
    put minors "$(minors)"
    put drm "$(drms)"
    put 'drm nodes' "$(names /dev/dri)"
}
# reload MODESET: the whole stack
reload() {
    rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia
    modprobe nvidia
    modprobe nvidia_modeset
    modprobe nvidia_drm modeset="$1"
    modprobe nvidia_uvm
}

facts() {
    local m f node name
    home
    for m in $stack; do
        put "module $m: holders" "$(names "/sys/module/$m/holders")"
        put "module $m: in /proc/modules" "$(awk -v m="$m" '$1 == m { n = split($4, a, ","); for (i = 1; i < n; i++) print a[i]; print $5 }' /proc/modules | sort | tr '\n' ' ')"
        put "module $m: needs" "$(modinfo -F depends "$m" | tr ',' '\n' | sort | tr '\n' ' ')"
        put "module $m: softdep" "$(modinfo -F softdep "$m")"
        put "module $m: aliases" "$(modinfo -F alias "$m" | sed 's/nvidia-.*/nvidia…/' | sort | tr '\n' ' ')"
        put "module $m: parameters in sysfs" "$(names "/sys/module/$m/parameters")"
        put "module $m: drivers" "$(names "/sys/module/$m/drivers")"
        put "module $m: license" "$(modinfo -F license "$m")"
    done
    put 'majors' "$(awk '/^Block/ { exit } /nvidia/ { print ($1 == 195 ? 195 : "dynamic") ":" $2 }' /proc/devices | sort | tr '\n' ' ')"
    put 'pci drivers' "$(cd /sys/bus/pci/drivers && echo nvidia*)"
    while read -r f; do
        put "proc: $f" "$(stat -c '%A' "/proc/driver/nvidia/$f")"
    done < <(cd /proc/driver/nvidia && find . -mindepth 1 | sort)
    put 'proc: version' "$(sed 's/(.*) .*/(…)/; s/gcc version.*/gcc/' /proc/driver/nvidia/version | tr '\n' ';')"
    put 'proc: params' "$(sort /proc/driver/nvidia/params | tr '\n' ';')"
    put 'proc: information' "$(information "$slot1" | tr '\t' '>' | tr '\n' ';')"
    put 'proc: power' "$(tr '\n' ';' <"/proc/driver/nvidia/gpus/$slot1.0/power" 2>&1)"
    put 'proc: registry' "$(head -c 200 /proc/driver/nvidia/registry 2>&1 | tr '\n' ';')"
    put 'sysfs: the card has' "$(names "$pci/$slot1.0")"
    put 'sysfs: enabled' "$(cat "$pci/$slot1.0/enable")"
    put 'sysfs: power/control' "$(cat "$pci/$slot1.0/power/control")"
    put 'sysfs: runtime_status' "$(cat "$pci/$slot1.0/power/runtime_status")"
    put 'sysfs: runtime_usage' "$(cat "$pci/$slot1.0/power/runtime_usage" 2>&1)"
    put 'sysfs: boot_vga' "$(cat "$pci/$slot1.0/boot_vga" 2>&1)"
    put 'memory that is claimed' "$(grep -c ': nvidia$' /proc/iomem) × nvidia"
    put 'interrupts at rest' "$(grep -c nvidia /proc/interrupts)"
    for name in nvidiactl nvidia-modeset nvidia0 nvidia-uvm nvidia-uvm-tools; do
        put "node $name: open" "$(errno "/dev/$name")"
        hold "/dev/$name"
        put "node $name: refcounts while open" "$(refs)"
        case $name in
            nvidia-uvm*) m=nvidia_uvm ;;
            nvidia-modeset) m=nvidia_modeset ;;
            *) m=nvidia ;;
        esac
        put "node $name: delete_module of $m" "$(remove $m)"
        release
        put "node $name: refcounts afterwards" "$(refs)"
    done
    for name in nvidiactl nvidia0; do put "node $name: odd calls" "$(odd "/dev/$name")"; done
    for node in "nvidia$LAB_GPUS" nvidia7; do
        mknod "/root/$node" c 195 "${node#nvidia}" && put "node ${node/$LAB_GPUS/N} without a card: open" "$(errno "/root/$node")"
    done
    mknod /root/cap c "$(awk '$2 == "nvidia-caps" { print $1 }' /proc/devices)" 1 2>/dev/null
    put 'node nvidia-cap1: open' "$(errno /root/cap)"
    drm_user
    put 'node of DRM: refcounts while open' "$(refs)"
    put 'node of DRM: delete_module of nvidia_drm' "$(remove nvidia_drm)"
    release
    hold "/dev/dri/renderD128"
    put 'render node: refcounts while open' "$(refs)"
    release
    put 'drm: driver' "$(perl -e 'open my $f, "+<", "/dev/dri/card0" or die; my $n = "\0" x 64; my $v = pack "l3x4Q6", 0, 0, 0, 64, unpack("Q", pack "P", $n), 0, 0, 0, 0; ioctl($f, 0xC0406400, $v) or die "$!"; $n =~ s/\0.*//s; my @v = unpack "l3", $v; print "$n"')"
    put 'drm: connectors' "$(names /sys/class/drm | tr ' ' '\n' | grep -c -- -)"
    attach 100
    put 'attached: errno' "$attached"
    put 'attached: refcounts' "$(refs)"
    release
    attach 900
    put 'attach of a card that is not there: errno' "$attached"
    release
    put 'attached: refcounts afterwards' "$(refs)"
}

# ---- somebody has it while it is unbound ----
uses() {
    local node
    for node in nvidia0 nvidiactl nvidia-uvm nvidia-modeset; do
        waits "unbind with $node open" hold "/dev/$node"
    done
    waits 'unbind with card 1 attached' attach 100
    [ "$LAB_GPUS" = 1 ] || waits 'unbind with card 2 attached' attach 200
    [ "$LAB_GPUS" = 1 ] || waits 'unbind with nvidia1 open' hold /dev/nvidia1
    waits 'unbind with its DRM node open' drm_user
}

# ---- the life of DRM devices ----
drm_life() {
    local modeset=$1 s left
    where="modeset=$modeset: "
    reload "$modeset"
    home
    put 'parameter' "$(cat /sys/module/nvidia_drm/parameters/modeset)"
    put 'consoles' "$(console_name)"
    for s in "${slots[@]}"; do
        # Away: with modeset=1 it may wait for nvidia_drm.
        left=$(drm_name "$s.0")
        dmesg -C
        if ! unbound_or_waits "$s.0"; then
            put "$s unbound" 'waits'
            rmmod nvidia_drm
            put "$s unbound, nvidia_drm unloaded" "$(within 30 has_gone "$job" && echo 'comes back' || echo 'stays')"
            modprobe nvidia_drm modeset="$modeset"
        fi
        put "$s away" "$(driver_of "$s.0"), $(refs), drm $(drms)nodes $(names /dev/dri)"
        put "$s away: what was its node" "$(errno "/dev/dri/$left")"
        override "$s.0" vfio-pci
        probe "$s.0"
        put "$s on vfio-pci" "$(driver_of "$s.0"), drm $(drms)"
        put "$s: its node opens" "$(errno "/dev/dri/$left")"
        unbind "$s.0"
        override "$s.0" ''
        probe "$s.0"
        put "$s back" "$(driver_of "$s.0"), $(refs), drm $(drms), minors $(minors)"
        rmmod nvidia_drm
        put "$s back, nvidia_drm unloaded" "$(refs), drm $(drms)"
        modprobe nvidia_drm modeset="$modeset"
        put "$s back, nvidia_drm loaded" "$(refs), drm $(drms)"
    done
    where=''
}

# ---- both away, home in the other order: minors and DRM names ----
swap() {
    local s
    [ "$LAB_GPUS" = 2 ] || return 0
    where='two cards: '
    reload 0
    for s in $slot1 $slot2; do unbind "$s.0"; done
    put 'both away' "$(refs), drm $(drms), nodes $(names /dev/dri)"
    put 'both away: open' "$(errno /dev/nvidia0); $(errno /dev/nvidia1)"
    for s in $slot2 $slot1; do probe "$s.0"; done
    put 'home in the other order' "minors $(minors), drm $(drms)"
    reload 0
    put 'loaded anew' "minors $(minors), drm $(drms)"
    unbind $slot1.0
    rmmod nvidia_drm && modprobe nvidia_drm
    put 'card 1 away, nvidia_drm loaded anew' "drm $(drms)"
    probe $slot1.0
    put 'card 1 back' "drm $(drms)"
    rmmod nvidia_drm && modprobe nvidia_drm
    put 'nvidia_drm loaded anew' "drm $(drms)"
    reload 0
    where=''
}

# ---- loading without a card, and what the kernel tells of it all ----
events() {
    local monitor
    udevadm settle
    stdbuf -oL udevadm monitor --kernel >/run/events & monitor=$!
    within 20 grep -q KERNEL /run/events
    "$@"
    udevadm settle
    sleep 2
    kill $monitor
    wait $monitor 2>/dev/null
    sed -n 's/^KERNEL\[[^]]*\] *//p' /run/events | sed 's/ *(.*//; s/  */ /; s/vtcon[0-9]/vtconN/; s,/virtual/bdi/[^ ]*,/bdi,' | sort | uniq -c | awk '{ $1 = $1 == 1 ? "" : $1 "×"; print }' | tr '\n' ';'
}
telling() {
    local m
    put 'events: unbind' "$(events unbind $slot1.0)"
    put 'events: probe' "$(events probe $slot1.0)"
    for m in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do put "events: rmmod $m" "$(events rmmod $m)"; done
    put 'away: /dev' "$(echo /dev/nvidia*)"
    put 'away: open of nvidia0 loads it' "$(errno /dev/nvidia0), $(refs)"
    rmmod nvidia
    for s in "${slots[@]}"; do override "$s.0" vfio-pci; probe "$s.0"; done
    dmesg -C
    put 'no card: modprobe nvidia' "$(quickly modprobe nvidia)"
    put 'no card: the driver says' "$(said_by_driver)"
    put 'no card: open of nvidia0' "$(errno /dev/nvidia0)"
    for s in "${slots[@]}"; do unbind "$s.0"; override "$s.0" ''; done
    for m in nvidia nvidia_modeset nvidia_drm nvidia_uvm; do put "events: modprobe $m" "$(events modprobe $m)"; done
}

# ---- the driver's lock is held: a card is being started ----
# Each look begins with somebody who is inside open(), and has no descriptor yet.
start_card() {
    local before
    before=$(cat /sys/module/nvidia/refcnt)
    echo 600000 >/sys/module/nvshim/parameters/stall_ms
    bg perl -e 'open F, "<", "/dev/nvidia0"; exit !$!{EIO}'
    opener=$job
    counted() { [ "$(cat /sys/module/nvidia/refcnt)" -gt "$before" ]; }
    within 20 counted
    sleep 0.5
}
started_is_over() {
    echo 0 >/sys/module/nvshim/parameters/stall_ms
    within 30 has_gone "$opener"
}
# started TEXT COMMAND…: whether it has to wait for the other one
started() {
    local text=$1
    shift
    start_card
    bg "$@"
    put "$text" "$(within 10 has_gone "$job" && echo 'at once' || echo 'waits for it')"
    started_is_over
    within 30 has_gone "$job"
}
stall() {
    where='being started: '
    start_card
    put 'descriptors of the one inside open' "$(find "/proc/$opener/fd" -lname '/dev/nvidia*' | wc -l)"
    put 'refcounts' "$(refs)"
    started_is_over
    put 'refcounts afterwards' "$(refs)"
    started 'open of nvidiactl' head -c0 /dev/nvidiactl
    started 'information' information "$slot1"
    started 'power' cat "/proc/driver/nvidia/gpus/$slot1.0/power"
    started 'version' cat /proc/driver/nvidia/version
    started 'unbind of the same card' unbind "$slot1.0"
    probe "$slot1.0"
    if [ "$LAB_GPUS" = 2 ]; then
        started 'information of card 2' information "$slot2"
        started 'open of card 2' head -c0 /dev/nvidia1
        started 'unbind of card 2' unbind "$slot2.0"
        started 'probe of card 2' probe "$slot2.0"
    fi
    echo 1000 >/sys/module/nvshim/parameters/stall_ms
    put 'in the end' "$(errno /dev/nvidia0)"
    echo Y >/sys/module/nvshim/parameters/stall_ok
    put 'in the end, with stall_ok' "$(errno /dev/nvidia0)"
    echo 0 >/sys/module/nvshim/parameters/stall_ms
    where=''
}

facts
uses
telling
stall
drm_life 0
drm_life 1
reload 0
swap
