#!/bin/bash
# What a handoff costs above the kernel's own work: both directions against the
# bare writes, in turns, in one boot. Prints a table; the numbers prove nothing, so
# `make test` leaves it out: tests/lab/run --timeout 1200 tests/lab/scripts/bench.sh
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

rounds=${1:-5} calls=20
declare -A took=()

# Nothing but the writes and system calls that the kernel needs, timed without
# perl's own start: 228 is clock_gettime, 176 delete_module, 313 finit_module.
# "modprobe": modules are loaded by that program, as an administrator wants it.
bare() { # bare there | bare back finit|modprobe: milliseconds
    perl -e '
        my ($way, $loader, $dir) = @ARGV;
        my @fn = ("0000:01:00.0", "0000:01:00.1");
        my $pci = "/sys/bus/pci";
        sub now { my $t = pack "q2", 0, 0; syscall 228, 1, $t; my ($s, $n) = unpack "q2", $t; $s * 1e3 + $n / 1e6 }
        sub put {
            my ($path, $data) = @_;
            sysopen my $f, $path, 1 or die "$path: $!\n";
            defined syswrite $f, $data or die "$path: $data: $!\n";
        }
        sub unload { my ($name) = @_; syscall(176, $name, 2048) == 0 or die "$name: $!\n" }
        sub load {
            my ($name) = @_;
            if ($loader eq "modprobe") { system("/usr/sbin/modprobe", $name) == 0 or die "modprobe $name\n"; return }
            my $file = "$dir/" . $name =~ tr/_/-/r . ".ko";
            sysopen my $f, $file, 0 or die "$file: $!\n";
            syscall(313, fileno $f, my $options = "", 0) == 0 or die "$name: $!\n";
        }
        my $begin = now();
        if ($way eq "there") {
            put("$pci/devices/$_/driver_override", "vfio-pci") for @fn;
            unload($_) for "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia";
            put("$pci/drivers/snd_hda_intel/unbind", $fn[1]);
            put("$pci/drivers_probe", $_) for @fn;
        } else {
            put("$pci/devices/$fn[0]/driver_override", "nvidia");
            put("$pci/devices/$fn[1]/driver_override", "snd_hda_intel");
            put("$pci/drivers/vfio-pci/unbind", $_) for @fn;
            load("nvidia");
            put("$pci/drivers_probe", $fn[1]);
            load($_) for "nvidia_modeset", "nvidia_drm", "nvidia_uvm";
            put("$pci/devices/$_/driver_override", "\n") for @fn;
        }
        printf "%.1f\n", now() - $begin' "$@" "/lib/modules/$(uname -r)/updates/lab"
}
note() { # note NAME MILLISECONDS
    took[$1]+="$2 "
    [ -n "$2" ] || failures=$((failures + 1))
}
timed() { # timed NAME COMMAND…: from outside, start of the program included
    local name=$1 begin=${EPOCHREALTIME/./} end
    shift
    "$@" </dev/null >/dev/null 2>"${words:-/dev/null}" || { echo "FAIL: $*" && failures=$((failures + 1)); }
    end=${EPOCHREALTIME/./}
    note "$name" "$(((end - begin) / 1000)).$(((end - begin) / 100 % 10))"
}
row() { # row NAME
    # shellcheck disable=SC2086 # a list
    printf '%s\n' ${took[$1]} | sort -n | awk -v name="$1" \
        '{ v[NR] = $1 } END { printf "%-52s %8.1f %8.1f\n", name, v[1], v[int((NR + 1) / 2)] }'
}

remember_home
bare there >/dev/null
bare back modprobe >/dev/null
for ((i = 0; i < rounds; i++)); do
    note 'to vfio: bare writes' "$(bare there)"
    in_no_vm "round $i, bare" $slot1
    note 'home: bare writes, modules by finit_module' "$(bare back finit)"
    same "round $i, bare" "$home_drivers$home_modules" "$(all_of driver_of)$(modules)"
    bare there >/dev/null
    note 'home: bare writes, modules by modprobe' "$(bare back modprobe)"
    words=/run/there timed 'to vfio: gpu-handoff 111 pre-start' $hook 111 pre-start
    in_no_vm "round $i" $slot1
    words=/run/back timed 'home: gpu-handoff 111 post-stop' $hook 111 post-stop
    same "round $i" "$home_drivers$home_modules" "$(all_of driver_of)$(modules)"
done
for ((i = 0; i < calls; i++)); do
    timed 'no GPU: gpu-handoff 100 pre-start' $hook 100 pre-start
    timed 'no GPU: /bin/true' /bin/true
    timed 'gpu-handoff --status --json' gpu-handoff --status --json
done
is_home 'in the end'

printf '\n%-52s %8s %8s\n' milliseconds min median
for name in 'to vfio: bare writes' 'to vfio: gpu-handoff 111 pre-start' \
    'home: bare writes, modules by finit_module' 'home: bare writes, modules by modprobe' \
    'home: gpu-handoff 111 post-stop' 'no GPU: /bin/true' 'no GPU: gpu-handoff 100 pre-start' \
    'gpu-handoff --status --json'; do
    row "$name"
done

printf '\nThe last round in its own words:\n'
cat /run/there /run/back
finish
