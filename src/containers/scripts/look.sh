#!/bin/sh
# What is inside a container, a fact a line as NAME=VALUE; changes nothing. See ../inside.rs.
#   look.sh REPOSITORY PACKAGE [NODE]...: the URL that apt should know, the package of CUDA, nodes to try
repository=$1 package=$2
shift 2

[ ! -r /etc/os-release ] || (
    . /etc/os-release
    echo "os=$ID"
    echo "os_version=$VERSION_ID"
    echo "os_name=$PRETTY_NAME"
)

for directory in /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/lib; do
    for library in libcuda libnvidia-ml; do
        for file in "$directory/$library".so.*.*; do
            [ ! -e "$file" ] || echo "$library=${file##*/"$library".so.}"
        done
    done
done
! ls /lib/ld-musl-* >/dev/null 2>&1 || echo "libc=musl"
[ -x /usr/sbin/modprobe ] || [ -x /sbin/modprobe ] || [ -x /usr/bin/modprobe ] || echo "lacks=modprobe"
# In a container the runtime may not set up device cgroups, and fails unless it is told not to.
if command -v docker >/dev/null && command -v nvidia-container-cli >/dev/null; then
    grep -qsE '^[[:space:]]*no-cgroups[[:space:]]*=[[:space:]]*true' /etc/nvidia-container-runtime/config.toml ||
        echo "docker=cgroups"
fi
command -v nvidia-smi >/dev/null && echo "smi=yes"
[ ! -e /var/lib/gpu-handoff/installing ] || echo "installing=yes"
[ ! -e /var/tmp/gpu-handoff ] || echo "leftovers=yes"
for node; do
    # Whether it can be opened, not only seen.
    if [ -c "$node" ] && (: <"$node") 2>/dev/null; then echo "node=$node"; fi
done

if command -v dpkg-query >/dev/null; then
    # shellcheck disable=SC2016 # dpkg's variables
    dpkg-query -W -f 'package=${Package} ${Version} ${db:Status-Status}\n' \
        cuda-keyring "$package" 'cuda-toolkit-[0-9]*' libcuda1 libnvidia-ml1 nvidia-smi 'libnvidia-compute-*' 'nvidia-utils-*' 2>/dev/null
    # What an interrupted dpkg left: a journal, or packages half-way.
    if ls /var/lib/dpkg/updates/[0-9]* >/dev/null 2>&1 || [ -n "$(dpkg --audit 2>&1)" ]; then echo "broken=yes"; fi
fi
for list in /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ ! -e "$list" ] || ! grep -qsF -- "$repository" "$list" || echo "repository=yes"
done
for nvcc in /usr/local/cuda-*/bin/nvcc /usr/local/cuda/bin/nvcc; do
    [ ! -x "$nvcc" ] || "$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/nvcc=\1/p'
done

for directory in / /var/tmp; do
    df -Pk "$directory" 2>/dev/null | awk -v at="$directory" 'NR == 2 { print "free=" at, $6, $4 }'
done
exit 0
