# What the stand-ins for Proxmox VE's `qm` and `pct` have in common: files, locks,
# hookscripts, tasks, arguments. Loaded by them with `require`, into their package.
# A comment "~ name" says which of Proxmox's functions a part stands for.
#
# Perl, because the original is Perl and regexes then agree; of its modules only
# Fcntl, because POSIX, Socket and IPC::Open3 take longer to load in an emulator
# than everything else here. Hence the bare numbers, all of Linux on x86-64.
use strict;
use warnings;
use Fcntl qw(:flock O_WRONLY O_CREAT O_EXCL);

use constant { ENOENT => 2, EINTR => 4, EEXIST => 17, ECONNREFUSED => 111 };
sub setsid { syscall(112) }
sub close_fd { syscall(3, $_[0] + 0) }
sub nap { select(undef, undef, undef, $_[0]) }

# Only for tries of `qm` on a machine without Proxmox's directories: all paths but
# QEMU's own move below it, and devices are not handed to QEMU.
our $ROOT = $ENV{QM_LAB_ROOT} // '';

our $PVE     = "$ROOT/etc/pve";
our $SELF    = $0 =~ m|^/| ? $0 : readlink('/proc/self/cwd') . "/$0";
our $SYSTEMD = !$ROOT && -d '/run/systemd/system';
our ($NODE) = (read_file('/proc/sys/kernel/hostname') // 'localhost') =~ /^([^.\s]+)/;

# ---------------------------------------------------------------- small files

sub read_file {
    my ($path) = @_;
    open(my $fh, '<', $path) or return undef;
    local $/;
    my $data = <$fh>;
    return $data // '';
}

sub first_line {
    my $data = read_file($_[0]) // return undef;
    return (split /\n/, $data, 2)[0] // '';
}

# ~ PVE::File::file_set_contents: a temporary file beside the target, renamed
sub write_file {
    my ($path, $data, $mode) = @_;
    my $tmp = "$path.tmp.$$";
    if ($path =~ m|^\Q$PVE\E/(.*)$| && !has_quorum()) {
        my $name = "$PVE/nodes/$NODE/$1.tmp.$$";
        $! = ENOENT;    # left by the removal of the temporary file
        die "unable to open file '$name' - Permission denied\n";
    }
    unlink $tmp;
    sysopen(my $fh, $tmp, O_WRONLY | O_CREAT | O_EXCL, $mode // 0644)
        or die "unable to open file '$tmp' - $!\n";
    chmod $mode // 0644, $tmp;    # whatever the umask
    print $fh $data;
    close $fh or die "closing file '$tmp' failed - $!\n";
    rename($tmp, $path) or die "close (rename) atomic file '$path' failed: $!\n";
}

# ~ PVE::Tools::lock_file_full. The descriptor is close-on-exec (Perl's default
# above 2), so neither hooks nor guests inherit the lock.
sub with_lock {
    my ($path, $timeout, $code) = @_;
    open(my $fh, '>>', $path) or die "can't lock file '$path' - can't open file - $!\n";
    if (!flock($fh, LOCK_EX | LOCK_NB)) {
        print STDERR "trying to acquire lock...\n";
        eval {
            local $SIG{ALRM} = sub { die "got timeout\n" };
            alarm $timeout;
            until (flock($fh, LOCK_EX)) { $! == EINTR or die "can't acquire lock '$path' - $!\n" }
            alarm 0;
        };
        my $err = $@;
        alarm 0;
        $! = EINTR;    # by which outside of a task the program ends
        die "can't lock file '$path' - $err" if $err;
        print STDERR " OK\n";
    }
    return $code->();
}

# ------------------------------------------------------------ pmxcfs, as lab-pve has it

# ~ PVE::Cluster::check_cfs_quorum: without quorum the file system takes away the right to write
sub has_quorum { my $mode = (stat "$PVE/local")[2]; return !defined $mode || $mode & 0200 }
sub check_quorum { has_quorum() or die "cluster not ready - no quorum?\n" }

# Its directories go with it.
sub pmxcfs_is_gone { return !$ROOT && !-l "$PVE/local" }

sub pmxcfs_errors {
    return ((map { "ipcc_send_rec[$_] failed: Connection refused\n" } 1 .. 3),
        "Unable to load access control list: Connection refused\n");
}

# ~ CLIHandler::run_cli_handler, which reads the access control list before anything else
sub die_without_pmxcfs {
    return if !pmxcfs_is_gone();
    print STDERR pmxcfs_errors();
    exit ECONNREFUSED;
}

sub make_dir {
    my ($dir) = @_;
    return if -d $dir;
    my $path = '';
    mkdir($path .= "/$_") for grep { length } split m|/|, $dir;
}

# ------------------------------------------------------- guest configurations

# ~ PVE::AbstractConfig::parse_pending_delete; '!key' asks for a forced deletion
sub split_keys { return map { s/^!//r } grep { length } split /[,;\s]+/, $_[0] // '' }

# ~ JSONSchema::parse_property_string: `key=value,…` by FORMAT, which has a regex
# for each key; the key of the default property may be left out in any position
our $BOOL = qr/(?:[01]|on|off|yes|no|true|false)/i;
sub truth { return $_[0] =~ m/^(?:1|on|yes|true)\z/i ? 1 : 0 }

sub parse_properties {
    my ($name, $value, $default, $format) = @_;
    my $res = {};
    foreach my $part (split /,/, $value) {
        next if $part =~ m/^\s*$/;
        my ($k, $v) = $part =~ m/^([^=]+)=(.+)$/ ? ($1, $2) : ($default, $part);
        die "missing key in comma-separated list property\n" if $k eq $default && $v =~ /=/;
        die "duplicate key in comma-separated list property: $k\n" if defined $res->{$k};
        my $re = $format->{$k} or die "invalid key in comma-separated list property: $k\n";
        $v =~ m/^(?:$re)\z/ or die "format error\n$name.$k: value does not match the regex pattern\n";
        $res->{$k} = $re eq $BOOL ? truth($v) : $v;
    }
    return $res;
}

# ---------------------------------------------------------------- hookscripts

# ~ PVE::GuestHelpers::check_hookscript and PVE::Storage::path, for the one
# storage that every installation has
sub hookscript_path {
    my ($volid) = @_;
    $volid =~ m/^([a-z][a-z0-9\-_.]*[a-z0-9]):(.+)$/i or die "unable to parse volume ID '$volid'\n";
    my ($storage, $name) = ($1, $2);
    die "storage '$storage' does not exist\n" if $storage ne 'local';
    if ($name !~ m|^snippets/([^/]+)$|) {
        die "'$volid' is not in the snippets directory\n" if $name =~ m{^(?:iso|vztmpl|backup|import)/[^/]+$};
        die "unable to parse directory volume name '$name'\n";
    }
    my $path = "$ROOT/var/lib/vz/snippets/$1";
    die "script '$volid' does not exist\n" if !-f $path;
    die "script '$volid' is not executable\n" if !-x $path;
    return $path;
}

# ~ PVE::Cmd::run: three pipes, nothing in the first; what comes out of the others
# is passed on as it comes, until every process that holds them has let go. No
# time limit but one given as `{ timeout => SECONDS }` before the command.
sub run_command {
    my $opt = ref $_[0] ? shift : {};
    my (@cmd) = @_;
    my $end = $opt->{timeout} ? time() + $opt->{timeout} : undef;
    my $cmdstr = join ' ', @cmd;
    eval {
        pipe(my $in, my $in_w) && pipe(my $out, my $out_w) && pipe(my $err, my $err_w)
            && pipe(my $oops, my $oops_w) or die "pipe: $!\n";
        defined(my $pid = fork) or die "fork: $!\n";
        if (!$pid) {
            @ENV{qw(LC_ALL LVM_SUPPRESS_FD_WARNINGS)} = ('C', 1);
            open(STDIN, '<&', $in);
            open(STDOUT, '>&', $out_w);
            open(STDERR, '>&', $err_w);
            { no warnings 'exec'; exec { $cmd[0] } @cmd }    # all but 0 to 2 are close-on-exec
            syswrite $oops_w, "open3: exec of $cmdstr failed: $! at $0 line " . __LINE__ . ".\n";
            kill 9, $$;
        }
        close $_ for $in, $in_w, $out_w, $err_w, $oops_w;
        my %to = (fileno($out) => [$out, \*STDOUT], fileno($err) => [$err, \*STDERR]);
        while (%to) {
            my $bits = '';
            vec($bits, $_, 1) = 1 for keys %to;
            if (defined $end && time() >= $end) {
                kill 9, $pid;
                waitpid $pid, 0;
                die "got timeout\n";
            }
            select($bits, undef, undef, $end && 0.2) > 0 or next;
            foreach my $fd (sort { $a <=> $b } grep { vec($bits, $_, 1) } keys %to) {
                my ($from, $to) = @{ $to{$fd} };
                if (sysread($from, my $buf, 4096)) { print $to $buf }
                else { delete $to{$fd} }
            }
        }
        waitpid($pid, 0);
        my $failed = <$oops>;
        die $failed if defined $failed;
        if (my $sig = $? & 127) { die "got signal $sig\n" }
        if (my $code = $? >> 8) { die "exit code $code\n" if $code != 24 || $cmd[0] !~ m{(?:^|/)rsync$} }
    };
    die "command '$cmdstr' failed: $@" if $@;
}

# ~ PVE::GuestHelpers::exec_hookscript
sub exec_hookscript {
    my ($conf, $vmid, $phase, $stop_on_error) = @_;
    my $volid = $conf->{main}{hookscript} or return;
    eval { run_command(hookscript_path($volid), $vmid, $phase) };
    if ($@) {
        my $message = "hookscript error for $vmid on $phase: $@\n";
        die $message if $stop_on_error;
        warn $message;
    }
}

# ---------------------------------------------------------- tasks and arguments

# ~ RESTEnvironment::fork_worker: the work is done by a process in a session and
# group of its own. A signal to the program goes to that whole group, hook included, and
# to the fourth signal it is SIGKILL: "Stop" in the task viewer does the same.
sub task {
    my ($code) = @_;
    defined(my $pid = fork) or die "unable to fork worker - $!\n";
    if (!$pid) {
        setsid();
        $SIG{INT} = $SIG{QUIT} = $SIG{TERM} = sub { die "received interrupt\n" };
        eval { $code->(); 1 } and exit 0;
        print STDERR $@;
        exit 255;
    }
    my $count = 0;
    local $SIG{INT} = local $SIG{QUIT} = local $SIG{TERM} = sub { kill $count++ < 3 ? 15 : 9, -$pid };
    until (waitpid($pid, 0) == $pid) { last if $! != EINTR }
    return $? ? 255 : 0;
}

# What the caller has open is not for hooks, and a guest would hold it for hours.
sub close_inherited {
    opendir(my $fds, '/proc/self/fd');
    my @inherited = grep { m/^\d+$/ && $_ > 2 && $_ != fileno($fds) } readdir $fds;
    closedir $fds;
    close_fd($_) for @inherited;
}

# The words, the options, and the options as they are shown in a log. Every option
# has a value, which is 1 when it stands alone.
sub parse_arguments {
    my (@args) = @_;
    my (@plain, %opt, @said);
    while (defined(my $arg = shift @args)) {
        if ($arg !~ m/^--?([a-zA-Z].*)$/) { push @plain, $arg; next }
        my ($key, $value) = split /=/, $1, 2;
        $value //= @args && $args[0] !~ m/^--?[a-zA-Z]/ ? shift @args : 1;
        ($opt{$key}, @said) = ($value, @said, "-$key", $value);
    }
    return (\@plain, \%opt, \@said);
}

1;
