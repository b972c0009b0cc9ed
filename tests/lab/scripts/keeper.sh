#!/bin/bash
# What a run cannot do, or what nobody is told of, the keeper does; and one card's handoff holds no other card's up.
# lab: --gpus 2 --timeout 600
# lab-genuine: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
is_as_before() { [ "$(snapshot)" = "$at_home" ]; }
mkdir -p "${config%/*}"
rests() { [ "$(systemctl is-active gpu-handoff-keeper.timer)" = inactive ]; }
comes_home() { # comes_home TEXT: by nobody's call
    ok "$1: comes home by itself" within 60 is_as_before
    same "$1: as before" "$at_home" "$(snapshot)"
    ok "$1: the keeper rests" within 40 rests
}
with_keeper
ok 'systemd understands the units' systemd-analyze verify --man=no /etc/systemd/system/gpu-handoff-keeper.{path,timer,service}
guest 112 "$slot2,pcie=1"

# ---- it is there as long as a card is away ----
ok 'it rests' rests
works 'qm start' qm start 111
ok 'it watches' within 20 systemctl --quiet is-active gpu-handoff-keeper.timer
sleep 15
in_vm 'left with its VM' $slot1 111
works 'qm stop' qm stop 111
comes_home 'stopped'

# ---- a post-stop that is never fired ----
works 'never fired: qm start' qm start 111
sed -i '/^hookscript:/d' $guests/111.conf
works 'never fired: qm stop' qm stop 111
comes_home 'never fired'
sed -i '1i hookscript: local:snippets/gpu-handoff' $guests/111.conf

# ---- a QEMU that lets go after handoff_s ----
# keep_open PID NODE: a copy of its descriptor, which outlives it
keep_open() {
    perl -e '
        my ($pid, $node) = @ARGV;
        my $process = syscall(434, $pid + 0, 0);
        for (glob "/proc/$pid/fd/*") {
            my $is = readlink or next;
            syscall(438, $process, $1 + 0, 0) >= 0 or die "$!" if $is eq $node && m{(\d+)$};
        }
        sleep 1000' "$1" "$2" &
    keeper=$!
}
works 'late: qm start' qm start 111
# Only now: an emulated start takes longer.
echo '{"time":{"handoff_s":5}}' >$config
keep_open "$(cat /run/qemu-server/111.pid)" "$(group_node $slot1)"
ok 'late: somebody keeps it' within 10 has_open $keeper "$(group_node $slot1)"
call qm stop 111
ok 'late: it is still there' [ "$(driver_of $slot1.0)" = vfio-pci ]
is 'late: what is owed' home "$(status $slot1 owed.0.what)"
sleep 12
ok 'late: nobody takes it by force' [ "$(driver_of $slot1.0)" = vfio-pci ]
kill $keeper
comes_home 'late'
rm $config

# ---- whoever does it is killed, all of them ----
works 'killed: qm start' qm start 111
bg qm stop 111
# The way home is short: nobody may be asked whether it has begun only ten times a second.
until grep -q returning $records/vm-111 || [ ! -e $records/vm-111 ]; do sleep 0.01; done 2>/dev/null
ok 'killed: it is on its way' grep -qs returning $records/vm-111
pkill -KILL -x gpu-handoff
ok 'killed: that task has ended' within 30 has_gone "$job"
comes_home 'killed'

# ---- two cards: one waits for a container, the other does not ----
printf '{"policy":{"container":"stop"},"time":{"stop_s":60}}\n' >$config
node=/dev/nvidia$(minor_of $slot1)
lab-ct create 101 'lxc.cgroup2.devices.allow: c 195:* rwm' "lxc.mount.entry: $node ${node#/} none bind,optional,create=file"
printf '#!/bin/sh\ntrap "" PWR TERM INT\nexec 3<%s\nwhile :; do sleep 1; done\n' "$node" >/var/lib/lab-ct/101/etc/rc.local
chmod 755 /var/lib/lab-ct/101/etc/rc.local
touch /var/lib/lab-ct/101/etc/ignores-shutdown
pct start 101 >/dev/null 2>&1
user_of() { pgrep -f '^/bin/sh /etc/rc.local' | head -n 1; }
ok 'container 101 has the card' within 20 has_open "$(user_of)" "$node"
bg qm start 111
ok 'one waits for a container' within 20 grep -qs '"container":101' $records/vm-111
works 'the other is made ready meanwhile' $hook 112 pre-start
in_no_vm 'the other' $slot2
ok 'one still waits' grep -qs leaving $records/vm-111
works 'the other starts' qm start 112
in_vm 'the other' $slot2 112
ok 'one has started' within 120 has_gone "$job"
in_vm 'one' $slot1 111
told() { journalctl --quiet --identifier=gpu-handoff --output=cat --grep="$1"; }
ok 'its log says for whom it waited' told 'waits for container 101 to stop, for up to (59|60) s'
qm stop 111 >/dev/null 2>&1 &
first=$!
works 'both stop in the same second' qm stop 112
wait $first
runs_again() { [ "$(pct status 101)" = 'status: running' ]; }
ok 'the container runs again' within 60 runs_again
pct stop 101 >/dev/null 2>&1
comes_home 'both'
lab-ct destroy 101

# ---- what starts again on one card keeps its driver while the other one comes home without a DRM device ----
printf '{"policy":{"unit":"stop"},"time":{"stop_s":60}}\n' >$config
cat >/run/systemd/system/slow-user.service <<END
[Service]
ExecStartPre=/bin/sh -c '[ ! -e /run/slowly ] || sleep 20'
ExecStart=/usr/bin/perl -e 'open F, "<", shift or exit 9; sleep 10000' $node
END
systemctl daemon-reload
works 'a user of one card' systemctl start slow-user
user_runs() { has_open "$(systemctl show --property=MainPID --value slow-user)" "$node"; }
ok 'it has the card' within 20 user_runs
works 'the other leaves' $hook 112 pre-start
works 'one leaves' $hook 111 pre-start
: >/run/slowly
works 'one comes home' $hook 111 post-stop
starts() { [ "$(systemctl is-active slow-user)" = activating ]; }
ok 'its user is being started' within 20 starts
marks=$(module_marks)
works 'the other comes home' $hook 112 post-stop
ok 'and its user still is' starts
same 'the driver was not loaded anew' "$marks" "$(module_marks)"
ok 'its user has the card again' within 40 user_runs
comes_home 'one after the other'
is_home 'one after the other'
rm $config
finish
