#!/bin/bash
# Checks the lab's stand-in `qm` against what Proxmox VE is known to do, with a
# hookscript of its own: tests/lab/run --timeout 1800 PATH-OF-THIS. Software
# emulation and some thirty QEMUs take their time. It ends with 1 when a check
# failed, and leaves the card as it found it.
set -u
export LC_ALL=C.UTF-8

W=/run/qm-selftest                     # notes of the hook, and what it is told to do
HOOK=/var/lib/vz/snippets/qm-selftest
CONF=/etc/pve/qemu-server
RUN=/run/qemu-server
PCI=/sys/bus/pci
PLAIN=992                              # without a device: quick
GPU=991                                # with the card
failed=0 checks=0

check() { # NAME EXPECTED ACTUAL
	checks=$((checks + 1))
	if [ "$2" = "$3" ]; then
		echo "ok    $1"
	else
		failed=$((failed + 1))
		printf 'FAIL  %s\n      expected: %s\n      found:    %s\n' "$1" "${2//$'\n'/$'\n'                }" "${3//$'\n'/$'\n'                }"
	fi
}
yes() { # NAME COMMAND...
	local name=$1; shift
	if "$@" >/dev/null 2>&1; then check "$name" yes yes; else check "$name" yes "no: $*"; fi
}
no() { local name=$1; shift; if "$@" >/dev/null 2>&1; then check "$name" no "yes: $*"; else check "$name" no no; fi; }
title() { echo "== $* (after $SECONDS s)"; }

# run qm; its outputs are in $W/1 and $W/2, its exit status in $rc
qm_() { timeout 300 qm "$@" >"$W/1" 2>"$W/2" </dev/null; rc=$?; }
out() { cat "$W/1"; }
err() { cat "$W/2"; }

# the phases since the last call, in one line
phases() { local p; p=$(cut -d' ' -f1 "$W/log" 2>/dev/null | paste -sd' '); : >"$W/log"; echo "$p"; }
field() { sed -n "s/^$1 .* $2=\([^ ]*\).*/\1/p" "$W/log" | paste -sd,; }
pid_of() { cat "$RUN/$1.pid" 2>/dev/null; }
driver_of() { basename "$(readlink "$PCI/devices/$1/driver" 2>/dev/null || echo none)"; }
drivers() { local f; for f in $FUNCS; do driver_of "$f"; done | paste -sd' '; }
reservations() { grep . "$RUN/pci-id-reservations" 2>/dev/null; }
ids_of() { echo "$(sed s/0x// "$PCI/devices/$1/vendor") $(sed s/0x// "$PCI/devices/$1/device")"; }
wait_until() { # SECONDS COMMAND...
	local n=$(($1 * 10)); shift
	while [ $n -gt 0 ]; do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; n=$((n - 1)); done
	return 1
}
gone() { ! [ -e "/proc/$1" ]; }
logged() { grep -q "^$1 " "$W/log"; }
config() { local id=$1; shift; printf '%s\n' "$@" >"$CONF/$id.conf"; chmod 0640 "$CONF/$id.conf"; }
with_hook="hookscript: local:snippets/qm-selftest"

GPU_FUNC=
for d in "$PCI"/devices/*; do
	[ "$(cat "$d/vendor")" = 0x10de ] && [[ $(cat "$d/class") == 0x03* ]] && GPU_FUNC=${d##*/} && break
done
[ -n "$GPU_FUNC" ] || { echo "no display device of vendor 10de in this machine"; exit 1; }
SLOT=${GPU_FUNC%.*}
FUNCS=$(cd "$PCI/devices" && echo "$SLOT".*)
HOME_DRIVERS=$(drivers)

to_home() { # also what the hook-less starts leave behind
	local f
	for f in $FUNCS; do
		ids_of "$f" >"$PCI/drivers/vfio-pci/remove_id"
		[ "$(driver_of "$f")" = vfio-pci ] && echo "$f" >"$PCI/drivers/vfio-pci/unbind"
		echo "$f" >"$PCI/drivers_probe"
	done 2>/dev/null
}
finish() {
	local id
	for id in $GPU $PLAIN 993; do
		[ -e "$CONF/$id.conf" ] || continue
		rm -f "$W"/exit-* "$W"/do-*
		qm stop $id --skiplock >/dev/null 2>&1
		rm -f "$CONF/$id.conf"
	done
	to_home
	rm -f "$HOOK" "$HOOK-noexec"
	[ -e "$W/pci.cfg" ] && mv "$W/pci.cfg" /etc/pve/mapping/pci.cfg
}
trap finish EXIT

rm -rf "$W"; mkdir -p "$W" "$CONF" "${HOOK%/*}"; : >"$W/log"
cat >"$HOOK" <<'HOOK'
#!/bin/sh
# what it sees, in one line; then what the test asks for
W=/run/qm-selftest
id=$1 phase=$2
yes_if() { "$@" >/dev/null 2>&1 && echo yes || echo no; }
# its own lock file is not opened for writing: only tried
lock=$(yes_if flock -n /var/lock/qemu-server/lock-$id.conf true)
[ "$lock" = yes ] && lock=free || lock=held
stdin=$(wc -c)
fds=$(ls /proc/$$/fd | paste -sd:)
echo "$phase id=$id argc=$# lc=$LC_ALL lvm=${LVM_SUPPRESS_FD_WARNINGS-unset} migrated=[${PVE_MIGRATED_FROM-unset}]" \
	"lock=$lock stdin=$stdin fds=$fds pipes=$(stat -Lc %F /proc/$$/fd/1 /proc/$$/fd/2 | paste -sd: | tr -d ' ')" \
	"reboot=$(yes_if test -e /run/qemu-server/$id.reboot) cleanup=$(yes_if test -e /run/qemu-server/$id.cleanup)" \
	"reserved=$(cat /run/qemu-server/pci-id-reservations 2>/dev/null | grep -c " $id ")" \
	"pidfile=$(yes_if test -e /run/qemu-server/$id.pid) leader=$(ps -o pgid= -p $$ | tr -d ' ')" \
	"conflock=$(sed -n 's/^lock: //p' /etc/pve/qemu-server/$id.conf)" \
	"cgroup=$(cut -d: -f3 /proc/$$/cgroup)" >>$W/log
echo "out $phase"
echo "err $phase" >&2
[ -e $W/do-$phase ] && . $W/do-$phase
[ -e $W/exit-$phase ] && exit "$(cat $W/exit-$phase)"
exit 0
HOOK
chmod 0755 "$HOOK"
command -v ps >/dev/null || sed -i 's/ps -o pgid= -p \$\$/cut -d" " -f5 \/proc\/$$\/stat/' "$HOOK"
node=$(hostname | cut -d. -f1)

title "a VM that does not exist"
qm_ status 999
check "status of an unknown VM: message" "Configuration file 'nodes/$node/qemu-server/999.conf' does not exist" "$(err)"
check "status of an unknown VM: exit status" 2 $rc

title "start and stop"
config $PLAIN "name: plain" "$with_hook"
qm_ status $PLAIN
check "status when stopped" "status: stopped" "$(out)"
qm_ start $PLAIN
check "start: exit status" 0 $rc
check "start: the hook's output" $'out pre-start\nout post-start' "$(out)"
check "start: the hook's errors" $'err pre-start\nerr post-start' "$(err)"
check "two arguments, this guest" "2,2 $PLAIN,$PLAIN" "$(sed -n 's/.* argc=\([0-9]*\).*/\1/p' "$W/log" | paste -sd,) $(sed -n 's/.* id=\([0-9]*\).*/\1/p' "$W/log" | paste -sd,)"
check "environment: LC_ALL" C "$(field pre-start lc)"
check "environment: LVM_SUPPRESS_FD_WARNINGS" 1 "$(field pre-start lvm)"
check "environment: PVE_MIGRATED_FROM is there and empty" "[]" "$(field pre-start migrated)"
check "standard input is empty" 0 "$(field pre-start stdin)"
check "standard output and error are pipes" "fifo:fifo" "$(field pre-start pipes)"
check "the guest's lock is held in pre-start and post-start" "held held" "$(field pre-start lock) $(field post-start lock)"
check "no .cleanup in pre-start, one in post-start" "no yes" "$(field pre-start cleanup) $(field post-start cleanup)"
check "no QEMU in pre-start, one in post-start" "no yes" "$(field pre-start pidfile) $(field post-start pidfile)"
check "phases of a start" "pre-start post-start" "$(phases)"
pid=$(pid_of $PLAIN)
check "status when running" "status: running" "$(qm status $PLAIN)"
yes "QEMU's command line names its pid file" grep -qzx "/var/run/qemu-server/$PLAIN.pid" "/proc/$pid/cmdline"
check "QEMU calls itself kvm" /usr/bin/kvm "$(tr '\0' '\n' <"/proc/$pid/cmdline" | head -1)"
check "QEMU is in its scope" "/qemu.slice/$PLAIN.scope" "$(sed -n 's/^0:://p' "/proc/$pid/cgroup")"
qm_ start $PLAIN
check "start of a running VM" "255 VM $PLAIN already running" "$rc $(err)"
check "start of a running VM: no phase" "" "$(phases)"
yes "qm list shows it" sh -c "qm list | grep -Eq '^ +$PLAIN plain +running .* $pid *$'"
qm_ stop $PLAIN
check "stop: exit status" 0 $rc
check "the guest's lock is held in pre-stop and post-stop" "held held" "$(field pre-stop lock) $(field post-stop lock)"
check "QEMU is there in pre-stop, not in post-stop" "yes no" "$(field pre-stop pidfile) $(field post-stop pidfile)"
check "phases of a stop" "pre-stop post-stop" "$(phases)"
yes "QEMU ends" wait_until 10 gone "$pid"
no "no pid file any more" test -e "$RUN/$PLAIN.pid"
no "no .cleanup any more" test -e "$RUN/$PLAIN.cleanup"
qm_ stop $PLAIN
check "stop of a stopped VM does nothing" "0 " "$rc $(phases)"

title "shutdown, reboot, the guest's own end, a crash"
qm_ start $PLAIN; phases >/dev/null
qm_ shutdown $PLAIN --timeout 60
check "phases of a shutdown" "0 pre-stop post-stop" "$rc $(phases)"
qm_ start $PLAIN; phases >/dev/null
QM_LAB_GUEST_IGNORES_POWERDOWN=1 qm_ shutdown $PLAIN --timeout 3
check "a guest that ignores shutdown" "255 VM quit/powerdown failed - got timeout" "$rc $(err | tail -1)"
check "phases of that" "pre-stop" "$(phases)"
pid=$(pid_of $PLAIN)
qm_ reboot $PLAIN
check "reboot: .reboot is there in post-stop, not in pre-start" "yes no" "$(field post-stop reboot) $(field pre-start reboot)"
check "phases of a reboot" "0 pre-stop post-stop pre-start post-start" "$rc $(phases)"
no "another QEMU after a reboot" test "$pid" = "$(pid_of $PLAIN)"
check "running after a reboot" "status: running" "$(qm status $PLAIN)"
qm_ guest-poweroff $PLAIN
check "the lock is held in a post-stop without a task" held "$(field post-stop lock)"
check "and comes from qmeventd" /system.slice/qmeventd.service "$(field post-stop cgroup)"
check "phases of a guest that shuts itself down" "0 post-stop" "$rc $(phases)"
qm_ start $PLAIN; phases >/dev/null
kill -9 "$(pid_of $PLAIN)"
yes "a crash: post-stop comes" wait_until 60 logged post-stop
sleep 3
check "phases of a crash: post-stop exactly once" post-stop "$(phases)"
check "stopped after a crash" "status: stopped" "$(qm status $PLAIN)"
no "no .cleanup after a crash" test -e "$RUN/$PLAIN.cleanup"

title "hooks that fail"
echo 3 >"$W/exit-pre-start"
qm_ start $PLAIN
check "pre-start fails: exit status" 255 $rc
check "pre-start fails: message" $'err pre-start\n'"hookscript error for $PLAIN on pre-start: command '$HOOK $PLAIN pre-start' failed: exit code 3" "$(err)"
check "pre-start fails: an empty line follows" 2 "$(tail -c2 "$W/2" | tr -cd '\n' | wc -c)"
sleep 2
check "pre-start fails: no other phase" pre-start "$(phases)"
check "pre-start fails: stopped" "status: stopped" "$(qm status $PLAIN)"
rm "$W/exit-pre-start"
echo 4 >"$W/exit-post-start"; echo 5 >"$W/exit-pre-stop"; echo 6 >"$W/exit-post-stop"
qm_ start $PLAIN
check "post-start fails: a warning" "0 hookscript error for $PLAIN on post-start: command '$HOOK $PLAIN post-start' failed: exit code 4" "$rc $(err | tail -n2)"
qm_ stop $PLAIN
check "pre-stop and post-stop fail: warnings" "0 2" "$rc $(grep -c '^hookscript error for' "$W/2")"
check "and every phase has come" "pre-start post-start pre-stop post-stop" "$(phases)"
rm "$W"/exit-*
echo 'kill -9 $$' >"$W/do-pre-start"
qm_ start $PLAIN
check "killed by a signal" "hookscript error for $PLAIN on pre-start: command '$HOOK $PLAIN pre-start' failed: got signal 9" "$(err | tail -n +2)"
echo '(sleep 3; echo late >&2) >/dev/null &' >"$W/do-pre-start"
qm_ start $PLAIN
check "a child that keeps standard error is waited for" $'err pre-start\nlate\nerr post-start' "$(err)"
qm_ stop $PLAIN; rm "$W"/do-*
config $PLAIN "hookscript: local:snippets/qm-selftest-missing"
qm_ start $PLAIN
check "script missing" "255 hookscript error for $PLAIN on pre-start: script 'local:snippets/qm-selftest-missing' does not exist" "$rc $(err)"
: >"$HOOK-noexec"
config $PLAIN "hookscript: local:snippets/qm-selftest-noexec"
qm_ start $PLAIN
check "script not executable" "255 hookscript error for $PLAIN on pre-start: script 'local:snippets/qm-selftest-noexec' is not executable" "$rc $(err)"
phases >/dev/null

title "the task is killed while the hook runs"
config $PLAIN "$with_hook"
echo 'trap "echo TERM >>$W/term; exit 9" TERM; sleep 60 & wait' >"$W/do-pre-start"
qm start $PLAIN >"$W/1" 2>"$W/2" </dev/null & task=$!
wait_until 60 logged pre-start; sleep 1
kill -TERM $task; wait $task; rc=$?
check "exit status" 255 $rc
check "the hook got the signal" TERM "$(cat "$W/term" 2>/dev/null)"
yes "the guest's lock is free" flock -n /var/lock/qemu-server/lock-$PLAIN.conf true
rm "$W"/do-*; phases >/dev/null

title "locks"
(exec 9>>/var/lock/qemu-server/lock-$PLAIN.conf; flock 9; exec sleep 1000) & holder=$!
sleep 1
qm_ start $PLAIN
check "lock held by another: message" "can't lock file '/var/lock/qemu-server/lock-$PLAIN.conf' - got timeout" "$(err | tail -1)"
check "lock held by another: no phase" "255 " "$rc $(phases)"
qm_ set $PLAIN --onboot 1
check "outside of a task: exit status and first line" "4 trying to acquire lock..." "$rc $(err | head -1)"
check "outside of a task: the reason is the second" "can't lock file '/var/lock/qemu-server/lock-$PLAIN.conf' - got timeout" "$(err | sed -n 2p)"
kill $holder; wait $holder 2>/dev/null
config $PLAIN "lock: migrate" "$with_hook"
qm_ start $PLAIN
check "lock in the configuration" "255 VM is locked (migrate)" "$rc $(err)"
config $PLAIN "template: 1" "$with_hook"
qm_ start $PLAIN
check "template" "255 you can't start a vm if it's a template" "$rc $(err)"
check "no phase for either" "" "$(phases)"

title "configuration"
config $PLAIN "#a note" "name: old" "memory: 512" "$with_hook" "" "[PENDING]" "delete: memory" "name: new" "" "[snap]" "name: then"
qm_ start $PLAIN
check "a start applies what is pending" $'#a note\n'"$with_hook"$'\nname: new\n\n[snap]\nname: then' "$(cat "$CONF/$PLAIN.conf")"
qm_ set $PLAIN --memory 64 --name newer --delete hookscript
check "qm set says what it does" "update VM $PLAIN: -memory 64 -name newer -delete hookscript" "$(out)"
check "while it runs, some of it becomes pending" $'#a note\nname: newer\n\n[PENDING]\nmemory: 64\n\n[snap]\nname: then' "$(cat "$CONF/$PLAIN.conf")"
qm_ stop $PLAIN
check "a stop applies it" $'#a note\nmemory: 64\nname: newer\n\n[snap]\nname: then' "$(cat "$CONF/$PLAIN.conf")"
check "mode of the file" 640 "$(stat -c %a "$CONF/$PLAIN.conf")"
check "qm config" $'memory: 64\nname: newer' "$(qm config $PLAIN)"
qm_ set $PLAIN --hookscript local:snippets/qm-selftest
check "qm set --hookscript" "0 local:snippets/qm-selftest" "$rc $(sed -n 's/^hookscript: //p' "$CONF/$PLAIN.conf")"
qm_ set $PLAIN --hookscript local:snippets/qm-selftest-missing
check "qm set --hookscript of nothing" $'2 400 Parameter verification failed.\n'"hookscript: script 'local:snippets/qm-selftest-missing' does not exist" "$rc $(err)"
phases >/dev/null

title "pmxcfs without quorum, and gone"
lab-pve no-quorum
qm_ set $PLAIN --onboot 1
check "set without quorum" "2 unable to open file '/etc/pve/nodes/$node/qemu-server/$PLAIN.conf.tmp.PID' - Permission denied" "$rc $(err | sed 's/tmp\.[0-9]*/tmp.PID/')"
qm_ start $PLAIN
check "start without quorum" "cluster not ready - no quorum?" "$(err)"
no "which fails" test $rc = 0
check "no phase" "" "$(phases)"
lab-pve quorum
qm_ start $PLAIN; phases >/dev/null
lab-pve down
qm_ status $PLAIN
check "pmxcfs is gone: exit status" 111 $rc
check "pmxcfs is gone: message" "ipcc_send_rec[1] failed: Connection refused,Unable to load access control list: Connection refused" "$(err | sed -n '1p;$p' | paste -sd,)"
pid=$(pid_of $PLAIN)
kill -9 "$pid"
yes "QEMU ends meanwhile" wait_until 30 gone "$pid"
sleep 5
lab-pve up
check "and post-stop never comes" "" "$(phases)"
yes "although Proxmox has noted that it should" test -e "$RUN/$PLAIN.cleanup"
check "stopped all the same" "status: stopped" "$(qm status $PLAIN)"
rm "$RUN/$PLAIN.cleanup"

title "starts that end without a phase"
vm_begins() { [ -s "$RUN/$PLAIN.pid" ] && pid=$(pid_of $PLAIN) && grep -qz "qemu-server/$PLAIN.pid" "/proc/$pid/cmdline"; }
frozen_start() { # a start whose QEMU stands still as soon as it is there; qm's pid in $task
	qm start $PLAIN "$@" >"$W/1" 2>"$W/2" </dev/null & task=$!
	until vm_begins 2>/dev/null; do sleep 0.02; done
	kill -STOP "$pid"
}
frozen_start --timeout 20
wait $task; rc=$?
check "a start that takes too long" "255 failed: got timeout" "$rc $(err | tail -1 | sed "s/.*' failed/failed/")"
check "and says first" "start failed" "$(err | tail -1 | cut -d: -f1)"
yes "its QEMU goes on" vm_begins
no "without Proxmox's note" test -e "$RUN/$PLAIN.cleanup"
yes "and without its lock" flock -n /var/lock/qemu-server/lock-$PLAIN.conf true
kill -CONT "$pid"
yes "until it has nobody to report to" wait_until 30 gone "$pid"
frozen_start
qm_ task-stop $PLAIN
check "stop of the task: exit status" 0 $rc
wait $task; rc=$?
check "the task that was stopped" 255 $rc
yes "its QEMU goes on" vm_begins
kill -CONT "$pid"
yes "until it has nobody to report to" wait_until 30 gone "$pid"
sleep 2
check "phases of both" "pre-start pre-start" "$(phases)"
QM_LAB_DIES=before-note qm_ start $PLAIN
pid=$(pid_of $PLAIN)
check "the task dies before Proxmox's note" 255 $rc
check "the VM runs" "status: running" "$(qm status $PLAIN)"
no "and nothing says so" test -e "$RUN/$PLAIN.cleanup"
qm_ stop $PLAIN
yes "QEMU ends" wait_until 30 gone "$pid"
sleep 2
check "stopped without post-stop" "pre-start pre-stop" "$(phases)"

title "qmeventd"
qm_ start $PLAIN; phases >/dev/null
echo 'echo $$ >$W/hook; sleep 600' >"$W/do-post-stop"
kill -9 "$(pid_of $PLAIN)"
yes "post-stop begins" wait_until 60 test -s "$W/hook"
systemctl restart qmeventd
yes "and is killed with qmeventd" gone "$(cat "$W/hook")"
yes "the lock is free then" flock -n /var/lock/qemu-server/lock-$PLAIN.conf true
yes "what was noted is noted still" test -e "$RUN/$PLAIN.cleanup"
rm "$W"/do-* "$RUN/$PLAIN.cleanup"; phases >/dev/null
qm_ start $PLAIN; phases >/dev/null
systemctl restart qmeventd
pid=$(pid_of $PLAIN)
yes "QEMU finds the new one" wait_until 30 test -e /run/lab-qm/$PLAIN-$pid
qm_ guest-poweroff $PLAIN
yes "post-stop comes" wait_until 60 logged post-stop
check "and from there" "0 post-stop" "$rc $(phases)"

title "force-legacy-cleanup"
: >"$RUN/force-legacy-cleanup"
qm_ start $PLAIN
qm_ stop $PLAIN
check "post-stop comes from qmeventd, not from the task" /system.slice/qmeventd.service "$(field post-stop cgroup)"
check "and once" "0 pre-start post-start pre-stop post-stop" "$rc $(phases)"
QM_LAB_DIES=before-note qm_ start $PLAIN
qm_ stop $PLAIN
check "also of a VM whose start was never noted" "pre-start pre-stop post-stop" "$(phases)"
rm "$RUN/force-legacy-cleanup"

title "backup of a stopped VM"
qm_ backup $PLAIN
check "lock: backup in every phase" "backup backup backup backup" "$(for p in pre-start post-start pre-stop post-stop; do field $p conflock; done | paste -sd' ')"
check "phases" "0 pre-start post-start pre-stop post-stop" "$rc $(phases)"
no "lock removed" grep -q '^lock:' "$CONF/$PLAIN.conf"

title "the card, without a hook: what Proxmox itself does"
echo "      $FUNCS: $HOME_DRIVERS"
all_vfio=$(for f in $FUNCS; do echo vfio-pci; done | paste -sd' ')
config $GPU "name: gpu" "machine: q35" "hostpci0: ${SLOT#0000:},pcie=1"
qm_ start $GPU
check "start: exit status" 0 $rc
[ $rc = 0 ] || err
check "every function is on vfio-pci" "$all_vfio" "$(drivers)"
check "by new_id, not by driver_override" "(null)" "$(cat "$PCI/devices/$GPU_FUNC/driver_override")"
pid=$(pid_of $GPU)
group=/dev/vfio/$(basename "$(readlink "$PCI/devices/$GPU_FUNC/iommu_group")")
yes "QEMU has $group open" sh -c "ls -l /proc/$pid/fd | grep -q -- '-> $group\$'"
check "reservations" "$(for f in $FUNCS; do echo "$f $GPU pid:$pid"; done)" "$(reservations)"
config 993 "hostpci0: $GPU_FUNC"
qm_ start 993
check "a second VM with the same card" "255 PCI device '$GPU_FUNC' already in use by VMID '$GPU'" "$rc $(err)"
check "and the first one keeps its reservations" "$(for f in $FUNCS; do echo "$f $GPU pid:$pid"; done)" "$(reservations)"
qm_ stop $GPU
check "stop: exit status" 0 $rc
yes "QEMU ends" wait_until 30 gone "$pid"
check "after the stop nothing is bound back" "$all_vfio" "$(drivers)"
check "no reservation is left" "" "$(reservations)"
new_id_says() { ids_of "$GPU_FUNC" | { dd of="$PCI/drivers/vfio-pci/$1" status=none; } 2>&1 | sed 's/.*: //'; }
check "the dynamic id stays in vfio-pci" "File exists" "$(new_id_says new_id)"
check "(removed)" "" "$(new_id_says remove_id)"
qm_ start $GPU
check "already on vfio-pci: starts" 0 $rc
check "and new_id was not written" "No such device" "$(new_id_says remove_id)"

title "the card goes away under a running QEMU: crash"
config $GPU "machine: q35" "hostpci0: ${SLOT#0000:},pcie=1" "$with_hook"
pid=$(pid_of $GPU)
kill -9 "$pid"
yes "post-stop comes" wait_until 60 logged post-stop
sleep 3
check "exactly once" post-stop "$(phases)"
check "no reservation is left" "" "$(reservations)"
to_home
check "(the card is at home again)" "$HOME_DRIVERS" "$(drivers)"

title "the card, with a hook"
echo "cp $RUN/pci-id-reservations $W/reserved" >"$W/do-post-start"
echo 3 >"$W/exit-pre-start"
qm_ start $GPU
check "pre-start refuses: nothing is touched" "255 $HOME_DRIVERS" "$rc $(drivers)"
check "pre-start refuses: no reservation" "" "$(reservations)"
check "phases" pre-start "$(phases)"
rm "$W/exit-pre-start"
qm_ start $GPU
check "nothing reserved in pre-start" 0 "$(field pre-start reserved)"
check "reserved by pid in post-start" "$(for f in $FUNCS; do echo "$f $GPU pid:$(pid_of $GPU)"; done)" "$(cat "$W/reserved")"
check "phases" "0 pre-start post-start" "$rc $(phases)"
qm_ reboot $GPU
check "reboot with the card" "0 pre-stop post-stop pre-start post-start" "$rc $(phases)"
qm_ shutdown $GPU
check "shutdown with the card" "0 pre-stop post-stop" "$rc $(phases)"
wait_until 30 test -z "$(fuser "$group" 2>/dev/null)"
to_home

title "starts that fail after pre-start: no post-stop"
config $GPU "hostpci0: 0000:7e:00.0" "$with_hook"
qm_ start $GPU
check "no such device" "255 no PCI device found for '0000:7e:00.0'" "$rc $(err | tail -1)"
config $GPU "hostpci0: $GPU_FUNC,driver=keep" "$with_hook"
qm_ start $GPU
check "driver=keep binds nothing, QEMU fails" "255 start failed: QEMU exited with code 1 $HOME_DRIVERS" "$rc $(err | tail -1) $(drivers)"
check "no reservation is left" "" "$(reservations)"
echo vfio-pci-not >"$PCI/devices/$GPU_FUNC/driver_override"
config $GPU "hostpci0: $GPU_FUNC" "$with_hook"
qm_ start $GPU
check "a driver_override in the way" "255 Cannot bind $GPU_FUNC to vfio" "$rc $(err | tail -1)"
echo >"$PCI/devices/$GPU_FUNC/driver_override"
to_home
config $GPU "hostpci0: $GPU_FUNC,mapping=card" "$with_hook"
qm_ start $GPU
check "host and mapping" "255 Cannot set both 'host' and 'mapping'." "$rc $(err | tail -1)"
sleep 2
check "phases of the four" "pre-start pre-start pre-start pre-start" "$(phases)"

title "a mapping"
mkdir -p /etc/pve/mapping
[ -e /etc/pve/mapping/pci.cfg ] && cp /etc/pve/mapping/pci.cfg "$W/pci.cfg"
printf 'card\n\tdescription a card\n\tmap id=%s,node=elsewhere,path=0000:7e:00\n\tmap id=%s,node=%s,path=%s\n' \
	10de:2684 10de:2684 "$node" "$SLOT" >/etc/pve/mapping/pci.cfg
config $GPU "hostpci3: mapping=card"
qm_ start $GPU
check "mapping=card" "0 $all_vfio" "$rc $(drivers)"
[ $rc = 0 ] || err
qm_ stop $GPU
config $GPU "hostpci0: mapping=none"
qm_ start $GPU
check "mapping=none" "255 PCI device mapping not found for 'none'" "$rc $(err | tail -1)"
rm -f /etc/pve/mapping/pci.cfg

wait_until 30 test -z "$(fuser "$group" 2>/dev/null)"
finish
trap - EXIT
check "the card is where it was" "$HOME_DRIVERS" "$(drivers)"
echo "== $checks checks, $failed failed"
[ $failed = 0 ]
