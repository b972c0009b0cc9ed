#!/bin/bash
# Who uses the card is found although no descriptor, no name and no namespace of ours shows it; what is not NVIDIA's
# node keeps a card as well. busy.sh has the plain cases.
# lab: --modeset 1 --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

remember_home
at_home=$(snapshot)

# A program that maps a node and closes it: PATH, flags of mmap (1 is shared, 2 private), and what to do before it says
# that it is ready, in perl. 9 is mmap; perl-base has no module for it.
mapper='my ($path, $flags, $then) = @ARGV;
    sysopen F, $path, 2 or die "$path: $!\n";
    syscall(9, 0, 4096, $flags == 1 ? 3 : 1, $flags, fileno(F), 0) != -1 or die "mmap: $!\n";
    close F;
    eval $then; die $@ if $@;
    open O, ">", "/run/held" or die; close O;
    sleep 10000'
is_held() { # is_held TEXT
    ok "$1" within 20 test -e /run/held
    rm -f /run/held
}

# ---- a mapping without a descriptor ----
for flags in 1 2; do
    perl -e "$mapper" /dev/nvidia0 $flags '' &
    holder=$!
    is_held "a program has the card mapped and no descriptor (flags $flags)"
    ok 'none of its descriptors' not has_open $holder '/dev/nvidia*'
    in_use /dev/nvidia0 mapped $holder perl lab-script.service
    is 'the status says so' 1 "$(status $slot1 users.0.mapped)"
    release
done

# ---- in other namespaces, through a node of another name that is deleted by now ----
mkdir -p /run/elsewhere
# shellcheck disable=SC2016 # for the other shell
unshare --mount --pid --fork sh -c '
    mount -t tmpfs none /run/elsewhere && mknod "/run/elsewhere/my gpu" c 195 0 || exit 9
    exec perl -e "$0" "/run/elsewhere/my gpu" 1 "unlink \$path"' "$mapper" &
outer=$!
is_held 'a program in other namespaces has the card mapped'
inner=$(pgrep -P "$outer")
ok 'the kernel has another name for it' grep -q 'my gpu (deleted)' "/proc/$inner/maps"
in_use /dev/nvidia0 mapped "$inner" perl
kill -KILL "$inner"
wait "$outer" 2>/dev/null

# ---- the same in a container, in cgroups named as Proxmox does ----
root=/var/lib/lxc/101/rootfs
mkdir -p $root/{proc,sys,dev,run,usr,etc}
ln -s usr/bin $root/bin
ln -s usr/lib $root/lib
ln -s usr/lib64 $root/lib64
printf '%s' "$mapper" >$root/mapper
cat >/var/lib/lxc/101/config <<END
lxc.rootfs.path = $root
lxc.uts.name = ct
lxc.apparmor.profile = unconfined
lxc.mount.auto = proc sys
lxc.mount.entry = /usr usr none bind,ro
lxc.cgroup.dir.monitor = lxc.monitor/101
lxc.cgroup.dir.container = lxc/101
lxc.cgroup.dir.container.inner = ns
lxc.cgroup2.devices.allow = a
lxc.init.cmd = /bin/sh -c "mknod /dev/card c 195 0; exec perl /mapper /dev/card 1 'unlink \$path'"
END
works 'lxc-start' timeout 60 lxc-start -n 101
init=$(lxc-info -n 101 -p -H)
ok 'the container has the card mapped' within 20 test -e $root/run/held
in_use /dev/nvidia0 mapped "$init" perl 'container 101' 'pct shutdown 101'
is 'container in the status' 101 "$(status $slot1 users.0.ctid)"
lxc-stop -n 101 -k

# ---- a service that keeps the card initialised, where the policy says that it may ----
mkdir -p "${config%/*}"
echo '{"policy":{"nvidia_services":"refuse"}}' >"$config"
cat >/run/systemd/system/nvidia-persistenced.service <<'END'
[Service]
Type=exec
ExecStart=perl -e '$$0 = "nvidia-persistenced"; for (qw(/dev/nvidia0 /dev/nvidiactl)) { sysopen my $$f, $$_, 2 or die; push @f, $$f } open O, ">", "/run/held"; sleep 10000'
END
systemctl daemon-reload
systemctl start nvidia-persistenced.service
is_held 'nvidia-persistenced runs'
pid=$(systemctl show --value -p MainPID nvidia-persistenced.service)
in_use /dev/nvidia0 open "$pid" nvidia-persiste nvidia-persistenced.service 'systemctl stop nvidia-persistenced.service'
is 'unit in the status' nvidia-persistenced.service "$(status $slot1 users.0.unit)"
systemctl stop nvidia-persistenced.service
rm "$config"

# ---- what is not NVIDIA's node ----
render=$(echo "$pci/$slot1.0/drm/renderD"*)
pcm=$(echo "$pci/$slot1.1/sound/card"*/hwC*)
for node in /dev/fb0 "/dev/dri/${render##*/}" "/dev/snd/${pcm##*/}"; do
    ok "there is $node" test -c "$node"
    hold "$node"
    in_use "$node" open "$holder" perl
    release
done

# ---- vfio, and no VM: neither can the VM have the card, nor does it come home ----
works 'to vfio-pci by hand' gpu-handoff to-vfio $slot1
away=$(snapshot)
at_home=$away
for node in "$(group_node $slot1)" "/dev/vfio/devices/$(ls "$pci/$slot1.0/vfio-dev" 2>/dev/null)"; do
    # Newer kernels have a node for each device beside that of the group.
    [ -c "$node" ] || continue
    perl -e 'sysopen F, shift, 2 or die "$!"; open O, ">", "/run/held"; sleep 10000' "$node" &
    holder=$!
    is_held "a program has $node open"
    in_use "$node" open $holder perl
    call gpu-handoff to-nvidia $slot1
    exits "$node: to-nvidia" 3
    says "$node: to-nvidia" "PID $holder (perl" "$node open"
    untouched "$node: to-nvidia" "$away"
    release
done
works 'home by hand' gpu-handoff to-nvidia $slot1
is_home 'by hand'

at_home=$(snapshot)

# ---- nor does a name or a namespace keep anybody from being ended, where the policy says so ----
# shellcheck disable=SC2016 # for the other shell
systemd-run --quiet --scope --unit=session-9 unshare --mount sh -c '
    mount -t tmpfs none /run/elsewhere && mknod "/run/elsewhere/my gpu" c 195 0 || exit 9
    exec perl -e "$0" "/run/elsewhere/my gpu" 1 "unlink \$path"' "$mapper" </dev/null >/dev/null 2>&1 &
is_held 'a program of a session has the card mapped'
# shellcheck disable=SC2016 # for the other shell
in_session() { pgrep -f 'elsewhere/my gpu' | xargs -n 1 sh -c 'grep -qs "my gpu" /proc/$0/maps && echo $0'; }
inner=$(in_session)
in_use /dev/nvidia0 mapped "$inner" perl session-9.scope
echo '{"policy":{"process":"kill"}}' >"$config"
works 'killed: pre-start' $hook 111 pre-start
says 'killed' "PID $inner (perl)"
ok 'the program has ended' has_gone "$inner"
in_no_vm 'killed' $slot1
works 'killed: post-stop' $hook 111 post-stop
is_home 'killed'

# ---- but for the first process of a namespace, with which all in there would end ----
# shellcheck disable=SC2016 # for the other shell
systemd-run --quiet --scope --unit=session-10 unshare --mount --pid --fork sh -c '
    mount -t tmpfs none /run/elsewhere && mknod "/run/elsewhere/my gpu" c 195 0 || exit 9
    exec perl -e "$0" "/run/elsewhere/my gpu" 1 "unlink \$path"' "$mapper" </dev/null >/dev/null 2>&1 &
is_held 'the first process of a namespace has the card mapped'
inner=$(in_session)
call $hook 111 pre-start
exits 'first of a namespace' 3
says 'first of a namespace' "PID $inner (perl, session-10.scope)" 'stop what started it'
ok 'it lives' not has_gone "$inner"
kill -KILL "$inner"
rm "$config"

# ---- nobody uses it any more ----
works 'qm start' qm start 111
in_vm 'with the VM' $slot1 111
works 'qm stop' qm stop 111
is_home 'after the VM'
finish
