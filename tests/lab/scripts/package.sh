#!/bin/bash
# The package is installed on a host that has nothing of ours, and goes again without a trace.
# lab: --timeout 900
# lab-deb
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

deb=$(echo /opt/lab/gpu-handoff_*.deb)
link=/var/lib/vz/snippets/gpu-handoff
export DEBIAN_FRONTEND=noninteractive
# What the package or the host's preparation may change; of the initramfs what is in it, not its bytes.
traces() {
    find /etc/modules-load.d /etc/modprobe.d /etc/udev /etc/systemd/system /etc/kernel /lib/udev/rules.d /usr/sbin /usr/share/gpu-handoff \
        /usr/share/bash-completion /var/lib/vz /var/lib/gpu-handoff /etc/gpu-handoff -type f,l -exec sha256sum {} + 2>/dev/null |
        sort -k2
    lsinitramfs /boot/initrd.img-* | grep -E 'modprobe.d|modules-load.d' | sort
}
blacklisted() { lsinitramfs /boot/initrd.img-* | grep -q modprobe.d/gpu-handoff.conf; }

# An initramfs with hardly any modules: it is made three times.
echo MODULES=list >/etc/initramfs-tools/conf.d/lab

# ---- a host without anything of ours ----
rm -f /usr/sbin/gpu-handoff "$link"
for id in 100 111; do sed -i '/^hookscript:/d' "$guests/$id.conf"; done
update-initramfs -c -k all >/dev/null 2>&1
before=$(traces)

# ---- installed ----
works 'dpkg -i' dpkg -i "$deb"
is 'the program' "$(dpkg-deb -f "$deb" Version)" "$(gpu-handoff --version | cut -d' ' -f2)"
is 'its link' /usr/sbin/gpu-handoff "$(readlink $link)"
ok 'vfio-pci is loaded at boot' grep -qx vfio_pci /etc/modules-load.d/gpu-handoff.conf
ok 'nouveau is kept away: there is an NVIDIA driver' grep -qx 'blacklist nouveau' /etc/modprobe.d/gpu-handoff.conf
ok 'in the initramfs, too' blacklisted
for unit in gpu-handoff-reconcile.service gpu-handoff-setup.service; do
    ok "$unit is enabled" systemctl --quiet is-enabled "$unit"
    ok "$unit is as systemd wants it" systemd-analyze verify --man=no "/usr/lib/systemd/system/$unit"
done
ok 'the keeper is enabled and listens' systemctl --quiet is-active gpu-handoff-keeper.path
ok 'the keeper is as systemd wants it' systemd-analyze verify --man=no /usr/lib/systemd/system/gpu-handoff-keeper.{path,timer,service}
ok 'nothing is left to do' test ! -e /var/lib/gpu-handoff/setup.pending
for folder in postinst.d header_postinst.d; do
    works "$folder" run-parts --exit-on-error --arg="$(uname -r)" "/etc/kernel/$folder"
done
ok 'udev takes the rules' udevadm verify /usr/lib/udev/rules.d/60-gpu-handoff.rules
ok 'a reboot is asked for' grep -qx gpu-handoff /run/reboot-required.pkgs
prepared=$(traces)
works 'once more' dpkg -i "$deb"
same 'once more: nothing changes' "$prepared" "$(traces)"

# ---- one word is enough for a guest ----
remember_home
works 'enable' gpu-handoff enable 111
is 'the hookscript' 'hookscript: local:snippets/gpu-handoff' "$(grep ^hookscript "$guests/111.conf")"
works 'qm start' qm start 111
in_vm 'with the VM' $slot1 111

# ---- while a VM has the GPU: upgraded, not removed ----
works 'upgraded' dpkg -i "$deb"
call dpkg -r gpu-handoff
is 'not removed' 1 "$rc"
says 'not removed' 'vm-111 has a GPU that nobody else would bring home'
in_vm 'still with the VM' $slot1 111
works 'qm stop' qm stop 111
is_home 'after the VM'

# ---- removed while a guest still names it ----
works 'dpkg -r' dpkg -r gpu-handoff
says 'dpkg -r' 'which does nothing from now on'
ok 'there is no program any more' test ! -e /usr/sbin/gpu-handoff
works 'a guest that names it starts' qm start 111
works 'and stops' qm stop 111
# On which nobody acted: the bare kernel gives it back.
to_host $slot1 nvidia

# ---- back, and gone for good ----
# The initramfs has been made often enough: it is as it was before, and is left so.
mount --bind /usr/bin/true /usr/sbin/update-initramfs
works 'installed again' dpkg -i "$deb"
is 'its link is back' /usr/sbin/gpu-handoff "$(readlink $link)"
ok 'and the host is prepared' grep -qx vfio_pci /etc/modules-load.d/gpu-handoff.conf
works 'disable' gpu-handoff disable 111
works 'purged' dpkg -P gpu-handoff
umount /usr/sbin/update-initramfs
same 'as it was before' "$before" "$(traces)"
finish
