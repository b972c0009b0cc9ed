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
        cuda-keyring "$package" libcuda1 libnvidia-ml1 nvidia-smi 'libnvidia-compute-*' 'nvidia-utils-*' 2>/dev/null
    # What an interrupted dpkg left: a journal, or packages half-way.
    if ls /var/lib/dpkg/updates/[0-9]* >/dev/null 2>&1 || [ -n "$(dpkg --audit 2>&1)" ]; then echo "broken=yes"; fi
fi
for list in /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ ! -e "$list" ] || ! grep -qsF -- "$repository" "$list" || echo "repository=yes"
done
release=$(printf %s "$package" | sed -n 's/.*-\([0-9]\{1,\}\)-\([0-9]\{1,\}\)$/-\1.\2/p')
if [ -x "/usr/local/cuda$release/bin/nvcc" ]; then
    "/usr/local/cuda$release/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/nvcc=\1/p'
fi

for directory in / /var/tmp; do
    df -Pk "$directory" 2>/dev/null | awk -v at="$directory" 'NR == 2 { print "free=" at, $6, $4 }'
done
exit 0
