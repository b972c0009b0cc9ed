#!/bin/bash
# A job of vzdump with its script: the card is freed once for all its VMs that are stopped, whoever was stopped for it runs
# again at the end, and a job that is killed leaves that to the keeper.
# lab: --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"
is_as_before() { [ "$(snapshot)" = "$at_home" ]; }
guest 113 $slot1
# As the package's /usr/share/gpu-handoff/vzdump, which this machine does not have.
printf '#!/bin/sh\n[ -x /usr/sbin/gpu-handoff ] || exit 0\nexec /usr/sbin/gpu-handoff vzdump "$@"\n' >/usr/local/sbin/vzdump-gpu
chmod 755 /usr/local/sbin/vzdump-gpu

# A service that has the card open, by the policy to be stopped for a backup as for any start.
cat >/run/systemd/system/user-of-it.service <<END
[Service]
ExecStart=/usr/bin/perl -e 'open F, "<", shift or die; sleep 10000' /dev/nvidia0
END
systemctl daemon-reload
runs() { [ "$(systemctl is-active user-of-it)" = active ]; }
begun() { systemctl show --value -p InvocationID user-of-it; }
echo '{"policy":{"backup":"policy","unit":"stop"},"time":{"stop_s":30}}' >$config

drivers() { echo "$(driver_of "${functions[0]}") $(driver_of "${functions[1]}")"; }
# What PVE::VZDump does with its script around a VM that is stopped: the lock first, all phases under it.
script() { /usr/local/sbin/vzdump-gpu "$@" </dev/null >/run/call.out 2>>/run/script.err; }
back_up() { # back_up TEXT VMID
    echo 'lock: backup' >>"$guests/$2.conf"
    ok "$1: backup-start of VM $2" script backup-start stop "$2"
    is "$1: VM $2, freed" 'vfio-pci vfio-pci' "$(drivers)"
    ok "$1: pre-stop of VM $2" script pre-stop stop "$2"
    sed -i '/^lock: backup/d' "$guests/$2.conf"
    works "$1: VM $2 is backed up" qm backup "$2"
    ok "$1: backup-end of VM $2" script backup-end stop "$2"
    is "$1: VM $2, stays for the next" 'vfio-pci vfio-pci' "$(drivers)"
}
job() { # job: takes the lock as vzdump does, until it is killed or has ended
    exec {lock}>/run/vzdump.lock
    flock -n "$lock"
}

# ---- a job of two VMs ----
systemctl start user-of-it
ok 'the service runs' within 10 runs
before=$(begun)
: >/run/script.err
job
ok 'job-init' script job-init
ok 'job-start' script job-start
back_up 'two' 111
back_up 'two' 113
ok 'the service was stopped for it' not runs
is 'and not started in between' 0 "$(journalctl -b -t gpu-handoff -o cat | grep -c 'user-of-it.service runs again')"
ok 'job-end' script job-end
exec {lock}>&-
is_home 'the job has ended'
ok 'the service runs again' within 20 runs
ok 'once' [ "$(begun)" != "$before" ]
is 'started again' 1 "$(journalctl -b -t gpu-handoff -o cat | grep -c 'user-of-it.service runs again')"
ok 'nothing waits to be started' within 30 test ! -e $records/to-start
systemctl stop user-of-it
untouched 'the job has ended' "$at_home"

# ---- a job that is killed ----
with_keeper
( job; echo 'lock: backup' >>"$guests/111.conf"; script backup-start stop 111; exec sleep 1000 ) &
killed=$!
freed() { [ "$(driver_of "${functions[0]}")" = vfio-pci ]; }
ok 'killed: freed' within 30 freed
sleep 12
ok 'killed: the keeper lets the job have it' freed
kill -9 $killed
wait $killed 2>/dev/null
sed -i '/^lock: backup/d' $guests/111.conf
ok 'killed: the keeper brings it home' within 60 is_as_before
untouched 'killed' "$at_home"
finish
