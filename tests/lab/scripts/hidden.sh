#!/bin/bash
# Holders that /proc hides or shows only in part: threads with descriptors of their own, a descriptor that is on its way
# through a socket, processes that share one table; and containers that go on for a while after they were asked to be
# frozen. Nothing may hang on any of them.
# lab: --timeout 400
# lab: --gpus 2 --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)
mkdir -p "${config%/*}" /run/c
compile() { # compile NAME: the program on standard input
    cc -O1 -pthread -o "/run/c/$1" -x c - || { echo "FAIL: $1 does not compile" && failures=$((failures + 1)); }
}
begin() { # begin PROGRAM ARG…: pid in $holder, once it says that it is ready
    "/run/c/$1" "${@:2}" </dev/null >/dev/null 2>&1 &
    holder=$!
    ok "$1 has begun" within 20 test -e /run/held
    rm -f /run/held
    sleep 3.5 # so that it is nobody who has only just begun
}

# ---- a thread with a table of its own ----
compile thread <<'END_C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
static void *other(void *path) {
    unshare(CLONE_FILES);
    open(path, O_RDWR);
    close(creat("/run/held", 0600));
    pause();
    return 0;
}
int main(int count, char **values) {
    pthread_t thread;
    pthread_create(&thread, 0, other, values[count - 1]);
    pause();
}
END_C
begin thread /dev/nvidia0
ok 'none of its own descriptors' not has_open "$holder" '/dev/nvidia*'
in_use /dev/nvidia0 open "$holder" thread
release

# ---- a descriptor that nobody has: it was sent and is not yet received ----
compile sent <<'END_C'
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int count, char **values) {
    int pair[2], file = open(values[count - 1], O_RDWR);
    char byte = 'x', control[CMSG_SPACE(sizeof file)] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(header), &file, sizeof file);
    if (file < 0 || sendmsg(pair[0], &message, 0) != 1) return 9;
    close(file);
    close(creat("/run/held", 0600));
    pause();
}
END_C
begin sent /dev/nvidia0
ok 'no descriptor anywhere' not has_open "$holder" '/dev/nvidia*'
call $hook 111 pre-start
if [ "$LAB_GPUS" = 1 ]; then
    # The modules say that they are in use, and all is back.
    exits 'sent, one card' 1
    says 'sent, one card' 'unload nvidia: it is in use (refcnt ' 'is back where it was'
else
    # Unbinding would hang.
    exits 'sent, two cards' 3
    says 'sent, two cards' 'open file(s) that belong to no process' 'could hang'
    one_line 'sent, two cards'
fi
untouched 'sent' "$at_home"
ok 'nothing hangs' not compgen -G "$records/wedged-*"
if [ "$LAB_GPUS" = 2 ]; then
    # Who openly uses the other card does not stand in the way, and does not hide the one in the socket.
    hold /dev/nvidia1
    other=$holder
    sleep 3.5
    call $hook 111 pre-start
    exits 'sent, and the other card in use' 3
    says 'sent, and the other card in use' 'open file(s) that belong to no process'
    pkill -KILL -x sent
    works 'the other card in use' $hook 111 pre-start
    works 'the other card in use: home' $hook 111 post-stop
    holder=$other
else
    pkill -KILL -x sent
fi
release
wait 2>/dev/null

# The same with the sound card: here unbinding would wait in any case.
# The driver takes its time when the card has just come home.
ok 'the sound card is there' within 20 compgen -G "$pci/$slot1.1/sound/card*/controlC*"
udevadm settle
control=$(echo "$pci/$slot1.1/sound/card"*/controlC*)
begin sent "/dev/snd/${control##*/}"
call $hook 111 pre-start
exits 'sent, the sound card' 3
says 'sent, the sound card' 'snd_hda_intel has 1 open file(s) that belong to no process'
untouched 'sent, the sound card' "$at_home"
release

# ---- many processes that share one large table ----
compile share <<'END_C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>
static int child(void *none) {
    (void)none;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
}
int main(void) {
    struct rlimit most = {200000, 200000};
    int zero = open("/dev/zero", O_RDONLY), n;
    char *stacks = malloc(4096 * 101);
    setrlimit(RLIMIT_NOFILE, &most);
    for (n = 0; n < 6000; n++) dup(zero);
    for (n = 0; n < 100; n++) clone(child, stacks + 4096 * (n + 1), CLONE_FILES | CLONE_VM | SIGCHLD, 0);
    close(creat("/run/held", 0600));
    pause();
}
END_C
call gpu-handoff --status
before=$ms
begin share
hold /dev/nvidia0
call gpu-handoff --status
ok "100 processes with 6,000 descriptors in common: $ms ms, without a look $before" test "$ms" -lt $((before + 8000))
echo '{"time":{"handoff_s":30}}' >"$config"
call $hook 111 pre-start
exits 'shared tables' 3
says 'shared tables' "PID $holder (perl"
quick 'shared tables' 11000
release
rm "$config"
pkill -KILL -x share
wait 2>/dev/null

# ---- udev's workers, and whoever has only just begun, are waited for ----
perl -e 'open F, "<", "/dev/nvidia0" or exit 9; open O, ">", "/run/held"; close O; sleep 1' &
ok 'a program that is gone in a moment' within 10 test -e /run/held
rm -f /run/held
works 'gone in a moment: pre-start' $hook 111 pre-start
works 'gone in a moment: post-stop' $hook 111 post-stop
is_home 'gone in a moment'

# ---- frozen is what the kernel says, not what it was asked for ----
lab-ct create 102 'lxc.mount.entry: /dev/nvidia0 dev/nvidia0 none bind,optional,create=file'
pct start 102 >/dev/null 2>&1
ok 'container 102 runs' within 30 grep -q 'populated 1' /sys/fs/cgroup/lxc/102/cgroup.events
compile busy <<'END_C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
    close(creat("/run/held", 0600));
    for (;;) {
        void *memory = mmap(0, 600 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        munmap(memory, 600 << 20);
    }
}
END_C
begin busy
leaf=/sys/fs/cgroup/lxc/102$(find /sys/fs/cgroup/lxc/102 -name cgroup.procs -exec grep -l . {} + | head -n 1 | sed 's,^/sys/fs/cgroup/lxc/102,,; s,/cgroup.procs$,,')
ok 'a busy process is in container 102' sh -c "echo $holder >$leaf/cgroup.procs"
# Notes whether the driver ever went while the container did not stand still, and whether there was such a time at all.
cat >/run/c/watch <<'END_WATCH'
while [ -e /run/watching ]; do
    read -r wish <$1/cgroup.freeze
    if [ "$wish" = 1 ]; then
        gone=''
        [ -e /sys/module/nvidia_drm ] || gone=1
        if grep -q 'frozen 0' $1/cgroup.events; then
            read -r wish <$1/cgroup.freeze
            [ "$wish" != 1 ] || echo "between$gone"
        fi
    fi
done | sort -u >/run/seen
END_WATCH
: >/run/watching
sh /run/c/watch /sys/fs/cgroup/lxc/102 &
watching=$!
works 'a container that is busy: pre-start' $hook 111 pre-start
rm /run/watching
wait $watching
if grep -q 'not frozen yet' /run/call.err; then
    echo 'note: it did not stand still in time'
else
    ok 'the state between was seen, or too short' not grep -q 'between1' /run/seen
fi
says 'a container that is busy' 'freeze container 102, ' 'thaw container 102'
works 'a container that is busy: post-stop' $hook 111 post-stop
release
is_home 'in the end'
finish
