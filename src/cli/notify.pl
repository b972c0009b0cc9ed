# Hands a notification to Proxmox VE: TEMPLATE SEVERITY TITLE MESSAGE FIELD VALUE ... None of them is part of this program.
my ($template, $severity, $title, $message, %fields) = map { utf8::decode($_); $_ } @ARGV;
my $data = { title => $title, message => $message };
# What becomes of each target is told on standard error, and is no error: standard output has it then.
open(my $complaint, '>&', \*STDERR) or die;
open(STDERR, '>&', \*STDOUT) or die;
my @template = $template ? ($template) : ('{{title}}', '{{message}}');
eval { PVE::Notify::notify($severity, @template, $data, \%fields); 1 } and exit 0;
print $complaint $@;
exit 1;
