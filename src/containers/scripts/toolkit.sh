#!/bin/sh
# Installs a package of CUDA. See ../inside.rs.
#   toolkit.sh PACKAGE
package=$1
export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Acquire::Retries=2 -o Acquire::http::Timeout=60 \
        -o Acquire::https::Timeout=60 -o APT::Keep-Downloaded-Packages=false \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold --no-install-recommends "$@"
}

# Some other source may be out of reach: what counts is whether the package is known afterwards.
apt update || echo "going on with what apt knows"
if ! would=$(apt -s install "$package" 2>&1); then
    printf '%s\n' "$would"
    exit 1
fi
# A driver from packages would take the place of the host's.
driver=$(printf '%s\n' "$would" | sed -n 's/^Inst \(cuda-drivers[^ ]*\|libcuda1\|libnvidia-compute-[^ ]*\|nvidia-driver[^ ]*\|nvidia-kernel[^ ]*\|nvidia-dkms[^ ]*\) .*/\1/p')
if [ -n "$driver" ]; then
    echo "E: $package would install a driver:" $driver
    exit 1
fi
apt install "$package" || exit 1

cat >/etc/profile.d/gpu-handoff-cuda.sh.new <<'END'
# Written by gpu-handoff.
[ ! -d /usr/local/cuda/bin ] || PATH=$PATH:/usr/local/cuda/bin
END
mv /etc/profile.d/gpu-handoff-cuda.sh.new /etc/profile.d/gpu-handoff-cuda.sh
