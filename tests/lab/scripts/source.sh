#!/bin/bash
# Installed by hand, without the package, each command as docs/installation.md has it; then those of the manual pages, of
# docs/monitoring.md and of docs/driver.md.
# lab: --timeout 300
# shellcheck source-path=SCRIPTDIR source=handoff.sh
. "${0%/*}/handoff.sh"

# The parts of the work tree that are installed, and where make build has left the program.
cd "${0%/*}/source" || exit 1
install -D -m 755 /usr/sbin/gpu-handoff target/release/gpu-handoff
rm -f /usr/sbin/gpu-handoff /var/lib/vz/snippets/gpu-handoff
sed -i '/^hookscript:/d' "$guests/111.conf"
mkdir -p /etc/kernel/postinst.d

block() { # block PAGE HEADING: its indented lines
    sed -n "/^#* *$2\$/,/^#/p" "docs/$1" | sed -n 's/^    //p'
}
block installation.md 'By hand, without the package' >/run/typed
is 'it begins with make build' 'make build' "$(head -n 1 /run/typed)"
sed -i 1d /run/typed
remember_home
works 'the block, a line after the other' bash -e /run/typed
says 'enable' 'VM 111 has the hookscript local:snippets/gpu-handoff'

# ---- all of it is there, and works ----
for file in packaging/debian/gpu-handoff.gpu-handoff-*; do
    unit=${file##*/gpu-handoff.}
    same "$unit" "$(<"$file")" "$(cat "/etc/systemd/system/$unit")"
    ok "$unit is one" systemd-analyze verify --man=no "$unit"
done
for unit in gpu-handoff-reconcile.service gpu-handoff-setup.service gpu-handoff-keeper.path; do
    is "$unit" enabled "$(systemctl is-enabled "$unit")"
done
is 'gpu-handoff-keeper.path now' active "$(systemctl is-active gpu-handoff-keeper.path)"
for folder in postinst.d header_postinst.d; do ok "hook in $folder" test -x "/etc/kernel/$folder/gpu-handoff"; done
same 'the rules' "$(<udev/60-gpu-handoff.rules)" "$(cat /etc/udev/rules.d/60-gpu-handoff.rules)"
for page in man8/gpu-handoff.8 man5/gpu-handoff.json.5; do ok "$page" test -s "/usr/local/share/man/$page"; done
works 'qm start 111' qm start 111
in_vm 'the VM' $slot1 111
works 'qm stop 111' qm stop 111
is_home 'after the VM'

# ---- the manual pages' examples ----
rm $hook
sed -i '/^hookscript:/d' "$guests/111.conf"
mapfile -t examples < <(sed -n '/^\.Sh EXAMPLES$/,/^\.Ed$/s/^# //p' packaging/man/gpu-handoff.8)
is 'examples' 4 ${#examples[@]}
for line in "${examples[@]}"; do works "$line" bash -c "$line"; done
ok 'the last of them tells the steps' grep -q 'bind to vfio-pci' <<<"$out"
mkdir -p "${config%/*}"
count=0
while IFS= read -r -d $'\1' text; do
    # With a card that is here.
    printf '%s' "${text//41:00/01:00}" >"$config"
    count=$((count + 1))
    works "configuration $count" gpu-handoff config check
done < <(sed -n '/^\.Bd /,/^\.Ed$/{/^\.Bd /d;s/^\.Ed$/\x01/;p}' packaging/man/gpu-handoff.json.5)
is 'configurations' 3 $count
rm "$config"

# ---- docs/monitoring.md's, and the unit that a hook has write the file ----
file=/var/lib/prometheus/node-exporter/gpu-handoff.prom
mkdir -p "${file%/*}"
mapfile -t typed < <(sed -n 's/^    //p' docs/monitoring.md | head -n 4)
echo "${typed[0]}" >"$config"
for line in "${typed[@]:1}"; do works "$line" bash -c "$line"; done
ok 'the file is there' grep -q '^gpu_handoff_owner_info{slot="0000:01:00",.*owner="host"' $file
works 'qm start 111' qm start 111
ok 'the file says who has the card' within 30 grep -q 'owner="vm",vmid="111"' $file
works 'qm stop 111' qm stop 111
ok 'and that it is home' within 30 grep -q 'owner="host"' $file
is 'the unit that writes it' success "$(systemctl show -p Result --value gpu-handoff-metrics.service)"
rm "$config"

# ---- the driver's installer, where it was downloaded ----
page=$PWD/docs/driver.md
cd /opt/lab/nvidia || exit 1
{ read -r put && read -r look; } < <(sed -n 's/^    //p' "$page")
works "$put" bash -c "$put"
works "$look" bash -c "$look"
ok 'it was found' grep -qF "driver $LAB_DRIVER" <<<"$out"
finish
