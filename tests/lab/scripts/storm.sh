#!/bin/bash
# Two hundred device events while containers start and stop: none takes long, and all is well afterwards.
# lab: --timeout 600
# lab-genuine: --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
# The kernel writes down what each process took, in hundredths of a second; by its name the ones that matter are found.
accounting() { # accounting FILE: to there from now on, or no more
    : >"$1"
    perl -e 'syscall(163, $ARGV[0] eq "/dev/null" ? 0 : $ARGV[0]) == 0 or die "acct: $!\n"' "$1"
}
ln -s /usr/sbin/gpu-handoff /usr/local/sbin/gh-event
ln -s /usr/sbin/gpu-handoff /usr/local/sbin/gh-start
sed 's|/usr/sbin/gpu-handoff|/usr/local/sbin/gh-event|' "${0%/*}/60-gpu-handoff.rules" >/etc/udev/rules.d/60-gpu-handoff.rules
udevadm control --reload

for id in 101 102; do
    lab-ct create $id 'lxc.cgroup2.devices.allow: c 195:* rwm' \
        'lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file' \
        'lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file'
done
# One alone: the first start of all brings lxc-monitord up.
works 'the first start' pct start 101
works 'the first stop' pct stop 101
starts() { # starts CTID: and stops, until told to end
    local n=0 failed=0
    while [ ! -e /run/enough ]; do
        pct start "$1" >>"/run/pct-$1" 2>&1 || failed=$((failed + 1))
        pct stop "$1" >>"/run/pct-$1" 2>&1 || failed=$((failed + 1))
        n=$((n + 1))
    done
    echo "$n $failed" >"/run/starts-$1"
}
for id in 101 102; do starts $id & done
accounting /run/account
begin=$SECONDS
for round in {1..40}; do
    # As udevadm trigger does it, without what starting that costs.
    for module in nvidia nvidia_uvm nvidia_modeset nvidia_drm; do echo add >/sys/module/$module/uevent; done
    echo bind >$pci/$slot1.0/uevent
    [ $((round % 4)) != 0 ] || gh-start --version >/dev/null
    case $round in
        10 | 20 | 30) rm -f /dev/nvidia0 /dev/nvidia-uvm ;;
        15 | 25) rmmod nvidia_uvm && modprobe nvidia_uvm ;;
        35) unload_stack && load_stack ;;
    esac
done
ok 'udev is done' udevadm settle --timeout=300
: >/run/enough
wait
is_settled() { [ ! -e $records/device-event ] && [ -z "$(systemctl list-units --no-legend 'gpu-handoff-*')" ]; }
ok 'all events are seen to' within 120 is_settled
echo "# $((SECONDS - begin)) s; containers started, and failed to: $(cat /run/starts-* | paste -sd' ')"
accounting /dev/null
# Of each event, and of a start for nothing: milliseconds in all without systemd-run, which is systemd's, and on a
# processor with what it forked.
perl -e '
    my (%of, %run);
    local $/ = \64;
    while (<>) {
        my (undef, undef, undef, undef, undef, undef, $pid, $ppid, undef, $wall, @c) = unpack "CCSLLLLLLfS8", $_;
        my ($name) = unpack "x48 Z16", $_;
        my $busy = 0;
        $busy += ($_ & 0x1fff) << 3 * ($_ >> 13) for @c[0, 1];
        $of{$pid} = [$name, $ppid, $wall * 10, $busy * 10] if $name =~ m/^gh-/;
        $run{$ppid} += $wall * 10 if $name eq "systemd-run";
    }
    for (grep { $of{ $_->[1] } } values %of) { $of{ $_->[1] }[3] += $_->[3]; $_->[0] = "" }
    for (grep { $of{$_}[0] } keys %of) {
        my ($name, undef, $wall, $busy) = @{ $of{$_} };
        printf "%s %d %d\n", $run{$_} ? "gh-asked" : $name, $wall - ($run{$_} // 0), $busy;
    }' /run/account >/run/own
middle() { # middle KIND COLUMN: and the most
    awk -v kind="^gh-($1)" -v column="$2" '$1 ~ kind { print $column }' /run/own | sort -n |
        awk '{ a[NR] = $1 } END { printf "%d %d\n", a[int((NR + 1) / 2)], a[NR] }'
}
for kind in start event asked; do
    echo "# $kind: $(grep -c "^gh-$kind" /run/own) times; ms in all, middle and most: $(middle $kind 2); on a processor: $(middle $kind 3)"
done
events=$(grep -cv '^gh-start' /run/own) asked=$(grep -c '^gh-asked' /run/own)
ok "$events events, 200 at least" [ "$events" -ge 200 ]
ok "of them $asked asked for a look" [ "$asked" -lt $((events / 2)) ]
# Where a start takes a millisecond, as on a real machine, this is less than 10 ms as a rule, and never 100.
read -r start _ < <(middle start 3)
[ "$start" -gt 0 ] || start=10
read -r busy most < <(middle 'event|asked' 3)
ok "an event takes a processor as long as $((busy / start)) starts" [ "$busy" -lt $((10 * start)) ]
ok "at most as $((most / start))" [ "$most" -lt $((100 * start)) ]
is_home 'after the storm'
is 'failed units' '' "$(systemctl --failed --no-legend)"
is 'processes' '' "$(pgrep -a gpu-handoff)"
is 'what is left' '' "$(find $records -name 'ct-*' -o -name device-event -o -name '.*')"
is 'unfinished nodes' '' "$(find /dev -maxdepth 1 -name '.nvidia*')"
is 'starts and stops that failed' '0 0' "$(cut -d' ' -f2 /run/starts-* | paste -sd' ')"
echo "# $SECONDS s"
finish
