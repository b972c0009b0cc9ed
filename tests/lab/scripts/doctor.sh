#!/bin/bash
# What doctor looks for, made by a real kernel, udev, systemd, initramfs-tools, LXC: it is found, nothing else is, and it is
# gone once its remedy has been typed as it stands there, its cause taken away, or --fix has run.
# lab: --driver genuine --timeout 400
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

ids() { gpu-handoff doctor 2>/dev/null | sed -nE 's/^(error|warning|note) +([a-z0-9-]+) .*/\2/p' | sort; }
told() { gpu-handoff doctor 2>/dev/null | sed -n "/^[a-z]* *$1 /,/^  do /p"; } # told ID: all that it says of it
remedy() { told "$1" | sed -n 's/^  do  *//p' | head -n 1; }
remember() { before=$(ids); }
found() { # found "ID…" WORDS…: these are new, and no other; the first says WORDS
    local words id=${1%% *}
    same "$1" "$(tr ' ' '\n' <<<"$1" | sort)" "$(comm -13 <(echo "$before") <(ids) | uniq)"
    shift
    for words in "$@"; do ok "$id says: $words" grep -qF -- "$words" <<<"$(told "$id")"; done
}
gone() { same "$1: gone" "$before" "$(ids)"; } # gone ID: and so is all else
typed() { # typed ID
    local remedy
    remedy=$(remedy "$1")
    works "$1: $remedy" bash -c "$remedy"
    gone "$1"
}
fixed() { # fixed ID
    works "$1: --fix --dry-run" gpu-handoff doctor --fix --dry-run
    found "$1"
    works "$1: --fix" gpu-handoff doctor --fix
    gone "$1"
    works "$1: --fix again" gpu-handoff doctor --fix
    ok "$1: which has nothing to do" grep -q '^nothing to do' <<<"$out"
}

# ---- the lab as it is ----
qm set 100 --delete hookscript
remember
ok 'the initramfs is older than what the lab writes' grep -qx initramfs-old <<<"$before"
renew=$(remedy initramfs-old)
works "$renew" bash -c "$renew"
ok 'now it is not' not grep -qx initramfs-old <<<"$(ids)"
remember
works 'nothing is an error' gpu-handoff doctor

# ---- left over in the kernel ----
echo vfio-pci >"$pci/$slot1.1/driver_override"
found override-left "$slot1.1"
fixed override-left
rm /dev/nvidia-uvm
found nodes-missing /dev/nvidia-uvm
fixed nodes-missing

# ---- a VM ran without the hookscript, and Proxmox has left its card on vfio-pci ----
qm set 111 --delete hookscript
rmmod nvidia_uvm nvidia_drm nvidia_modeset 2>/dev/null
works 'without the hook' qm start 111
works 'without the hook' qm stop 111
found 'card-elsewhere new-id-left vm-no-hook' "$slot1 is on vfio-pci"
works 'new-id-left: --fix' gpu-handoff doctor --fix
works 'new-id-left: --fix again' gpu-handoff doctor --fix
is 'which finds them gone' 2 "$(grep -c 'it was gone already' <<<"$out")"
typed card-elsewhere

# ---- the card does not answer ----
port=$(basename "$(readlink -f "$pci/$slot1.0/..")")
bus=$(setpci -s "$port" SECONDARY_BUS)
setpci -s "$port" SECONDARY_BUS=f0 SUBORDINATE_BUS=f0
call gpu-handoff doctor
exits 'a card that is gone' 1
ok 'card-gone' grep -qF "$slot1" <<<"$(told card-gone)"
setpci -s "$port" SECONDARY_BUS="$bus" SUBORDINATE_BUS="$bus"
gone card-gone

# ---- what modprobe is told, and the initramfs's copy of it ----
# As if it had been made anew: more than a minute after the last one the folder, from which something is removed, is newer.
renewed() { touch "/boot/initrd.img-$(uname -r)"; }
renewed
echo 'blacklist nvidia' >/etc/modprobe.d/pve-blacklist.conf
found 'blacklist initramfs-old' /etc/modprobe.d/pve-blacklist.conf:1
rm /etc/modprobe.d/pve-blacklist.conf
gone blacklist
renewed
echo 'install nvidia /bin/false' >/lib/modprobe.d/x.conf
found 'install initramfs-old' /lib/modprobe.d/x.conf:1
rm /lib/modprobe.d/x.conf
gone install
renewed
echo 'blacklist nouveau' >/etc/modprobe.d/nvidia.old
found modprobe-not-read /etc/modprobe.d/nvidia.old
rm /etc/modprobe.d/nvidia.old
sleep 1
touch /etc/modprobe.d/lab.conf
found initramfs-old /etc/modprobe.d/lab.conf
typed initramfs-old

# ---- udev, systemd ----
echo 'ACTION=="add", SUBSYSTEM=="pci", ATTR{vendor}=="0x10de", ATTR{driver_override}="vfio-pci"' >/etc/udev/rules.d/99-x.rules
found udev-rule /etc/udev/rules.d/99-x.rules:1
rm /etc/udev/rules.d/99-x.rules
gone udev-rule
cp "${0%/*}"/gpu-handoff-reconcile.service /usr/lib/systemd/system/
systemctl daemon-reload
systemctl mask --quiet gpu-handoff-reconcile.service
found unit-masked gpu-handoff-reconcile.service
typed unit-masked
systemd-run --quiet --unit=ollama bash -c "exec 3<>/dev/nvidia0; exec sleep 300"
within 10 fuser -s /dev/nvidia0
found vm-would-not-start ollama.service 'systemctl stop ollama.service'
systemctl stop ollama
gone vm-would-not-start

# ---- the hookscript, and the modules of the running kernel ----
rm $hook
found hook-link 111
fixed hook-link
modprobe -r vfio-pci
mv "/lib/modules/$(uname -r)" /root/
mkdir /lib/modules/6.99.0-lab
found 'vfio-missing kernel-removed'
mv "/root/$(uname -r)" /lib/modules/
rmdir /lib/modules/6.99.0-lab
gone kernel-removed

# ---- a container ----
lab-ct create 101
gpu-handoff container attach 101
remember
# As after an update: the driver's number is another.
sed -i -E 's/^(lxc.cgroup2.devices.allow: c )[0-9]+(:[0-9*]+ .*)/\1511\2/' /etc/pve/lxc/101.conf
found ct-rules 'container 101'
typed ct-rules
rmmod nvidia_uvm
found uvm-not-loaded
typed uvm-not-loaded
works 'detach' gpu-handoff container detach 101
finish
