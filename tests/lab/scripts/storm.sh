#!/bin/bash
# Two hundred device events while containers start and stop: none takes long, and all is well afterwards. Everything is
# slow here; what it costs only to start the program, at the same time, is printed beside what an event costs.
# lab: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
times=/run/handlers
# Runs a program in whose place it stands, and writes down: which, the PID that all of one event have in common, and
# microseconds: from its own beginning to the end, and on a processor, its own among them only for systemd-run.
cat >/usr/local/sbin/timed <<'END'
#!/usr/bin/perl
sub clock { my $t = "\0" x 16; syscall(228, 7, $t); my ($s, $n) = unpack 'qq', $t; return $s * 1e6 + $n / 1000 }
sub rusage { my ($s, $us, $t, $tus) = unpack 'q4', $_[0]; return ($s + $t) * 1e6 + $us + $tus }
my $run = $0 =~ m/systemd-run$/;
my $begin = clock();
if ($run) {    # perl's own start counts: in hundredths of a second since boot
    open my $f, '<', '/proc/self/stat' or die;
    $begin = (split ' ', <$f> =~ s/.*\)//r)[19] * 1e4;
}
my $pid = fork;
exec { $run ? '/usr/bin/systemd-run.real' : '/usr/sbin/gpu-handoff' } $0, @ARGV if !$pid;
my ($status, $usage) = ("\0" x 4, "\0" x 144);
syscall(61, $pid, $status, 0, $usage);
my ($wall, $busy, $self) = (clock() - $begin, rusage($usage), "\0" x 144);
if ($run) { syscall(98, 0, $self); $busy += rusage($self) }
open my $f, '>>', '/run/handlers' or die;
printf $f "%s %d %d %d\n", $run ? 'run' : $ARGV[0] eq 'udev' ? 'event' : 'start', $run ? getppid : $pid, $wall, $busy;
exit(unpack('i', $status) >> 8);
END
chmod 755 /usr/local/sbin/timed
mv /usr/bin/systemd-run /usr/bin/systemd-run.real
cp /usr/local/sbin/timed /usr/bin/systemd-run
sed 's|/usr/sbin/gpu-handoff|/usr/local/sbin/timed|' "${0%/*}/60-gpu-handoff.rules" >/etc/udev/rules.d/60-gpu-handoff.rules
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
begin=$SECONDS
for round in {1..40}; do
    # As udevadm trigger does it, without what starting that costs.
    for module in nvidia nvidia_uvm nvidia_modeset nvidia_drm; do echo add >/sys/module/$module/uevent; done
    echo bind >$pci/$slot1.0/uevent
    [ $((round % 4)) != 0 ] || timed --version >/dev/null
    case $round in
        10 | 20 | 30) rm -f /dev/nvidia0 /dev/nvidia-uvm ;;
        15 | 25) rmmod nvidia_uvm && modprobe nvidia_uvm ;;
        35) unload_stack && load_stack ;;
    esac
done
udevadm settle --timeout=120
: >/run/enough
wait
is_settled() { [ ! -e $records/device-event ] && [ -z "$(systemctl list-units --no-legend 'gpu-handoff-*')" ]; }
ok 'all events are seen to' within 60 is_settled
echo "# $((SECONDS - begin)) s; containers started, and failed to: $(cat /run/starts-* | paste -sd' ')"
# Without systemd-run, which is systemd's: milliseconds in all and on a processor.
awk '$1 == "run" { wall[$2] = $3; busy[$2] = $4 }
    $1 == "event" { n++; pid[n] = $2; w[n] = $3; b[n] = $4 }
    $1 == "start" { print "start", $3 / 1000, $4 / 1000 }
    END { for (i = 1; i <= n; i++) print (pid[i] in wall) ? "asked" : "event", (w[i] - wall[pid[i]]) / 1000, (b[i] - busy[pid[i]]) / 1000 }' \
    $times >/run/own
# middle KIND COLUMN: and the largest
middle() { awk -v kind="$1" -v column="$2" '$1 ~ kind { print $column }' /run/own | sort -n |
    awk '{ a[NR] = $1 } END { printf "%d %d", a[int((NR + 1) / 2)], a[NR] }'; }
for kind in start event asked; do
    echo "# $kind: $(grep -c "^$kind" /run/own) times; ms in all, middle and most: $(middle "^$kind" 2); on a processor: $(middle "^$kind" 3)"
done
events=$(grep -cv '^start' /run/own) asked=$(grep -c '^asked' /run/own)
ok "$events events, 200 at least" [ "$events" -ge 200 ]
ok "of them $asked asked for a look" [ "$asked" -lt $((events / 2)) ]
# On a machine that is shared and emulated, the most is chance.
read -r busy most < <(middle '^(event|asked)' 3)
ok "an event took $busy ms of a processor" [ "$busy" -lt 100 ]
ok "at most $most ms" [ "$most" -lt 500 ]
is_home 'after the storm'
is 'failed units' '' "$(systemctl --failed --no-legend)"
is 'processes' '' "$(pgrep -a gpu-handoff)"
is 'what is left' '' "$(find $records -name 'ct-*' -o -name device-event -o -name '.*')"
is 'unfinished nodes' '' "$(find /dev -maxdepth 1 -name '.nvidia*')"
is 'starts and stops that failed' '0 0' "$(cut -d' ' -f2 /run/starts-* | paste -sd' ')"
echo "# $SECONDS s"
finish
