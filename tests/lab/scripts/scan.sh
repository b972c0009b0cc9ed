#!/bin/bash
# The look for who uses the card on a host with 200, 1,000 and 3,000 processes that have 50 descriptors each: how long
# it takes, beside what fuser needs for the same nodes, in one boot. It must find the one that matters among them, grow
# with their number and no faster, and not be slower than fuser; half as long again is let pass, as the machine is emulated
# and shared.
#   scan.sh [NUMBERS…]
# lab: --timeout 400
# lab-env: LAB_MEMORY=4096
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

# crowd NUMBER: processes that have only what they inherit, until their parent is told to end, which is $crowd
crowd() {
    coproc crowd_ {
        exec perl -e '
            my ($count) = @ARGV;
            my (@open, @children);
            while (!@open || fileno $open[-1] < 49) {
                my ($kind, $file) = (@open % 5);
                if ($kind == 0) { open $file, "<", "/dev/null" }
                elsif ($kind == 1) { open $file, "<", "/etc/passwd" }
                elsif ($kind == 2) { socket $file, 1, 1, 0 }
                elsif ($kind == 3) { pipe $file, my $other; push @open, $other }
                else { open $file, "<", "/proc/version" }
                push @open, $file;
            }
            for (1 .. $count) {
                my $pid = fork // die "fork: $!\n";
                if (!$pid) { sleep 10000; exit }
                push @children, $pid;
            }
            $| = 1;
            print scalar @children, "\n";
            <STDIN>;
            kill "KILL", @children;
            waitpid $_, 0 for @children;
            print "gone\n"' "$1"
    }
    # shellcheck disable=SC2154 # coproc sets it
    said='' && read -r -t 300 -u "${crowd_[0]}" said
    is 'processes' "$1" "$said"
}
disperse() {
    echo >&"${crowd_[1]}" && read -r -t 300 -u "${crowd_[0]}" said
    is "what became of $1 processes" gone "$said"
    wait
}
fastest() { # fastest COMMAND…: milliseconds, of three times
    local best=''
    for _ in 1 2 3; do
        call "$@"
        [ -n "$best" ] && [ "$best" -le "$ms" ] || best=$ms
    done
    echo "$best"
}
nodes=(/dev/nvidia* /dev/dri/* /dev/snd/*)

# As many as one likes, and not only as many as systemd lets a service have.
echo $$ >/sys/fs/cgroup/cgroup.procs
remember_home
rows='' idle=$(fastest gpu-handoff --status) planned=$(fastest gpu-handoff plan 111)
declare -A scan
[ $# -gt 0 ] || set -- 200 1000 3000
# A look has a third of it, and is not what is measured against that here.
mkdir -p "${config%/*}"
echo '{"time":{"handoff_s":300}}' >"$config"
for count; do
    crowd $count
    # The driver's counts say that nobody has the card, so nobody is looked for. Twice for what is not quiet about the machine.
    unused=$(fastest gpu-handoff plan 111)
    ok "$count processes, none of which has the card: no look ($unused ms, $planned ms without them)" \
        test "$unused" -lt $((2 * planned + 20))
    hold /dev/nvidia0
    call $hook 111 pre-start
    exits "$count processes: one of them has the card" 3
    says "$count processes" "PID $holder (perl" '/dev/nvidia0 open'
    scan[$count]=$(($(fastest gpu-handoff --status) - idle))
    release
    fuser=$(fastest fuser "${nodes[@]}")
    rows+=$(printf '%10s %14s %10s' "$count" "${scan[$count]}" "$fuser")$'\n'
    ok "$count processes: not longer than fuser, or so" test "${scan[$count]}" -le $((fuser * 3 / 2))
    disperse $count
done
# And something for what is not quiet about an emulated machine.
most=${!#}
ok 'the time grows as the number of processes does' test $((scan[$most] * 1000 * 5)) -lt $((8 * scan[1000] * most))
is_home 'in the end'

echo
echo "Milliseconds, the fastest of three; --status without them, $idle ms, is subtracted"
printf '%10s %14s %10s\n%s' processes gpu-handoff fuser "$rows"
finish
