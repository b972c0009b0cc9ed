#!/bin/bash
# With nothing but README: installed, enabled, started, looked at, disabled, purged, each command as it stands there.
# lab: --timeout 600
# lab-deb
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

readme=${0%/*}/README.md
export DEBIAN_FRONTEND=noninteractive
# Who types it says yes.
echo 'APT::Get::Assume-Yes "true";' >/etc/apt/apt.conf.d/lab
echo MODULES=list >/etc/initramfs-tools/conf.d/lab
rm -f /usr/sbin/gpu-handoff /var/lib/vz/snippets/gpu-handoff
sed -i '/^hookscript:/d; /^hostpci/d' "$guests/111.conf"
update-initramfs -c -k all >/dev/null 2>&1
cd /opt/lab || exit 1

# commands SECTION: its lines that are typed, without their comments
commands() {
    sed -n "/^## $1\$/,/^## /p" "$readme" | sed -nE 's/^    ((apt|gpu-handoff|qm) .*)/\1/p' | sed 's/ *#.*//'
}
typed() { # typed SECTION COUNT: all of them work
    local line count=0
    while IFS= read -r line; do
        # As a shell has it, with its globs.
        works "$line" bash -c "$line"
        count=$((count + 1))
    done < <(commands "$1")
    is "$1: commands" "$2" "$count"
}

remember_home
typed Install 3
ok 'the card is with the host' grep -q '^0000:01:00  host' <<<"$out"
typed 'Let a VM have the card' 5
in_vm 'the VM' $slot1 111
# README shows the same.
shown=$(sed -n '/^    0000:01:00  VM 111 /,/^$/p' "$readme" | sed 's/^    //' | grep '^  \.')
same 'what --status shows of functions, but for numbers' "$(tr -d 0-9 <<<"$shown")" "$(gpu-handoff --status | grep '^  \.' | tr -d 0-9)"
works 'qm stop 111' qm stop 111
is_home 'after the VM'
works 'to-vfio' gpu-handoff to-vfio
in_no_vm 'by hand' $slot1
works 'to-home' gpu-handoff to-home
is_home 'by hand, home'
typed 'Out again' 2
ok 'the program is gone' test ! -e /usr/sbin/gpu-handoff
ok 'no guest names it' not grep -q hookscript "$guests/111.conf"
works 'qm start without it' qm start 111
works 'qm stop without it' qm stop 111
finish
