#!/bin/bash
# Two hundred device events while containers start and stop: none takes long, and all is well afterwards.
# lab: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
times=/run/handlers
# Runs a program in the place of which it stands, and writes down: its name, the PID that all of one event have in common,
# and microseconds: in all, and on a processor.
cat >/run/timed.c <<'END'
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define US(t) ((t).tv_sec * 1000000L + (t).tv_usec)
int main(int argc, char **argv)
{
	int run = strstr(argv[0], "systemd-run") != NULL, status;
	char *real = run ? "/usr/bin/systemd-run.real" : "/usr/sbin/gpu-handoff";
	struct timespec a, b;
	struct rusage r;
	clock_gettime(CLOCK_MONOTONIC, &a);
	pid_t pid = fork();
	if (!pid) {
		execv(real, argv);
		_exit(127);
	}
	wait4(pid, &status, 0, &r);
	clock_gettime(CLOCK_MONOTONIC, &b);
	FILE *f = fopen("/run/handlers", "a");
	fprintf(f, "%s %d %ld %ld\n", run ? "run" : "event", run ? getppid() : pid,
		(b.tv_sec - a.tv_sec) * 1000000L + (b.tv_nsec - a.tv_nsec) / 1000, US(r.ru_utime) + US(r.ru_stime));
	fclose(f);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}
END
gcc -o /usr/local/sbin/timed /run/timed.c || exit 1
mv /usr/bin/systemd-run /usr/bin/systemd-run.real
cp /usr/local/sbin/timed /usr/bin/systemd-run
sed 's|/usr/sbin/gpu-handoff|/usr/local/sbin/timed|' "${0%/*}/60-gpu-handoff.rules" >/etc/udev/rules.d/60-gpu-handoff.rules
udevadm control --reload

for id in 101 102; do
    lab-ct create $id 'lxc.cgroup2.devices.allow: c 195:* rwm' \
        'lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file' \
        'lxc.mount.entry: /dev/nvidia-uvm dev/nvidia-uvm none bind,optional,create=file'
done
starts() { # starts CTID: and stops, until told to end
    local n=0
    while [ ! -e /run/enough ]; do
        pct start "$1" >>"/run/pct-$1" 2>&1 && n=$((n + 1))
        pct stop "$1" >>"/run/pct-$1" 2>&1
    done
    echo "$n" >"/run/starts-$1"
}
for id in 101 102; do starts $id & done
begin=$SECONDS
for round in {1..40}; do
    udevadm trigger --action=add --subsystem-match=module --sysname-match='nvidia*'
    udevadm trigger --action=bind --subsystem-match=pci --attr-match=vendor=0x10de --attr-match=class=0x030000
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
echo "# $((SECONDS - begin)) s; containers started $(cat /run/starts-*) times"
awk '$1 == "run" { wall[$2] = $3; cpu[$2] = $4 }
    $1 == "event" { n++; pid[n] = $2; w[n] = $3; c[n] = $4 }
    END {
        for (i = 1; i <= n; i++) {
            asked += pid[i] in wall
            w[i] -= wall[pid[i]]; c[i] -= cpu[pid[i]]
            if (w[i] > maxw) maxw = w[i]
            if (c[i] > maxc) maxc = c[i]
            sumw += w[i]; sumc += c[i]
        }
        printf "%d %d %d %d\n", n, asked, maxw / 1000, maxc / 1000
        printf "# %d events, %d asked for a look; ms without systemd-run: %.1f on average, %.1f at most; on a processor %.1f, %.1f\n",
            n, asked, sumw / n / 1000, maxw / 1000, sumc / n / 1000, maxc / 1000 >"/dev/stderr"
    }' $times >/run/result
read -r events asked longest busiest </run/result
ok "$events events, 200 at least" [ "$events" -ge 200 ]
ok "of them $asked asked for a look" [ "$asked" -lt $((events / 2)) ]
ok "the busiest took $busiest ms of a processor" [ "$busiest" -lt 100 ]
ok "the longest took $longest ms" [ "$longest" -lt 1000 ]
is_home 'after the storm'
is 'failed units' '' "$(systemctl --failed --no-legend)"
is 'processes' '' "$(pgrep -a gpu-handoff)"
is 'what is left' '' "$(find $records -name 'ct-*' -o -name device-event -o -name '.*')"
is 'unfinished nodes' '' "$(find /dev -maxdepth 1 -name '.nvidia*')"
ok 'no start failed' not grep -v '^$' /run/pct-*
finish
