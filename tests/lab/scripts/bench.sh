#!/bin/bash
# What a handoff costs above the kernel's own work: this program in both directions against the bare writes (bare.c), and
# against driverctl and another hookscript where tests/bench has brought them (LAB_WITH), in turns, in one boot. Each line of
# what comes out that begins with "bench" is a result, tab-separated: round, way, contender, phase, milliseconds; a contender's
# phase "all" is timed from outside, its start included. The numbers prove nothing, so `make test` leaves it out.
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

rounds=${1:-15}
folder=${0%/*}
# Of ours and of another hookscript.
there=(111 pre-start) back=(111 post-stop)

result() { printf 'bench\t%s\t%s\t%s\t%s\t%s\n' "$@"; }
# timed ROUND WAY CONTENDER COMMAND…
timed() {
    local round=$1 way=$2 contender=$3 begin=${EPOCHREALTIME/./} end code=0
    shift 3
    "$@" </dev/null >/run/bench.out 2>/run/bench.err || code=$?
    end=${EPOCHREALTIME/./}
    is "round $round, $contender, $way: exit code" 0 "$code"
    [ "$code" = 0 ] || sed 's/^/    | /' /run/bench.err
    result "$round" "$way" "$contender" all "$(((end - begin) / 1000)).$(((end - begin) / 100 % 10))"
}
# What is told of each phase: by bare.c a line for each, by ours as in "  bind  43 ms  …".
bare_phases() { while read -r phase took; do result "$1" "$2" bare "$phase" "$took"; done </run/bench.out; }
our_phases() {
    while read -r phase took; do result "$1" "$2" ours "$phase" "$took"; done \
        < <(sed -nE 's/^gpu-handoff:   ([a-z]+) +([0-9]+) ms .*/\1 \2/p' /run/bench.err)
}
with_driverctl() { # with_driverctl there|back: what it can; the driver's modules stay
    local address
    for address in 0000:01:00.0 0000:01:00.1; do
        if [ "$1" = there ]; then
            "$folder/driverctl" --nosave set-override $address vfio-pci || return
        else
            "$folder/driverctl" --nosave unset-override $address || return
        fi
    done
}
away() { in_no_vm "round $1, $2" $slot1; }
home() { same "round $1, $2: home" "$home_drivers$home_modules" "$(all_of driver_of)$(modules)"; }

gcc -O2 -static -o /run/bare "$folder/bare.c"
remember_home
# Everything once before anything counts: what is read from the disk for the first time takes longer.
for round in $(seq 0 "$rounds"); do
    timed "$round" there bare /run/bare there && bare_phases "$round" there
    away "$round" bare
    timed "$round" back bare /run/bare back && bare_phases "$round" back
    home "$round" bare
    timed "$round" there ours $hook "${there[@]}" && our_phases "$round" there
    away "$round" ours
    timed "$round" back ours $hook "${back[@]}" && our_phases "$round" back
    home "$round" ours
    if [ -x "$folder/driverctl" ]; then
        timed "$round" there driverctl with_driverctl there
        away "$round" driverctl
        timed "$round" back driverctl with_driverctl back
        home "$round" driverctl
    fi
    if [ -x "$folder/other-hookscript" ]; then
        timed "$round" there script "$folder/other-hookscript" "${there[@]}"
        timed "$round" back script "$folder/other-hookscript" "${back[@]}"
        home "$round" script
    fi
    timed "$round" none ours $hook 100 pre-start
    timed "$round" none true /bin/true
    timed "$round" none status gpu-handoff --status
done
is_home 'in the end'
echo 'Where the time goes, once:'
GPU_HANDOFF_TRACE=1 $hook "${there[@]}" 2>&1
GPU_HANDOFF_TRACE=1 $hook "${back[@]}" 2>&1
is_home 'after the trace'
printf 'bench\tmachine\tkernel %s, %s processors, driver %s (%s)\n' "$(uname -r)" "$(nproc)" "$LAB_DRIVER" "$LAB_STACK"
finish
