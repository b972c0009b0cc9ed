#!/bin/bash
# Packs what differs from run to run into a tar that lab-payload unpacks
# over the guest's root. All state comes in the environment, see ../run.
#   payload.sh OUTPUT MODULES SCRIPT [ARG…]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

output=$1 modules=$2 script=$(realpath -- "$3")
shift 3
stage=$(mktemp -d "${output%/*}/stage.XXXXXX")
trap 'rm -rf "$stage"' EXIT
chmod 755 "$stage"
cp -a "$modules/tree/." "$stage"
cd "$stage"

# ---- the driver's version: over the padded text in the modules' .modinfo ----
# shellcheck disable=SC2016 # perl's variables
[ "$LAB_STACK" = genuine ] || find usr/lib/modules -path '*/updates/lab/nvidia*.ko' -print0 |
    xargs -0 perl -0777 -pi -e 's/LAB-DRIVER-VERSION/pack "a18", $ENV{LAB_DRIVER}/ge'

mkdir -p opt/lab etc/modprobe.d
printf '%s=%s\n' LAB_HOME "$LAB_HOME" LAB_GPUS "$LAB_GPUS" LAB_DRIVER "$LAB_DRIVER" LAB_STACK "$LAB_STACK" \
    LAB_NAMES "$LAB_NAMES" \
    LAB_MODESET "$LAB_MODESET" LAB_FIRMWARE "$LAB_FIRMWARE" LAB_LIMIT "$LAB_LIMIT" >opt/lab/settings

modprobe_conf "$LAB_HOME" >etc/modprobe.d/lab.conf

# ---- what a Proxmox host has ----
mkdir -p etc/pve/nodes/pve1/{qemu-server,lxc} etc/pve/mapping var/lib/vz/snippets usr/sbin
ln -s nodes/pve1 etc/pve/local
ln -s nodes/pve1/qemu-server etc/pve/qemu-server
ln -s nodes/pve1/lxc etc/pve/lxc
vm_conf() { # vm_conf ID NAME [HOSTPCI]
    {
        echo 'boot: '
        echo 'cores: 1'
        echo 'hookscript: local:snippets/gpu-handoff'
        [ -z "${3-}" ] || echo "hostpci0: $3"
        printf '%s\n' 'machine: q35' 'memory: 64' "name: $2" 'ostype: l26' 'vga: none'
    } >"etc/pve/nodes/pve1/qemu-server/$1.conf"
}
vm_conf 100 plain
vm_conf 111 gpu-one 0000:01:00,pcie=1,x-vga=1
[ "$LAB_GPUS" -lt 2 ] || vm_conf 112 gpu-two 0000:02:00,pcie=1,x-vga=1
chmod 640 etc/pve/nodes/pve1/qemu-server/*.conf
install -m 755 "$LAB_SRC"/guest/{qm,pct,lab-ct,lab-pve,lab-reboot} usr/sbin/
cp "$LAB_SRC/guest/proxmox.pl" opt/lab/
mkdir -p usr/share/lxc/hooks usr/share/lxc/config/{common,userns}.conf.d
ln -s /usr/sbin/pct usr/share/lxc/pve-container-stop-wrapper
for phase in pre-start autodev post-stop; do
    ln -s /usr/sbin/pct "usr/share/lxc/hooks/lxc-pve-${phase/-/}-hook"
    echo "lxc.hook.$phase = /usr/share/lxc/hooks/lxc-pve-${phase/-/}-hook"
done >usr/share/lxc/config/common.conf.d/01-pve.conf
# Unprivileged: everything but what is denied.
printf 'lxc.cgroup2.devices.%s\n' 'deny =' 'allow =' 'allow = a' >usr/share/lxc/config/userns.conf.d/01-pve.conf

# ---- what NVIDIA has for download ----
cp -r "$LAB_NVIDIA" opt/lab/nvidia

# Where the installers keep what they have compiled.
[ -z "$LAB_COMPILED" ] || { mkdir -p var/tmp && chmod 1777 var/tmp && cp -r "$LAB_COMPILED" var/tmp/lab-compiled; }

# ---- the binary, as a user would have it ----
install -m 755 "$LAB_BINARY" usr/sbin/gpu-handoff
ln -s /usr/sbin/gpu-handoff var/lib/vz/snippets/gpu-handoff

[ -z "$LAB_DEB" ] || cp "$LAB_DEB" opt/lab/

# ---- the script, with its folder when that is ours ----
mkdir -p opt/lab/scripts
case $script in
    "$LAB_SRC"/*) cp -rL "${script%/*}/." opt/lab/scripts/ ;;
    *) cp -L "$script" opt/lab/scripts/ ;;
esac
[ -z "${LAB_WITH-}" ] || cp -rL "$LAB_WITH/." opt/lab/scripts/
target=/opt/lab/scripts/${script##*/}
chmod 755 ".$target"
command=("$target" "$@")
magic=$(head -c 4 "$script" | tr -d '\0')
case $magic in
    '#!'* | $'\x7fELF') ;;
    *) command=(/bin/bash "${command[@]}") ;;
esac
# A file of its own: systemd's quoting would change arguments.
{
    echo '#!/bin/bash'
    printf 'exec /opt/lab/lab-script'
    printf ' %q' "${command[@]}"
    echo
} >opt/lab/lab-script-start
chmod 755 opt/lab/lab-script-start

tar -cf "$output" --owner=0 --group=0 --numeric-owner -C "$stage" .
