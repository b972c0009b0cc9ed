#!/bin/bash
# Every check of handoff.sh can fail: each thing that it looks at is spoilt once.
# lab: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

# finds TEXT COMMAND…: the checks in it fail with a line that begins with FAIL: TEXT
finds() {
    local text=$1 said
    shift
    said=$("$@" 2>&1; echo "failures $failures")
    if [[ $said == *"FAIL: $text"* && $said != *'failures 0' ]]; then echo "ok: found: $text"; else
        echo "FAIL: not found: $text ($*): $said"
        failures=$((failures + 1))
    fi
}

remember_home
before=$(snapshot)
is_home 'unspoilt'
untouched 'unspoilt' "$before"
marks=$(module_marks)

finds 'no' ok 'no' false
finds 'no' is 'no' 1 2
finds 'no' same 'no' 1 2
finds 'no: exit code' works 'no' false
call sh -c 'echo word; echo one >&2; echo two >&2; exit 3'
is 'exit code' 3 "$rc"
finds 'no: exit code' exits 'no' 0
finds "no should say 'three'" says 'no' one three
finds 'no: lines' one_line 'no'
finds 'no: silence' silent 'no'
finds 'no took' quick 'no' 0

unbind $slot1.1
finds 'spoilt: drivers' is_home spoilt
finds 'spoilt: drivers' untouched spoilt "$before"
probe $slot1.1
override $slot1.1 snd_hda_intel
finds 'spoilt: overrides' is_home spoilt
finds 'spoilt: drivers' untouched spoilt "$before"
override $slot1.1 ''
rmmod nvidia_uvm
finds 'spoilt: modules' is_home spoilt
finds 'spoilt: device nodes' is_home spoilt
modprobe nvidia_uvm
ok 'a reload is seen' test "$marks" != "$(module_marks)"
chmod 600 /dev/nvidia0
finds 'spoilt: device nodes' is_home spoilt
mknod -m 666 /dev/nvidia9 c 195 9
chmod 666 /dev/nvidia0
finds 'spoilt: device nodes' is_home spoilt
rm /dev/nvidia9
mv /dev/nvidia0 /dev/away
finds 'spoilt: /dev/nvidia0 opens' is_home spoilt
mv /dev/away /dev/nvidia0
for id in 2684 22ba; do
    echo "10de $id" >$vfio_driver/new_id
    finds "spoilt: remove_id of 10de:$id" is_home spoilt
done
mkdir -p $records
echo '{"schema":1,"progress":"away","functions":[],"modules":[]}' >$records/vm-111
finds 'spoilt: records' is_home spoilt
rm $records/vm-111
for what in drivers overrides QEMU owner; do
    finds "spoilt: $what" in_vm spoilt $slot1 111
done
finds 'spoilt: drivers' in_no_vm spoilt $slot1
finds 'spoilt: overrides' in_no_vm spoilt $slot1
$hook 111 pre-start 2>/dev/null
finds 'spoilt: owner' is_home spoilt
$hook 111 post-stop 2>/dev/null
is 'a key that is not there' MISSING "$(status $slot1 owner.colour)"
is_home 'fixed'
finish
