# Boots the guest, or wakes it from a saved state. Sourced by ../run, whose variables it uses: image, modules, work, and
# what the command line said.
# shellcheck shell=bash
# shellcheck disable=SC2154 # all of these are run's

# describe: fills `machine`, all of the machine that is the same each time and in any folder, and `kernels`, their files
# in $work by name: what is in use here may be built anew and removed meanwhile.
describe() {
    local n slots=0000:01:00 cards=() firmware=() uefi=$image/root/usr/share/OVMF
    declare -gA kernels initrds
    for n in '' 2; do
        kernel=$(cat "$image/kernel$n")
        kernels[$kernel]=$image/vmlinuz$n initrds[$kernel]=$work/initrd$n
        cp "$modules/initrd$n" "$work/initrd$n"
    done
    kernel=$(cat "$image/kernel")
    for ((n = 1; n <= LAB_GPUS; n++)); do
        [ "$n" = 1 ] || slots+=,0000:0$n:00
        cards+=(-device "pcie-root-port,id=rp$n,chassis=$n,slot=$n"
            -device "VGA,bus=rp$n,addr=0.0,multifunction=on"
            -device "ich9-intel-hda,bus=rp$n,addr=0.1,id=hda$n" -device "hda-output,bus=hda$n.0,audiodev=quiet")
    done
    # What a VM may have beside a card: a USB controller and a disk. Where a second card would be is nothing.
    [ -z "${LAB_OTHERS-}" ] || [ "$LAB_GPUS" = 2 ] || cards+=(-device "pcie-root-port,id=rp2,chassis=2,slot=2")
    [ -z "${LAB_OTHERS-}" ] || cards+=(-device "pcie-root-port,id=rp8,chassis=8,slot=8" -device "qemu-xhci,bus=rp8"
        -device "pcie-root-port,id=rp9,chassis=9,slot=9" -device "nvme,bus=rp9,drive=nvme,serial=lab"
        -drive "file=nvme,format=raw,if=none,id=nvme,cache=unsafe")
    # It finds no disk to boot from and takes the kernel that QEMU offers, the card's framebuffer set up.
    [ "$LAB_FIRMWARE" = seabios ] || firmware=(
        -drive "if=pflash,format=raw,readonly=on,file=$uefi/OVMF_CODE_4M.fd" -drive 'if=pflash,format=raw,file=vars.fd')
    # shellcheck disable=SC2054 # QEMU's commas
    machine=(-name gpu-handoff-lab,process=qemu -machine q35,kernel-irqchip=split -accel tcg,thread=single
        -cpu "max,la57=off" -smp 2 -m "${LAB_MEMORY:-2048}" -audiodev none,id=quiet
        -display none -nodefaults -no-reboot
        -device intel-iommu,intremap=on,caching-mode=on "${cards[@]}" "${firmware[@]}"
        -drive "file=disk.qcow2,format=qcow2,if=virtio,cache=unsafe"
        -drive "file=base.tar,format=raw,if=virtio,readonly=on"
        -drive "file=payload,format=raw,if=virtio,readonly=on"
        -chardev "file,id=console,path=console.log,append=on" -serial chardev:console
        -device virtio-serial-pci
        -chardev "file,id=out,path=out" -device virtserialport,chardev=out,name=lab.out
        -chardev "file,id=ctl,path=ctl" -device virtserialport,chardev=ctl,name=lab.ctl
        -chardev "pipe,id=monitor,path=monitor" -mon chardev=monitor
        -chardev "file,id=journal,path=journal.log,append=on"
        -device virtserialport,chardev=journal,name=lab.journal)
    # no_timer_check and after: a guest that gets little time must not panic of it.
    cmdline="lab.slots=$slots lab.driver=$LAB_STACK console=ttyS0 intel_iommu=on iommu=pt mitigations=off \
lsm=landlock,lockdown,yama,apparmor loglevel=6 \
nokaslr no_timer_check nowatchdog rcupdate.rcu_cpu_stall_suppress=1 printk.devkmsg=on sysrq_always_enabled \
oops=panic panic=-1 systemd.show_status=0 ${LAB_APPEND-}"
    of_image "$image" qemu-system-x86_64
    # Where QEMU looks for its firmware and modules when it is installed.
    program+=(-L "$image/root/usr/share/qemu" -L "$image/root/usr/share/seabios")
    export QEMU_MODULE_DIR=$image/root/usr/lib/x86_64-linux-gnu/qemu
}

# overlay BACKING FORMAT FILE: a disk with what is on another and what will be written
overlay() {
    local program
    of_image "$image" qemu-img
    "${program[@]}" create -q -f qcow2 -b "$1" -F "$2" "$3"
}

# furnish FOLDER: what a machine has beside its disks
furnish() {
    mkfifo "$1/out" "$1/ctl" "$1/monitor.in" "$1/monitor.out"
    : >>"$1/console.log"
    : >>"$1/journal.log"
    [ -z "${LAB_OTHERS-}" ] || truncate -s 64M "$1/nvme"
    [ "$LAB_FIRMWARE" = seabios ] || cp "$image/root/usr/share/OVMF/OVMF_VARS_4M.fd" "$1/vars.fd"
    exec {ctl}<>"$1/ctl"
}

# payload FOLDER TIME [TAR]: the disk with what a run brings along, of one size: see guest/lab-payload
payload() {
    [ -z "${3-}" ] || { printf '%-511s\n' "lab $2"$'\n' && cat "$3"; } >"$1/payload"
    truncate -s 1G "$1/payload"
}

# boot FOLDER KERNEL SECONDS [OPTION…]: its machine, for the first time, or again after so many seconds
boot() {
    cat "$1/out" &
    copier=$!
    # pdeathsig: the guest goes even when this shell is killed outright.
    (
        cd "$1" || exit
        TMPDIR=$1 exec setpriv --pdeathsig KILL "${program[@]}" "${machine[@]}" \
            -kernel "${kernels[$2]}" -initrd "${initrds[$2]}" -append "${cmdline/ / lab.elapsed=$3 }" "${@:4}"
    ) </dev/null >"$1/qemu.log" 2>&1 {lock}>&- &
    qemu=$!
}

# spent: fills `spent` with the seconds of processor time that ended children have used
spent() {
    times >"$work/times"
    # shellcheck disable=SC2034 # for run
    spent=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, "[ms]"); s += t[1] * 60 + t[2] } printf "%.0f\n", s }' "$work/times")
}

gone() { # waits until it is
    wait "$qemu" 2>/dev/null || true
    wait "$copier" || true
    qemu='' copier=''
    exec {ctl}>&-
}

# A machine that hardly anybody wants is not worth a saved state, and one with an NVMe disk has none.
is_common() { [ -z "${LAB_APPEND-}${LAB_MEMORY-}${LAB_FRESH-}${LAB_OTHERS-}" ] && [ "$LAB_HOME" != vfio ]; }

# saved: fills `state` with the folder of a machine like this one that has booted and waits for its payload; boots it,
# if there is none. Whatever the state depends on is in its name.
saved() {
    local began=$SECONDS line='' new
    state=$image/booted-$(printf '%s\n' "${modules##*/}" "${machine[@]}" "$cmdline" \
        "$(sha256sum <"$work/base.tar")" | sed "s|$image||" | sha256sum | cut -c1-12)
    exec {lock}>"$state.lock"
    flock "$lock"
    if [ ! -e "$state/state" ]; then
        say "booting a machine like this one, whose state is saved"
        find "$image" -maxdepth 1 -name 'booted-*' -mmin +180 -exec rm -rf {} +
        new=$state.new
        rm -rf "$new"
        mkdir "$new"
        cp "$work/base.tar" "$new/"
        overlay ../disk.img raw "$new/disk.qcow2"
        furnish "$new"
        payload "$new" 0
        boot "$new" "$kernel" 0
        until [[ $line == ready* ]]; do
            line=''
            read -r -t 1 -u "$ctl" line || true
            if ! kill -0 "$qemu" 2>/dev/null || [ $((SECONDS - began)) -gt 900 ]; then
                say "the machine does not come up; QEMU says: $(cat "$new/qemu.log"); the end of its console:"
                tail -n 40 "$new/console.log" | tr -d '\r' >&2
                exit 123
            fi
        done
        # When QEMU has ended nobody reads any more what it said.
        timeout 120 cat "$new/monitor.out" >"$new/said" &
        printf '%s\n' 'migrate_set_parameter max-bandwidth 16G' 'migrate -d file:state' >"$new/monitor.in"
        # The last of it, the devices, may take a moment after the memory.
        for _ in {1..300}; do
            echo 'info migrate' >"$new/monitor.in"
            sleep 0.2
            ! grep -q 'Migration status: \(completed\|failed\|cancelled\)' "$new/said" || break
        done
        echo quit >"$new/monitor.in"
        gone
        if ! grep -q 'Migration status: completed' "$new/said" || grep 'Oops\|BUG:\|Kernel panic' "$new/console.log"; then
            tr -d '\r' <"$new/said" >&2
            broken "the machine's state cannot be saved"
        fi
        rm -f "$new"/{out,ctl,monitor.*,said,payload,qemu.log}
        mv -T "$new" "$state"
        say "it has booted, which took $((SECONDS - began)) s"
    fi
    touch "$state"
    exec {lock}>&-
}

# wake: begins $work with a saved state, at its first boot
wake() {
    overlay "$state/disk.qcow2" qcow2 "$work/disk.qcow2"
    cp "$state"/{console,journal}.log "$work/"
    furnish "$work"
    payload "$work" "$(date +%s)" "$work/payload.tar"
    boot "$work" "$kernel" 0 -incoming "file:$state/state"
}

# power_on: begins $work with a boot
power_on() {
    overlay "$image/disk.img" raw "$work/disk.qcow2"
    furnish "$work"
    payload "$work" 0 "$work/payload.tar"
    boot "$work" "$kernel" 0
}
