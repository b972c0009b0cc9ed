#!/bin/bash
# Driver and CUDA are installed in containers, privileged and not, from stand-ins for NVIDIA's downloads: end to end,
# again without effect, killed in the stages inside, refused with nothing changed, and kept in step with the host.
# lab: --timeout 600
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

nvidia=/opt/lab/nvidia
version=$LAB_DRIVER
name=NVIDIA-Linux-x86_64-$version.run
url=http://10.1.0.1
sum=$(sha256sum "$nvidia/$name" | cut -d' ' -f1)
setup() { gpu-handoff container setup "$@"; }
settings() { # settings DRIVER-KEYS [CUDA-KEYS]
    mkdir -p "${config%/*}"
    echo "{\"driver\":{$1},\"cuda\":{\"repo\":\"$url/repos\"${2-}}}" >"$config"
}
by_url="\"runfile_url\":\"$url/$name\",\"sha256\":\"$sum\""
www() { # www DIRECTORY: what the containers' network has to offer
    [ -z "${server-}" ] || { kill "$server" && wait "$server"; } 2>/dev/null
    server=''
    [ $# = 0 ] || { busybox httpd -f -p 10.1.0.1:80 -h "$1" & server=$!; }
}
container() { # container ID FLAG…
    local id=$1
    lab-ct create "$@" 'lxc.net.0.type: veth' 'lxc.net.0.link: lab0' 'lxc.net.0.flags: up' \
        "lxc.net.0.ipv4.address: 10.1.0.$id/24"
}
# What setup may change: the container's configuration, and files of its own.
mark() { md5sum </etc/pve/lxc/"$1".conf && find "/var/lib/lab-ct/$1.layers/upper" -newer /run/mark ! -type d | sort; }
refused() { # refused TEXT CODE WORDS…: by setup of 202, with nothing changed
    local text=$1 code=$2 before
    shift 2
    touch /run/mark
    before=$(mark 202)
    call setup 202
    exits "$text" "$code"
    says "$text" "$@"
    same "$text: nothing was changed" "$before" "$(mark 202)"
}
killed_at() { # killed_at TEXT COMMAND…: SIGKILL for a setup of 202 as soon as the command succeeds
    local text=$1 pid
    shift
    : >/run/setup.err
    gpu-handoff container setup 202 </dev/null 2>/run/setup.err &
    pid=$!
    if within 90 "$@"; then echo "ok: $text: killed"; else
        echo "FAIL: $text never came: $(tail -n 3 /run/setup.err)"
        failures=$((failures + 1))
    fi
    kill -KILL $pid
    wait $pid 2>/dev/null
}
told() { grep -q "$1" /run/setup.err; }
inside() { pct exec "$@"; }
works_inside() { # works_inside TEXT ID
    local found
    found=$(inside "$2" -- sh -c 'nvidia-smi --query-gpu=driver_version --format=csv,noheader
        /usr/local/cuda/bin/nvcc --version | grep -o "release [0-9.]*"
        find /var/tmp /tmp -mindepth 1
        dpkg --audit' 2>&1)
    same "$1: nvidia-smi and nvcc, nothing left behind" "$version"$'\n''release 13.0' "$found"
    works "$1: check" gpu-handoff container check "$2"
}

ip link add lab0 type bridge && ip addr add 10.1.0.1/24 dev lab0 && ip link set lab0 up
www "$nvidia"
settings "$by_url"
container 201 --debian
container 202 --unprivileged --debian

# ---- end to end, of a container that does not run, and again ----

call setup 201 --dry-run
exits 'dry run' 0
is 'dry run: lines that start, install and add' 3 "$(grep -cE '^  (start|install) ' <<<"$out")"
settings "$by_url" ',"package":"cuda-toolkit-12-8"'
call setup 201
exits 'a toolkit that the repository does not have' 3
says 'a toolkit that the repository does not have' 'has no cuda-toolkit-12-8; it has cuda-toolkit-13-0 cuda-toolkit-13-1'
is 'a toolkit that the repository does not have' 'status: stopped' "$(pct status 201)"
settings "$by_url" ',"package":"cuda-samples-13-0"'
call setup 201
exits 'a package that brings a driver' 1
says 'a package that brings a driver' 'would install a driver: cuda-drivers'
settings "$by_url"
works 'privileged' setup 201
says 'privileged' 'takes up to' 'cuda-toolkit-13-0 6.2 GiB'
ok 'privileged: only the toolkit was left to do' not grep -q 'installing driver' <<<"$err"
works_inside 'privileged' 201
is 'the keyring is used' 'Signed-By: /usr/share/keyrings/cuda-archive-keyring.gpg' \
    "$(inside 201 -- grep Signed-By /etc/apt/sources.list.d/gpu-handoff-cuda.sources)"
ok 'the log has what the installer said' grep -q "Installing NVIDIA driver version $version" /var/log/gpu-handoff/container-201.log
www
touch /run/mark
before=$(mark 201)
call setup 201
exits 'again, without a network' 0
says 'again' 'nothing was to be done'
same 'again: nothing was changed' "$before" "$(mark 201)"
quick 'again' 15000

# ---- bad input; 202 runs, and what it has is as it was ----

pct start 202
rm -f "/var/cache/gpu-handoff/$name"
refused 'no network' 1 'downloading' 'curl: ' '/var/log/gpu-handoff/container-202.log'
www "$nvidia"
cp "$nvidia/NVIDIA-Linux-x86_64-570.86.16.run" /root/driver.run
settings '"runfile":"/root/driver.run"'
refused 'wrong version, by its contents' 3 'wrong installer version' 570.86.16 "$version"
settings "$by_url"
mount -o remount,size=4G /var/lib/lab-ct/202.layers
refused 'full disk' 3 'GiB free on /' '9.5 GiB are needed' '--driver-only'
mount -o remount,size=20G /var/lib/lab-ct/202.layers
inside 202 -- sh -c 'cp /etc/os-release /root/os && rm /etc/os-release &&
    printf "ID=alpine\nVERSION_ID=3.22\nPRETTY_NAME=Alpine\n" >/etc/os-release && touch /etc/lab-slow'
refused 'unsupported' 3 'has Alpine' 'Debian 12 and 13, Ubuntu 22.04 and 24.04'
inside 202 -- sh -c 'cat /root/os >/etc/os-release'

# ---- killed in each stage inside, and at last let through ----

killed_at 'copying' told copying
killed_at 'installing the driver' inside 202 -- test -e "/usr/lib/x86_64-linux-gnu/libcuda.so.$version"
killed_at 'adding the repository' told 'adding the CUDA'
killed_at 'installing the toolkit' inside 202 -- test -e /usr/local/cuda-13.0/bin/nvcc
# Without what went on inside, too.
pct stop 202
rm -f /var/lib/lab-ct/202.layers/upper/etc/lab-slow
works 'after all of that' setup 202
works_inside 'after all of that' 202
ok 'after all of that: unprivileged' grep -q '^unprivileged: 1' /etc/pve/lxc/202.conf

# ---- a host with another driver, and a signature that is none ----

inside 201 -- sh -c 'cat >/tmp/x.run && sh /tmp/x.run -s --no-kernel-modules && rm /tmp/x.run' \
    <"$nvidia/NVIDIA-Linux-x86_64-570.86.16.run" >/dev/null 2>&1
pct shutdown 202
call gpu-handoff container check --all
exits 'another driver: check' 1
ok 'another driver: check' grep -q "driver .*570.86.16, the host has $version: gpu-handoff container sync 201" <<<"$out"
call gpu-handoff container sync --all
exits 'sync' 1
says 'sync' 'container 201: has driver' 'container 202 is stopped'
works_inside 'sync' 201

works 'the driver alone' setup 201 --driver-only

# That of Debian 12 is signed as Debian 13's apt believes no more.
inside 201 -- sh -c 'cat >/tmp/old.deb && dpkg-deb -x /tmp/old.deb /tmp/old' <"$nvidia/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb"
ok 'the key of Debian 12 is refused' grep -q SHA1 <(inside 201 -- sh -c '
    echo "deb [signed-by=/tmp/old/usr/share/keyrings/cuda-archive-keyring.gpg] http://10.1.0.1/repos/debian12/x86_64/ /" \
        >/etc/apt/sources.list.d/old.list
    apt-get update 2>&1
    rm -rf /etc/apt/sources.list.d/old.list /tmp/old /tmp/old.deb')

cp -r "$nvidia" /root/forged
sed -i 's/^Label: NVIDIA CUDA/Label: NVIDIA XXXX/' /root/forged/repos/debian13/x86_64/InRelease
www /root/forged
ok 'a forged repository is not believed' grep -q 'is not signed' \
    <(inside 201 -- sh -c 'rm -rf /var/lib/apt/lists/*; apt-get update 2>&1')
finish
