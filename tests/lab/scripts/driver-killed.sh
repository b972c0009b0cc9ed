#!/bin/bash
# The host's driver is being set up when something dies: the program, or the installer with it, at each stage. The same
# call again, or what the boot unit runs, puts it right. And an upgrade that fails brings the old driver back.
# Part of make test-package: it compiles for minutes.
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

old=$LAB_DRIVER new=570.86.16
cache=/var/cache/gpu-handoff
release=$(uname -r)
log=/var/log/nvidia-installer.log
video=/lib/modules/$release/kernel/drivers/video

version() { modinfo -k "$release" -F version "$1" 2>/dev/null; }
# there TEXT VERSION: modules, libraries and what is loaded are of this version
there() {
    is "$1: modules" "$2 $2" "$(version nvidia) $(version nvidia_uvm)"
    is "$1: libraries" "libcuda.so.$2" "$(cd /usr/lib/x86_64-linux-gnu && echo libcuda.so.*.*)"
    is "$1: nvidia-smi" "$2" "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader)"
    is "$1: at home" nvidia "$(driver_of $slot1.0)"
}
is_busy() { ! flock --nonblock /run/gpu-handoff/driver.lock true; }
# begin MARKER: sets up the driver beside this script until the installer's log has MARKER
begin() {
    rm -f $log
    gpu-handoff setup driver >/root/setup.log 2>&1 &
    setup=$!
    for _ in {1..6000}; do
        ! grep -qs -- "$1" $log || return 0
        sleep 0.1
    done
    ok "the installer was to say '$1'" false
}
config() {
    mkdir -p /etc/gpu-handoff
    echo "{\"driver\":{\"runfile\":\"$cache/NVIDIA-Linux-x86_64-$1.run\"}}" >/etc/gpu-handoff/config.json
}

# ---- the first driver ----
unload_stack
rm -f /dev/nvidia* "/lib/modules/$release"/updates/lab/nvidia*.ko
depmod
mkdir -p $cache
cp /opt/lab/nvidia/NVIDIA-Linux-x86_64-{"$old","$new"}.run $cache/
config "$old"
works 'the first' gpu-handoff setup driver
there 'the first' "$old"
works 'once more' gpu-handoff setup driver
says 'once more' 'nothing to do'

# ---- another version compiles, and fails when the old one is gone ----
config "$new"
touch /etc/lab-fail-build
call gpu-handoff setup driver
is 'a build that fails' 1 "$rc"
says 'a build that fails' "driver $old is there as before"
there 'a build that fails' "$old"
rm /etc/lab-fail-build
echo "$new" >/etc/lab-fail-install
call gpu-handoff setup driver
is 'fails when the old one is gone' 1 "$rc"
says 'fails when the old one is gone' "driver $new could not be installed, $old is there again"
there 'fails when the old one is gone' "$old"
rm /etc/lab-fail-install

# ---- killed ----
touch /etc/lab-slow
begin 'Building'
kill -KILL $setup
ok 'killed in the build: the installer goes on' is_busy
call gpu-handoff setup driver
is 'meanwhile' 5 "$rc"
says 'meanwhile' 'still at work'
ok 'killed in the build: the installer ends' within 600 not is_busy
works 'killed in the build: again' gpu-handoff setup driver
there 'killed in the build' "$new"

config "$old"
begin 'Building'
pkill -KILL -f nvidia-installer
kill -KILL $setup
wait $setup
for _ in {1..100}; do is_busy || break; sleep 0.1; done
is 'all killed in the build: what is on the disk' "$new" "$(version nvidia)"
works 'all killed in the build: what boot does' gpu-handoff setup pending
there 'all killed in the build' "$old"

config "$new"
begin "Installing '"
pkill -KILL -f nvidia-installer
kill -KILL $setup
wait $setup
for _ in {1..100}; do is_busy || break; sleep 0.1; done
works 'all killed while it installs: what boot does' gpu-handoff setup pending
there 'all killed while it installs' "$new"

config "$old"
begin "Installing '"
kill -TERM $setup
wait $setup
is 'asked to end too late: it goes on' 0 "$?"
there 'asked to end too late' "$old"
rm /etc/lab-slow

# ---- and away ----
works 'taken back' gpu-handoff setup driver --undo
ok 'nothing is left' test ! -e "$video/nvidia.ko" -a ! -e /usr/bin/nvidia-smi -a ! -d /sys/module/nvidia
ok 'the installers stay' test -e "$cache/NVIDIA-Linux-x86_64-$old.run"
finish
