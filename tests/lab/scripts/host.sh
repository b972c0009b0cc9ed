#!/bin/bash
# The host itself comes up and goes down: what was left behind comes home before the
# guests start, device nodes are made, and at shutdown a card stays where it is.
# lab: --timeout 400
# lab-genuine: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

units=/etc/systemd/system
reconcile=gpu-handoff-reconcile.service
remember_home

# ---- the unit, and one that stands for Proxmox's ----
install -m 644 "${0%/*}/$reconcile" $units
# Stops the guests at shutdown, as Proxmox's does, and waits: the machine must not go down before this script has ended.
cat >$units/pve-guests.service <<UNIT
[Unit]
After=lab-script.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'readlink $pci/$slot1.0/driver >/run/guests-found; ls /dev/nvidia* >>/run/guests-found'
ExecStop=/bin/bash -c 'qm stop 111 >/run/stop.out 2>&1; echo \$? >/run/stop.rc; sleep infinity'
TimeoutStopSec=120
UNIT
cat >$units/lab-up.target <<UNIT
[Unit]
Wants=$reconcile pve-guests.service
UNIT
systemctl daemon-reload
call systemd-analyze verify --man=no $units/$reconcile
same 'systemd understands the unit' '' "$(grep -i reconcile <<<"$out$err")"

# ---- what an earlier run left behind ----
# As by a start that was aborted, with nobody who saw to it; and one that was killed, with
# nobody who put it right.
works 'pre-start' bash -c "$hook 111 pre-start; exit \$?"
sed -i 's/"away"/"leaving"/' $records/vm-111
echo "$slot1.1" >$vfio_driver/unbind
rm /dev/nvidia*
call gpu-handoff reconcile --dry-run
exits 'reconcile --dry-run' 0
same 'reconcile --dry-run: its first line' "$slot1 VM 111 -> host" "${out%%$'\n'*}"
works 'the units of a boot' systemctl start lab-up.target
ok 'the guests start' within 60 systemctl is-active --quiet pve-guests.service
same 'the guests found the card at home' "../../../../bus/pci/drivers/nvidia"$'\n'"$(printf '%s\n' "$home_nodes" | cut -d' ' -f1)" "$(</run/guests-found)"
is 'the unit' 'success' "$(systemctl show -P Result $reconcile)"
is_home 'after the boot'

# ---- nothing was left behind, but nobody has opened the card yet ----
rm /dev/nvidia0 /dev/nvidia-uvm
call gpu-handoff reconcile --dry-run
same 'reconcile --dry-run' $'missing device nodes\n  make      /dev/nvidia0 /dev/nvidia-uvm' "$out"
works 'a boot like any other' systemctl start $reconcile
is_home 'a boot like any other'
works 'nothing to do' gpu-handoff reconcile
silent 'nothing to do'

# ---- an override that no record names is somebody else's ----
override $slot1.1 snd_hda_intel
works 'an override of the administrator' systemctl start $reconcile
is 'an override of the administrator' snd_hda_intel "$(override_of $slot1.1)"
override $slot1.1 ''
is_home 'without it'

# ---- shutdown ----
works 'qm start' qm start 111
in_vm 'before the shutdown' $slot1 111
mark=$(stat -c %i "$vfio_driver/$slot1.0")
systemctl --no-block start poweroff.target
ok 'the guests are stopped' within 60 test -s /run/stop.rc
is 'systemd' 'stopping' "$(systemctl is-system-running)"
is 'qm stop while the host shuts down' 0 "$(</run/stop.rc)"
sed 's/^/    | /' /run/stop.out
is 'one line says so' 1 "$(grep -c 'gpu-handoff: ' /run/stop.out)"
ok 'it says that it stays' grep -q "gpu-handoff: $slot1 stays on vfio-pci: the host is shutting down" /run/stop.out
ok 'no error' not grep -q 'error' /run/stop.out
is 'VM 111' 'status: stopped' "$(qm status 111)"
in_no_vm 'while the host shuts down' $slot1
is 'it was not bound again' "$mark" "$(stat -c %i "$vfio_driver/$slot1.0")"
ok 'the record is kept' grep -q '"away"' $records/vm-111
finish
