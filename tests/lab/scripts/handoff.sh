# What a handoff is checked by. Sourced by the scripts here, not run.
# shellcheck shell=bash disable=SC2034 # used by the scripts
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"
# LAB_HOME, LAB_GPUS, LAB_DRIVER, LAB_MODESET: what tests/lab/run was told
# shellcheck source=/dev/null
. /opt/lab/settings
export LC_ALL=C

hook=/var/lib/vz/snippets/gpu-handoff
records=/run/gpu-handoff
config=/etc/gpu-handoff/config.json
vfio_driver=/sys/bus/pci/drivers/vfio-pci
guests=/etc/pve/qemu-server
functions=()
for ((n = 1; n <= LAB_GPUS; n++)); do functions+=("0000:0$n:00.0" "0000:0$n:00.1"); done

# ---- calls ----

# call COMMAND…: exit code in $rc, milliseconds in $ms, what it wrote in $out and $err
call() {
    local begin=${EPOCHREALTIME/./}
    "$@" </dev/null >/run/call.out 2>/run/call.err
    rc=$?
    ms=$(((${EPOCHREALTIME/./} - begin) / 1000))
    out=$(</run/call.out) err=$(</run/call.err)
}
same() { # same TEXT WANT HAVE: texts of many lines
    if [ "$2" = "$3" ]; then echo "ok: $1"; else
        echo "FAIL: $1: wanted (-) and got (+)"
        diff -U1 <(printf '%s\n' "$2") <(printf '%s\n' "$3") | sed '1,2d; s/^/    | /'
        failures=$((failures + 1))
    fi
}
exits() { # exits TEXT CODE: the last call ended with it; if not, its words help
    is "$1: exit code" "$2" "$rc"
    [ "$rc" = "$2" ] || sed 's/^/    | /' /run/call.err
}
says() { # says TEXT WORDS…: the last call's standard error has them all
    local text=$1 words
    shift
    for words in "$@"; do
        if [[ $err == *"$words"* ]]; then echo "ok: $text says: $words"; else
            echo "FAIL: $text should say '$words' and says: $err"
            failures=$((failures + 1))
        fi
    done
}
one_line() { is "$1: lines of standard error" 1 "$(wc -l </run/call.err)"; }
silent() { same "$1: silence" '' "$out$err"; }
quick() { # quick TEXT MILLISECONDS: the last call took less
    if [ "$ms" -lt "$2" ]; then echo "ok: $1 took $ms ms"; else
        echo "FAIL: $1 took $ms ms, not less than $2"
        failures=$((failures + 1))
    fi
}
works() { # works TEXT COMMAND…: exits with 0
    local text=$1
    shift
    call "$@"
    exits "$text" 0
}

# ---- how things are ----

override_of() { cat "$pci/$1/driver_override"; }
all_of() { # all_of COMMAND: what it says of every function of every card
    local f
    for f in "${functions[@]}"; do printf '%s %s\n' "$f" "$("$1" "$f")"; done
}
modules() { awk '/^(nvidia|nouveau|vfio|snd_hda_intel)/ { print $1 }' /proc/modules | sort; }
# Number, mode and owner; the dynamic major by name, and only if it is the right one.
nodes() {
    local uvm
    uvm=$(awk '$2 == "nvidia-uvm" { printf "%x", $1 }' /proc/devices)
    find /dev -maxdepth 1 -name 'nvidia*' -exec stat -c '%n %t:%T %a %u:%g' {} + |
        sed "s/ ${uvm:-none}:/ uvm:/" | sort
}
# Which function has which DRM devices, and how many of their nodes are there and are these. With two cards not by name:
# nvidia_drm numbers them anew when it is loaded, and has to be loaded anew to see a card that came back.
drm_devices() {
    local f device name
    for f in "${functions[@]}"; do
        for device in "$pci/$f/drm"/*; do
            [ -e "$device/dev" ] || continue
            name=${device##*/}
            [ "$(<"$device/dev")" = "$(($(stat -c 0x%t "/dev/dri/$name"))):$(($(stat -c 0x%T "/dev/dri/$name")))" ] || name+=' (another one)'
            [ "$LAB_GPUS" = 1 ] || name=${name//[0-9]/}
            echo "$f $name"
        done
    done
}
kept() { # what gpu-handoff remembers; not how the last handoff went
    local f
    for f in "$records"/vm-* "$records"/manual-* "$records"/wedged-* "$records"/journal* "$records"/to-start; do
        [ ! -e "$f" ] || printf '%s %s\n' "$f" "$(<"$f")"
    done
}
snapshot() {
    all_of driver_of
    all_of override_of
    modules
    nodes
    kept
}
# The inode of a module's directory is another one after a reload.
module_marks() { stat -c '%n %i' /sys/module/nvidia /sys/module/nvidia_modeset /sys/module/nvidia_uvm; }

group_node() { echo "/dev/vfio/$(basename "$(readlink "$pci/$1.0/iommu_group")")"; }
minor_of() { awk '/Device Minor/ { print $3 }' "/proc/driver/nvidia/gpus/$1.0/information"; }

# status SLOT KEY…: values of that GPU in --status --json, such as owner.kind.
# perl-base has no JSON module; JSON is nearly Perl.
status() {
    gpu-handoff --status --json | perl -e '
        local $/; my $text = <STDIN>;
        $text =~ s{("(?:[^"\\]|\\.)*")|:|null|true|false}{
            defined $1 ? "q\0" . substr($1, 1, -1) . "\0" : $& eq ":" ? "=>" : $& eq "null" ? "undef" : $& eq "true" ? 1 : 0}ge;
        my $all = eval $text or die "status is no JSON: $@";
        my ($gpu) = grep { $_->{slot} eq $ARGV[0] } @{ $all->{gpus} } or die "status has no $ARGV[0]";
        print join(" ", map {
            my $at = $gpu;
            for my $key (split /\./) {
                if (ref $at eq "ARRAY") { $at = $at->[$key] }
                elsif (ref $at eq "HASH" && exists $at->{$key}) { $at = $at->{$key} }
                else { $at = "MISSING"; last }
            }
            defined $at ? ref $at ? ref $at : $at : "null" } @ARGV[1 .. $#ARGV]), "\n"' "$@"
}

# The keeper comes by itself, as where the package is installed.
with_keeper() {
    install -m 644 "${0%/*}"/gpu-handoff-keeper.{path,timer,service} /etc/systemd/system
    systemctl daemon-reload
    systemctl start gpu-handoff-keeper.path
}

# ---- checks ----

# Called before the first handoff: what "as before" means.
remember_home() {
    home_drivers=$(all_of driver_of) home_modules=$(modules) home_nodes=$(nodes) home_drm=$(drm_devices)
}
# Asking vfio-pci to forget an id is how to see that it has none: ENODEV.
has_no_id() { # has_no_id TEXT DEVICE
    local said
    said=$({ echo "10de $2" >"$vfio_driver/remove_id"; } 2>&1)
    is "$1: remove_id of 10de:$2" 'No such device' "${said##*: }"
}
# Not for writing: the shell would make a file where there is no node.
opens() { [ -c "$1" ] && (exec 9<"$1") 2>/dev/null; }

nothing_is_kept() { [ -z "$(kept)" ]; }
drm_is_home() { [ "$(drm_devices)" = "$home_drm" ]; } # udev makes the nodes
is_home() { # is_home TEXT: every card, in every respect
    local n
    same "$1: drivers" "$home_drivers" "$(all_of driver_of)"
    is "$1: overrides" '(null)' "$(all_of override_of | cut -d' ' -f2 | sort -u)"
    same "$1: modules" "$home_modules" "$(modules)"
    same "$1: device nodes" "$home_nodes" "$(nodes)"
    [ "$LAB_HOME" != nvidia ] || within 5 drm_is_home || same "$1: DRM devices" "$home_drm" "$(drm_devices)"
    # What was stopped starts again afterwards, and is on record until it runs.
    within 30 nothing_is_kept || is "$1: records" '' "$(kept)"
    if [ "$LAB_HOME" != vfio ]; then
        has_no_id "$1" 2684
        has_no_id "$1" 22ba
    fi
    if [ "$LAB_HOME" = nvidia ]; then
        for ((n = 0; n < LAB_GPUS; n++)); do
            ok "$1: /dev/nvidia$n opens" opens "/dev/nvidia$n"
            is "$1: owner in the status" 'host null' "$(status "0000:0$((n + 1)):00" owner.kind owner.vmid)"
        done
    fi
}
has_open() { find "/proc/$1/fd" -lname "$2" | grep -q .; }
in_vm() { # in_vm TEXT SLOT VMID: a running VM has the card
    local node pid
    node=$(group_node "$2")
    pid=$(cat "/run/qemu-server/$3.pid")
    is "$1: drivers" 'vfio-pci vfio-pci' "$(driver_of "$2.0") $(driver_of "$2.1")"
    if [ "$LAB_HOME" != vfio ]; then
        is "$1: overrides" 'vfio-pci vfio-pci' "$(override_of "$2.0") $(override_of "$2.1")"
    fi
    ok "$1: QEMU has $node open" has_open "$pid" "$node"
    is "$1: owner in the status" "vm $3" "$(status "$2" owner.kind owner.vmid)"
}
in_no_vm() { # in_no_vm TEXT SLOT: on vfio-pci, ready for one
    is "$1: drivers" 'vfio-pci vfio-pci' "$(driver_of "$2.0") $(driver_of "$2.1")"
    is "$1: overrides" 'vfio-pci vfio-pci' "$(override_of "$2.0") $(override_of "$2.1")"
}
untouched() { # untouched TEXT SNAPSHOT
    same "$1: drivers, overrides, modules, nodes, records" "$2" "$(snapshot)"
}
# in_use VIA HOW PID COMMAND WORD…: VM 111 is refused within a second, as PID has VIA "open" or "mapped", and nothing
# is touched. $at_home is how things were. The fastest of three tries counts: the machine is emulated and shared.
in_use() {
    local via=$1 how=$2 pid=$3 command=$4 text="$1 $2" best=''
    shift 4
    for _ in 1 2 3; do
        call $hook 111 pre-start
        [ -n "$best" ] && [ "$best" -le "$ms" ] || best=$ms
    done
    ms=$best
    exits "$text" 3
    quick "$text: refusing" 1000
    one_line "$text"
    says "$text" "$slot1" "PID $pid ($command" "has $via $how" "$@"
    is "$text: standard output" '' "$out"
    is "$text: in the status" "$pid $command $via" "$(status $slot1 users.0.pid users.0.command users.0.via)"
    untouched "$text" "${at_home:?}"
}
# A program that uses a node of card 2, and says on request whether its descriptor still works: it asks the driver how its
# open went. Its pid in $user_pid.
start_user() { # start_user NODE
    coproc user {
        exec perl -e '
            $| = 1;
            sysopen F, shift, 2 or die "$!";
            print "ready\n";
            while (<STDIN>) {
                my $said = pack "L2", 9, 9;
                print !defined ioctl(F, 0xC00846DA, $said) ? "$!\n" : unpack("L", $said) ? "garbage\n" : "works\n";
            }' "$1"
    }
    # shellcheck disable=SC2154 # coproc sets it
    user_pid=$user_PID
    read -r -t 20 -u "${user[0]}" user_said
    is "a program uses $1" ready "$user_said"
}
# $marks: module_marks from before
still_works() { # still_works TEXT
    user_said=
    echo >&"${user[1]}" && read -r -t 20 -u "${user[0]}" user_said
    is "$1: the program on card 2" works "$user_said"
    is "$1: card 2" 'nvidia snd_hda_intel' "$(driver_of $slot2.0) $(driver_of $slot2.1)"
    is "$1: owner of card 2" 'host null' "$(status $slot2 owner.kind owner.vmid)"
    same "$1: nvidia was not loaded anew" "${marks:?}" "$(module_marks)"
}
end_user() {
    kill "$user_pid"
    wait "$user_pid" 2>/dev/null
    user_pid=''
}
guest() { # guest VMID HOSTPCI…: a VM's configuration
    local n=0 id=$1
    shift
    {
        printf '%s\n' 'boot: ' 'cores: 1' 'hookscript: local:snippets/gpu-handoff'
        for h in "$@"; do echo "hostpci$((n++)): $h"; done
        printf '%s\n' 'machine: q35' 'memory: 64' "name: test-$id" 'ostype: l26' 'vga: none'
    } >"$guests/$id.conf"
}
