#!/bin/sh
# Installs the driver's user space from an installer of NVIDIA's. See ../inside.rs.
#   driver.sh FILE SHA256 VERSION FLAG…
set -e
file=$1 sum=$2 version=$3
shift 3
cd /var/tmp/gpu-handoff
# A copy that ended for want of room looks like any other to whoever made it.
echo "$sum  $file" | sha256sum -c --quiet

# While this is there the driver counts as not installed, whatever else is.
mkdir -p /var/lib/gpu-handoff
: >/var/lib/gpu-handoff/installing
sync

# It unpacks itself below TMPDIR, and what it leaves there when it is killed goes with the directory.
TMPDIR=$PWD sh "./$file" "$@"

if ! said=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1); then
    # What is found in the end counts, not what the installer grumbled about on its way. See ../../teller.rs.
    echo "found: nvidia-smi: $(printf %s "$said" | tr '\n' ' ')"
    exit 1
fi
for one in $said; do
    if [ "$one" != "$version" ]; then
        echo "found: nvidia-smi says $one, not $version"
        exit 1
    fi
done
cd /
rm -rf /var/tmp/gpu-handoff
sync
rm -f /var/lib/gpu-handoff/installing
