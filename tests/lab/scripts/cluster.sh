#!/bin/bash
# In a cluster this node tells the others who has its card: when a VM has it, when it is home again, and not without quorum.
# lab: --timeout 300
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
node=$(hostname -s)
told=/etc/pve/nodes/$node/gpu-handoff.json
member() { printf '"%s": { "id": %d, "online": %d, "ip": "10.0.0.%d"}' "$1" "$2" "$3" "$2"; }
touch /etc/pve/corosync.conf
mkdir -p /etc/pve/nodes/pve2
cat >/etc/pve/.members <<END
{
"nodename": "$node",
"version": 3,
"cluster": { "name": "lab", "version": 2, "nodes": 2, "quorate": 1 },
"nodelist": {
  $(member "$node" 1 1),
  $(member pve2 2 0)
  }
}
END
owner() { sed -n 's/.*"owner":{"kind":"\([a-z]*\)","vmid":\([0-9a-z]*\)}.*/\1 \2/p' "$told" 2>/dev/null; }
tells() { [ "$(owner)" = "$1" ]; }
units() { systemctl list-units --no-legend --plain 'gpu-handoff-publish-*' | wc -l; }
none_left() { [ "$(units)" = 0 ]; }

# ---- there and back ----
ok 'nothing is told before' test ! -e "$told"
works 'qm start' qm start 111
in_vm 'started' $slot1 111
ok 'the others are told who has it' within 30 tells 'vm 111'
is 'mode and owner' '640 root root' "$(stat -c '%a %U %G' "$told")"
ok 'no unit is left' within 30 none_left
works 'qm stop' qm stop 111
is_home 'stopped'
ok 'the others are told that it is home' within 40 tells 'host null'
works 'the whole cluster' gpu-handoff --status --cluster
ok 'this node is there' grep -q "^$node  this node, gpu-handoff " <<<"$out"
ok 'the other is there' grep -q '^pve2  offline, has told nothing$' <<<"$out"

# ---- no quorum ----
lab-pve no-quorum
works 'qm start without quorum' $hook 111 pre-start
works 'by hand' $hook 111 post-stop
is_home 'without quorum'
sleep 12
ok 'nothing is told without quorum' tells 'host null'
no_word() { ! journalctl -b -t gpu-handoff -o cat | grep -q 'gpu-handoff.json'; }
ok 'nothing is said of that' no_word
lab-pve quorum
ok 'no unit waits in the end' within 60 none_left

# ---- what could not be told is told later ----
works 'by hand: out' gpu-handoff to-vfio $slot1
ok 'given away by hand' within 40 tells 'manual null'
lab-pve no-quorum
works 'by hand: home' gpu-handoff to-home $slot1
sleep 12
ok 'not while there is no quorum' tells 'manual null'
lab-pve quorum
ok 'when there is quorum again' within 60 tells 'host null'
untouched 'at the end' "$at_home"
finish
