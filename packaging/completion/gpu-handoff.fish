# fish completion for gpu-handoff. Written by dev/generate from the table of verbs: make generate.

# Prints what may stand for $argv[1], a word of the usage lines.
function __gpu_handoff_list
    sh -c 'root=${GPU_HANDOFF_ROOT-}
    case $1 in
        SLOT)
            for file in "$root"/sys/bus/pci/devices/*; do
                { read -r vendor <"$file/vendor" && read -r class <"$file/class"; } || continue
                file=${file##*/}
                case $vendor$class in 0x10de0x03*) echo "${file%.*}" ;; esac
            done 2>/dev/null | sort -u
            ;;
        VMID) set -- "$root"/etc/pve/qemu-server/*.conf ;;
        CTID) set -- "$root"/etc/pve/lxc/*.conf ;;
        ID) set -- "$root"/etc/pve/qemu-server/*.conf "$root"/etc/pve/lxc/*.conf ;;
        KERNEL) set -- "$root"/lib/modules/* ;;
        FINDING) gpu-handoff doctor --explain all 2>/dev/null | sed -n "s/^\\([a-z0-9-]*\\)  .*/\\1/p" ;;
        STORAGE) sed -n "s/^[a-z]*: *//p" "$root"/etc/pve/storage.cfg 2>/dev/null ;;
    esac
    # What has been printed already leaves only its word, which is no number.
    for file in "$@"; do
        file=${file##*/}
        case $file in [0-9]*) echo "${file%.conf}" ;; esac
    done' sh $argv[1]
end

# The words so far, without flags and their values.
function __gpu_handoff_words
    set -l is_value no
    for word in (commandline -opc)[2..]
        if test $is_value = yes
            set is_value no
            continue
        end
        switch $word
            case --explain --gpu --kernel -n --output-format --storage --style --to
                set is_value yes
            case --status --help -h --version -V
                echo $word
            case '-*'
            case '*'
                echo $word
        end
    end
end

# Whether these are the words so far.
function __gpu_handoff_after
    test "$(__gpu_handoff_words)" = "$argv"
end

# Whether one of the verbs $argv[2..] is there, and $argv[1] words stand behind it: all, one number, or one and a plus.
function __gpu_handoff_in
    set -l words (__gpu_handoff_words)
    for name in $argv[2..]
        set -l length (count (string split ' ' -- $name))
        test "$words[1..$length]" = $name; or continue
        set -l behind (math (count $words) - $length)
        switch $argv[1]
            case all
                return 0
            case '*+'
                test $behind -ge (string trim -c + -- $argv[1])
                return
            case '*'
                test $behind = $argv[1]
                return
        end
    end
    return 1
end

complete -c gpu-handoff -f
complete -c gpu-handoff -n '__gpu_handoff_after ' -a --status -d 'every NVIDIA GPU: functions, drivers, owner, users, last handoff'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a doctor -d 'what is wrong with this host, its guests and containers, and how to put it right'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a history -d 'past handoffs and refusals, the newest last'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a plan -d 'the steps that starting this VM would take now, or why it would be refused'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a switch -d 'shut down the VM that has this one\'s GPU, and start this one'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a enable -d 'make this the hookscript of a VM or container; never in the place of another'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a disable -d 'remove this hookscript from a VM or container, and no other'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a to-vfio -d 'give a GPU to vfio-pci by hand, until to-home or a reboot'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a to-home -d 'bring a GPU home by hand, whatever its home is'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a container -d 'container attach, container detach, container setup, container check, container sync'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a setup -d 'setup vfio, setup driver, setup all, setup pending'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a config -d 'config check, config show'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a metrics -d 'numbers for Prometheus: who has each GPU, handoffs, how long they took'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a notify -d 'tell by Proxmox\'s notifications what is wrong, once while it lasts'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a reconcile -d 'bring home what a VM that does not run left behind; make missing device nodes'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a --help -d 'what there is, or one verb with an example'
complete -c gpu-handoff -n '__gpu_handoff_after ' -a --version -d 'the version'
complete -c gpu-handoff -n '__gpu_handoff_after container' -a attach -d 'let a container use the GPU: device rules and nodes in its configuration'
complete -c gpu-handoff -n '__gpu_handoff_after container' -a detach -d 'take out of its configuration what attach put in, and nothing else'
complete -c gpu-handoff -n '__gpu_handoff_after container' -a setup -d 'attach, then install the host\'s version of the driver and CUDA in the container, and verify'
complete -c gpu-handoff -n '__gpu_handoff_after container' -a check -d 'whether driver, device nodes and rules of a container fit those of the host'
complete -c gpu-handoff -n '__gpu_handoff_after container' -a sync -d 'bring containers to the host\'s version of the driver, and their rules up to date'
complete -c gpu-handoff -n '__gpu_handoff_after setup' -a vfio -d 'prepare the host: vfio-pci at boot, and no driver that takes the card first'
complete -c gpu-handoff -n '__gpu_handoff_after setup' -a driver -d 'install NVIDIA\'s driver on the host from its own installer'
complete -c gpu-handoff -n '__gpu_handoff_after setup' -a all -d 'setup vfio, and setup driver where one is configured'
complete -c gpu-handoff -n '__gpu_handoff_after setup' -a pending -d 'what set-up could not do when it was due; runs by itself at boot'
complete -c gpu-handoff -n '__gpu_handoff_after config' -a check -d 'what is wrong with the configuration, a line for each mistake'
complete -c gpu-handoff -n '__gpu_handoff_after config' -a show -d 'every key with the value that holds, and where it comes from'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l json -d 'print JSON, for programs'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l check -d 'end with 1 when something is not as it should be'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l watch -d 'show it again whenever it changes'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l cluster -d 'every node of the cluster, as it has told it last'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l output-format -x -a 'text json' -d 'the words of Proxmox\'s own tools: json is --json'
complete -c gpu-handoff -n '__gpu_handoff_in all "--status" "status"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "doctor"' -a '(__gpu_handoff_list ID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l json -d 'print JSON, for programs'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l explain -x -a '(__gpu_handoff_list FINDING)' -d 'tell more of a finding; all lists them'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l fix -d 'make missing nodes, take away what is left over'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l report -d 'all that a helper would ask for'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l to -r -F -d 'a new file for the report'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l output-format -x -a 'text json' -d 'the words of Proxmox\'s own tools: json is --json'
complete -c gpu-handoff -n '__gpu_handoff_in all "doctor"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "history"' -a '(__gpu_handoff_list VMID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "history"' -s n -x -d 'only the newest, so many of them'
complete -c gpu-handoff -n '__gpu_handoff_in all "history"' -l json -d 'print JSON, for programs'
complete -c gpu-handoff -n '__gpu_handoff_in all "history"' -l output-format -x -a 'text json' -d 'the words of Proxmox\'s own tools: json is --json'
complete -c gpu-handoff -n '__gpu_handoff_in all "history"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "plan"' -a '(__gpu_handoff_list VMID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "plan"' -l json -d 'print JSON, for programs'
complete -c gpu-handoff -n '__gpu_handoff_in all "plan"' -l output-format -x -a 'text json' -d 'the words of Proxmox\'s own tools: json is --json'
complete -c gpu-handoff -n '__gpu_handoff_in all "plan"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "switch"' -a '(__gpu_handoff_list VMID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "switch"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "switch"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "enable"' -a '(__gpu_handoff_list ID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "enable"' -l storage -x -a '(__gpu_handoff_list STORAGE)' -d 'have the hookscript on this shared storage'
complete -c gpu-handoff -n '__gpu_handoff_in all "enable"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "enable"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "disable"' -a '(__gpu_handoff_list ID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "disable"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "disable"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "to-vfio" "to_vfio" "handoff vfio"' -a '(__gpu_handoff_list SLOT)'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-vfio" "to_vfio" "handoff vfio"' -l gpu -x -a '(__gpu_handoff_list SLOT)' -d 'which GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-vfio" "to_vfio" "handoff vfio"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-vfio" "to_vfio" "handoff vfio"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "to-home" "to-nvidia" "to_nvidia" "handoff nvidia"' -a '(__gpu_handoff_list SLOT)'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-home" "to-nvidia" "to_nvidia" "handoff nvidia"' -l gpu -x -a '(__gpu_handoff_list SLOT)' -d 'which GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-home" "to-nvidia" "to_nvidia" "handoff nvidia"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "to-home" "to-nvidia" "to_nvidia" "handoff nvidia"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "container attach"' -a '(__gpu_handoff_list CTID)'
complete -c gpu-handoff -n '__gpu_handoff_in 1+ "container attach"' -a '(__gpu_handoff_list SLOT)'
complete -c gpu-handoff -n '__gpu_handoff_in all "container attach"' -l gpu -x -a '(__gpu_handoff_list SLOT)' -d 'which GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "container attach"' -l style -x -a 'mount dev' -d 'how the nodes get into the container'
complete -c gpu-handoff -n '__gpu_handoff_in all "container attach"' -l dri -d 'the DRM nodes as well'
complete -c gpu-handoff -n '__gpu_handoff_in all "container attach"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "container attach"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "container detach"' -a '(__gpu_handoff_list CTID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "container detach"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "container detach"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "container setup"' -a '(__gpu_handoff_list CTID)'
complete -c gpu-handoff -n '__gpu_handoff_in 1+ "container setup"' -a '(__gpu_handoff_list SLOT)'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l driver-only -d 'no CUDA toolkit'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l gpu -x -a '(__gpu_handoff_list SLOT)' -d 'which GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l style -x -a 'mount dev' -d 'how the nodes get into the container'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l dri -d 'the DRM nodes as well'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "container setup"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "container check"' -a '(__gpu_handoff_list CTID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "container check"' -l all -d 'every container that was given a GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "container check"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "container sync"' -a '(__gpu_handoff_list CTID)'
complete -c gpu-handoff -n '__gpu_handoff_in all "container sync"' -l all -d 'every container that was given a GPU'
complete -c gpu-handoff -n '__gpu_handoff_in all "container sync"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "container sync"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup vfio"' -l cmdline -d 'turn the IOMMU on in the kernel\'s command line'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup vfio"' -l undo -d 'take all of it back'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup vfio"' -l defer -d 'keep what fails for setup pending'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup vfio"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup vfio"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l install-deps -d 'have apt install what that takes'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l purge -d 'have apt purge a driver from packages'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l kernel -x -a '(__gpu_handoff_list KERNEL)' -d 'build only the driver\'s modules, for this kernel'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l undo -d 'take all of it back'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l defer -d 'keep what fails for setup pending'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup driver"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l cmdline -d 'turn the IOMMU on in the kernel\'s command line'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l install-deps -d 'have apt install what that takes'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l purge -d 'have apt purge a driver from packages'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l undo -d 'take all of it back'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup all"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup pending"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "setup pending"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "config check"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "config show"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "metrics"' -l write -d 'to the file that metrics.textfile names, and print nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "metrics"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "notify"' -l test -d 'send one that says so, whatever is configured'
complete -c gpu-handoff -n '__gpu_handoff_in all "notify"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "reconcile"' -l unfinished -d 'only what a killed handoff left behind'
complete -c gpu-handoff -n '__gpu_handoff_in all "reconcile"' -l owed -d 'what the keeper does by itself'
complete -c gpu-handoff -n '__gpu_handoff_in all "reconcile"' -l dry-run -d 'print what would be done, and change nothing'
complete -c gpu-handoff -n '__gpu_handoff_in all "reconcile"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in 0 "--help" "-h" "help"' -a '--status doctor history plan switch enable disable to-vfio to-home container setup config metrics notify reconcile --help --version'
complete -c gpu-handoff -n '__gpu_handoff_in all "--help" "-h" "help"' -l quiet -d 'only warnings and errors'
complete -c gpu-handoff -n '__gpu_handoff_in all "--version" "-V"' -l quiet -d 'only warnings and errors'
