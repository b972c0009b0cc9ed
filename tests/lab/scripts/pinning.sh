#!/bin/bash
# A VM's threads and interrupts on CPUs of their own, read back from the real QEMU's threads and the kernel; a vCPU that is plugged
# in later; all of it put back. The lab's host has CPUs 0 and 1, and no cpufreq.
# lab: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

with_keeper
remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"
pinned() { echo "{\"vms\":{\"111\":{\"pin\":$1}}}" >$config; }
give() { sed -i '/^cores/d; /^vcpus/d; /^affinity/d' $guests/111.conf && printf '%s\n' "$@" >>$guests/111.conf; }

allowed() { awk '/^Cpus_allowed_list/ { print $2 }' "/proc/$qemu/task/$1/status" 2>/dev/null; }
threads() { # threads PATTERN: the numbers of QEMU's threads of such a name
    local task
    for task in "/proc/$qemu/task"/*; do
        # shellcheck disable=SC2053 # a pattern
        [[ $(cat "$task/comm" 2>/dev/null) != $1 ]] || echo "${task##*/}"
    done
}
of_vcpu() { allowed "$(threads "CPU $1/TCG")"; }
others() { # where all threads are that run no vCPU
    local task
    for task in $(threads '*'); do
        [[ $(cat "/proc/$qemu/task/$task/comm" 2>/dev/null) == CPU* ]] || allowed "$task"
    done | sort -u | xargs
}
is_pinned_to() { [ "$(of_vcpu "$1")" = "$2" ]; }
irqs() { sed -nE 's/^ *([0-9]+):.* vfio-[a-z]+.*\(0000:01:00\.[01]\).*/\1/p' /proc/interrupts; }
# The numbers change when a driver comes back.
affinities() { sort -u /proc/irq/*/smp_affinity_list; }
qmp() { # qmp COMMAND…: what QEMU answers, the last in $answer
    answer=$(perl -e '
        use IO::Socket::UNIX;
        my $socket = IO::Socket::UNIX->new(Peer => "/run/qemu-server/111.qmp") or die "qmp: $!";
        my $answer = <$socket>;
        for my $command ("{\"execute\":\"qmp_capabilities\"}", @ARGV) {
            print $socket "$command\n";
            do { $answer = <$socket> // die "qmp: it has gone" } while $answer =~ /"event"/;
        }
        print $answer' "$@")
}

# ---- a start, and what is there then ----
give 'cores: 2' 'vcpus: 1'
pinned '{"vcpus":"1,0","emulator":"0","irq":"1"}'
works 'plan' gpu-handoff plan 111
ok 'plan has the pinning' grep -q '^  pin  *vCPUs 0-1 on 1,0, emulator on 0, interrupts on 1$' /run/call.out
was=$(affinities)
works 'qm start' qm start 111
in_vm 'pinned' $slot1 111
qemu=$(</run/qemu-server/111.pid)
same 'names of threads' "CPU 0/TCG" "$(cat "/proc/$qemu/task"/*/comm | grep '^CPU')"
is 'vCPU 0' 1 "$(of_vcpu 0)"
is 'the other threads' 0 "$(others)"
is 'in the status' '0 1 0' "$(status $slot1 pinned.vcpus.0.number pinned.vcpus.0.cpus pinned.emulator)"
is 'not as configured' ARRAY "$(status $slot1 pinned.differs)"
is 'not as configured, the first' null "$(status $slot1 pinned.differs.0)"

# ---- interrupts: QEMU asks for the sound function's line by itself ----
for irq in $(irqs); do
    name=$(sed -nE "s/^ *$irq:.* (vfio-[^ ]*)/\\1/p" /proc/interrupts)
    is "interrupt $irq ($name)" 1 "$(<"/proc/irq/$irq/smp_affinity_list")"
    ok "interrupt $irq is on record" grep -q "/proc/irq/$irq/smp_affinity_list" $records/pin-111
done
echo "interrupts of the card: $(irqs | xargs)"

# ---- one that comes later ----
qmp '{"execute":"query-hotpluggable-cpus"}'
type=$(sed -nE 's/.*"type": *"([^"]+)".*/\1/p' <<<"$answer")
echo "cpus that can be plugged in: $answer"
qmp "{\"execute\":\"device_add\",\"arguments\":{\"driver\":\"$type\",\"id\":\"cpu1\",\"socket-id\":0,\"core-id\":1,\"thread-id\":0}}"
ok "device_add answers: $answer" grep -q '"return"' <<<"$answer"
ok 'vCPU 1 is pinned within seconds' within 10 is_pinned_to 1 0
is 'vCPU 0 still' 1 "$(of_vcpu 0)"
is 'both in the status' '1 0' "$(status $slot1 pinned.vcpus.0.cpus pinned.vcpus.1.cpus)"

# ---- put back ----
works 'qm stop' qm stop 111
is_home 'after the stop'
untouched 'after the stop' "$at_home"
ok 'nothing is on record' not test -e $records/pin-111
# An interrupt of messages has ended with QEMU; a line of the board is as it was.
same 'affinities' "$was" "$(affinities)"

# ---- QEMU is killed, and nobody fires post-stop ----
works 'killed: qm start' qm start 111
rm -f /run/qemu-server/111.cleanup
kill -9 "$(</run/qemu-server/111.pid)"
gone() { not test -e $records/pin-111 && nothing_is_kept; }
ok 'killed: all is put back by itself' within 60 gone
is_home 'killed'
same 'killed: affinities' "$was" "$(affinities)"

# ---- what cannot be: refused to who asks, and no start fails for it ----
cannot() { # cannot TEXT PIN WORDS CODE-OF-CONFIG-CHECK
    pinned "$2"
    call gpu-handoff plan 111
    exits "$1: plan" 2
    says "$1: plan" "$3"
    call gpu-handoff config check
    exits "$1: config check" "$4"
    works "$1: qm start" qm start 111
    says "$1: qm start" "$3" 'VM 111 goes on without it'
    in_vm "$1" $slot1 111
    qemu=$(</run/qemu-server/111.pid)
    is "$1: the other threads" 0 "$(others)"
    works "$1: qm stop" qm stop 111
}
cannot 'no such CPU' '{"vcpus":"1-2","emulator":"0"}' 'CPU 2 is not there or not online; online are 0-1' 2
cannot 'too few' '{"vcpus":"1","emulator":"0"}' '1 is too few for the 2 vCPUs' 0
cannot 'no cpufreq' '{"vcpus":"0-1","governor":"performance","emulator":"0"}' 'these CPUs do not have performance, but none to choose (no cpufreq)' 2
give 'cores: 2' 'affinity: 0'
cannot 'outside affinity' '{"vcpus":"0-1","emulator":"0"}' "CPU 1 is not in affinity of the VM's configuration, 0" 0

# ---- the cpuset of QEMU's cgroup, which only shows when it runs ----
give 'cores: 1'
systemctl set-property --runtime qemu.slice AllowedCPUs=0
pinned '{"vcpus":"1","emulator":"0"}'
works 'cpuset: qm start' qm start 111
says 'cpuset: qm start' 'CPU 1 is not in the cpuset of QEMU'
qemu=$(</run/qemu-server/111.pid)
is 'cpuset: vCPU 0' 0 "$(of_vcpu 0)"
works 'cpuset: qm stop' qm stop 111
systemctl set-property --runtime qemu.slice AllowedCPUs=

# ---- nobody asked for it ----
rm -f $config
works 'without: qm start' qm start 111
qemu=$(</run/qemu-server/111.pid)
is 'without: every thread' 0-1 "$(for task in $(threads '*'); do allowed "$task"; done | sort -u | xargs)"
is 'without: in the status' MISSING "$(status $slot1 pinned)"
works 'without: qm stop' qm stop 111
is_home 'without'
untouched 'without' "$at_home"
finish
