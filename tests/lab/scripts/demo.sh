#!/bin/bash
# A handoff as a user lives it, typed out like a terminal session: the host uses the GPU, so VM 111 is refused; the
# process ends; VM 111 starts with the card; it stops and the card is home again. Run with: make demo
#
# Nothing is taken for granted: whatever does not happen as told ends the script without its last line.
# lab:
# lab: --driver genuine
set -uo pipefail

# In the scope of a login session, as if a person typed this.
if [ -z "${DEMO_SESSION-}" ]; then
    DEMO_SESSION=1 exec systemd-run --quiet --scope --slice=user-0.slice --unit=session-1 "$0"
fi

gpu=/sys/bus/pci/devices/0000:01:00.0
audio=/sys/bus/pci/devices/0000:01:00.1
said=$(mktemp)
code=0
cd "$(mktemp -d)" || exit 1

# A comment for the reader, between two commands.
tell() { printf '\n%s\n' "$*"; }

# Shows a command as if typed, runs it, and keeps its output in $said and its exit code in $code.
typed() {
    printf '# %s\n' "$1"
    eval "$1" >"$said" 2>&1
    code=$?
    cat "$said"
}

fail() {
    printf 'demo: FAILED: %s\n' "$*"
    exit 1
}

# must TEXT COMMAND…
must() {
    local text=$1
    shift
    "$@" || fail "$text"
}
said() { grep -qF -- "$1" "$said"; }
driver_is() { [ "$(readlink "$1/driver")" != "" ] && [ "$(basename "$(readlink "$1/driver")")" = "$2" ]; }

at_home() {
    must 'the GPU is not on nvidia' driver_is "$gpu" nvidia
    must 'the audio function is not on snd_hda_intel' driver_is "$audio" snd_hda_intel
    must 'a driver_override was left behind' [ "$(cat "$gpu/driver_override" "$audio/driver_override")" = $'(null)\n(null)' ]
    must '/dev/nvidia0 cannot be opened' eval '(: </dev/nvidia0) 2>/dev/null'
}

# What the last handoff was and took, from the status that programs read: last EXPECTED-DIRECTION → milliseconds
status_json() { gpu-handoff --status --json; }
owner_is() { status_json | grep -qF "\"owner\":{\"kind\":\"$1\",\"vmid\":$2}"; }
last() {
    local document
    # The phases have an "ms" each, so they go first.
    document=$(status_json | sed 's/"phases":\[[^]]*\]//g' | grep -o '"last":{[^}]*}') || return
    [[ $document == *"\"direction\":\"$1\""* && $document == *'"exit":0'* && $document == *'"vmid":111'* ]] || return
    [[ $document =~ \"ms\":([0-9]+) ]] && printf '%s\n' "${BASH_REMATCH[1]}"
}

# Opens what a CUDA program opens and computes nothing.
cat >cuda-job <<'JOB'
#!/usr/bin/perl
open my $ctl, '+<', '/dev/nvidiactl' or die "/dev/nvidiactl: $!\n";
open my $uvm, '+<', '/dev/nvidia-uvm' or die "/dev/nvidia-uvm: $!\n";
open my $gpu, '+<', '/dev/nvidia0' or die "/dev/nvidia0: $!\n";
open my $ready, '>', 'cuda-job.ready' or die;
sleep;
JOB
chmod 755 cuda-job

# shellcheck source=/dev/null
. /opt/lab/settings
case $LAB_STACK in
    genuine) tell "The driver is NVIDIA's own, $LAB_DRIVER." ;;
    *) tell "The driver is the lab's stub of NVIDIA's $LAB_DRIVER (make demo DRIVER=genuine: NVIDIA's own)." ;;
esac

tell 'A Proxmox host with one NVIDIA GPU. VM 111 wants it and has gpu-handoff as its hookscript.'
typed "qm config 111 | grep -e hostpci -e hookscript"
must 'VM 111 has no hookscript' said 'hookscript: local:snippets/gpu-handoff'
typed 'gpu-handoff --status'
must 'the host does not have the GPU' owner_is host null
at_home

tell 'By day the host computes on the GPU. Whoever starts VM 111 now is told why it cannot have it.'
typed './cuda-job &'
job=$!
for _ in {1..100}; do
    [ -e cuda-job.ready ] && break
    sleep 0.1
done
must 'the process does not use the GPU' [ -e cuda-job.ready ]
typed 'gpu-handoff --status'
must 'the status does not name the process' said "PID $job (cuda-job"
typed 'qm start 111'
must 'VM 111 started although the GPU is in use' [ "$code" = 255 ]
must 'the refusal does not name the process' said "in use: PID $job (cuda-job"
must 'the hook did not exit with 3' said 'failed: exit code 3'
must 'VM 111 runs' eval 'qm status 111 | grep -qx "status: stopped"'
must 'the process is gone' [ -e "/proc/$job" ]
at_home

tell 'The message says what to type.'
remedy=$(sed -n 's/.*type: \([^;]*\);.*/\1/p' "$said")
must 'the refusal does not say what to type' [ "$remedy" = "kill $job" ]
typed "$remedy"
wait "$job" 2>/dev/null
typed 'qm start 111'
must 'VM 111 did not start' [ "$code" = 0 ]
if said '/reset'; then echo "(The reset that fails is Proxmox's, of an emulated card that has none.)"; fi
there=$(last vfio) || fail 'the status does not know of a handoff to VM 111'
typed 'gpu-handoff --status'
must 'VM 111 does not have the GPU' owner_is vm 111
must 'the GPU is not on vfio-pci' driver_is "$gpu" vfio-pci
must 'the audio function is not on vfio-pci' driver_is "$audio" vfio-pci

tell "It really has the card: QEMU holds its IOMMU group."
group=$(basename "$(readlink "$gpu/iommu_group")")
# shellcheck disable=SC2016 # the demo's shell expands it
typed 'ls -l /proc/$(cat /run/qemu-server/111.pid)/fd | grep -o "/dev/vfio/.*"'
must "QEMU does not hold /dev/vfio/$group" grep -qx "/dev/vfio/$group" "$said"

tell 'At night VM 111 stops, and the card comes home.'
typed 'qm stop 111'
must 'VM 111 did not stop' [ "$code" = 0 ]
back=$(last home) || fail 'the status does not know of a handoff home'
typed 'gpu-handoff --status'
must 'the host does not have the GPU' owner_is host null
at_home
must 'a record is left' [ ! -e /run/gpu-handoff/vm-111 ]

printf '\ndemo: ok: host -> VM 111 in %s ms, VM 111 -> host in %s ms\n' "$there" "$back"
