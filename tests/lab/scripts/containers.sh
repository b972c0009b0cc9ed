#!/bin/bash
# Containers have the card, before a VM had it and after, whether they were stopped for it or not; stale nodes are
# found, and told of or put right; without the card they start or do not.
# lab: --timeout 600
# lab: --driver genuine --timeout 900
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

rules=/etc/udev/rules.d/60-gpu-handoff.rules
install -m 644 "${0%/*}/60-gpu-handoff.rules" $rules
works 'udev understands the rules' udevadm verify $rules
udevadm control --reload
remember_home
mkdir -p "${config%/*}"

uvm_major() { awk '$2 == "nvidia-uvm" { print $1 }' /proc/devices; }
policy() { printf '{"policy":{"containers":{"101":"stop","102":"leave"},%s},"time":{"stop_s":60}}\n' "$1" >$config; }
init_of() { lxc-info -n "$1" -p -H 2>/dev/null; }
has_nodes() { # has_nodes CTID: a process inside opens them
    # shellcheck disable=SC2016 # for the shell inside
    pct exec "$1" -- sh -c 'for n in nvidia0 nvidiactl nvidia-uvm; do : </dev/$n || exit 1; done' 2>/dev/null
}
user_of() { pgrep -f "sleep 10$1"; }
has_card() { has_open "$(user_of "$1" | head -n 1)" /dev/nvidia0 2>/dev/null; }
told() { journalctl --quiet --identifier=gpu-handoff --output=cat --grep="$1"; }
notes() { find $records -name 'ct-*' -printf '%f\n' -o -name device-event -printf '%f\n'; }
is_settled() { [ -z "$(notes | grep device-event)$(systemctl list-units --no-legend 'gpu-handoff-*')" ]; }

policy '"unit":"refuse"'
lab-ct create 101 --debian
lab-ct create 102 --unprivileged --debian
works 'attach' gpu-handoff container attach 101
works 'attach by dev' gpu-handoff container attach 102 --style dev

# ---- as at a boot: nobody has loaded nvidia_uvm or made a node ----
install -m 644 "${0%/*}/gpu-handoff-reconcile.service" /etc/systemd/system
systemctl daemon-reload
rmmod nvidia_uvm
rm -f /dev/nvidia*
works 'as at a boot' systemctl start gpu-handoff-reconcile.service
is_home 'as at a boot'
old=$(uvm_major)

# ---- a process inside opens them ----
printf '#!/bin/sh\n[ ! -e /etc/busy ] || exec 3</dev/nvidia0\nexec sleep 10101\n' >/var/lib/lab-ct/101/etc/rc.local
chmod 755 /var/lib/lab-ct/101/etc/rc.local
: >/var/lib/lab-ct/101/etc/busy
rm -f /dev/nvidia-uvm /dev/nvidia0
works 'start of a privileged one' pct start 101
is_home 'nodes that were missing were made'
works 'start of an unprivileged one' pct start 102
ok 'the privileged one has the nodes' has_nodes 101
ok 'the unprivileged one has the nodes' has_nodes 102
ok 'one uses the card' within 20 has_card 101

# ---- while a VM's hook has the lock, containers' phases do not wait for it ----
mkdir -p $records
flock $records/lock sleep 1000 &
locker=$!
for phase in pre-start post-start pre-stop post-stop; do
    works "the lock is taken: $phase" $hook 101 $phase
    quick "the lock is taken: $phase" 1000
done
pkill -P $locker
wait $locker 2>/dev/null

# ---- stopped and started again; or left alone, and the nodes work again without help ----
idle=$(init_of 102)
works 'qm start' qm start 111
in_vm 'with the VM' $slot1 111
is 'container 101' 'status: stopped' "$(pct status 101)"
works 'to start without: pct start' pct start 101
says 'to start without' "container 101 starts without $slot1: VM 111 has it" 'qm shutdown 111'
pct stop 101 >/dev/null 2>&1
policy '"ct_without_gpu":"refuse"'
call pct start 101
is 'not to start without: exit code' 255 "$rc"
says 'not to start without' "container 101 was not started: VM 111 has $slot1" 'qm shutdown 111' 'exit code 3'
is 'not to start without' 'status: stopped' "$(pct status 101)"
works 'qm stop' qm stop 111
is_home 'after the VM'
ok 'container 101 uses the card again' within 60 has_card 101
ok 'and has the nodes' has_nodes 101
is 'container 102 was not restarted' "$idle" "$(init_of 102)"
ok 'and has the nodes' has_nodes 102
ok 'device events are seen to' within 30 is_settled
is 'nothing is told of' '' "$(notes)$(told 'stale')"

# ---- another major of nvidia-uvm meanwhile ----
rm /var/lib/lab-ct/101/etc/busy
kill -KILL "$(user_of 101)"
before=$(init_of 101)
works 'with another major: qm start' qm start 111
# The driver has left its majors, and somebody else takes one of them.
works 'with another major: usbmon' modprobe usbmon
works 'with another major: qm stop' qm stop 111
other=$(uvm_major)
ok 'the major is another' [ -n "$other" -a "$other" != "$old" ]
is_home 'with another major'
restarted() { [ -n "$(init_of 101)" ] && [ "$(init_of 101)" != "$before" ] && [ -n "$(told 'container 101 was restarted')" ]; }
ok 'container 101 was restarted' within 90 restarted
ok 'and has the nodes' has_nodes 101
ok 'device events are seen to' within 60 is_settled
is 'container 102 was not' "$idle" "$(init_of 102)"
same 'but told of' "warning: container 102 has stale nodes: /dev/nvidia-uvm is $old:0 inside, $other:0 on the host, \
/dev/nvidia-uvm-tools is $old:1 inside, $other:1 on the host; restart it: pct reboot 102" "$(told 'container 102 has stale')"
works 'another look' gpu-handoff settle
silent 'another look'
is 'it is kept' ct-102 "$(notes)"

# ---- a VM's hook stops a container whose own hooks run meanwhile: all end, whoever is first ----
: >/var/lib/lab-ct/101/etc/busy
policy '"ct_without_gpu":"start"'
pct reboot 101 >/dev/null 2>&1
ok 'container 101 uses the card' within 20 has_card 101
begin=$SECONDS
bg qm start 111
starting=$job
within 20 test -e $records/vm-111
bg pct reboot 102
rebooting=$job
until has_gone "$starting"; do pct start 101 >/dev/null 2>&1; done
ok 'the restart ends' within 60 has_gone "$rebooting"
ok "all took $((SECONDS - begin)) s" [ $((SECONDS - begin)) -lt 60 ]
call qm stop 111
is_home 'after both'
ok 'container 102 has the nodes again' within 30 has_nodes 102
ok 'container 101, too' within 60 has_nodes 101
echo "# $SECONDS s"
ok 'device events are seen to' within 60 is_settled
is 'nothing is told of' '' "$(notes)"
is 'failed units' '' "$(systemctl --failed --no-legend)"
finish
