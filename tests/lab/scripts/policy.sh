#!/bin/bash
# Who uses the card is refused or stopped, as the policy says; what was stopped runs again when the card is home.
# lab: --timeout 400
# lab: --gpus 2 --timeout 400
# lab-genuine: --gpus 2 --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}"

# service NAME NODE…: a unit that has the nodes open and takes a moment to stop
service() {
    local name=$1
    shift
    cat >"/run/systemd/system/$name.service" <<END
[Service]
ExecStart=/usr/bin/perl -e 'for (@ARGV) { open my \$f, "<", \$_ or next; push @f, \$f } \$SIG{TERM} = sub { select undef, undef, undef, 0.2; exit 0 }; sleep 10000' $*
END
    begin "$name" "$1"
}
begin() { # begin NAME NODE: again, after its file was changed
    systemctl daemon-reload
    systemctl restart "$1"
    within 10 has_open "$(pid_of "$1")" "$2" 2>/dev/null
}
pid_of() { systemctl show --value -p MainPID "$1"; }
state() { systemctl is-active "$1"; }
runs() { [ "$(state "$1")" = active ]; }
policy() { printf '{"policy":%s,"time":{"stop_s":30}}\n' "$1" >"$config"; }
# A program in a scope of its own, as in a login session.
program() { # program NODE
    systemd-run --quiet --scope --unit=session-9 perl -e 'open F, "<", shift; open O, ">", "/run/held"; sleep 10000' "$1" \
        </dev/null >/dev/null 2>&1 &
    within 10 test -e /run/held
    rm -f /run/held
    program=$(pgrep -f 'open F, "<", shift; open O')
}

# ---- NVIDIA's services are stopped by default, also one that does not have the card open at this moment ----
# As the real one: nvidiactl, and of every card that is there its node.
service nvidia-persistenced /dev/nvidiactl /dev/nvidia0 "/dev/nvidia$((LAB_GPUS - 1))"
service nvidia-powerd /dev/null
service needs-persistenced /dev/null
sed -i '1i[Unit]\nRequires=nvidia-persistenced.service\nAfter=nvidia-persistenced.service' /run/systemd/system/needs-persistenced.service
begin needs-persistenced /dev/null
works 'services: plan' gpu-handoff plan 111
ok 'the plan says so' grep -q 'stop  .*stop nvidia-persistenced.service' /run/call.out
policy '{"nvidia_services":"refuse"}'
call $hook 111 pre-start
exits 'services refused' 3
quick 'services refused' 1500
says 'services refused' 'nvidia-persistenced.service' 'systemctl stop nvidia-persistenced.service'
untouched 'services refused' "$at_home"
is 'services refused: still' active "$(state nvidia-persistenced)"
rm "$config"
persistenced=$(pid_of nvidia-persistenced)
works 'services: qm start' qm start 111
in_vm 'services' $slot1 111
says 'services' ' stop ' \
    'stop nvidia-powerd.service, stop needs-persistenced.service, stop nvidia-persistenced.service'
if [ "$LAB_GPUS" = 1 ]; then
    is 'services: with the VM' inactive "$(state nvidia-persistenced)"
else # they serve the card that stays
    ok 'services: with the VM, for the other card' within 20 runs nvidia-persistenced
fi
works 'services: qm stop' qm stop 111
is_home 'services'
ok 'services: persistenced runs again' within 30 runs nvidia-persistenced
ok 'services: powerd runs again' within 30 runs nvidia-powerd
ok 'services: what requires persistenced runs again' within 30 runs needs-persistenced
ok 'services: it is another process' [ "$(pid_of nvidia-persistenced)" != "$persistenced" ]
ok 'services: nothing waits to be started' within 30 test ! -e $records/to-start
systemctl stop nvidia-persistenced nvidia-powerd

# ---- another unit, a program, and both ----
service ollama /dev/nvidia0 /dev/nvidia-uvm
program /dev/nvidia0
policy '{"unit":"stop"}'
call $hook 111 pre-start
exits 'a program keeps it' 3
says 'a program keeps it' "PID $program (perl, session-9.scope)" "kill $program"
is 'a program keeps it: nobody is stopped' active "$(state ollama)"
untouched 'a program keeps it' "$at_home"
policy '{"unit":"stop","process":"kill"}'
works 'unit and program: pre-start' $hook 111 pre-start
in_no_vm 'unit and program' $slot1
ok 'the program has ended' has_gone "$program"
is 'the unit has stopped' inactive "$(state ollama)"
works 'unit and program: post-stop' $hook 111 post-stop
is_home 'unit and program'
ok 'the unit runs again' within 30 runs ollama
ok 'and has the card' within 10 has_open "$(pid_of ollama)" /dev/nvidia0

# ---- asked to let go: it closes the card and runs on ----
# Opens the card anew on SIGUSR2, closes it on SIGUSR1.
cat >/run/systemd/system/model.service <<'END'
[Service]
ExecStart=/usr/bin/perl -e 'sub load { open F, "<", "/dev/nvidia0" } $SIG{USR1} = sub { close F }; $SIG{USR2} = \&load; load; sleep 1000 while 1'
END
begin model /dev/nvidia0
model=$(pid_of model)
asks() { # asks ELSE WORD…: how model.service is asked
    local otherwise=$1 words
    shift
    printf -v words ',"%s"' "$@"
    policy "{\"unit\":\"stop\",\"process\":\"kill\",\"units\":{\"model.service\":{\"release\":[${words:1}],\"else\":\"$otherwise\"}}}"
}
systemctl stop ollama
asks refuse /usr/bin/systemctl kill -s USR1 model.service
works 'asked: plan' gpu-handoff plan 111
ok 'the plan says so' grep -q '^  ask       model.service by /usr/bin/systemctl kill' /run/call.out
ok 'a plan asks nobody' has_open "$model" /dev/nvidia0
works 'asked: qm start' qm start 111
in_vm 'asked' $slot1 111
says 'asked' '  ask ' 'ms  model.service' 'not in use'
is 'asked: it runs on' "$model" "$(pid_of model)"
works 'asked: qm stop' qm stop 111
is_home 'asked'
ok 'asked: nothing waits to be started' test ! -e $records/to-start
systemctl kill -s USR2 model
ok 'it has the card again' within 10 has_open "$model" /dev/nvidia0
asks refuse /usr/bin/true
sleep 3 # or it would be waited for, as one that has only just begun
call $hook 111 pre-start
exits 'asked in vain' 3
says 'asked in vain' 'model.service does not let go: /usr/bin/true' 'policy.units.model.service.else "stop"'
is 'asked in vain: it runs on' "$model" "$(pid_of model)"
untouched 'asked in vain' "$at_home"
asks stop /usr/bin/sleep 60
works 'asked in vain, else stopped: pre-start' $hook 111 pre-start
says 'asked in vain, else stopped' 'did not end within 10 s' 'stop model.service'
is 'else stopped' inactive "$(state model)"
works 'asked in vain, else stopped: post-stop' $hook 111 post-stop
is_home 'asked in vain, else stopped'
ok 'else stopped: it runs again' within 30 runs model
systemctl stop model
systemctl start ollama
ok 'the other has the card again' within 10 has_open "$(pid_of ollama)" /dev/nvidia0

# ---- the handoff fails after all: what was stopped runs again ----
service deaf /dev/nvidia0
sed -i 's/sub {.*exit 0 }/"IGNORE"/; s/\[Service\]/[Service]\nTimeoutStopSec=60/' /run/systemd/system/deaf.service
begin deaf /dev/nvidia0
printf '{"policy":{"unit":"stop"},"time":{"stop_s":3}}\n' >"$config"
call $hook 111 pre-start
exits 'one does not stop' 1
quick 'one does not stop' 15000
says 'one does not stop' 'deaf.service does not stop (after ' "$slot1 is back where it was"
systemctl kill -s KILL deaf
is_home 'one does not stop'
ok 'the other unit runs again' within 30 runs ollama
systemctl stop deaf
policy '{"unit":"stop"}'

# ---- killed in the middle of stopping: who comes next finishes it ----
service slow /dev/nvidia0
sed -i 's/undef, 0.2/undef, 5/' /run/systemd/system/slow.service
begin slow /dev/nvidia0
$hook 111 pre-start </dev/null >/dev/null 2>&1 &
job=$!
ok 'one is being stopped' within 20 grep -qs slow.service $records/vm-111
kill -KILL $job
ok 'killed: the record knows what was stopped' grep -q slow.service $records/vm-111
ok 'killed: home by itself' within 30 test ! -e $records/vm-111
is_home 'killed'
ok 'killed: the unit runs again' within 30 runs slow
ok 'killed: the other unit runs again' within 30 runs ollama
works 'one stops slowly: pre-start' $hook 111 pre-start
says 'one stops slowly' 'waits for slow.service to stop, for up to '
works 'one stops slowly: post-stop' $hook 111 post-stop
ok 'one stops slowly: it runs again' within 30 runs slow
systemctl stop slow ollama
finish
